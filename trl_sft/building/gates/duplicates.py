"""The gate `duplicate`: rows that are equal or nearly equal to an earlier row that passed.

In: rows, one after another. Out: which earlier row says the same, and how it was found: exact, runs of eight words, or
near. Hashes find candidates (`data.text_sketches`); the texts decide (`data.text_matches`). Rows with other numbers are
different rows: a problem and its reverse have nearly the same words. Not here: an evaluation set (`leakage`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from trl_sft.building.candidates import CandidateRow, Rejection
from trl_sft.building.gates.row_text import join_texts, list_answers, name_row
from trl_sft.data import text_matches, text_sketches
from trl_sft.data.text_sketches import SketchIndex

_NUMBER = re.compile(r"\d+")
_LEAST_COVERAGE = 0.8  # of a row's runs of eight words that one earlier row has: it adds little
_LEAST_PART = 0.5  # of the words of two prompts, and of two answers
_LEAST_JACCARD = 0.7  # of the words of two rows, from which they say nearly the same


class RowStore(Protocol):
    """The rows that passed, by number: a list, or rows that are read again from where they are."""

    def append(self, row: CandidateRow, /) -> None:
        """Add a row, whose number is that of the rows before it."""

    def __getitem__(self, number: int, /) -> CandidateRow:
        """Return a row by its number."""


class DuplicateGate:
    """Rejects rows that say what an earlier row says."""

    name = "duplicate"

    def __init__(self, store: RowStore | None = None) -> None:
        """Begin with no row.

        Args:
            store: holds the rows that passed; None = a list in memory.

        """
        self._store: RowStore = [] if store is None else store
        self._index = SketchIndex()

    def check(self, row: CandidateRow) -> Rejection | None:
        """Compare a row with those that passed, and remember it if it passes."""
        text = join_texts(row)
        sketch = text_sketches.sketch_text(text)
        equal = self._index.find_equal(sketch)
        if equal is not None:
            return Rejection(self.name, f"exact: the same as {name_row(self._store[equal])}")
        rejection = self._compare(row, text, self._index.find_candidates(sketch))
        if rejection is None:
            self._index.add(sketch)
            self._store.append(row)
        return rejection

    def _compare(self, row: CandidateRow, text: str, numbers: Sequence[int]) -> Rejection | None:
        """Return the rejection by the first candidate whose text is nearly the same."""
        for number in numbers:
            earlier = self._store[number]
            if _has_other_numbers(row, earlier) or _has_other_parts(row, earlier):
                continue
            match = text_matches.compare_texts(join_texts(earlier), text)
            if match.kind == text_matches.OVERLAP and match.similarity >= _LEAST_COVERAGE:
                share = f"{match.similarity:.0%} of the runs of eight words"
                return Rejection(self.name, f"8-gram: {share} stand in {name_row(earlier)}")
            if match.kind in (text_matches.OVERLAP, text_matches.NEAR) and match.jaccard >= _LEAST_JACCARD:
                return Rejection(self.name, f"near: {match.jaccard:.0%} of the words are those of {name_row(earlier)}")
        return None


def _has_other_numbers(row: CandidateRow, earlier: CandidateRow) -> bool:
    """Tell whether two rows have different numbers in their prompts, or the answers of the first one others too."""
    (prompt, answer), (other_prompt, other_answer) = _find_numbers(row), _find_numbers(earlier)
    return prompt != other_prompt or not answer <= other_answer


def _has_other_parts(row: CandidateRow, earlier: CandidateRow) -> bool:
    """Tell whether prompts or answers of two rows share too few words: one text with two tasks, one answer to many."""
    for part, other in zip(_join_parts(row), _join_parts(earlier), strict=True):
        words, others = set(text_matches.split_words(part)), set(text_matches.split_words(other))
        if len(words & others) < _LEAST_PART * len(words | others):
            return True
    return False


def _join_parts(row: CandidateRow) -> tuple[str, str]:
    """Return the prompts and the answers of a row."""
    prompts = [str(turn.get("content") or "") for turn in row.messages if turn.get("role") != "assistant"]
    return "\n".join(prompts), "\n".join(list_answers(row))


def _find_numbers(row: CandidateRow) -> tuple[set[str], set[str]]:
    """Return the numbers of the prompts and of the answers of a row."""
    prompts, answers = _join_parts(row)
    return set(_NUMBER.findall(prompts)), set(_NUMBER.findall(answers))
