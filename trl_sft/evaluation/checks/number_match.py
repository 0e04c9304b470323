r"""The final number of an answer against that of its reference, as GSM8K is scored.

Inputs: a `CheckedAnswer`. Outputs: 1.0 or 0.0. The final number is the one after the last `####`, else the one in the
last `\boxed{}`, else the last number of the text. Source: the answers of https://github.com/openai/grade-school-math
end with `#### N`; the last number is `flexible-extract` of lm-eval's task gsm8k. Numbers are compared as fractions:
`1,000`, `1000.0` and `$1000` are equal. Not here: formulas and units.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from trl_sft.evaluation.checks.answer import CheckedAnswer

_MARK = "####"
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_TEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
# A minus after a digit, a letter or a bracket is a subtraction: 16-3. Commas group thousands: 1,234 or 1,23,456.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]])[-+](?=[$\d.]))?\$?(?P<digits>(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d{1,300})(?:\.\d{1,300})?|\.\d{1,300})"
    r"(?P<exponent>[eE][-+]?\d{1,3}(?!\d))?(?:\s?/\s?(?P<below>\d{1,300})(?![\d/]))?"
)


def check_number(checked: CheckedAnswer) -> float:
    """Return 1 if the final numbers of answer and reference are equal; 0 where the answer has none."""
    expected = find_final_number(checked.reference)
    return float(expected is not None and find_final_number(checked.answer) == expected)


def find_final_number(text: str) -> Fraction | None:
    r"""Return the number that a text ends with or marks as its result; None = it has none.

    Example:
        >>> find_final_number("She makes 9 * 2 = $18 every day.\n#### 18")
        Fraction(18, 1)

    """
    text = unicodedata.normalize("NFKC", text).replace("−", "-").replace("\u2044", "/")
    _, mark, marked = text.rpartition(_MARK)
    if mark and (number := _find_number(marked, first=True)) is not None:
        return number
    boxed = _BOXED.findall(text)
    if boxed and (number := _find_number(_TEX_FRACTION.sub(r"\1/\2", boxed[-1]), first=False)) is not None:
        return number
    return _find_number(text, first=False)


def _find_number(text: str, *, first: bool) -> Fraction | None:
    """Return the first or the last number of a text; None = it has none."""
    numbers = [number for match in _NUMBER.finditer(text) if (number := _read_match(match)) is not None]
    if not numbers:
        return None
    return numbers[0] if first else numbers[-1]


def _read_match(match: re.Match[str]) -> Fraction | None:
    """Return the value of a number; None = it divides by zero."""
    value = Fraction(match["digits"].replace(",", "") + (match["exponent"] or ""))
    if match["below"]:
        if int(match["below"]) == 0:
            return None
        value /= int(match["below"])
    return -value if match["sign"] == "-" else value
