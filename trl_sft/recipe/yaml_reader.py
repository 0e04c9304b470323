"""Reads one recipe strictly: YAML 1.2 values, line numbers, overrides, all faults at once.

Inputs: a YAML file, and overrides of the form `section.key=value`.
Outputs: a `Recipe`: plain values, with the place where each is written.
Not here: any knowledge of sections and keys (`build` has it); merge keys, tags, includes and `${ENV}`, so that the
file alone is the run.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from trl_sft import redaction
from trl_sft.errors import Edit, Fault, Place, RecipeError
from trl_sft.recipe import foreign_letters, recipe_file, secret_values, surrogates, yaml_scalars

Key = tuple[str | int, ...]  # ("data", "train", 0, "path")

_MAX_VALUES = 100_000  # of a recipe; aliases of aliases make millions of values from a few lines
_MAX_DEPTH = 100  # levels of values inside values
_SHOWN_DIGITS = 24  # of a number that is too large
_SHOWN_DEPTH = 2  # names of a key in the message about too many values
_MAX_OVERRIDE_DEPTH = 20  # parts of the key of an override
_MAX_SHOWN = 80  # characters of a value in a message
_LIST_INDEX = re.compile(r"[0-9]{1,9}")
_ENVIRONMENT_VARIABLE = re.compile(r"\$\{[A-Z_][A-Z0-9_]*\}")
_UNREADABLE = ("recipe.invalid_yaml", "recipe.too_deep", "recipe.anchor")  # faults that leave values out
_TYPE_NAMES = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "text",
    list: "list",
    dict: "mapping",
}


_OPENING = (
    *(yaml.BlockMappingStartToken, yaml.BlockSequenceStartToken),
    *(yaml.FlowMappingStartToken, yaml.FlowSequenceStartToken),
)
_CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


class _Loader(yaml.SafeLoader):
    """PyYAML's scanner and composer with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own declaration)


for _tag, _pattern, _first in yaml_scalars.CORE_SCHEMA:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


@dataclass(frozen=True)
class Recipe:
    """One recipe as written, with its overrides.

    Attributes:
        path: The file, absolute.
        text: The text of the file, without overrides.
        values: The plain values, with overrides.
        places: Key -> `recipe.yaml:12`, or the override as typed, in parentheses.
        overridden: Keys whose value is from the command line.
        arguments: The path and the overrides as typed; with them a command line repeats the run.

    """

    path: Path
    text: str
    values: dict[str, Any]
    places: dict[Key, str]
    overridden: frozenset[Key]
    arguments: tuple[str, ...]

    def where(self, key: Key) -> Place:
        """Return the place of a key, `recipe.yaml:12 train.pakking`; an absent key has the place of its parent."""
        parent = key
        while parent and parent not in self.places:
            parent = parent[:-1]
        return make_place(self.places.get(parent, self.path.name), key)

    def fault(self, key: Key, problem: str, fix: str, *, code: str, edits: tuple[Edit, ...] = ()) -> Fault:
        """Return a fault at the place of a key."""
        return Fault(self.where(key), problem, fix, code=code, edits=edits)

    def folder(self, key: Key) -> Path:
        """Return the folder to which a path under `key` is relative: the recipe's, or for an override the current."""
        is_override = any(key[:n] in self.overridden for n in range(1, len(key) + 1))
        return Path.cwd() if is_override else self.path.parent


def make_place(written: str, key: Key) -> Place:
    """Return the place of a key from the place where it is written: `recipe.yaml:12`, or an override in parentheses."""
    file, _, line = written.rpartition(":")
    text = f"{written} {_dotted(key)}".rstrip()
    if line.isdecimal() and not written.startswith("("):
        return Place(text, file=file, line=int(line), key=key)
    return Place(text, file="" if written.startswith("(") else written, key=key)


def _dotted(key: Key) -> str:
    return ".".join(map(str, key))


def describe_value(value: object) -> str:
    """Return a value with its type, for a message: `"fast" (text)`; without secrets."""
    if value is None:
        return "null"
    text = f'"{value}"' if isinstance(value, str) else format_value(value)
    text = redaction.redact_shapes(text)  # before it is cut: a part of a secret is not recognised
    if len(text) > _MAX_SHOWN:
        text = text[: _MAX_SHOWN - 3] + "..."
    foreign = foreign_letters.describe(value) if isinstance(value, str) else ""
    kind = _TYPE_NAMES.get(type(value), type(value).__name__)
    return text if isinstance(value, bool) else f"{text} ({kind}{foreign})"


def format_value(value: Any) -> str:
    """Return a value as YAML on one line; a YAML 1.2 reader reads the same value back."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{format_value(key)}: {format_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(format_value(item) for item in value) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: ".inf", -math.inf: "-.inf"}.get(value, ".nan")
    return json.dumps(value, ensure_ascii=False, default=str)  # default: importers show values of other types


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, and apply overrides as if they were typed in the file.

    Args:
        path: The YAML file.
        overrides: Texts of the form `section.key=value`, the value as YAML.

    Returns:
        The recipe as written.

    Raises:
        RecipeError: With every fault of the text.

    """
    recipe, faults = collect_faults(path, overrides)
    if faults:
        raise RecipeError(faults)
    return recipe


def collect_faults(
    path: str | Path, overrides: Sequence[str] = (), *, text: str | None = None
) -> tuple[Recipe, list[Fault]]:
    """Read a recipe as `read_recipe` does, and return the faults with which its values can still be checked.

    Args:
        path: The YAML file.
        overrides: Texts of the form `section.key=value`.
        text: The text in place of that of the file.

    Returns:
        The recipe; of a key that is written twice it has the last value. And keys that are written twice, tags,
        environment variables, wrong overrides.

    Raises:
        RecipeError: The text is no mapping, or is not valid YAML.

    """
    path = Path(path)
    text = recipe_file.read_text(path) if text is None else text
    redaction.register_text(text)
    redaction.register_arguments(overrides)
    faults: list[Fault] = []
    places: dict[Key, str] = {(): path.name}
    values = _parse(text, (), _Record(lambda line: f"{path.name}:{line + 1}", places, faults))
    if values is None and not faults:
        fix = "Write `model:`, `data:` and `train:`, or run `python -m trl_sft init MODEL DATA -o ANOTHER.yaml`."
        faults.append(Fault(path.name, "the file is empty", fix, code="recipe.empty"))
    elif not isinstance(values, dict) and not faults:
        problem = f"the recipe is {describe_value(values)}, not a mapping of sections"
        faults.append(
            Fault(f"{path.name}:1", problem, "Start with a section, for example `model:`.", code="recipe.not_a_mapping")
        )
    overridden: set[Key] = set()
    if isinstance(values, dict):
        for override in overrides:
            record = _Record(functools.partial(_override_place, override), places, faults)
            _apply_override(values, override, record=record, overridden=overridden)
    if not isinstance(values, dict) or any(fault.code in _UNREADABLE for fault in faults):
        raise RecipeError(faults)
    arguments = (str(path), *overrides)
    return Recipe(path.resolve(), text, values, places, frozenset(overridden), arguments), faults


def compose(text: str) -> yaml.Node | None:
    """Return the nodes of a YAML text, with their positions; None if it is empty. Raises yaml.YAMLError."""
    return yaml.compose(text, Loader=_Loader)


def mask_secrets(text: str) -> str:
    """Return the text of a recipe without its secrets."""
    try:
        node = compose(text)
    except (yaml.YAMLError, RecursionError):
        node = None
    return secret_values.mask(text, node)


def parse_values(text: str) -> Any:
    """Return the plain values of a YAML text, whatever its faults; of two equal keys the last one counts."""
    return _parse(text, (), _Record(str, {}, []))


def _override_place(override: str, _line: int) -> str:
    return f"({override})"


class _Record(NamedTuple):
    """The places and the faults that are collected while a text is read."""

    describe_line: Callable[[int], str]  # number of a line, from 0 -> its place in messages
    places: dict[Key, str]
    faults: list[Fault]

    def add(self, place: str, problem: str, fix: str, *, code: str) -> None:
        self.faults.append(Fault(place, problem, fix, code=code))


def _parse(text: str, key: Key, record: _Record) -> Any:
    """Return the plain values of a YAML text that belongs under `key`."""
    syntax = "Write `key: value`, indented with spaces."
    try:
        depth = 0
        for token in yaml.scan(text, Loader=_Loader):
            depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
            if depth > _MAX_DEPTH:
                problem = f"the values are nested more than {_MAX_DEPTH} levels deep"
                place = record.describe_line(token.start_mark.line)
                record.add(place, problem, "Nest the values less deeply.", code="recipe.too_deep")
                return None
            if isinstance(token, yaml.TagToken):
                problem = f"the tag !{token.value[1]} is not supported"
                record.add(
                    record.describe_line(token.start_mark.line),
                    problem,
                    "Remove the tag, and write the plain value.",
                    code="recipe.tag",
                )
        node = yaml.compose(text, Loader=_Loader)
        if node is None or _has_too_many_values(node, key, record):
            return None
        secret_values.register(node, text)
        value = _to_value(node, key, record=record, parents=())
        if any(redaction.is_secret_name(part) for part in key):  # an override
            redaction.register(value)
        return value
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        opened = getattr(error, "context_mark", None)
        if opened is not None and ("stream end" in problem or "end of stream" in problem):
            mark, syntax = opened, "Close the bracket or the quotation mark."
        elif opened is not None and problem.startswith("expected ',' or"):
            syntax = f"Close the bracket that opens in line {opened.line + 1}, or write a comma here."
        if "'\\t'" in problem:
            syntax = "Indent with spaces: YAML takes no tab there."
        # a character that YAML does not allow has a position, but no mark
        line = mark.line if mark else text.count("\n", 0, getattr(error, "position", 0))
        record.add(record.describe_line(line), f"this is not valid YAML: {problem}", syntax, code="recipe.invalid_yaml")
    return None


def _has_too_many_values(root: yaml.Node, key: Key, record: _Record) -> bool:
    """Tell whether a text has too many values, those of an alias counted each time; record the fault if so."""
    sizes: dict[int, int] = {}  # id of a node -> its values; 0 while it is counted, so that a circle ends

    def count(node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) not in sizes:
            sizes[id(node)] = 0
            inner = node.value if isinstance(node, yaml.SequenceNode) else itertools.chain.from_iterable(node.value)
            sizes[id(node)] = 1 + sum(map(count, inner))
        return sizes[id(node)]

    if count(root) <= _MAX_VALUES:
        return False
    node, names = root, [*key]
    while isinstance(node, yaml.MappingNode) and len(names) < _SHOWN_DEPTH:  # to the section and its key
        name, node = max(node.value, key=lambda pair: count(pair[1]))
        names.append(name.value if isinstance(name, yaml.ScalarNode) else "?")
    problem = f"the text has more than {_MAX_VALUES:,} values, those of an alias counted each time"
    place = f"{record.describe_line(node.start_mark.line)} {_dotted(tuple(names))}".rstrip()
    record.add(place, problem, "Write fewer values, without aliases of aliases.", code="recipe.too_deep")
    return True


def _to_value(node: yaml.Node, key: Key, *, record: _Record, parents: tuple[int, ...]) -> Any:
    """Return the plain value of a node; `parents` holds the ids of the nodes around it."""
    place = record.describe_line(node.start_mark.line)
    record.places.setdefault(key, place)
    if id(node) in parents:
        record.add(
            place, "the anchor contains itself", "Write the whole value here, without the anchor.", code="recipe.anchor"
        )
        return None
    parents = (*parents, id(node))
    if isinstance(node, yaml.ScalarNode):
        place = make_place(place, key)
        if "\0" in node.value and len(node.value) > 1:  # alone it may separate the columns of a file
            problem = "the text holds the character NUL, which no name and no path can have"
            record.add(place, problem, "Remove this character.", code="recipe.invalid_yaml")
        return _to_scalar(node, place, record)
    if isinstance(node, yaml.SequenceNode):
        return [
            _to_value(item, (*key, number), record=record, parents=parents) for number, item in enumerate(node.value)
        ]
    values: dict[Any, Any] = {}
    for name_node, value_node in node.value:
        place = record.describe_line(name_node.start_mark.line)
        if not isinstance(name_node, yaml.ScalarNode):
            record.add(
                place, "the key is a list or a mapping", "Write a plain word as the key.", code="recipe.invalid_yaml"
            )
            continue
        if name_node.value == "<<":
            record.add(
                place, "the merge key `<<` is not supported", "Write each key here, without `<<`.", code="recipe.anchor"
            )
            continue
        scalar = _to_scalar(name_node, place, record)
        name: int | str = surrogates.join_pairs(name_node.value)
        if type(scalar) is int:  # `max_memory: {0: 20GiB}`
            name = scalar
        name_key = (*key, name)
        first = record.places.get(name_key)
        record.places[name_key] = place
        value = _to_value(value_node, name_key, record=record, parents=parents)
        if name in values:
            problem = f"the key is written twice; the first is at {first}"
            edits = (Edit("remove", name_key),) if values[name] == value else ()
            where = make_place(place, name_key)
            record.faults.append(
                Fault(where, problem, "Remove one of the two.", code="recipe.duplicate_key", edits=edits)
            )
        values[name] = value
    return values


def _to_scalar(node: yaml.ScalarNode, place: str, record: _Record) -> Any:
    """Return a scalar by the rules of YAML 1.2."""
    text = surrogates.join_pairs(node.value)
    if surrogates.has_half(text):
        record.add(place, surrogates.PROBLEM, surrogates.FIX, code="recipe.invalid_yaml")
        text = text.encode("utf-8", "replace").decode()
    if _ENVIRONMENT_VARIABLE.search(text):
        problem = f"{text}: a recipe does not read environment variables"
        fix = "Write the value itself, or set it on the command line: section.key=value."
        record.add(place, problem, fix, code="recipe.environment_variable")
    if node.style is not None:
        return text
    kind = node.tag.rsplit(":", 1)[-1]
    try:
        value = yaml_scalars.convert(kind, text)
    except ValueError:  # a tag that does not fit, `!!int x`: the tag is a fault already
        return text
    if value is text and kind in ("int", "float"):
        problem = f"no number of 64 bits holds {_shorten_number(redaction.redact(text))}"
        fix = "Write a number that is less extreme. A text of digits needs quotation marks."
        record.add(place, problem, fix, code="recipe.number_out_of_range")
    return value


def _shorten_number(text: str) -> str:
    """Return the first digits of a number, and how many there are."""
    return text if len(text) <= _SHOWN_DIGITS else f"{text[:_SHOWN_DIGITS]}... ({len(text):,} characters)"


def _apply_override(values: dict[str, Any], override: str, *, record: _Record, overridden: set[Key]) -> None:
    """Put the value of one `section.key=value` into the values."""
    place = record.describe_line(0)
    dotted, equals, text = override.partition("=")
    key: Key = tuple(int(part) if _LIST_INDEX.fullmatch(part) else part for part in dotted.split("."))
    if equals and not text.strip():
        record.add(
            place,
            "the value is empty",
            f"Write a value, or `{dotted}=null` to remove the key.",
            code="recipe.invalid_override",
        )
        return
    if not equals or "" in key or len(key) > _MAX_OVERRIDE_DEPTH:
        record.add(
            place,
            "this is not an override",
            "Write section.key=value, for example train.max_steps=10.",
            code="recipe.invalid_override",
        )
        return
    if _contradicts_earlier(key, place, record=record, overridden=overridden):
        return
    parent = _find_parent(values, key, record=record, overridden=overridden)
    if parent is None:
        return
    for old in [old for old in record.places if old[: len(key)] == key]:
        del record.places[old]
    parent[key[-1]] = _parse(text, key, record)
    record.places[key] = place
    overridden.add(key)


def _contradicts_earlier(key: Key, place: str, *, record: _Record, overridden: set[Key]) -> bool:
    """Tell whether an override would remove the value of an earlier override; record the fault if so."""
    earlier = min((old for old in overridden if old[: len(key)] == key), key=str, default=None)
    if earlier is None:
        return False
    if earlier == key:
        record.add(place, "the command line sets this key twice", "Remove one of the two.", code="recipe.duplicate_key")
    else:
        problem = f"this override removes {_dotted(earlier)}, which an earlier override sets"
        record.add(
            place, problem, "Remove one of the two, or put this one first.", code="recipe.contradicting_overrides"
        )
    return True


def _find_parent(values: dict[str, Any], key: Key, *, record: _Record, overridden: set[Key]) -> Any:
    """Return the mapping or list that contains a key, and create missing mappings; None if it cannot exist."""
    place = record.describe_line(0)
    target: Any = values
    for n, part in enumerate(key[:-1], 1):
        if isinstance(target, dict) and target.get(part) is None:
            if key[:n] in overridden:
                problem = f"an earlier override sets {_dotted(key[:n])} to null"
                record.add(place, problem, "Remove one of the two overrides.", code="recipe.contradicting_overrides")
                return None
            target[part] = {}
            record.places[key[:n]] = place
        target = _get_item(target, part)
    if isinstance(target, dict) or _get_item(target, key[-1]) is not None:
        return target
    record.add(
        place,
        f"the recipe has no place {_dotted(key)}",
        _describe_possible_keys(values, key),
        code="recipe.invalid_override",
    )
    return None


def _get_item(target: Any, part: str | int) -> Any:
    """Return a value of a mapping or a list; None if there is none."""
    if isinstance(target, dict):
        return target.get(part)
    return target[part] if isinstance(target, list) and isinstance(part, int) and part < len(target) else None


def _describe_possible_keys(values: Any, key: Key) -> str:
    """Return the instruction for an override whose place does not exist."""
    for n, part in enumerate(key):
        inner = _get_item(values, part)
        if not isinstance(inner, dict | list):
            path = _dotted(key[: n + 1])
            if n + 1 < len(key) and inner is not None:
                return f"{path} is {describe_value(inner)}. Replace the whole value: {path}={{...}}."
            names: Iterable[Any] = values if isinstance(values, dict) else range(len(values))
            places = [_dotted((*key[:n], name)) for name in names]
            if not places:
                return f"Set the whole list or mapping: {_dotted(key[:n])}=VALUE."
            return f"Use {places[0]}." if len(places) == 1 else f"Use one of {', '.join(places)}."
        values = inner
    return "Use a key that the recipe has."
