"""Which changes in the form of answers the count resolves.

Inputs: a `FormatTable`. Outputs: the mapping that `eval.json` has under `evaluation.format`, and lines for the screen.
Not here: what is measured (`answer_format`); whether a change is good, since that depends on the references.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trl_sft.evaluation import statistics
from trl_sft.evaluation.answer_format import FormatTable


def describe(table: FormatTable) -> dict[str, Any]:
    """Return the table with the p-value of each share: exact McNemar test, with Holm's correction over all shares."""
    described = table.describe()
    names = [share.name for share in table.shares if share.base or share.tuned]
    changes = {share.name: (share.gained, share.lost) for share in table.shares}
    p_values = statistics.correct_p_values([statistics.compute_sign_test(*changes[name]) for name in names])
    for name, p_value in zip(names, p_values, strict=True):
        described["shares"][name] |= {"p_value": p_value, "changed": p_value < statistics.ALPHA}
    return described


def list_lines(described: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a line for each share that changed, and one for the lengths."""
    base, tuned = (described["lengths"][side]["words"] for side in ("base", "tuned"))
    yield "form", f"median length {base[2]:g} -> {tuned[2]:g} words (a Chinese character is one)"
    for name, share in described["shares"].items():
        if share.get("changed"):
            words = name.replace("_", " ")
            yield (
                "",
                f"{words}: {share['base']:.0%} -> {share['tuned']:.0%} of the answers (p = {share['p_value']:.2g})",
            )
