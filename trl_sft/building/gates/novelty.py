"""The gate `novelty`: instructions too similar to an earlier one, by ROUGE-L as in Self-Instruct (Wang et al. 2023).

In: rows, one after another. Out: which earlier instruction is similar. MinHash of the words finds candidates, so not
all pairs are compared; instructions that differ in nothing but numbers are different. Not here: equal rows
(`duplicates`).
"""

from __future__ import annotations

from trl_sft.building.candidates import CandidateRow, Rejection
from trl_sft.building.gates.duplicates import RowList, RowStore
from trl_sft.building.gates.row_text import quote
from trl_sft.data import text_matches, text_sketches
from trl_sft.data.text_sketches import SketchIndex

MOST_SIMILAR = 0.7  # ROUGE-L, as Self-Instruct and Alpaca take it
_LEAST_WORDS = 5  # of an instruction; shorter ones are alike by chance


class NoveltyGate:
    """Rejects rows whose instruction is nearly that of an earlier row that passed."""

    name = "novelty"

    def __init__(self, store: RowStore | None = None) -> None:
        """Begin with no row.

        Args:
            store: holds the rows that passed; None = in memory.

        """
        self._store: RowStore = RowList() if store is None else store
        self._index = SketchIndex(finds_equal=False)

    def check(self, row: CandidateRow) -> Rejection | None:
        """Compare an instruction with those that passed, and remember it if it passes."""
        words = text_matches.split_words(row.instruction)
        if len(words) < _LEAST_WORDS:
            return None
        sketch = text_sketches.sketch_words(words, 0, words_of_sequence=1)
        for number in self._index.find_candidates(sketch):
            earlier = self._store[number]
            other = text_matches.split_words(earlier.instruction)
            similarity = compute_rouge_l(words, other)
            if similarity > MOST_SIMILAR and not _differ_in_numbers(words, other):
                name = self._store.name_row(number)
                text = f"ROUGE-L {similarity:.2f} to the instruction of {name}, {quote(earlier.instruction)}"
                return Rejection(self.name, text)
        self._index.add(sketch)
        self._store.append(row)
        return None


def compute_rouge_l(words: list[str], other: list[str]) -> float:
    """Return the F1 of the longest common subsequence of two texts (Lin 2004), from 0 to 1.

    The subsequence is computed on bits (Hyyrö 2004): one addition for each word of the other text.
    """
    if not words or not other:
        return 0.0
    places: dict[str, int] = {}
    for number, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << number
    mask = (1 << len(words)) - 1
    state = mask
    for word in other:
        matched = state & places.get(word, 0)
        state = ((state + matched) | (state - matched)) & mask
    common = len(words) - state.bit_count()
    return 2 * common / (len(words) + len(other))


def _differ_in_numbers(words: list[str], other: list[str]) -> bool:
    """Tell whether two instructions have the same words but for numbers."""
    others = set(words) ^ set(other)
    return bool(others) and all(word.isnumeric() for word in others)
