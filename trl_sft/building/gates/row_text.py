"""The text of a row, as gates compare it.

In: a row. Out: texts. Not here: what a template writes around them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trl_sft.building.candidates import CandidateRow
from trl_sft.data import text_matches

_SHOWN = 60  # characters of a quotation


def read_turn(turn: Mapping[str, Any]) -> str:
    """Return the content of a turn, and its calls of tools below it."""
    content = str(turn.get("content") or "")
    return f"{content}\n{write_calls(turn)}" if turn.get("tool_calls") else content


def write_calls(turn: Mapping[str, Any]) -> str:
    """Return the calls of a turn as JSON; "" = it has none."""
    calls = turn.get("tool_calls")
    if not calls:
        return ""
    return calls if isinstance(calls, str) else json.dumps(calls, ensure_ascii=False, sort_keys=True, default=str)


def join_texts(row: CandidateRow) -> str:
    """Return the texts of all turns, one below the other."""
    return "\n".join(read_turn(turn) for turn in row.messages)


def split_row(row: CandidateRow) -> list[str]:
    """Return the words of all turns in order: those of `join_texts`, since no word goes over the end of a line."""
    return [word for turn in row.messages for word in text_matches.split_words(read_turn(turn))]


def list_answers(row: CandidateRow) -> list[str]:
    """Return the contents of the turns of the assistant."""
    return [str(turn.get("content") or "") for turn in row.messages if turn.get("role") == "assistant"]


def quote(text: str) -> str:
    """Return a short quotation of a text."""
    words = " ".join(text.split())
    return repr(words if len(words) <= _SHOWN else words[: _SHOWN - 3] + "...")
