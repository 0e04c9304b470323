"""All rules on one log, and which finding gives the reason of others.

In: the Trainer's log history, facts about the run, what was measured beside it. Out: findings. Deliberately absent:
when they are said (`training.monitor`), and the verdict at the end (`training.verdict`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trl_sft.evaluation.completions import Completions
from trl_sft.training.diagnosis import findings, loss_rules, rates, signal_rules
from trl_sft.training.diagnosis.findings import Curves, Finding, InputTime, RunFacts

_RULES: tuple[Callable[[Curves], Finding | None], ...] = (
    loss_rules.find_zero_loss,
    loss_rules.find_divergence,
    loss_rules.find_no_improvement,
    loss_rules.find_overfitting,
    loss_rules.find_spikes,
    signal_rules.find_clipping,
    signal_rules.find_unusual_rate,
    signal_rules.find_accuracy_at_start,
)
# A finding that gives the reason of others: they are left out.
_EXPLAINS: dict[str, tuple[str, ...]] = {
    findings.NOT_FINITE: (findings.DIVERGING, findings.NO_IMPROVEMENT, findings.SPIKES, findings.UNUSUAL_RATE),
    findings.ZERO_LOSS: (findings.NO_IMPROVEMENT,),
    findings.DIVERGING: (findings.NO_IMPROVEMENT, findings.SPIKES, findings.CLIPPED, findings.UNUSUAL_RATE),
    findings.NO_IMPROVEMENT: (findings.CLIPPED, findings.UNUSUAL_RATE),
    findings.ACCURATE_AT_START: (findings.NO_IMPROVEMENT,),
    findings.MEMORISATION: (findings.OVERFITTING,),
}


def find_all(
    log_history: Sequence[Mapping[str, Any]],
    facts: RunFacts,
    *,
    completions: Completions | None = None,
    input_time: InputTime | None = None,
) -> list[Finding]:
    """Return the findings of a log, without those that another one explains.

    Args:
        log_history: of the Trainer's state, so far.
        facts: of the run.
        completions: of training rows and held-out rows; None = not measured.
        input_time: how long the loop waited for batches; None = not measured.

    """
    curves = Curves(log_history, facts)
    not_finite = signal_rules.find_not_finite(
        log_history, has_loss_scale=facts.has_loss_scale, advice_rate=rates.write_rate(facts)
    )
    if not_finite:
        return [not_finite]
    results = [rule(curves) for rule in _RULES]
    results += [loss_rules.find_memorisation(curves, completions), signal_rules.find_slow_input(input_time)]
    present = [finding for finding in results if finding is not None]
    explained = {code for finding in present for code in list_explained(finding.code)}
    return [finding for finding in present if finding.code not in explained]


def list_explained(code: str) -> tuple[str, ...]:
    """Return the codes of the findings that a finding gives the reason of."""
    return _EXPLAINS.get(code, ())
