"""What a recipe would gain by settings that change its batches, and so stay the user's to choose.

In: the rows as tokens, the live SFTConfig. Out: lines for `check`. Only what `benchmarks/settings.py` showed to pay;
the shares are counted on these rows, by upstream's own sampler and packing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import SFTConfig

_WORTH = 0.1  # of the positions of a batch; less is within what a step's time varies by
_GROUPED = "group_by_length"


def lines(train: Any, ledger: Mapping[str, Any], args: SFTConfig, attention: str) -> Iterator[tuple[str, str]]:
    """Yield a line for each setting that would spare a tenth of a batch's positions or more.

    `train` are the rows as SFTTrainer gets them, `ledger` is theirs, `attention` how attention is computed. Packing
    pays where attention keeps to documents without a mask: by document on a CPU and MPS, by flash attention on a GPU.
    """
    if not isinstance(train, Dataset) or args.packing:
        return
    batch, padding = args.per_device_train_batch_size, ledger["padding"]
    without, packed = padding["without_packing"], padding["packed"]
    apart = args.device.type in ("cpu", "mps") or "flash" in attention
    if packed is not None and apart and without - packed > _WORTH:
        share = (1 - without) / (1 - packed)
        told = f"train.packing: true, the same tokens in {share:.0%} of the positions"
        yield "gain", f"{told}; per_device_train_batch_size then counts packs of {args.max_length}"
    if args.train_sampling_strategy != _GROUPED and batch > 1:
        grouped = _padding(lengths(train), batch)
        if without - grouped > _WORTH:
            told = f"train.train_sampling_strategy: {_GROUPED}, padding {grouped:.0%} in place of {without:.0%}"
            yield "gain", f"{told}; batches are then of like lengths"


def lengths(rows: Dataset) -> np.ndarray:
    """Return how many tokens each row has: (rows,); shuffled rows in the order of the file."""
    return np.asarray(pc.list_value_length(rows.data["input_ids"]).to_numpy())


def _padding(lengths: np.ndarray, batch: int) -> float:
    """Return the share of padding in batches that upstream groups by length."""
    order = get_length_grouped_indices(lengths.tolist(), batch, generator=torch.Generator().manual_seed(0))
    whole = np.pad(lengths[order], (0, -len(order) % batch)).reshape(-1, batch)
    room = int((whole.max(axis=1) * (whole > 0).sum(axis=1)).sum())
    return (room - int(lengths.sum())) / room
