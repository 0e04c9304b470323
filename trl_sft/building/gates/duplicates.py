"""The gate `duplicate`: rows that are equal or nearly equal to an earlier row that passed.

In: rows, one after another. Out: which earlier row says the same, and how it was found: exact, runs of eight words, or
near. Hashes find candidates (`data.text_sketches`); the texts decide (`data.text_matches`). Rows that ask for different
things are no duplicates (`row_differences`). Not here: an evaluation set (`leakage`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from trl_sft.building.candidates import CandidateRow, Rejection
from trl_sft.building.gates import row_differences
from trl_sft.building.gates.row_text import join_texts, split_row
from trl_sft.data import mix, text_matches, text_sketches
from trl_sft.data.text_sketches import SketchIndex

_LEAST_COVERAGE = 0.8  # of a row's runs of eight words that one earlier row has: it adds little
_LEAST_JACCARD = 0.7  # of the words of two rows, from which they say nearly the same


class RowStore(Protocol):
    """The rows that passed, by number: in memory, or read again from where they are."""

    def append(self, row: CandidateRow, /) -> None:
        """Add a row, whose number is that of the rows before it."""

    def __getitem__(self, number: int, /) -> CandidateRow:
        """Return a row by its number."""

    def name_row(self, number: int, /) -> str:
        """Return the name of a row in a sentence: `row 12`, or the name of its file with its number there."""


class RowList(list[CandidateRow]):
    """Rows in memory."""

    def name_row(self, number: int, /) -> str:
        """Return the name of a row in a sentence."""
        name = self[number].id
        return name if " row " in name else f"row {name}"


class DuplicateGate:
    """Rejects rows that say what an earlier row says."""

    name = "duplicate"

    def __init__(self, store: RowStore | None = None) -> None:
        """Begin with no row.

        Args:
            store: holds the rows that passed; None = in memory.

        """
        self._store: RowStore = RowList() if store is None else store
        self._index = SketchIndex()

    def check(self, row: CandidateRow) -> Rejection | None:
        """Compare a row with those that passed, and remember it if it passes."""
        text = join_texts(row)
        sketch = text_sketches.sketch_words(split_row(row), mix.hash_texts([text]))
        equal = self._index.find_equal(sketch)
        if equal is not None:
            return Rejection(self.name, f"exact: the same as {self._store.name_row(equal)}")
        rejection = self._compare(row, text, self._index.find_candidates(sketch))
        if rejection is None:
            self._index.add(sketch)
            self._store.append(row)
        return rejection

    def _compare(self, row: CandidateRow, text: str, numbers: Sequence[int]) -> Rejection | None:
        """Return the rejection by the first candidate whose text is nearly the same."""
        for number in numbers:
            earlier = self._store[number]
            if row_differences.are_different(row, earlier):
                continue
            match = text_matches.compare_texts(join_texts(earlier), text)
            if match.kind == text_matches.OVERLAP and match.similarity >= _LEAST_COVERAGE:
                share = f"{match.similarity:.0%} of the runs of eight words"
                return Rejection(self.name, f"8-gram: {share} stand in {self._store.name_row(number)}")
            if match.kind in (text_matches.OVERLAP, text_matches.NEAR) and match.jaccard >= _LEAST_JACCARD:
                name = self._store.name_row(number)
                return Rejection(self.name, f"near: {match.jaccard:.0%} of the words are those of {name}")
        return None
