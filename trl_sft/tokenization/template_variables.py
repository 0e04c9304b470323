"""The variables that a chat template reads, and the values that its text compares them with.

Input: the source of a template, which is parsed and not run. Outputs: the names that it reads and does not set; for
those that are about thinking the values that are worth a trial. `reasoning_effort` has words, `thinking_budget`
numbers, `enable_thinking` is true or false. Not here: what a value changes (`thinking`, `template_advice`).
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

SwitchValue = bool | str | int

_SWITCH = re.compile(r"think|thought|reason|effort", re.IGNORECASE)
_EFFORT = re.compile(r"effort|strength|level", re.IGNORECASE)
_EFFORT_WORDS = ("low", "medium", "high")  # OpenAI's; templates such as gpt-oss' write the word and list none
_LARGE_NUMBER = 512  # tokens of a thought, tried where a template compares a number with 0 and -1 alone
_MAX_VALUES = 6  # of a variable


class _GenerationTag(Extension):
    """Parses `{% generation %}`, which transformers adds to Jinja."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Return the nodes inside of the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def list_variables(source: str) -> frozenset[str]:
    """Return the names that a template reads and does not set; none where it is not valid Jinja."""
    tree = _parse(source)
    return frozenset() if tree is None else frozenset(meta.find_undeclared_variables(tree))


@functools.lru_cache(maxsize=64)
def list_switches(source: str) -> Mapping[str, tuple[SwitchValue, ...]]:
    """Return the variables of a template that are about thinking, each with the values that are worth a trial.

    Args:
        source: the template.

    Returns:
        The name of each variable -> true and false, or the words and numbers that the template compares it with.

    """
    tree = _parse(source)
    names = sorted(name for name in list_variables(source) if _SWITCH.search(name))
    return MappingProxyType({name: _list_values(tree, name) for name in names} if tree else {})


def _parse(source: str) -> nodes.Template | None:
    """Return the syntax tree of a template; None where it is not valid Jinja."""
    environment = jinja2.Environment(extensions=[_GenerationTag, "jinja2.ext.loopcontrols"])  # it is parsed only
    with contextlib.suppress(jinja2.TemplateSyntaxError, RecursionError):
        return environment.parse(source)
    return None


def _list_values(tree: nodes.Template, name: str) -> tuple[SwitchValue, ...]:
    """Return the values of a variable that are worth a trial."""
    names = _list_aliases(tree, name)
    constants = dict.fromkeys(constant for node in tree.find_all(nodes.Node) for constant in _read(node, names))
    words = [value for value in constants if isinstance(value, str) and value]
    if words and _EFFORT.search(name):
        words += [word for word in _EFFORT_WORDS if word not in words]
    numbers = sorted(value for value in constants if isinstance(value, int) and not isinstance(value, bool))
    if numbers and max(numbers) <= 0:
        numbers.append(_LARGE_NUMBER)
    if words or numbers:
        values: list[SwitchValue] = [*words, *numbers]
        return tuple(values[:_MAX_VALUES])
    return (True, False)


def _list_aliases(tree: nodes.Template, name: str) -> set[str]:
    """Return a variable's name with the names that the template gives it: `{% set effort = effort | lower %}`."""
    names = {name}
    for _ in range(3):  # an alias of an alias of an alias
        for assignment in tree.find_all(nodes.Assign):
            if isinstance(assignment.target, nodes.Name) and _is_form_of(assignment.node, names):
                names.add(assignment.target.name)
    return names


def _is_form_of(node: nodes.Node | None, names: set[str]) -> bool:
    """Tell whether an expression is one of the variables: itself, its lower case, or a default in its place."""
    if isinstance(node, nodes.Name):
        return node.name in names
    if isinstance(node, nodes.Filter):
        return _is_form_of(node.node, names)
    if isinstance(node, nodes.CondExpr):
        return _is_form_of(node.expr1, names) or _is_form_of(node.expr2, names)
    if isinstance(node, nodes.Or):
        return _is_form_of(node.left, names) or _is_form_of(node.right, names)
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):  # effort.lower()
        return _is_form_of(node.node.node, names)
    return False


def _read(node: nodes.Node, names: set[str]) -> Iterator[SwitchValue]:
    """Yield the constants that a node compares one of the variables with, or gives it."""
    if isinstance(node, nodes.Compare):
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        if any(_is_form_of(side, names) for side in sides):
            for side in sides:
                yield from _list_constants(side)
    elif isinstance(node, nodes.Getitem) and isinstance(node.node, nodes.Dict) and _is_form_of(node.arg, names):
        for pair in node.node.items:
            yield from _list_constants(pair.key)
    elif isinstance(node, nodes.Assign) and isinstance(node.target, nodes.Name) and node.target.name in names:
        yield from _list_defaults(node.node)


def _list_defaults(node: nodes.Node | None) -> Iterator[SwitchValue]:
    """Yield the constants that an expression may be."""
    if isinstance(node, nodes.CondExpr):
        yield from _list_defaults(node.expr1)
        yield from _list_defaults(node.expr2)
    elif isinstance(node, nodes.Or):
        yield from _list_defaults(node.left)
        yield from _list_defaults(node.right)
    elif isinstance(node, nodes.Filter):
        for argument in node.args if node.name in ("default", "d") else []:
            yield from _list_defaults(argument)
        yield from _list_defaults(node.node)
    else:
        yield from _list_constants(node)


def _list_constants(node: nodes.Node | None) -> Iterator[SwitchValue]:
    """Yield a constant, or the constants of a list."""
    if isinstance(node, nodes.Neg) and isinstance(node.node, nodes.Const) and isinstance(node.node.value, int):
        yield -node.node.value
    elif isinstance(node, nodes.Const) and isinstance(node.value, bool | str | int):
        yield node.value
    elif isinstance(node, nodes.List | nodes.Tuple):
        for item in node.items:
            yield from _list_constants(item)
