"""Training rows and held-out rows as tokens with their labels, by number, exactly as training uses them.

Inputs: the tokens of a split. Outputs: rows, and their mean losses under a live model. A loss is that of the row alone:
the mean over its labelled tokens, in nats. Not here: what a loss tells (`signals`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from trl_sft.tokenization.encode import IGNORED, EncodedRows

_FLOAT_BYTES = 4
_MOST_ROWS = 64  # of a batch


class TokenRow(NamedTuple):
    """One row with its loss mask."""

    number: int  # of the row in its split
    input_ids: np.ndarray  # (tokens,)
    labels: np.ndarray  # (tokens,); -100 = no loss


def read_rows(encoded: EncodedRows) -> list[TokenRow]:
    """Return each different row once, in the order of their numbers: with weights a row may be trained several times.

    A row of which truncation left no labelled token after the first one has no loss, and is left out.
    """
    table = encoded.rows.data
    numbers = table["row"].to_numpy()
    columns = []
    for name in ("input_ids", "labels"):
        column = table[name].combine_chunks()
        bounds = np.cumsum([0, *column.value_lengths().to_pylist()])
        columns.append((column.flatten().to_numpy(zero_copy_only=False), bounds))
    (ids, bounds), (labels, _) = columns
    _, places = np.unique(numbers, return_index=True)
    parts = [(int(numbers[place]), slice(bounds[place], bounds[place + 1])) for place in places.tolist()]
    rows = [TokenRow(number, ids[part], labels[part]) for number, part in parts]
    return [row for row in rows if (row.labels[1:] != IGNORED).any()]


def measure_losses(
    model: PreTrainedModel, rows: Sequence[TokenRow], *, logits_gib: float, count: Callable[[int], None]
) -> np.ndarray:
    """Return the loss of each row: (rows,) float64.

    Args:
        model: in the mode that it shall have: dropout acts in train mode.
        rows: with labels.
        logits_gib: GiB that the logits of a batch may take.
        count: is called with the number of rows that were measured.

    """
    losses = np.zeros(len(rows))
    with torch.no_grad():
        for batch in split_into_batches(model, rows, logits_gib):
            losses[batch] = compute_losses(model, [rows[place] for place in batch]).double().cpu().numpy()
            count(len(batch))
    return losses


def split_into_batches(model: PreTrainedModel, rows: Sequence[TokenRow], logits_gib: float) -> Iterator[list[int]]:
    """Yield the places of rows that fit into one batch; rows of similar length stand together."""
    most = logits_gib * 2**30 / (_FLOAT_BYTES * model.config.get_text_config().vocab_size)  # positions
    batch: list[int] = []
    for place in sorted(range(len(rows)), key=lambda place: len(rows[place].input_ids)):
        if batch and (len(batch) == _MOST_ROWS or (len(batch) + 1) * len(rows[place].input_ids) > most):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def compute_losses(model: PreTrainedModel, rows: Sequence[TokenRow]) -> torch.Tensor:
    """Return the loss of each row of one batch: (rows,) float32, with a gradient where one is wanted."""
    longest = max(len(row.input_ids) for row in rows)
    input_ids = torch.zeros((len(rows), longest), dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORED, dtype=torch.long)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        input_ids[index, :length] = torch.from_numpy(row.input_ids.astype(np.int64))
        labels[index, :length] = torch.from_numpy(row.labels.astype(np.int64))
        mask[index, :length] = 1
    device = model.device
    logits = model(input_ids=input_ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    targets = labels[:, 1:].to(device)
    is_labelled = targets != IGNORED
    losses = torch.zeros(targets.shape, dtype=torch.float32, device=device)
    losses[is_labelled] = torch.nn.functional.cross_entropy(
        logits[:, :-1][is_labelled].float(), targets[is_labelled], reduction="none"
    )
    return losses.sum(1) / is_labelled.sum(1)
