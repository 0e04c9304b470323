"""The values of YAML 1.2 that a text without quotes has: null, true, numbers; and the numbers that no value can hold.

Inputs: a text, and its kind in the core schema. Outputs: a plain value. A number beyond 64 bits, and one that a float
would turn into infinity or zero, stays a text, so that nothing calculates with it. Not here: who reports such a
number (`yaml_reader`).
"""

from __future__ import annotations

import math
import re
from typing import Any

# https://yaml.org/spec/1.2.2/#103-core-schema. PyYAML reads YAML 1.1, where 2e-5 is text and `no` is false.
CORE_SCHEMA = (  # type, pattern, first characters
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)
MAX_INTEGER = 2**63 - 1  # torch, numpy and Arrow hold a whole number in 64 bits
_MAX_DIGITS = 400  # Python refuses to convert several thousand
_PATTERNS = [(kind, re.compile(pattern)) for kind, pattern, _ in CORE_SCHEMA]
_NOT_FINITE = re.compile(r"[-+]?\.(inf|nan)", re.IGNORECASE)


def read(text: str) -> Any:
    """Return the value that a text without quotes has in YAML 1.2."""
    for kind, pattern in _PATTERNS:
        if pattern.fullmatch(text):
            return convert(kind, text)
    return text


def convert(kind: str, text: str) -> Any:
    """Return the value of a text of a kind of `CORE_SCHEMA`; the text itself where no number can hold it."""
    match kind:
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int" if len(text) < _MAX_DIGITS:
            number = int(text, 0) if text[:2] in ("0o", "0x") else int(text)
            return number if abs(number) <= MAX_INTEGER else text
        case "float" if len(text) < _MAX_DIGITS:
            return _convert_float(text)
    return text


def _convert_float(text: str) -> float | str:
    """Return a floating-point number; its text where that would be infinite, or zero although it is not."""
    value = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if not math.isfinite(value):
        return value if _NOT_FINITE.fullmatch(text) else text
    is_zero = not re.search(r"[1-9]", re.split("[eE]", text)[0])
    return value if value or is_zero else text
