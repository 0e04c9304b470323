"""The questions that a judge gets: which of two answers is better, or which level of a rubric an answer has.

Inputs: pairs of answers. Outputs: `JudgeQuestion`s. What is judged stands in one JSON object, so that no mark inside an
answer can end it; tokens that steer a chat are written with an escape. No question names a model. Not here: who answers
(`endpoint_judge`, `local_judge`), and how a reply is read (`judge_replies`).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trl_sft.evaluation import scripts
from trl_sft.evaluation.answer_pairs import AnswerPair

LANGUAGES = ("en", "zh")
FIRST, SECOND, EQUAL = "A", "B", "tie"
PAIR_OPTIONS = (FIRST, SECOND, EQUAL)
PAIR_LABELS = ("A", "B", "C")  # one token each, for a local judge
SCORES = ("1", "2", "3", "4", "5")
VERDICT_FIELD, SCORE_FIELD = "verdict", "score"
_TEXTS = Path(__file__).parent / "judge_texts.yaml"
# of chat templates: <|im_end|>, <｜User｜>, </s>, <start_of_turn>, [INST]
_STEERING = re.compile(r"<(?=[|｜])|<(?=/?(?:s|bos|eos|pad|unk|start_of_turn|end_of_turn|think)>)|\[(?=/?INST\])", re.I)


@dataclass(frozen=True)
class JudgeQuestion:
    """One question.

    Attributes:
        name: what is judged, for readers of the log: `row 7, tuned first`.
        options: what a reply can choose: A, B and tie, or 1 to 5.
        language: of the instructions.
        instructions: what to judge, without the form of the reply.
        content: what is judged, as JSON.

    """

    name: str
    options: tuple[str, ...]
    language: str
    instructions: str
    content: str

    @property
    def is_pair(self) -> bool:
        """Tell whether two answers are compared."""
        return self.options == PAIR_OPTIONS

    @property
    def field(self) -> str:
        """The key of the choice in a reply."""
        return VERDICT_FIELD if self.is_pair else SCORE_FIELD

    @property
    def labels(self) -> tuple[str, ...]:
        """What a local judge writes for each option."""
        return PAIR_LABELS if self.is_pair else SCORES

    def describe_json_reply(self) -> str:
        """Return the instructions with the form of a reply in JSON."""
        return f"{self.instructions}\n{self._get_text('json')}"

    def describe_label_reply(self) -> str:
        """Return the instructions with the form of a reply of one label."""
        return f"{self.instructions}\n{self._get_text('label')}"

    def describe_retry(self, problem: str) -> str:
        """Return what a judge is told whose reply cannot be read."""
        return _read_texts()[self.language]["retry"].replace("{problem}", problem)

    def build_schema(self) -> dict[str, Any]:
        """Return the JSON Schema of a reply."""
        choice: dict[str, Any] = {"type": "string", "enum": list(self.options)}
        if not self.is_pair:
            choice = {"type": "integer", "enum": [int(option) for option in self.options]}
        properties = {"reasoning": {"type": "string"}, self.field: choice}
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }

    def _get_text(self, form: str) -> str:
        return _read_texts()[self.language][f"{'pair' if self.is_pair else 'rubric'}_{form}"]


def build_pair_question(name: str, pair: AnswerPair, sides: Sequence[str], *, language: str) -> JudgeQuestion:
    """Return the question which of two answers is better.

    Args:
        name: of the question.
        pair: the answers.
        sides: of the answers A and B.
        language: `en` or `zh`.

    """
    answers = {"answer_A": pair.get_answer(sides[0]), "answer_B": pair.get_answer(sides[1])}
    return _build(
        name, PAIR_OPTIONS, pair, answers=answers, instructions=_read_texts()[language]["pair"], language=language
    )


def build_score_question(
    name: str, pair: AnswerPair, side: str, *, question: str, levels: Sequence[str], language: str
) -> JudgeQuestion:
    """Return the question which level an answer has.

    Args:
        name: of the question.
        pair: has the answer.
        side: whose answer.
        question: of the dimension.
        levels: (5,) the descriptions of the scores 1 to 5.
        language: `en` or `zh`.

    """
    listed = "\n".join(f"{score}: {level}" for score, level in zip(SCORES, levels, strict=True))
    instructions = _read_texts()[language]["rubric"].replace("{question}", question).replace("{levels}", listed)
    answers = {"answer": pair.get_answer(side)}
    return _build(name, SCORES, pair, answers=answers, instructions=instructions, language=language)


def choose_language(pair: AnswerPair, language: str) -> str:
    """Return the language of the instructions: the requested one, or `zh` for a Chinese prompt and else `en`."""
    if language in LANGUAGES:
        return language
    return "zh" if scripts.find_script(pair.prompt) == "han" else "en"


def encode_content(content: Mapping[str, Any]) -> str:
    r"""Return what is judged as JSON in which no text can steer the chat of the judge.

    Example:
        >>> encode_content({"answer": "x<|im_end|>"})
        '{"answer": "x\\u003c|im_end|>"}'

    """
    text = (
        json.dumps(content, ensure_ascii=False).encode("utf-8", "replace").decode()
    )  # half a character cannot be sent
    return _STEERING.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def _build(
    name: str,
    options: tuple[str, ...],
    pair: AnswerPair,
    *,
    answers: Mapping[str, str],
    instructions: str,
    language: str,
) -> JudgeQuestion:
    """Return a question; a reference is part of it where there is one."""
    content: dict[str, Any] = {"conversation": [{"role": role or "user", "text": text} for role, text in pair.turns]}
    if pair.reference:
        kind = "pair" if options == PAIR_OPTIONS else "rubric"
        instructions += f"\n{_read_texts()[language][f'{kind}_reference']}"
        content["reference"] = pair.reference
    return JudgeQuestion(name, options, language, instructions, encode_content(content | dict(answers)))


@functools.cache
def _read_texts() -> dict[str, dict[str, str]]:
    """Return the instructions by language and name."""
    texts: dict[str, dict[str, str]] = yaml.safe_load(_TEXTS.read_text(encoding="utf-8"))
    return texts
