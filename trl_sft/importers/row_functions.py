"""Writes functions that make rows as another trainer does, where no format and wording of a recipe says the same.

Input: a kind of function with its arguments, taken from the settings. Output: the text of a Python file beside the
recipe, `format: FILE.py:FUNCTION`. Deliberately not here: which settings need one (the modules of the tools).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from trl_sft.importers.settings import CompanionFile

_FILE = "{stem}_rows.py"

# A chat whose turns, keys or roles have other names, or whose turns say which of them carry loss.
_CHAT = '''
_KEYS_OF_A_TURN = ("name", "reasoning_content", "thinking", "tool_call_id", "tool_calls")


def read_chat(
    row, *, turns, keys, roles, system="", tools="", training="", drop_system=False, default_system="", skip=()
):
    """Return a chat; None = it has a turn of a role in `skip`, and is left out.

    `keys` maps the keys of a message to those of a turn, `roles` maps roles of the turns to those of a message,
    `training` names the key of a turn that says whether it carries loss, and `default_system` is the system prompt of
    a chat without one.
    """
    messages = []
    for turn in row[turns]:
        if turn.get(keys["role"]) in skip:
            return None
        message = {key: turn[key] for key in _KEYS_OF_A_TURN if turn.get(key) is not None}
        message.update({key: turn[name] for key, name in keys.items() if turn.get(name) is not None})
        message["role"] = roles.get(message["role"], message["role"])
        carries_loss = turn.get(training) if training else None
        if message["role"] == "assistant" and carries_loss is not None:
            message["train"] = bool(carries_loss)
        elif carries_loss:
            raise ValueError(f"a turn of the role {message['role']} carries loss, which only data.loss_on: all can say")
        messages.append(message)
    if row.get(system) and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": row[system]})
    if default_system and (not messages or messages[0]["role"] != "system"):
        messages.insert(0, {"role": "system", "content": default_system})
    if drop_system and messages and messages[0]["role"] == "system":
        del messages[0]
    return {"messages": messages, "tools": row.get(tools) or None}
'''

# A question with an input and an answer, as a chat: the two parts stand on lines of their own.
_QUESTION = '''
def read_question(row, *, prompt, query, response, system="", history=""):
    """Return a question and its answer as a chat, with a system prompt and earlier questions where a row has them."""
    messages = [{"role": "system", "content": row[system]}] if row.get(system) else []
    for question, answer in row.get(history) or []:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    question = "\\n".join(row[column] for column in (prompt, query) if row.get(column))
    messages.append({"role": "user", "content": question})
    return {"messages": [*messages, {"role": "assistant", "content": row[response]}]}
'''

# An instruction with or without an input, in a text of the tool or of the user.
_INSTRUCTION = '''
def read_instruction(row, *, columns, system, system_without_input, system_form, form, form_without_input):
    """Return an instruction and its answer as texts; `columns` has the columns of each part."""
    context = row.get(columns["input"]) or ""
    text = row.get(columns["system"]) or (system if context else system_without_input)
    prompt = system_form.format(system=text) if text else ""
    if context:
        prompt += form.format(instruction=row[columns["instruction"]], input=context)
    else:
        prompt += form_without_input.format(instruction=row[columns["instruction"]])
    return {"prompt": prompt, "completion": row[columns["output"]]}
'''

_CODE = {"read_chat": _CHAT, "read_question": _QUESTION, "read_instruction": _INSTRUCTION}


class RowFunction(NamedTuple):
    """A function of the file: a kind, with the arguments of one data set or of several."""

    kind: str  # a key of `_CODE`
    arguments: str  # as Python source


def add_function(functions: list[RowFunction], kind: str, **arguments: Any) -> str:
    """Return `format:` of a source whose rows a function makes; a function with the same arguments is shared.

    Args:
        functions: The functions of the file so far; takes a new one.
        kind: `read_chat`, `read_question` or `read_instruction`.
        arguments: The arguments of that kind.
    """
    lines = [f"        {name}={value!r}," for name, value in arguments.items()]
    function = RowFunction(kind, "\n".join(lines))
    if function not in functions:
        functions.append(function)
    return f"{_FILE}:rows_{functions.index(function) + 1}"


def make_file(functions: list[RowFunction], tool: str) -> CompanionFile:
    """Return the file with these functions."""
    text = f'"""Makes rows as {tool} does. `trl_sft import` wrote this file, and the recipe beside it calls it."""\n\n'
    text += "\n\n".join(_CODE[kind].removeprefix("\n") for kind in dict.fromkeys(item.kind for item in functions))
    for number, function in enumerate(functions, 1):
        text += f"\n\ndef rows_{number}(row):\n    return {function.kind}(\n        row,\n{function.arguments}\n    )\n"
    return CompanionFile(_FILE, text)
