"""The gate `complete`: answers that were cut off, open code fences, and answers that loop.

In: a row. Out: the sign that an answer has no end. A missing full stop alone is no sign: titles, lists, code and
numbers have none; and neither is what the request asks for. Not here: whether an answer covers what was asked, which a
judge decides.
"""

from __future__ import annotations

import re

from trl_sft.building.candidates import CandidateRow, Rejection
from trl_sft.building.gates import request_kinds
from trl_sft.building.gates.row_text import list_answers, quote
from trl_sft.evaluation import repetition

# a fence may stand in a quotation or in an entry of a list: "> ```", "- ```sh"
_FENCE = re.compile(r"^[ \t>]*(?:(?:[-*+]|\d{1,3}[.)])[ \t]+)*(`{3,}|~{3,})(.*)$", re.MULTILINE)
_SENTENCE_END = re.compile(r"[.!?。！？]")
# No English sentence ends with one of these words in small letters. "to", "her", "such" and others that can end one are
# left out, and "A" may be the answer to a question of choice.
_OPEN_WORDS = frozenset(
    "the a an and or but nor although whereas if unless whether than my your our its their every".split()
)
_LEAST_PROSE = 12  # words of the last paragraph; a shorter one may be a line of a poem, a title or a list
_MOST_CONTINUATION = 80  # words of an answer that may end where its request asked for an open end
_LONGEST_OPEN_WORD = 40  # characters that are searched; a longer word is none of these
_LAST_WORD = re.compile(r"(?<![A-Za-z'])[A-Za-z']+$")
_MENTION = re.compile(r"(?:^|[\s(])(?:[a-z']+,\s+){2,}[^.!?]{0,30}$|[\"'“‘`][a-z']+$")  # my, your, his and their
_OPEN_ENDS = (",", "，", "、", "（", "(", "“")
_LEAST_COLUMNS = 3  # of a table whose last column is empty
_LETTERS = re.compile(r"[^\W\d_]+")
_CODE_LINE = re.compile(r"[;{}\])|]\s*$")


class CompletenessGate:
    """Rejects rows with an answer that stops before its end, or never stops."""

    name = "complete"

    def check(self, row: CandidateRow) -> Rejection | None:
        """Check every answer."""
        if row.was_cut:
            return Rejection(self.name, "the generator reached its limit of tokens in the answer")
        for answer in list_answers(row):
            if problem := _find_problem(answer.rstrip(), row):
                return Rejection(self.name, problem)
        return None


def _find_problem(answer: str, row: CandidateRow) -> str:
    """Return the sign that an answer was cut off or loops; "" = there is none."""
    if _has_open_fence(answer) and not (
        "\n" not in answer and request_kinds.FENCE.search(request_kinds.read_request(row))
    ):
        return "a code fence is opened and not closed"
    if repetition.is_repeating(answer) and not _may_repeat(answer, request_kinds.read_request(row)):
        return f"an answer repeats itself to its end: {quote(answer[-60:])}"
    if _ends_openly(answer) and not _may_end_openly(answer, request_kinds.read_request(row)):
        return f"an answer ends in the middle of a sentence: {quote(answer[-50:])}"
    return ""


def _ends_openly(answer: str) -> bool:
    """Tell whether the last paragraph of an answer stops in the middle of a sentence."""
    last_paragraph = answer.rsplit("\n", 1)[-1]
    if len(last_paragraph.split()) < _LEAST_PROSE and not (len(last_paragraph) > 8 and last_paragraph[-1:] in "，、（"):
        return False
    if answer.endswith(_OPEN_ENDS):
        return not _is_table_line(answer, last_paragraph)
    word = _LAST_WORD.search(answer[-_LONGEST_OPEN_WORD:])
    if not word or word[0] not in _OPEN_WORDS or not _SENTENCE_END.search(answer):
        return False
    return not _MENTION.search(last_paragraph)


def _may_end_openly(answer: str, request: str) -> bool:
    """Tell whether a request asks for a text with an open end, and the answer is no longer than one."""
    return len(answer.split()) <= _MOST_CONTINUATION and bool(request_kinds.OPEN_END.search(request))


def _is_table_line(answer: str, last_line: str) -> bool:
    """Tell whether a line that ends in a comma has as many of them as the line before: its last column is empty."""
    lines = answer.splitlines()
    commas = last_line.count(",")
    return commas >= _LEAST_COLUMNS - 1 and len(lines) > 1 and lines[-2].count(",") == commas


def _may_repeat(answer: str, request: str) -> bool:
    """Tell whether a loop is meant: numbers, signs, lines of code, labels, or what the request asks for."""
    words = _LETTERS.findall(answer)
    is_one_word = len(words) == 1 and len(answer.split()) == 1  # Hahaha, AAAAAAAA
    if not words or is_one_word or request_kinds.REPETITION.search(request):
        return True
    lines = answer.splitlines()
    if len(lines) > 1 and all(_CODE_LINE.search(line) for line in lines if line.strip()):
        return True
    is_list = len(set(words)) <= 1 and any(sign in answer for sign in ",\n;|")
    return is_list or (len(set(words)) <= 1 and bool(request_kinds.LABELS.search(request)))


def _has_open_fence(answer: str) -> bool:
    """Tell whether the last code fence is open, also if a fence may stand inside another one.

    By CommonMark a fence is closed by one of its kind, at least as long, alone. Models write fences inside fences all
    the same: an answer is open only if it is so by both readings.
    """
    if "```" not in answer and "~~~" not in answer:
        return False
    opened, inner = "", []
    for fence, rest in _FENCE.findall(answer):
        if not opened:
            opened = fence if "`" not in rest else ""
        elif fence.startswith(opened) and not rest.strip():
            opened = ""
        if rest.strip() and "`" not in rest:
            inner.append(fence)
        elif not rest.strip() and inner and fence.startswith(inner[-1]):
            inner.pop()
        elif not rest.strip():
            inner.append(fence)
    return bool(opened) and bool(inner)
