"""Reads one recipe strictly: YAML 1.2 values, line numbers, overrides, all faults at once.

In: a YAML file and `section.key=value` words. Out: a `Recipe`, plain values beside the place where
each was written. Deliberately absent: any knowledge of sections and keys (`schema` has it), merge
keys, tags, includes and `${ENV}`, so that the file alone is the run.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from trl_sft.errors import Fault, RecipeError

Key = tuple[str | int, ...]  # ("data", "train", 0, "path")

# https://yaml.org/spec/1.2.2/#103-core-schema. PyYAML reads YAML 1.1, where 2e-5 is text and `no` is false.
_CORE = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)
_MOST_VALUES, _MOST_CHARACTERS = 100_000, 2**20  # of a recipe; aliases of aliases make millions of a few lines
_MOST_DIGITS = 400  # what a float holds has 309; Python refuses to read some thousands
_ENV = re.compile(r"\$\{[A-Z_][A-Z0-9_]*\}")
_KINDS = {bool: "yes/no", int: "whole number", float: "number", str: "text", list: "list", dict: "mapping"}


class _Loader(yaml.SafeLoader):
    """PyYAML's scanner and composer with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own declaration)


for _tag, _pattern, _first in _CORE:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


@dataclass(frozen=True)
class Recipe:
    """One recipe as written: values, and where each stands."""

    path: Path
    text: str
    values: dict[str, Any]
    places: dict[Key, str]  # key -> `recipe.yaml:12`, or the override as typed
    overridden: frozenset[Key]  # keys whose value came from the command line
    arguments: tuple[str, ...]  # path and overrides as typed: the command line that runs it again

    def where(self, key: Key) -> str:
        """Return `recipe.yaml:12 train.pakking`; a key that is absent takes its parent's place."""
        known = next((key[:n] for n in range(len(key), -1, -1) if key[:n] in self.places), ())
        return f"{self.places.get(known, self.path.name)} {_path(key)}".rstrip()

    def folder(self, key: Key) -> Path:
        """Return the folder that a path under `key` is relative to: the recipe's, or the current one."""
        typed = any(key[:n] in self.overridden for n in range(1, len(key) + 1))
        return Path.cwd() if typed else self.path.parent


def _path(key: Key) -> str:
    return ".".join(map(str, key))


def describe_value(value: object) -> str:
    """Return a value as a person would name it: `"fast" (text)`."""
    if value is None:
        return "nothing (null)"
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({_KINDS.get(type(value), type(value).__name__)})"


def format_value(value: Any) -> str:
    """Return a value on one line, so that a YAML 1.2 reader gets the same value back."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{format_value(k)}: {format_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(format_value(v) for v in value) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: ".inf", -math.inf: "-.inf"}.get(value, ".nan")
    return json.dumps(value, ensure_ascii=False)


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides as if typed in the file.

    Raises RecipeError with every fault of the text at once; a fault of syntax stands alone.
    """
    path = Path(path)
    text = _text(path)
    faults: list[Fault] = []
    places: dict[Key, str] = {(): path.name}
    values = _parse(text, (), _Sheet(lambda line: f"{path.name}:{line + 1}", places, faults))
    if values is None and not faults:
        write = "sections; `python -m trl_sft init MODEL DATA -o ANOTHER.yaml` writes some"
        faults.append(Fault(path.name, "the file is empty", write))
    elif not isinstance(values, dict) and not faults:
        faults.append(
            Fault(f"{path.name}:1", f"the top is {describe_value(values)}", "sections at the top, as in `model:`")
        )
    overridden: set[Key] = set()
    if isinstance(values, dict):
        for word in overrides:
            _override(values, word, _Sheet(functools.partial(_typed, word), places, faults), overridden)
    if faults:
        raise RecipeError(faults)
    return Recipe(path.resolve(), text, values, places, frozenset(overridden), (str(path), *overrides))


def _typed(word: str, _line: int) -> str:
    return f"({word})"


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = ", ".join(sorted(p.name for p in path.parent.glob("*.yaml"))[:5]) or "none"
        write = f"the path of a recipe (*.yaml in that folder: {near}), or a command of --help"
        raise RecipeError(Fault(str(path), "no such file", write)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(Fault(str(path), f"cannot be read: {error}", "the path of a text file in UTF-8")) from None
    if len(text) > _MOST_CHARACTERS:
        raise RecipeError(Fault(str(path), f"a file of {len(text):,} characters", "the path of a recipe"))
    return text


class _Sheet(NamedTuple):
    """Where what is read is noted down."""

    at: Callable[[int], str]  # line, from 0
    places: dict[Key, str]
    faults: list[Fault]


def _parse(text: str, key: Key, sheet: _Sheet) -> Any:
    """Return the plain values of a YAML text whose top stands at `key`."""
    try:
        for token in yaml.scan(text, Loader=_Loader):
            if isinstance(token, yaml.TagToken):
                sheet.faults.append(
                    Fault(sheet.at(token.start_mark.line), f"a tag, !{token.value[1]}", "the plain value")
                )
        node = yaml.compose(text, Loader=_Loader)
        return None if node is None else _value(node, key, sheet, ())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        # a letter that YAML does not take has a position, and no mark
        line = mark.line if mark else text.count("\n", 0, getattr(error, "position", 0))
        sheet.faults.append(Fault(sheet.at(line), f"not YAML: {problem}", "`key: value`, indented with spaces"))
    except RecursionError:
        sheet.faults.append(Fault(sheet.at(0), "brackets within brackets, hundreds deep", "a recipe"))
    except OverflowError as error:
        sheet.faults.append(Fault(str(error), f"more than {_MOST_VALUES:,} values, by aliases of aliases", "a recipe"))
    return None


def _value(node: yaml.Node, key: Key, sheet: _Sheet, above: tuple[int, ...]) -> Any:
    """Return the plain value of a node; `above` holds the ids of the nodes around it."""
    place = sheet.at(node.start_mark.line)
    sheet.places.setdefault(key, place)
    if len(sheet.places) > _MOST_VALUES:
        raise OverflowError(f"{place} {_path(key[:2])}")
    if id(node) in above:
        sheet.faults.append(Fault(place, "an anchor that contains itself", "the value, written out"))
        return None
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*key, i), sheet, above) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, place, sheet)
    values: dict[Any, Any] = {}
    for head, body in node.value:
        place = sheet.at(head.start_mark.line)
        if not isinstance(head, yaml.ScalarNode) or head.value == "<<":
            found = "a merge key" if head.value == "<<" else "a key that is no word"
            sheet.faults.append(Fault(place, found, "one key a line, written out"))
            continue
        word = _scalar(head, place, sheet)
        word = word if type(word) is int else head.value
        if word in values:
            first = sheet.places[(*key, word)]
            path = _path((*key, word))
            sheet.faults.append(Fault(f"{place} {path}", f"written twice, first at {first}", "it once"))
        sheet.places[(*key, word)] = place
        values[word] = _value(body, (*key, word), sheet, above)
    return values


def _scalar(node: yaml.ScalarNode, place: str, sheet: _Sheet) -> Any:
    text: str = node.value
    if _ENV.search(text):
        write = "the value, or an override after the file"
        sheet.faults.append(Fault(place, f"{text}: the environment is not read", write))
    match node.tag.rsplit(":", 1)[-1] if node.style is None else "str":
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int" if len(text) < _MOST_DIGITS:
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        case "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _override(values: dict[str, Any], word: str, sheet: _Sheet, overridden: set[Key]) -> None:
    """Put one `section.key=value` into the values."""
    place = sheet.at(0)
    head, equals, text = word.partition("=")
    key: Key = tuple(int(part) if part.isascii() and part.isdecimal() else part for part in head.split("."))
    if equals and not text.strip():
        sheet.faults.append(Fault(place, "an empty value", f"{head}=null to take the key out, or a value"))
        return
    if not equals or "" in key:
        sheet.faults.append(Fault(place, "not an override", "section.key=value, as in train.max_steps=10"))
        return
    undone = min((old for old in overridden if old[: len(key)] == key), key=str, default=None)
    if undone is not None:
        found = "given twice on the command line" if undone == key else f"takes back {_path(undone)}, given before it"
        sheet.faults.append(Fault(place, found, "it once" if undone == key else "one of the two, or this one first"))
        return
    target: Any = values
    for n, part in enumerate(key[:-1], 1):
        if isinstance(target, dict) and target.get(part) is None:
            if key[:n] in overridden:
                sheet.faults.append(
                    Fault(place, f"inside {_path(key[:n])}, which is null just before", "one of the two")
                )
                return
            target[part] = {}
            sheet.places[key[:n]] = place
        target = _step(target, part)
    if not (isinstance(target, dict) or _step(target, key[-1]) is not None):
        sheet.faults.append(Fault(place, f"the recipe has no place {head}", _children(values, key)))
        return
    for old in [old for old in sheet.places if old[: len(key)] == key]:
        del sheet.places[old]
    target[key[-1]] = _parse(text, key, sheet)
    sheet.places[key] = place
    overridden.add(key)


def _step(target: Any, part: str | int) -> Any:
    if isinstance(target, dict):
        return target.get(part)
    return target[part] if isinstance(target, list) and isinstance(part, int) and part < len(target) else None


def _children(values: Any, key: Key) -> str:
    for n, part in enumerate(key):
        if not isinstance(_step(values, part), dict | list):
            head = _path(key[: n + 1])
            if n + 1 < len(key) and _step(values, part) is not None:
                return f"{head} whole, which is {describe_value(_step(values, part))}: {head}={{...}}"
            names: Iterable[Any] = values if isinstance(values, dict) else range(len(values))
            return f"one of {', '.join(map(str, names))} after {_path(key[:n]) or 'nothing'}"
        values = _step(values, part)
    return "the keys that the recipe has"
