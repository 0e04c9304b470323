"""What people's scores tell: from 1 to 5 for each answer and dimension, base beside tuned.

Inputs: the pairs of a page, and the votes of the raters who count. Outputs: the mapping that `votes` shows under
`scores`, and the test on answers called harmful. A pair is one observation: of several raters the mean of its scores.
Not here: which answer is better (`human_votes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trl_sft.evaluation import statistics
from trl_sft.evaluation.answer_pairs import BASE, TUNED
from trl_sft.evaluation.statistics import BETTER, NOT_RESOLVED, WORSE
from trl_sft.evaluation.vote_files import DIMENSIONS, LEFT, RIGHT, KeyItem, RaterVotes


def describe_scores(pairs: Sequence[KeyItem], raters: Sequence[RaterVotes]) -> dict[str, Any]:
    """Return the scores of each dimension that a rater gave to both answers of a pair; p-values after Holm.

    Args:
        pairs: the items of the page that are pairs, repeats left out.
        raters: whose votes count.

    """
    results = {}
    for dimension in DIMENSIONS:
        means = [found for item in pairs if (found := _average(item, raters, dimension)) is not None]
        if means:
            base, tuned = (np.array(side) for side in zip(*means, strict=True))
            results[dimension] = statistics.compare_scores(base, tuned)
    corrected = statistics.correct_p_values([result.p_value for result in results.values()])
    described = {}
    for (dimension, result), p_value in zip(results.items(), corrected, strict=True):
        resolution = statistics.resolve(
            result.difference, p_value, prompts=result.prompts, decisive=result.better + result.worse
        )
        described[dimension] = {
            "pairs": result.prompts,
            "base": result.base,
            "tuned": result.tuned,
            "difference": statistics.describe_interval(result.difference),
            "better": result.better,
            "tied": result.tied,
            "worse": result.worse,
            "sign_test_p": result.p_value,
            "holm_p": p_value,
            "resolution": resolution,
        }
    return described


def describe_harm(pairs: Sequence[KeyItem], raters: Sequence[RaterVotes]) -> dict[str, Any]:
    """Return in which pairs only one answer was called harmful by a rater who counts, with the exact sign test."""
    only: dict[str, list[str]] = {BASE: [], TUNED: []}
    for item in pairs:
        marked = {
            item.left if mark == LEFT else item.right
            for rater in raters
            if item.item in rater.votes
            for mark in rater.votes[item.item].harmful
        }
        if len(marked) == 1:
            only[marked.pop()].append(item.pair)
    p_value = statistics.compute_sign_test(len(only[BASE]), len(only[TUNED]))
    resolution = NOT_RESOLVED
    if p_value < statistics.ALPHA:
        resolution = BETTER if len(only[BASE]) > len(only[TUNED]) else WORSE
    return {"only_base": only[BASE], "only_tuned": only[TUNED], "p_value": p_value, "resolution": resolution}


def list_notes(items: Sequence[KeyItem], raters: Sequence[RaterVotes]) -> list[dict[str, str]]:
    """Return the notes of all raters, by item."""
    return [
        {"rater": rater.rater, "pair": item.pair, "note": rater.votes[item.item].note}
        for item in items
        for rater in raters
        if item.item in rater.votes and rater.votes[item.item].note
    ]


def _average(item: KeyItem, raters: Sequence[RaterVotes], dimension: str) -> tuple[float, float] | None:
    """Return the mean scores of base and tuned over the raters who scored both; None = nobody did."""
    sides = (LEFT, RIGHT) if item.left == BASE else (RIGHT, LEFT)
    scores = []
    for rater in raters:
        given = rater.votes[item.item].scores if item.item in rater.votes else {}
        values = [given.get(side, {}).get(dimension) for side in sides]
        if None not in values:
            scores.append(values)
    if not scores:
        return None
    base, tuned = np.mean(np.array(scores, dtype=float), axis=0)
    return float(base), float(tuned)
