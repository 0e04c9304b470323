"""The screen of an audit: its gates, the tables of the set, and the next step.

Inputs: the content of an audit. Outputs: lines. Not here: the page (`reports.audit_page`).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from trl_sft import console

_EXAMPLES = 1  # of each gate
_KINDS = 5  # of tasks and languages on the screen
_SHARES = {"0": "shortest", "0.5": "median", "0.9": "90% up to", "0.99": "99% up to", "1": "longest"}


def print_audit(content: Mapping[str, Any], notes: Sequence[str]) -> None:
    """Print the tables of an audit."""
    console.print_lines([("rows", note) for note in notes])
    console.print_lines(list(_list_statistics(content["statistics"])))
    rows = content["rows"]
    console.say()
    table = [["gate", "rows", "share", "first"]]
    for gate in content["gates"]:
        if not gate["removes"] and not gate["rows"]:
            continue
        examples = [f"{found['row']}: {found['reason']}" for found in gate["findings"][:_EXAMPLES]]
        name = gate["gate"] if gate["removes"] else f"{gate['gate']} (note)"
        table.append([name, f"{gate['rows']:,}", f"{gate['rows'] / rows:.2%}", "".join(examples)])
    for line in console.format_columns(table):
        console.say(line)
    console.say()
    share = f"{content['clean'] / rows:.1%}"
    faulty = f"{content['removed']:,} {'has' if content['removed'] == 1 else 'have'} one"
    verb = "has" if rows == 1 else "have"
    console.say(f"{content['clean']:,} of {console.format_rows(rows)} {verb} no fault ({share}); {faulty}")
    for finding in content["set_findings"]:
        console.say(f"{finding['finding']}. {finding['fix']}")


def choose_next(content: Mapping[str, Any], options: argparse.Namespace) -> str:
    """Return the next step, in the imperative."""
    if not content["clean"]:
        return "read the reasons; no row is left to train."
    if options.fix:
        return f"set `path: {options.fix}` in the recipe."
    if content["removed"] and not options.output:
        return "look at the rows with -o audit.html, then write a cleaned set with --fix clean.jsonl."
    if content["removed"]:
        return "write a cleaned set with --fix clean.jsonl; --keep GATE keeps the rows of a gate."
    if not options.against and not options.is_recipe:
        return "name the evaluation set with --against FILE, so that leakage is looked for."
    return "train on these rows."


def _list_statistics(statistics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the lines on lengths, languages, turns and tasks."""
    lines = []
    for name, title in (("lengths", "length"), ("answer_lengths", "answers")):
        quantiles = statistics[name]["quantiles"]
        parts = [f"{text} {quantiles[share]:,}" for share, text in _SHARES.items() if share in quantiles]
        lines.append((title, f"in {statistics['unit']}: {', '.join(parts)}" if parts else "no row can be read"))
    kind = "script" if statistics["languages_are"] == "scripts" else "language"
    lines.append((kind, _join_counts(statistics["languages"])))
    lines.append(("turns", _join_counts(statistics["turns"])))
    if statistics["tasks"]["kinds"]:
        even = f"as even as {statistics['tasks']['effective']:.1f} equal ones"
        lines.append(("tasks", f"{statistics['tasks']['kinds']}, {even}: {_join_counts(statistics['tasks'])}"))
    begin = statistics["beginnings"]
    if begin["kinds"]:
        lines.append(("begin", f"{begin['kinds']:,} beginnings of instructions: {_join_counts(begin)}"))
    return lines


def _join_counts(counts: Mapping[str, Any]) -> str:
    """Return the most frequent kinds with their numbers."""
    return ", ".join(f"{kind['name']} {kind['rows']:,}" for kind in counts["most"][:_KINDS])
