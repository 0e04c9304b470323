"""What a judge's outcomes tell: win rates with their intervals and checks, scores by dimension, and one sentence.

Inputs: outcomes of pairs, and scores of the rubric. Outputs: the mapping that `eval.json` has under `evaluation.judge`.
Every number follows from `verdicts.jsonl` alone. Rows with the same prompt are one observation. Not here: how the judge
was asked (`pair_outcomes`, `rubric_scores`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trl_sft.evaluation import statistics
from trl_sft.evaluation.answer_pairs import BASE, TUNED
from trl_sft.evaluation.judging import length_control, pair_outcomes
from trl_sft.evaluation.judging.judge_replies import INVALID, MISSING
from trl_sft.evaluation.judging.pair_outcomes import PairOutcome
from trl_sft.evaluation.statistics import BETTER, NO_DIFFERENCE, NOT_RESOLVED, WORSE, Interval
from trl_sft.evaluation.vote_files import TIE

VERSION = 1  # of the form of `judge` in eval.json
UNRELIABLE, LENGTH = "unreliable", "length"  # codes of a verdict, beside those of `statistics`
CHANCE = 0.5  # the swap consistency of a judge that draws A or B by chance
MOST_INVALID = 0.02  # of the pairs, or of the answers that a dimension scores


def describe_outcomes(outcomes: Sequence[PairOutcome]) -> dict[str, Any]:
    """Return the counts, rates and tests of outcomes, as `eval.json` has them.

    Args:
        outcomes: of all pairs, or of those of a task.

    """
    counted = [outcome for outcome in outcomes if outcome.verdict not in (INVALID, MISSING)]
    verdicts = [outcome.verdict for outcome in outcomes]
    described: dict[str, Any] = {
        "pairs": len(outcomes),
        **{verdict: verdicts.count(verdict) for verdict in (TUNED, BASE, TIE, INVALID, MISSING)},
        "equal_answers": sum(not outcome.orders for outcome in outcomes),
        **_describe_orders(outcomes),
    }
    if not counted:
        empty = dict.fromkeys(["prompts", "win_rate", "soft_win_rate", "length_controlled", "needed_prompts"])
        return described | empty | {"sign_test_p": 1.0, "resolution": NOT_RESOLVED}
    prompts = [outcome.prompt_key for outcome in counted]
    scores = statistics.average_by_prompt([pair_outcomes.SCORES[outcome.verdict] for outcome in counted], prompts)
    soft = None  # the rate of probabilities; an endpoint gives none
    if any(outcome.has_probabilities for outcome in counted):
        soft_scores = statistics.average_by_prompt([outcome.soft_score for outcome in counted], prompts)
        soft = statistics.describe_interval(statistics.bootstrap_mean(soft_scores))
    differences = statistics.average_by_prompt([_get_difference(outcome) for outcome in counted], prompts)
    win_rate = statistics.bootstrap_mean(scores)
    better, worse = int((scores > 0.5 + 1e-12).sum()), int((scores < 0.5 - 1e-12).sum())
    p_value = statistics.compute_sign_test(better, worse)
    lengths = {
        side: float(np.mean([len(outcome.pair.get_answer(side)) for outcome in counted])) for side in (BASE, TUNED)
    }
    return described | {
        "prompts": len(scores),
        "win_rate": statistics.describe_interval(win_rate),
        "soft_win_rate": soft,
        "length_controlled": length_control.control_length(scores, differences).describe() | {"characters": lengths},
        "sign_test_p": p_value,
        "needed_prompts": statistics.compute_needed_prompts(better, worse, len(scores)),
        "resolution": _resolve(win_rate, p_value, prompts=len(scores), decisive=better + worse),
    }


def build(
    outcomes: Sequence[PairOutcome],
    *,
    dimensions: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what `eval.json` has under `evaluation.judge`.

    Args:
        outcomes: of every pair of the evaluation that was to be judged.
        dimensions: results of the rubric, by name.
        facts: `judge`, `audit`, `language`, `seed`, `warnings`, `tokens`, `cost`, `stop` as they are written.

    """
    overall = describe_outcomes(outcomes)
    reliability = describe_reliability(overall)
    code = _choose_code(overall, reliability)
    if code in (UNRELIABLE, LENGTH, NOT_RESOLVED):
        overall["resolution"] = NOT_RESOLVED
    is_partial = bool(overall[MISSING]) or any(result[MISSING] for result in dimensions.values())
    result: dict[str, Any] = {
        "version": VERSION,
        "verdict": {"code": code, "text": ""},
        "is_partial": is_partial,
        **facts,
        **overall,
        "reliability": reliability,
        "tasks": _describe_tasks(outcomes, is_reliable=reliability["is_reliable"]),
        "dimensions": dict(dimensions),
        "won": {side: [outcome.pair.name for outcome in outcomes if outcome.verdict == side] for side in (TUNED, BASE)},
    }
    result["verdict"]["text"] = describe_verdict(result)
    return result


def describe_reliability(overall: Mapping[str, Any]) -> dict[str, Any]:
    """Return whether a judge keeps its verdict when the order changes, and why not.

    The lower end of the 95% interval of its swap consistency has to be above 0.5, which a coin reaches. A higher
    consistency of few pairs tells nothing.
    """
    consistency = overall["swap_consistency"]
    if consistency is None:
        return {"is_reliable": None, "reason": "no pair was judged in both orders"}
    if consistency["low"] > CHANCE:
        return {"is_reliable": True, "reason": ""}
    judged = overall["pairs"] - overall["equal_answers"] - overall[INVALID] - overall[MISSING]
    if judged < statistics.LEAST_PROMPTS and consistency["value"] > CHANCE:
        return {"is_reliable": None, "reason": f"{judged} judged pairs are too few to tell"}
    reason = f"it keeps its verdict in {consistency['value']:.0%} of the pairs when the order of the answers changes"
    reason += f" (95% interval {consistency['low']:.0%} to {consistency['high']:.0%}); chance gives {CHANCE:.0%}"
    return {"is_reliable": False, "reason": reason}


def describe_verdict(result: Mapping[str, Any]) -> str:
    """Return the verdict as a sentence, with the numbers that it rests on."""
    code = result["verdict"]["code"]
    marks = []
    if result["is_partial"]:
        marks.append(f"Partial: {result['pairs'] - result[MISSING]:,} of {result['pairs']:,} pairs are judged")
    if result["audit"]["skipped"]:
        marks.append("The judge was not audited (--skip-audit)")
    marks += [f"Warning: {warning}" for warning in result["warnings"]]
    start = "".join(f"{mark}. " for mark in marks)
    if result["win_rate"] is None:
        return f"{start}Not resolved. No pair has a verdict."
    rate = result["win_rate"]
    numbers = f"win rate {rate['value']:.1%} (95% interval {rate['low']:.1%} to {rate['high']:.1%}; ties count half)"
    numbers += f", {result[TUNED]:,} won, {result[TIE]:,} tied, {result[BASE]:,} lost"
    numbers += f", sign test p = {result['sign_test_p']:.2g}"
    sentences = {
        BETTER: "The judge prefers the tuned model",
        WORSE: "The judge prefers the base model",
        NO_DIFFERENCE: "The judge sees no difference in any pair",
        NOT_RESOLVED: "Not resolved. The pairs cannot tell which model the judge prefers",
        UNRELIABLE: f"Judge unreliable: {result['reliability']['reason']}",
        LENGTH: "Not resolved. The length of the answers may explain what the judge prefers",
    }
    if code == NOT_RESOLVED and result["prompts"] < statistics.LEAST_PROMPTS:
        numbers += f"; fewer than {statistics.LEAST_PROMPTS} prompts are judged"
    elif code == NOT_RESOLVED and (result["needed_prompts"] or 0) > result["prompts"]:
        numbers += f"; about {result['needed_prompts']:,} prompts would be needed"
    return f"{start}{sentences[code]}: {numbers}."


def _describe_orders(outcomes: Sequence[PairOutcome]) -> dict[str, Any]:
    """Return swap consistency and first-position rate; None where nothing counts for one."""
    judged = [outcome for outcome in outcomes if outcome.is_judged]
    decided = [order.choice for outcome in judged for order in outcome.orders if order.prefers != TIE]
    consistent = sum(outcome.is_consistent for outcome in judged)
    first = decided.count("A")
    return {
        "swap_consistency": statistics.describe_interval(statistics.compute_rate(consistent, len(judged)))
        if judged
        else None,
        "first_position_rate": statistics.describe_interval(statistics.compute_rate(first, len(decided)))
        if decided
        else None,
    }


def _resolve(rate: Interval, p_value: float, *, prompts: int, decisive: int) -> str:
    """Return whether a win rate differs from a half: the interval and the sign test have to agree."""
    difference = Interval(*(value - 0.5 for value in rate))
    return statistics.resolve(difference, p_value, prompts=prompts, decisive=decisive)


def _choose_code(overall: Mapping[str, Any], reliability: Mapping[str, Any]) -> str:
    """Return the code of the verdict: an unreliable judge and the length of answers come before a winner."""
    if reliability["is_reliable"] is False:
        return UNRELIABLE
    code = str(overall["resolution"])
    if code not in (BETTER, WORSE):
        return code
    if reliability["is_reliable"] is None:
        return NOT_RESOLVED
    return LENGTH if _is_explained_by_length(overall, code) else code


def _is_explained_by_length(overall: Mapping[str, Any], code: str) -> bool:
    """Tell whether a win may be one of length: the winner's answers are longer, and nothing is left at equal length."""
    controlled = overall["length_controlled"]
    lengths = controlled["characters"]
    winner, loser = (TUNED, BASE) if code == BETTER else (BASE, TUNED)
    rate = controlled["win_rate"]
    if lengths[winner] <= lengths[loser]:  # judges prefer long answers, so length does not explain this win
        return False
    if rate is None or length_control.ONE_SIDED in controlled["warnings"]:
        return True
    return bool(rate["low"] <= 0.5 if code == BETTER else rate["high"] >= 0.5)


def _describe_tasks(outcomes: Sequence[PairOutcome], *, is_reliable: bool | None) -> dict[str, Any]:
    """Return the results of each task, with p-values after Holm's correction; {} = the rows name no task."""
    names = sorted({outcome.pair.task for outcome in outcomes})
    if names in ([], [""]):
        return {}
    tasks = {name: describe_outcomes([outcome for outcome in outcomes if outcome.pair.task == name]) for name in names}
    corrected = statistics.correct_p_values([task["sign_test_p"] for task in tasks.values()])
    for task, p_value in zip(tasks.values(), corrected, strict=True):
        task["holm_p"] = p_value
        code = task["resolution"]
        is_claim = code in (BETTER, WORSE)
        if is_claim and (p_value >= statistics.ALPHA or not is_reliable or _is_explained_by_length(task, code)):
            task["resolution"] = NOT_RESOLVED
    return tasks


def _get_difference(outcome: PairOutcome) -> float:
    """Return by how many characters the tuned answer is longer."""
    return float(len(outcome.pair.tuned) - len(outcome.pair.base))
