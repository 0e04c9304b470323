"""Whether two rows with nearly the same words are two rows all the same: they ask for different things.

In: two rows. Out: whether they differ in what decides an answer: numbers, signs of calculation, negations, the subject;
for short answers every content word of the request. Rows made from one pattern have most of their words in common and
are no duplicates: "Translate into German: I like apples" and "... bananas". Not here: what two rows share
(`data.text_matches`).
"""

from __future__ import annotations

import re
from collections import Counter

from trl_sft.building.candidates import CandidateRow
from trl_sft.building.gates import request_kinds
from trl_sft.building.gates.row_text import list_answers, write_calls
from trl_sft.data import text_matches

_LEAST_PART = 0.5  # of the words of two requests, and of two answers
_SHORT_ANSWER = 20  # words; the request alone says what such a row teaches
_ADDED_PART = 0.1  # of the content words of a request, from which added ones make it another one
_NUMBER = re.compile(r"\d+")
_NUMBER_WORD = re.compile(
    rf"\b(?:{'|'.join(sorted(text_matches.NUMBER_WORDS))})\b|[二三四五六七八九十百千万亿两半]", re.I
)
# a sign before a number, a variable or a formula; a hyphen in a word and the sign of a list are none
_SIGN = re.compile(r"(?<=[\w)\]}$])\s*([-+*/×÷^<>=≤≥≠%&|])(?=\s*(?:\d|[A-Za-z](?![A-Za-z])|[({\[$\\]))")
_NEGATION = re.compile(r"n['’]t\b|\b(?:not|no|never|without|non|neither|nor|except)\b|[不没无非未]", re.IGNORECASE)
_FUNCTION_WORDS = frozenset(
    "a an the this that these those it its is are was were be been being am do does did has have had can could will"
    " would shall should may might must i me my we us our you your he him his she her they them their of in on at to"
    " for from by with as and or so if then than also just very please kindly some any there here what which who whom"
    " whose how why when where s t re ll ve m d".split()
) | frozenset("的了吗呢吧请把是在就都也和与及我你您他她它这那个一下些里之于以为对给")
_CODE = re.compile(r"```|~~~|^\s*(?:def |class |SELECT |import |function |public |#include)|[;{}]\s*$", re.MULTILINE)


def are_different(row: CandidateRow, earlier: CandidateRow) -> bool:
    """Tell whether two rows with nearly the same words differ in what decides an answer.

    Args:
        row: the later row.
        earlier: an earlier one, of which `row` may be a part.

    """
    if _list_calls(row) != _list_calls(earlier):
        return True
    request, other_request = request_kinds.read_request(row), request_kinds.read_request(earlier)
    answer, other_answer = "\n".join(list_answers(row)), "\n".join(list_answers(earlier))
    if _list_facts(request) != _list_facts(other_request):
        return True
    if not set(_NUMBER.findall(answer)) <= set(_NUMBER.findall(other_answer)):
        return True
    if _share_few_words(request, other_request) or _share_few_words(answer, other_answer):
        return True
    return _have_other_subjects((request, answer), (other_request, other_answer))


def _list_calls(row: CandidateRow) -> list[str]:
    """Return the calls of tools of a row, in order."""
    return [calls for turn in row.messages if (calls := write_calls(turn))]


def _list_facts(request: str) -> tuple[Counter[str], list[str], int]:
    """Return the numbers of a request, its signs of calculation in order, and how many negations it has."""
    numbers = Counter(_NUMBER.findall(request))
    numbers.update(word.lower() for word in _NUMBER_WORD.findall(request))
    signs = _SIGN.findall(request)
    if signs:
        signs += _NUMBER.findall(request)  # 5 - 7 is not 7 - 5
    return numbers, signs, len(_NEGATION.findall(request))


def _share_few_words(part: str, other: str) -> bool:
    """Tell whether two texts have too few words in common: one text with two tasks, one answer to many questions."""
    words, others = set(text_matches.split_words(part)), set(text_matches.split_words(other))
    return len(words & others) < _LEAST_PART * len(words | others)


def _have_other_subjects(row: tuple[str, str], earlier: tuple[str, str]) -> bool:
    """Tell whether the requests of two rows name different things, on which their answers depend.

    Args:
        row: the request and the answer of a row.
        earlier: those of the other row.

    """
    (request, answer), (other_request, other_answer) = row, earlier
    words, others = _list_content_words(request), _list_content_words(other_request)
    if words == others:
        return False
    answer_words = text_matches.split_words(answer)
    new, lost = Counter(words) - Counter(others), Counter(others) - Counter(words)
    if max(len(answer_words), len(text_matches.split_words(other_answer))) <= _SHORT_ANSWER:
        is_longer = bool(new) != bool(lost)  # by words of which many do not matter in a long request
        return not is_longer or (new + lost).total() >= _ADDED_PART * min(len(words), len(others))
    if _CODE.search(answer) and answer.split() != other_answer.split():
        return bool(new or lost)
    own, theirs = set(answer_words), set(text_matches.split_words(other_answer))
    return bool(set(new) & (own - theirs)) and bool(set(lost) & (theirs - own))


def _list_content_words(text: str) -> list[str]:
    """Return the words of a text that say what it is about, in order."""
    return [word for word in text_matches.split_words(text) if word not in _FUNCTION_WORDS]
