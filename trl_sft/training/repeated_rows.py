"""Rows that are repeated so that every process gets as many batches carry no label.

accelerate fills the last batch of an epoch, and of an evaluation, with rows from its beginning (`even_batches`). Their
loss would count twice, and one process would train otherwise than several. Here their labels become -100 before the
Trainer counts the tokens of a step. The row itself stays: a process without a batch would leave the others waiting.

Inputs: the live trainer. Outputs: its functions that hand out batches, replaced. With one process nothing is repeated,
and nothing is replaced. Not here: which rows a process gets, which accelerate decides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from trl import SFTTrainer

from trl_sft import ranks

ROW_TOKENS = "row_tokens"  # in a batch: tokens of each row of a flattened batch, (rows,)
_NO_LABEL = -100


class RowTokensCollator:
    """A collator that also says how many tokens each row has, where all rows of a batch lie in one line."""

    def __init__(self, collator: Any) -> None:
        """Take the collator that makes the batch."""
        self._collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch with the number of tokens of each row."""
        lengths = [len(example["input_ids"]) for example in examples]
        batch: dict[str, Any] = self._collator(examples)
        return batch | {ROW_TOKENS: torch.tensor([lengths])}

    def __getattr__(self, name: str) -> Any:
        """Return the attributes of the collator itself, which the Trainer reads."""
        return getattr(self._collator, name)


def remove_labels(trainer: SFTTrainer) -> None:
    """Let repeated rows carry no label from now on, in training and in evaluation."""
    if ranks.count() == 1:
        return
    if trainer.padding_free:
        trainer.data_collator = RowTokensCollator(trainer.data_collator)
    get_batches, predict = trainer.get_batch_samples, trainer.prediction_step

    def get_labelled_batches(batches: Iterator[dict[str, Any]], *args: Any, **kwargs: Any) -> Any:
        size = trainer.args.per_device_train_batch_size
        repeats = not trainer.args.dataloader_drop_last and hasattr(trainer.train_dataset, "__len__")
        total = len(trainer.train_dataset) if repeats else 0
        return get_batches((_remove(trainer, batch, size, total=total) for batch in batches), *args, **kwargs)

    def predict_labelled(model: torch.nn.Module, batch: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        size = trainer.args.per_device_eval_batch_size
        if count_own_rows(trainer, size) == 0:  # without labels it had no loss; the Trainer leaves it out anyway
            size = 0
        with _own_mean(trainer):
            return predict(model, _remove(trainer, batch, size), *args, **kwargs)

    trainer.get_batch_samples, trainer.prediction_step = get_labelled_batches, predict_labelled


def count_own_rows(trainer: SFTTrainer, size: int, *, total: int = 0) -> int:
    """Return how many rows of this process's batch are not repeated ones; the others stand behind them.

    Args:
        trainer: Is live.
        size: Rows of a batch of one process.
        total: Rows of the set, for the epoch of a resume: accelerate (1.15) does not count there, since its
            `SkipBatchSampler` has no `batch_size`; 0 = nothing is repeated where it does not count.

    """
    state = trainer.accelerator.gradient_state
    remainder = state.remainder
    if remainder < 0:
        remainder = total % (size * ranks.count()) if total else 0
    if not state.end_of_dataloader or remainder == 0:
        return size
    return int(min(max(remainder - ranks.get_number() * size, 0), size))


@contextlib.contextmanager
def _own_mean(trainer: SFTTrainer) -> Iterator[None]:
    """Let a process compute the mean over its own tokens, of which the Trainer takes the mean weighted by rows.

    transformers 5.17 with trl 1.8 divides by the tokens of all processes here, and weights that by rows too.
    """
    average = trainer.args.average_tokens_across_devices
    trainer.args.average_tokens_across_devices = False
    try:
        yield
    finally:
        trainer.args.average_tokens_across_devices = average


def _remove(trainer: SFTTrainer, batch: dict[str, Any], size: int, *, total: int = 0) -> dict[str, Any]:
    """Return a batch of `size` rows whose repeated rows carry no label."""
    tokens = batch.pop(ROW_TOKENS, None)
    rows = count_own_rows(trainer, size, total=total)
    labels = batch.get("labels")
    if labels is None or rows == size:
        return batch
    labels = labels.clone()
    if tokens is None:
        labels[rows:] = _NO_LABEL
    else:
        labels[:, int(tokens[0, :rows].sum()) :] = _NO_LABEL
    return batch | {"labels": labels}
