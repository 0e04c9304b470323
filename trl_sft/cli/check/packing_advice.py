"""Advice on packing and on grouping rows by length, where either would reduce padding.

Inputs: the tokenized rows, the live SFTConfig. Outputs: lines for `check`. The settings change the batches, so the
choice stays with the user. Only what `benchmarks/settings.py` showed to be faster is advised; the shares are counted
on these rows, by upstream's own sampler and packing. Not here: how packing works.
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

_LEAST_GAIN = 0.1  # share of the positions of a batch; less is within the variation of a step's time
_GROUP_BY_LENGTH = "group_by_length"


def advise(train: Any, ledger: Mapping[str, Any], args: SFTConfig, *, attention: str) -> Iterator[tuple[str, str]]:
    """Yield a line for each setting that would save a tenth of a batch's positions or more.

    Packing pays where attention keeps documents apart without a mask: document by document on a CPU and MPS, by flash
    attention on a GPU.

    Args:
        train: The rows as SFTTrainer gets them.
        ledger: Their counts.
        args: Batch size, packing, sampling.
        attention: `model.attn_implementation`; "" if the recipe does not set it.

    """
    if not isinstance(train, Dataset) or args.packing:
        return
    batch_size, padding = args.per_device_train_batch_size, ledger["padding"]
    unpacked, packed = padding["without_packing"], padding["with_packing"]
    keeps_apart = args.device.type in ("cpu", "mps") or "flash" in attention
    config = args.parallelism_config
    keeps_apart = keeps_apart and not (config is not None and config.cp_enabled)  # it drops the mask
    if packed is not None and keeps_apart and unpacked - packed > _LEAST_GAIN:
        share = (1 - unpacked) / (1 - packed)
        gain = f"train.packing: true trains the same tokens in {share:.0%} of the positions"
        yield "advice", f"{gain}; per_device_train_batch_size then counts packs of {args.max_length} tokens"
    if args.train_sampling_strategy != _GROUP_BY_LENGTH and batch_size > 1:
        grouped = _compute_grouped_padding(count_tokens(train), batch_size)
        if unpacked - grouped > _LEAST_GAIN:
            gain = f"{_GROUP_BY_LENGTH} reduces padding from {unpacked:.0%} to {grouped:.0%}"
            yield "advice", f"train.train_sampling_strategy: {gain}; the rows of a batch then have similar lengths"


def count_tokens(rows: Dataset) -> np.ndarray:
    """Return the number of tokens of each row: (rows,), in the order in which they are stored."""
    return np.asarray(pc.list_value_length(rows.data["input_ids"]).to_numpy())


def _compute_grouped_padding(lengths: np.ndarray, batch_size: int) -> float:
    """Return the share of padding in batches that upstream groups by length."""
    order = get_length_grouped_indices(lengths.tolist(), batch_size, generator=torch.Generator().manual_seed(0))
    batches = np.pad(lengths[order], (0, -len(order) % batch_size)).reshape(-1, batch_size)
    positions = int((batches.max(axis=1) * (batches > 0).sum(axis=1)).sum())
    return (positions - int(lengths.sum())) / positions
