"""What transformers' own reader of GGUF files does not read of a file, so that only llama.cpp can prove it.

Inputs: a GGUF file, the configuration of the model that it was made from. Outputs: a sentence. transformers reads few
architectures, and of those not each setting: it leaves out most kinds of rotary scaling (transformers 5.17 to 5.23).
Deliberately not here: reading (`serving.proof`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from trl_sft.errors import first_line

# settings that change what a model computes, and that GGUF has a place for
_SETTINGS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "attention_bias", "mlp_bias", "query_pre_attn_scalar", "layer_types", "attn_logit_softcapping"),
    *("final_logit_softcapping", "rope_parameters"),
)


def find_unread(path: Path, config: Any) -> str:
    """Return what transformers does not read of a file; "" = it reads all that the model computes with.

    Args:
        path: Of the GGUF file.
        config: Of the model.

    """
    try:
        restored = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # an architecture that it does not know, and what else its reader does
        return first_line(error).rstrip(".")
    for name in _SETTINGS:
        expected, value = getattr(config, name, None), getattr(restored, name, None)
        if name == "head_dim":
            expected, value = (
                item or c.hidden_size // c.num_attention_heads for item, c in ((expected, config), (value, restored))
            )
        if name.endswith("_bias"):
            expected, value = bool(expected), bool(value)
        if name == "rope_parameters":
            expected, value = _simplify(expected), _simplify(value)
        if expected != value:
            return f"it reads `{name}` as {value}, and the model has {expected}"
    return ""


def _simplify(parameters: Any) -> Any:
    """Return the settings of the rotary embedding without those that are not set, and numbers as float."""
    if not isinstance(parameters, dict):
        return parameters
    return {
        name: float(value) if isinstance(value, int | float) else _simplify(value)
        for name, value in parameters.items()
        if value is not None
    }
