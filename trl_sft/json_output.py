"""The answer of a command to a program: one JSON object on standard output, under `--json`.

Inputs: values and faults, as a command has them. Outputs: the object; everything else that is printed goes to standard
error while it is collected. Without `--json` nothing is collected. Not here: what each command answers;
`docs/reference/json.md` lists it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from trl_sft import redaction
from trl_sft.errors import EXIT_DONE, Edit, Fault, Place


@dataclass
class Answer:
    """What a command has answered so far."""

    command: str
    values: dict[str, Any] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    exit_code: int = EXIT_DONE


# The answer of the running command, the innermost last. `datasets` pickles the functions of a stream with the
# globals that they read, and a ContextVar cannot be pickled.
_answers: list[Answer] = []


def is_requested() -> bool:
    """Tell whether the running command answers a program."""
    return bool(_answers)


def add_values(**values: Any) -> None:
    """Put values into the answer, each under its name; nothing happens without `--json`."""
    if _answers:
        _answers[-1].values |= values


def add_faults(faults: Sequence[Fault]) -> None:
    """Put faults into the answer; nothing happens without `--json`."""
    if _answers:
        known = _answers[-1].faults
        known += [fault for fault in faults if fault not in known]


@contextlib.contextmanager
def collect(command: str) -> Iterator[Answer]:
    """Collect the answer of a command, and print it at the end, whatever ends the command.

    Inside the block standard output is standard error, also for other libraries and for subprocesses.
    """
    answer = Answer(command)
    _answers.append(answer)
    output, descriptor = sys.stdout, _get_descriptor(sys.stdout)
    errors_descriptor = _get_descriptor(sys.stderr)
    saved = None
    if descriptor is not None and errors_descriptor is not None:
        output.flush()
        saved = os.dup(descriptor)
        os.dup2(errors_descriptor, descriptor)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield answer
    finally:
        _answers.pop()
        if saved is not None and descriptor is not None:
            output.flush()
            os.dup2(saved, descriptor)
            os.close(saved)
        print(format_answer(answer), file=output, flush=True)


@contextlib.contextmanager
def record(command: str) -> Iterator[Answer]:
    """Collect the answer of a command inside the block; it is not printed, and output stays where it goes."""
    answer = Answer(command)
    _answers.append(answer)
    try:
        yield answer
    finally:
        _answers.pop()


def format_answer(answer: Answer) -> str:
    """Return an answer as JSON text."""
    content = {
        "ok": answer.exit_code == EXIT_DONE,
        "command": answer.command,
        "exit_code": answer.exit_code,
        "faults": [describe_fault(fault) for fault in answer.faults],
        **answer.values,
    }
    return json.dumps(redaction.redact_values(_to_json(content)), ensure_ascii=True, indent=1)


def describe_fault(fault: Fault) -> dict[str, Any]:
    """Return a fault as a mapping that JSON can write."""
    place = fault.where if isinstance(fault.where, Place) else Place.parse(fault.where)
    return {
        "code": fault.code,
        "where": {
            "text": redaction.redact_shapes(str(place)),
            "file": place.file or None,
            "line": place.line,
            "row": place.row,
            "key": list(place.key),
        },
        "problem": redaction.redact_shapes(fault.problem),
        "fix": redaction.redact_shapes(fault.fix),
        "edits": [describe_edit(edit) for edit in fault.edits],
    }


def describe_edit(edit: Edit) -> dict[str, Any]:
    """Return an edit as a mapping that JSON can write."""
    described: dict[str, Any] = {"action": edit.action, "key": list(edit.key)}
    if edit.action == "set":
        described["value"] = edit.value
    if edit.action == "rename":
        described["new"] = list(edit.new)
    return described


def _get_descriptor(stream: TextIO) -> int | None:
    """Return the file descriptor of a stream; None for one that is no file, as in a notebook or a test."""
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None


def _to_json(value: Any) -> Any:
    """Return a value as JSON can write it: infinite numbers and NaN become null, paths and other objects text."""
    if isinstance(value, dict):
        return {str(name): _to_json(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_to_json(inner) for inner in value]
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item"):  # a number of numpy or torch
        return _to_json(value.item())
    return str(value.as_posix() if isinstance(value, Path) else value)
