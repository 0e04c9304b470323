"""The gate `form`: roles in a possible order, contents that are text, and no trace of a wrong encoding.

In: a row. Out: why it cannot be trained as it stands. A row about wrong
encodings may hold their traces. Not here: whether a recipe can read the file (`data.load`).
"""

from __future__ import annotations

import itertools
import re

from trl_sft.building.candidates import CandidateRow, Rejection
from trl_sft.building.gates import request_kinds
from trl_sft.building.gates.row_text import join_texts

_ROLES = ("system", "user", "assistant", "tool")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f\x7f-\x84\x86-\x9f\ufffe\uffff]")
# UTF-8 that was read as Windows-1252: "Ã©" for "é", "â€™" for an apostrophe, "ÐŸÑ€" for Cyrillic letters. A run of
# these characters is a candidate; its bytes decide. "â€" alone is what is left of a closing quotation mark.
_HIGH = "€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"  # from 0x80 to 0x9f in Windows-1252
_CANDIDATE = re.compile(rf"[\u00c2-\u00f4][{_HIGH}\u00a0-\u00bf][\u00a0-\u00ff{_HIGH}]*")
_CERTAIN = re.compile(
    rf"[ÂÃ][\u00a1-\u00bf]|(?<=[a-z])Ã[{_HIGH}\u00a0]|Ã[{_HIGH}](?=[a-z])|[âãï][{_HIGH}\u00a0-\u00bf]{{2}}|â€"
    rf"|(?:[à-ï][{_HIGH}\u00a0-\u00bf]{{2}}){{2}}"
)
_REPLACEMENT = "\ufffd"
_SHOWN = 4  # characters of a run in a reason


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
    for first, second in itertools.pairwise(row.messages):
        role = str(first.get("role"))
        is_call = bool(first.get("tool_calls"))  # several calls may stand in a turn each
        if role == second.get("role") and role in ("user", "assistant") and not is_call:
            return f"two turns of the {role} follow each other"
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
        misread = _find_misread(content)
        if (misread or _REPLACEMENT in content) and request_kinds.ENCODING.search(join_texts(row)):
            continue  # the row is about wrong encodings
        if _REPLACEMENT in content:
            return "a text holds U+FFFD, which stands for bytes that could not be decoded"
        if misread:
            return f"a text was read in a wrong encoding: {misread!r} stands where one character was"
    return ""


def _find_misread(text: str) -> str:
    """Return characters that are UTF-8 read as Windows-1252; "" = there are none.

    One such sequence counts where no word ends so ("Gruß”" is a word with a quotation mark), others where two stand
    side by side.
    """
    if text.isascii():
        return ""
    for found in _CANDIDATE.finditer(text):
        run, certain = found[0], _CERTAIN.match(text, found.start())
        decoded = _decode(run)
        if certain and (decoded or _decode(certain[0]) or run.startswith("â€")):
            return certain[0]
        if len(decoded) > 1 and not any(letter.isascii() or letter in run for letter in decoded):
            return run[:_SHOWN]
    return ""


def _decode(run: str) -> str:
    """Return what the bytes of a run in Windows-1252 say in UTF-8; "" = they are no UTF-8."""
    try:
        return run.encode("cp1252").decode("utf-8")
    except (UnicodeEncodeError, UnicodeDecodeError):
        return ""
