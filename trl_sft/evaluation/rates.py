"""Shares with their exact intervals, and the agreement of two raters.

Inputs: counts, or the categories that two raters chose. Outputs: `Rate`, `Agreement`. Not here: differences of paired
scores, and tests (`statistics`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trl_sft.evaluation.statistics import CONFIDENCE


@dataclass(frozen=True)
class Rate:
    """A share with its exact two-sided interval (Clopper and Pearson 1934).

    The interval excludes 0.5 exactly where the exact sign test, as twice its smaller tail, has p < 0.05. Of 0 in n its
    upper end is about 3.7/n; the one-sided bound `upper` is about 3/n, the rule of three.
    """

    successes: int
    count: int
    value: float | None  # None = the count is 0
    low: float
    high: float
    upper: float  # one-sided 95% bound from above

    def describe(self) -> dict[str, Any]:
        """Return the rate as a mapping that JSON can write."""
        return {"successes": self.successes, "count": self.count, "value": self.value} | {
            "low": self.low,
            "high": self.high,
        }

    def __str__(self) -> str:
        """Return the share with its interval, as a screen shows it."""
        if self.value is None:
            return "none"
        return f"{self.value:.0%} [{self.low:.0%}, {self.high:.0%}]"


@dataclass(frozen=True)
class Agreement:
    """How far two raters agree on the same items."""

    items: int
    agreement: float  # share of items with the same category
    kappa: float | None  # Cohen's; None = it is not defined, since both chose one category only
    low: float | None  # None = the formula gives no interval: one category only, or full agreement
    high: float | None

    def __str__(self) -> str:
        """Return kappa with its interval, as a screen shows it."""
        if self.kappa is None:
            return "Cohen's kappa is not defined (one outcome only)"
        interval = "" if self.low is None else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"Cohen's kappa {self.kappa:.2f}{interval}"

    def describe(self) -> dict[str, Any]:
        """Return the agreement as a mapping that JSON can write."""
        return {name: getattr(self, name) for name in ("items", "agreement", "kappa", "low", "high")}


def compute_rate(successes: int, count: int) -> Rate:
    """Return a share with its exact interval; of no item the interval is everything."""
    from scipy import stats

    if not count:
        return Rate(0, 0, None, 0.0, 1.0, 1.0)
    tail = (1 - CONFIDENCE) / 2
    low, high, upper = 0.0, 1.0, 1.0
    if successes:
        low = float(stats.beta.ppf(tail, successes, count - successes + 1))
    if successes < count:
        high = float(stats.beta.ppf(1 - tail, successes + 1, count - successes))
        upper = float(stats.beta.ppf(CONFIDENCE, successes + 1, count - successes))
    return Rate(successes, count, successes / count, low, high, upper)


def compute_agreement(first: Sequence[str], second: Sequence[str], categories: Sequence[str]) -> Agreement | None:
    """Return Cohen's kappa of two raters with its 95% interval (Fleiss, Cohen and Everitt 1969); None without an item.

    Args:
        first: the category of each item, by one rater.
        second: the same of the other rater, in the same order.
        categories: all that a rater may choose.

    """
    from statsmodels.stats.inter_rater import cohens_kappa

    if not first:
        return None
    place = {category: number for number, category in enumerate(categories)}
    table = [[0] * len(categories) for _ in categories]
    for one, other in zip(first, second, strict=True):
        table[place[one]][place[other]] += 1
    share = sum(table[number][number] for number in range(len(categories))) / len(first)
    if len({*first, *second}) == 1:  # chance agrees fully too: 0 / 0
        return Agreement(len(first), share, None, None, None)
    with np.errstate(invalid="ignore", divide="ignore"):  # of its test, where one rater chose one category only
        result = cohens_kappa(table)
    if not result.std_kappa > 0:
        return Agreement(len(first), share, float(result.kappa), None, None)
    low, high = (max(-1.0, min(1.0, float(value))) for value in (result.kappa_low, result.kappa_upp))
    return Agreement(len(first), share, float(result.kappa), low, high)
