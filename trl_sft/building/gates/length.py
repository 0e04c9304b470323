"""The gate `length`: rows with more tokens than the student is trained on.

In: a row, a function that counts tokens. Out: its length where that is above the limit. Not here: quantiles of a set.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from trl_sft.building.candidates import CandidateRow, Rejection
from trl_sft.building.gates.row_text import join_texts
from trl_sft.data import text_matches


@dataclass(frozen=True)
class LengthGate:
    """Rejects rows that are longer than a limit, of which the end would be cut off."""

    max_tokens: int
    count_tokens: Callable[[str], int]
    name: str = "length"

    def check(self, row: CandidateRow) -> Rejection | None:
        """Count the tokens of all turns, without those of the chat template."""
        return self.check_count(self.count_tokens(join_texts(row)))

    def check_count(self, tokens: int) -> Rejection | None:
        """Compare the number of tokens of a row with the limit."""
        if tokens <= self.max_tokens:
            return None
        return Rejection(self.name, f"the row has {tokens:,} tokens, and {self.max_tokens:,} are the most")


def count_words(text: str) -> int:
    """Return the number of words; a Chinese or Japanese character is a word."""
    return len(text_matches.split_words(text))
