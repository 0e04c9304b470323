"""The attention kernels of a CUDA device, on tensors without storage.

In: fake tensors, which claim to be on a CPU. Out: tensors of the shapes that the kernels of a GPU create and store.
Nothing is computed. The choice of the kernel follows PyTorch's order of preference (`sdp_utils.cpp`). Deliberately
absent: the kernels of the loss (`model.patches.imitate_triton_head`).
"""

from __future__ import annotations

from typing import Any

import torch


def attend(
    _: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention with the kernel of sdpa: flash for half precision without a mask, else mem-efficient.

    torch 2.8 to 2.13 name both kernels among their private operators.

    Args:
        query: (batch, heads, tokens, width).
        key: (batch, key heads, tokens, width): there may be fewer heads.
        value: As `key`.
        attention_mask: None, or (batch, 1, tokens, tokens).
        **kwargs: What transformers hands on; dropout and scale count.

    Returns:
        The output (batch, tokens, heads, width), and None in place of attention weights.
    """
    dropout, scale = kwargs.get("dropout", 0.0), kwargs.get("scaling")
    half = query.dtype in (torch.float16, torch.bfloat16)
    if attention_mask is None and half and query.shape[-1] <= 256:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        output = flash(query, key, value, dropout, True, scale=scale)[0]
        return output.transpose(1, 2).contiguous(), None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    bias = None
    if attention_mask is not None:  # sdpa converts the mask into a float bias in every layer
        bias = torch.zeros_like(attention_mask, dtype=query.dtype).expand(-1, query.shape[1], -1, -1)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    output = efficient(query, key, value, bias, True, dropout, bias is None, scale=scale)[0]
    return output.transpose(1, 2).contiguous(), None
