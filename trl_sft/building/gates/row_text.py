"""The text of a row, as gates compare it.

In: a row. Out: texts. Not here: what a template writes around them.
"""

from __future__ import annotations

from trl_sft.building.candidates import CandidateRow

_SHOWN = 60  # characters of a quotation


def join_texts(row: CandidateRow) -> str:
    """Return the contents of all turns, one below the other."""
    return "\n".join(str(turn.get("content") or "") for turn in row.messages)


def list_answers(row: CandidateRow) -> list[str]:
    """Return the contents of the turns of the assistant."""
    return [str(turn.get("content") or "") for turn in row.messages if turn.get("role") == "assistant"]


def name_row(row: CandidateRow) -> str:
    """Return a row in a sentence: `row 12`, or the name of its file with its number there."""
    return row.id if " row " in row.id else f"row {row.id}"


def quote(text: str) -> str:
    """Return a short quotation of a text."""
    words = " ".join(text.split())
    return repr(words if len(words) <= _SHOWN else words[: _SHOWN - 3] + "...")
