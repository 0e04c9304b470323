"""The phases of a healthy train loss, and what the first steps allow to say.

In: the curves of a run. Out: phases with their steps, and sentences. Deliberately absent: warning signs (`loss_rules`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trl_sft.training.diagnosis import statistics
from trl_sft.training.diagnosis.findings import Curves
from trl_sft.training.verdict import is_risen

STEEP_FALL, LEVELLING, CONVERGENCE = "steep fall", "levelling off", "convergence"
FIRST_VERDICT_STEP = 50
_LEAST_ENTRIES = 15
_LEAST_FALL = 0.1  # of the first loss, or there is no fall whose phases could be told
_STEEP_SHARE, _LEVEL_SHARE = 0.7, 0.95  # of the whole fall
_CONVERGED_SHARE = 0.2  # of the log entries, after the loss has reached its level
_ALPHA = 0.01  # of Mann-Whitney and Mann-Kendall
_LEAST_TREND = 5  # values of which a trend can be significant: p is at least 1/120
_LESS = 0.05  # of the eval loss, relative
_CLEAR_SHARE = 0.5  # of the log entries after the steep fall, to say during the run that the loss levels off
_MAX_ENTRIES = 1000  # of a longer log every second, third ... is read


@dataclass(frozen=True)
class Phase:
    """A part of the curve of the train loss."""

    name: str
    first_step: int
    last_step: int
    loss: float  # at its end, smoothed


def recognise_phases(curves: Curves) -> list[Phase]:
    """Return the phases of the train loss in order; [] where it did not fall beyond noise.

    The steep fall ends with 70% of the whole fall, levelling off with 95%. What follows is convergence, if it is at
    least a fifth of the log; otherwise the loss still falls at the end.
    """
    every = max(1, len(curves.losses) // _MAX_ENTRIES)
    losses, steps = curves.losses[::every], curves.steps[::every]
    count = len(losses)
    if count < _LEAST_ENTRIES or not np.isfinite(losses).all():
        return []
    third = count // 3
    if statistics.compare_ranks(losses[-third:], losses[:third]) >= _ALPHA:
        return []
    smooth = _smooth(losses, max(3, count // 10))
    fall = smooth[0] - smooth.min()
    if fall < _LEAST_FALL * smooth[0]:
        return []
    steep = int(np.argmax(smooth <= smooth[0] - _STEEP_SHARE * fall))
    level = int(np.argmax(smooth <= smooth[0] - _LEVEL_SHARE * fall))
    ends = [(STEEP_FALL, steep), (LEVELLING, level)]
    if count - 1 - level >= _CONVERGED_SHARE * count:
        ends.append((CONVERGENCE, count - 1))
    else:
        ends[-1] = (LEVELLING, count - 1)
    phases: list[Phase] = []
    first = 0
    for name, last in ends:
        if last > first or not phases:
            phases.append(Phase(name, int(steps[first]), int(steps[last]), float(smooth[last])))
            first = last
    return phases


def describe_phases(phases: Sequence[Phase], first_loss: float) -> str:
    """Return one line on the phases; "" where there are none.

    Args:
        phases: of `recognise_phases`.
        first_loss: the first logged train loss.

    """
    if not phases:
        return ""
    parts = [f"{phase.name} to step {phase.last_step} ({phase.loss:.4g})" for phase in phases]
    end = "" if phases[-1].name == CONVERGENCE else "; it still fell at the end"
    return f"Train loss: {first_loss:.4g}, {', '.join(parts)}{end}"


def describe_new_phase(curves: Curves, said: set[str]) -> tuple[str, str] | None:
    """Return the phase that a running run has clearly reached, and the line that says so; None = nothing is new.

    The loss levels off where at least half of the log entries lie after the steep fall: of a loss that falls evenly
    fewer do.

    Args:
        curves: of the run so far.
        said: names of the phases that were said.

    """
    phases = recognise_phases(curves)
    if not phases or phases[-1].name in said or phases[-1].name == STEEP_FALL:
        return None
    fall, last = phases[0], phases[-1]
    if np.mean(curves.steps > fall.last_step) < _CLEAR_SHARE or fall.name != STEEP_FALL:
        return None
    verb = "has converged" if last.name == CONVERGENCE else "levels off"
    numbers = f"{curves.losses[0]:.4g}, steep fall to step {fall.last_step} ({fall.loss:.4g}), now {last.loss:.4g}"
    return last.name, f"So far: the train loss {verb} ({numbers})"


def describe_first_steps(curves: Curves) -> str:
    """Return the verdict so far, in words that the log entries up to now allow.

    An eval loss 5% lower or higher than before step 1 decides; without one, the trend of the train losses
    (Mann-Kendall, p < 0.01). Of fewer than five entries nothing is said.
    """
    step = int(curves.steps[-1]) if len(curves.steps) else 0
    if len(curves.evals) > 1 and curves.evals[0][0] == 0:
        before, now = curves.evals[0][1], curves.evals[-1][1]
        numbers = f"eval loss {before:.4g} -> {now:.4g} at step {curves.evals[-1][0]}"
        if now < before * (1 - _LESS):
            return f"So far: better beyond noise ({numbers})"
        if is_risen(now, before):
            return f"So far: worse ({numbers})"
        return f"So far: not better yet ({numbers})"
    if len(curves.losses) < _LEAST_TREND:
        number = f"{len(curves.losses)} train loss{'es' * (len(curves.losses) != 1)}"
        return f"So far: cannot be told from {number} (set train.logging_steps: {max(1, step // 10)})"
    trend, p = statistics.find_trend(curves.losses)
    numbers = f"train loss {curves.losses[0]:.4g} -> {curves.losses[-1]:.4g} in {len(curves.losses)} entries"
    if p >= _ALPHA:
        return f"So far: not better yet beyond noise ({numbers}, p = {p:.2g})"
    return f"So far: {'better beyond noise' if trend < 0 else 'worse'} ({numbers}, p = {p:.2g})"


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Return running medians, (entries,): windows of up to `width` entries, shorter at the ends, the first value kept.

    The first entry stays, since a window would hide the fall of the first steps.
    """
    half = width // 2
    smooth = np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])
    smooth[0] = values[0]
    return smooth
