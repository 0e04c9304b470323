"""Finds what is wrong with a JSON file of rows, by line and column: its readers upstream do not say.

In: a file that could not be read. Out: faults, at most a few.
"""

from __future__ import annotations

import json
from pathlib import Path

from trl_sft.errors import Fault

MAX_SHOWN = 5  # faulty lines or rows listed


def faults(file: Path) -> list[Fault]:
    """Return the lines of a JSON file that are not JSON, at most a few."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        return [Fault(file.name, f"byte {error.start} is not UTF-8", "the file saved as UTF-8, or `encoding:`")]
    if text.lstrip().startswith("["):
        return [] if (fault := _bad_json(text, file.name, 0)) is None else [fault]
    lines = enumerate(text.splitlines())
    found = (_bad_json(line, file.name, number) for number, line in lines if line.strip())
    return [fault for fault in found if fault is not None][:MAX_SHOWN]


def _bad_json(text: str, name: str, number: int) -> Fault | None:
    try:
        json.loads(text)
    except ValueError as error:
        line = number + getattr(error, "lineno", 1)
        column = getattr(error, "colno", 1)
        shown = text.splitlines()[getattr(error, "lineno", 1) - 1][max(0, column - 30) : column + 10]
        return Fault(f"{name}:{line}", f"not JSON at column {column}: ...{shown}", "one JSON object a line")
    return None
