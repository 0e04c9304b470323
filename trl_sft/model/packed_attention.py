"""Attention for packed rows where there is no kernel for several documents: one causal call for each document.

In: a model with sdpa, TRL's flattened batches. Out: the same model, whose attention goes document by document.
TRL flattens the packs of a batch into one row; sdpa then sees one long row with a dense mask of borders, which
costs the square of its length. TRL's collator hands the borders along (`cu_seq_lens_q`), so nothing else changes.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

DOCUMENTS = "documents"
_TRIAL = (5, 7)  # tokens of two documents
_EXACT, _ROUNDED = 1e-4, 3e-2  # relative to the largest logit, in float32 and in less


def install(model: PreTrainedModel) -> bool:
    """Have a model with sdpa attend within documents; false where it attends otherwise, or a trial shows a leak."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    if config._attn_implementation != "sdpa" or getattr(config, "attention_chunk_size", None):
        return False
    AttentionInterface.register(DOCUMENTS, attend)
    AttentionMaskInterface.register(DOCUMENTS, mask)
    base.set_attn_implementation(DOCUMENTS)
    if not _keeps_apart(base):
        base.set_attn_implementation("sdpa")
        return False
    return True


def _keeps_apart(model: PreTrainedModel) -> bool:
    """Tell whether two documents in one row give what each gives alone: some models hand no borders to attention."""
    ids = torch.arange(2, 2 + sum(_TRIAL), device=model.device)[None] % model.config.get_text_config().vocab_size
    borders = torch.tensor([0, _TRIAL[0], sum(_TRIAL)], dtype=torch.int32, device=model.device)
    packed = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": _TRIAL[1], "max_length_k": _TRIAL[1]}
    packed["position_ids"] = torch.cat([torch.arange(n, device=model.device) for n in _TRIAL])[None]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            together = model(input_ids=ids, use_cache=False, **packed).logits[0].float()
            alone = [model(input_ids=part, use_cache=False).logits[0].float() for part in ids.split(_TRIAL, dim=1)]
    except Exception:  # whatever a model raises for a mask or for borders that it does not know
        return False
    finally:
        model.train(was_training)
    apart = float((together - torch.cat(alone)).abs().max() / torch.cat(alone).abs().max())
    return apart < (_EXACT if model.dtype == torch.float32 else _ROUNDED)


def mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Return sdpa's mask; an empty one for a batch of packed rows, which `attend` knows them by.

    transformers tells packed rows from their positions: no padding, no skipping, no mask of the model's own.
    """
    packed = kwargs.get("attention_mask") is None and not kwargs.get("allow_is_causal_skip", True)
    if packed and not kwargs.get("use_vmap"):
        return torch.empty((1, 1, 1, 0), dtype=torch.bool, device=kwargs.get("device"))
    found: torch.Tensor | None = sdpa_mask(*args, **kwargs)
    return found


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return what transformers' attention functions do: (batch, tokens, heads, width).

    query: (batch, heads, tokens, width); key and value may have fewer heads.
    """
    packed = attention_mask is not None and attention_mask.numel() == 0
    borders = kwargs.get("cu_seq_lens_q")
    if borders is None and packed:
        borders = _borders(kwargs.get("position_ids"))
    if borders is None or not (packed or attention_mask is None):
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return found
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    window = kwargs["sliding_window"] if "sliding_window" in kwargs else getattr(module, "sliding_window", None)
    dropout, scale = kwargs.get("dropout", 0.0), kwargs.get("scaling")
    out = []
    for start, end in itertools.pairwise(borders.tolist()):
        here = slice(start, end)
        near = _near(end - start, window, query.device) if window and end - start > window else None
        causal = {"attn_mask": near, "is_causal": near is None, "dropout_p": dropout, "scale": scale}
        out.append(sdpa(query[:, :, here], key[:, :, here], value[:, :, here], **causal))
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


def _borders(positions: torch.Tensor | None) -> torch.Tensor:
    """Return where documents begin, and the end, from the positions of one row: (documents + 1,)."""
    if positions is None or positions.shape[0] != 1:
        raise RuntimeError("packed rows without their borders: model.attn_implementation: sdpa, in the recipe")
    starts = (positions[0] == 0).nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([positions.shape[1]])])


def _near(size: int, window: int, device: torch.device) -> torch.Tensor:
    """Return which earlier tokens a token sees within a window: (tokens, tokens)."""
    place = torch.arange(size, device=device)
    apart = place[:, None] - place[None, :]
    return (apart >= 0) & (apart < window)
