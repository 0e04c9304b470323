"""Pure functions from a row to one of TRL's forms, and the dicts of layouts and wordings.

In: a row as a dict. Out: `{"prompt": ..., "completion": ...}` (two texts, or two lists of
{role, content}) or `{"text": ...}`. A layout says what the columns mean, a wording how that becomes
text. Deliberately absent: files, tokenizers, the loss.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

Row = Mapping[str, Any]
Message = dict[str, str]

# ShareGPT's speakers, https://github.com/lm-sys/FastChat; OpenAI's roles need no translation.
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}

# Keys of a turn by which other tools change what is rendered or trained; to drop one would be silent.
_CARRYING = {"tool_calls", "function_call", "tool_call_id", "reasoning_content", "thinking", "weight", "train"}

# https://github.com/tatsu-lab/stanford_alpaca/blob/main/train.py, PROMPT_DICT, Apache-2.0, as it is
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


class BadRow(ValueError):
    """A row cannot be formatted: what stood there, and what to write."""

    def __init__(self, found: str, write: str) -> None:
        """Keep both parts for the fault that the caller builds."""
        self.found, self.write = found, write
        super().__init__(found)


class Turn(NamedTuple):
    """One instruction, what it works on (may be empty), and the response."""

    instruction: str
    input: str
    response: str

    @property
    def question(self) -> str:
        """The instruction and its input as one text."""
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction


class Layout(NamedTuple):
    """What the columns of a row mean."""

    columns: tuple[str, ...]  # have to be there; `input` of alpaca may
    wording: str  # where the tokenizer has no chat template; "" = only chat
    read: Callable[[Row], Any]  # a Turn, a list of messages, or a text


def text(row: Row, column: str) -> str:
    """Return a column's text. Raises BadRow where it is none."""
    value = row.get(column)
    if isinstance(value, str):
        return value
    shown = "nothing (null)" if value is None else f"{str(value)[:40]!r} ({type(value).__name__})"
    raise BadRow(f"{column} is {shown}", "text there, or take the row out")


def _messages(row: Row, column: str, speaker: str = "role", words: str = "content", last: str = "") -> list[Message]:
    turns = row.get(column)
    if not isinstance(turns, list) or not turns:
        raise BadRow(f"{column} is {'empty' if turns == [] else 'no list'}", f"a list of {{{speaker}, {words}}}")
    messages: list[Message] = []
    for turn in turns:
        if not isinstance(turn, Mapping) or turn.get(speaker) not in _ROLES:
            role = turn.get(speaker) if isinstance(turn, Mapping) else turn
            raise BadRow(f"{column} has {speaker} {role!r}", f"one of {', '.join(_ROLES)}")
        carried = sorted(key for key in _CARRYING & set(turn) if turn[key] is not None)
        if carried:
            raise BadRow(f"{column} has {', '.join(carried)}, which this version does not use", "turns without")
        messages.append({"role": _ROLES[turn[speaker]], "content": text(turn, words)})
    if last and column != "completion" and len(messages) == 1:
        raise BadRow(f"{column} has a single turn", "a turn before the assistant's: it answers something")
    if last and messages[-1]["role"] != last:
        raise BadRow(f"{column} ends with {messages[-1]['role']}", f"the {last}'s turn last: it is what is learned")
    return messages


def _pair(row: Row) -> Any:
    if isinstance(row.get("prompt"), list):
        return _messages(row, "prompt"), _messages(row, "completion", last="assistant")
    return Turn(text(row, "prompt"), "", text(row, "completion"))


LAYOUTS: dict[str, Layout] = {
    "messages": Layout(("messages",), "", lambda row: _messages(row, "messages", last="assistant")),
    "sharegpt": Layout(
        ("conversations",), "", lambda row: _messages(row, "conversations", "from", "value", last="assistant")
    ),
    "prompt_completion": Layout(("prompt", "completion"), "plain", _pair),
    "alpaca": Layout(
        ("instruction", "output"),
        "alpaca",
        lambda row: Turn(text(row, "instruction"), text(row, "input") if row.get("input") else "", text(row, "output")),
    ),
    "question_answer": Layout(
        ("question", "answer"), "question_answer", lambda row: Turn(text(row, "question"), "", text(row, "answer"))
    ),
    "text": Layout(("text",), "plain", lambda row: text(row, "text")),
}

WORDINGS: dict[str, Callable[[Turn], tuple[str, str]]] = {
    "plain": lambda turn: (turn.question, turn.response),
    "alpaca": lambda turn: ((_ALPACA_INPUT if turn.input else _ALPACA).format(**turn._asdict()), turn.response),
    "question_answer": lambda turn: (f"### Question: {turn.question}\n### Answer:", f" {turn.response}"),
}


def recognise(columns: Collection[str]) -> list[str]:
    """Return the layouts whose columns are all there."""
    return [name for name, layout in LAYOUTS.items() if set(layout.columns) <= set(columns)]


def fields(template: str) -> list[str]:
    """Return the columns that a wording of the recipe's own names in braces. Raises BadRow."""
    try:
        parts = [part[1] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise BadRow(f"{template!r}: {error}", "columns in braces, as in {question}; a brace itself as {{") from None
    if any(not part.isidentifier() for part in parts):
        raise BadRow(f"{template!r}: braces hold more than a column", "columns in braces, as in {question}")
    return parts


def form(row: Row, layout: str, wording: str | Mapping[str, str]) -> dict[str, Any]:
    """Return a row in TRL's form: prompt and completion (texts or messages), or text.

    `wording` is a key of WORDINGS, `chat`, or the recipe's own {prompt, completion}. Raises BadRow.
    """
    if isinstance(wording, Mapping):
        values = {name: text(row, name) for part in wording.values() for name in fields(part)}
        return {part: template.format(**values) for part, template in wording.items()}
    read = LAYOUTS[layout].read(row)
    words = read.response if isinstance(read, Turn) else read if isinstance(read, str) else ""
    if isinstance(read, str | Turn) and not words.strip():
        raise BadRow(f"{LAYOUTS[layout].columns[-1]} is empty: there is nothing to learn", "text there")
    if isinstance(read, str):
        return {"text": read}
    if isinstance(read, list):
        return {"prompt": read[:-1], "completion": read[-1:]}
    if not isinstance(read, Turn):
        return {"prompt": read[0], "completion": read[1]}
    if wording == "chat":
        prompt, completion = [("user", read.question)], [("assistant", read.response)]
        chat = {"prompt": prompt, "completion": completion}
        return {part: [{"role": role, "content": words} for role, words in turns] for part, turns in chat.items()}
    return dict(zip(("prompt", "completion"), WORDINGS[wording](read), strict=True))
