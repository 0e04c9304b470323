"""The form of answers: structure, length, repetition, diversity, ends, refusals and language; base beside tuned.

Inputs: pairs of answers. Outputs: `FormatTable`: a share or a number of each measure and side. Nothing is loaded, and
no package of the extra `eval` is needed. Not here: whether an answer is right (`checks`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from trl_sft.evaluation import scripts
from trl_sft.evaluation.answer_pairs import BASE, TUNED, AnswerPair
from trl_sft.evaluation.checks import json_answer, text_match
from trl_sft.evaluation.refusals import is_refusal
from trl_sft.evaluation.repetition import is_repeating, measure_repetition

QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)
_FENCED = re.compile(r"^ {0,3}(```+|~~~+).*?(?:^ {0,3}\1|\Z)", re.DOTALL | re.MULTILINE)
_FENCE = re.compile(r"^ {0,3}(?:```|~~~)", re.MULTILINE)
_HEADING = re.compile(r"^ {0,3}#{1,6} +(?!\S*\d\S*[ \t]*$)\S", re.MULTILINE)  # `#### 72` ends an answer of GSM8K
_BULLETS = re.compile(r"^ *[-*+•] +\S", re.MULTILINE)
_NUMBERS = re.compile(r"^ *(?:\d{1,3}[.)] +|\d{1,3}[、．]|[（(]?[一二三四五六七八九十]{1,3}[）)、.]) *\S", re.MULTILINE)
_TABLE_RULE = re.compile(r"[ |:-]*--[ |:-]*")  # the second line of a table
_BOLD = re.compile(r"(?<![0-9A-Za-z*])\*\*[^\s*](?:[^*\n]*[^\s*])?\*\*(?![0-9A-Za-z*])")
_JSON_BEGINNINGS = ("{", "[")
_LEAST_LIST = 2  # lines; one line with a dash is no list


@dataclass(frozen=True)
class FormatShare:
    """In how many answers a feature occurs."""

    name: str
    base: int
    tuned: int
    base_of: int  # answers that can have it
    tuned_of: int
    gained: int  # prompts whose tuned answer has it and whose base answer has not; both can have it
    lost: int

    def describe(self) -> dict[str, Any]:
        """Return the counts and shares as a mapping that JSON can write; a share of nothing is null."""
        shares = {BASE: _divide(self.base, self.base_of), TUNED: _divide(self.tuned, self.tuned_of)}
        counts = {"base_count": self.base, "base_of": self.base_of, "tuned_count": self.tuned}
        return shares | counts | {"tuned_of": self.tuned_of, "gained": self.gained, "lost": self.lost}


@dataclass(frozen=True)
class FormatTable:
    """The form of the answers of both models."""

    prompts: int
    shares: list[FormatShare]
    lengths: dict[str, dict[str, list[float]]]  # side -> unit (words, characters) -> quantiles as in QUANTILES
    numbers: dict[str, dict[str, float | None]]  # measure -> side -> value; None = no answer has enough words

    def describe(self) -> dict[str, Any]:
        """Return the table as a mapping that JSON can write."""
        return {
            "prompts": self.prompts,
            "shares": {share.name: share.describe() for share in self.shares},
            "quantiles": list(QUANTILES),
            "lengths": self.lengths,
            "numbers": self.numbers,
        }


def measure(pairs: Sequence[AnswerPair]) -> FormatTable | None:
    """Return the form of both models' answers; None without pairs.

    Shares of answers: `empty`; with a `heading` of Markdown, a list (`bullet_list`, `numbered_list`: two lines or
    more), a `table`, `bold` text, a `code_fence`, an `open_code_fence` that is never closed; `json` = JSON as a whole,
    `broken_json` = begins as JSON and is none; `repeating` = half of it is one unit again and again; `cut_off` = the
    model did not end it; `refusal`; `other_language` = in another script than the reference, or than the prompt where
    there is none.

    Lengths are in words and characters; a Chinese or Japanese character is a word. `repetition` is the mean share of
    sequences of four words that occurred before in their answer; `distinct_1` and `distinct_2` are different words and
    pairs of words by all of them (Li et al. 2016, https://arxiv.org/abs/1510.03055), over all answers: longer texts
    have less. So each side is cut to the words of the shorter side first.
    """
    if not pairs:
        return None
    words = {side: [_split(pair.get_answer(side)) for pair in pairs] for side in (BASE, TUNED)}
    return FormatTable(
        prompts=len(pairs),
        shares=[_count(name, has, pairs) for name, has in _FEATURES.items()],
        lengths={
            side: {
                "words": _find_quantiles([len(text_match.split_words(pair.get_answer(side))) for pair in pairs]),
                "characters": _find_quantiles([len(pair.get_answer(side).strip()) for pair in pairs]),
            }
            for side in (BASE, TUNED)
        },
        numbers={
            "repetition": {side: _average(map(measure_repetition, words[side])) for side in (BASE, TUNED)},
            **{f"distinct_{length}": _measure_distinct(words, length) for length in (1, 2)},
        },
    )


def _split(text: str) -> list[str]:
    """Return the words of a text in lower case."""
    return text_match.split_words(text.lower())


def _count(name: str, has: Callable[[AnswerPair, str], bool | None], pairs: Sequence[AnswerPair]) -> FormatShare:
    """Return how many answers of each side have a feature."""
    base, tuned = ([has(pair, side) for pair in pairs] for side in (BASE, TUNED))
    both = list(zip(base, tuned, strict=True))
    return FormatShare(
        name=name,
        base=base.count(True),
        tuned=tuned.count(True),
        base_of=len(base) - base.count(None),
        tuned_of=len(tuned) - tuned.count(None),
        gained=both.count((False, True)),
        lost=both.count((True, False)),
    )


def _has_lines(pattern: re.Pattern[str], text: str, *, least: int = 1) -> bool:
    """Tell whether a pattern occurs often enough outside of code."""
    outside = _FENCED.sub("", text)
    return next(itertools.islice(pattern.finditer(outside), least - 1, None), None) is not None


def _has_table(text: str) -> bool:
    """Tell whether a text has a table of Markdown: a line with `|`, and a rule below it."""
    lines = _FENCED.sub("", text).splitlines()
    return any("|" in line and "|" in rule and _TABLE_RULE.fullmatch(rule) for line, rule in itertools.pairwise(lines))


def _is_json(text: str) -> bool:
    """Tell whether an answer is an object or a list of JSON, in a code fence or not."""
    return isinstance(json_answer.read_json(text), dict | list)


def _is_broken_json(text: str) -> bool:
    """Tell whether an answer begins as JSON and is none."""
    inner = re.sub(r"\A```(?:json)?\s*", "", text.strip())
    return inner.startswith(_JSON_BEGINNINGS) and not _is_json(text)


def _is_cut_off(pair: AnswerPair, side: str) -> bool | None:
    """Tell whether the model did not end its answer; None = it cannot be told."""
    ended = pair.base_ended if side == BASE else pair.tuned_ended
    return None if ended is None else not ended


def _is_in_other_script(pair: AnswerPair, side: str) -> bool | None:
    """Tell whether an answer is in another script than expected; None = one of the two has too few letters."""
    expected = scripts.find_script(pair.reference) or scripts.find_script(pair.prompt)
    script = scripts.find_script(pair.get_answer(side))
    return script != expected if script and expected else None


def _read(has: Callable[[str], bool]) -> Callable[[AnswerPair, str], bool]:
    """Return a feature of pairs that reads the text of an answer alone."""
    return lambda pair, side: has(pair.get_answer(side))


_FEATURES: dict[str, Callable[[AnswerPair, str], bool | None]] = {
    "empty": _read(lambda text: not text.strip()),
    "heading": _read(lambda text: _has_lines(_HEADING, text)),
    "bullet_list": _read(lambda text: _has_lines(_BULLETS, text, least=_LEAST_LIST)),
    "numbered_list": _read(lambda text: _has_lines(_NUMBERS, text, least=_LEAST_LIST)),
    "table": _read(_has_table),
    "bold": _read(lambda text: _has_lines(_BOLD, text)),
    "code_fence": _read(lambda text: _FENCE.search(text) is not None),
    "open_code_fence": _read(lambda text: len(_FENCE.findall(text)) % 2 == 1),
    "json": _read(_is_json),
    "broken_json": _read(_is_broken_json),
    "repeating": _read(is_repeating),
    "cut_off": _is_cut_off,
    "refusal": _read(is_refusal),
    "other_language": _is_in_other_script,
}


def _find_quantiles(values: Sequence[int]) -> list[float]:
    """Return the quantiles of lengths, interpolated between neighbours as numpy does."""
    ordered, result = sorted(values), []
    for quantile in QUANTILES:
        place = quantile * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        result.append(ordered[low] + (place - low) * (ordered[high] - ordered[low]))
    return result


def _average(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def _measure_distinct(words: dict[str, list[list[str]]], length: int) -> dict[str, float | None]:
    """Return different sequences of words by all of them, on as many words of both sides."""
    sequences = {
        side: [tuple(text[start : start + length]) for text in texts for start in range(len(text) - length + 1)]
        for side, texts in words.items()
    }
    shortest = min(map(len, sequences.values()))
    return {side: _divide(len(set(found[:shortest])), shortest) for side, found in sequences.items()}


def _divide(count: int, total: int) -> float | None:
    return count / total if total else None
