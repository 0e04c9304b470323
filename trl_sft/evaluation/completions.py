"""Whether a model completes rows word for word from their first half: training rows against held-out rows.

In: a live model and tokenized rows. Out: counts. The method is that of extractable memorisation (Carlini et al. 2022,
https://arxiv.org/abs/2202.07646): a prefix, greedy decoding, exact comparison. Held-out rows are the control, since an
answer that follows from its prompt is completed word for word without having been seen.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from trl import SFTTrainer

from trl_sft.evaluation import generate

_ROWS = 24  # of each kind
_LEAST_TOKENS = 4  # with loss: of fewer, half is next to nothing
_LONGEST = 32  # tokens that are compared
_LONGEST_PREFIX = 1024  # tokens before them, so that the trial stays short
_IGNORED = -100  # label of a token without loss


@dataclass(frozen=True)
class Completions:
    """How many rows the model completes word for word from their first half."""

    train_rows: int
    train_equal: int
    eval_rows: int
    eval_equal: int


def compare_completions(trainer: SFTTrainer, train: Any, held_out: Any) -> Completions:
    """Return how many of 24 training rows and of 24 held-out rows are completed word for word.

    Args:
        trainer: holds the live model.
        train: rows with input_ids and labels, (tokens,) each, not packed.
        held_out: the same of the evaluation set.

    """
    counts = [_count_equal(trainer, list(_draw(rows))) for rows in (train, held_out)]
    (train_rows, train_equal), (eval_rows, eval_equal) = counts
    return Completions(train_rows, train_equal, eval_rows, eval_equal)


def split_row(input_ids: Sequence[int], labels: Sequence[int]) -> tuple[list[int], list[int]] | None:
    """Return the tokens up to the middle of the last answer, and those that follow; None for a short answer.

    Args:
        input_ids: (tokens,).
        labels: (tokens,), -100 where a token carries no loss.

    """
    end = len(labels)
    while end and labels[end - 1] == _IGNORED:
        end -= 1
    start = end
    while start and labels[start - 1] != _IGNORED:
        start -= 1
    if end - start < _LEAST_TOKENS:
        return None
    middle = start + (end - start) // 2
    return list(input_ids[max(0, middle - _LONGEST_PREFIX) : middle]), list(
        input_ids[middle : min(end, middle + _LONGEST)]
    )


def _draw(rows: Any) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the halves of rows, drawn with a seed of their own, so that the run's random state stays."""
    order = random.Random(0).sample(range(len(rows)), min(len(rows), 4 * _ROWS))
    halves = (split_row(rows[index]["input_ids"], rows[index]["labels"]) for index in order)
    yield from [half for half in halves if half is not None][:_ROWS]


def _count_equal(trainer: SFTTrainer, halves: Sequence[tuple[list[int], list[int]]]) -> tuple[int, int]:
    """Return the number of rows, and how many of them the model completes as they are."""
    model, equal = trainer.model, 0
    size, pad = trainer.args.per_device_eval_batch_size, trainer.processing_class.pad_token_id
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), trainer.autocast_smart_context_manager():
            for start in range(0, len(halves), size):
                batch = halves[start : start + size]
                longest = max(len(rest) for _, rest in batch)
                input_ids, mask = generate.pad_left([prefix for prefix, _ in batch], pad, trainer.args.device)
                config = GenerationConfig(do_sample=False, max_new_tokens=longest, pad_token_id=pad, eos_token_id=None)
                output = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=config)
                rests = output[:, input_ids.shape[1] :].tolist()
                equal += sum(tokens[: len(rest)] == rest for tokens, (_, rest) in zip(rests, batch, strict=True))
    finally:
        model.train(was_training)
    return len(halves), equal
