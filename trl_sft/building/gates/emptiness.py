"""The gate `empty`: instructions and answers that are empty, or hold the mark of an export for nothing.

In: a row. Out: which turn is empty. Not here: answers that are short; "4", "!" and "N/A" can be right ones.
"""

from __future__ import annotations

from trl_sft.building.candidates import CandidateRow, Rejection

# what exports and generators write for nothing; `None` and `N/A` are answers of some tasks
_MARKS = {
    "<nooutput>",
    "<noinput>",
    "<no output>",
    "<no input>",
    "nan",
    "null",
    "undefined",
    "[no output]",
    "..",
    "...",
    "…",
}


class EmptinessGate:
    """Rejects rows in which a user's or an assistant's turn says nothing."""

    name = "empty"

    def check(self, row: CandidateRow) -> Rejection | None:
        """Check every turn of user and assistant."""
        for turn in row.messages:
            if turn.get("tool_calls") or turn.get("role") not in ("user", "assistant"):
                continue
            speaker = "answer" if turn["role"] == "assistant" else "instruction"
            content = str(turn.get("content") or "").strip()
            if not content:
                return Rejection(self.name, f"an {speaker} is empty")
            if content.casefold() in _MARKS:
                return Rejection(self.name, f"an {speaker} is {content!r}, which stands for nothing")
        return None
