"""The loss of texts under a model: of plain paragraphs, or of answers after their prompts.

Inputs: a live model, and token ids of contexts and of what follows them. Outputs: the loss of each text. Not here:
which texts (`suite`), and what a difference means (`suite_result`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LEAST_TOKENS = 1  # that are scored


class TextLoss(NamedTuple):
    """The loss of one text."""

    total: float  # nats, the sum over its tokens
    tokens: int  # that were scored; 0 = the text has none

    @property
    def mean(self) -> float:
        """The mean loss of a token."""
        return self.total / self.tokens


def measure(
    model: PreTrainedModel, rows: Sequence[tuple[Sequence[int], Sequence[int]]], *, limit: int | None = None
) -> list[TextLoss]:
    """Return the loss of each text, one row at a time, so that no padding changes it.

    Args:
        model: in eval mode.
        rows: (context, text): token ids. Tokens of the text alone are scored, and the first one only after a context.
        limit: the most positions of the model; what is longer is cut at its end. None = no end.

    """
    losses = []
    for context, text in rows:
        ids = [*context, *text][:limit]
        start = max(len(context), 1)
        if len(ids) - start < _LEAST_TOKENS:
            losses.append(TextLoss(0.0, 0))
            continue
        batch = torch.tensor([ids], device=model.device)
        with torch.no_grad():
            logits = model(input_ids=batch).logits[0, start - 1 : -1].float()
        total = torch.nn.functional.cross_entropy(logits, batch[0, start:], reduction="sum")
        losses.append(TextLoss(float(total), len(ids) - start))
    return losses


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    """Return plain texts as rows of `measure`: the context is what the tokenizer writes before every text, or empty."""
    rows = []
    for text in texts:
        ids = list(tokenizer(text)["input_ids"])
        has_start = bool(ids) and ids[0] == tokenizer.bos_token_id
        while ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end a text
            ids.pop()
        rows.append((ids[:1], ids[1:]) if has_start else ([], ids))
    return rows


def compute_perplexity(losses: Sequence[TextLoss]) -> float | None:
    """Return the exponential of the mean loss of all tokens; None = there is none."""
    tokens = sum(loss.tokens for loss in losses)
    return math.exp(min(700.0, sum(loss.total for loss in losses) / tokens)) if tokens else None
