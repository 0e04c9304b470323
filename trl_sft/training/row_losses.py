"""The loss of each held-out row by itself, so that two runs can be compared row by row.

Inputs: the live trainer, the tokens of the evaluation sets, the held-out rows that are asked. Outputs: the mean loss of
each one's loss tokens. Not here: the loss of an evaluation set (the Trainer's), and the comparison of runs
(`reports.comparison`).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from trl import SFTTrainer

from trl_sft.tokenization.build import TokenizedRows
from trl_sft.training import time_probe
from trl_sft.training.verify import Verification


def measure_losses(
    trainer: SFTTrainer, datasets: TokenizedRows, rows: Iterable[int], *, verification: Verification
) -> dict[int, float]:
    """Return the loss of held-out rows, each computed alone as an evaluation computes that of a batch.

    Args:
        trainer: holds the model; its counters and random states stay as they are.
        datasets: the tokens of all evaluation sets.
        rows: numbers of rows, from 0, over the evaluation sets in their order.
        verification: counts what the loop consumes; it counts none of these passes.

    Returns:
        Number of the row -> mean loss of its loss tokens. A row that was left out, or has no finite loss, is absent.

    """
    losses: dict[int, float] = {}
    with verification.paused(), time_probe.restored(trainer):
        for row, (input_ids, labels) in _find_tokens(datasets, rows).items():
            batch = {
                "input_ids": torch.tensor([input_ids]),
                "attention_mask": torch.ones((1, len(input_ids)), dtype=torch.long),
                "labels": torch.tensor([labels]),
            }
            trainer.model.eval()
            loss = trainer.prediction_step(trainer.model_wrapped, batch, prediction_loss_only=True)[0]
            if loss is not None and bool(torch.isfinite(loss)):
                losses[row] = float(loss)
    return losses


def _find_tokens(datasets: TokenizedRows, rows: Iterable[int]) -> dict[int, tuple[list[int], list[int]]]:
    """Return input_ids and labels, (tokens,) each, of the rows that have tokens."""
    sets = [parts for name, parts in datasets.encoded.items() if name != "train"]
    ends = np.cumsum([len(split.order) for split, _ in sets])
    places = [
        {number: place for place, number in enumerate(encoded.rows.with_format("numpy")["row"][:].tolist())}
        for _, encoded in sets
    ]
    tokens = {}
    for row in rows:
        index = int(np.searchsorted(ends, row, side="right"))
        split, encoded = sets[index]
        number = int(split.order[row - (ends[index] - len(split.order))])
        if number in places[index]:
            values = encoded.rows[places[index][number]]
            tokens[row] = values["input_ids"], values["labels"]
    return tokens
