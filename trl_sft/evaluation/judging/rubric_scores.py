"""Every answer gets a score from 1 to 5 for each dimension of the rubric, without the other answer beside it.

Inputs: pairs, dimensions, and the judgements on each question. Outputs: scores by pair, and what they tell about each
dimension: means, the paired difference with its interval, and tests after Holm's correction. An answer without a
reference has no score for a dimension that needs one: it is unverified. Not here: the levels (`rubric`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from trl_sft.evaluation import statistics
from trl_sft.evaluation.answer_pairs import BASE, TUNED, AnswerPair
from trl_sft.evaluation.judging import judge_questions
from trl_sft.evaluation.judging.judge_questions import SCORES, JudgeQuestion
from trl_sft.evaluation.judging.judge_replies import INVALID, MISSING, Judgement
from trl_sft.evaluation.judging.pair_outcomes import PairOutcome
from trl_sft.evaluation.judging.rubric import RubricDimension
from trl_sft.evaluation.statistics import BETTER, NOT_RESOLVED, WORSE

UNVERIFIED = "unverified"
_SIDES = (BASE, TUNED)


class ScoreRequest(NamedTuple):
    """One score to ask for."""

    pair: AnswerPair
    dimension: RubricDimension
    side: str  # BASE or TUNED
    question: JudgeQuestion


class RubricScore(NamedTuple):
    """The score of an answer in one dimension."""

    value: float | str  # from 1 to 5; INVALID, MISSING or UNVERIFIED
    reasoning: str


PairScores = dict[str, dict[str, RubricScore]]  # dimension -> side -> score


def plan_scores(
    pairs: Sequence[AnswerPair], dimensions: Sequence[RubricDimension], *, language: str
) -> list[ScoreRequest]:
    """Return the scores to ask for: of both answers of each pair, for each dimension that can be judged.

    Args:
        pairs: of answers.
        dimensions: of the rubric.
        language: `en`, `zh`, or `auto` = that of the prompt.

    """
    requests = []
    for pair in pairs:
        for dimension in dimensions:
            if dimension.needs_reference and not pair.reference:
                continue
            chosen, text = dimension.choose_text(judge_questions.choose_language(pair, language))
            for side in _SIDES:
                question = judge_questions.build_score_question(
                    f"{pair.name}, {side}, {dimension.name}",
                    pair,
                    side,
                    question=text.question,
                    levels=text.levels,
                    language=chosen,
                )
                requests.append(ScoreRequest(pair, dimension, side, question))
    return requests


def collect(
    pairs: Sequence[AnswerPair],
    dimensions: Sequence[RubricDimension],
    *,
    requests: Sequence[ScoreRequest],
    judgements: Sequence[Judgement],
) -> dict[str, PairScores]:
    """Return the scores of each pair, by its name.

    Args:
        pairs: of answers.
        dimensions: of the rubric.
        requests: the scores that were asked for.
        judgements: on each request, in the same order.

    """
    scores: dict[str, PairScores] = {
        pair.name: {dimension.name: {side: RubricScore(UNVERIFIED, "") for side in _SIDES} for dimension in dimensions}
        for pair in pairs
    }
    for request, judgement in zip(requests, judgements, strict=True):
        value: float | str = judgement.choice
        if judgement.weights:  # of a reply in JSON the score itself, of a local judge the expected one
            value = float(np.dot(judgement.weights, np.arange(1, len(SCORES) + 1)))
        scores[request.pair.name][request.dimension.name][request.side] = RubricScore(value, judgement.reasoning)
    return scores


def describe(
    outcomes: Sequence[PairOutcome], scores: dict[str, PairScores], dimensions: Sequence[RubricDimension]
) -> dict[str, Any]:
    """Return the results of each dimension as `eval.json` has them.

    Args:
        outcomes: of the pairs; their prompts are the observations.
        scores: of each pair.
        dimensions: of the rubric.

    """
    results = {}
    for dimension in dimensions:
        rows = [(outcome.prompt_key, scores[outcome.pair.name][dimension.name]) for outcome in outcomes]
        results[dimension.name] = _describe_dimension(rows)
    tested = [result for result in results.values() if result["sign_test_p"] is not None]
    corrected = statistics.correct_p_values([result["sign_test_p"] for result in tested])
    for result, p_value in zip(tested, corrected, strict=True):
        result["holm_p"] = p_value
        if p_value >= statistics.ALPHA and result["resolution"] in (BETTER, WORSE):
            result["resolution"] = NOT_RESOLVED
    return results


def _describe_dimension(rows: Sequence[tuple[str, dict[str, RubricScore]]]) -> dict[str, Any]:
    """Return the result of one dimension; `rows`: the key of the prompt, and the score of each side."""
    values = [(key, [by_side[side].value for side in _SIDES]) for key, by_side in rows]
    counts = {
        word: sum(word in pair for _, pair in values) for word in (INVALID, MISSING, UNVERIFIED)
    }  # pairs that are not counted
    whole = [(key, [float(value) for value in pair]) for key, pair in values if not any(map(_is_word, pair))]
    described: dict[str, Any] = {"rows": len(whole), **counts, "holm_p": None}
    if not whole:
        empty = dict.fromkeys(["base", "tuned", "difference", "better", "tied", "worse", "sign_test_p"])
        return described | empty | {"resolution": UNVERIFIED if counts[UNVERIFIED] else NOT_RESOLVED}
    prompts = [key for key, _ in whole]
    base, tuned = (statistics.average_by_prompt([pair[side] for _, pair in whole], prompts) for side in (0, 1))
    result = statistics.compare_scores(base, tuned)
    return described | {
        "base": result.base,
        "tuned": result.tuned,
        "difference": statistics.describe_interval(result.difference),
        "better": result.better,
        "tied": result.tied,
        "worse": result.worse,
        "sign_test_p": result.p_value,
        "resolution": result.resolution,
    }


def _is_word(value: float | str) -> bool:
    return isinstance(value, str)
