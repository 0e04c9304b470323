"""Shares of overlap between an answer and its reference: chrF and BLEU of sacrebleu.

Inputs: a `CheckedAnswer`, or all answers of a model. Outputs: a number from 0 to 1. chrF compares characters, so
Chinese needs no words; BLEU splits Chinese into characters (sacrebleu's tokenizer `zh`). Not here: any other metric of
similarity.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from trl_sft.evaluation import eval_packages
from trl_sft.evaluation.checks.answer import CheckedAnswer
from trl_sft.evaluation.checks.text_match import has_ideographs

TIE_MARGIN = 0.01  # a difference of at most one point of 100 is a tie


def check_chrf(checked: CheckedAnswer) -> float:
    """Return chrF2 (Popović 2015) of the answer, from 0 to 1."""
    return float(_load_chrf().sentence_score(checked.answer, [checked.reference]).score) / 100


def check_bleu(checked: CheckedAnswer) -> float:
    """Return sentence BLEU with effective order, from 0 to 1."""
    metric = _load_bleu("zh" if has_ideographs(checked.reference) else "13a", True)
    return float(metric.sentence_score(checked.answer, [checked.reference]).score) / 100


def score_corpus(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return chrF and BLEU of all answers of a model together, from 0 to 1, as papers report them."""
    tokenizer = "zh" if has_ideographs("".join(references)) else "13a"
    return {
        "chrf": float(_load_chrf().corpus_score(list(answers), [list(references)]).score) / 100,
        "bleu": float(_load_bleu(tokenizer, False).corpus_score(list(answers), [list(references)]).score) / 100,
    }


@functools.cache
def _load_chrf() -> Any:
    """Return sacrebleu's chrF. Raises MissingPackage."""
    eval_packages.require_packages("the check chrf", "sacrebleu")
    from sacrebleu.metrics import CHRF

    return CHRF()


@functools.cache
def _load_bleu(tokenizer: str, effective_order: bool) -> Any:
    """Return sacrebleu's BLEU. Raises MissingPackage."""
    eval_packages.require_packages("the check bleu", "sacrebleu")
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize=tokenizer, effective_order=effective_order)
