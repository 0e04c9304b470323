"""The files of a finished, running or stopped run, read back from its folder.

Inputs: a run folder. Outputs: `RunFiles`, with what each file holds. A file that is absent or damaged is empty, and a
damaged one is named. Not here: what the files mean (docs/reference/run-folder.md), and writing them (`training`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_sft import errors, run_folder, user_paths

RUNNING, INTERRUPTED, DONE, STOPPED = "running", "interrupted", "done", "stopped"


@dataclass(frozen=True)
class RunFiles:
    """What the files of one run folder hold."""

    folder: Path
    run: dict[str, Any]  # run.json
    log: list[dict[str, Any]]  # log.jsonl, one mapping for each logged step
    ledger: dict[str, Any]  # ledger.json
    evaluation: dict[str, Any]  # eval.json; empty = nothing was held out
    samples: list[dict[str, Any]]  # samples.jsonl
    rows: list[dict[str, Any]]  # rows.jsonl: the first training rows as the model sees them
    recipe: str  # recipe.yaml
    resolved: str  # resolved.yaml
    damaged: list[str]  # files that exist and cannot be read, with the reason
    state: str  # RUNNING, INTERRUPTED, DONE or STOPPED

    @property
    def outcome(self) -> str:
        """Why the run ended, as run.json has it."""
        return str(self.run.get("outcome", ""))

    def get_number(self, *path: str) -> float | None:
        """Return a finite number of run.json or None where there is none: `get_number("metrics", "eval_loss")`."""
        value: Any = self.run
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def read_run(folder: Path) -> RunFiles:
    """Read the files of a run folder.

    Raises:
        RecipeError: The folder is absent or holds no run, or its run.json cannot be read.

    """
    user_paths.check("", folder, user_paths.FOLDER)
    if not folder.is_dir():
        fix = "Name the folder of a run; `python -m trl_sft runs` lists those below `runs/`."
        raise errors.RecipeError(errors.Fault(str(folder), "there is no such folder", fix, code="report.no_run"))
    record = folder / run_folder.RUN
    if not record.is_file():
        fix = f"Name a folder that has a {run_folder.RUN}; `python -m trl_sft runs {folder}` lists those below it."
        problem = f"the folder holds no run: it has no {run_folder.RUN}"
        raise errors.RecipeError(errors.Fault(str(folder), problem, fix, code="report.no_run"))
    run = run_folder.read_json(record)
    if not run:
        fix = "Run the recipe again, or restore the file from a copy."
        problem = "the file is no JSON object: it is damaged"
        raise errors.RecipeError(errors.Fault(str(record), problem, fix, code="report.damaged_file"))
    damaged: list[str] = []
    return RunFiles(
        folder=folder,
        run=run,
        log=_read_lines(folder / run_folder.LOG, damaged),
        ledger=_read_object(folder / run_folder.LEDGER, damaged),
        evaluation=_read_object(folder / run_folder.EVAL, damaged),
        samples=_read_lines(folder / run_folder.SAMPLES, damaged),
        rows=_read_lines(folder / run_folder.ROWS, damaged),
        recipe=_read_text(folder / run_folder.RECIPE, damaged),
        resolved=_read_text(folder / run_folder.RESOLVED, damaged),
        damaged=damaged,
        state=_find_state(folder, run),
    )


def find_runs(folder: Path) -> Iterator[Path]:
    """Yield the run folders below a folder, in the order of their names; the folder itself where it is one.

    Folders inside a run folder, hidden ones, those whose name begins with `_`, and links are not searched.
    """
    if (folder / run_folder.RUN).is_file():
        yield folder
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False) and entry.name[0] not in "._":
            yield from find_runs(Path(entry.path))


def _find_state(folder: Path, run: dict[str, Any]) -> str:
    """Return whether a run is running, was interrupted without a word, is done, or was stopped for a reason."""
    outcome = run.get("outcome")
    if outcome == run_folder.DONE:
        return DONE
    if outcome != run_folder.RUNNING:
        return STOPPED
    return RUNNING if run_folder.is_locked(folder) else INTERRUPTED


def _read_text(path: Path, damaged: list[str]) -> str:
    """Return the text of a file; empty if it is absent or cannot be read, which is noted."""
    if found := user_paths.find_problem(path, user_paths.FILE):
        damaged.append(f"{path.name}: {found.problem}")
        return ""
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, ValueError) as error:
        damaged.append(f"{path.name}: {errors.first_line(error)}")
        return ""


def _read_object(path: Path, damaged: list[str]) -> dict[str, Any]:
    """Return a JSON object; empty if the file is absent or damaged, which is noted."""
    text = _read_text(path, damaged)
    if not text:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        damaged.append(f"{path.name}: {errors.first_line(error)}")
        return {}
    if not isinstance(value, dict):
        damaged.append(f"{path.name}: no JSON object")
        return {}
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file with one in each line; what is damaged is left out."""
    return _read_lines(path, [])


def _read_lines(path: Path, damaged: list[str]) -> list[dict[str, Any]]:
    """Return the JSON objects of a file with one in each line; lines that are damaged are left out and noted."""
    values, first_damage = [], ""
    for number, line in enumerate(_read_text(path, damaged).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            values.append(value)
        elif not first_damage:
            first_damage = f"{path.name}: line {number} is no JSON object"
    damaged += [first_damage] if first_damage else []
    return values
