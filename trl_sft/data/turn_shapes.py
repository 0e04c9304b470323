"""The shapes in which data sets store the turns of a chat, brought to one: a list of {role, content}.

Inputs: the value of a column. Outputs: its turns as mappings, whose own keys stay under their names. Read are a list of
turns, a mapping of lists (as `datasets` stores a sequence of mappings), the JSON or the Python text of either or of a
turn (as CSV and pandas write it), and the names that data sets give to the keys and the roles. A shape that leaves open
who speaks is refused with what to write. Deliberately not here: what a turn may hold (`messages`).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from trl_sft.console import format_names

# https://platform.openai.com/docs/api-reference/chat (developer is today's system, function yesterday's tool), and
# ShareGPT's speakers as https://github.com/lm-sys/FastChat and https://github.com/hiyouga/LLaMA-Factory read them
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    # OpenAssistant, Gemini, Cohere, and others whose names leave no doubt
    "prompter": "user",
    "bot": "assistant",
    "chatbot": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "ipython": "tool",
    "用户": "user",
    "助手": "assistant",
    "系统": "system",
}
# The keys under which a turn says who speaks, and what; the first one that a turn has is read
ROLE_KEYS = ("role", "from", "speaker", "author", "sender")
CONTENT_KEYS = ("content", "value", "text", "message", "utterance", "parts")
# Two keys under which one entry holds a question and its answer (Firefly, XTuner, MOSS)
_PAIRS = (
    *(("human", "assistant"), ("user", "assistant"), ("human", "gpt"), ("human", "bot"), ("user", "bot")),
    *(("question", "answer"), ("input", "output"), ("prompt", "response"), ("query", "response"), ("用户", "助手")),
)
_FIX = "Write a list of {role, content}"
_ROWS_OF_NUMPY = re.compile(r"\}[^\S\n]*\n\s*\{")  # pandas writes an array of mappings without commas


class ShapeError(ValueError):
    """A value that is no chat, or leaves open who speaks; `fix` says what to write."""

    def __init__(self, problem: str, fix: str) -> None:
        """Take what the value is, as the end of a sentence that begins with its column, and the instruction."""
        self.problem, self.fix = problem, fix
        super().__init__(problem)


def list_turns(value: Any) -> list[Any]:
    """Return the turns of a chat; those that are mappings have `role` and `content` where the data set names them else.

    Args:
        value: the value of the column.

    Raises:
        ShapeError: the value is no list of turns.

    """
    while isinstance(value, str):  # some are encoded twice
        value = _parse_text(value)
    if isinstance(value, Mapping):
        value = _split_columns(value)
    if not isinstance(value, list) or not value:
        problem = "is empty" if value in ([], None) else "is not a list"
        raise ShapeError(problem, f"{_FIX}.")
    if any(isinstance(turn, str) for turn in value):
        value = [_parse_turn(turn) for turn in value]
    if all(isinstance(turn, str) for turn in value):
        problem = f"is a list of {len(value)} texts, which do not say who speaks"
        raise ShapeError(problem, f"{_FIX}, or make one in `format: FILE.py:FUNCTION`.")
    if all(isinstance(turn, list) for turn in value):
        return _read_pairs(value)
    turns: list[Any] = []
    for turn in value:
        if isinstance(turn, Mapping):
            turns += _split_pair(turn)
        else:
            turns.append(turn)
    return turns


def find_role(name: Any) -> str | None:
    """Return the role of a speaker's name, in any case; None = the name is not known."""
    if not isinstance(name, str):
        return None
    return ROLES.get(name) or ROLES.get(name.strip().casefold())


def _parse_turn(turn: Any) -> Any:
    """Return the turn that a text of JSON or Python stands for; any other turn as it is."""
    if not isinstance(turn, str) or not turn.lstrip().startswith("{"):
        return turn
    try:
        value = _parse_text(turn)
    except ShapeError:
        return turn
    is_turn = _names_speaker(value) or (isinstance(value, Mapping) and len(_split_pair(value)) > 1)
    return value if is_turn else turn


def _names_speaker(turn: Any) -> bool:
    """Tell whether a value is a turn that says who speaks."""
    return isinstance(turn, Mapping) and not set(ROLE_KEYS).isdisjoint(turn)


def _parse_text(text: str) -> Any:
    """Return the value that a text of JSON, or of Python as pandas writes it, stands for. Raises ShapeError."""
    stripped = text.strip()
    if not stripped.startswith(("[", "{", '"')):
        problem = f"is the text {stripped[:40]!r}, not a list of turns" if stripped else "is empty"
        raise ShapeError(problem, f"{_FIX}.")
    for candidate in (stripped, f"[{_ROWS_OF_NUMPY.sub('}, {', stripped)}]"):  # a list, or an object in each line
        try:
            return json.loads(candidate)
        except ValueError:
            pass
    try:
        return ast.literal_eval(_ROWS_OF_NUMPY.sub("}, {", stripped))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        problem = f"is the text {stripped[:40]!r}, which is neither JSON nor Python"
        raise ShapeError(problem, "Write the list with `json.dumps(turns, ensure_ascii=False)`.") from None


def _split_columns(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the turns of a mapping of lists. Raises ShapeError for any other mapping."""
    lists = {key: item for key, item in value.items() if isinstance(item, list)}
    chat = next((key for key, item in lists.items() if item and all(map(_names_speaker, item))), None)
    if chat is not None:
        problem = f"is a mapping whose key {chat} holds the turns"
        raise ShapeError(problem, "Write that list in its place, or return it in `format: FILE.py:FUNCTION`.")
    if not set(ROLE_KEYS) & set(lists):
        if set(ROLE_KEYS) & set(value):
            raise ShapeError("is one turn, not a list of turns", f"{_FIX}: put the turn in [ ].")
        problem = f"is a mapping with the keys {format_names([*map(str, value)])}, not a list of turns"
        raise ShapeError(problem, f"{_FIX}, or make one in `format: FILE.py:FUNCTION`.")
    lengths = {key: len(item) for key, item in lists.items()}
    if len(set(lengths.values())) > 1:
        shown = format_names([f"{key} has {length}" for key, length in lengths.items()])
        raise ShapeError(f"is a mapping of lists of different lengths: {shown}", f"{_FIX}.")
    return [dict(zip(lists, items, strict=True)) for items in zip(*lists.values(), strict=True)]


def _read_pairs(value: list[list[Any]]) -> list[Any]:
    """Return the turns of a list of [role, text], or of a list that holds one chat. Raises ShapeError for others."""
    if all(chat and all(map(_names_speaker, chat)) for chat in value):
        if len(value) == 1:
            return list_turns(value[0])
        raise ShapeError(f"holds {len(value)} chats", "Write a row for each chat: a list of {role, content}.")
    if all(len(pair) == len(("role", "text")) and find_role(pair[0]) for pair in value):
        return [{"role": pair[0], "content": pair[1]} for pair in value]
    problem = f"is a list of {len(value)} lists, which do not say who speaks"
    raise ShapeError(problem, f"{_FIX}, or make one in `format: FILE.py:FUNCTION`.")


def _split_pair(turn: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the two turns of an entry that holds a question and its answer, and its system prompt; else the turn."""
    if not set(ROLE_KEYS).isdisjoint(turn):
        return [_name_keys(turn)]
    for question, answer in _PAIRS:
        if question in turn and answer in turn:
            rest = {key: item for key, item in turn.items() if key not in (question, answer, "system")}
            turns: list[Mapping[str, Any]] = []
            if turn.get("system"):
                turns.append({"role": "system", "content": turn["system"]})
            turns.append({"role": "user", "content": turn[question]})
            turns.append({"role": "assistant", "content": turn[answer], **rest})
            return turns
    return [_name_keys(turn)]


def _name_keys(turn: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a turn with `role` and `content` in place of the data set's names for them."""
    if turn.get("role") is not None and turn.get("content") is not None:
        return turn
    if len(turn) == 1 and find_role(speaker := next(iter(turn))):  # {"user": "hello"}
        return {"role": speaker, "content": turn[speaker]}
    named = dict(turn)
    lower = {key.casefold(): key for key in turn if isinstance(key, str) and not key.islower()}  # Role, Content
    for usual_key, own_key in lower.items():
        if usual_key in (*ROLE_KEYS, *CONTENT_KEYS) and usual_key not in turn:
            named[usual_key] = named.pop(own_key)
    for name, keys in (("role", ROLE_KEYS), ("content", CONTENT_KEYS)):
        if named.get(name) is not None:
            continue
        key = next((key for key in keys if named.get(key) is not None), None)
        if key is not None:
            named.pop(name, None)
            named[name] = named.pop(key)
    return named
