"""The seeds of a set, read from files: topics, one on each line, and rows in any format that a recipe reads.

Inputs: paths that a spec names. Outputs: texts and `SeedRow`s; a fault with its line for what cannot be used. Not here:
which seed a row gets (`plan`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trl_sft import user_paths
from trl_sft.data import formats
from trl_sft.data.messages import Chat, FormatError
from trl_sft.errors import Fault, Place, first_line
from trl_sft.recipe.yaml_reader import Key, Recipe

_SUFFIXES = (".jsonl", ".ndjson")
_MOST_FAULTS = 20  # of one file
_MARKS = ("####", r"\boxed")  # after which an answer has its result
KEY = "key"  # the column with the final answer


class SeedRow(NamedTuple):
    """A row from which others are written."""

    id: str  # seed:LINE
    instruction: str
    answer: str
    key: str  # the text that ends with the right final answer; "" = none is known


def read_topics(recipe: Recipe, key: Key, path: Path, *, faults: list[Fault]) -> list[str]:
    """Return the lines of a text file that are not empty."""
    text = _read_text(recipe, key, path, faults=faults)
    if text is None:
        return []
    topics = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not topics:
        faults.append(
            recipe.fault(key, f"{path.name} has no topic", "Write one topic on each line.", code="data.no_rows")
        )
    return topics


def read_rows(recipe: Recipe, key: Key, path: Path, *, faults: list[Fault]) -> list[SeedRow]:
    """Return the seed rows of a JSONL file.

    Args:
        recipe: The spec, for the place of a fault.
        key: The key that names the file.
        path: The file.
        faults: Collects what is wrong, with the line of the file.

    """
    if path.suffix.lower() not in _SUFFIXES:
        fix = "Name a file that ends in .jsonl, with one JSON object on each line."
        faults.append(
            recipe.fault(key, f"{path.name}: seed rows are read from JSONL", fix, code="data.unknown_file_type")
        )
        return []
    text = _read_text(recipe, key, path, faults=faults)
    if text is None:
        return []
    rows, own_faults = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = Place(f"{path.name}:{number}", file=path.name, line=number)
        try:
            rows.append(_read_row(json.loads(line), number))
        except FormatError as error:
            own_faults.append(Fault(place, error.problem, error.fix, code=error.code))
        except (ValueError, RecursionError) as error:
            fix = "Write one JSON object on each line."
            own_faults.append(Fault(place, f"the line is no JSON: {first_line(error)}", fix, code="data.invalid_json"))
    if not rows and not own_faults:
        own_faults.append(
            recipe.fault(key, f"{path.name} has no rows", "Write one JSON object on each line.", code="data.no_rows")
        )
    faults += own_faults[:_MOST_FAULTS]
    return rows


def _read_text(recipe: Recipe, key: Key, path: Path, *, faults: list[Fault]) -> str | None:
    """Return the text of a file; None = it cannot be read."""
    shown = user_paths.shorten(str(path))
    if problem := user_paths.find_problem(path, user_paths.FILE):
        faults.append(recipe.fault(key, f"{shown}: {problem.problem}", problem.fix, code=problem.code))
        return None
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        fix = "Correct the path; it is relative to the spec."
        faults.append(recipe.fault(key, f"{shown}: there is no such file", fix, code="recipe.missing_file"))
    except (OSError, UnicodeDecodeError) as error:
        fix = "Name a text file in UTF-8."
        faults.append(recipe.fault(key, f"{shown}: {first_line(error)}", fix, code="data.wrong_encoding"))
    return None


def _read_row(row: Any, number: int) -> SeedRow:
    """Return a seed row. Raises FormatError."""
    if not isinstance(row, dict):
        raise FormatError("the line is no JSON object", "Write an object on each line.", code="data.invalid_json")
    names = formats.recognise(row)
    if not names:
        fix = "Write `messages`, `instruction` and `output`, `question` and `answer`, or `prompt` and `completion`."
        raise FormatError(f"the columns {', '.join(row)} are of no known format", fix, code="data.unknown_format_name")
    content = formats.FORMATS[names[0]].read(row)
    if isinstance(content, Chat):
        instruction = next((turn["content"] for turn in content.messages if turn["role"] == "user"), "")
        answer = str(content.messages[-1]["content"] or "")
    elif isinstance(content, str):
        raise FormatError("a plain text has no instruction", "Write instruction and answer.", code="data.no_rows")
    else:
        instruction, answer = content.question, content.answer
    if not str(instruction).strip():
        raise FormatError("the instruction is empty", "Write text there, or remove the row.", code="data.empty_value")
    return SeedRow(f"seed:{number}", str(instruction).strip(), answer, _find_key(row, answer))


def _find_key(row: Mapping[str, Any], answer: str) -> str:
    """Return what says the right final answer: the column `key`, or an answer that marks its result."""
    if row.get(KEY) is not None:
        return str(row[KEY])
    return answer if any(mark in answer for mark in _MARKS) else ""
