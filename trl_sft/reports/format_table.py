"""The form of both models' answers as rows of a table.

Inputs: entries of samples.jsonl. Outputs: rows of (label, base, tuned) for the page; a label is a key of `texts.yaml`.
Not here: what is measured (`evaluation.answer_format`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trl_sft.evaluation import answer_format, answer_pairs
from trl_sft.evaluation.answer_pairs import BASE, TUNED


def make_rows(samples: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Return the rows; features that no answer has are left out. [] = no prompt has both answers."""
    table = answer_format.measure(answer_pairs.read_pairs(samples))
    if table is None:
        return []
    rows = []
    for unit in ("words", "characters"):
        base, tuned = (_describe_lengths(table.lengths[side][unit]) for side in (BASE, TUNED))
        rows.append((f"length_{unit}", base, tuned))
    for share in table.shares:
        if share.base or share.tuned:
            base, tuned = _describe_share(share.base, share.base_of), _describe_share(share.tuned, share.tuned_of)
            rows.append((f"format_{share.name}", base, tuned))
    for name, values in table.numbers.items():
        base, tuned = (_describe_number(values[side]) for side in (BASE, TUNED))
        rows.append((f"format_{name}", base, tuned))
    return rows


def _describe_lengths(quantiles: Sequence[float]) -> str:
    """Return median, 10% and 90% of lengths."""
    low, median, high = (f"{value:,.1f}".removesuffix(".0") for value in quantiles[1:4])
    return f"{median} ({low} ... {high})"


def _describe_share(count: int, total: int) -> str:
    return f"{count / total:.0%} ({count:,} / {total:,})" if total else "-"


def _describe_number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
