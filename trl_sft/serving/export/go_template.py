"""Renders the part of Go's text/template that a Modelfile of ours is written in, as Ollama renders it.

Inputs: a template and the messages of a chat. Outputs: the prompt. Ollama hands the template `.System` (all system
messages) and `.Messages` (those of one role in a row are one message); see `template/template.go` of Ollama. What our
templates do not use is an error here: trim markers, pipes, functions but `eq`, `not`, `len` and `slice`. Deliberately
not here: how a template is found (`ollama_template`).
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

_ACTION = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_LAST = "eq (len (slice $.Messages $i)) 1"


class Branch(NamedTuple):
    """An `if` or a `range` with its body."""

    kind: str  # "if" or "range"
    condition: str  # of "if"
    body: list[Any]  # texts, actions and branches
    other: list[Any]  # after `else`


class Action(NamedTuple):
    """What stands between `{{` and `}}`, and writes something or sets a variable."""

    text: str


def write_literal(text: str) -> str:
    """Return a text so that a template in a Modelfile writes it exactly.

    Ollama drops characters of a Modelfile that Go does not call printable, and `{` could begin an action, so those are
    written as constants of Go.
    """
    parts = []
    for piece in re.split(r'(\{+|"{3,})', text):
        if piece.startswith("{") or piece.startswith('"""'):
            parts.append(f"{{{{ {json.dumps(piece)} }}}}")
        else:
            parts += [letter if is_printable(letter) else _write_constant(letter) for letter in piece]
    return "".join(parts)


def _write_constant(letter: str) -> str:
    """Return an action that writes one character by its number."""
    number = ord(letter)
    return f'{{{{ "\\u{number:04x}" }}}}' if number < 0x10000 else f'{{{{ "\\U{number:08x}" }}}}'


def is_printable(letter: str) -> bool:
    """Tell whether Ollama keeps a character of a Modelfile: letters, marks, numbers, signs, space and line breaks."""
    return letter in " \t\n" or unicodedata.category(letter)[0] in "LMNPS"


def render(template: str, messages: Sequence[dict[str, str]]) -> str:
    """Return the prompt that Ollama makes of the messages of a chat.

    Args:
        template: In the language of `ollama_template`.
        messages: With `role` and `content`.

    Raises:
        ValueError: The template uses something else of Go's language.

    """
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    collated: list[dict[str, str]] = []
    for message in messages:
        if collated and collated[-1]["role"] == message["role"]:
            collated[-1]["content"] += "\n\n" + message["content"]
        else:
            collated.append(dict(message))
    nodes, rest = _parse(_split(template), 0)
    if rest != len(_split(template)):
        raise ValueError("an `end` or `else` without its beginning")
    return _execute(nodes, {"System": system, "Messages": collated})


def _split(template: str) -> list[str | Action]:
    """Return texts and actions in turn."""
    parts: list[str | Action] = []
    place = 0
    for match in _ACTION.finditer(template):
        parts += [template[place : match.start()], Action(match[1].strip())]
        place = match.end()
    parts.append(template[place:])
    if any("{{" in part for part in parts if isinstance(part, str)):
        raise ValueError("an action without its end")
    return parts


def _parse(parts: list[str | Action], place: int) -> tuple[list[Any], int]:
    """Return the nodes from a place up to `end` or `else`, and the place of that."""
    nodes: list[Any] = []
    while place < len(parts):
        part = parts[place]
        if isinstance(part, str):
            nodes.append(part)
        elif part.text == "end" or part.text.startswith("else"):
            return nodes, place
        elif part.text.startswith(("if ", "range ")):
            branch, place = _parse_branch(parts, place)
            nodes.append(branch)
        else:
            nodes.append(part)
        place += 1
    return nodes, place


def _parse_branch(parts: list[str | Action], place: int) -> tuple[Branch, int]:
    """Return the branch that begins at a place, and the place of its `end`."""
    part = parts[place]
    assert isinstance(part, Action)
    kind, _, condition = part.text.removeprefix("else ").partition(" ")
    if kind == "range" and condition != "$i, $m := .Messages":
        raise ValueError(f"a range of {condition}")
    body, place = _parse(parts, place + 1)
    other: list[Any] = []
    end = parts[place] if place < len(parts) else None
    if isinstance(end, Action) and end.text == "else":
        other, place = _parse(parts, place + 1)
    elif isinstance(end, Action) and end.text.startswith("else if "):
        branch, place = _parse_branch(parts, place)
        return Branch(kind, condition, body, [branch]), place
    end = parts[place] if place < len(parts) else None
    if end != Action("end"):
        raise ValueError(f"`{kind}` without its `end`")
    return Branch(kind, condition, body, other), place


def _execute(nodes: list[Any], values: dict[str, Any]) -> str:
    """Return what nodes write."""
    written = []
    for node in nodes:
        if isinstance(node, str):
            written.append(node)
        elif isinstance(node, Action):
            if node.text == f"$last := {_LAST}":
                values["$last"] = values["$i"] == len(values["Messages"]) - 1
            else:
                written.append(str(_evaluate(node.text, values)))
        elif node.kind == "if":
            written.append(_execute(node.body if _evaluate(node.condition, values) else node.other, values))
        else:
            for number, message in enumerate(values["Messages"]):
                written.append(_execute(node.body, values | {"$i": number, "$m": message}))
    return "".join(written)


def _evaluate(text: str, values: dict[str, Any]) -> Any:
    """Return the value of an expression. Raises ValueError if it is not one of ours."""
    if _STRING.fullmatch(text):
        escaped = re.sub(r"\\U([0-9a-f]{8})", lambda match: chr(int(match[1], 16)), text)
        return json.loads(escaped)
    if text == ".System":
        return values["System"]
    if text in ("$m.Role", "$m.Content"):
        return values["$m"][text[3:].lower()]
    if text == "$last":
        return values["$last"]
    if text.startswith("not "):
        return not _evaluate(text[4:], values)
    if match := re.fullmatch(r"eq (\$m\.Role) (\"\w+\")", text):
        return _evaluate(match[1], values) == _evaluate(match[2], values)
    raise ValueError(f"the action {text}")
