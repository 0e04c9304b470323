"""Checks of answers that have to be JSON: whether they are, whether they fit a schema, whether they equal a reference.

Inputs: a `CheckedAnswer`. Outputs: 1.0 or 0.0. A code fence around the whole answer is removed first; text before or
after the JSON makes an answer invalid, as it does for the program that reads it. Schemas are checked by the package
`jsonschema` of the extra `eval`. Not here: where a schema is read from (`requests`).
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any

from trl_sft.errors import DataError, Fault, first_line
from trl_sft.evaluation import eval_packages
from trl_sft.evaluation.checks.answer import CheckedAnswer

_FENCE = re.compile(r"\A```[A-Za-z0-9]*[ \t]*\r?\n(.*?)\r?\n?```\Z", re.DOTALL)
INVALID = object()  # stands for what is no JSON: None is JSON's null


def check_json(checked: CheckedAnswer) -> float:
    """Return 1 if the answer is JSON."""
    return float(read_json(checked.answer) is not INVALID)


def check_json_equal(checked: CheckedAnswer) -> float:
    """Return 1 if answer and reference are the same JSON value; the order of keys does not count."""
    value, expected = read_json(checked.answer), read_json(checked.reference)
    return float(value is not INVALID and expected is not INVALID and _are_equal(value, expected))


def check_json_schema(checked: CheckedAnswer) -> float:
    """Return 1 if the answer is JSON and fits the schema of the parameters. Raises DataError, MissingPackage."""
    value = read_json(checked.answer)
    validator = build_validator(json.dumps(checked.parameters, sort_keys=True))
    try:
        return float(value is not INVALID and validator.is_valid(value))
    except Exception as error:  # a reference to another file, or one without end
        fix = "Write a schema without references to other files."
        raise DataError(Fault("the schema", first_line(error), fix, code="evaluation.bad_check")) from None


@functools.cache
def build_validator(schema_text: str) -> Any:
    """Return the validator of a JSON Schema, written as JSON. Raises DataError, MissingPackage."""
    eval_packages.require_packages("the check json_schema", "jsonschema")
    import jsonschema

    schema = json.loads(schema_text)
    try:
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        kind.check_schema(schema)
    except Exception as error:
        fix = "Correct the schema: https://json-schema.org."
        raise DataError(Fault("the schema", first_line(error), fix, code="evaluation.bad_check")) from None
    return kind(schema)


def read_json(text: str, *, refuses_double_keys: bool = False) -> Any:
    """Return the JSON value of a text, a code fence around it removed; `INVALID` where it is none.

    Args:
        text: of any form.
        refuses_double_keys: whether a key that an object has twice makes it invalid; else the last one counts.

    """
    text = text.strip()
    fenced = _FENCE.match(text)
    build = _build_object if refuses_double_keys else None
    try:
        return json.loads(fenced[1] if fenced else text, parse_constant=_refuse_constant, object_pairs_hook=build)
    except (ValueError, RecursionError):
        return INVALID


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of keys and values. Raises ValueError if a key occurs twice."""
    built = dict(pairs)
    if len(built) < len(pairs):
        raise ValueError("a key occurs twice")
    return built


def _are_equal(value: Any, expected: Any) -> bool:
    """Tell whether two JSON values are equal; Python's own comparison takes `true` for 1."""
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(_are_equal(value[key], expected[key]) for key in value)
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(_are_equal, value, expected))
    return bool(value == expected)


def _refuse_constant(name: str) -> None:
    """Refuse NaN and infinity, which Python's reader takes and JSON has not."""
    raise ValueError(name)
