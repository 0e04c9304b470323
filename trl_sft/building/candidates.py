"""A row before it is part of an instruction set, with what is known of its origin; and why a gate rejects one.

Inputs: messages and their provenance. Outputs: the row as a recipe reads it. Not here: how rows are generated
(`generation`), and the gates (`building.gates`), each of which is `check(row) -> Rejection | None`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Rejection(NamedTuple):
    """Why a row is no part of the set."""

    gate: str  # the name of the gate: form, length, duplicate, language
    reason: str  # one sentence, with the value that the gate measured


@dataclass(frozen=True)
class CandidateRow:
    """A row that may become part of an instruction set.

    Attributes:
        id: the name of the row in all files of the set; unique.
        messages: the turns, each with `role` and `content`; the first may be a system prompt.
        language: the language that the row must have: `en` or `zh`; "" = any.
        cell: the value of each axis: {"task": "summary", "difficulty": "easy"}; empty = no axes.
        provenance: template and its hash, generator, seed, parent.
        was_cut: whether the generator reached its limit of tokens in an answer.
        key: the final answer that is known to be right; "" = none is known.
        parent: the id of the row from which this one was made; "" = none.
        score: the quality by a judge, from 1 to 5; None = nobody judged it.

    """

    id: str
    messages: tuple[Mapping[str, Any], ...]
    language: str = ""
    cell: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    was_cut: bool = False
    key: str = ""
    parent: str = ""
    score: float | None = None

    @property
    def instruction(self) -> str:
        """The first message of the user; "" = there is none."""
        return next((str(turn.get("content") or "") for turn in self.messages if turn.get("role") == "user"), "")

    @property
    def answer(self) -> str:
        """The last message of the assistant; "" = there is none."""
        turns = reversed(self.messages)
        return next((str(turn.get("content") or "") for turn in turns if turn.get("role") == "assistant"), "")
