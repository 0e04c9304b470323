"""Where the weights or the settings of a GGUF file are not those of the folder that it was made from.

Inputs: both, as transformers reads them. Outputs: the first difference in words. Only a failed proof needs this. Memory
holds the model of the GGUF file, and of the folder one tensor. Not here: how far answers differ (`answer_comparison`).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trl_sft.errors import RecipeError
from trl_sft.serving import base_tensors
from trl_sft.serving.proof.exported_model import ExportedModel
from trl_sft.serving.proof.folder_reader import describe_weights, find_place

# the root mean square of a rounding error, as a share of that of the tensor, at most
_ROUNDING = {"f32": 1e-6, "f16": 1e-3, "bf16": 4e-3, "q8_0": 0.02}
_NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_COARSE = 0.15
_SETTINGS = (
    *("rms_norm_eps", "layer_norm_eps", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act"),
    *("num_hidden_layers", "hidden_size", "intermediate_size", "sliding_window", "tie_word_embeddings"),
)


def find_difference(exported: ExportedModel, merged: ExportedModel) -> str:
    """Return the first setting or tensor of a GGUF file that is not that of the folder; "" = all are.

    Args:
        exported: the GGUF file.
        merged: the folder that it was made from.

    """
    place, keywords = find_place(exported)
    difference = _compare_settings(
        AutoConfig.from_pretrained(place, **keywords), AutoConfig.from_pretrained(merged.path)
    )
    if difference:
        return difference
    model = AutoModelForCausalLM.from_pretrained(place, **describe_weights(exported))
    empty = base_tensors.load_on_meta(merged.path)
    names = set(empty.state_dict())
    try:
        tensors = base_tensors.BaseTensors(merged.path, empty)
    except RecipeError:  # files that hold the weights otherwise than the model does
        return ""
    limit = max(_find_rounding(exported), _find_rounding(merged))  # the folder may be rounded more than the file
    for name, value in model.state_dict().items():
        if name not in names:
            continue
        expected = tensors.read(name).float()
        if value.shape != expected.shape:
            return f"{name} is {tuple(value.shape)} in the file and {tuple(expected.shape)} in the folder"
        norm = float(torch.linalg.vector_norm(expected))
        error = float(torch.linalg.vector_norm(value.float() - expected)) / (norm or 1.0)
        if not error <= limit:
            return f"{name} differs by {error:.2g} of its size, of which rounding explains {limit:g}"
    return ""


def _find_rounding(exported: ExportedModel) -> float:
    """Return the largest rounding error of an exported model's type, as a share of a tensor."""
    name = exported.number_type.lower()
    return _ROUNDING.get(_NAMES.get(name, name), _COARSE)


def _compare_settings(ours: Any, theirs: Any) -> str:
    """Return the first setting that differs between two configurations; "" = none does."""
    ours, theirs = ours.get_text_config(), theirs.get_text_config()
    for name in _SETTINGS:
        values = [getattr(config, name, None) for config in (ours, theirs)]
        if None not in values and values[0] != values[1] and not _is_close(*values):
            shown = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
            return f"{name} is {shown[0]} in the file and {shown[1]} in the folder"
    ropes = [(getattr(config, "rope_parameters", None) or {}).get("rope_theta") for config in (ours, theirs)]
    if None not in ropes and not _is_close(*ropes):
        return f"rope_theta is {ropes[0]:g} in the file and {ropes[1]:g} in the folder"
    return ""


def _is_close(ours: Any, theirs: Any) -> bool:
    """Tell whether two values are equal as float32 has them."""
    if not isinstance(ours, float) and not isinstance(theirs, float):
        return bool(ours == theirs)
    return bool(abs(ours - theirs) <= 1e-5 * max(abs(ours), abs(theirs)))
