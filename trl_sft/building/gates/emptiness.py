"""The gate `empty`: instructions and answers that are empty, or hold the mark of an export for nothing.

In: a row. Out: which turn is empty. `null` is the right answer to some requests, which are passed. Not here: answers
that are short; "4", "!" and "N/A" can be right ones.
"""

from __future__ import annotations

from trl_sft.building.candidates import CandidateRow, Rejection
from trl_sft.building.gates import request_kinds

# what exports and generators write for nothing; `None` and `N/A` are answers of some tasks
_MARKS = {"<nooutput>", "<noinput>", "<no output>", "<no input>", "[no output]"}
_VALUES = {"nan", "null", "undefined"}
_INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff \t\r\n"
_DOTS = {"..", "...", "…"}


class EmptinessGate:
    """Rejects rows in which a user's or an assistant's turn says nothing."""

    name = "empty"

    def check(self, row: CandidateRow) -> Rejection | None:
        """Check every turn of user and assistant."""
        for turn in row.messages:
            if turn.get("tool_calls") or turn.get("role") not in ("user", "assistant"):
                continue
            is_answer = turn["role"] == "assistant"
            speaker = "answer" if is_answer else "instruction"
            content = str(turn.get("content") or "").strip(_INVISIBLE).strip()
            if not content:
                return Rejection(self.name, f"an {speaker} is empty")
            if _is_mark(content.casefold()) and not (is_answer and _may_be_answer(content.casefold(), row)):
                return Rejection(self.name, f"an {speaker} is {content!r}, which stands for nothing")
        return None


def _is_mark(text: str) -> bool:
    """Tell whether a text in small letters stands for nothing in exports."""
    return text in _MARKS or text in _VALUES or text in _DOTS


def _may_be_answer(text: str, row: CandidateRow) -> bool:
    """Tell whether a request asks for such a value or sign."""
    request = request_kinds.read_request(row)
    if text in _VALUES:
        return bool(request_kinds.NO_VALUE.search(request))
    return text in _DOTS and bool(request_kinds.DOTS.search(request))
