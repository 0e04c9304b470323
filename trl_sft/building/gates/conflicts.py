"""The gate `conflict`: an instruction that an earlier row answers differently.

In: rows, one after another. Out: which earlier row has the same instruction with another answer. Several answers to
one instruction may be meant (stories, opinions), so `audit` notes such rows and does not remove them. Not here: rows
that are equal as a whole (`duplicates`).
"""

from __future__ import annotations

from array import array

from trl_sft.building.candidates import CandidateRow, Rejection
from trl_sft.building.gates.duplicates import RowList, RowStore
from trl_sft.data import mix
from trl_sft.data.text_sketches import HashTable, make_array


class ConflictGate:
    """Notes rows whose instruction has another answer in an earlier row."""

    name = "conflict"

    def __init__(self, store: RowStore | None = None) -> None:
        """Begin with no row.

        Args:
            store: holds the rows; None = in memory.

        """
        self._store: RowStore = RowList() if store is None else store
        self._prompts, self._answers = HashTable(), array("q")

    def check(self, row: CandidateRow) -> Rejection | None:
        """Compare a row with the first one of the same prompt, and remember it where it is the first."""
        prompts = [str(turn.get("content") or "") for turn in row.messages[:-1]]
        if not row.instruction:
            return None
        prompt, answer = make_array(mix.hash_texts(prompts)), mix.hash_texts([row.answer])
        known = self._prompts.find(prompt)
        if not known:
            self._prompts.add(prompt, len(self._answers))
            self._answers.append(answer)
            self._store.append(row)
            return None
        if self._answers[known[0]] == answer:
            return None
        return Rejection(self.name, f"{self._store.name_row(known[0])} has the same prompt and another answer")
