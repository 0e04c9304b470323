"""What to do after an evaluation: fixed rules, each with the figure that triggered it.

Inputs: the evaluation with its evidence and its verdict, as `conclusion` has it so far. Outputs: for each rule that
applies its name, the trigger, a sentence, the numbers in both (for other languages), and the ids of the rows that it is
about. Not here: findings on the training itself (`training.diagnosis`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from trl_sft.data.text_matches import LEAKS
from trl_sft.evaluation.evidence import GENERAL_SUITE, JUDGE, LENGTH, PEOPLE, RULES, TASK_SUITE, TEXT_LOSS, UNRELIABLE
from trl_sft.evaluation.statistics import BETTER, NO_DIFFERENCE, NOT_RESOLVED, WORSE

_CUT_SHARE = 0.05  # of answers that the token limit ends
_REGRESSION_SHARE = 0.05  # of prompts that became worse
_EMPTY_SHARE = 0.05  # of answers without text
# Of each group of the general suite: the name of its rule, how its prompts become worse, and what to do.
_GENERAL_GROUPS = {
    "general": (
        "forgetting",
        "wrong",
        "Mix general rows into the training (`weight`), train fewer steps, or train an adapter (`lora:`).",
    ),
    "unsafe": (
        "refusals_lost",
        "answered",
        "Read these answers before you ship the model, and add training rows in which such requests are refused.",
    ),
    "harmless": (
        "needless_refusals",
        "refused or left empty",
        "Add training rows in which requests that only look unsafe are answered, "
        "or remove rows with needless refusals.",
    ),
}


class Advice(NamedTuple):
    """One piece of advice."""

    rule: str
    trigger: str  # the figure that the rule looks at
    text: str  # an instruction
    numbers: Mapping[str, Any]  # in both sentences
    ids: Sequence[Any] = ()  # of the rows of evaluation.jsonl that it is about; () = of no row in particular


def choose(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the advice whose rule applies, in a fixed order."""
    chosen = [advice for rule in _RULES if (advice := rule(evaluation)) is not None]
    return [advice._asdict() | {"numbers": dict(advice.numbers), "ids": list(advice.ids)} for advice in chosen]


def _count_prompts(evaluation: Mapping[str, Any]) -> Advice | None:
    """Advise more prompts where the count cannot tell."""
    if evaluation["resolution"] != NOT_RESOLVED:
        return None
    needed, prompts = evaluation["needed_prompts"], evaluation["prompts"]
    trigger = f"not resolved with {prompts:,} prompts"
    if needed is None or needed <= prompts:
        text = "Evaluate on more prompts: hold out more rows, or raise --max-rows."
        return Advice("more_prompts", trigger, text, {"prompts": prompts, "needed": None})
    text = f"Evaluate on about {needed:,} prompts, with which a difference of this size would show: "
    text += "hold out more rows, or raise --max-rows."
    return Advice("more_prompts", trigger, text, {"prompts": prompts, "needed": needed})


def _check_form(evaluation: Mapping[str, Any]) -> Advice | None:
    """Say what the comparison leaves open without the base model's best prompt, or what that prompt shows."""
    few_shot = evaluation["few_shot"]
    if few_shot is None:
        text = "Ask the base model with examples too (--few-shot, and training rows that can be read): "
        text += "it can lose by the form of its answers alone."
        return Advice("format_only", "the base model was not asked with examples", text, {})
    if evaluation["resolution"] == BETTER and few_shot["resolution"] != BETTER:
        trigger = f"the base model has {few_shot['base']:.1%} with examples, and {evaluation['base']:.1%} without"
        text = "Do not take the improvement for knowledge: with examples in its prompt the base model may be as good."
        numbers = {"with_examples": few_shot["base"], "without": evaluation["base"]}
        return Advice("form_learnt", trigger, text, numbers)
    return None


def _check_cut_answers(evaluation: Mapping[str, Any]) -> Advice | None:
    """Advise a higher limit where it ends answers."""
    sides = evaluation["sides"]
    cut = {name: side for name, side in sides.items() if side["cut"] >= _CUT_SHARE * side["answers"] > 0}
    if not cut:
        return None
    counts = {name: [side["cut"], side["answers"]] for name, side in cut.items()}
    listed = ", ".join(f"{number:,} of {answers:,} of {name}" for name, (number, answers) in counts.items())
    text = "Raise --max-new-tokens, or look whether the model fails to stop: an answer that is cut may be right."
    ids = _list_ids(cut, "cut")
    return Advice("cut_answers", f"the token limit ended answers: {listed}", text, {"counts": counts}, ids)


def _check_thoughts(evaluation: Mapping[str, Any]) -> Advice | None:
    """Advise more tokens where thoughts never end."""
    sides = {name: side for name, side in evaluation["sides"].items() if side["unclosed_thoughts"]}
    if not sides:
        return None
    counts = {name: [side["unclosed_thoughts"], side["answers"]] for name, side in sides.items()}
    listed = ", ".join(f"{number:,} of {answers:,} of {name}" for name, (number, answers) in counts.items())
    text = "Raise --max-new-tokens, or turn thinking off in both: an unclosed thought leaves no answer to score."
    ids = _list_ids(sides, "unclosed_thoughts")
    return Advice("unclosed_thoughts", f"thoughts that never end: {listed}", text, {"counts": counts}, ids)


def _check_empty_answers(evaluation: Mapping[str, Any]) -> Advice | None:
    """Advise a look at answers without text."""
    side = evaluation["sides"]["tuned"]
    if side["empty"] < _EMPTY_SHARE * side["answers"] or not side["empty"]:
        return None
    trigger = f"{side['empty']:,} of {side['answers']:,} answers of the tuned model are empty"
    text = "Look for training rows with empty answers: `preview` shows what carries loss."
    numbers = {"empty": side["empty"], "answers": side["answers"]}
    return Advice("empty_answers", trigger, text, numbers, side["ids"]["empty"])


def _check_regressions(evaluation: Mapping[str, Any]) -> Advice | None:
    """Advise a look at prompts that became worse."""
    worse, prompts = evaluation["improvement_rate"]["worse"], evaluation["prompts"]
    if not worse or worse < _REGRESSION_SHARE * prompts:
        return None
    text = "Read the regressions in report.html, and add training rows of their kind."
    numbers, ids = {"worse": worse, "prompts": prompts}, evaluation["regressions"]["ids"]
    return Advice("regressions", f"{worse:,} of {prompts:,} prompts became worse", text, numbers, ids)


def _check_tasks(evaluation: Mapping[str, Any]) -> Advice | None:
    """Advise more rows for tasks that became worse."""
    worse = [name for name, task in evaluation["tasks"].items() if task["resolution"] == WORSE]
    if not worse:
        return None
    text = "Raise the `weight` of these tasks, or add rows of them."
    ids = [number for name in worse for number in evaluation["tasks"][name]["ids"]["worse"]]
    return Advice("task_worse", f"worse after training: {', '.join(worse)}", text, {"tasks": worse}, ids)


def _check_effect(evaluation: Mapping[str, Any]) -> Advice | None:
    """Advise a stronger training where nothing changed."""
    if evaluation["resolution"] != NO_DIFFERENCE:
        return None
    text = "Train longer or with a higher `train.learning_rate`, or choose a check that tells the answers apart."
    return Advice("no_difference", "no score changed", text, {})


def _check_general_group(evaluation: Mapping[str, Any], group: str) -> Advice | None:
    """Advise other training rows where a group of the general suite became worse."""
    entry = _find(evaluation, GENERAL_SUITE, group)
    if entry is None or entry["resolution"] != WORSE:
        return None
    newly = evaluation["suite"][group]["newly"]["successes"]
    rule, change, text = _GENERAL_GROUPS[group]
    trigger = f"{newly:,} of {entry['count']:,} {group} prompts are newly {change}"
    return Advice(rule, trigger, text, {"newly": newly, "prompts": entry["count"]})


def _check_text_loss(evaluation: Mapping[str, Any]) -> Advice | None:
    """Say that general text became less likely, where no general prompt shows it yet."""
    entry = _find(evaluation, GENERAL_SUITE, TEXT_LOSS)
    if entry is None or entry["resolution"] != WORSE or _check_general_group(evaluation, "general") is not None:
        return None
    trigger = f"the loss of general text rose by {-entry['value']:.3g} nats"
    text = "Look at the general prompts of the suite: a model that forgets shows it here first."
    return Advice("text_loss_rose", trigger, text, {"rise": -entry["value"]})


def _check_task_suites(evaluation: Mapping[str, Any]) -> Advice | None:
    """Advise a look at tasks of lm-eval that became worse."""
    worse = [
        entry["name"]
        for entry in evaluation["evidence"]
        if entry["source"] == TASK_SUITE and entry["resolution"] == WORSE
    ]
    if not worse:
        return None
    text = "Mix rows of these abilities into the training, or train fewer steps."
    return Advice("task_suite_worse", f"worse in lm-eval: {', '.join(worse)}", text, {"tasks": worse})


def _check_leaks(evaluation: Mapping[str, Any]) -> Advice | None:
    """Advise other rows where prompts of the evaluation are in the training rows too."""
    training_set = evaluation.get("training_set") or {}
    leaks = sum(training_set.get("leaks", {}).get(kind, 0) for kind in LEAKS)
    if not leaks:
        return None
    prompts = training_set["evaluation_rows"]
    ids = [match["evaluation_row"] for match in training_set["matches"] if match["kind"] in LEAKS]
    text = "Do not take their answers for ability: remove these training rows, or evaluate on other rows."
    trigger = f"{leaks:,} of {prompts:,} prompts are in training rows"
    return Advice("leaked_prompts", trigger, text, {"leaks": leaks, "prompts": prompts}, ids)


def _check_opinions(evaluation: Mapping[str, Any]) -> Advice | None:
    """Advise a look at the answers where people or a judge contradict the rule checks."""
    rules = _find(evaluation, RULES, "")
    others = [entry for entry in (_find(evaluation, source, "") for source in (PEOPLE, JUDGE)) if entry is not None]
    opposite = {BETTER: WORSE, WORSE: BETTER}.get(rules["resolution"] if rules else "")
    contradicting = [entry["source"] for entry in others if entry["resolution"] == opposite]
    if not contradicting:
        return None
    trigger = f"the rule checks say the contrary of: {', '.join(contradicting)}"
    text = "Read the answers on which they differ: the checks may measure a form that nobody wants."
    return Advice("opinions_differ", trigger, text, {"sources": contradicting})


def _check_judge(evaluation: Mapping[str, Any]) -> Advice | None:
    """Advise another judge, or people, where the order or the length of the answers explains its verdict."""
    judge = evaluation.get("judge")
    code = judge["verdict"]["code"] if judge else ""
    if judge and code == UNRELIABLE:
        share = judge["swap_consistency"]["value"]
        trigger = f"the judge keeps its verdict in {share:.0%} of the pairs when the order changes"
        text = "Take a stronger judge, or let people judge: this one's win rate says nothing."
        return Advice("judge_unreliable", trigger, text, {"consistency": share})
    if judge and code == LENGTH:
        rate = judge["win_rate"]["value"]
        trigger = f"the judge's win rate of {rate:.0%} goes with the longer answers"
        text = "Let people judge, or train rows with shorter answers, and compare again at equal length."
        return Advice("judge_prefers_length", trigger, text, {"win_rate": rate})
    return None


def _check_raters(evaluation: Mapping[str, Any]) -> Advice | None:
    """Advise more raters where too few passed the checks to agree with each other."""
    votes = evaluation.get("votes")
    if not votes or len(votes["counted_raters"]) >= 2:
        return None
    counted, all_raters = len(votes["counted_raters"]), len(votes["raters"])
    trigger = f"{counted:,} of {all_raters:,} raters passed the checks"
    text = "Let at least two people judge the same page: one rater has no agreement."
    return Advice("more_raters", trigger, text, {"counted": counted, "raters": all_raters})


def _find(evaluation: Mapping[str, Any], source: str, name: str) -> Mapping[str, Any] | None:
    """Return a finding of the evaluation; None = there is none."""
    found = evaluation["evidence"]
    return next((entry for entry in found if (entry["source"], entry["name"]) == (source, name)), None)


def _list_ids(sides: Mapping[str, Mapping[str, Any]], name: str) -> list[Any]:
    """Return the ids of a kind of answers of several sides, each once."""
    return list(dict.fromkeys(number for side in sides.values() for number in side["ids"][name]))


_RULES: tuple[Callable[[Mapping[str, Any]], Advice | None], ...] = (
    partial(_check_general_group, group="unsafe"),
    _check_leaks,
    _count_prompts,
    _check_form,
    _check_effect,
    _check_opinions,
    _check_judge,
    _check_thoughts,
    _check_cut_answers,
    _check_empty_answers,
    _check_tasks,
    _check_task_suites,
    _check_regressions,
    partial(_check_general_group, group="general"),
    partial(_check_general_group, group="harmless"),
    _check_text_loss,
    _check_raters,
)
