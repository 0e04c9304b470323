"""Numbers with a decimal comma inside braces: YAML reads `{learning_rate: 2,5e-5}` as two keys.

Inputs: two neighbouring entries of a mapping. Outputs: the fault, with the number as it should be written. Not here:
numbers with a comma on a line of their own, which YAML reads as text (`corrections`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from trl_sft.errors import Edit, Fault
from trl_sft.recipe.yaml_reader import Key, Recipe

_DIGITS = re.compile(r"\d+(?:[eE][+-]?\d+)?")
_THOUSANDS = 3  # digits after a comma that may separate thousands


def find_number(recipe: Recipe, key: Key) -> str:
    """Return the name of the number before the comma, where a key without a value is what stands after it.

    Args:
        recipe: the recipe.
        key: the key that may be the rest of a number.

    Returns:
        The last part of the key before it; "" = the key is no rest of a number.

    """
    values = _get_value(recipe, key[:-1])
    words = list(values) if isinstance(values, Mapping) else []
    place = words.index(key[-1]) if key[-1] in words else 0
    if place == 0 or values[key[-1]] is not None or _DIGITS.fullmatch(str(key[-1])) is None:
        return ""
    previous = values[words[place - 1]]
    return str(words[place - 1]) if isinstance(previous, int) and not isinstance(previous, bool) else ""


def explain(recipe: Recipe, key: Key, *, rest: Key) -> Fault:
    """Return the fault of a number that a comma splits.

    Args:
        recipe: the recipe.
        key: the key that has the digits before the comma.
        rest: the key that YAML made of the digits after it.

    """
    name, before = str(key[-1]), _get_value(recipe, key)
    written = re.search(rf"\b{re.escape(name)}\s*:\s*{before}\s*,\s*([\w+-]+)", recipe.text)
    after = written[1] if written else str(rest[-1])
    problem = f"`{name}: {before},{after}` is read as two entries, because a comma inside braces separates them"
    number = f"{before}.{after}"
    if len(after) == _THOUSANDS and after.isdecimal():
        fix = f"Write `{name}: {before}{after}`, or `{name}: {number}` if the comma is a decimal point."
        return recipe.fault(key, problem, fix, code="recipe.wrong_type")
    # a key that YAML reads as a number (`05` is 5) cannot be found in the file by its name
    edits = (Edit("set", key, float(number)), Edit("remove", rest)) if isinstance(rest[-1], str) else ()
    return recipe.fault(key, problem, f"Write `{name}: {number}`.", code="recipe.wrong_type", edits=edits)


def _get_value(recipe: Recipe, key: Key) -> Any:
    """Return the value of a key of a recipe."""
    value: Any = recipe.values
    for part in key:
        value = value[part]
    return value
