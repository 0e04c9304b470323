"""The secrets of a recipe: found by key and by shape however YAML spells them, and taken out of its text.

Inputs: the text of a recipe, and its YAML nodes. Outputs: secrets that `redaction` knows, and a text without them that
is a recipe still. Not here: what a secret looks like (`redaction`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import yaml

from trl_sft import redaction

_ANCHOR = re.compile(r"&\S+\s+")


class _Below(NamedTuple):
    """A node below a key."""

    node: yaml.Node
    key: str
    has_secret_key: bool


class _Scalar(NamedTuple):
    """A scalar of a recipe, and whether its key says that it is a secret."""

    node: yaml.ScalarNode
    key: str  # the nearest one
    has_secret_key: bool


def register(node: yaml.Node, text: str) -> None:
    """Make the secrets among the nodes of a YAML text known, each as its value and as the text writes it.

    Args:
        node: The root of the text.
        text: The text whose positions the nodes have.

    """
    for scalar in _iterate(node):
        secrets = _list_secrets(scalar)
        if not secrets:
            continue
        for secret in secrets:
            redaction.register(secret)
        written = text[scalar.node.start_mark.index : scalar.node.end_mark.index]
        if any(secret not in written for secret in secrets):
            for line in written.splitlines():
                redaction.register_line(_ANCHOR.sub("", line.strip(" \t\\"), count=1).strip("\"'"))


def mask(text: str, node: yaml.Node | None) -> str:
    """Return the text of a recipe without its secrets; it can be parsed still.

    Args:
        text: The text.
        node: Its root; None = it is no YAML.

    """
    spans = {}
    for scalar in _iterate(node) if node is not None else ():
        if _list_secrets(scalar):
            spans[scalar.node.start_mark.index] = scalar.node
    for start in sorted(spans, reverse=True):
        end = spans[start].end_mark.index
        written = text[start:end]
        anchor = _ANCHOR.match(written)
        line_break = "\n" if written.endswith("\n") else ""
        text = f"{text[:start]}{anchor[0] if anchor else ''}{redaction.REDACTED}{line_break}{text[end:]}"
    return redaction.redact(text)


def _list_secrets(scalar: _Scalar) -> list[str]:
    """Return the secrets in a scalar; one under a secret key is a secret as a whole."""
    value = scalar.node.value
    if scalar.has_secret_key:
        is_word = scalar.node.style is None and value.lower() in ("", "~", "null", "true", "false")
        return [] if is_word or value == redaction.REDACTED else [value]
    joined = "".join(value.split())
    return redaction.find_shapes(value, scalar.key) or redaction.find_shapes(joined, scalar.key)


def _iterate(root: yaml.Node) -> Iterator[_Scalar]:
    """Yield every scalar below a node once, keys too."""
    seen: set[tuple[int, bool]] = set()
    waiting = [_Below(root, "", False)]
    while waiting:
        node, key, is_secret = waiting.pop()
        if (id(node), is_secret) in seen:
            continue
        seen.add((id(node), is_secret))
        if isinstance(node, yaml.ScalarNode):
            yield _Scalar(node, key, is_secret)
        elif isinstance(node, yaml.SequenceNode):
            waiting += [_Below(item, key, is_secret) for item in node.value]
        elif isinstance(node, yaml.MappingNode):
            for name, value in node.value:
                waiting.append(_Below(name, "", False))
                word = name.value if isinstance(name, yaml.ScalarNode) else key
                inner = value.value if isinstance(value, yaml.ScalarNode) else None
                waiting.append(_Below(value, word, is_secret or redaction.is_secret_name(word, inner)))
