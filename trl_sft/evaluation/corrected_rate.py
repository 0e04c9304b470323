"""A judge's mean score, corrected by the scores that people gave to some of the pairs.

Inputs: scores from 0 to 1. Outputs: `CorrectedRate`. The method is prediction-powered inference for a mean, with the
weight that makes its variance smallest: Angelopoulos et al. 2023, https://arxiv.org/abs/2301.09633, and PPI++,
https://arxiv.org/abs/2311.01453, example 6.1. Not here: where scores come from (`human_votes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

LEAST_PAIRS = 10  # with both scores; the interval is that of large samples
_QUANTILE = 1.959964  # of the normal distribution, for 95%


@dataclass(frozen=True)
class CorrectedRate:
    """The tuned model's mean score (a win 1, a tie 0.5, a loss 0) with its 95% interval."""

    value: float
    low: float
    high: float
    people_alone: float  # the mean of the pairs that people judged
    judge_alone: float  # the judge's mean on all pairs
    weight: float  # of the judge's scores, from 0 = ignored to 1
    labelled: int  # pairs with both scores
    judged: int  # pairs with the judge's score alone

    def describe(self) -> dict[str, Any]:
        """Return the rate as a mapping that JSON can write."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def correct(*, people: Sequence[float], judge: Sequence[float], judge_alone: Sequence[float]) -> CorrectedRate | None:
    """Return the corrected mean; None with fewer than ten pairs that have both scores.

    The mean of people's scores is moved by what the judge's scores say about the pairs that people did not judge:
    `mean(people) + weight * (mean(judge_alone) - mean(judge))`.

    Args:
        people: (labelled,) scores of people.
        judge: (labelled,) the judge's scores of the same pairs.
        judge_alone: (judged,) the judge's scores of other pairs from the same draw.

    """
    if len(people) < LEAST_PAIRS:
        return None
    y, f, rest = np.asarray(people), np.asarray(judge), np.asarray(judge_alone)
    n, others = len(y), len(rest)
    weight = 0.0
    if others > 1 and f.var() > 0:
        best = float(np.cov(y, f)[0, 1] / ((1 + n / others) * np.concatenate([f, rest]).var(ddof=1)))
        weight = min(1.0, max(0.0, best))
    value = float(y.mean())
    variance = float((y - weight * f).var(ddof=1)) / n
    if weight:
        value += weight * float(rest.mean() - f.mean())
        variance += weight**2 * float(rest.var(ddof=1)) / others
    half = _QUANTILE * variance**0.5
    return CorrectedRate(
        value=min(1.0, max(0.0, value)),
        low=max(0.0, value - half),
        high=min(1.0, value + half),
        people_alone=float(y.mean()),
        judge_alone=float(np.concatenate([f, rest]).mean()),
        weight=weight,
        labelled=n,
        judged=others,
    )
