"""Attention for packed rows on a CPU or MPS: one causal call of sdpa for each document.

In: a model with sdpa attention. Out: the same model, which computes attention document by document. TRL flattens the
packs of a batch into one row. sdpa then computes one long row with a dense mask of the document borders, and the cost
grows with the square of its length. TRL's collator passes the borders (`cu_seq_lens_q`), so nothing else changes.
Deliberately absent: GPUs, whose attention kernels handle several documents.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from trl_sft.model import patches
from trl_sft.model.load import unwrap_adapter

DOCUMENTS = "documents"  # the name of this attention in transformers' registry
_TRIAL_LENGTHS = (5, 7)  # tokens of the two documents of the trial
# largest difference of logits in the trial, relative to the largest logit
_TOLERANCE_FLOAT32, _TOLERANCE_HALF = 1e-4, 3e-2


def install(model: PreTrainedModel) -> bool:
    """Let a model with sdpa compute attention document by document.

    Returns:
        False, with the model unchanged, if it does not use sdpa, or if a trial shows that documents see each other.

    """
    base = unwrap_adapter(model)
    config = base.config.get_text_config()
    if patches.get_attention_name(config) != "sdpa" or getattr(config, "attention_chunk_size", None):
        return False
    AttentionInterface.register(DOCUMENTS, attend)
    AttentionMaskInterface.register(DOCUMENTS, make_mask)
    base.set_attn_implementation(DOCUMENTS)
    if not _separates_documents(base):
        base.set_attn_implementation("sdpa")
        return False
    return True


def _separates_documents(model: PreTrainedModel) -> bool:
    """Tell whether two documents in one row get the same logits as alone: some models pass no borders to attention."""
    device, total = model.device, sum(_TRIAL_LENGTHS)
    ids = torch.arange(2, 2 + total, device=device)[None] % model.config.get_text_config().vocab_size
    borders = torch.tensor([0, _TRIAL_LENGTHS[0], total], dtype=torch.int32, device=device)
    longest = max(_TRIAL_LENGTHS)
    packed = {
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
        "position_ids": torch.cat([torch.arange(length, device=device) for length in _TRIAL_LENGTHS])[None],
    }
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            together = model(input_ids=ids, use_cache=False, **packed).logits[0].float()
            parts = ids.split(_TRIAL_LENGTHS, dim=1)
            alone = torch.cat([model(input_ids=part, use_cache=False).logits[0].float() for part in parts])
    except Exception:  # a model may raise anything for a mask or for borders that it does not support
        return False
    finally:
        model.train(was_training)
    difference = float((together - alone).abs().max() / alone.abs().max())
    return difference < (_TOLERANCE_FLOAT32 if model.dtype == torch.float32 else _TOLERANCE_HALF)


def make_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Return the mask of sdpa; for a batch of packed rows an empty mask, by which `attend` recognises such a batch.

    transformers finds packed rows by their position ids. It then passes no padding mask and forbids `is_causal`.
    """
    packed = kwargs.get("attention_mask") is None and not kwargs.get("allow_is_causal_skip", True)
    if packed and not kwargs.get("use_vmap"):
        return torch.empty((1, 1, 1, 0), dtype=torch.bool, device=kwargs.get("device"))
    mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention within each document; an attention function in the registry of transformers.

    Args:
        module: The attention layer.
        query: (batch, heads, tokens, width).
        key: (batch, key heads, tokens, width), often with fewer heads than `query`.
        value: As `key`.
        attention_mask: The mask of `make_mask`.
        **kwargs: Passed by transformers: document borders, positions, dropout, scale, window.

    Returns:
        The output (batch, tokens, heads, width), and None in place of attention weights.

    """
    packed = attention_mask is not None and attention_mask.numel() == 0
    borders = kwargs.get("cu_seq_lens_q")
    if borders is None and packed:
        borders = _find_borders(kwargs.get("position_ids"))
    if borders is None or not (packed or attention_mask is None):
        output: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    window = kwargs["sliding_window"] if "sliding_window" in kwargs else getattr(module, "sliding_window", None)
    dropout, scale = kwargs.get("dropout", 0.0), kwargs.get("scaling")
    outputs = []
    for start, end in itertools.pairwise(borders.tolist()):
        tokens = slice(start, end)
        mask = _make_window_mask(end - start, window, query.device) if window and end - start > window else None
        outputs.append(
            sdpa(
                query[:, :, tokens],
                key[:, :, tokens],
                value[:, :, tokens],
                attn_mask=mask,
                is_causal=mask is None,
                dropout_p=dropout,
                scale=scale,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _find_borders(position_ids: torch.Tensor | None) -> torch.Tensor:
    """Return the start of each document and the end of the last, from the positions of one row: (documents + 1,)."""
    if position_ids is None or position_ids.shape[0] != 1:
        raise RuntimeError("packed rows have no document borders. Set model.attn_implementation: sdpa.")
    starts = (position_ids[0] == 0).nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([position_ids.shape[1]])])


def _make_window_mask(size: int, window: int, device: torch.device) -> torch.Tensor:
    """Return a mask of the earlier tokens that each token sees within a window: (tokens, tokens)."""
    index = torch.arange(size, device=device)
    distance = index[:, None] - index[None, :]
    return (distance >= 0) & (distance < window)
