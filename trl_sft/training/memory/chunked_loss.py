"""TRL's loss in chunks of tokens, under fake tensors: `loss_type: chunked_nll`, the default of trl 1.8 to 1.14.

In: a model that TRL would train with it, and the number of labelled positions. Out: the model with TRL's own forward
pass, which runs without values inside a block. Not here: the fused head of later versions (`model.patches`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from trl import SFTConfig
from trl.trainer import sft_trainer

from trl_sft.model import patches


def is_used(args: SFTConfig) -> bool:
    """Tell whether the installed TRL computes the loss of a run in chunks of tokens."""
    is_available = not patches.has_fused_head() and hasattr(sft_trainer, "_patch_chunked_ce_lm_head")
    return is_available and args.loss_type == "chunked_nll"


def add(model: PreTrainedModel) -> None:
    """Give a model the forward pass that `SFTTrainer` gives it under `loss_type: chunked_nll`. trl 1.8 to 1.14."""
    sft_trainer._patch_chunked_ce_lm_head(model, chunk_size=sft_trainer._CHUNKED_LM_HEAD_CHUNK_SIZE)


@contextlib.contextmanager
def count_chunks(labelled: int) -> Iterator[None]:
    """Let TRL's loss in chunks run inside the block on tensors without values. trl 1.8 to 1.14.

    TRL reads the number of labelled positions from a tensor. The steps are the same ones, with TRL's function for a
    chunk.

    Args:
        labelled: the number of labelled positions.

    """

    def compute(
        hidden_states: torch.Tensor,
        lm_head_weight: torch.Tensor,
        chunk_size: int,
        *,
        labels: torch.Tensor,
        **options: Any,
    ) -> tuple[torch.Tensor, ...]:
        hidden = hidden_states[..., :-1, :].reshape(-1, hidden_states.size(-1))
        targets = labels[..., 1:].reshape(-1)
        order = (targets != -100).to(torch.int8).argsort(descending=True, stable=True)
        hidden, targets = hidden[order], targets[order]
        sums = [hidden.new_zeros((), dtype=torch.float32) for _ in range(3)]  # loss, right tokens, entropy
        for start in range(0, labelled, chunk_size):
            rows = slice(start, start + chunk_size)
            tensors = (hidden[rows], lm_head_weight, options.get("lm_head_bias"), targets[rows])
            scales = (options.get("logit_scale", 1.0), options.get("final_logit_softcapping"))
            chunk = checkpoint(sft_trainer._chunk, *tensors, *scales, use_reentrant=False)
            sums = [total + part for total, part in zip(sums, chunk, strict=True)]
        return *sums, (targets != -100).sum()

    original = sft_trainer._chunked_cross_entropy_loss
    sft_trainer._chunked_cross_entropy_loss = compute
    try:
        yield
    finally:
        sft_trainer._chunked_cross_entropy_loss = original
