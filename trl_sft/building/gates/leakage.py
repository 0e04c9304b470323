"""The gate `leakage`: rows that hold a prompt of an evaluation set.

In: the prompts of evaluation sets, and rows. Out: which prompt a row holds, and how: exact, runs of eight words, or
near (`data.text_matches`). A row with other numbers is another exercise, and no leak. Not here: reading the evaluation
sets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from trl_sft.building.candidates import CandidateRow, Rejection
from trl_sft.building.gates.row_text import quote
from trl_sft.data import text_matches
from trl_sft.data.text_matches import ReferenceIndex


class LeakageGate:
    """Rejects rows with an instruction of an evaluation set."""

    name = "leakage"

    def __init__(self, prompts: Sequence[str], sample: Iterable[str] = ()) -> None:
        """Index the prompts of evaluation sets.

        Args:
            prompts: of evaluation sets.
            sample: instructions of some rows; what many of them have in common is a wording, and no leak.

        """
        self._prompts = list(prompts)
        self._index = ReferenceIndex(self._prompts, sample)

    def check(self, row: CandidateRow) -> Rejection | None:
        """Compare every turn of the user with the prompts."""
        for turn in row.messages:
            if turn.get("role") == "assistant" and row.instruction:
                continue
            for match in self._index.find(str(turn.get("content") or "")):
                if match.kind in text_matches.LEAKS:
                    share = "" if match.kind == text_matches.EXACT else f" ({match.similarity:.0%})"
                    prompt = quote(self._prompts[match.reference])
                    return Rejection(
                        self.name, f"{match.kind}{share}: evaluation prompt {match.reference + 1}, {prompt}"
                    )
        return None
