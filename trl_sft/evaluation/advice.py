"""What to do after an evaluation: fixed rules, each with the figure that triggered it.

Inputs: the verdict as `verdict.build` has it so far. Outputs: a list of rule, trigger and sentence for `eval.json` and
the screen. Not here: findings on the training itself (`training.diagnosis`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trl_sft.evaluation.statistics import BETTER, NO_DIFFERENCE, NOT_RESOLVED, WORSE

_CUT_SHARE = 0.05  # of answers that the token limit ends
_REGRESSION_SHARE = 0.05  # of prompts that became worse
_EMPTY_SHARE = 0.05  # of answers without text

Advice = tuple[str, str, str]  # rule, trigger, sentence


def choose(evaluation: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the advice whose rule applies, in a fixed order."""
    advice = [given for rule in _RULES if (given := rule(evaluation)) is not None]
    return [{"rule": rule, "trigger": trigger, "text": text} for rule, trigger, text in advice]


def _count_prompts(evaluation: Mapping[str, Any]) -> Advice | None:
    """Advise more prompts where the count cannot tell."""
    if evaluation["resolution"] != NOT_RESOLVED:
        return None
    needed, prompts = evaluation["needed_prompts"], evaluation["prompts"]
    trigger = f"not resolved with {prompts:,} prompts"
    if needed is None or needed <= prompts:
        return "more_prompts", trigger, "Evaluate on more prompts: hold out more rows, or raise --max-rows."
    text = (
        f"Evaluate on about {needed:,} prompts, with which a difference of this size would show: hold out more rows, "
    )
    return "more_prompts", trigger, f"{text}or raise --max-rows."


def _check_form(evaluation: Mapping[str, Any]) -> Advice | None:
    """Say what the comparison leaves open without the base model's best prompt, or what that prompt shows."""
    few_shot = evaluation["few_shot"]
    if few_shot is None:
        text = (
            "Ask the base model with examples too (--few-shot, and training rows that can be read): it can lose by the "
        )
        text += "form of its answers alone."
        return "format_only", "the base model was not asked with examples", text
    if evaluation["resolution"] == BETTER and few_shot["resolution"] != BETTER:
        trigger = f"the base model has {few_shot['base']:.1%} with examples, and {evaluation['base']:.1%} without"
        text = "Do not take the improvement for knowledge: with examples in its prompt the base model may be as good."
        return "form_learnt", trigger, text
    return None


def _check_cut_answers(evaluation: Mapping[str, Any]) -> Advice | None:
    """Advise a higher limit where it ends answers."""
    cut = {name: side for name, side in evaluation["sides"].items() if side["cut"] >= _CUT_SHARE * side["answers"] > 0}
    if not cut:
        return None
    counts = ", ".join(f"{side['cut']:,} of {side['answers']:,} of {name}" for name, side in cut.items())
    text = "Raise --max-new-tokens, or look whether the model fails to stop: an answer that is cut may be right."
    return "cut_answers", f"the token limit ended answers: {counts}", text


def _check_thoughts(evaluation: Mapping[str, Any]) -> Advice | None:
    """Advise more tokens where thoughts never end."""
    counts = {name: side["unclosed_thoughts"] for name, side in evaluation["sides"].items()}
    if not any(counts.values()):
        return None
    listed = ", ".join(f"{count:,} of {name}" for name, count in counts.items() if count)
    text = "Raise --max-new-tokens, or turn thinking off in both: an unclosed thought leaves no answer to score."
    return "unclosed_thoughts", f"thoughts that never end: {listed}", text


def _check_empty_answers(evaluation: Mapping[str, Any]) -> Advice | None:
    """Advise a look at answers without text."""
    side = evaluation["sides"]["tuned"]
    if side["empty"] < _EMPTY_SHARE * side["answers"] or not side["empty"]:
        return None
    trigger = f"{side['empty']:,} of {side['answers']:,} answers of the tuned model are empty"
    return "empty_answers", trigger, "Look for training rows with empty answers: `preview` shows what carries loss."


def _check_regressions(evaluation: Mapping[str, Any]) -> Advice | None:
    """Advise a look at prompts that became worse."""
    worse, prompts = evaluation["improvement_rate"]["worse"], evaluation["prompts"]
    if not worse or worse < _REGRESSION_SHARE * prompts:
        return None
    text = "Read the regressions in report.html, and add training rows of their kind."
    return "regressions", f"{worse:,} of {prompts:,} prompts became worse", text


def _check_tasks(evaluation: Mapping[str, Any]) -> Advice | None:
    """Advise more rows for tasks that became worse."""
    worse = [name for name, task in evaluation["tasks"].items() if task["resolution"] == WORSE]
    if not worse:
        return None
    text = "Raise the `weight` of these tasks, or add rows of them."
    return "task_worse", f"worse after training: {', '.join(worse)}", text


def _check_effect(evaluation: Mapping[str, Any]) -> Advice | None:
    """Advise a stronger training where nothing changed."""
    if evaluation["resolution"] != NO_DIFFERENCE:
        return None
    text = "Train longer or with a higher `train.learning_rate`, or choose a check that tells the answers apart."
    return "no_difference", "no score changed", text


_RULES: tuple[Callable[[Mapping[str, Any]], Advice | None], ...] = (
    _count_prompts,
    _check_form,
    _check_effect,
    _check_thoughts,
    _check_cut_answers,
    _check_empty_answers,
    _check_tasks,
    _check_regressions,
)
