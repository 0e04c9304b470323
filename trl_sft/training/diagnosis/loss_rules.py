"""Rules about the losses: divergence, no improvement, overfitting, memorisation, spikes, a loss of 0.

In: the curves of a run. Out: a finding, or None. The reasons of the thresholds are in
docs/explanation/verdict-and-findings.md; they were fixed before the rules were tried on the recorded healthy runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from trl_sft.evaluation.completions import Completions
from trl_sft.training.diagnosis import findings, rates, statistics
from trl_sft.training.diagnosis.findings import Curves, Finding
from trl_sft.training.verdict import compare_train_losses, is_risen

_SUCCESSIVE = 2  # evaluations that have to be above the lowest one: Prechelt's UP criterion
_EXPLODED = 1.5  # times the loss before training: fine-tuning begins at the lowest loss that a wrong step can leave
_RISE = 1.5  # of the median train loss of a block over that of the lowest block
_BLOCKS, _LEAST_BLOCK = 5, 10  # blocks of a log, and log entries of one, to find a rise
_LEAST_ENTRIES = 15  # log entries to tell that there is no improvement: thirds of 5 have a smallest p of 1/252
# A run may need some of its steps before it improves: nothing is said before half of them, or 500.
_WAIT_SHARE, _WAIT_STEPS = 0.5, 500
_NO_CHANGE = 0.02  # of train loss and eval loss, relative
_ALPHA = 0.01  # of Mann-Whitney and Mann-Kendall
_SPIKE_RATIO, _SPIKE_WINDOW = 2.0, 10  # Lightning's SpikeDetection
_SPIKE_DEVIATIONS, _SPIKE_COUNT = 6.0, 2
_MEMORISED_MORE = 0.25  # share of the training rows over that of the held-out rows


def find_zero_loss(curves: Curves) -> Finding | None:
    """Find a train loss of exactly 0."""
    steps = curves.steps[curves.losses == 0]
    if not len(steps):
        return None
    return Finding(
        findings.ZERO_LOSS,
        tuple(steps.tolist()),
        f"The train loss is exactly 0 at step {steps[0]}.",
        "Batches have no tokens with loss, or the model knows every row by heart.",
        "Look with `preview` which tokens carry loss (data.loss_on); train for fewer steps.",
        {"entries": len(steps)},
    )


def find_divergence(curves: Curves) -> Finding | None:
    """Find a run that gets worse: at its start, later, or by its evaluations."""
    return _find_explosion(curves) or _find_late_rise(curves) or _find_worse_evaluation(curves)


def _find_explosion(curves: Curves) -> Finding | None:
    """Find train losses far above that of the model before training."""
    start = _estimate_start(curves)
    if start is None:
        return None
    high = curves.losses > _EXPLODED * start
    if not (high[1:] & high[:-1]).any():  # one alone is a spike
        return None
    steps, highest = curves.steps[high], float(curves.losses.max())
    at = int(curves.steps[np.argmax(curves.losses)])
    if curves.steps[0] == 1:
        before = f"it was {curves.losses[0]:.4g} at step 1"
    else:
        before = f"the eval loss was {curves.evals[0][1]:.4g} before step 1"
    text = f"The train loss reached {highest:.4g} at step {at}; {before}."
    return _diverging(
        curves, steps=steps, observation=text, numbers={"estimated_loss_before": start, "highest_loss": highest}
    )


def _estimate_start(curves: Curves) -> float | None:
    """Return the train loss of the model before training; None = it cannot be told.

    The first log entry is it, where it is of step 1 alone. Else it is the eval loss before step 1, times the ratio of
    train and eval loss at the first evaluation, if that lies in the first epoch: later the model has seen the rows.
    """
    if len(curves.steps) and curves.steps[0] == 1:
        return float(curves.losses[0])
    if len(curves.evals) < 2 or curves.evals[0][0] != 0:
        return None
    step, loss = curves.evals[1]
    epoch = next((entry.get("epoch") or 0 for entry in curves.history if entry["step"] == step), 2)
    near = [train for at, train in curves.list_train_losses() if at <= step][-3:]
    if epoch > 1 or not near or loss <= 0:
        return None
    return curves.evals[0][1] * (sum(near) / len(near)) / loss


def _find_late_rise(curves: Curves) -> Finding | None:
    """Find a train loss that fell and rose again: the last block of the log against the lowest one before."""
    size = max(_LEAST_BLOCK, len(curves.losses) // _BLOCKS)
    if len(curves.losses) < 2 * size:
        return None
    ends = range(len(curves.losses), size - 1, -size)
    blocks = [(curves.losses[end - size : end], curves.steps[end - size : end]) for end in ends]
    last, last_steps = blocks[0]
    lowest, lowest_steps = min(blocks[1:], key=lambda block: float(np.median(block[0])))
    before, now = float(np.median(lowest)), float(np.median(last))
    if now <= _RISE * before or statistics.compare_ranks(lowest, last) >= _ALPHA / 10:
        return None
    numbers = {"lowest_loss": before, "loss": now, "lowest_step": int(lowest_steps[-1])}
    text = (
        f"The train loss rose from {before:.4g} near step {lowest_steps[-1]} to {now:.4g} (medians of {size} entries)."
    )
    return _diverging(curves, steps=last_steps, observation=text, numbers=numbers)


def _find_worse_evaluation(curves: Curves) -> Finding | None:
    """Find an eval loss above that of the base model while the train loss did not fall."""
    if len(curves.evals) < 2 or curves.evals[0][0] != 0 or not is_risen(curves.evals[-1][1], curves.evals[0][1]):
        return None
    train = compare_train_losses(curves.list_train_losses(), 0)
    if train is None or train[1] < train[0]:
        return None
    numbers = {"eval_loss_before": curves.evals[0][1], "eval_loss": curves.evals[-1][1]}
    text = f"The eval loss rose from {curves.evals[0][1]:.4g} before step 1 to {curves.evals[-1][1]:.4g}, and the train"
    text += f" loss did not fall ({train[0]:.4g} -> {train[1]:.4g})."
    return _diverging(curves, steps=curves.steps[-1:], observation=text, numbers=numbers)


def _diverging(curves: Curves, *, steps: Iterable[int], observation: str, numbers: Mapping[str, Any]) -> Finding:
    """Return the finding of a run that gets worse, with what the learning rate says."""
    meaning = "The learning rate is too high, or some rows are unlike the others."
    if rates.locate_rate(curves.facts) > 0:
        numbers = {**numbers, **rates.describe_numbers(curves.facts, rates.TOO_HIGH)}
        meaning = f"The learning rate is too high: {rates.describe_range(curves.facts)}."
    advice = f"Lower train.learning_rate{rates.write_rate(curves.facts)} to a tenth, or add train.warmup_steps."
    return Finding(findings.DIVERGING, tuple(map(int, steps)), observation, meaning, advice, numbers)


def find_no_improvement(curves: Curves) -> Finding | None:
    """Find a train loss that is not lower in the last third than in the first, and an eval loss about the same."""
    after_warmup = curves.steps > curves.facts.warmup_steps
    losses, steps = curves.losses[after_warmup], curves.steps[after_warmup]
    is_early = len(curves.steps) and curves.steps[-1] < min(_WAIT_SHARE * curves.facts.max_steps, _WAIT_STEPS)
    if len(losses) < _LEAST_ENTRIES or is_early:
        return None
    third = len(losses) // 3
    first, last = losses[:third], losses[-third:]
    before, now = float(np.median(first)), float(np.median(last))
    if statistics.compare_ranks(last, first) < _ALPHA and now < before * (1 - _NO_CHANGE):
        return None
    evals = [loss for _, loss in curves.evals]
    if len(evals) > 1 and evals[-1] < evals[0] * (1 - _NO_CHANGE):
        return None
    if np.median(curves.losses[:1]) > before * (1 + 5 * _NO_CHANGE):  # it fell during the warm-up
        return None
    numbers = {"first_third": before, "last_third": now, "entries": len(losses)}
    text = f"The train loss is about the same: {before:.4g} in the first third, {now:.4g} in the last"
    text += f" ({len(losses)} entries)"
    if len(evals) > 1:
        numbers |= {"eval_loss_before": evals[0], "eval_loss": evals[-1]}
        text += f"; eval loss {evals[0]:.4g} -> {evals[-1]:.4g}"
    meaning, advice = _explain_no_improvement(curves, evals, numbers)
    return Finding(findings.NO_IMPROVEMENT, (int(steps[-1]),), f"{text}.", meaning, advice, numbers)


def _explain_no_improvement(curves: Curves, evals: Sequence[float], numbers: dict[str, Any]) -> tuple[str, str]:
    """Return what it may mean and what to try: the learning rate too low or too high, where the data tell.

    What they tell is added to `numbers`.
    """
    position = rates.locate_rate(curves.facts)
    falls_slowly = len(evals) > 3 and all(after < before for before, after in itertools.pairwise(evals))
    if position < 0 or falls_slowly:
        reason = "each evaluation is a little lower than the one before" if falls_slowly else ""
        reason = rates.describe_range(curves.facts) if position < 0 else reason
        numbers |= rates.describe_numbers(curves.facts, rates.TOO_LOW)
        meaning = f"The learning rate is too low: {reason}."
        return meaning, f"Raise train.learning_rate{rates.write_rate(curves.facts)} tenfold."
    if position > 0:
        numbers |= rates.describe_numbers(curves.facts, rates.TOO_HIGH)
        meaning = f"The learning rate is too high: {rates.describe_range(curves.facts)}."
        return meaning, f"Lower train.learning_rate{rates.write_rate(curves.facts)} to a tenth."
    meaning = "The learning rate is too low or too high, or the answers cannot be predicted from the prompts."
    return (
        meaning,
        f"Try ten times and a tenth of train.learning_rate{rates.write_rate(curves.facts)}. Read rows with `preview`.",
    )


def find_overfitting(curves: Curves) -> Finding | None:
    """Find an eval loss above its lowest value at successive evaluations, while the train loss fell since then."""
    if len(curves.evals) <= _SUCCESSIVE:
        return None
    best_step, best = min(curves.evals, key=lambda pair: pair[1])
    last = curves.evals[-_SUCCESSIVE:]
    if last[0][0] <= best_step or not all(is_risen(loss, best) for _, loss in last):
        return None
    train = compare_train_losses(curves.list_train_losses(), best_step)
    if train is None or train[1] >= train[0]:
        return None
    text = f"The eval loss rose from {best:.4g} at step {best_step} to {last[-1][1]:.4g}, while the train loss fell"
    text += f" from {train[0]:.4g} to {train[1]:.4g}."
    numbers = {"best_step": best_step, "best_eval_loss": best, "eval_loss": last[-1][1]}
    numbers |= {"train_loss_at_best": train[0], "train_loss": train[1]}
    advice = f"near step {best_step} (train.max_steps), or add rows."
    if curves.facts.saves_best:
        advice = f"Stop {advice}"
    else:
        advice = f"Save the weights of the lowest eval loss (run.early_stopping: true), stop {advice}"
    return Finding(
        findings.OVERFITTING,
        (best_step, *(step for step, _ in last)),
        text,
        "The model overfits: it learns these rows, not the task. The answers may still get better.",
        advice,
        numbers,
    )


def find_memorisation(curves: Curves, completions: Completions | None) -> Finding | None:
    """Find that training rows are completed word for word far more often than held-out rows."""
    if completions is None or not completions.train_rows or not completions.eval_rows:
        return None
    shares = (completions.train_equal / completions.train_rows, completions.eval_equal / completions.eval_rows)
    p = statistics.compare_shares(
        completions.train_equal,
        completions.train_rows,
        other_hits=completions.eval_equal,
        other_size=completions.eval_rows,
    )
    if shares[0] - shares[1] < _MEMORISED_MORE or p >= _ALPHA:
        return None
    text = f"From their first half, {completions.train_equal} of {completions.train_rows} training rows are completed"
    text += f" word for word, and {completions.eval_equal} of {completions.eval_rows} held-out rows."
    overfitting = find_overfitting(curves)
    if overfitting:
        text += f" {overfitting.observation}"
    return Finding(
        findings.MEMORISATION,
        (int(curves.steps[-1]) if len(curves.steps) else 0,),
        text,
        "The model has memorised training rows.",
        "Train for fewer epochs (train.num_train_epochs), remove repeated rows, or add rows.",
        {"train_share": shares[0], "eval_share": shares[1], "p": p},
    )


def find_spikes(curves: Curves) -> Finding | None:
    """Find train losses of twice the mean of the ten before, and far outside their spread."""
    if len(curves.losses) <= _SPIKE_WINDOW:
        return None
    logs = np.log(np.maximum(curves.losses, 1e-6))
    sums = np.cumsum(np.concatenate([[0.0], curves.losses]))
    means = (sums[_SPIKE_WINDOW:-1] - sums[: -_SPIKE_WINDOW - 1]) / _SPIKE_WINDOW  # of the entries before each
    spikes = []
    for index in np.flatnonzero(curves.losses[_SPIKE_WINDOW:] > _SPIKE_RATIO * means) + _SPIKE_WINDOW:
        # of the differences, since the loss also falls; each difference has the noise of two entries
        changes = np.diff(logs[max(0, index - 3 * _SPIKE_WINDOW) : index])
        spread = max(statistics.estimate_deviation(changes) / math.sqrt(2), 0.02)
        if logs[index] - np.median(logs[index - _SPIKE_WINDOW : index]) > _SPIKE_DEVIATIONS * spread:
            spikes.append(int(index))
    if len(spikes) < _SPIKE_COUNT:
        return None
    steps = tuple(curves.steps[spikes].tolist())
    highest = float(curves.losses[spikes].max())
    text = f"The train loss jumped to more than twice its level {len(spikes)} times (steps"
    text += f" {', '.join(map(str, steps[:5]))}), to {highest:.4g} at most."
    return Finding(
        findings.SPIKES,
        steps,
        text,
        "Single batches are unlike the others, or the learning rate is close to too high.",
        f"Look at the rows of those steps. Lower train.learning_rate{rates.write_rate(curves.facts)} or"
        " train.max_grad_norm.",
        {"spikes": len(spikes), "highest_loss": highest},
    )
