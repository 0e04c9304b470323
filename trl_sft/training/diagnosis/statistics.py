"""Rank tests and robust numbers for short curves: Mann-Whitney, Mann-Kendall, Fisher, median absolute deviation.

In: arrays of logged numbers, or counts. Out: p-values. Deliberately absent: what they mean. scipy is no dependency; the
tests compare with published values and with enumeration.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

_EXACT = 4_000  # ways to choose the ranks of one sample, up to which all are counted


def compare_ranks(low: Sequence[float] | np.ndarray, high: Sequence[float] | np.ndarray) -> float:
    """Return the one-sided p-value of Mann-Whitney's test that the first sample lies below the second.

    Few values are counted exactly, many by the normal approximation with ties and continuity correction.

    Args:
        low: (n,) values.
        high: (m,) values.

    """
    n, m = len(low), len(high)
    values = np.concatenate([np.asarray(low, float), np.asarray(high, float)])
    ranks = _rank(values)
    u = float(ranks[:n].sum()) - n * (n + 1) / 2  # small = the first sample is below
    if math.comb(n + m, n) <= _EXACT:
        limit = float(ranks[:n].sum()) + 1e-9
        sums = [sum(chosen) for chosen in itertools.combinations(ranks.tolist(), n)]
        return float(sum(total <= limit for total in sums) / len(sums))
    _, ties = np.unique(values, return_counts=True)
    correction = float((ties**3 - ties).sum()) / ((n + m) * (n + m - 1))
    variance = n * m / 12 * (n + m + 1 - correction)
    return _normal_tail((u + 0.5 - n * m / 2) / math.sqrt(variance)) if variance > 0 else 1.0


def find_trend(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Return Kendall's S and the one-sided p-value of a trend in its direction (Mann-Kendall).

    Args:
        values: (n,) in the order of time; n >= 2.

    Returns:
        S: pairs that rise less pairs that fall. The p-value is exact without ties for n <= 8, else normal.

    """
    array = np.asarray(values, float)
    n = len(array)
    signs = np.sign(array[None, :] - array[:, None])
    s = float(np.triu(signs, 1).sum())
    if n <= 8 and len(np.unique(array)) == n:
        counts = _count_inversions(n)
        pairs = n * (n - 1) // 2
        inversions = round((pairs - abs(s)) / 2)  # of the rarer kind
        return s, sum(counts[: inversions + 1]) / math.factorial(n)
    _, ties = np.unique(array, return_counts=True)
    variance = (n * (n - 1) * (2 * n + 5) - float((ties * (ties - 1) * (2 * ties + 5)).sum())) / 18
    if variance <= 0 or s == 0:
        return s, 0.5
    return s, _normal_tail(-(abs(s) - 1) / math.sqrt(variance))


def compare_shares(hits: int, size: int, *, other_hits: int, other_size: int) -> float:
    """Return the one-sided p-value of Fisher's exact test that the first share is larger.

    Args:
        hits: of the first group.
        size: of the first group.
        other_hits: of the second group.
        other_size: of the second group.

    """
    all_hits = hits + other_hits
    ways = math.comb(size + other_size, all_hits)
    larger = range(hits, min(size, all_hits) + 1)
    return sum(math.comb(size, k) * math.comb(other_size, all_hits - k) for k in larger) / ways


def estimate_deviation(values: Sequence[float] | np.ndarray) -> float:
    """Return the standard deviation of normal values, from their median absolute deviation; outliers do not count."""
    array = np.asarray(values, float)
    return 1.4826 * float(np.median(np.abs(array - np.median(array))))


def _rank(values: np.ndarray) -> np.ndarray:
    """Return the ranks from 1; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def _count_inversions(n: int) -> list[int]:
    """Return how many orders of n values have 0, 1, 2, ... inversions (Mahonian numbers)."""
    counts = [1]
    for size in range(2, n + 1):
        longer = [0] * (len(counts) + size - 1)
        for shift, (index, count) in itertools.product(range(size), enumerate(counts)):
            longer[index + shift] += count
        counts = longer
    return counts


def _normal_tail(z: float) -> float:
    """Return the share of a normal distribution below z."""
    return 0.5 * math.erfc(-z / math.sqrt(2))
