"""The value that a wrong value surely stands for: a number in quotes, `yes`, one item without its list.

Inputs: a value, and the declaration of its key. Outputs: the value to write, and why it is the same. Not here: keys
(`suggested_keys`).
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from trl_sft.recipe import sections, yaml_scalars
from trl_sft.recipe.upstream import types
from trl_sft.recipe.upstream.fields import Field
from trl_sft.recipe.yaml_reader import format_value
from trl_sft.suggestions import is_misspelling

_YAML_1_1 = {"yes": True, "y": True, "on": True, "no": False, "n": False, "off": False}  # read as text by YAML 1.2
_NULLS = ("none", "null", "nil", "~")
_BITS = re.compile(r"(?:int)?([48])(?:[ -]?bits?)?")
_ASSIGNMENT = r"(\w+)\s*=\s*(\S+)"
_ASSIGNMENTS = re.compile(rf"{_ASSIGNMENT}(?:\s+{_ASSIGNMENT})*")  # keys written as in TOML or on a command line
_GROUPED = re.compile(r"[-+]?\d{1,3}(?:_\d{3})+")


class Correction(NamedTuple):
    """A value that means the same as a wrong one and that its key accepts."""

    value: Any
    fix: str  # the instruction, as a sentence
    is_same_word: bool = True  # False: the value was misspelt


def correct(field: Field, value: Any) -> Correction | None:
    """Return what a value of the wrong type surely stands for; None if somebody has to decide.

    Args:
        field: the declaration of the key.
        value: the value as read, which the key does not accept.

    """
    for candidate, fix in _list_candidates(value):
        if value is False and candidate not in types.list_choices(field):
            continue
        if types.accepts(field, candidate) and type(candidate) is not type(value):
            return Correction(candidate, fix.format(format_value(candidate)))
    meaning = sections.NUMBER_MEANINGS.get(field.name)
    if meaning and type(value) is int and value > 1:  # 1 may be `true`
        mapping = {meaning: value}
        return Correction(mapping, f"Write `{field.name}: {format_value(mapping)}`.")
    if types.accepts(field, [value]):
        return Correction([value], f"Write a list: {format_value([value])}.")
    if isinstance(value, str):
        choices = types.list_choices(field)
        lower = {choice.lower(): choice for choice in choices}.get(value.strip().lower())
        nearest = lower or types.suggest(value, choices)
        if nearest and (lower or is_misspelling(value, nearest, choices)) and types.accepts(field, nearest):
            return Correction(nearest, f"Did you mean `{nearest}`?", is_same_word=False)
    return None


def correct_section(name: str, value: Any) -> Correction | None:
    """Return the mapping that a section written as one word stands for; None if somebody has to decide."""
    text = str(value).strip().lower()
    if name == "quantization" and (bits := _BITS.fullmatch(text)):
        mapping: Any = {f"load_in_{bits[1]}bit": True}
    elif name == "lora" and value is True:
        mapping = {}
    elif name == "evaluate" and text in ("no", "off", "false", "none"):
        mapping = False
    elif isinstance(value, str) and _ASSIGNMENTS.fullmatch(value.strip()):
        pairs = re.findall(_ASSIGNMENT, value)
        mapping = {word: yaml_scalars.read(scalar) for word, scalar in pairs}
    else:
        return None
    return Correction(mapping, f"Write `{name}: {format_value(mapping)}`.")


def _list_candidates(value: Any) -> list[tuple[Any, str]]:
    """Return values that may be meant, each with an instruction."""
    if value is False:
        return [("no", "Write {}.")]  # `no` is false for writers of YAML 1.1
    if isinstance(value, float) and value.is_integer():
        return [(int(value), "Write {}, a whole number.")]
    if isinstance(value, int) and not isinstance(value, bool):
        candidates: list[tuple[Any, str]] = [(bool(value), "Write {}.")] if value in (0, 1) else []
        return [*candidates, (str(value), "Write {}, with quotes.")]
    text = value.strip() if isinstance(value, str) else ""
    if not text:
        return []
    return _list_readings(value, text)


def _list_readings(value: str, text: str) -> list[tuple[Any, str]]:
    """Return what a text may stand for: a number, true or false, null."""
    candidates: list[tuple[Any, str]] = []
    scalar = yaml_scalars.read(text.replace("_", "") if _GROUPED.fullmatch(text) else text)
    if not isinstance(scalar, str):
        quoted = "Write {} without quotes." if text == value and "_" not in text else "Write {}."
        candidates.append((scalar, quoted))
    if isinstance(scalar, float) and scalar.is_integer():
        candidates.append((int(scalar), "Write {}, a whole number."))
    if text.lower() in _YAML_1_1:
        candidates.append((_YAML_1_1[text.lower()], "Write {}."))
    if text.lower() in _NULLS:
        candidates.append((None, "Write {}."))
    return candidates
