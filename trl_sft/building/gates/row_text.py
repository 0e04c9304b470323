"""The text of a row, as gates compare it.

In: a row. Out: texts. Not here: what a template writes around them.
"""

from __future__ import annotations

from trl_sft.building.candidates import CandidateRow
from trl_sft.data import text_matches

_SHOWN = 60  # characters of a quotation


def join_texts(row: CandidateRow) -> str:
    """Return the contents of all turns, one below the other."""
    return "\n".join(str(turn.get("content") or "") for turn in row.messages)


def split_row(row: CandidateRow) -> list[str]:
    """Return the words of all turns in order: those of `join_texts`, since no word goes over the end of a line."""
    return [word for turn in row.messages for word in text_matches.split_words(str(turn.get("content") or ""))]


def list_answers(row: CandidateRow) -> list[str]:
    """Return the contents of the turns of the assistant."""
    return [str(turn.get("content") or "") for turn in row.messages if turn.get("role") == "assistant"]


def quote(text: str) -> str:
    """Return a short quotation of a text."""
    words = " ".join(text.split())
    return repr(words if len(words) <= _SHOWN else words[: _SHOWN - 3] + "...")
