"""The gate `form`: roles in a possible order, contents that are text, and no trace of a wrong encoding.

In: a row. Out: why it cannot be trained as it stands. Not here: whether a recipe can read the file (`data.load`).
"""

from __future__ import annotations

import itertools
import re

from trl_sft.building.candidates import CandidateRow, Rejection

_ROLES = ("system", "user", "assistant", "tool")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f\x7f\ufffe\uffff]")
# UTF-8 that was read as Windows-1252: "Ã©" for "é", "â€™" for an apostrophe. Two in one text, or one of three letters.
_MISREAD = re.compile(r"â€[™œ\x9d“”˜¦]|ï»¿|Ã[©¨¶¼¤±³¡­]")
_REPLACEMENT = "\ufffd"


class FormGate:
    """Rejects rows whose turns cannot be a conversation, and texts that were read in a wrong encoding."""

    name = "form"

    def check(self, row: CandidateRow) -> Rejection | None:
        """Check roles, contents and characters."""
        problem = _find_order_problem(row) or _find_text_problem(row)
        return Rejection(self.name, problem) if problem else None


def _find_order_problem(row: CandidateRow) -> str:
    """Return what is wrong with the order of the turns; "" = nothing."""
    roles = [str(turn.get("role")) for turn in row.messages]
    if not roles:
        return "the row has no turn"
    unknown = [role for role in roles if role not in _ROLES]
    if unknown:
        return f"a turn has the role {unknown[0]!r}, which is none of {', '.join(_ROLES)}"
    if "assistant" not in roles:
        return "no turn is an answer of the assistant"
    if roles[-1] != "assistant":
        return f"the last turn is of the {roles[-1]}, so nothing answers it"
    for first, second in itertools.pairwise(roles):
        if first == second and first in ("user", "assistant"):
            return f"two turns of the {first} follow each other"
    return ""


def _find_text_problem(row: CandidateRow) -> str:
    """Return what is wrong with the characters of the turns; "" = nothing."""
    for turn in row.messages:
        content = turn.get("content")
        if content is None and (turn.get("tool_calls") or turn.get("reasoning_content")):
            continue
        if not isinstance(content, str):
            return f"the content of a turn is {type(content).__name__}, not text"
        if found := _CONTROL.search(content):
            return f"a text holds the control character U+{ord(found[0]):04X}"
        if _REPLACEMENT in content:
            return "a text holds U+FFFD, which stands for bytes that could not be decoded"
        misread = _MISREAD.findall(content)
        if misread:
            return f"a text was read in a wrong encoding: {misread[0]!r} stands where one character was"
    return ""
