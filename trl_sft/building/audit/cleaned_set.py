"""Writes the rows that passed an audit, and beside them those that did not, each with its reason.

In: an `AuditSource` and its findings. Out: two files of JSON lines, written whole or not at all. Not here: which rows
are removed (`row_audit`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from trl_sft.building.audit.audit_source import AuditSource
from trl_sft.building.audit.row_audit import SetAudit
from trl_sft.errors import Fault, RecipeError

REJECTED = ".rejected.jsonl"


def name_rejected(path: Path) -> Path:
    """Return the file of the rejected rows beside that of the others: `clean.jsonl` -> `clean.rejected.jsonl`."""
    return path.with_name(path.stem + REJECTED)


def refuse_inputs(inputs: Iterable[Path], *, fix: Path | None, page: Path | None = None) -> None:
    """Refuse outputs that would replace what is read, stand in a folder that is read, or replace each other.

    Args:
        inputs: files and folders that are read.
        fix: of the rows that pass, with the rejected rows beside it; None = neither is written.
        page: of `--output`; None = none is written.

    Raises:
        RecipeError: with the option.

    """
    read = {path.resolve() for path in inputs if path.exists()}
    outputs = [("--output", page), ("--fix", fix), ("--fix", name_rejected(fix) if fix else None)]
    written: set[Path] = set()
    for name, path in outputs:
        if path is None:
            continue
        place = path.resolve()
        problem = ""
        if place in read:
            problem = f"{path} holds the rows that are read"
        elif folder := next((folder for folder in read if folder.is_dir() and folder in place.parents), None):
            problem = f"{path} would stand in {folder.name}, whose rows are read"
        elif place in written:
            problem = f"{path} is written by two options"
        if problem:
            raise RecipeError(Fault(name, problem, "Name another file.", code="run.bad_option"))
        written.add(place)


def write(source: AuditSource, result: SetAudit, path: Path) -> tuple[int, int]:
    """Write both files; return the numbers of their rows.

    Args:
        source: the rows.
        result: the findings.
        path: of the rows that passed.

    Raises:
        OSError: a file cannot be written.

    """
    numbers = np.array([finding.number for finding in result.removed], np.int64)
    passed = np.setdiff1d(np.arange(len(source), dtype=np.int64), numbers)
    _write_lines(path, source.iterate_records(passed))
    _write_lines(name_rejected(path), _describe_rejected(source, result))
    return len(passed), len(numbers)


def _describe_rejected(source: AuditSource, result: SetAudit) -> Iterable[str]:
    """Yield a line for each rejected row: its place, the gate, the reason, and its record."""
    order = sorted(result.removed)
    records = source.iterate_records(np.array([finding.number for finding in order], np.int64))
    for finding, record in zip(order, records, strict=True):
        place = {"row": source.name_row(finding.number)} | source.locate_row(finding.number)
        entry = place | {"gate": finding.gate, "reason": finding.reason, "record": json.loads(record)}
        yield json.dumps(entry, ensure_ascii=False)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines into a new file beside `path`, which it replaces when it is whole."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            for line in lines:
                file.write(line + "\n")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
