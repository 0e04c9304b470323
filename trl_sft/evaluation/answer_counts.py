"""How many answers are equal to the base model's, right, empty, repeating, or not ended by the model.

In: the samples of `before_after`. Out: counts. Deliberately absent: what they mean for the run (`training.verdict`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_sft.evaluation.before_after import AFTER, BEFORE, STOPPED
from trl_sft.evaluation.metrics import exact_match
from trl_sft.evaluation.repetition import is_repeating


@dataclass(frozen=True)
class BrokenAnswers:
    """How many answers of one model nobody can use, by reason; an answer may have several."""

    empty: int
    repeating: int
    endless: int  # the model did not end them, where the limit left room for the reference and its end token
    broken: int  # at least one of the three


@dataclass(frozen=True)
class AnswerCounts:
    """Counts of the prompts that both models answered."""

    prompts: int
    equal: int  # the tuned model's answer is the base model's
    right_before: int
    right_after: int
    gained: int  # right after training only
    lost: int  # right before training only
    before: BrokenAnswers
    after: BrokenAnswers
    is_one_text: bool = False  # the tuned model gives one and the same answer to all prompts, whose references differ


def count_answers(samples: Sequence[Mapping[str, Any]]) -> AnswerCounts | None:
    """Return the counts; None where no prompt has both answers.

    Args:
        samples: entries of samples.jsonl.

    """
    pairs = [sample for sample in samples if sample.get(BEFORE) is not None and sample.get(AFTER) is not None]
    if not pairs:
        return None
    right = [tuple(exact_match(sample[side], sample["reference"]) == 1 for side in (BEFORE, AFTER)) for sample in pairs]
    return AnswerCounts(
        prompts=len(pairs),
        equal=sum(sample[BEFORE].strip() == sample[AFTER].strip() for sample in pairs),
        is_one_text=len({sample[AFTER].strip() for sample in pairs}) == 1
        and len({sample["reference"].strip() for sample in pairs}) > 1,
        right_before=sum(before for before, _ in right),
        right_after=sum(after for _, after in right),
        gained=sum(after and not before for before, after in right),
        lost=sum(before and not after for before, after in right),
        before=_count_broken(pairs, BEFORE),
        after=_count_broken(pairs, AFTER),
    )


def _count_broken(samples: Sequence[Mapping[str, Any]], side: str) -> BrokenAnswers:
    """Return how many answers of one side are broken; what the reference is too, an answer may be."""
    empty = repeating = endless = broken = 0
    for sample in samples:
        text, reference = sample[side].strip(), sample["reference"].strip()
        reasons = (
            not text and bool(reference),
            is_repeating(text) and not is_repeating(reference),
            sample.get(STOPPED, {}).get(side) is False,
        )
        empty += reasons[0]
        repeating += reasons[1]
        endless += reasons[2]
        broken += any(reasons)
    return BrokenAnswers(empty, repeating, endless, broken)
