"""The rows of an evaluation held against the training rows of the run.

Inputs: the run folder, and the prompts that are asked. Outputs: what `eval.json` has under `evaluation.training_set`,
and lines for the screen, or a fault where a trained task is not evaluated. Not here: the comparison itself
(`evaluation.set_comparison`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_sft import console, run_folder
from trl_sft.cli.evaluate import prompts
from trl_sft.data.rows import RunRows
from trl_sft.errors import DataError, Fault, UserError, first_line
from trl_sft.evaluation import set_comparison
from trl_sft.evaluation.items import EvaluationItem
from trl_sft.evaluation.set_comparison import EvaluationPrompt
from trl_sft.training import stages


def compare(
    folder: Path,
    asked: Sequence[EvaluationItem],
    contents: Sequence[Any],
    *,
    data: Path | None,
    allows_missing: bool,
) -> dict[str, Any] | None:
    """Return how the prompts stand to the training rows of a run; None = these are not known.

    Args:
        folder: the run folder, whose resolved.yaml names the training rows.
        asked: the rows to evaluate.
        contents: their prompts as training renders them: texts or messages.
        data: the file that they come from; None = they are held-out rows of the run.
        allows_missing: whether tasks that are trained may be missing among them.

    Raises:
        DataError: a task that is trained is missing.

    """
    rows, problem = _read_rows(folder)
    if rows is None:
        console.say(f"note      the prompts are not compared with the training rows: {problem}")
        return None
    places = _name_places(rows, asked, data)
    pairs = zip(asked, contents, places, strict=True)
    result = set_comparison.compare(rows, [EvaluationPrompt(item.task, text, place) for item, text, place in pairs])
    console.print_lines(set_comparison.list_lines(result))
    missing = result["missing_tasks"]
    if missing and not allows_missing:
        where = str(data or folder)
        names = console.format_names(missing)
        problem = f"no row to evaluate has the task {names}, which {len(asked):,} rows of other tasks cannot stand for"
        fix = "Add rows of it, raise --max-rows, or accept it with --allow-missing-tasks."
        raise DataError(Fault(where, problem, fix, code="evaluation.missing_task"))
    return result


def _read_rows(folder: Path) -> tuple[RunRows | None, str]:
    """Return the rows of a run, or why they cannot be compared."""
    if not (folder / run_folder.RESOLVED).is_file():
        return None, f"the folder has no {run_folder.RESOLVED}"
    try:
        _, _, _, rows = stages.read_rows(prompts.read_recipe(folder), any_machine=True)
    except UserError as error:
        return None, error.faults[0].problem
    except OSError as error:
        return None, first_line(error)
    if not set_comparison.can_compare(rows):
        return None, "they are a stream" if rows.streaming else "they are plain text, without prompts"
    return rows, ""


def _name_places(rows: RunRows, asked: Sequence[EvaluationItem], data: Path | None) -> list[str]:
    """Return file and row of each prompt."""
    if data is not None:
        return [f"{data.name} row {item.number + 1:,}" for item in asked]
    held_out = [(split, int(number)) for split in rows.eval.values() for number in split.order]
    names = []
    for item in asked:
        is_known = item.row is not None and item.row < len(held_out)
        split, number = held_out[item.row] if is_known and item.row is not None else (None, 0)
        names.append(split.row_name(number) if split is not None else f"held-out row {item.number + 1:,}")
    return names
