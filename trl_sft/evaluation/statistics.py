"""Statistics of two models that answered the same prompts: intervals, tests, and what the count can tell.

Inputs: a score of each model for each row, from 0 to 1, and which prompt the row has. Outputs: counts, intervals and
p-values. Rows that have the same prompt are one observation: their scores are averaged first. Intervals and tests are
those of scipy and statsmodels. Not here: scores (`checks`), and which sentence follows from a result (`verdict`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

CONFIDENCE = 0.95
ALPHA = 0.05  # of two-sided tests
RESAMPLES = 9999  # of the bootstrap; scipy's own default
SEED = 0  # of the bootstrap
LEAST_PROMPTS = 30  # with fewer nothing is resolved: the bootstrap of a mean needs about that many observations
POWER = 0.8  # of `compute_needed_prompts`
_MOST_NEEDED = 100_000  # prompts; more is as good as never
BETTER, WORSE, NO_DIFFERENCE, NOT_RESOLVED = "improved", "worse", "no_difference", "not_resolved"


class Interval(NamedTuple):
    """An estimate with its confidence interval."""

    value: float
    low: float
    high: float


class PairedResult(NamedTuple):
    """What the answers of two models to the same prompts tell.

    Attributes:
        prompts: how many different prompts there are.
        base: the base model's mean score.
        tuned: the tuned model's mean score.
        difference: the mean of tuned minus base, with its BCa bootstrap interval.
        better: prompts whose answers the tuned model improved; `tied` and `worse` likewise.
        better_share: `better` of `prompts`, with its Wilson interval.
        p_value: of the exact sign test on the prompts that are not tied.
        resolution: BETTER, WORSE, NO_DIFFERENCE or NOT_RESOLVED.
        needed_prompts: with how many prompts of this kind a difference of this size would show with 80% power; None =
            the sides are level, or more than 100,000.

    """

    prompts: int
    base: float
    tuned: float
    difference: Interval
    better: int
    tied: int
    worse: int
    better_share: Interval
    p_value: float
    resolution: str
    needed_prompts: int | None


def average_by_prompt(scores: Sequence[float], prompts: Sequence[Hashable]) -> np.ndarray:
    """Return the mean score of each different prompt, (prompts,), in the order in which they first occur."""
    members: dict[Hashable, list[float]] = {}
    for score, prompt in zip(scores, prompts, strict=True):
        members.setdefault(prompt, []).append(score)
    return np.array([float(np.mean(values)) for values in members.values()])


def compare_scores(base: np.ndarray, tuned: np.ndarray, *, tie_margin: float | np.ndarray = 0.0) -> PairedResult:
    """Return what paired scores tell.

    Args:
        base: (prompts,), one score for each different prompt.
        tuned: (prompts,), in the same order.
        tie_margin: a difference of at most this is a tie; one number, or one for each prompt.

    """
    from statsmodels.stats.proportion import proportion_confint

    differences = tuned - base
    better = int((differences > tie_margin + 1e-12).sum())
    worse = int((differences < -tie_margin - 1e-12).sum())
    count = len(differences)
    interval = bootstrap_mean(differences)
    p_value = compute_sign_test(better, worse)
    low, high = proportion_confint(better, count, alpha=1 - CONFIDENCE, method="wilson")
    return PairedResult(
        prompts=count,
        base=float(base.mean()),
        tuned=float(tuned.mean()),
        difference=interval,
        better=better,
        tied=count - better - worse,
        worse=worse,
        better_share=Interval(better / count, float(low), float(high)),
        p_value=p_value,
        resolution=resolve(interval, p_value, prompts=count, decisive=better + worse),
        needed_prompts=compute_needed_prompts(better, worse, count),
    )


def resolve(difference: Interval, p_value: float, *, prompts: int, decisive: int) -> str:
    """Return whether a difference is resolved: both the interval and the sign test have to agree.

    Args:
        difference: tuned minus base.
        p_value: of the sign test, corrected where several tasks are tested.
        prompts: how many different prompts there are.
        decisive: how many of them are not tied.

    """
    if prompts < LEAST_PROMPTS:
        return NOT_RESOLVED
    if not decisive:
        return NO_DIFFERENCE
    if p_value >= ALPHA:
        return NOT_RESOLVED
    if difference.low > 0:
        return BETTER
    return WORSE if difference.high < 0 else NOT_RESOLVED


def bootstrap_mean(values: np.ndarray) -> Interval:
    """Return the mean of values with its BCa bootstrap interval (Efron 1987); of equal values the mean alone."""
    from scipy import stats

    mean = float(values.mean())
    if len(values) < 2 or float(np.ptp(values)) < 1e-12:
        return Interval(mean, mean, mean)
    # `batch` bounds the memory: resamples x values
    result = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="BCa",
        batch=max(1, 2_000_000 // len(values)),
        rng=np.random.default_rng(SEED),
    )
    return Interval(mean, float(result.confidence_interval.low), float(result.confidence_interval.high))


def compute_sign_test(better: int, worse: int) -> float:
    """Return the p-value of the exact two-sided sign test on decisive prompts; 1.0 where all are tied."""
    from scipy import stats

    if better + worse == 0:
        return 1.0
    return float(stats.binomtest(better, better + worse, 0.5).pvalue)


def compute_mcnemar(base: Sequence[bool], tuned: Sequence[bool]) -> tuple[list[list[int]], float]:
    """Return the table of two models' right answers, and the p-value of the exact McNemar test.

    Returns:
        The table: rows are the base model right and wrong, columns the tuned model right and wrong; and the p-value.

    """
    from statsmodels.stats.contingency_tables import mcnemar

    table = [[0, 0], [0, 0]]
    for was_right, is_right in zip(base, tuned, strict=True):
        table[0 if was_right else 1][0 if is_right else 1] += 1
    if table[0][1] + table[1][0] == 0:
        return table, 1.0
    return table, float(mcnemar(table, exact=True).pvalue)


def compute_rate(successes: int, count: int) -> Interval:
    """Return a share with its Wilson interval."""
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(successes, count, alpha=1 - CONFIDENCE, method="wilson")
    return Interval(successes / count, float(low), float(high))


def correct_p_values(p_values: Sequence[float]) -> list[float]:
    """Return p-values after Holm's correction, in the same order."""
    from statsmodels.stats.multitest import multipletests

    if not p_values:
        return []
    return [float(value) for value in multipletests(p_values, alpha=ALPHA, method="holm")[1]]


def compute_needed_prompts(better: int, worse: int, prompts: int) -> int | None:
    """Return how many prompts the sign test needs for the observed shares with 80% power; None = never.

    The number of decisive prompts is that of the normal approximation to the sign test; ties add to it in the share in
    which they occurred.
    """
    from scipy import stats

    decisive = better + worse
    if better == worse:
        return None
    rate = better / decisive
    quantile, power = stats.norm.ppf(1 - ALPHA / 2), stats.norm.ppf(POWER)
    pairs = ((0.5 * quantile + power * (rate * (1 - rate)) ** 0.5) / (rate - 0.5)) ** 2
    needed = int(np.ceil(pairs * prompts / decisive))
    return max(needed, LEAST_PROMPTS) if needed <= _MOST_NEEDED else None


def describe_interval(interval: Interval) -> dict[str, Any]:
    """Return an interval as a mapping that JSON can write."""
    return {"value": interval.value, "low": interval.low, "high": interval.high}
