"""The rotary embedding of a model, as metadata and tensors of a GGUF file.

Inputs: the configuration of a model. Outputs: metadata, factors of frequencies, or what llama.cpp does not compute.
The factors come from transformers' own functions, so that no formula is kept here. Deliberately not here: the rest of
the model (`gguf_architectures`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_YARN_KEYS = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor"}
_YARN_KEYS |= {"beta_fast", "beta_slow", "partial_rotary_factor"}


def read_parameters(config: Any, kind: str = "full_attention") -> dict[str, Any]:
    """Return the settings of the rotary embedding of a kind of layer; {} = the model has none."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = parameters.get(kind)
    return dict(nested if isinstance(nested, dict) else parameters)


def read_type(config: Any) -> str:
    """Return the kind of scaling: "default", "linear", "llama3", ...; "" = no rotary embedding."""
    parameters = read_parameters(config)
    return str(parameters.get("rope_type", "default")) if parameters else ""


def find_unsupported(config: Any, types: tuple[str, ...]) -> str:
    """Return what llama.cpp does not compute of the rotary embedding; "" = nothing.

    Args:
        config: Of the model.
        types: Kinds of scaling that the architecture has in llama.cpp.

    """
    parameters, rope_type = read_parameters(config), read_type(config)
    if rope_type and rope_type not in types:
        return f"`rope_type: {rope_type}` of its rotary embedding cannot be written"
    unknown = sorted(set(parameters) - _YARN_KEYS) if rope_type == "yarn" else []
    if unknown:
        return f"`{unknown[0]}` of its rotary embedding cannot be written"
    if rope_type == "yarn" and not math.isclose(_compute(config)[1], 0.1 * math.log(parameters["factor"]) + 1):
        return "`attention_factor` of its rotary embedding cannot be written"
    sliding = read_parameters(config, "sliding_attention")
    if sliding != parameters and sliding.get("rope_type", "default") != "default":
        return "scaling of the rotary embedding of sliding layers cannot be written"
    return ""


def describe(config: Any, head_size: int) -> dict[str, Any]:
    """Return the metadata of the rotary embedding, by key without the name of the architecture."""
    parameters, rope_type = read_parameters(config), read_type(config)
    if not parameters:
        return {}
    share = parameters.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    values: dict[str, Any] = {
        "rope.dimension_count": int(head_size * share),
        "rope.freq_base": float(parameters["rope_theta"]),
    }
    if rope_type in ("linear", "yarn"):
        values |= {"rope.scaling.type": rope_type, "rope.scaling.factor": float(parameters["factor"])}
    if rope_type == "yarn":
        values["rope.scaling.original_context_length"] = int(parameters["original_max_position_embeddings"])
        for name in ("beta_fast", "beta_slow"):
            if parameters.get(name) is not None:
                values[f"rope.scaling.yarn_{name}"] = float(parameters[name])
    return values


def compute_factors(config: Any) -> dict[str, torch.Tensor]:
    """Return the tensors by which llama.cpp divides frequencies, by their names in the file; {} = none."""
    rope_type = read_type(config)
    if rope_type == "llama3":
        plain = dict(read_parameters(config), rope_type="default")
        return {"rope_freqs.weight": _compute_plain(config, plain) / _compute(config)[0]}
    return {}


def _compute(config: Any) -> tuple[torch.Tensor, float]:
    """Return the frequencies of transformers, and the factor by which it multiplies sine and cosine."""
    frequencies, factor = ROPE_INIT_FUNCTIONS[read_type(config)](config, torch.device("cpu"))
    return frequencies.float(), float(factor)


def _compute_plain(config: Any, parameters: dict[str, Any]) -> torch.Tensor:
    """Return the frequencies without scaling."""
    size = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    size = int(size * (parameters.get("partial_rotary_factor") or 1.0))
    exponents = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    return 1.0 / (float(parameters["rope_theta"]) ** exponents)
