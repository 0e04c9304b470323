"""Reads the run whose rows are to be measured, and refuses what is no finished run, and outputs that replace its rows.

Inputs: the folder of the command line. Outputs: its weights, its recipe, its record. Not here: kinds of runs that
cannot be rerun, and changed rows (`suspects.short_run`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trl_sft import run_folder
from trl_sft.building.audit import cleaned_set
from trl_sft.cli.evaluate import prompts
from trl_sft.errors import Fault, RecipeError
from trl_sft.recipe import resolved
from trl_sft.recipe.checked import Run
from trl_sft.serving import model_folder
from trl_sft.serving.model_folder import ModelFolder

_NAME_ONE = "Name the folder of a finished run; `python -m trl_sft runs` lists those below `runs/`."


class FinishedRun(NamedTuple):
    """A run folder, read."""

    source: ModelFolder
    recipe: Run
    record: dict[str, Any]  # its run.json


def read(folder: Path) -> FinishedRun:
    """Read a finished run. Raises RecipeError that says what the folder is or misses instead."""
    record = run_folder.read_json(folder / run_folder.RUN)
    if folder.is_dir():
        _check_files(folder, record)
    source = model_folder.find_model(folder)
    model_folder.check_base(source)
    return FinishedRun(source, prompts.read_recipe(folder), record)


def check_output(path: Path, run: Run) -> None:
    """Refuse a file of `--fix` that would replace rows of the run, or stand among them. Raises RecipeError."""
    locations = [source.location for sources in run.sources.values() for source in sources]
    cleaned_set.refuse_inputs([*resolved.list_files(run), *(file for one in locations for file in one.files)], fix=path)


def _check_files(folder: Path, record: dict[str, Any]) -> None:
    """Refuse a folder without the files of a run, and a run that is not finished. Raises RecipeError."""
    missing = [name for name in (run_folder.RUN, run_folder.RESOLVED) if not (folder / name).is_file()]
    if missing:
        raise _refuse(folder, f"the folder is no run: it has no {' and no '.join(missing)}", _NAME_ONE)
    parts = [record.get(name) for name in ("tokens", "data", "measured", "inference")]
    if not all(isinstance(part, dict) for part in parts) or not isinstance(record.get("outcome"), str):
        fix = "Train the recipe again, and name that run."
        raise _refuse(folder, f"its {run_folder.RUN} is damaged or of an older version", fix)
    if record["outcome"] != run_folder.DONE:
        lines: Sequence[str] = record["outcome"].splitlines() or ["unknown"]
        fix = "Run the recipe again to finish the run, then the same command."
        raise _refuse(folder, f"the run is not finished ({lines[0]})", fix)


def _refuse(folder: Path, problem: str, fix: str) -> RecipeError:
    """Return the error of a folder that is no finished run."""
    return RecipeError(Fault(str(folder), problem, fix, code="evaluation.not_rerun"))
