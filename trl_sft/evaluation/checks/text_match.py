"""Checks that compare an answer with its reference as text, and counts of words that know Chinese.

Inputs: a `CheckedAnswer`. Outputs: 1.0 or 0.0. A pattern of the user has five seconds; the package `regex` keeps that
limit. Not here: numbers (`number_match`), and shares of overlap (`overlap`).
"""

from __future__ import annotations

import functools
import re
import sys
import unicodedata

import regex

from trl_sft.errors import DataError, Fault
from trl_sft.evaluation.checks.answer import CheckedAnswer

_PATTERN_SECONDS = 5.0
# Punctuation, spaces, control and format characters: Unicode categories. Symbols (`+`, `=`, `$`) count.
_IGNORED_CATEGORIES = ("Pc", "Pd", "Pe", "Pf", "Pi", "Po", "Ps", "Zs", "Zl", "Zp", "Cc", "Cf")
_SIGN_IN_NUMBER = re.compile(r"[-−*/%.](?=\d)|(?<=\d)[,:](?=\d)")
_PRIVATE_USE = 0xE000  # signs of numbers stand there while punctuation is removed
# Characters that are words: Han, kana and Hangul syllables. Chinese and Japanese have no spaces between words.
_IDEOGRAPHS = r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3040-\u30ff\U00020000-\U0003134f"
IDEOGRAPH = re.compile(f"[{_IDEOGRAPHS}]")
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W_{_IDEOGRAPHS}]+(?:['’.,-][^\W_{_IDEOGRAPHS}]+)*")


def check_exact(checked: CheckedAnswer) -> float:
    """Return 1 if answer and reference are equal apart from whitespace at their ends."""
    return float(checked.answer.strip() == checked.reference.strip())


def check_normalised(checked: CheckedAnswer) -> float:
    """Return 1 if answer and reference are equal apart from case, width, spaces and punctuation."""
    return float(normalise(checked.answer) == normalise(checked.reference))


def check_contains(checked: CheckedAnswer) -> float:
    """Return 1 if the answer has the expected text (of the parameters, or the reference), both normalised."""
    expected = checked.reference if checked.parameters is None else checked.parameters
    texts = [expected] if isinstance(expected, str) else expected
    answer = normalise(checked.answer)
    return float(all(normalise(str(text)) in answer for text in texts))


def check_regex(checked: CheckedAnswer) -> float:
    """Return 1 if the pattern of the parameters occurs in the answer. Raises DataError for a pattern that is slow."""
    pattern = checked.parameters
    try:
        return float(compile_pattern(pattern).search(checked.answer, timeout=_PATTERN_SECONDS) is not None)
    except TimeoutError:
        problem = (
            f"the pattern takes more than {_PATTERN_SECONDS:.0f} s on an answer of {len(checked.answer):,} characters"
        )
        fix = "Write a pattern without repeats inside repeats, such as (a+)+."
        raise DataError(Fault(f"regex {pattern!r}", problem, fix, code="evaluation.slow_pattern")) from None


@functools.cache
def compile_pattern(pattern: str) -> regex.Pattern[str]:
    """Return a compiled pattern. Raises DataError."""
    try:
        return regex.compile(pattern)
    except regex.error as error:
        fix = "Correct the pattern; it is one of Python's package `regex`."
        raise DataError(Fault(f"regex {pattern!r}", f"{error}", fix, code="evaluation.bad_check")) from None


def normalise(text: str) -> str:
    r"""Return a text without case, width, spaces and punctuation; signs and points of numbers stay.

    Example:
        >>> normalise("  The Answer: -1.5 \n") == normalise("the answer -1.5")
        True
        >>> normalise("-1") == normalise("1")
        False

    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    protected = _SIGN_IN_NUMBER.sub(lambda sign: chr(_PRIVATE_USE + ord(sign[0].replace("−", "-"))), folded)
    # a text of punctuation alone is compared as it is
    return protected.translate(_list_ignored_characters()) or "".join(folded.split())


def count_words(text: str) -> int:
    """Return the number of words; each Chinese or Japanese character counts as one."""
    return len(split_words(text))


def split_words(text: str) -> list[str]:
    """Return the words of a text; each Chinese or Japanese character is one."""
    return _WORD.findall(text)


def has_ideographs(text: str) -> bool:
    """Tell whether at least three of ten letters of a text are Chinese or Japanese characters."""
    letters = sum(letter.isalpha() for letter in text)
    return letters > 0 and len(IDEOGRAPH.findall(text)) >= 0.3 * letters


@functools.cache
def _list_ignored_characters() -> dict[int, None]:
    """Return the characters that `normalise` removes, as `str.translate` takes them."""
    return {code: None for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) in _IGNORED_CATEGORIES}
