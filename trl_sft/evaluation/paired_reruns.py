"""Whether rows hurt: what the losses of held-out rows tell after reruns with them, without them, without others.

Inputs: for each pair of reruns (one seed) the loss of each judging row after three trainings: with all rows, without
the suspects, without as many random rows. Outputs: differences with intervals, and a verdict for each group. An
interval counts two sources of chance: the seeds, and the held-out rows that judge; the variance of a mean is the sum of
both parts (a two-way random effects model without interaction, which is conservative), and Student's t has the degrees
of freedom of Welch and Satterthwaite. Not here: the reruns (`suspects`).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from trl_sft.evaluation import statistics
from trl_sft.evaluation.statistics import ALPHA, CONFIDENCE, POWER, Interval

LEAST_JUDGES = 15  # different prompts: with fewer the part of the held-out rows in the interval is not known well
LEAST_PAIRS = 3
RELEVANT_SHARE = 0.01  # own: a smaller share of the held-out loss is no harm that matters
_MOST_PAIRS = 200  # more are as good as never
HURTS, HELPS, NO_EFFECT, UNDECIDED = "hurts", "helps", "no effect shown", "undecided"


class Difference(NamedTuple):
    """The mean loss of held-out rows after one training minus that after another.

    Attributes:
        interval: nats for each loss token; below 0 = the first training is better.
        p_value: two-sided, before any correction.
        variance_of_pairs: part of the variance of the mean that more pairs reduce.
        variance_of_rows: part of it that more held-out rows reduce.

    """

    interval: Interval
    p_value: float
    variance_of_pairs: float
    variance_of_rows: float


class GroupLosses(NamedTuple):
    """Losses after the reruns of one group: (pairs, judges) each."""

    complete: np.ndarray  # all rows were trained
    without_suspects: np.ndarray
    without_others: np.ndarray  # as many random rows were left out


class GroupVerdict(NamedTuple):
    """What the reruns tell of a group.

    Attributes:
        verdict: HURTS, HELPS, NO_EFFECT or UNDECIDED.
        against_others: without the suspects minus without as many random rows.
        against_complete: without the suspects minus with all rows.
        p_value: of `against_others`, after Holm's correction over the groups.
        needed_pairs: pairs with which a difference of this size would be decided with 80% power; None = it is decided,
            or no number up to 200 is enough.
        needs_rows: whether the held-out rows, not the pairs, are too few to decide.

    """

    verdict: str
    against_others: Difference
    against_complete: Difference
    p_value: float
    needed_pairs: int | None
    needs_rows: bool


def judge(groups: Mapping[str, GroupLosses], prompts: Sequence[Hashable]) -> dict[str, GroupVerdict]:
    """Return the verdict on each group.

    A group hurts if the held-out loss without it is lower than without as many random rows, beyond chance, and is also
    lower than with all rows. The first alone may mean that its rows are only less useful than others.

    Args:
        groups: the losses of each group, by name.
        prompts: of each judging row: rows of one prompt are one observation.

    """
    differences = {
        name: (
            compare(losses.without_suspects, losses.without_others, prompts),
            compare(losses.without_suspects, losses.complete, prompts),
        )
        for name, losses in groups.items()
    }
    corrected = statistics.correct_p_values([of_others.p_value for of_others, _ in differences.values()])
    verdicts = {}
    for (name, losses), p_value in zip(groups.items(), corrected, strict=True):
        margin = RELEVANT_SHARE * float(losses.complete.mean())
        verdicts[name] = _decide(*differences[name], p_value=p_value, margin=margin, pairs=len(losses.complete))
    return verdicts


def compare(first: np.ndarray, second: np.ndarray, prompts: Sequence[Hashable]) -> Difference:
    """Return the mean of `first` minus `second`, (pairs, judges) each, with its interval."""
    from scipy import stats

    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    shares = np.zeros((len(prompts), len(numbers)))
    shares[np.arange(len(prompts)), [numbers[prompt] for prompt in prompts]] = 1
    by_prompt = (first - second) @ (shares / shares.sum(axis=0))
    pairs, judges = by_prompt.shape
    mean = float(by_prompt.mean())
    of_pairs = float(by_prompt.mean(axis=1).var(ddof=1)) / pairs
    of_rows = float(by_prompt.mean(axis=0).var(ddof=1)) / judges
    variance = of_pairs + of_rows
    if variance < 1e-24:
        return Difference(Interval(mean, mean, mean), 1.0 if mean == 0 else 0.0, of_pairs, of_rows)
    freedom = variance**2 / (of_pairs**2 / (pairs - 1) + of_rows**2 / (judges - 1))
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom)) * variance**0.5
    p_value = float(2 * stats.t.sf(abs(mean) / variance**0.5, freedom))
    return Difference(Interval(mean, mean - half, mean + half), p_value, of_pairs, of_rows)


def _decide(
    against_others: Difference, against_complete: Difference, *, p_value: float, margin: float, pairs: int
) -> GroupVerdict:
    """Return the verdict on one group; `margin`: a smaller difference does not matter."""
    both = against_others, against_complete
    is_decided = p_value < ALPHA and abs(against_others.interval.value) >= margin
    if is_decided and against_others.interval.value > 0:
        return GroupVerdict(HELPS, *both, p_value, None, needs_rows=False)
    is_harmless = against_complete.interval.low >= -margin  # the model is hardly better without the group
    if is_decided and against_complete.interval.value < 0 and not is_harmless:
        return GroupVerdict(HURTS, *both, p_value, None, needs_rows=False)
    if any(difference.interval.low >= -margin for difference in both):  # harm that matters is excluded
        return GroupVerdict(NO_EFFECT, *both, p_value, None, needs_rows=False)
    needed = _count_needed_pairs(against_others, pairs)
    needs_rows = needed is None and against_others.interval.value < 0
    return GroupVerdict(UNDECIDED, *both, p_value, needed, needs_rows)


def _count_needed_pairs(difference: Difference, pairs: int) -> int | None:
    """Return the pairs with which a harm of this size would be decided with 80% power; None = more than 200."""
    from scipy import stats

    if difference.interval.value >= 0:
        return None
    quantiles = float(stats.norm.ppf(1 - ALPHA / 2) + stats.norm.ppf(POWER))
    available = (difference.interval.value / quantiles) ** 2 - difference.variance_of_rows
    if available <= 0:
        return None
    needed = int(np.ceil(difference.variance_of_pairs * pairs / available))
    return max(needed, pairs + 1) if needed <= _MOST_PAIRS else None
