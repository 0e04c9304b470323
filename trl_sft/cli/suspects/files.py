"""The files of `suspects`: suspects.jsonl, and a set of rows without those that hurt.

Inputs: suspects with their signals, groups and verdicts. Outputs: files. Not here: the finished reruns
(`suspects.rerun_log`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_sft import console, run_folder
from trl_sft.building.audit import cleaned_set
from trl_sft.building.audit.audit_source import AuditSource
from trl_sft.building.audit.row_audit import RowFinding, SetAudit
from trl_sft.cli.suspects.row_signals import RowSignals
from trl_sft.evaluation.paired_reruns import GroupVerdict
from trl_sft.suspects import signals
from trl_sft.suspects.short_run import ShortRun
from trl_sft.suspects.signals import Suspect


def list_suspects(
    rows: AuditSource,
    short: ShortRun,
    suspects: Mapping[str, Sequence[Suspect]],
    *,
    measured: RowSignals,
    conflicts: Mapping[int, str],
) -> dict[int, dict[str, Any]]:
    """Return what is known of each suspect, by its place, in the order of the rows."""
    reasons: dict[int, dict[str, str]] = {}
    for name, found in suspects.items():
        for suspect in found:
            conflict = conflicts.get(short.train.rows[suspect.place].number, "")
            reasons.setdefault(suspect.place, {})[name] = _explain(name, suspect, conflict)
    entries = {}
    for place in sorted(reasons):
        number = short.train.rows[place].number
        row = rows.read_row(number)
        entries[place] = {
            "row": rows.name_row(number),
            **rows.locate_row(number),
            "kind": short.train.kinds[place],
            "signals": reasons[place],
            "base_loss": round(float(measured.base_losses[place]), 4),
            "loss": round(float(measured.losses[place]), 4),
            "agreement": float(f"{measured.agreements[place]:.4g}"),
            "messages": [dict(turn) for turn in row.messages],
        }
    return entries


def _explain(name: str, suspect: Suspect, conflict: str) -> str:
    """Return why a row is a suspect by one signal."""
    if name == signals.CONFLICT:
        return conflict
    if name == signals.LOSS:
        return f"loss {suspect.value:.3g} under the trained model; the bound of held-out rows is {suspect.bound:.3g}"
    return f"agreement {-suspect.value:.3g} with held-out rows; their own bound is {-suspect.bound:.3g}"


def write_suspects(
    output: Path,
    entries: Mapping[int, Mapping[str, Any]],
    *,
    groups: Mapping[str, Sequence[int]],
    verdicts: Mapping[str, GroupVerdict],
) -> None:
    """Write suspects.jsonl: each suspect in the order of the rows, with the verdicts on its groups."""
    members = {name: set(places) for name, places in groups.items()}
    lines = []
    for place, entry in entries.items():
        of_row = {
            name: verdicts[name].verdict if name in verdicts else None for name in members if place in members[name]
        }
        lines.append(json.dumps({**entry, "groups": of_row}, ensure_ascii=False, default=str) + "\n")
    output.mkdir(parents=True, exist_ok=True)
    run_folder.write_text(output / run_folder.SUSPECTS, "".join(lines))


def write_rest(
    rows: AuditSource, short: ShortRun, path: Path, *, hurting: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """Write the rows without the groups that hurt, and these beside them; return the entries for `--json`."""
    if not hurting:
        console.say(f"wrote     nothing into {path}: no group was measured to hurt")
        return {"fixed": None, "rejected": None}
    found: dict[int, RowFinding] = {}
    for name, places in hurting.items():
        for place in places:
            number = short.train.rows[place].number
            reason = f"one of {len(places):,} rows of the group `{name}`, which was measured to hurt"
            found.setdefault(number, RowFinding(number, "suspects", reason))
    rest, removed = cleaned_set.write(rows, SetAudit(len(rows), removed=list(found.values())), path)
    rejected = cleaned_set.name_rejected(path)
    console.say(f"wrote     {path}: {console.format_rows(rest)}")
    console.say(f"          {rejected}: {console.format_rows(removed)} of groups that hurt")
    return {"fixed": str(path), "rejected": str(rejected)}
