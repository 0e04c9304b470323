"""The prompts of `evaluate.prompts`: read from a file or from the recipe, checked, and worded as the training rows are.

Inputs: the checked recipe and its formatted rows. Outputs: prompts as a text or as messages, without an answer; a fault
for each that cannot be used, with its line. Deliberately not here: their tokens and answers (`trl_sft.evaluation`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trl_sft.data import messages, pipeline, wordings
from trl_sft.data.formats import TEXT
from trl_sft.data.messages import FormatError
from trl_sft.data.rows import RunRows
from trl_sft.data.source_format import SourceFormat
from trl_sft.errors import DataError, Fault, Place
from trl_sft.recipe.checked import Run
from trl_sft.recipe.yaml_reader import describe_value

MOST_PROMPTS = 1000
_ANSWER = "-"  # stands for the answer, which a row has and a prompt has not
_KEYS = ("prompt", "messages", "tools")
_WORDS_OF_ROWS = {  # of instructions -> the words for a prompt
    ", or remove the row": "",
    "from the row": "from the prompt",
    "to train it as plain text": "to take it as plain text",
    ", in the file or in `format: FILE.py:FUNCTION`": "",
}


class FormattedPrompt(NamedTuple):
    """One prompt as training rows have it."""

    place: str  # its line, or its place in the recipe
    content: Any  # a text, or messages
    tools: list[Any] | None


def read_prompts(run: Run, rows: RunRows) -> list[FormattedPrompt]:
    """Return the prompts of `evaluate.prompts`; [] = the recipe has none.

    Args:
        run: the checked recipe.
        rows: the formatted rows: prompts are worded as those of the first source.

    Raises:
        DataError: a file that cannot be read, or prompts that cannot be used; all of them at once.

    """
    value = (run.evaluate or {}).get("prompts")
    if value is None:
        return []
    source_format = _choose_format(rows)
    prompts, faults = [], []
    for number, (place, item) in enumerate(_iterate_items(run, value)):
        if number == MOST_PROMPTS:
            fix = "Keep a few prompts: each is answered at each evaluation."
            faults.append(
                Fault(place, f"there are more than {MOST_PROMPTS:,} prompts", fix, code="data.too_many_prompts")
            )
            break
        try:
            if isinstance(item, FormatError):
                raise item
            prompts.append(format_prompt(item, source_format, row_type=rows.row_type, place=place))
        except FormatError as error:
            faults.append(Fault(place, error.problem, adapt_fix(error.fix), code=error.code))
    if not prompts and not faults:
        where = run.recipe.where(("evaluate", "prompts"))
        faults.append(Fault(where, "the file has no prompts", "Write one prompt per line.", code="data.no_rows"))
    if faults:
        raise DataError(faults)
    return prompts


def adapt_fix(fix: str) -> str:
    """Return the instruction for a row as one for a prompt."""
    for words, others in _WORDS_OF_ROWS.items():
        fix = fix.replace(words, others)
    return fix


def _iterate_items(run: Run, value: Any) -> Iterator[tuple[Place, Any]]:
    """Yield each prompt as it is written, with its place; a line that is no JSON is a FormatError. Raises DataError."""
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield run.recipe.where(("evaluate", "prompts", number)), item
        return
    path = Path(value)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"{path.name} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}"
        where = run.recipe.where(("evaluate", "prompts"))
        raise DataError(Fault(where, problem, "Save the file as UTF-8.", code="data.wrong_encoding")) from None
    except OSError as error:
        where = run.recipe.where(("evaluate", "prompts"))
        problem = f"{path}: {error.strerror or error}"
        raise DataError(Fault(where, problem, "Name a file that can be read.", code="data.unreadable_source")) from None
    is_text = path.suffix.lower() == ".txt"
    for number, line in enumerate(text.split("\n"), 1):
        written = line.rstrip("\r")
        if written.strip():
            place = Place(f"{path.name}:{number}", file=path.name, line=number)
            yield place, written if is_text else _parse_line(written)


def _parse_line(line: str) -> Any:
    """Return the JSON object of a line, or the FormatError that says why it is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return FormatError(
            f"the line {line[:40]!r} is no JSON", "Write one JSON object per line.", code="data.invalid_json"
        )
    if not isinstance(value, dict):
        fix = 'Write an object: {"prompt": TEXT}, or {"messages": [...]}.'
        return FormatError(f"the line is {describe_value(value)}", fix, code="data.wrong_type")
    return value


def _choose_format(rows: RunRows) -> SourceFormat:
    """Return how the rows of the first training source are worded."""
    source_format: SourceFormat = rows.train.sources[0].source_format
    return source_format._replace(function=None, rename=(), own_columns=())


def format_prompt(item: Any, source_format: SourceFormat, *, row_type: str, place: str) -> FormattedPrompt:
    """Return one prompt, worded as a row is.

    Args:
        item: a text, {prompt: TEXT} or {messages: [...]}.
        source_format: how the rows are worded.
        row_type: TRL's dataset type of the rows: CHAT, PAIRS or TEXT.
        place: its line, or its place in the recipe.

    Raises:
        FormatError: the prompt cannot be used.

    """
    content, tools = _read_item(item)
    is_chat = isinstance(content, list)
    if is_chat and row_type == TEXT:
        fix = 'Write the beginning of a text: {"prompt": TEXT}.'
        raise FormatError("the prompt has messages, but the rows are plain text", fix, code="data.wording_mismatch")
    if not is_chat and not content.strip():
        raise FormatError("the prompt is empty", "Write text there, or remove it.", code="data.empty_value")
    if row_type == TEXT:
        messages.refuse_half_characters({"text": content})
        return FormattedPrompt(place, content, None)
    own = source_format.wording if isinstance(source_format.wording, Mapping) else None
    if own is not None and is_chat:
        fix = "Write the prompt as one text."
        raise FormatError(
            "the prompt has messages, but the rows have a wording of their own", fix, code="data.wording_mismatch"
        )
    if own is not None:
        columns = wordings.template_columns(own["prompt"])
        # with several columns the text is the whole prompt
        text = own["prompt"].format(**{columns[0]: content}) if len(columns) == 1 else content
        messages.refuse_half_characters({"text": text})
        return FormattedPrompt(place, text, None)
    if is_chat:
        turns = [*content, {"role": "assistant", "content": _ANSWER}]
        row = {"messages": turns} | ({"tools": tools} if tools else {})
        columns_of_row = pipeline.format_one(row, source_format._replace(format="messages"))
    elif source_format.format == "prompt_completion":  # whose prompts may hold the tokens of a template
        row = {"prompt": content, "completion": _ANSWER}
        columns_of_row = pipeline.format_one(row, source_format)
    elif source_format.wording == "chain_of_thought":
        row = {"problem": content, "reasoning": _ANSWER, "answer": _ANSWER}
        columns_of_row = pipeline.format_one(row, source_format._replace(format="chain_of_thought"))
    else:
        row = {"question": content, "answer": _ANSWER}
        columns_of_row = pipeline.format_one(row, source_format._replace(format="question_answer"))
    tools_text = columns_of_row.get("tools")
    return FormattedPrompt(place, columns_of_row["prompt"], json.loads(tools_text) if tools_text else None)


def _read_item(item: Any) -> tuple[Any, Any]:
    """Return the text or the turns of a prompt as it is written, and its tools. Raises FormatError."""
    if isinstance(item, str):
        return item, None
    if not isinstance(item, dict):
        fix = "Write a text, {prompt: TEXT}, or {messages: [...]}."
        raise FormatError(f"the prompt is {describe_value(item)}", fix, code="data.wrong_type")
    if unread := [str(key) for key in item if key not in _KEYS]:
        fix = f"Keep {', '.join(_KEYS[:-1])} or {_KEYS[-1]}: a prompt has no answer and no other key."
        raise FormatError(f"the prompt has the key `{unread[0]}`, which is not read", fix, code="data.unused_meaning")
    names = [name for name in ("prompt", "messages") if name in item]
    if len(names) != 1:
        problem = "the prompt has both `prompt` and `messages`" if names else "the prompt has no text"
        raise FormatError(problem, "Write one of `prompt` and `messages`.", code="data.wrong_type")
    content = item[names[0]]
    if isinstance(content, str) and names[0] == "prompt":
        return content, None
    if not isinstance(content, list):
        fix = (
            "Write a text, or a list of {role, content}."
            if names[0] == "prompt"
            else "Write a list of {role, content}."
        )
        raise FormatError(f"{names[0]} is {describe_value(content)}", fix, code="data.wrong_type")
    turns = messages.read_messages(item, names[0])
    if turns[-1]["role"] == "assistant":
        fix = "Remove the last turn: the model writes it."
        raise FormatError(f"{names[0]} ends with an answer", fix, code="data.turn_order")
    if turns[-1]["role"] == "system":
        raise FormatError(f"{names[0]} ends with a system prompt", "Add a user turn.", code="data.turn_order")
    return turns, item.get("tools")
