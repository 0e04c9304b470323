"""The card of a built set, in Markdown: what is in it, where it comes from, and what nobody has checked.

Inputs: the spec and the counts of build.json. Outputs: a text. Every number in it stands in build.json too. Not here:
files (`output`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trl_sft.building import spec_keys
from trl_sft.building.spec import Spec

_STOPS = {
    "calls": "the budget of calls was used up",
    "money": "what is left of the budget of money is less than the next call may cost",
    "errors": "too many calls in a row brought no answer",
}


def explain_stop(stop: str) -> str:
    """Return why a build stopped early, as a clause."""
    return _STOPS.get(stop, stop)


def format_card(spec: Spec, content: Mapping[str, Any]) -> str:
    """Return the card.

    Args:
        spec: The checked spec.
        content: What build.json says.

    """
    rows = content["rows"]
    generator, judge = content["generator"], content.get("judge")
    lines = [
        "---",
        f"language: {content['language']}",
        "tags: [sft, synthetic]",
        "---",
        "",
        f"# {spec.folder.name}",
        "",
    ]
    if content["partial"]:
        lines += [f"**PARTIAL: {explain_stop(content['stop'])}.** The rows below are whole; the set is not.", ""]
    lines += [
        f"{rows['train'] + rows['eval']:,} rows of instructions with answers, written by the model "
        f"`{generator['model']}` from {len(spec.topics):,} topics and {len(spec.seed_rows):,} seed rows, with seed "
        f"{content['seed']}, by trl_sft {content['trl_sft']} from `spec.yaml`.",
        "",
        *_format_table(
            ["file", "rows", "SHA-256"],
            [[name, f"{file['rows']:,}", file["sha256"]] for name, file in content["files"].items()],
        ),
        "Each row has `id`, `messages` and `provenance` (cell, template and its digest, generator, seed, topic, seed "
        "row, attempt, parent"
        + (", scores" if judge else "")
        + (")." if "task" not in spec.axes else "), and the label `task`."),
        "",
    ]
    lines += ["## Gates", "", *_format_gates(content)]
    lines += ["## Balance", "", *_format_balance(content)]
    if content["augmentation"]["planned"]:
        lines += ["## Rows made from others", "", *_format_augmentation(content)]
    lines += ["## Templates", ""]
    lines += _format_table(
        ["template", "digest", "rows"],
        [[entry["template"], entry["sha256"], f"{entry['rows']:,}"] for entry in content["templates"]],
    )
    lines += ["## What is not checked", "", *_list_limits(spec, has_judge=judge is not None)]
    return "\n".join(lines)


def _format_gates(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of the gates."""
    rows = content["rows"]
    yield f"{rows['written']:,} rows were written for {rows['planned']:,} planned ones, repeated attempts counted."
    yield "Rejected rows stand in `rejects.jsonl`, each with its reason."
    yield ""
    table = [[gate["gate"], f"{gate['checked']:,}", f"{gate['rejected']:,}"] for gate in content["gates"]]
    yield from _format_table(["gate", "rows checked", "rejected"], table)


def _format_balance(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield the contingency table, the effective numbers of cells, and the shortfalls."""
    balance = content["balance"]
    axes = balance["before"]["axes"]
    tables = [
        {tuple(cell[axis] for axis in axes): cell["rows"] for cell in balance[name]["cells"]}
        for name in ("before", "after", "final")
    ]
    cells = sorted({cell for table in tables for cell in table})
    body = [[*cell, *(f"{table.get(cell, 0):,}" for table in tables)] for cell in cells]
    effective = [f"{balance[name]['effective_cells']:.1f}" for name in ("before", "after", "final")]
    body.append(["effective number of cells", *[""] * (len(axes) - 1), *effective])
    yield from _format_table([*axes, "passed", "taken", "with children"], body)
    yield f"{balance['left_over']:,} rows passed and were not taken. No row stands in the set twice."
    yield ""
    if content["shortfalls"]:
        yield "Cells with fewer rows than planned:"
        yield ""
        body = [
            [*(entry["cell"][axis] for axis in axes), str(entry["planned"]), str(entry["rows"])]
            for entry in content["shortfalls"]
        ]
        yield from _format_table([*axes, "planned", "rows"], body)


def _format_augmentation(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of children."""
    made = content["augmentation"]["made"]
    planned = content["augmentation"]["planned"]
    yield from _format_table(
        ["method", "planned", "in the set"],
        [[name, str(count), str(made.get(name, 0))] for name, count in sorted(planned.items())],
    )
    yield "They were made after the split; each is in the part of its parent (`provenance.parent`)."
    yield ""


def _list_limits(spec: Spec, *, has_judge: bool) -> Iterator[str]:
    """Yield what a reader has to know."""
    yield "- A model wrote these rows. The licence of its output is that of the model's provider."
    if has_judge:
        yield "- Relevance, correctness, completeness and safety were scored by another model, not by people."
    else:
        yield "- Nobody judged whether the answers are right: the spec has no `judge:`."
        yield "- Rows of a cell were taken in the order of the plan."
    keyed = any(row.key for row in spec.seed_rows)
    if keyed:
        yield "- Final answers were compared with the known ones only in rows made from seed rows that have one."
    share = spec.get(spec_keys.OUTPUT, "eval_fraction")
    if share:
        yield "- Held-out and training rows have the same origin: a score on them says little about real requests."
    yield ""


def _format_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table in Markdown, with an empty line after it."""
    lines = [f"| {' | '.join(heading)} |", "|" + "---|" * len(heading)]
    lines += [
        "| " + " | ".join(str(cell).replace("|", r"\|").replace("\n", " ") for cell in row) + " |" for row in rows
    ]
    return [*lines, ""]
