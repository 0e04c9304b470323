"""What an evaluation asks: prompts with their reference answers, tasks and checks.

Inputs: entries of samples.jsonl, or a JSONL file of the user. Outputs: `EvaluationItem`s; a fault for each row that
cannot be used, all at once. Not here: tokens and answers (`cli.evaluate`), and scores (`checks`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from trl_sft.errors import DataError, Fault, Place, first_line
from trl_sft.evaluation import before_after
from trl_sft.evaluation.checks import check_requests
from trl_sft.evaluation.checks.check_requests import CODE, RequestedCheck
from trl_sft.suggestions import LOOSE, nearest_name

_PROMPT_KEYS = ("prompt", "messages", "question")
_REFERENCE_KEYS = ("reference", "answer", "completion")
_OTHER_KEYS = ("task", "tools", "check", "checks")
_SAMPLE_KEYS = {"row", "prompt", "reference", "stopped"}  # an entry of samples.jsonl has these
_MOST_FAULTS = 5


class EvaluationItem(NamedTuple):
    """One prompt of an evaluation.

    Attributes:
        number: its place among all, from 0.
        row: of the held-out rows; None = it is none of them.
        task: the label of its task; "" = none.
        prompt: a text, or messages.
        is_worded: whether the prompt is worded as training rows are; a text of the user still gets that wording.
        reference: the expected answer; "" = none.
        tools: of its chat; None = none.
        checks: of the row itself; () = the command line or the references decide.

    """

    number: int
    row: int | None
    task: str
    prompt: Any
    is_worded: bool
    reference: str
    tools: Any = None
    checks: tuple[RequestedCheck, ...] = ()

    @property
    def prompt_key(self) -> str:
        """The digest of the prompt: rows with the same one are one observation."""
        text = json.dumps([self.prompt, self.tools], sort_keys=True)
        return xxhash.xxh3_64_hexdigest(text.encode())


class ItemFile(NamedTuple):
    """The rows of a file, and its keys that are not read."""

    items: list[EvaluationItem]
    unread_keys: list[str]


def read_samples(samples: Sequence[Mapping[str, Any]]) -> list[EvaluationItem]:
    """Return the held-out prompts of samples.jsonl; those of `evaluate.prompts` have no reference and are left out."""
    held_out = [sample for sample in samples if not before_after.is_own(sample) and "prompt" in sample]
    return [
        EvaluationItem(
            number=number,
            row=sample.get("row"),
            task=str(sample.get("task") or ""),
            prompt=sample["prompt"],
            is_worded=True,
            reference=str(sample.get("reference") or ""),
            tools=sample.get("tools"),
        )
        for number, sample in enumerate(held_out)
    ]


def read_file(path: Path) -> ItemFile:
    """Return the rows of a JSONL file.

    A row has `prompt`, `messages` or `question`; it may have `reference`, `answer` or `completion`, `task`, `check`,
    and `tools`. Messages that end with an answer have it as their reference. samples.jsonl of a run is read too.

    Raises:
        DataError: the file cannot be read, or rows cannot be used.

    """
    items: list[EvaluationItem] = []
    faults: list[Fault] = []
    unread: dict[str, None] = {}
    for place, row in _read_rows(path):
        try:
            if isinstance(row, Fault):
                raise DataError(row)
            if row.keys() >= _SAMPLE_KEYS:
                items += [item._replace(number=len(items)) for item in read_samples([row])]
                continue
            unread |= dict.fromkeys(set(row) - {*_PROMPT_KEYS, *_REFERENCE_KEYS, *_OTHER_KEYS})
            items.append(_read_row(row, place, number=len(items), folder=path.parent))
        except DataError as error:
            faults += error.faults
    if not items and not faults:
        fix = 'Write one JSON object per line: {"prompt": TEXT, "reference": TEXT}.'
        faults.append(Fault(str(path), "the file has no rows", fix, code="data.no_rows"))
    if faults:
        raise DataError(faults[:_MOST_FAULTS])
    return ItemFile(items, sorted(unread))


def choose_checks(
    items: Sequence[EvaluationItem], requested: Mapping[str, Sequence[RequestedCheck]], *, may_run_code: bool
) -> list[EvaluationItem]:
    """Return the items with their checks: those of the row, else of the command line, else what the references fit.

    Args:
        items: the rows.
        requested: task -> the checks of the command line; "" = of every task.
        may_run_code: whether the user permits code of answers to run.

    Raises:
        DataError: rows without any check, or whose check lacks its reference; a check of a task that no row has.

    """
    chosen: list[EvaluationItem] = []
    by_task: dict[str, list[str]] = {}
    for item in items:
        if item.reference.strip():
            by_task.setdefault(item.task, []).append(item.reference)
    fitting = {task: tuple(check_requests.choose_checks(references)) for task, references in by_task.items()}
    tasks = {item.task for item in items}
    faults = [_explain_task(task, tasks) for task in requested if task and task not in tasks]
    for item in items:
        checks = item.checks or tuple(requested.get(item.task) or requested.get("") or ())
        if not checks and item.reference.strip():
            checks = fitting.get(item.task, ())
        faults += _find_faults(item, checks, may_run_code=may_run_code)
        chosen.append(item._replace(checks=checks))
    if faults:
        raise DataError(list(dict.fromkeys(faults))[:_MOST_FAULTS])
    return chosen


def _explain_task(task: str, tasks: set[str]) -> Fault:
    """Return the fault of a check for a task that no row has."""
    names = sorted(tasks - {""})
    similar = nearest_name(task, names, cutoff=LOOSE)
    fix = f"Did you mean `{similar}`?" if similar else "Write `--check CHECK`: the rows name no tasks."
    if names and not similar:
        fix = f"Write one of the tasks of the rows: {', '.join(names)}."
    return Fault(f"--check {task}=", f"no row has the task `{task}`", fix, code="evaluation.bad_check")


def _find_faults(item: EvaluationItem, checks: Sequence[RequestedCheck], *, may_run_code: bool) -> list[Fault]:
    """Return why an item cannot be scored."""
    where = f"prompt {item.number + 1:,}"
    if not checks:
        fix = "Write a `reference` or a `check` into the row, or add --check CHECK."
        return [Fault(where, "the row has neither a check nor a reference answer", fix, code="evaluation.no_check")]
    faults = []
    for request in checks:
        if missing := check_requests.find_missing_reference(request, item.reference):
            fix = "Write a `reference` into the row, or name another check."
            faults.append(Fault(where, missing, fix, code="evaluation.no_check"))
        if request.check.name == CODE and not may_run_code:
            problem = "the check `code` runs what the model writes"
            fix = "Add --run-code if that is permitted on this machine; the code runs under limits."
            faults.append(Fault("--run-code", problem, fix, code="evaluation.code_not_permitted"))
    return faults


def _read_rows(path: Path) -> Iterator[tuple[Place, Any]]:
    """Yield each row of JSONL, or of a list, with its place; what is no object is a Fault. Raises DataError."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"{path.name} is not UTF-8: byte {error.start}"
        raise DataError(Fault("--data", problem, "Save the file as UTF-8.", code="data.wrong_encoding")) from None
    except OSError as error:
        problem = f"{path}: {error.strerror or error}"
        fix = "Name a file that can be read."
        raise DataError(Fault("--data", problem, fix, code="data.unreadable_source")) from None
    if text.lstrip().startswith("["):
        yield from _read_list(text, path)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = Place(f"{path.name}:{number}", file=path.name, line=number)
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            fix = "Write one JSON object per line."
            row = Fault(place, f"the line {line[:40]!r} is no JSON object", fix, code="data.invalid_json")
        yield place, row


def _read_list(text: str, path: Path) -> Iterator[tuple[Place, Any]]:
    """Yield each row of a JSON list. Raises DataError."""
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        fix = "Write one JSON object per line, or one list of objects."
        problem = f"the file begins as a list and is no JSON: {first_line(error)}"
        raise DataError(Fault(str(path), problem, fix, code="data.invalid_json")) from None
    for number, row in enumerate(rows, 1):
        place = Place(f"{path.name} row {number}", file=path.name, row=number)
        fault = Fault(place, f"{str(row)[:40]!r} is no object", "Write {...}.", code="data.invalid_json")
        yield place, row if isinstance(row, dict) else fault


def _read_row(row: Mapping[str, Any], place: Place, *, number: int, folder: Path) -> EvaluationItem:
    """Return the item of a row. Raises DataError."""
    names = [name for name in _PROMPT_KEYS if row.get(name)]
    if len(names) != 1:
        problem = f"the row has {' and '.join(names)}" if names else "the row has no prompt"
        fix = f"Write one of {', '.join(_PROMPT_KEYS)}."
        raise DataError(Fault(place, problem, fix, code="data.wrong_type"))
    prompt = row[names[0]]
    references = [row[name] for name in _REFERENCE_KEYS if row.get(name) is not None]
    if isinstance(prompt, list) and _ends_with_answer(prompt):
        references.append(prompt[-1].get("content") or "")
        prompt = prompt[:-1]
    if not isinstance(prompt, str) and not _are_messages(prompt):
        fix = "Write a text, or a list of {role, content}."
        raise DataError(Fault(place, f"{names[0]} is no text and no list of messages", fix, code="data.wrong_type"))
    if len(references) > 1 or not all(isinstance(text, str | int | float) for text in references):
        problem = "the row has several reference answers" if len(references) > 1 else "the reference is no text"
        fix = f"Write one text under one of {', '.join(_REFERENCE_KEYS)}."
        raise DataError(Fault(place, problem, fix, code="data.wrong_type"))
    written = [row[name] for name in ("check", "checks") if row.get(name) is not None]
    checks = check_requests.read_requests(written, folder=folder, where=place) if written else []
    return EvaluationItem(
        number=number,
        row=None,
        task=str(row.get("task") or ""),
        prompt=prompt,
        is_worded=False,
        reference=str(references[0]) if references else "",
        tools=row.get("tools"),
        checks=tuple(checks),
    )


def _ends_with_answer(messages: Sequence[Any]) -> bool:
    """Tell whether the last message is an answer."""
    return bool(messages) and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant"


def _are_messages(value: Any) -> bool:
    """Tell whether a value is a list of messages, at least one."""
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) and "role" in turn for turn in value)
