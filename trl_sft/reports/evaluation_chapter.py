"""The chapter of the report on base against tuned, from what the command evaluate wrote.

Inputs: what `eval.json` has under `evaluation`. Outputs: texts and numbers as the template shows them. Nothing is
computed here, and a file of another form gives no chapter. Not here: metrics that training itself measured (`page`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trl_sft import console
from trl_sft.evaluation import conclusion, evidence
from trl_sft.evaluation.evidence import EvaluationFinding
from trl_sft.reports import chinese_evaluation

_MAX_CHARACTERS = 2000  # of one text of a regression
_COUNTS = ("answers", "empty", "cut", "with_thought", "unclosed_thoughts")


def describe(evaluation: Any) -> dict[str, Any] | None:
    """Return the chapter; None = the run was not evaluated, or the file has another form."""
    try:
        return _describe(evaluation)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _describe(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the chapter. Raises KeyError, TypeError, ValueError or AttributeError for another form."""
    sides = evaluation["sides"]
    few_shot = evaluation["few_shot"]
    parts = [("all", "", evaluation)]
    parts += [("few_shot", "", few_shot)] if few_shot else []
    for kind, key in (("task", "tasks"), ("check", "checks")):
        parts += [(kind, str(name), part) for name, part in evaluation[key].items()]
    parts += [("step", f"{point['step']:,}", point) for point in evaluation["checkpoints"]]
    return {
        "code": str(evaluation["verdict"]["code"]),
        "text": str(evaluation["verdict"]["text"]),
        "text_zh": chinese_evaluation.translate_verdict(evaluation),
        "format_only": bool(evaluation["format_only"]),
        "rows": [(kind, name, _list_cells(part)) for kind, name, part in parts],
        "sides": [(name, _list_facts(side), [f"{side[key]:,}" for key in _COUNTS]) for name, side in sides.items()],
        "findings": [
            (name, [_list_finding(EvaluationFinding.read(entry)) for entry in evaluation[name]])
            for name in ("best_improved", "needs_attention", "evidence")
            if evaluation[name]
        ],
        "advice": [
            (str(advice["text"]), str(advice["trigger"]), chinese_evaluation.translate_advice(advice))
            for advice in evaluation["advice"]
        ],
        "num_regressions": int(evaluation["regressions"]["rows"]),
        "regressions": [_list_texts(row) for row in evaluation["regressions"]["texts"]],
    }


def _list_cells(part: Mapping[str, Any]) -> dict[str, str]:
    """Return the numbers of one comparison."""
    difference, rate = part["average_improvement"], part["improvement_rate"]
    return {
        "resolution": str(part["resolution"]),
        "prompts": f"{part['prompts']:,}",
        "base": f"{part['base']:.1%}",
        "tuned": f"{part['tuned']:.1%}",
        "difference": f"{difference['value']:+.1%} ({difference['low']:+.1%} ... {difference['high']:+.1%})",
        "rate": f"{rate['better']:,} / {rate['tied']:,} / {rate['worse']:,}",
        "p": f"{part.get('holm_p', part['sign_test_p']):.2g}",
    }


def _list_finding(entry: EvaluationFinding) -> dict[str, str]:
    """Return a finding as a row of a table."""
    name = conclusion.name_finding(entry)
    number = evidence.describe_number(entry, "...")
    row = {"name": name, "name_zh": chinese_evaluation.name_finding(entry), "number": number}
    return row | {"count": f"{entry.count:,}", "resolution": entry.resolution}


def _list_facts(side: Mapping[str, Any]) -> str:
    """Return which model a side is, and how it was asked."""
    model = side["model"]
    step = f", step {model['step']:,}" if model["step"] is not None else ""
    return f"{model['kind']} {model['name']}{step}; {side['template']}; thinking: {side['thinking']}"


def _list_texts(row: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of an answer that became worse."""
    prompt = row["prompt"]
    turns: Sequence[Any] = prompt if isinstance(prompt, list) else []
    text = "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns) if turns else str(prompt)
    texts = {"prompt": text, **{key: str(row[key]) for key in ("reference", "base", "tuned")}}
    return {key: _shorten(value) for key, value in texts.items()} | {"id": str(row["id"]), "task": str(row["task"])}


def _shorten(text: str) -> str:
    """Return a text as a page shows it: escaped for a terminal, and not too long."""
    rest = len(text) - _MAX_CHARACTERS
    cut = text if rest <= 0 else f"{text[:_MAX_CHARACTERS]} ... ({rest:,} more characters)"
    return console.escape_control_characters(cut)
