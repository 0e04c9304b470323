"""The table of the runs below a folder.

Inputs: run folders. Outputs: one description for each run, as plain values and as the cells of a table. Not here: the
command (`cli.runs`), and the page of one run (`page`).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from trl_sft import console, run_folder
from trl_sft.reports import run_files
from trl_sft.reports.run_files import RunFiles

COLUMNS = ("run", "state", "verdict", "eval loss", "steps", "model", "rows", "ended", "time")


def describe(files: RunFiles) -> dict[str, Any]:
    """Return a run as plain values; None stands for what its files do not hold.

    Returns:
        `folder`, `state`, `outcome`, `verdict` (its code), `model`, `rows` (training rows), `steps`, `planned_steps`,
        `eval_loss_before`, `eval_loss_after`, `seconds` (of the process that ended the run), `ended` (seconds since
        1970-01-01; of a run that is running, the last change of its log), and `damaged` (files that cannot be read).
    """
    before, after = find_eval_losses(files)
    record = files.folder / (run_folder.RUN if files.state != run_files.RUNNING else run_folder.LOG)
    train_rows = files.ledger.get("train", {}).get("rows", {}) if isinstance(files.ledger.get("train"), dict) else {}
    return {
        "folder": str(files.folder),
        "state": files.state,
        "outcome": files.outcome,
        "verdict": _get_text(files.run.get("verdict"), "code"),
        "model": _get_text(files.run.get("recipe"), "model.name_or_path"),
        "rows": train_rows.get("kept") if isinstance(train_rows, dict) else None,
        "steps": _find_steps(files),
        "planned_steps": _as_count(files.get_number("measured", "after_training", "planned_steps")),
        "eval_loss_before": before,
        "eval_loss_after": after,
        "seconds": files.get_number("seconds"),
        "ended": record.stat().st_mtime if record.exists() else None,
        "damaged": files.damaged,
    }


def format_cells(described: dict[str, Any], *, parent: Path) -> tuple[str, ...]:
    """Return the cells of a run's line, in the order of `COLUMNS`; "-" stands for what is not known.

    Args:
        described: what `describe` returned.
        parent: the folder that was searched; names of runs are shown relative to it.

    """
    folder = Path(described["folder"])
    name = folder.name if folder == parent else str(folder.relative_to(parent))
    before, after = described["eval_loss_before"], described["eval_loss_after"]
    losses = " -> ".join("-" if loss is None else f"{loss:.4g}" for loss in (before, after))
    ended, seconds = described["ended"], described["seconds"]
    return (
        name,
        described["state"],
        (described["verdict"] or "-").replace("_", " "),
        "-" if before is None and after is None else losses,
        "-" if described["steps"] is None else f"{described['steps']:,}",
        Path(described["model"] or "-").name,
        "-" if described["rows"] is None else f"{described['rows']:,}",
        "-" if ended is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(ended)),
        "-" if seconds is None else console.format_duration(seconds),
    )


def find_eval_losses(files: RunFiles) -> tuple[float | None, float | None]:
    """Return the eval loss of the base model and of the model that was saved, or the last one of an unfinished run."""
    logged = [entry for entry in files.log if isinstance(entry.get("eval_loss"), int | float)]
    first = logged[0] if logged and logged[0].get("step") == 0 else None
    before = first["eval_loss"] if first else None
    after = files.get_number("metrics", "eval_loss")
    if after is None and logged and logged[-1] is not first:
        after = logged[-1]["eval_loss"]
    return before, after


def _find_steps(files: RunFiles) -> int | None:
    """Return the number of steps: that of a finished run, or the last one in the log."""
    steps = _as_count(files.get_number("steps"))
    logged = [entry["step"] for entry in files.log if isinstance(entry.get("step"), int)]
    return steps if steps is not None else max(logged, default=None)


def _as_count(number: float | None) -> int | None:
    return None if number is None else int(number)


def _get_text(mapping: Any, key: str) -> str | None:
    """Return a text of a mapping; None if the mapping has none."""
    value = mapping.get(key) if isinstance(mapping, dict) else None
    return value if isinstance(value, str) else None
