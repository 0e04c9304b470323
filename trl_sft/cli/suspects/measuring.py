"""The steps of `suspects`, top to bottom: rows, signals, groups, reruns, verdicts, files.

Inputs: a run folder and the options. Outputs: files, lines on the terminal, and what `--json` answers. Not here: the
arguments (`cli.suspects`), the lines (`screen`) and the files (`files`).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trl_sft import console, json_output, run_folder
from trl_sft.building.audit import answer_conflicts
from trl_sft.building.audit.audit_source import AuditSource
from trl_sft.cli.suspects import files, finished_run, row_signals, screen
from trl_sft.evaluation import paired_reruns
from trl_sft.evaluation.paired_reruns import GroupLosses, GroupVerdict
from trl_sft.row_progress import RowProgress
from trl_sft.suspects import plan, rerun_log, reruns, short_run, signals
from trl_sft.suspects.plan import Arm
from trl_sft.suspects.short_run import ShortRun
from trl_sft.suspects.signals import Suspect
from trl_sft.tokenization import template_date

_POOL_SEED = 0  # of the sample of rows that reruns train
_ALL_SUSPECTS = "all suspects"


def run(folder: Path, output: Path, options: argparse.Namespace) -> None:
    """Look for rows that hurt. Raises UserError, RunStopped."""
    source, recipe, record = finished_run.read(folder)
    if options.fix is not None:
        finished_run.check_output(options.fix, recipe)
    with tempfile.TemporaryDirectory() as temporary, template_date.restored():
        short = short_run.prepare(recipe, record, folder=folder, temporary=Path(temporary))
        rows = AuditSource(short.run, list(short.run.sources["train"]), short.inputs.chat.features)
        console.print_lines(screen.list_rows(short))
        measured = row_signals.measure_signals(short, source, trusts_code=options.trust_remote_code)
        conflicts = answer_conflicts.find_conflicts(rows)
        suspects = row_signals.choose_suspects(short, measured, conflicts)
        groups = _group(short, suspects, options.by)
        console.print_lines(screen.list_signals(suspects))
        measurable = {name: places for name, places in groups.items() if len(places) >= signals.LEAST_SUSPECTS}
        obstacle = _find_obstacle(short, groups, measurable)
        arms = [] if obstacle else _plan(short, measurable, options)
        result: dict[str, Any] = {
            "rows": len(short.train.rows),
            "held_out": {"choosing": len(short.choosing.rows), "judging": len(short.judging.rows)},
            "signals": {name: len(found) for name, found in suspects.items()},
            "by": options.by,
            "pairs": options.pairs,
            "obstacle": obstacle,
            "reruns": len(arms),
            "steps": arms[0].steps if arms else 0,
        }
        log = output / run_folder.SUSPECT_RERUNS
        losses = _train(short, arms, log, record=record, trains=not options.signals_only) if arms else []
        verdicts = paired_reruns.judge(_arrange(arms, losses), short.prompts) if losses else {}
        result["groups"] = [_describe_group(name, places, verdicts.get(name)) for name, places in groups.items()]
        entries = files.list_suspects(rows, short, suspects, measured=measured, conflicts=conflicts)
        files.write_suspects(output, entries, groups=groups, verdicts=verdicts)
        console.print_lines(screen.list_verdicts(result, signals_only=options.signals_only))
        screen.show_rows(entries, output)
        if options.fix is not None:
            hurting = {
                name: groups[name] for name, verdict in verdicts.items() if verdict.verdict == paired_reruns.HURTS
            }
            result |= files.write_rest(rows, short, options.fix, hurting=hurting)
    console.say(f"Next: {screen.choose_next(result, options)}")
    json_output.add_values(run=folder, output=output, suspects=result)


def _group(short: ShortRun, suspects: Mapping[str, Sequence[Suspect]], by: str) -> dict[str, list[int]]:
    """Return the groups that are measured apart: places of rows by the name of the group."""
    if by == "signal":
        return {name: sorted(suspect.place for suspect in found) for name, found in suspects.items() if found}
    places = sorted({suspect.place for found in suspects.values() for suspect in found})
    if by == "all" or not places:
        return {_ALL_SUSPECTS: places} if places else {}
    groups: dict[str, list[int]] = {}
    for place in places:
        groups.setdefault(short.train.kinds[place], []).append(place)
    return groups


def _find_obstacle(short: ShortRun, groups: Mapping[str, Sequence[int]], measurable: Mapping[str, Any]) -> str:
    """Return why nothing is measured; "" = something is."""
    judges = len(set(short.prompts))
    if not groups:
        return "no row stands out by a signal"
    if judges < paired_reruns.LEAST_JUDGES:
        needed = paired_reruns.LEAST_JUDGES
        return f"only {judges} different held-out prompts judge, and fewer than {needed} decide nothing"
    if not measurable:
        return f"no group has {signals.LEAST_SUSPECTS} rows, and fewer would be a statement about single rows"
    return ""


def _plan(short: ShortRun, groups: Mapping[str, Sequence[int]], options: argparse.Namespace) -> list[Arm]:
    """Return the reruns, pair by pair."""
    args = short.inputs.args
    steps = min(options.steps, short.steps)
    size = steps * args.per_device_train_batch_size * args.gradient_accumulation_steps
    lengths = np.array([len(row.input_ids) for row in short.train.rows])
    size = len(lengths) if args.packing else size  # how many rows a pack has is not known yet
    pool = plan.make_pool(groups, short.train.kinds, lengths, size=size, seed=_POOL_SEED)
    return plan.list_arms(pool, seeds=range(options.seed, options.seed + options.pairs), steps=steps)


def _train(
    short: ShortRun, arms: Sequence[Arm], log: Path, *, record: Mapping[str, Any], trains: bool
) -> list[list[float]]:
    """Return the losses after each rerun, from the file or trained; [] = only their time was estimated."""
    of_run = rerun_log.digest_run(short, record)
    keys = [rerun_log.digest_rerun(of_run, arm) for arm in arms]
    known = rerun_log.read(log, len(short.judging.rows))
    missing = [arm for arm, key in zip(arms, keys, strict=True) if key not in known]
    estimate = reruns.estimate_time(short, missing) if missing else None
    console.print_lines(screen.list_plan(arms, len(missing), estimate))
    if not trains:
        return []
    log.parent.mkdir(parents=True, exist_ok=True)
    with RowProgress("Reruns", len(missing), unit="reruns") as progress:
        for arm, key in zip(arms, keys, strict=True):
            if key not in known:
                known[key] = reruns.train(short, arm)
                rerun_log.append(log, key, arm, losses=known[key])
                progress.update(1)
    return [known[key] for key in keys]


def _arrange(arms: Sequence[Arm], losses: Sequence[Sequence[float]]) -> dict[str, GroupLosses]:
    """Return the losses of each group, pair by pair."""

    def select(group: str, *, leaves_out_suspects: bool) -> np.ndarray:
        chosen = [
            values
            for arm, values in zip(arms, losses, strict=True)
            if (arm.group, arm.leaves_out_suspects) == (group, leaves_out_suspects)
        ]
        return np.array(chosen)

    complete = select(plan.ALL_ROWS, leaves_out_suspects=False)
    return {
        name: GroupLosses(complete, select(name, leaves_out_suspects=True), select(name, leaves_out_suspects=False))
        for name in dict.fromkeys(arm.group for arm in arms if arm.group)
    }


def _describe_group(name: str, places: Sequence[int], verdict: GroupVerdict | None) -> dict[str, Any]:
    """Return a group as `--json` has it."""
    if verdict is None:
        return {"group": name, "rows": len(places), "verdict": None}
    entry: dict[str, Any] = {"group": name, "rows": len(places), "verdict": verdict.verdict, "p_value": verdict.p_value}
    for key in ("against_others", "against_complete"):
        entry[key] = getattr(verdict, key).interval._asdict()
    return entry | {"needed_pairs": verdict.needed_pairs, "needs_rows": verdict.needs_rows}
