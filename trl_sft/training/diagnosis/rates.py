"""The usual learning rates of Adam, by what is trained and by the size of the model.

In: facts of a run. Out: a range, and where the run's learning rate lies. Sources are in
docs/explanation/verdict-and-findings.md.
"""

from __future__ import annotations

import math
from typing import Any

from trl_sft.training.diagnosis.findings import RunFacts

TOO_LOW, TOO_HIGH = "too_low", "too_high"

# The usual learning rates of Adam, for all weights; LoRA's are 10 times as high. The highest falls with the square root
# of the number of parameters, and is 2e-3 for 135 M.
_LOWEST_RATE, _HIGHEST_RATE, _REFERENCE_SIZE, _ADAPTER_FACTOR = 5e-7, 2e-3, 1.35e8, 10.0


def compute_rate_range(facts: RunFacts) -> tuple[float, float]:
    """Return the lowest and the highest usual learning rate of Adam for a model of this size."""
    factor = _ADAPTER_FACTOR if facts.is_adapter else 1.0
    highest = _HIGHEST_RATE * math.sqrt(_REFERENCE_SIZE / max(facts.parameters, 1))
    return factor * _LOWEST_RATE, factor * highest


def locate_rate(facts: RunFacts) -> int:
    """Return -1 for a learning rate below the usual range, 1 above it, else 0; 0 for optimizers other than Adam."""
    if not facts.peak_rate or "adam" not in facts.optimizer:
        return 0
    low, high = compute_rate_range(facts)
    return -1 if facts.peak_rate < low else int(facts.peak_rate > high)


def describe_range(facts: RunFacts) -> str:
    """Return the usual range in words."""
    low, high = compute_rate_range(facts)
    return f"usual for {'LoRA' if facts.is_adapter else 'all weights'} are {low:.1g} to {high:.1g}"


def describe_numbers(facts: RunFacts, verdict: str) -> dict[str, Any]:
    """Return what is told about the learning rate as numbers of a finding: with the usual range, if it lies outside.

    Args:
        facts: of the run.
        verdict: `TOO_LOW` or `TOO_HIGH`.

    """
    low, high = compute_rate_range(facts)
    return {"rate": verdict} | ({"lowest": low, "highest": high} if locate_rate(facts) else {})


def write_rate(facts: RunFacts) -> str:
    """Return the learning rate of the run in brackets, for advice; "" where it is unknown."""
    return f" ({facts.peak_rate:.3g} now)" if facts.peak_rate else ""
