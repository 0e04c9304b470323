"""The gate `complete`: answers that were cut off, open code fences, and answers that loop.

In: a row. Out: the sign that an answer has no end. A missing full stop alone is no sign: titles, lists, code and
numbers have none. Not here: whether an answer covers what was asked, which a judge decides.
"""

from __future__ import annotations

import re

from trl_sft.building.candidates import CandidateRow, Rejection
from trl_sft.building.gates.row_text import list_answers, quote
from trl_sft.evaluation import repetition

_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})(.*)$", re.MULTILINE)
_SENTENCE_END = re.compile(r"[.!?。！？]")
# No English sentence ends with one of these words. "to", "in", "for" and other words that can end one are left out.
_OPEN_WORDS = frozenset(
    "the a an and or but nor because although whereas if unless whether than my your his her their our its "
    "every very such".split()
)
_LEAST_PROSE = 12  # words of the last paragraph; a shorter one may be a line of a poem, a title or a list
_LAST_WORD = re.compile(r"[A-Za-z']+$")
_OPEN_ENDS = (",", "，", "、", "（", "(", "“", "—")


class CompletenessGate:
    """Rejects rows with an answer that stops before its end, or never stops."""

    name = "complete"

    def check(self, row: CandidateRow) -> Rejection | None:
        """Check every answer."""
        if row.was_cut:
            return Rejection(self.name, "the generator reached its limit of tokens in the answer")
        for answer in list_answers(row):
            if problem := _find_problem(answer.rstrip()):
                return Rejection(self.name, problem)
        return None


def _find_problem(answer: str) -> str:
    """Return the sign that an answer was cut off or loops; "" = there is none."""
    if _has_open_fence(answer):
        return "a code fence is opened and not closed"
    if repetition.is_repeating(answer):
        return f"an answer repeats itself to its end: {quote(answer[-60:])}"
    last_paragraph = answer.rsplit("\n", 1)[-1]
    if len(last_paragraph.split()) < _LEAST_PROSE and not (len(last_paragraph) > 8 and last_paragraph[-1:] in "，、（"):
        return ""
    if answer.endswith(_OPEN_ENDS):
        return f"an answer ends in the middle of a sentence: {quote(answer[-50:])}"
    word = _LAST_WORD.search(answer)
    if word and word[0].lower() in _OPEN_WORDS and _SENTENCE_END.search(answer):
        return f"an answer ends in the middle of a sentence: {quote(answer[-50:])}"
    return ""


def _has_open_fence(answer: str) -> bool:
    """Tell whether the last code fence is open: a fence is closed by one of its kind, at least as long, alone."""
    opened = ""
    for fence, rest in _FENCE.findall(answer):
        if not opened:
            opened = fence if "`" not in rest else ""
        elif fence.startswith(opened) and not rest.strip():
            opened = ""
    return bool(opened)
