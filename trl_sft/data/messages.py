"""Pure functions over the turns of a chat: read from a row, checked, brought to what a template renders.

In: the turns as OpenAI or ShareGPT write them. Out: messages as transformers' `apply_chat_template`
takes them: {role, content}, an assistant's with `tool_calls` (arguments as a mapping) and
`reasoning_content`. Deliberately absent: templates; `chat` finds out what one renders.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

# stands before a special string of a row that is to be plain text; a noncharacter of Unicode, in no text
MARK = "\ufdd0"

Row = Mapping[str, Any]
Message = dict[str, Any]

# https://platform.openai.com/docs/api-reference/chat (developer is today's system, function yesterday's tool), and
# ShareGPT's speakers as https://github.com/lm-sys/FastChat and https://github.com/hiyouga/LLaMA-Factory read them
ROLES = {
    **{"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"},
    **{"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool", "function": "tool"},
}
# Keys of a turn that say whether it is trained: OpenAI's weight (0 or 1), and train (true or false)
UNTRAINED = "untrained"
_CARRYING = ("weight", "train")
_THINKING = ("reasoning_content", "thinking", "reasoning")
_KEPT = ("name", "tool_call_id")
_KEYS = {
    *_CARRYING,
    *("role", "content", "from", "value", "tool_calls", "function_call"),
    *_THINKING,
    *_KEPT,
    "human",
    "assistant",
}
MEDIA = ("image", "images", "audio", "audios", "video", "videos")


class FormatError(ValueError):
    """A row cannot be formatted: what stood there, and what to write."""

    def __init__(self, problem: str, fix: str) -> None:
        """Keep both parts for the fault that the caller builds."""
        self.problem, self.fix = problem, fix
        super().__init__(problem)


class Chat(NamedTuple):
    """A conversation whose last `learned` messages are the completion."""

    messages: list[Message]
    tools: list[dict[str, Any]]  # JSON schemas of functions; empty = none
    learned: int = 1


class Rendered(NamedTuple):
    """A conversation as a template can render it."""

    messages: list[Message]
    tools: list[dict[str, Any]]
    learned: int  # so many last messages are the completion
    as_text: frozenset[str]  # what became text because the template does not render it


def text(row: Row, column: str) -> str:
    """Return a column's text. Raises FormatError where it is none."""
    value = row.get(column)
    if isinstance(value, str):
        return value
    shown = "nothing (null)" if value is None else f"{str(value)[:40]!r} ({type(value).__name__})"
    raise FormatError(f"{column} is {shown}", "text there, or take the row out")


def read(row: Row, column: str) -> list[Message]:
    """Return the turns of a column as messages; a turn is {role, content} or {from, value}. Raises FormatError."""
    turns = row.get(column)
    if isinstance(turns, str) and turns.lstrip().startswith("["):  # as a CSV holds it
        turns = _parsed(turns, column)
    if not isinstance(turns, list) or not turns:
        raise FormatError(f"{column} is {'empty' if turns == [] else 'no list'}", "a list of {role, content}")
    messages = []
    for number, turn in enumerate(turns, 1):
        try:
            messages.append(_message(turn, column))
        except FormatError as bad:
            raise FormatError(f"{bad.problem} (turn {number})", bad.fix) from None
    return messages


def tools(row: Row, column: str = "tools") -> list[dict[str, Any]]:
    """Return the functions that a row offers, each as {type: function, function: schema}; from a list or JSON."""
    value = _parsed(row.get(column) or [], column)
    listed = [_parsed(item, column) for item in (value if isinstance(value, list) else [value])]
    if not all(isinstance(item, dict) for item in listed):
        raise FormatError(f"{column} holds {str(value)[:40]!r}", "a list of JSON schemas of functions")
    return [item if "function" in item else {"type": "function", "function": item} for item in listed]


def unused(row: Row) -> set[str]:
    """Return the keys of a row's turns that nothing here reads, as column.key."""
    lists = {column: value for column, value in row.items() if column != "tools" and isinstance(value, list)}
    turns = ((column, turn) for column, value in lists.items() for turn in value if isinstance(turn, Mapping))
    return {f"{column}.{key}" for column, turn in turns for key in turn if key not in _KEYS and turn[key] is not None}


def strings(value: Any) -> Iterator[str]:
    """Yield every text in a row, keys aside."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from strings(part)


@functools.cache
def special_pattern(strings: tuple[str, ...]) -> re.Pattern[str]:
    """Return what finds any of the strings, the longest where several begin alike; they stand longest first."""
    return re.compile("|".join(map(re.escape, strings)) or r"(?!)")  # of none, what is never found


def escaped(value: Any, specials: re.Pattern[str]) -> Any:
    """Return a row with `MARK` before every special string in its texts: they are plain text then."""
    if isinstance(value, str):
        return specials.sub(f"{MARK}\\g<0>", value)
    if isinstance(value, Mapping):
        return {name: escaped(part, specials) for name, part in value.items()}
    return [escaped(part, specials) for part in value] if isinstance(value, list) else value


def unescaped(value: Any) -> Any:
    """Return texts, or messages, without `MARK`."""
    if isinstance(value, str):
        return value.replace(MARK, "")
    if isinstance(value, Mapping):
        return {name: unescaped(part) for name, part in value.items()}
    return [unescaped(part) for part in value] if isinstance(value, list) else value


def check(messages: Sequence[Message], column: str) -> None:
    """Refuse a conversation that trains nothing or confuses a template. Raises FormatError."""
    roles = [message["role"] for message in messages]
    if roles.count("system") > 1:
        raise FormatError(f"{column} has {roles.count('system')} system prompts", "one, at the beginning: join them")
    if "system" in roles[1:]:
        raise FormatError(f"{column} has its system prompt as turn {roles.index('system') + 1}", "it at the beginning")
    talk = roles[1:] if roles[0] == "system" else roles
    if "assistant" not in talk:
        raise FormatError(f"{column} has no assistant's turn", "one, as the last: it is what is learned")
    if talk[0] != "user":
        raise FormatError(f"{column} begins with {talk[0]}", "a user's turn before it: it answers something")
    if roles[-1] != "assistant":
        raise FormatError(f"{column} ends with {roles[-1]}", "the assistant's turn last: it is what is learned")
    for number, message in enumerate(messages, 1):
        said = message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content")
        if message["role"] in ("user", "assistant") and not said:
            raise FormatError(f"{column} has an empty turn of the {message['role']} (turn {number})", "text there")
        if message["role"] == "tool" and roles[number - 2] not in ("assistant", "tool"):
            raise FormatError(
                f"{column} has a tool's answer after {roles[number - 2]} (turn {number})", "the call before it"
            )


def render(chat: Chat, renders: Collection[str]) -> Rendered:
    """Return a conversation with what a template does not render (calls, tools, thoughts) as text.

    `renders` holds what it does, by the keys and roles of `apply_chat_template`: system, tools,
    tool_calls, tool, reasoning_content, thinking. The text of a call is Hermes' and Qwen's form,
    https://github.com/NousResearch/Hermes-Function-Calling (MIT).
    """
    as_text: set[str] = set()
    out: list[Message] = []
    given = 0  # messages before the completion
    answers = 0  # of tools, so far joined into one user's turn
    for number, turn in enumerate(chat.messages):
        given = len(out) if number == len(chat.messages) - chat.learned else given
        message = dict(turn)
        answers = answers + 1 if message["role"] == "tool" else 0
        if message["role"] == "tool" and "tool" not in renders:
            as_text.add("answers of tools")
            words = f"<tool_response>\n{message['content']}\n</tool_response>"
            if answers > 1:
                out[-1]["content"] += f"\n{words}"
                continue
            message = {"role": "user", "content": words}
        _think(message, renders, as_text)
        calls = message.get("tool_calls")
        if calls and "tool_calls" not in renders:
            as_text.add("tool calls")
            written = [f"<tool_call>\n{_json(call['function'])}\n</tool_call>" for call in message.pop("tool_calls")]
            message["content"] = "\n".join([message["content"]] * bool(message["content"]) + written)
        out.append(message)
    learned = len(out) - given
    if not chat.tools or "tools" in renders:
        return Rendered(out, chat.tools, learned, frozenset(as_text))
    as_text.add("tools")
    listed = "\n".join(_json(tool) for tool in chat.tools)
    _before(out, f"You may call these functions:\n<tools>\n{listed}\n</tools>", "system" in renders)
    return Rendered(out, [], learned, frozenset(as_text))


def _message(turn: Any, column: str) -> Message:
    name = (turn.get("role") or turn.get("from")) if isinstance(turn, Mapping) else turn
    if not isinstance(name, str) or name not in ROLES:
        raise FormatError(f"{column} has the role {name!r}", f"one of {', '.join(ROLES)}")
    content = turn["content"] if turn.get("content") is not None else turn.get("value")
    if name == "function_call":
        turn, content = {**turn, "tool_calls": content}, ""
    calls = _calls(turn.get("tool_calls") or turn.get("function_call") or [], column)
    message: Message = {"role": ROLES[name], "content": "" if calls and content is None else _content(content, column)}
    if calls and ROLES[name] != "assistant":
        raise FormatError(f"{column} has a call by {name}", "calls in the assistant's turns")
    if calls:
        message["tool_calls"] = calls
    thought = next((turn[key] for key in _THINKING if turn.get(key)), None)
    if thought is not None:
        message["reasoning_content"] = text({column: thought}, column)
    if not _is_trained(turn, ROLES[name], column):
        message[UNTRAINED] = True
    return message | {key: turn[key] for key in _KEPT if turn.get(key) is not None}


def _is_trained(turn: Mapping[str, Any], role: str, column: str) -> bool:
    """Tell whether a turn may be learned, from its own `train` or `weight`."""
    given = [(key, turn[key]) for key in _CARRYING if turn.get(key) is not None]
    for key, value in given:
        if value not in (0, 1):
            raise FormatError(f"{column} has a turn with {key}: {value!r}", "0 or 1 (false or true): no part of a loss")
        if value and role != "assistant":
            raise FormatError(f"{column} has a turn of {role} with {key}: {value!r}", "it on assistant's turns alone")
    if len({bool(value) for _, value in given}) > 1:
        raise FormatError(f"{column} has a turn with {' and '.join(f'{k}: {v!r}' for k, v in given)}", "one of the two")
    return all(value for _, value in given)


def _content(value: Any, column: str) -> str:
    """Return the text of a turn; several parts of text are one. Raises FormatError for pictures and sound."""
    if not isinstance(value, list):
        return text({f"a turn of {column}": value}, f"a turn of {column}")
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text":
            raise FormatError(f"{column} has a part of type {kind}", "rows of text alone: this version trains no other")
    return "".join(text(part, "text") for part in value)


def _calls(value: Any, column: str) -> list[dict[str, Any]]:
    """Return calls as {type, function: {name, arguments}}, arguments as a mapping, from any way to write them."""
    value = _parsed(value, column)
    found = []
    for item in value if isinstance(value, list) else [value]:
        call = _parsed(item, column)
        function = call.get("function") or call if isinstance(call, Mapping) else {}
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise FormatError(f"{column} has a call {str(item)[:40]!r}", "{name: ..., arguments: {...}}")
        given = function.get("arguments")
        arguments = _parsed(given, column) if isinstance(given, str) and given.strip() else given or {}
        if not isinstance(arguments, Mapping):
            raise FormatError(f"{column} has a call with arguments {str(given)[:40]!r}", "a mapping, or its JSON")
        named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        found.append({"type": "function", **named, "function": {"name": function["name"], "arguments": arguments}})
    return found


def _think(message: Message, renders: Collection[str], as_text: set[str]) -> None:
    """Put a turn's thought under the key that the template reads, or before the answer."""
    thought = message.pop("reasoning_content", None)
    if thought is None:
        return
    key = next((key for key in ("reasoning_content", "thinking") if key in renders), "")
    if key:
        message[key] = thought
    else:
        as_text.add("thoughts")
        message["content"] = f"<think>\n{thought}\n</think>\n\n{message['content']}"


def _before(messages: list[Message], words: str, system: bool) -> None:
    """Put words into the system prompt, or before the first turn where a template has none."""
    if messages[0]["role"] == "system" or not system:
        joined = [messages[0]["content"], words] if messages[0]["role"] == "system" else [words, messages[0]["content"]]
        messages[0]["content"] = "\n\n".join(joined)
    else:
        messages.insert(0, {"role": "system", "content": words})


def _parsed(value: Any, column: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise FormatError(f"{column} has {value[:40]!r} where JSON is due", "JSON there") from None


_json: Callable[[Any], str] = json.JSONEncoder(ensure_ascii=False).encode
