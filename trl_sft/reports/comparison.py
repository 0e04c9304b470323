"""Several runs held side by side: keys that differ, and paired differences on the same held-out rows.

Inputs: the files of runs. Outputs: rows of tables. Not here: the page (`page`), the curves (`charts`).

The interval of a paired difference is mean ± 1.96 standard errors, of the differences row by row, since both models
answer the same rows (Miller, "Adding Error Bars to Evals", arXiv:2411.00640, section 4.2).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from trl_sft.evaluation.metrics import METRICS
from trl_sft.reports.run_files import RunFiles

_Z = 1.96  # of a 95% interval
_MIN_PAIRS = 10  # fewer say nothing about an interval that rests on the normal distribution
_ABSENT = "-"


class PairedDifference(NamedTuple):
    """How a metric of one run differs from that of the first run, on the rows that both were asked."""

    run: str
    metric: str
    pairs: int
    mean: float  # of this run's value minus the first run's
    low: float  # end of the 95% interval
    high: float


def find_differing_keys(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """Return the keys whose values differ, with the value of each run as text."""
    recipes = [recipe if isinstance(recipe := run.run.get("recipe"), dict) else {} for run in runs]
    rows = []
    for key in sorted({key for recipe in recipes for key in recipe}):
        values = [_format(recipe[key]) if key in recipe else _ABSENT for recipe in recipes]
        if len(set(values)) > 1:
            rows.append((key, values))
    return rows


def compare_runs(runs: Sequence[RunFiles], names: Sequence[str]) -> list[PairedDifference]:
    """Return the paired differences of each run to the first one; metrics with fewer than 10 pairs are left out."""
    differences = []
    for run, name in zip(runs[1:], names[1:], strict=True):
        for metric in ("loss", *METRICS):
            first, second = _collect_values(runs[0], metric), _collect_values(run, metric)
            pairs = [(first[row], second[row]) for row in first if row in second]
            if len(pairs) >= _MIN_PAIRS:
                differences.append(PairedDifference(name, metric, len(pairs), *_measure(pairs)))
    return differences


def _measure(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Return the mean difference of pairs, and the ends of its 95% interval."""
    differences = [second - first for first, second in pairs]
    mean = sum(differences) / len(differences)
    variance = sum((value - mean) ** 2 for value in differences) / (len(differences) - 1)
    margin = _Z * math.sqrt(variance / len(differences))
    return mean, mean - margin, mean + margin


def _collect_values(run: RunFiles, metric: str) -> dict[str, float]:
    """Return a metric of the tuned model for each held-out row, by the text of its prompt and reference."""
    values = {}
    for sample in run.samples:
        if "after" not in sample:
            continue
        row = json.dumps([sample.get("prompt"), sample.get("reference")], ensure_ascii=False, sort_keys=True)
        if metric in METRICS and isinstance(sample.get("reference"), str):
            values[row] = METRICS[metric](str(sample["after"]), sample["reference"])
        elif metric == "loss" and isinstance(loss := sample.get("loss_after"), int | float) and math.isfinite(loss):
            values[row] = float(loss)
    return values


def _format(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
