"""The messages of a chat, as pure functions: read from a row, checked, and adapted to a chat template.

Inputs: the turns of a row as OpenAI or ShareGPT write them. Outputs: messages as transformers'
`apply_chat_template` takes them: {role, content}, and for an assistant also `tool_calls` (arguments as a mapping)
and `reasoning_content`. Deliberately not here: chat templates; `tokenization.chat_template` finds out what one
renders.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from trl_sft.data import text_thoughts, turn_shapes
from trl_sft.data.column_names import normalise
from trl_sft.data.turn_shapes import ShapeError
from trl_sft.recipe.yaml_reader import describe_value

# Stands before a special token in a row's text that is trained as plain text; a noncharacter of Unicode, which no
# text holds.
MARK = "\ufdd0"

_HALF_CHARACTER = re.compile("[\ud800-\udfff]")

Row = Mapping[str, Any]
Message = dict[str, Any]

JSON_ARGUMENTS = "json_arguments"  # a feature of a template: it takes the arguments of tool calls as JSON text
UNTRAINED = "untrained"  # key of a message that carries no loss, whatever `data.loss_on` says
# Keys of a turn that say whether it carries loss, in any case and with other separators. Their values are true and
# false, or 1 and 0: OpenAI's weight, ms-swift's loss, what axolotl's message_field_training names
_LOSS_KEYS = {
    *("weight", "loss", "train", "trainable", "training", "trained", "learn", "learnable"),
    *("train_on_turn", "train_turn", "compute_loss", "has_loss", "loss_weight", "with_loss"),
}
_NO_LOSS_KEYS = {"masked"}  # torchtune's: true takes the loss away
# verl's, of a whole turn: 1 carries loss; `true` could also mean that the loss is masked, so it is refused
_MASK_KEYS = {"loss_mask"}
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
# Parts of a turn that are text: those of chat completions, and of OpenAI's Responses
_TEXT_PARTS = ("text", "input_text", "output_text")
# Parts of a turn that have another place in a row, with that place: Anthropic's, and those of OpenAI's Responses
_PART_PLACES = {
    **dict.fromkeys(("thinking", "reasoning"), "`reasoning_content` of the turn"),
    **dict.fromkeys(("tool_use", "tool_call", "function_call"), "`tool_calls` of the turn"),
    **dict.fromkeys(("tool_result", "tool_response", "function_call_output"), "a turn of its own, with `role: tool`"),
}
_COPIED_KEYS = ("name", "tool_call_id")  # go to the chat template as they are
_KNOWN_KEYS = {
    *("role", "content", "tool_calls", "function_call", "human", "assistant"),
    *REASONING_KEYS,
    *_COPIED_KEYS,
}


class FormatError(ValueError):
    """A row, or a wording of the recipe, that cannot be formatted; the caller knows its place."""

    def __init__(self, problem: str, fix: str, *, code: str) -> None:
        """Store the parts of the fault that the caller raises.

        Args:
            problem: what is wrong, with the value as it stands.
            fix: what to do, as an instruction.
            code: the kind of fault, one of `fault_codes.yaml`.

        """
        self.problem, self.fix, self.code = problem, fix, code
        super().__init__(problem)


class Chat(NamedTuple):
    """A conversation whose last messages are the completion."""

    messages: list[Message]
    tools: list[dict[str, Any]]  # JSON schemas of functions; empty = none
    completion_length: int = 1  # the number of messages of the completion
    as_text: frozenset[str] = frozenset()  # what became text because the chat template does not render it


def read_text(row: Row, column: str) -> str:
    """Return the text of a column. Raises FormatError if the value is no text."""
    value = row.get(column)
    if isinstance(value, str):
        return value
    if column not in row:
        raise FormatError(
            f"the row has no {column}", f"Write {column} in the row, or remove the row.", code="data.wrong_type"
        )
    fix = "Write text there, or remove the row."
    if value is None:
        shown = "empty (null)"
    elif isinstance(value, float) and not math.isfinite(value):
        shown = f"{json.dumps(value)} (number), not text"
    elif isinstance(value, bool | int | float):
        shown = f"{describe_value(value)}, not text"
    else:  # in quotes, so that lists of any content are one kind of problem (`bad_rows`)
        shown = f"{str(value)[:40]!r} ({type(value).__name__}), not text"
        if isinstance(value, bytes):
            fix = "Store the column as text, or decode it in `format: FILE.py:FUNCTION`."
        elif isinstance(value, list | Mapping):
            fix = "Write text there, for example with `json.dumps`, or remove the row."
    raise FormatError(f"{column} is {shown}", fix, code="data.wrong_type")


def read_messages(row: Row, column: str) -> list[Message]:
    """Return the turns of a column as messages; `turn_shapes` says which shapes are read. Raises FormatError."""
    try:
        turns = turn_shapes.list_turns(row.get(column))
    except ShapeError as error:
        raise FormatError(f"{column} {error.problem}", error.fix, code="data.wrong_type") from None
    messages = []
    for number, turn in enumerate(turns, 1):
        try:
            messages.append(_read_message(turn, column))
        except FormatError as error:
            raise FormatError(f"{error.problem} (turn {number})", error.fix, code=error.code) from None
    return messages


def read_tools(row: Row) -> list[dict[str, Any]]:
    """Return the functions in the column `tools`, a list or its JSON, each as {type: function, function: schema}.

    Raises FormatError.
    """
    value = _parse_json(row.get("tools") or [], "tools")
    items = value if isinstance(value, list) else [value]
    tools = []
    for item in items:
        tool = _parse_json(item, "tools")
        if not isinstance(tool, dict):
            raise FormatError(
                f"tools holds {str(value)[:40]!r}",
                "Write a list of JSON schemas of functions.",
                code="data.invalid_tools",
            )
        tools.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tools


def list_unread_keys(row: Row) -> dict[str, list[Any]]:
    """Return the keys of a row's turns that nothing here reads, as column.key, with their values that are not null."""
    unread: dict[str, list[Any]] = {}
    for column, value in row.items():
        if isinstance(value, list) and all(type(turn) is dict and turn.keys() <= _KNOWN_KEYS for turn in value):
            continue  # the usual case
        for turn in _list_turns(column, value):
            for key, item in turn.items():
                if key not in _KNOWN_KEYS and item is not None and not _is_loss_key(key):
                    unread.setdefault(f"{column}.{key}", []).append(item)
    return unread


def iterate_read_texts(row: Row) -> Iterator[str]:
    """Yield the texts of a row, without those of keys of turns that nothing here reads."""
    for column, value in row.items():
        turns = _list_turns(column, value)
        if turns:
            yield from iterate_texts([turn[key] for turn in turns for key in turn if key in _KNOWN_KEYS])
        else:
            yield from iterate_texts(value)


def _list_turns(column: str, value: Any) -> list[Mapping[str, Any]]:
    """Return the turns of a column that are mappings; [] = it holds no chat."""
    is_chat = isinstance(value, list | Mapping) or column in ("messages", "conversations")  # in CSV they are text
    if column == "tools" or not is_chat:
        return []
    try:
        return [turn for turn in turn_shapes.list_turns(value) if isinstance(turn, Mapping)]
    except ShapeError:
        return []


def iterate_texts(value: Any) -> Iterator[str]:
    """Yield every text in a row; the keys of mappings are not among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from iterate_texts(item)


def refuse_half_characters(row: Row) -> None:
    """Refuse a row with half of a surrogate pair in its texts, which no tokenizer takes. Raises FormatError."""
    for text in iterate_texts(row):
        match = None if text.isascii() else _HALF_CHARACTER.search(text)
        if match:
            problem = f"a text holds \\u{ord(match[0]):04x}, half of a character (a lone surrogate)"
            fix = "Write the whole character, or remove that escape."
            raise FormatError(problem, fix, code="data.lone_surrogate")


@functools.cache
def special_pattern(special_tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Return the pattern that matches any of the special tokens.

    The tokens come longest first, so that of two with the same beginning the longer one is matched.
    """
    return re.compile("|".join(map(re.escape, special_tokens)) or r"(?!)")  # without tokens nothing matches


def escape(value: Any, pattern: re.Pattern[str]) -> Any:
    """Return a row with `MARK` before every special token in its texts, so that it is tokenized as plain text."""
    if isinstance(value, str):
        return pattern.sub(f"{MARK}\\g<0>", value)
    if isinstance(value, Mapping):
        return {key: escape(item, pattern) for key, item in value.items()}
    return [escape(item, pattern) for item in value] if isinstance(value, list) else value


def unescape(value: Any) -> Any:
    """Return texts, or messages, without `MARK`."""
    if isinstance(value, str):
        return value.replace(MARK, "")
    if isinstance(value, Mapping):
        return {key: unescape(item) for key, item in value.items()}
    return [unescape(item) for item in value] if isinstance(value, list) else value


def check_messages(messages: Sequence[Message], column: str) -> None:
    """Refuse a conversation that trains nothing or that a chat template would misread. Raises FormatError."""
    roles = [message["role"] for message in messages]
    systems = roles.count("system")
    if systems > 1:
        problem = f"{column} has {systems} system prompts"
        raise FormatError(problem, "Join them into one system prompt at the beginning.", code="data.system_prompt")
    if "system" in roles[1:]:
        problem = f"{column} has its system prompt as turn {roles.index('system') + 1}"
        raise FormatError(problem, "Move the system prompt to the beginning.", code="data.system_prompt")
    dialogue = roles[systems:]
    if "assistant" not in dialogue:
        fix = "End it with an assistant turn, which carries the loss."
        raise FormatError(f"{column} has no assistant turn", fix, code="data.no_answer")
    if dialogue[0] != "user":
        raise FormatError(
            f"{column} begins with {dialogue[0]}", "Put a user turn at the beginning.", code="data.turn_order"
        )
    if roles[-1] != "assistant":
        fix = "End it with an assistant turn, which carries the loss."
        raise FormatError(f"{column} ends with {roles[-1]}", fix, code="data.no_answer")
    for number, message in enumerate(messages, 1):
        role = message["role"]
        filled = message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content")
        if role in ("user", "assistant") and not filled:
            raise FormatError(
                f"{column} has an empty {role} turn (turn {number})", "Write text there.", code="data.empty_value"
            )
        if role == "tool" and roles[number - 2] not in ("assistant", "tool"):
            problem = f"{column} has the answer of a tool after a {roles[number - 2]} turn (turn {number})"
            raise FormatError(
                problem, "Put the assistant turn with the tool call before the tool turn.", code="data.turn_order"
            )


def adapt_to_template(chat: Chat, template_features: Collection[str]) -> Chat:
    """Return a chat in which the parts that a chat template does not render become text.

    The text of a tool call is the form of Hermes and Qwen,
    https://github.com/NousResearch/Hermes-Function-Calling (MIT).

    Args:
        chat: the chat as a row holds it.
        template_features: what the template renders, by the keys and roles of `apply_chat_template`: system,
            tools, tool_calls, tool, reasoning_content, thinking, reasoning; and the form in which it takes calls.

    Returns:
        The chat with new messages; `as_text` names what became text.

    """
    as_text: set[str] = set()
    messages: list[Message] = []
    prompt_length = 0  # messages before the completion
    for number, turn in enumerate(chat.messages):
        if number == len(chat.messages) - chat.completion_length:
            prompt_length = len(messages)
        message = dict(turn)
        if message["role"] == "tool" and "tool" not in template_features:
            as_text.add("tool answers")
            content = f"<tool_response>\n{message['content']}\n</tool_response>"
            if number > 0 and chat.messages[number - 1]["role"] == "tool":  # several answers are one user turn
                messages[-1]["content"] += f"\n{content}"
                continue
            message = {"role": "user", "content": content}
        if text_thoughts.TEXT_THOUGHTS in template_features:
            text_thoughts.take_out_thought(message)
        if "reasoning_content" in message:
            _place_reasoning(message, template_features, as_text)
        if message.get("tool_calls") and "tool_calls" not in template_features:
            as_text.add("tool calls")
            calls = [f"<tool_call>\n{_to_json(call['function'])}\n</tool_call>" for call in message.pop("tool_calls")]
            message["content"] = "\n".join([message["content"], *calls] if message["content"] else calls)
        if message.get("tool_calls"):
            message = adapt_calls(message, template_features)
        messages.append(message)
    completion_length = len(messages) - prompt_length
    tools = chat.tools
    if tools and "tools" not in template_features:
        as_text.add("tools")
        schemas = "\n".join(_to_json(tool) for tool in tools)
        content = f"You may call these functions:\n<tools>\n{schemas}\n</tools>"
        _add_to_system_prompt(messages, content, has_system_role="system" in template_features)
        tools = []
    return Chat(messages, tools, completion_length, frozenset(as_text))


def adapt_calls(message: Message, template_features: Collection[str]) -> Message:
    """Return a turn with its tool calls in the form that the template takes."""
    if JSON_ARGUMENTS not in template_features:
        return message
    calls = [
        call | {"function": call["function"] | {"arguments": _to_json(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return message | {"tool_calls": calls}


def restore_calls(message: Message) -> Message:
    """Return a turn with the arguments of its tool calls as mappings, as rows hold them; undoes `adapt_calls`."""
    calls = [dict(call) for call in message.get("tool_calls") or []]
    for call in calls:
        arguments = call["function"]["arguments"]
        if isinstance(arguments, str):
            call["function"] = call["function"] | {"arguments": json.loads(arguments)}
    return message | ({"tool_calls": calls} if calls else {})


def _read_message(turn: Any, column: str) -> Message:
    """Return one turn as a message. Raises FormatError."""
    name = turn.get("role") if isinstance(turn, Mapping) else turn
    role = turn_shapes.find_role(name)
    if role is None:
        fix = "Write system, user, assistant or tool there, in the file or in `format: FILE.py:FUNCTION`."
        if isinstance(turn, Mapping) and name is None:
            keys = ", ".join(map(str, turn)) or "none"
            problem = f"{column} has a turn that does not say who speaks; its keys are {keys}"
            fix = "Name the speaker under `role`, in the file or in `format: FILE.py:FUNCTION`."
            raise FormatError(problem, fix, code="data.unknown_role")
        raise FormatError(f"{column} has the role {name!r}", fix, code="data.unknown_role")
    content = turn.get("content")
    if name == "function_call":
        turn, content = {**turn, "tool_calls": content}, ""
    calls = _read_tool_calls(turn.get("tool_calls") or turn.get("function_call") or [], column)
    if content is None and isinstance(turn.get("refusal"), str) and not calls:  # as the API of OpenAI answers
        problem = f"a turn of {column} has no content, and its text under refusal: {turn['refusal'][:40]!r}"
        raise FormatError(problem, "Write the text under `content`, or remove the row.", code="data.wrong_type")
    message: Message = {"role": role, "content": "" if calls and content is None else read_content(content, column)}
    if calls and role != "assistant":
        problem = f"{column} has a tool call in a {name} turn"
        raise FormatError(problem, "Put tool calls in assistant turns.", code="data.invalid_tool_call")
    if calls:
        message["tool_calls"] = calls
    if reasoning := {key: turn[key] for key in REASONING_KEYS if turn.get(key)}:
        message["reasoning_content"] = _read_reasoning(reasoning, column)
    if not _carries_loss(turn, role, column):
        message[UNTRAINED] = True
    return message | {key: turn[key] for key in _COPIED_KEYS if turn.get(key) is not None}


def _read_reasoning(values: Mapping[str, Any], column: str) -> str:
    """Return the reasoning of a turn, which stands under one key, or under several the same. Raises FormatError."""
    texts = {
        key: read_text({f"{key} of a turn of {column}": value}, f"{key} of a turn of {column}")
        for key, value in values.items()
    }
    if len(set(texts.values())) > 1:
        problem = f"{column} has a turn with different texts under {' and '.join(texts)}"
        raise FormatError(problem, "Keep one of them.", code="data.reasoning_twice")
    return next(iter(texts.values()))


def _carries_loss(turn: Mapping[str, Any], role: str, column: str) -> bool:
    """Tell whether a turn may carry loss, from its own keys, as train or weight. Raises FormatError."""
    weights = {key: turn[key] for key in turn if key not in _KNOWN_KEYS and _is_loss_key(key) and turn[key] is not None}
    with_loss = {key: _read_loss(key, value, column) for key, value in weights.items()}
    for key, has_loss in with_loss.items():
        if has_loss and role != "assistant":
            problem = f"{column} has a {role} turn with {key}: {weights[key]!r}"
            raise FormatError(problem, f"Set `{key}` on assistant turns only.", code="data.invalid_turn_weight")
    if len(set(with_loss.values())) > 1:
        shown = " and ".join(f"{key}: {value!r}" for key, value in weights.items())
        problem = f"{column} has a turn with {shown}"
        raise FormatError(problem, "Remove one of the two.", code="data.invalid_turn_weight")
    return all(with_loss.values())


@functools.lru_cache(maxsize=1024)
def _is_loss_key(key: str) -> bool:
    """Tell whether a key of a turn says whether the turn carries loss."""
    return normalise(key) in {*_LOSS_KEYS, *_NO_LOSS_KEYS, *_MASK_KEYS}


def _read_loss(key: str, value: Any, column: str) -> bool:
    """Return whether a turn carries loss, by the value of one of its keys. Raises FormatError for other values."""
    problem = f"{column} has a turn with {key}: {value!r}"
    if normalise(key) in _MASK_KEYS and isinstance(value, bool):
        fix = "Write `loss: true` or `loss: false`: a mask can mean that the loss is there, or that it is hidden."
        raise FormatError(problem, fix, code="data.invalid_turn_weight")
    if value not in (0, 1):
        fix = "Write 0 or 1 (false or true): a turn carries all of its loss or none."
        raise FormatError(problem, fix, code="data.invalid_turn_weight")
    return bool(value) is not (normalise(key) in _NO_LOSS_KEYS)


def read_content(value: Any, column: str) -> str:
    """Return the text of a turn or a system prompt; parts of text become one. Raises FormatError for other parts."""
    if not isinstance(value, list):
        return read_text({f"a turn of {column}": value}, f"a turn of {column}")
    return "".join(_read_part(part, column) for part in value)


def _read_part(part: Any, column: str) -> str:
    """Return the text of one part of a turn. Raises FormatError."""
    if not isinstance(part, Mapping):
        problem = f"{column} has a turn whose content is a list with {str(part)[:40]!r}, which is not a part"
        fix = 'Write one text, or parts: [{"type": "text", "text": ...}].'
        raise FormatError(problem, fix, code="data.wrong_type")
    kind = part.get("type", "text" if "text" in part else None)
    if part.get("thought") is True:  # Gemini's
        kind = "thinking"
    if kind in _TEXT_PARTS:
        return read_text({f"a part of {column}": part.get("text")}, f"a part of {column}")
    if kind in _PART_PLACES:
        fix = f"Write it as {_PART_PLACES[kind]}, in the file or in `format: FILE.py:FUNCTION`."
        raise FormatError(f"{column} has a part of type {kind}", fix, code="data.unread_part")
    fix = "Remove the row, or keep only its text: this version trains on text alone."
    raise FormatError(f"{column} has a part of type {kind}", fix, code="data.media")


def _read_tool_calls(value: Any, column: str) -> list[dict[str, Any]]:
    """Return tool calls as {type, function: {name, arguments}}, arguments as a mapping. Raises FormatError."""
    value = _parse_json(value, column)
    calls = []
    for item in value if isinstance(value, list) else [value]:
        call = _parse_json(item, column)
        function = call.get("function") or call if isinstance(call, Mapping) else {}
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            problem = f"{column} has a tool call without the name of a function: {str(item)[:40]!r}"
            raise FormatError(
                problem, "Write the call as {name: ..., arguments: {...}}.", code="data.invalid_tool_call"
            )
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str) and arguments.strip():
            arguments = _parse_json(arguments, column)
        if not isinstance(arguments, Mapping):
            problem = f"{column} has a tool call with arguments {str(function['arguments'])[:40]!r}"
            raise FormatError(
                problem,
                "Write the arguments as a mapping, or as JSON text of a mapping.",
                code="data.invalid_tool_call",
            )
        identifier = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        entry = {"type": "function", **identifier, "function": {"name": function["name"], "arguments": arguments}}
        calls.append(entry)
    return calls


def _place_reasoning(message: Message, template_features: Collection[str], as_text: set[str]) -> None:
    """Put the reasoning of a message under the key that the template reads, or before the answer."""
    reasoning = message.pop("reasoning_content")
    for key in REASONING_KEYS:
        if key in template_features:
            message[key] = reasoning
            return
    as_text.add("reasoning")
    message["content"] = f"<think>\n{reasoning}\n</think>\n\n{message['content']}"


def _add_to_system_prompt(messages: list[Message], content: str, *, has_system_role: bool) -> None:
    """Add a text to the system prompt, or to the first turn if the template renders no system prompt."""
    first = messages[0]
    if first["role"] == "system":
        first["content"] = f"{first['content']}\n\n{content}"
    elif has_system_role:
        messages.insert(0, {"role": "system", "content": content})
    else:
        first["content"] = f"{content}\n\n{first['content']}"


def _parse_json(value: Any, column: str) -> Any:
    """Return the value of a text of JSON, and any other value as it is. Raises FormatError."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise FormatError(
            f"{column} has {value[:40]!r}, which is not JSON", "Write valid JSON.", code="data.invalid_json"
        ) from None


_to_json: Callable[[Any], str] = json.JSONEncoder(ensure_ascii=False).encode
