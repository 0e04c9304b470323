"""Makes an edit in the text of a recipe; everything else keeps its comments, its order and its layout.

Inputs: the text of a recipe, and an `Edit` of a fault. Outputs: the new text, of which it was checked that it has the
old values but for this edit; or nothing, where the text is written so that the edit cannot be made in it (an alias).
Not here: which edits to make.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import yaml

from trl_sft.errors import Edit
from trl_sft.recipe import yaml_scalars
from trl_sft.recipe.yaml_reader import Key, compose, format_value, parse_values

_PLAIN = re.compile(r"[A-Za-z_][\w./-]*")
# Words that a reader of YAML 1.1 takes for true or false: they stay in quotes.
_YAML_1_1 = {"yes", "no", "on", "off", "y", "n", "true", "false", "null", "none"}
_INDENT = "  "


def apply(text: str, edit: Edit) -> str | None:
    """Return the text of a recipe after an edit.

    Args:
        text: The recipe.
        edit: What to set, rename or remove. Of a key that is written twice, the second one is meant.

    Returns:
        The new text; None if the edit cannot be made, or would change anything else.

    """
    try:
        root = compose(text)
        expected = _edit_values(parse_values(text), edit, is_double=_count(root, edit.key) > 1)
        changed = _change(text, root, edit)
        return changed if _simplify(parse_values(changed)) == _simplify(expected) else None
    except (yaml.YAMLError, LookupError, TypeError, ValueError, AttributeError):
        return None


def write_value(value: Any) -> str:
    """Return a value as YAML on one line, without quotes where every reader takes the word for text."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{write_value(name)}: {write_value(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(write_value, value)) + "]"
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _YAML_1_1:
        return value
    return format_value(value)


def _change(text: str, root: yaml.Node | None, edit: Edit) -> str:
    """Return the text after an edit. Raises LookupError if the key does not exist, ValueError."""
    if edit.action == "remove":
        return _remove(text, root, edit.key)
    if edit.action == "set":
        pair = _find_pair(root, edit.key)
        return _insert(text, edit.key, write_value(edit.value)) if pair is None else _set(text, pair, edit.value)
    if edit.action != "rename":
        raise ValueError(edit.action)
    pair = _find_pair(root, edit.key)
    if pair is None:
        raise LookupError(edit.key)
    name, value = pair
    if edit.key[:-1] == edit.new[:-1]:
        return text[: name.start_mark.index] + write_value(edit.new[-1]) + text[name.end_mark.index :]
    if _is_block(value):
        written = write_value(_get(parse_values(text), edit.key))
    else:
        written = text[value.start_mark.index : _end(value)]
    comment = _read_comment(text, _end(value))
    return _insert(_remove(text, root, edit.key), edit.new, written, comment=comment)


def _find_pair(root: yaml.Node | None, key: Key) -> tuple[yaml.Node, yaml.Node] | None:
    """Return the nodes of a key and of its value; None if it is not there. The last of two equal keys counts."""
    parent = _find(root, key[:-1])
    if isinstance(parent, yaml.SequenceNode):
        return parent, parent.value[int(key[-1])]
    pairs = parent.value if isinstance(parent, yaml.MappingNode) else []
    matching = [pair for pair in pairs if pair[0].value == str(key[-1])]
    return matching[-1] if matching else None


def _require_pair(root: yaml.Node | None, key: Key) -> tuple[yaml.Node, yaml.Node]:
    """Return the nodes of a key and of its value. Raises LookupError if it is not there."""
    pair = _find_pair(root, key)
    if pair is None:
        raise LookupError(key)
    return pair


def _find(root: yaml.Node | None, key: Key) -> yaml.Node | None:
    """Return the node of the value of a key; None if there is none."""
    if not key:
        return root
    pair = _find_pair(root, key)
    return pair[1] if pair else None


def _count(root: yaml.Node | None, key: Key) -> int:
    """Return how often a mapping has a key."""
    parent = _find(root, key[:-1])
    pairs = parent.value if isinstance(parent, yaml.MappingNode) else []
    return sum(pair[0].value == str(key[-1]) for pair in pairs)


def _is_block(node: yaml.Node) -> bool:
    """Tell whether a value is written over several lines by indentation."""
    if isinstance(node, yaml.CollectionNode):
        return not node.flow_style
    return isinstance(node, yaml.ScalarNode) and node.style in ("|", ">")


def _end(node: yaml.Node) -> int:
    """Return the position after the last character of a value; the marks of a block reach to the next token."""
    if not isinstance(node, yaml.CollectionNode) or node.flow_style or not node.value:
        return int(node.end_mark.index)
    last = node.value[-1]
    return _end(last[1] if isinstance(last, tuple) else last)


def _end_of_line(text: str, position: int) -> int:
    """Return the position of the line break at or after a position."""
    end = text.find("\n", position)
    return len(text) if end < 0 else end


def _read_comment(text: str, position: int) -> str:
    """Return the comment that ends a line, with the spaces before it; "" if there is none."""
    rest = text[position : _end_of_line(text, position)]
    return rest.rstrip() if rest.lstrip().startswith("#") else ""


def _set(text: str, pair: tuple[yaml.Node, yaml.Node], value: Any) -> str:
    """Return the text with another value of a key."""
    name, node = pair
    written = write_value(value)
    if isinstance(node, yaml.ScalarNode):
        if node.style in ("'", '"') and node.value.strip() and yaml_scalars.read(node.value.strip()) == value:
            written = node.value.strip()  # without its quotes, as the user wrote it: 2e-5
        if node.start_mark.index == node.end_mark.index:  # nothing stands after the colon
            colon = text.index(":", name.end_mark.index) + 1
            return f"{text[:colon]} {written}{text[colon:]}"
        end = node.end_mark.index
        if node.style in ("|", ">"):
            written += "\n"
        return text[: node.start_mark.index] + written + text[end:]
    start = node.start_mark.index
    if _is_block(node) and isinstance(name, yaml.ScalarNode):
        start = text.index(":", name.end_mark.index) + 1
        written = f" {written}"
    return text[:start] + written + text[_end(node) :]


def _remove(text: str, root: yaml.Node | None, key: Key) -> str:
    """Return the text without a key. Raises LookupError if it is not there."""
    parent, pair = _find(root, key[:-1]), _find_pair(root, key)
    if pair is None or not isinstance(parent, yaml.MappingNode):
        raise LookupError(key)
    index = next(number for number, other in enumerate(parent.value) if other[0] is pair[0])
    start, end = pair[0].start_mark.index, _end(pair[1])
    following = parent.value[index + 1][0].start_mark.index if index + 1 < len(parent.value) else None
    if parent.flow_style:
        if following is not None:
            return text[:start] + text[following:]
        start = _end(parent.value[index - 1][1]) if index else start
        return text[:start] + text[end:]
    if len(parent.value) == 1 and len(key) > 1:  # without a key it would be null, which may mean something else
        return _set(text, _require_pair(root, key[:-1]), {})
    line = text.rfind("\n", 0, start) + 1
    if text[line:start].strip():  # the first key of an item of a list: `- path: x`
        return text[:start] + text[following:]
    if isinstance(pair[1], yaml.ScalarNode) and pair[1].style in ("|", ">"):
        return text[:line] + text[end:]
    return text[:line] + text[min(len(text), _end_of_line(text, end) + 1) :]


def _insert(text: str, key: Key, written: str, *, comment: str = "") -> str:
    """Return the text with a new key at the end of its mapping; missing mappings are created."""
    root = compose(text)
    parent, entry = _find(root, key[:-1]), f"{write_value(key[-1])}: {written}"
    if len(key) == 1 and root is None:
        return f"{text.rstrip()}\n{entry}{comment}\n".lstrip("\n")
    if isinstance(parent, yaml.MappingNode) and parent.flow_style:
        position = _end(parent.value[-1][1]) if parent.value else parent.start_mark.index + 1
        return text[:position] + (", " if parent.value else "") + entry + text[position:]
    if isinstance(parent, yaml.MappingNode):
        first, last = parent.value[0][0], parent.value[-1][1]
        position = _end(last)
        if not (isinstance(last, yaml.ScalarNode) and last.style in ("|", ">")):
            position = _end_of_line(text, position)
        before = text[:position].rstrip("\n") if position == len(text) else text[:position].removesuffix("\n")
        return f"{before}\n{' ' * first.start_mark.column}{entry}{comment}\n{text[position:].removeprefix(chr(10))}"
    if parent is not None and not (isinstance(parent, yaml.ScalarNode) and not parent.value):
        raise ValueError(key)
    pair = _find_pair(root, key[:-1])
    if pair is not None and len(key) == 2:  # `train:` with nothing below it
        position = _end_of_line(text, pair[0].end_mark.index)
        return f"{text[:position]}\n{_INDENT}{entry}{comment}{text[position:]}"
    if pair is None and len(key) == 2:
        return f"{text.rstrip()}\n{key[0]}:\n{_INDENT}{entry}{comment}\n".lstrip("\n")
    return _insert(text, key[:-1], "{" + entry + "}", comment=comment)


def _get(values: Any, key: Key) -> Any:
    """Return the value at a key. Raises LookupError if there is none."""
    for part in key:
        values = values[part]
    return values


def _edit_values(values: Any, edit: Edit, *, is_double: bool) -> Any:
    """Return plain values after an edit, by which its text is checked. Raises LookupError."""
    values = {} if values is None else copy.deepcopy(values)
    if edit.action == "set":
        _put(values, edit.key, edit.value)
        return values
    parent = _get(values, edit.key[:-1])
    value = parent[edit.key[-1]] if is_double else parent.pop(edit.key[-1])
    if edit.action == "rename":
        _put(values, edit.new, value)
    return values


def _put(values: Any, key: Key, value: Any) -> None:
    """Put a value at a key, and create the mappings around it."""
    for part in key[:-1]:
        if isinstance(values, dict) and values.get(part) is None:
            values[part] = {}
        values = values[part]
    values[key[-1]] = value


def _simplify(value: Any) -> Any:
    """Return a value in which numbers have their type: 1 is not 1.0 or true."""
    if isinstance(value, dict):
        return {name: _simplify(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_simplify(inner) for inner in value]
    return (type(value).__name__, repr(value)) if value is not None else None
