"""The answers of the base model and of the tuned model to the same prompt, as pairs.

Inputs: entries of `samples.jsonl`, or records of `evaluation.jsonl`. Outputs: `AnswerPair`. Not here: how answers are
generated (`before_after`, `own_prompts`, `cli.evaluate`), and what is measured on them (`answer_format`,
`blind_items`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BASE, TUNED = "base", "tuned"
_SIDES = {BASE: "before", TUNED: "after"}  # the keys of samples.jsonl


@dataclass(frozen=True)
class AnswerPair:
    """One prompt with the answers of both models."""

    name: str  # `row 7` of the held-out rows, or `prompt 2` of `evaluate.prompts`
    task: str  # "" = none
    turns: tuple[tuple[str, str], ...]  # the prompt: (role, text) of each message; role "" = a prompt that is a text
    base: str
    tuned: str
    reference: str  # the expected answer; "" = none
    base_ended: bool | None = None  # whether the model ended its answer; None = it cannot be told
    tuned_ended: bool | None = None

    @property
    def prompt(self) -> str:
        """The last message of the prompt."""
        return self.turns[-1][1] if self.turns else ""

    def get_answer(self, side: str) -> str:
        """Return the answer of BASE or TUNED."""
        return self.base if side == BASE else self.tuned


def read_pairs(samples: Sequence[Mapping[str, Any]]) -> list[AnswerPair]:
    """Return the prompts that both models answered, in the order of the file; other entries are left out."""
    pairs = []
    for sample in samples:
        base, tuned = (sample.get(key) for key in _SIDES.values())
        if not isinstance(base, str) or not isinstance(tuned, str):
            continue
        number, stopped = sample.get("number"), sample.get("stopped")
        ended = stopped if isinstance(stopped, dict) else {}
        pairs.append(
            AnswerPair(
                name=f"row {sample.get('row')}" if number is None else f"prompt {number}",
                task=str(sample.get("task") or ""),
                turns=_read_turns(sample.get("prompt")),
                base=base,
                tuned=tuned,
                reference=str(sample.get("reference") or ""),
                base_ended=_read_flag(ended.get(_SIDES[BASE])),
                tuned_ended=_read_flag(ended.get(_SIDES[TUNED])),
            )
        )
    return pairs


def read_records(records: Sequence[Mapping[str, Any]]) -> list[AnswerPair]:
    """Return the prompts that both sides answered, of records as `evaluate` writes them, in the order of the file."""
    pairs = []
    for record in records:
        answers = record.get("answers")
        base, tuned = (answers.get(side) if isinstance(answers, dict) else None for side in (BASE, TUNED))
        if not isinstance(base, dict) or not isinstance(tuned, dict):
            continue
        pairs.append(
            AnswerPair(
                name=f"prompt {record.get('id')}" if record.get("row") is None else f"row {record['row']}",
                task=str(record.get("task") or ""),
                turns=_read_turns(record.get("prompt")),
                base=str(base.get("text") or ""),
                tuned=str(tuned.get("text") or ""),
                reference=str(record.get("reference") or ""),
                base_ended=_read_flag(base.get("ended")),
                tuned_ended=_read_flag(tuned.get("ended")),
            )
        )
    return pairs


def _read_flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _read_turns(prompt: Any) -> tuple[tuple[str, str], ...]:
    """Return the messages of a prompt as (role, text)."""
    if not isinstance(prompt, list):
        return (("", "" if prompt is None else str(prompt)),)
    return tuple(
        (str(turn.get("role") or ""), _read_content(turn)) if isinstance(turn, dict) else ("", str(turn))
        for turn in prompt
    )


def _read_content(turn: Mapping[str, Any]) -> str:
    """Return the text of a message; parts that are no text, and calls of tools, are shown as JSON."""
    content = turn.get("content")
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if all(isinstance(text, str) for text in texts):
            content = "".join(map(str, texts))
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    text = "" if content is None else text
    calls = turn.get("tool_calls")
    return "\n".join(filter(None, [text, json.dumps(calls, ensure_ascii=False) if calls else ""]))
