"""A pair is judged in both orders, and won only where both orders name the same answer.

Inputs: pairs and the judgements on them. Outputs: `PairOutcome`s, and what the judge does when only the order changes.
Anything else than two equal wins is a tie, as in FastChat's llm_judge (Zheng et al. 2023, arXiv 2306.05685); an invalid
reply makes the pair invalid, which is no tie. Pairs whose answers are equal are ties without a call. Not here: what is
said about all pairs (`judge_result`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from trl_sft.evaluation.answer_pairs import BASE, TUNED, AnswerPair
from trl_sft.evaluation.judging import judge_questions
from trl_sft.evaluation.judging.judge_questions import EQUAL, FIRST, PAIR_OPTIONS, SECOND, JudgeQuestion
from trl_sft.evaluation.judging.judge_replies import INVALID, MISSING, Judgement
from trl_sft.evaluation.vote_files import TIE

ORDERS = ((BASE, TUNED), (TUNED, BASE))  # the sides of the answers A and B; every pair is judged in both
SCORES = {TUNED: 1.0, TIE: 0.5, BASE: 0.0}


class OrderVerdict(NamedTuple):
    """What the judge said to a pair in one order."""

    first: str  # the side of the answer A
    choice: str  # A, B, tie, INVALID or MISSING
    prefers: str  # BASE, TUNED or TIE; INVALID or MISSING
    tuned_weight: float | None  # the probability of tuned, plus half of that of a tie; None = no reply
    reasoning: str
    problem: str


@dataclass(frozen=True)
class PairOutcome:
    """What the judge said about one pair."""

    pair: AnswerPair
    verdict: str  # BASE, TUNED, TIE, INVALID or MISSING
    orders: tuple[OrderVerdict, ...]  # () = the answers are equal

    @property
    def is_judged(self) -> bool:
        """Tell whether both orders have a choice."""
        return bool(self.orders) and self.verdict not in (INVALID, MISSING)

    @property
    def is_consistent(self) -> bool:
        """Tell whether both orders prefer the same."""
        return len({order.prefers for order in self.orders}) == 1

    @property
    def soft_score(self) -> float:
        """The mean probability of tuned over both orders; of equal answers a half."""
        weights = [order.tuned_weight for order in self.orders if order.tuned_weight is not None]
        return sum(weights) / len(weights) if weights else 0.5

    @property
    def has_probabilities(self) -> bool:
        """Tell whether the judge gave probabilities, and not only a choice."""
        return any(order.tuned_weight not in (None, *SCORES.values()) for order in self.orders)

    @property
    def prompt_key(self) -> str:
        """Equal for equal prompts."""
        text = json.dumps(self.pair.turns, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """Return the outcome as a line of `verdicts.jsonl`."""
        return {
            "pair": self.pair.name,
            "verdict": self.verdict,
            "task": self.pair.task,
            "prompt_key": self.prompt_key,
            "equal_answers": not self.orders,
            "characters": {side: len(self.pair.get_answer(side)) for side in (BASE, TUNED)},
            "orders": [order._asdict() for order in self.orders],
        }


def have_equal_answers(pair: AnswerPair) -> bool:
    """Tell whether a pair is a tie without a call."""
    return pair.base.strip() == pair.tuned.strip()


def build_questions(pairs: Sequence[AnswerPair], *, language: str) -> list[JudgeQuestion]:
    """Return two questions for each pair whose answers differ, one for each order, next to each other.

    Args:
        pairs: of answers.
        language: `en`, `zh`, or `auto` = that of the prompt.

    """
    return [
        judge_questions.build_pair_question(
            f"{pair.name}, {sides[0]} first",
            pair,
            sides,
            language=judge_questions.choose_language(pair, language),
        )
        for pair in pairs
        if not have_equal_answers(pair)
        for sides in ORDERS
    ]


def combine(pairs: Sequence[AnswerPair], judgements: Sequence[Judgement]) -> list[PairOutcome]:
    """Return the outcome of each pair; `judgements` are those on `build_questions(pairs)`, in that order."""
    remaining = iter(judgements)
    outcomes = []
    for pair in pairs:
        if have_equal_answers(pair):
            outcomes.append(PairOutcome(pair, TIE, ()))
            continue
        orders = tuple(read_order(next(remaining), sides) for sides in ORDERS)
        outcomes.append(PairOutcome(pair, _decide(orders), orders))
    return outcomes


def read_order(judgement: Judgement, sides: Sequence[str]) -> OrderVerdict:
    """Return what a judgement says about the sides of the answers A and B."""
    choice = judgement.choice
    if choice in (INVALID, MISSING):
        return OrderVerdict(sides[0], choice, choice, None, judgement.reasoning, judgement.problem)
    prefers = {EQUAL: TIE, FIRST: sides[0], SECOND: sides[1]}[choice]
    weights = dict(zip(PAIR_OPTIONS, judgement.weights, strict=True))
    tuned = weights[PAIR_OPTIONS[list(sides).index(TUNED)]] + weights[EQUAL] / 2
    return OrderVerdict(sides[0], choice, prefers, tuned, judgement.reasoning, "")


def _decide(orders: Sequence[OrderVerdict]) -> str:
    """Return the verdict on a pair from those in both orders."""
    preferences = {order.prefers for order in orders}
    for absent in (INVALID, MISSING):
        if absent in preferences:
            return absent
    return preferences.pop() if len(preferences) == 1 else TIE
