"""Verdicts, findings, and reasons why a run stopped, in Chinese.

Inputs: a verdict, a finding or an outcome as run.json has it. Outputs: Chinese texts, made of codes and numbers, or of
the English line; None where the record has another form, so that the page shows the English text of the record. The
sentences stand in `chinese.yaml`. Not here: labels of the page (`texts.yaml`), and how a verdict is reached
(`training.verdict`, whose cases are told apart here by their numbers).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

# as in `training.verdict`: changes of the eval loss, relative and in nats per token
_SMALL_CHANGE, _LARGE_CHANGE, _LEAST_RISE = 0.02, 0.05, 0.02
_EARLY = "run.early_stopping"  # in the advice of a record
_ODD_FORM = (KeyError, TypeError, ValueError, IndexError, AttributeError)  # of a record that another version wrote


def translate_verdict(verdict: Mapping[str, Any]) -> dict[str, str] | None:
    """Return `text` and `advice` of a verdict in Chinese; `advice` is "" where the verdict has none."""
    try:
        numbers = dict(verdict["numbers"])
        case = _name_case(verdict["code"], numbers)
        entry = _read_texts()["verdicts"][case]
        if "eval_loss_before" in numbers:
            numbers["loss"] = _describe_loss(numbers)
        if "broken_answers" in numbers:
            numbers["after"] = _describe_broken(numbers["broken_answers"])
            numbers["before"] = _describe_broken(numbers["broken_answers_of_base"])
            numbers["loss"] = f"；{numbers['loss']}" if "loss" in numbers else ""
        written = str(verdict.get("advice") or "")
        advice = entry.get("advice_stopped", entry["advice"]) if _EARLY in written else entry["advice"]
        numbers["longer"] = f"{_EARLY}.patience" if _EARLY in written else "train.num_train_epochs"
        notes = [name for name, key in (("one_text", "one_text"), ("few_rows", "eval_rows")) if key in numbers]
        return {
            "text": entry["text"].format(**numbers) + "".join(_read_texts()[name].format(**numbers) for name in notes),
            "advice": advice.format(**numbers) if written else "",
        }
    except _ODD_FORM:
        return None


def translate_finding(finding: Mapping[str, Any]) -> dict[str, str] | None:
    """Return `name`, `observation`, `meaning` and `advice` of a finding in Chinese."""
    try:
        entry: dict[str, str] = dict(_read_texts()["findings"][finding["code"]])
        numbers = dict(finding["numbers"])
        first = next(iter(numbers.values()))
        values = numbers | {"step": int(finding["steps"][0]), "names": "、".join(numbers), "value": first}
        if "lowest_loss" in numbers:
            entry["observation"] = entry["rise"]
        elif finding["code"] == "diverging" and "eval_loss_before" in numbers:
            entry["observation"] = entry["worse_evaluation"]
        if finding["code"] == "unusual_rate" and numbers["peak_rate"] < numbers["lowest"]:
            entry["meaning"] = entry["meaning_low"]
        if "advice_saved" in entry and _EARLY not in finding["advice"]:
            entry["advice"] = entry["advice_saved"]
        if rate := _read_texts()["rates"].get(numbers.get("rate")):
            entry["meaning"] = _explain_rate(rate["meaning"], numbers)
            entry["advice"] = entry["advice"] if finding["code"] == "diverging" else rate["advice"]
        return {name: entry[name].format(**values) for name in ("name", "observation", "meaning", "advice")}
    except _ODD_FORM:
        return None


def translate_outcome(outcome: str) -> str | None:
    """Return why a run stopped, in Chinese; a line after the first that has no translation stays in English."""
    lines = outcome.splitlines() or [""]
    translated = [_translate_line(line) for line in lines]
    if translated[0] is None:
        return None
    return "\n".join(text or line for text, line in zip(translated, lines, strict=True))


def translate_reason(reason: str) -> str | None:
    """Return why a row is left out of the training, in Chinese."""
    reasons: dict[str, str] = _read_texts()["reasons"]
    return next((text for beginning, text in reasons.items() if reason.startswith(beginning)), None)


def _translate_line(line: str) -> str | None:
    """Return a line of an outcome in Chinese; None where no pattern fits."""
    for pattern, text in _read_texts()["outcomes"]:
        if match := re.fullmatch(pattern, line.strip()):
            return str(text).format(*(_translate_line(group) or group for group in match.groups()))
    return None


def _name_case(code: str, numbers: Mapping[str, Any]) -> str:
    """Return the entry of `verdicts` that a verdict is of, by its code and its numbers."""
    if "broken_answers" in numbers:
        counts = numbers["broken_answers"]
        return "endless_answers" if counts["endless"] > max(counts["empty"], counts["repeating"]) else "broken_answers"
    if "equal_answers" in numbers:
        return "equal_answers"
    if code == "overfitted":
        return "overfitted" if numbers["best_step"] else "overfitted_from_start"
    if code == "unknown":
        if not numbers:
            return "no_rows"
        return "disagree" if "eval_loss_before" in numbers else "no_loss_before"
    if code == "little_changed":
        return "little_worse" if _compute_change(numbers) >= _SMALL_CHANGE else "little_changed"
    return {"broken": "worse", "better": "better"}[code]


def _compute_change(numbers: Mapping[str, Any]) -> float:
    """Return the relative change of the eval loss."""
    before, after = float(numbers["eval_loss_before"]), float(numbers["eval_loss_after"])
    return (after - before) / before if before else 0.0


def _describe_loss(numbers: Mapping[str, Any]) -> str:
    """Return the eval loss before and after, the step that is saved, and right answers."""
    texts, change = _read_texts(), _compute_change(numbers)
    values = dict(numbers) | {"change": abs(change), "direction": texts["lower" if change < 0 else "higher"]}
    names = ["loss_change"]
    after = numbers["eval_loss_after"]
    if "eval_loss_of_last_step" in numbers:
        names += ["saved_weights"] + ["last_step"] * _is_risen(numbers["eval_loss_of_last_step"], after)
    elif numbers["best_step"] and _is_risen(after, numbers["best_eval_loss"]):
        names += ["best_was"]
    if numbers.get("right_before") or numbers.get("right_after"):
        names += ["right_answers"]
    return "".join(texts[name].format(**values) for name in names)


def _is_risen(loss: float, reference: float) -> bool:
    """Tell whether an eval loss is above another one by more than noise."""
    return loss > reference * (1 + _LARGE_CHANGE) and loss - reference > _LEAST_RISE


def _describe_broken(counts: Mapping[str, int]) -> str:
    """Return how many answers nobody can use, by the reason."""
    texts = _read_texts()["broken"]
    parts = [texts[name].format(counts[name]) for name in ("empty", "repeating", "endless") if counts[name]]
    return "，".join(parts) or str(texts["none"])


def _explain_rate(meaning: str, numbers: Mapping[str, Any]) -> str:
    """Return what a learning rate means, with the usual range where it lies outside."""
    usual = f"：{_read_texts()['usual_range'].format(**numbers)}" if "lowest" in numbers else ""
    return f"{meaning}{usual}。"


@functools.cache
def _read_texts() -> dict[str, Any]:
    texts: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return texts
