"""Whether an answer follows instructions on its form that a program can check: length, words, language, layout.

Inputs: a `CheckedAnswer` whose parameters are a mapping from instruction to value. Outputs: 1.0 if all are followed,
else 0.0. The idea is that of IFEval (Zhou et al. 2023, https://arxiv.org/abs/2311.07911); instructions and code are
this project's own. Words are counted with each Chinese or Japanese character as one. Not here: whether an answer is
right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from trl_sft.evaluation.checks import json_answer, text_match
from trl_sft.evaluation.checks.answer import CheckedAnswer

_BULLET = re.compile(r"^\s*[-*•+]\s+\S", re.MULTILINE)
_NUMBERED = re.compile(r"^\s*\d{1,3}[.)、]\s*\S", re.MULTILINE)
_HEADING = re.compile(r"^#{1,6}\s+\S", re.MULTILINE)
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)|[。！？]+")
_PARAGRAPH_BREAK = re.compile(r"\n\s*\n")
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f]")


def check_instructions(checked: CheckedAnswer) -> float:
    """Return 1 if the answer follows every instruction of the parameters; an empty answer follows none."""
    answer = checked.answer.strip()
    return float(bool(answer) and all(INSTRUCTIONS[name](answer, value) for name, value in checked.parameters.items()))


def find_unusable(parameters: Any) -> str:
    """Return what is wrong with the parameters; "" = nothing."""
    if not isinstance(parameters, Mapping) or not parameters:
        return "the value is no mapping from an instruction to its value"
    for name, value in parameters.items():
        if name not in INSTRUCTIONS:
            return f"there is no instruction `{name}`; there are {', '.join(INSTRUCTIONS)}"
        expected = _VALUE_TYPES[name]
        if not isinstance(value, expected) or (isinstance(value, bool) and expected is int):
            return f"`{name}` is {value!r}"
        if name == "language" and value not in _LANGUAGES:
            return f"`language` is {value!r}; it can be {' or '.join(_LANGUAGES)}"
        texts = [value] if isinstance(value, str) else value if isinstance(value, list) else ["-"]
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            return f"`{name}` is {value!r}, which has no text"
    return ""


def _list_texts(value: str | list[str]) -> list[str]:
    """Return one or several texts as a list."""
    return [value] if isinstance(value, str) else value


def _contains(answer: str, text: str) -> bool:
    """Tell whether a text occurs, in any case; a word of letters counts only as a whole word."""
    pattern = re.escape(text.strip())
    if text.strip().isascii():
        pattern = rf"(?<![A-Za-z0-9_]){pattern}(?![A-Za-z0-9_])"
    return re.search(pattern, answer, re.IGNORECASE) is not None


def _is_language(answer: str, language: str) -> bool:
    """Tell whether most letters are of the script of a language."""
    han, latin = len(text_match.IDEOGRAPH.findall(answer)), len(_LATIN.findall(answer))
    return han > latin if language == "zh" else latin > han


def _count_sentences(answer: str) -> int:
    """Return the number of sentences; the rest after the last full stop counts as one."""
    return sum(any(letter.isalnum() for letter in part) for part in _SENTENCE_END.split(answer))


def _count_paragraphs(answer: str) -> int:
    """Return the number of blocks of text between empty lines."""
    return sum(bool(part.strip()) for part in _PARAGRAPH_BREAK.split(answer))


_LANGUAGES = ("en", "zh")
INSTRUCTIONS: dict[str, Callable[[str, Any], bool]] = {
    "min_words": lambda answer, value: text_match.count_words(answer) >= value,
    "max_words": lambda answer, value: text_match.count_words(answer) <= value,
    "min_sentences": lambda answer, value: _count_sentences(answer) >= value,
    "max_sentences": lambda answer, value: _count_sentences(answer) <= value,
    "paragraphs": lambda answer, value: _count_paragraphs(answer) == value,
    "bullets": lambda answer, value: len(_BULLET.findall(answer)) == value,
    "numbered": lambda answer, value: len(_NUMBERED.findall(answer)) == value,
    "headings": lambda answer, value: len(_HEADING.findall(answer)) == value,
    "include": lambda answer, value: all(_contains(answer, text) for text in _list_texts(value)),
    "exclude": lambda answer, value: not any(_contains(answer, text) for text in _list_texts(value)),
    "starts_with": lambda answer, value: answer.startswith(value.strip()),
    "ends_with": lambda answer, value: answer.endswith(value.strip()),
    "language": _is_language,
    "json": lambda answer, value: (json_answer.read_json(answer) is not json_answer.INVALID) == value,
    "lowercase": lambda answer, value: (answer == answer.lower()) == value,
    "uppercase": lambda answer, value: (answer == answer.upper()) == value,
    "commas": lambda answer, value: (("," in answer) or ("，" in answer)) == value,
}
_VALUE_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(["min_words", "max_words", "min_sentences", "max_sentences", "paragraphs"], int),
    **dict.fromkeys(["bullets", "numbered", "headings"], int),
    **dict.fromkeys(["include", "exclude"], (str, list)),
    **dict.fromkeys(["starts_with", "ends_with", "language"], str),
    **dict.fromkeys(["json", "lowercase", "uppercase", "commas"], bool),
}
