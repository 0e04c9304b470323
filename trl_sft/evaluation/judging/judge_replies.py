"""A judge's reply is read by one rule, and what does not keep to it is invalid: never a tie.

The rule: the reply is one JSON object and nothing else. Its first key is `reasoning`, a text; then comes `verdict` (A,
B or tie) or `score` (a whole number from 1 to 5), as the question asks. `confidence`, a number from 0 to 1, may be
there. No other key, no key twice. Two things are removed first: a closed thought (`thoughts.RULE`), and a code fence
around the whole. Inputs: what a model answered. Outputs: a `Judgement`. Not here: what follows from two judgements
(`pair_outcomes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from trl_sft.evaluation import thoughts
from trl_sft.evaluation.call_log import ModelAnswer
from trl_sft.evaluation.checks import json_answer
from trl_sft.evaluation.judging.judge_questions import JudgeQuestion

INVALID, MISSING = "invalid", "not_judged"  # in place of a choice
_REASONING, _CONFIDENCE = "reasoning", "confidence"


class Judgement(NamedTuple):
    """What a judge said to one question."""

    choice: str  # one of the options; INVALID = the reply cannot be read; MISSING = there is none
    weights: tuple[float, ...]  # the probability of each option; () = none can be read
    reasoning: str  # "" = none
    problem: str  # why there is no choice; "" = there is one


class _ReplyError(ValueError):
    """What is wrong with a reply."""


def read_reply(answer: ModelAnswer, question: JudgeQuestion) -> Judgement:
    """Return the judgement in an answer of a model, by the rule of this module."""
    try:
        if answer.refusal:
            raise _ReplyError("the judge refused")
        if answer.finish == "length":
            raise _ReplyError("the reply was cut at the limit of tokens")
        reply = _parse(answer.text)
        return _read_choice(reply, question)
    except _ReplyError as error:
        return Judgement(INVALID, (), "", str(error))


def choose(options: Sequence[str], choice: str) -> tuple[float, ...]:
    """Return weights that are 1 for one option."""
    return tuple(float(option == choice) for option in options)


def _parse(text: str) -> dict[str, Any]:
    """Return the JSON object of a reply. Raises _ReplyError."""
    split = thoughts.split_thought(text, *thoughts.COMMON_MARKS)
    if not split.is_closed:
        raise _ReplyError("the thought never ends")
    value = json_answer.read_json(split.answer, refuses_double_keys=True)
    if value is json_answer.INVALID:
        raise _ReplyError("it is not one JSON object and nothing else")
    if not isinstance(value, dict):
        raise _ReplyError("it is JSON, but no object")
    return value


def _read_choice(reply: dict[str, Any], question: JudgeQuestion) -> Judgement:
    """Return the judgement of a JSON object. Raises _ReplyError."""
    field = question.field
    for key in (_REASONING, field):
        if key not in reply:
            raise _ReplyError(f"the key {key} is missing")
    for key in reply:
        if key not in (_REASONING, field, _CONFIDENCE):
            raise _ReplyError(f"the key {key[:40]} is unknown")
    if next(iter(reply)) != _REASONING:
        raise _ReplyError(f"{_REASONING} does not come first")
    reasoning, value = reply[_REASONING], reply[field]
    if not isinstance(reasoning, str):
        raise _ReplyError(f"{_REASONING} is no text")
    is_right_type = (
        isinstance(value, str) if question.is_pair else isinstance(value, int) and not isinstance(value, bool)
    )
    if not is_right_type or str(value) not in question.options:
        raise _ReplyError(f"{field} is none of {', '.join(question.options)}")
    confidence = reply.get(_CONFIDENCE, 0)
    if not isinstance(confidence, int | float) or isinstance(confidence, bool) or not 0 <= confidence <= 1:
        raise _ReplyError(f"{_CONFIDENCE} is no number from 0 to 1")
    return Judgement(str(value), choose(question.options, str(value)), reasoning, "")
