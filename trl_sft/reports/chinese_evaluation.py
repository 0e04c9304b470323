"""The verdict of `evaluate`, its findings and its advice in Chinese.

Inputs: what `eval.json` has under `evaluation`. Outputs: Chinese texts, made of codes and numbers; None where the file
has another form or a rule has no translation, so that the page shows the English text. The sentences stand in
`chinese_evaluation.yaml`. Not here: the verdict on the training (`chinese`), and labels of the page (`texts.yaml`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trl_sft.evaluation import conclusion, evidence, statistics
from trl_sft.evaluation.evidence import EvaluationFinding
from trl_sft.evaluation.statistics import BETTER, WORSE

_MOST_NAMED = 5  # findings in the sentence
_ODD_FORM = (KeyError, TypeError, ValueError, IndexError, AttributeError)  # of a file that another version wrote


def translate_verdict(evaluation: Mapping[str, Any]) -> str | None:
    """Return the sentence of the verdict in Chinese."""
    try:
        found = [EvaluationFinding.read(entry) for entry in evaluation["evidence"]]
        code = str(evaluation["verdict"]["code"])
        texts = _read_texts()
        resolution = evaluation["resolution"]
        sentences = [texts["headlines"][code]] if code != resolution and code in texts["headlines"] else []
        sentences.append(_describe_rules(evaluation))
        for key, wanted in (("better_too", BETTER), ("worse_too", WORSE)):
            if others := conclusion.list_others(found, wanted):
                sentences.append(texts[key].format(names=_join_findings(others)))
        return "".join(sentences)
    except _ODD_FORM:
        return None


def translate_advice(advice: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the instruction and its trigger in Chinese."""
    try:
        entry, numbers = _read_texts()["advice"][advice["rule"]], dict(advice["numbers"])
        if "counts" in numbers:
            parts = [
                _read_texts()["counts"].format(side=side, number=number, answers=answers)
                for side, (number, answers) in numbers["counts"].items()
            ]
            numbers["counts"] = "，".join(parts)
        if "tasks" in numbers:
            numbers["tasks"] = "、".join(map(str, numbers["tasks"]))
        if "sources" in numbers:
            numbers["sources"] = "、".join(_read_texts()["sources"][source] for source in numbers["sources"])
        text = entry["text_needed"] if numbers.get("needed") else entry["text"]
        return str(text).format(**numbers), str(entry["trigger"]).format(**numbers)
    except _ODD_FORM:
        return None


def translate_judge(judge: Mapping[str, Any]) -> str | None:
    """Return the sentence on a model that judges in Chinese."""
    try:
        texts, rate = _read_texts()["judge"], judge["win_rate"]
        judged = judge["pairs"] - judge["not_judged"]
        marks = texts["partial"].format(pairs=judge["pairs"], judged=judged) if judge["is_partial"] else ""
        marks += texts["skipped"] if judge["audit"]["skipped"] else ""
        marks += texts["warned"] if judge["warnings"] else ""
        if rate is None:
            return str(marks + texts["no_verdict"])
        counts = {name: judge[name] for name in ("tuned", "tie", "base")}
        numbers = texts["numbers"].format(**rate, **counts, p=judge["sign_test_p"])
        if judge["verdict"]["code"] == "not_resolved" and (judge["needed_prompts"] or 0) > judge["prompts"]:
            numbers += texts["needed"].format(needed=judge["needed_prompts"])
        return str(marks + texts[judge["verdict"]["code"]].format(numbers=numbers))
    except _ODD_FORM:
        return None


def name_finding(entry: EvaluationFinding) -> str:
    """Return the source and the name of a finding in Chinese."""
    texts = _read_texts()
    known = texts["dimensions"] if entry.unit == evidence.POINTS else texts["names"].get(entry.source, {})
    name = known.get(entry.name, entry.name)
    return "，".join(filter(None, [texts["sources"].get(entry.source, entry.source), name]))


def _describe_rules(evaluation: Mapping[str, Any]) -> str:
    """Return what the rule checks tell, with the numbers that it rests on."""
    texts, difference, rate = _read_texts(), evaluation["average_improvement"], evaluation["improvement_rate"]
    numbers = texts["numbers"].format(
        **{name: evaluation[name] for name in ("base", "tuned", "prompts")},
        **{name: difference[name] for name in ("value", "low", "high")},
        **{name: rate[name] for name in ("better", "tied", "worse")},
        rate=rate["value"],
        p=evaluation["sign_test_p"],
    )
    least = statistics.LEAST_PROMPTS
    few = texts["few"].format(least=least) if evaluation["prompts"] < least else ""
    return str(texts["rules"][evaluation["resolution"]].format(numbers=numbers, few=few))


def _join_findings(found: Sequence[EvaluationFinding]) -> str:
    """Return findings with their numbers, the first few by name."""
    named = [f"{name_finding(entry)} {evidence.describe_number(entry, '至')}" for entry in found[:_MOST_NAMED]]
    if rest := len(found) - len(named):
        named.append(_read_texts()["more"].format(rest=rest))
    return "；".join(named)


@functools.cache
def _read_texts() -> dict[str, Any]:
    texts: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return texts
