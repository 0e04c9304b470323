"""Rules about other signals: numbers that are not finite, clipping, learning rate, token accuracy, slow input.

In: the curves of a run, and times. Out: a finding, or None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trl_sft.training.diagnosis import findings, rates
from trl_sft.training.diagnosis.findings import Curves, Finding, InputTime

_CLIPPED_SHARE, _CLIPPED_BY, _CLIPPED_ENTRIES = 0.5, 10.0, 20
_ACCURATE = 0.95
_WAITING_SHARE, _WAITING_STEPS = 0.3, 20
_FIRST_STEPS = 10  # whose log entry may still tell the accuracy at the start


def find_not_finite(
    log_history: Sequence[Mapping[str, Any]], *, has_loss_scale: bool, advice_rate: str = ""
) -> Finding | None:
    """Find the first logged number that is not finite.

    Args:
        log_history: entries with their step.
        has_loss_scale: fp16's loss scaler skips steps with an infinite gradient norm, by design; it does not count.
        advice_rate: the learning rate in brackets, for the advice.

    """
    for entry in log_history:
        names = [name for name in entry if name != "grad_norm" or not has_loss_scale]
        bad = [name for name in names if isinstance(entry[name], float) and not math.isfinite(entry[name])]
        if bad:
            hidden = " The logged loss of 0 is no loss: upstream leaves out values that are not finite."
            return Finding(
                findings.NOT_FINITE,
                (entry["step"],),
                f"{', '.join(bad)} not finite at step {entry['step']}.",
                "The weights are lost from that step on." + (hidden if entry.get("loss") == 0 else ""),
                f"Lower train.learning_rate{advice_rate} or train.max_grad_norm. Look at the rows before that step.",
                {name: str(entry[name]) for name in bad},
                stops=True,
            )
    return None


def find_clipping(curves: Curves) -> Finding | None:
    """Find gradients that are clipped most of the time, to less than a tenth."""
    limit = curves.facts.max_grad_norm
    norms = curves.norms[(curves.steps > curves.facts.warmup_steps) & np.isfinite(curves.norms)]
    if limit <= 0 or len(norms) < _CLIPPED_ENTRIES:
        return None
    share, median = float((norms > limit).mean()), float(np.median(norms))
    if share <= _CLIPPED_SHARE or median < _CLIPPED_BY * limit:
        return None
    percentile = float(np.percentile(norms, 90))
    return Finding(
        findings.CLIPPED,
        (int(curves.steps[-1]),),
        f"Gradients are clipped in {share:.0%} of {len(norms)} log entries; their norm is {median:.3g} in the median,"
        f" train.max_grad_norm is {limit:g}.",
        "Every step has about the same length, whatever the gradient says.",
        f"Set train.max_grad_norm near {percentile:.2g}, the 90th percentile; or lower train.learning_rate"
        f"{rates.write_rate(curves.facts)}.",
        {"share": share, "median_norm": median, "percentile_90": percentile, "max_grad_norm": limit},
    )


def find_unusual_rate(curves: Curves) -> Finding | None:
    """Find a learning rate outside the usual range for all weights, or for LoRA."""
    position = rates.locate_rate(curves.facts)
    if position == 0:
        return None
    low, high = rates.compute_rate_range(curves.facts)
    rate = curves.facts.peak_rate
    return Finding(
        findings.UNUSUAL_RATE,
        (0,),
        f"train.learning_rate is {rate:.3g}; {'LoRA' if curves.facts.is_adapter else 'all weights'} of a model of this"
        f" size usually have {low:.1g} to {high:.1g}.",
        "Training may diverge." if position > 0 else "Training may change little.",
        f"Set train.learning_rate between {low:.1g} and {high:.1g}.",
        {"peak_rate": rate, "lowest": low, "highest": high},
    )


def find_accuracy_at_start(curves: Curves) -> Finding | None:
    """Find a token accuracy near 1 before training, or in the first log entry of the first ten steps."""
    for entry in curves.history:
        for name in ("eval_mean_token_accuracy", "mean_token_accuracy"):
            value = entry.get(name)
            is_early = entry["step"] == 0 or (name == "mean_token_accuracy" and entry["step"] <= _FIRST_STEPS)
            if is_early and isinstance(value, float) and value >= _ACCURATE:
                return Finding(
                    findings.ACCURATE_AT_START,
                    (entry["step"],),
                    f"The token accuracy is {value:.3f} at step {entry['step']}.",
                    "The model knows these rows already, or tokens that are always the same carry loss.",
                    "Look with `preview` which tokens carry loss (data.loss_on); check that model.name_or_path was not"
                    " trained on these rows.",
                    {name: value},
                )
    return None


def find_slow_input(input_time: InputTime | None) -> Finding | None:
    """Find a training loop that waits for its batches."""
    if input_time is None or input_time.steps < _WAITING_STEPS or input_time.total_seconds <= 0:
        return None
    share = input_time.waiting_seconds / input_time.total_seconds
    if share < _WAITING_SHARE:
        return None
    return Finding(
        findings.SLOW_INPUT,
        (input_time.steps,),
        f"The training loop waits for batches {share:.0%} of the time ({input_time.waiting_seconds:.1f} of"
        f" {input_time.total_seconds:.1f} s in {input_time.steps} steps).",
        "Rows are prepared or read more slowly than they are trained.",
        "Set train.dataloader_num_workers: 2 or more; instead of streaming, read the rows whole.",
        {"share": share},
    )
