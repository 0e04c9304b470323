"""The lines of the command evaluate: what is compared, how many answers were generated, and the verdict.

Inputs: the rows, the sides, and what `eval.json` has under `evaluation`. Outputs: lines for the terminal. Not here: any
number of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trl_sft import console
from trl_sft.cli.evaluate.sides import Side
from trl_sft.evaluation import conclusion, evidence
from trl_sft.evaluation.answer_cache import CacheCounts
from trl_sft.evaluation.before_after import read_last_message
from trl_sft.evaluation.evidence import EvaluationFinding
from trl_sft.evaluation.items import EvaluationItem
from trl_sft.evaluation.verdict import BASE, FEW_SHOT, TUNED

_LABELS = {FEW_SHOT: "few-shot"}  # of sides whose name is too long
_SHOWN = 3  # regressions on the screen, of the rows and of the general suite
_FINDINGS = 5  # of each kind on the screen
_MARKS = {"improved": "better", "worse": "worse", "no_difference": "same", "not_resolved": "not resolved"}


def describe_plan(asked: Sequence[EvaluationItem], planned: Sequence[Side], problem: str) -> Iterator[tuple[str, str]]:
    """Yield the lines about rows, checks and sides; `problem`: why the base model has no examples, "" = it has."""
    checks = Counter(", ".join(request.check.name for request in item.checks) for item in asked)
    listed = "; ".join(f"{names}" if len(checks) == 1 else f"{names} ({count:,})" for names, count in checks.items())
    yield "prompts", f"{console.format_rows(len(asked))}, scored by: {listed}"
    for side in planned:
        model, facts = side.facts["model"], side.facts
        step = f" at step {model['step']:,}" if model["step"] is not None else ""
        yield (
            _LABELS.get(side.name, side.name[:9]),
            f"{model['kind']} {model['name']}{step}; {facts['template']}; thinking: {facts['thinking']}",
        )
    if problem:
        yield "note", f"format only: the base model is not asked with examples ({problem})"


def describe_calls(name: str, counts: CacheCounts, seconds: float) -> Iterator[tuple[str, str]]:
    """Yield the line about the answers of a side."""
    yield "answers", f"{name}: {counts.generated:,} generated in {seconds:.1f} s, {counts.cached:,} from answers.jsonl"


def describe_result(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the lines of the verdict."""
    yield "verdict", str(result["verdict"]["text"])
    if few_shot := result["few_shot"]:
        interval = few_shot["average_improvement"]
        text = f"against the base model with examples: {few_shot['base']:.1%} -> {few_shot['tuned']:.1%}, "
        text += f"{interval['value']:+.1%} ({interval['low']:+.1%} to {interval['high']:+.1%})"
        yield "", f"{text}: {_MARKS[few_shot['resolution']]}"
    else:
        yield "", "format only: the base model may know the answers and write them in another form"
    for kind, results in (("task", result["tasks"]), ("check", result["checks"])):
        if kind == "check" and len(results) < 2:
            continue
        for name, part in results.items():
            yield kind, f"{name or '(none)'}: {_describe_part(part)}"
    for point in result["checkpoints"]:
        yield "step", f"{point['step']:,}: {_describe_part(point)}"
    for name in (BASE, FEW_SHOT, TUNED):
        if name in result["sides"]:
            counts = result["sides"][name]
            parts = [f"{counts[key]:,} {words}" for key, words in _COUNTS.items() if counts[key]]
            if parts:
                yield "answers", f"{name}: {', '.join(parts)}"
    if limits := result.get("code_limits"):
        missing = [name for name, holds in limits.items() if not holds]
        text = "all limits hold" if not missing else f"NOT limited on this machine: {', '.join(missing)}"
        yield "code", f"ran under limits of time, memory, files and network; {text}"
    for given in result["advice"]:
        yield "advice", f"{given['text']} ({given['trigger']})"


def describe_findings(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a line for each part that improved most, and for each that needs attention."""
    for key, label in (("best_improved", "best"), ("needs_attention", "attention")):
        for entry in [EvaluationFinding.read(described) for described in result[key][:_FINDINGS]]:
            number, mark = evidence.describe_number(entry), _MARKS[entry.resolution]
            yield label, f"{conclusion.name_finding(entry)}: {number} on {entry.count:,}: {mark}"
        if len(result[key]) > _FINDINGS:
            yield "", f"{len(result[key]) - _FINDINGS:,} more in report.html"


_COUNTS = {
    "empty": "empty",
    "cut": "cut by the token limit",
    "unclosed_thoughts": "with a thought that never ends",
}


def list_regressions(result: Mapping[str, Any]) -> list[str]:
    """Return a table of answers that became worse; [] = none did."""
    suite = (result.get("suite") or {}).get("worsened", [])[:_SHOWN]
    texts = [*result["regressions"]["texts"][:_SHOWN], *(change | {"reference": ""} for change in suite)]
    if not texts:
        return []
    table = [("worse: prompt", "expected", "base", "tuned")]
    table += [
        (read_last_message(row["prompt"]), row["reference"], row[BASE] or "(nothing)", row[TUNED] or "(nothing)")
        for row in texts
    ]
    return ["", *console.format_columns(table), ""]


def _describe_part(part: Mapping[str, Any]) -> str:
    """Return the result of a task, a check or a checkpoint in one line."""
    interval, rate = part["average_improvement"], part["improvement_rate"]
    text = f"{part['base']:.1%} -> {part['tuned']:.1%}, {interval['value']:+.1%} "
    text += f"({interval['low']:+.1%} to {interval['high']:+.1%}); "
    text += f"{rate['better']:,} better, {rate['tied']:,} tied, {rate['worse']:,} worse"
    return f"{text}: {_MARKS[part['resolution']]}"
