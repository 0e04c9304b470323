"""What a CUDA device does otherwise than a CPU, on tensors without storage: the kernels of attention and of the head.

In: tensors that claim to be on a CPU. Out: tensors of the shapes that the kernels of a GPU make and keep. Nothing
is computed. Which kernel is taken: PyTorch's order of preference (`sdp_utils.cpp`), TRL's `_use_triton`.
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
    """Attend by the kernel that sdpa takes: flash for half precision without a mask, else the efficient one.

    query: (batch, heads, tokens, width); key and value may have fewer heads. Out: (batch, tokens, heads, width).
    """
    dropout, scale = kwargs.get("dropout", 0.0), kwargs.get("scaling")
    groups = query.shape[1] // key.shape[1]
    half = query.dtype in (torch.float16, torch.bfloat16)
    if attention_mask is None and half and query.shape[-1] <= 256:
        out = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout, True, scale=scale)[0]
        return out.transpose(1, 2).contiguous(), None
    if groups > 1:
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    bias = None
    if attention_mask is not None:  # sdpa makes numbers of it, in every layer anew
        bias = torch.zeros_like(attention_mask, dtype=query.dtype).expand(-1, query.shape[1], -1, -1)
    kernel = torch.ops.aten._scaled_dot_product_efficient_attention
    out = kernel(query, key, value, bias, True, dropout, bias is None, scale=scale)[0]
    return out.transpose(1, 2).contiguous(), None
