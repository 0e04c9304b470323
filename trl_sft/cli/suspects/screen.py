"""The lines of `suspects`: rows, signals, the plan, verdicts, examples, the next step.

Inputs: what was chosen and measured. Outputs: lines, name and value. Not here: the files.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_sft import console, run_folder
from trl_sft.evaluation import paired_reruns
from trl_sft.suspects import signals
from trl_sft.suspects.plan import Arm
from trl_sft.suspects.short_run import ShortRun
from trl_sft.suspects.signals import Suspect

_SHOWN = 3  # rows of a group
_TEXT = 60  # characters of a row


def list_rows(short: ShortRun) -> list[tuple[str, str]]:
    """Return the line about the rows."""
    choosing, judging = len(short.choosing.rows), len(short.judging.rows)
    text = (
        f"{len(short.train.rows):,} to train; of the held-out rows {choosing:,} choose suspects and {judging:,} judge"
    )
    return [("rows", text)]


def list_signals(suspects: Mapping[str, Sequence[Suspect]]) -> list[tuple[str, str]]:
    """Return a line for each signal, with its definition."""
    texts = {
        signals.LOSS: "a loss under the trained model far above those of held-out rows of the same kind",
        signals.GRADIENT: "a gradient that agrees far less with held-out rows than theirs do",
        signals.CONFLICT: "a prompt that has other answers in other rows",
    }
    return [
        ("signal", f"{name}: {console.format_rows(len(found))} with {texts[name]}") for name, found in suspects.items()
    ]


def list_plan(arms: Sequence[Arm], missing: int, estimate: tuple[float, float, float] | None) -> list[tuple[str, str]]:
    """Return the lines about the reruns and their time."""
    groups = len({arm.group for arm in arms}) - 1
    pairs = len({arm.seed for arm in arms})
    text = f"{len(arms)} of {arms[0].steps} steps: {pairs} seeds with all rows, and for "
    text += f"{console.format_number_of(groups, 'group')} without it and without as many random rows"
    lines = [("reruns", text)]
    if missing < len(arms):
        lines.append(("reruns", f"{len(arms) - missing} of them are in {run_folder.SUSPECT_RERUNS} already"))
    if estimate is not None:
        seconds, low, high = (console.format_duration(value) for value in estimate)
        lines.append(("time", f"about {seconds} ({low} to {high}) for {missing} reruns, measured on a few steps"))
    return lines


def list_verdicts(result: Mapping[str, Any], *, signals_only: bool) -> list[tuple[str, str]]:
    """Return the lines about each group."""
    lines = []
    if result["obstacle"]:
        lines.append(("note", f"nothing was measured: {result['obstacle']}"))
    for group in result["groups"]:
        name = f"{group['group']}, {console.format_rows(group['rows'])}"
        if group["verdict"] is None:
            reason = "" if signals_only or result["obstacle"] else f": fewer than {signals.LEAST_SUSPECTS} rows"
            lines.append(("suggested", f"{name}: suggested by signals, not measured{reason}"))
            continue
        lines.append((_shorten_verdict(group["verdict"]), f"{name}: {group['verdict']}"))
        lines.append(("", f"held-out loss without it {_write(group['against_others'])} than without random rows"))
        lines.append(("", f"held-out loss without it {_write(group['against_complete'])} than with all rows"))
        if group["verdict"] == paired_reruns.UNDECIDED:
            lines.append(("", _explain_undecided(group)))
    return lines


def _shorten_verdict(verdict: str) -> str:
    """Return a verdict as the name of a line."""
    return "no effect" if verdict == paired_reruns.NO_EFFECT else verdict


def _write(interval: Mapping[str, float]) -> str:
    """Return a difference of losses with its interval."""
    word = "lower" if interval["value"] < 0 else "higher"
    return f"{abs(interval['value']):.4f} {word} ({interval['low']:+.4f} to {interval['high']:+.4f})"


def _explain_undecided(group: Mapping[str, Any]) -> str:
    """Return what would decide a group."""
    if group["needed_pairs"] is not None:
        return f"a difference of this size would be decided by about {group['needed_pairs']} pairs: set `--pairs`"
    return "more pairs would not decide it; hold out more rows (`data.eval_fraction`, `data.eval`)"


def show_rows(entries: Mapping[int, Mapping[str, Any]], output: Path) -> None:
    """Show some suspects in the order of the rows, and name the file that has all."""
    if not entries:
        return
    shown = list(entries.values())[:_SHOWN]
    table = [["row", "signals", "text"]]
    for entry in shown:
        turns = [" ".join(str(turn.get("content") or "").split()) for turn in entry["messages"][-2:]]
        text = " -> ".join(turn if len(turn) <= _TEXT else turn[: _TEXT - 3] + "..." for turn in turns)
        table.append([str(entry["row"]), ", ".join(entry["signals"]), text])
    for line in ["", *console.format_columns(table), ""]:
        console.say(line)
    more = f", with {len(entries) - len(shown):,} more suspects" if len(entries) > len(shown) else ""
    path = run_folder.shorten_path(output.absolute() / run_folder.SUSPECTS)
    console.say(f"wrote     {path}{more}, in the order of the rows: no row is ranked")


def choose_next(result: Mapping[str, Any], options: argparse.Namespace) -> str:
    """Return the next step, in the imperative."""
    verdicts = {group["verdict"] for group in result["groups"]}
    if paired_reruns.HURTS in verdicts:
        if options.fix is None:
            return "read the rows of the group that hurts, then write a set without them with --fix clean.jsonl."
        return f"set `path: {options.fix}` in the recipe, and train again."
    if options.signals_only and result["reruns"]:
        return "leave out --signals-only, so that reruns measure the suspects."
    if paired_reruns.UNDECIDED in verdicts:
        return "read the suspects, and raise --pairs or hold out more rows to decide."
    return "read the suspects where you doubt them; nothing was measured to hurt."
