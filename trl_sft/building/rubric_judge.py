"""A model scores rows by a rubric: relevance, correctness, completeness and safety, each from 1 to 5 with levels.

Inputs: candidate rows, and a caller of the judge. Outputs: the scores of each row; a row whose judgement cannot be read
after a second question has none. The row is shown to the judge as JSON, so that text in it cannot end the block that
it stands in. Not here: calls (`evaluation.model_calls`), and what a low score means (`screening`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from trl_sft.building import generation, spec_keys, templates
from trl_sft.building.candidates import CandidateRow
from trl_sft.building.generation import Caller
from trl_sft.building.spec import Spec
from trl_sft.building.templates import LanguageTexts
from trl_sft.evaluation import thoughts
from trl_sft.evaluation.model_calls import ModelRequest

_FILE = Path(__file__).with_name("rubric.yaml")
_LEVELS = range(1, 6)
_QUESTIONS = 2  # the second one where the first answer cannot be read


class RowScores(NamedTuple):
    """The judgement on one row."""

    scores: Mapping[str, int]  # dimension -> 1 to 5; empty = there is none
    problem: str  # why there is none: `no answer`, `unreadable`; "" = there is one

    @property
    def lowest(self) -> tuple[str, int]:
        """The dimension with the lowest score, and the score."""
        return min(self.scores.items(), key=lambda item: item[1])

    @property
    def mean(self) -> float:
        """The mean of all scores."""
        return sum(self.scores.values()) / len(self.scores)


def list_dimensions() -> list[str]:
    """Return what is scored."""
    return list(_read_rubric()["dimensions"])


def judge_rows(rows: Sequence[CandidateRow], spec: Spec, caller: Caller, *, texts: LanguageTexts) -> list[RowScores]:
    """Return the scores of rows, in their order; rows that the judge did not come to have the problem `no answer`."""
    results = [RowScores({}, "no answer")] * len(rows)
    for question in range(_QUESTIONS):
        open_rows = [number for number, result in enumerate(results) if not result.scores]
        if not open_rows or caller.stop:
            break
        requests = [build_request(rows[number], spec, texts=texts, question=question) for number in open_rows]
        for number, answer in zip(open_rows, caller.call(requests, label="judge"), strict=True):
            if answer is not None:
                scores = read_scores(answer.text)
                results[number] = RowScores(scores, "" if scores else "unreadable")
    return results


def build_request(row: CandidateRow, spec: Spec, *, texts: LanguageTexts, question: int = 0) -> ModelRequest:
    """Return the request for the judgement on a row; `question`: how often it was asked before."""
    rubric = _read_rubric()
    levels = []
    for name, described in rubric["dimensions"].items():
        levels += [f"{name}:", *(f"  {level}: {text}" for level, text in described.items())]
    values = {
        "requirements": texts.format_requirements(row.cell, spec.descriptions) or "none",
        "levels": "\n".join(levels),
        "conversation": json.dumps(list(row.messages), ensure_ascii=False),
        "keys": "{" + ", ".join(f'"{name}": 1 to 5' for name in rubric["dimensions"]) + "}",
    }
    prompt = [{"role": "user", "content": templates.fill(rubric["prompt"], values).strip()}]
    score = {"type": "integer", "minimum": 1, "maximum": 5}
    names = list(rubric["dimensions"])
    schema = {
        "type": "object",
        "properties": dict.fromkeys(names, score),
        "required": names,
        "additionalProperties": False,
    }
    decoding = generation.choose_decoding(spec.sections[spec_keys.JUDGE], spec.seed, "judge", question)
    return ModelRequest(f"judge {row.id} question {question}", prompt, decoding, schema)


def read_scores(text: str) -> dict[str, int]:
    """Return the scores of a judgement; {} = it is no JSON object with a whole number from 1 to 5 for each of them."""
    text = thoughts.split_thought(text, *thoughts.COMMON_MARKS).answer.strip()
    if text.startswith("```"):
        text = text.strip("`").removeprefix("json").strip()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    names = list_dimensions()
    if not isinstance(value, dict) or not all(_is_score(value.get(name)) for name in names):
        return {}
    return {name: value[name] for name in names}


def _is_score(value: Any) -> bool:
    """Tell whether a value is a score."""
    return isinstance(value, int) and not isinstance(value, bool) and value in _LEVELS


@functools.cache
def _read_rubric() -> dict[str, Any]:
    """Return the rubric."""
    rubric: dict[str, Any] = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    return rubric
