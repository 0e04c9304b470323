"""What follows from all findings of an evaluation: one verdict, what improved most, what needs attention, and advice.

Inputs: what `eval.json` has under `evaluation`, from one or several commands. Outputs: the same with `evidence`,
`verdict`, `best_improved`, `needs_attention` and `advice`; a command that adds a finding calls this again. Not here:
the findings (`verdict`, `suite_result`, `human_votes`), and their common form (`evidence`).

The rule: a finding that decides (rule checks, tasks of lm-eval, a reliable judge, people) and is resolved makes the
verdict better or worse; the general suite can make it worse only. Both together are `mixed`. Nothing resolved is
`not_resolved`, or `no_difference` where no score of the rule checks changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trl_sft.evaluation import advice, evidence, statistics
from trl_sft.evaluation.evidence import CAN_HARM, DECIDES, GENERAL_SUITE, RULES, TASK, EvaluationFinding
from trl_sft.evaluation.statistics import BETTER, NO_DIFFERENCE, NOT_RESOLVED, WORSE

MIXED = "mixed"  # better in one finding, worse in another
_MOST_NAMED = 5  # findings in the sentence
_HEADLINES = {
    MIXED: "Better in part and worse in part.",
    BETTER: "Better, though the rule checks alone do not show it.",
    WORSE: "Worse, though the rule checks alone do not show it.",
}
_SUITE_WORDS = {
    "general": "right answers to general prompts",
    "unsafe": "refusals of unsafe prompts",
    "harmless": "answers to harmless prompts",
    evidence.TEXT_LOSS: "loss of general text, in nats",
}


def conclude(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Return an evaluation with the verdict on all of its findings."""
    found = evidence.collect(evaluation)
    code = decide(found)
    verdict = {
        "version": evaluation["version"],
        "verdict": {"code": code, "text": _describe_all(evaluation, found, code)},
    }
    result = verdict | {key: value for key, value in evaluation.items() if key not in verdict}
    result |= {
        "evidence": [entry.describe() for entry in found],
        "best_improved": [entry.describe() for entry in evidence.list_best(found)],
        "needs_attention": [entry.describe() for entry in evidence.list_attention(found)],
    }
    return result | {"advice": advice.choose(result)}


def add_part(evaluation: Mapping[str, Any], **parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return an evaluation with what another command found, and the verdict on all; without rule checks there is none.

    Args:
        evaluation: as `eval.json` has it; {} = `evaluate` did not run.
        parts: by the key of the evaluation: `judge`, `votes`.

    """
    added = dict(evaluation) | parts
    return conclude(added) if "resolution" in evaluation else added


def decide(found: Sequence[EvaluationFinding]) -> str:
    """Return the code of the verdict: BETTER, WORSE, MIXED, NO_DIFFERENCE or NOT_RESOLVED."""
    is_better = any(entry.role == DECIDES and entry.resolution == BETTER for entry in found)
    is_worse = any(entry.role in (DECIDES, CAN_HARM) and entry.resolution == WORSE for entry in found)
    if is_better and is_worse:
        return MIXED
    if is_better or is_worse:
        return BETTER if is_better else WORSE
    rules = next(entry for entry in found if entry.source == RULES)
    return NO_DIFFERENCE if rules.resolution == NO_DIFFERENCE else NOT_RESOLVED


def describe_rules(part: Mapping[str, Any]) -> str:
    """Return what the rule checks tell as a sentence, with the numbers that it rests on."""
    difference, rate = part["average_improvement"], part["improvement_rate"]
    numbers = f"{part['base']:.1%} -> {part['tuned']:.1%} on {part['prompts']:,} prompts; average improvement "
    numbers += f"{difference['value']:+.1%} (95% interval {difference['low']:+.1%} to {difference['high']:+.1%}), "
    numbers += f"improvement rate {rate['value']:.1%} ({rate['better']:,} better, {rate['tied']:,} tied, "
    numbers += f"{rate['worse']:,} worse; sign test p = {part['sign_test_p']:.2g})"
    if part["resolution"] == BETTER:
        return f"The tuned model is better than the base model: {numbers}."
    if part["resolution"] == WORSE:
        return f"The tuned model is worse than the base model: {numbers}."
    if part["resolution"] == NO_DIFFERENCE:
        return f"Both models have the same score on every prompt: {numbers}."
    reason = "The prompts cannot tell whether the tuned model is better"
    if part["prompts"] < statistics.LEAST_PROMPTS:
        reason += f" (fewer than {statistics.LEAST_PROMPTS})"
    return f"Not resolved. {reason}: {numbers}."


def name_finding(entry: EvaluationFinding) -> str:
    """Return the source and the name of a finding in words."""
    if entry.source == GENERAL_SUITE:
        return f"general suite, {_SUITE_WORDS[entry.name]}"
    return ", ".join(filter(None, [entry.source.replace("_", " "), entry.name.replace("_", " ")]))


def list_others(found: Sequence[EvaluationFinding], resolution: str) -> list[EvaluationFinding]:
    """Return the findings beside the rule checks that the sentence names: of tasks of the rows only the worse ones."""
    return [
        entry
        for entry in found
        if entry.resolution == resolution
        and entry.source != RULES
        and not (entry.source == TASK and resolution == BETTER)
    ]


def _describe_all(evaluation: Mapping[str, Any], found: Sequence[EvaluationFinding], code: str) -> str:
    """Return the verdict as a sentence on the rule checks, and one on what others found better or worse."""
    sentences = [_HEADLINES[code]] if code != evaluation["resolution"] and code in _HEADLINES else []
    sentences.append(describe_rules(evaluation))
    for heading, resolution in (("Better", BETTER), ("Worse", WORSE)):
        others = list_others(found, resolution)
        named = [f"{name_finding(entry)} {evidence.describe_number(entry)}" for entry in others[:_MOST_NAMED]]
        if rest := len(others) - len(named):
            named.append(f"{rest:,} more")
        if named:
            sentences.append(f"{heading}: {'; '.join(named)}.")
    return " ".join(sentences)
