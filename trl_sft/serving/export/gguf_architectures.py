"""Which models a GGUF file can hold, and what llama.cpp needs to know to compute them.

Inputs: the configuration of a model. Outputs: an `Architecture`, the values of its metadata, changed tensors, or a
refusal by name before anything is written. What llama.cpp computes is fixed by its architectures, so a setting of the
configuration that it does not read is refused here. Facts: llama.cpp's `src/models`, the names of the `gguf` package.
Deliberately not here: files (`gguf_file`) and the tokenizer (`gguf_vocabulary`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from trl_sft.errors import Fault, RecipeError
from trl_sft.serving.export import gguf_rope

_SILU = ("silu", "swish")
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh")  # ggml's gelu is the tanh form


@dataclass(frozen=True)
class Architecture:
    """How a class of transformers is written for llama.cpp.

    Attributes:
        name: of the architecture in GGUF.
        activations: values of `hidden_act` that llama.cpp computes for it.
        is_rotated: whether rows of query and key are put in the order of llama.cpp's rotary embedding.
        has_added_one: whether norms are stored with 1 added.
        norm: "rms" or "layer".
        rope_types: kinds of rotary scaling that llama.cpp reads for it.
        check: returns what else llama.cpp cannot compute; "" = nothing.
        describe: returns further metadata, by key without the name of the architecture.

    """

    name: str
    activations: tuple[str, ...] = _SILU
    is_rotated: bool = False
    has_added_one: bool = False
    norm: str = "rms"
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")
    check: Callable[[Any], str] = lambda _config: ""
    describe: Callable[[Any], dict[str, Any]] = lambda _config: {}


def find_architecture(config: Any, where: str) -> Architecture:
    """Return how a model is written.

    Args:
        config: Of transformers.
        where: The place that a refusal names.

    Raises:
        RecipeError: The architecture, or one of its settings, cannot be written.

    """
    name = (config.architectures or [""])[0]
    architecture = ARCHITECTURES.get(name)
    if architecture is None:
        known = ", ".join(sorted(ARCHITECTURES))
        problem = f"{name or 'a model that names no architecture'} cannot be written as GGUF by this command"
        fix = f"Export with `--to merged` or `--to vllm`; GGUF is written for {known}."
        raise RecipeError(Fault(where, problem, fix, code="export.unsupported_architecture"))
    problem = _find_unsupported(config, architecture)
    if problem:
        fix = "Export with `--to merged` or `--to vllm`."
        raise RecipeError(Fault(where, f"{name}: {problem}", fix, code="export.unsupported_architecture"))
    return architecture


def _find_unsupported(config: Any, architecture: Architecture) -> str:
    """Return the first setting that llama.cpp does not compute; "" = none."""
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    activation = activation or getattr(config, "activation_function", None)
    if activation not in architecture.activations:
        names = " or ".join(f"`{name}`" for name in architecture.activations)
        return f"llama.cpp computes {names} for `{architecture.name}`, and the model has `hidden_act: {activation}`"
    if getattr(config, "quantization_config", None) is not None:
        return "its weights are quantized, and GGUF is written from weights that are not"
    return architecture.check(config) or gguf_rope.find_unsupported(config, architecture.rope_types)


def describe_parameters(config: Any, architecture: Architecture) -> dict[str, Any]:
    """Return the metadata of a model, by key without the name of the architecture: numbers, texts and lists."""
    heads, key_heads = count_heads(config)
    values: dict[str, Any] = {
        "context_length": read_context_length(config),
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": _read_feed_forward_length(config),
        "attention.head_count": heads,
        "attention.head_count_kv": key_heads,
        "attention.key_length": get_head_size(config),
        "attention.value_length": get_head_size(config),
        "vocab_size": config.vocab_size,
    }
    epsilon = next(
        float(getattr(config, name))
        for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
        if getattr(config, name, None) is not None
    )
    values[f"attention.layer_norm{'_rms' if architecture.norm == 'rms' else ''}_epsilon"] = epsilon
    return values | gguf_rope.describe(config, get_head_size(config)) | architecture.describe(config)


def convert(name: str, tensor: torch.Tensor, *, config: Any, architecture: Architecture) -> torch.Tensor:
    """Return a tensor as llama.cpp computes with it.

    Args:
        name: In the model of transformers.
        tensor: Its values.
        config: Of the model.
        architecture: Of the model.

    """
    heads, key_heads = count_heads(config)
    if architecture.is_rotated and ".self_attn.q_proj." in name:
        return _rotate(tensor, heads)
    if architecture.is_rotated and ".self_attn.k_proj." in name:
        return _rotate(tensor, key_heads)
    if architecture.has_added_one and name.endswith("norm.weight"):
        return tensor.float() + 1
    if architecture.name == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return tensor.T.contiguous()  # Conv1D stores (inputs, outputs)
    return tensor


def _rotate(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rows of query or key so that the two values of a rotation stand side by side, not half a head apart."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape).contiguous()


def count_heads(config: Any) -> tuple[int, int]:
    """Return the number of heads of queries, and of keys and values."""
    heads = int(config.num_attention_heads)
    return heads, int(getattr(config, "num_key_value_heads", None) or heads)


def get_head_size(config: Any) -> int:
    """Return the number of values of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def read_context_length(config: Any) -> int:
    """Return how many tokens llama.cpp computes as transformers does: fewer than the positions with a sliding window.

    llama.cpp attends to all tokens in the architectures of `_WITHOUT_WINDOW`, so that the two are equal up to the
    window only.
    """
    lengths = [int(config.max_position_embeddings)]
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "model_type", "") in _WITHOUT_WINDOW and _has_window(config):
        lengths.append(int(window))
    return min(lengths)


_WITHOUT_WINDOW = ("mistral", "qwen2", "qwen3", "phi3", "starcoder2")


def _has_window(config: Any) -> bool:
    """Tell whether a layer of the model attends to a sliding window."""
    kinds = getattr(config, "layer_types", None)
    return True if kinds is None else "sliding_attention" in kinds


def _read_feed_forward_length(config: Any) -> int:
    """Return the inner size of the feed-forward part."""
    size = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    return int(size or 4 * config.hidden_size)


def _check_phi(config: Any) -> str:
    """Return why a Phi model cannot be computed; "" = it can."""
    return "llama.cpp does not compute `qk_layernorm: true`" if getattr(config, "qk_layernorm", False) else ""


def _check_gemma2(config: Any) -> str:
    """Return why a Gemma 2 model cannot be computed; "" = it can."""
    return _check_scale(config, 46) or _check_pattern(config, 2)


def _check_gemma3(config: Any) -> str:
    """Return why a Gemma 3 model cannot be computed; "" = it can."""
    if getattr(config, "use_bidirectional_attention", False):
        return "llama.cpp does not compute `use_bidirectional_attention: true`"
    return _check_scale(config, 62) or _check_pattern(config, 6)


def _check_scale(config: Any, layers_of_27b: int) -> str:
    """Return why llama.cpp scales attention otherwise; "" = it scales alike.

    Args:
        config: Of the model.
        layers_of_27b: By its number of layers llama.cpp knows the model that it scales by another size.

    """
    expected = get_head_size(config)
    if config.num_hidden_layers == layers_of_27b:
        expected = config.hidden_size / config.num_attention_heads
    if math.isclose(float(config.query_pre_attn_scalar), expected):
        return ""
    return f"llama.cpp scales attention by {expected:g}, and `query_pre_attn_scalar` is {config.query_pre_attn_scalar}"


def _check_pattern(config: Any, period: int) -> str:
    """Return why the order of sliding and full layers is another; "" = it is llama.cpp's."""
    kinds = [
        "full_attention" if (layer + 1) % period == 0 else "sliding_attention"
        for layer in range(config.num_hidden_layers)
    ]
    if list(config.layer_types) == kinds:
        return ""
    return f"llama.cpp has full attention in each layer number {period}, and `layer_types` has another order"


def _describe_gemma2(config: Any) -> dict[str, Any]:
    """Return the metadata that Gemma 2 has beside the common one."""
    values: dict[str, Any] = {"attention.sliding_window": int(config.sliding_window)}
    if config.attn_logit_softcapping is not None:
        values["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
    if config.final_logit_softcapping is not None:
        values["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return values


def _describe_gemma3(config: Any) -> dict[str, Any]:
    """Return the metadata that Gemma 3 has beside the common one."""
    values: dict[str, Any] = {"attention.sliding_window": int(config.sliding_window)}
    values["rope.freq_base_swa"] = float(gguf_rope.read_parameters(config, "sliding_attention")["rope_theta"])
    if config.final_logit_softcapping is not None:
        values["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return values


_LLAMA = Architecture("llama", is_rotated=True, rope_types=("default", "linear", "yarn", "llama3"))
ARCHITECTURES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "GemmaForCausalLM": Architecture("gemma", _TANH_GELU, has_added_one=True),
    "Gemma2ForCausalLM": Architecture(
        "gemma2", _TANH_GELU, has_added_one=True, check=_check_gemma2, describe=_describe_gemma2
    ),
    "Gemma3ForCausalLM": Architecture(
        "gemma3",
        _TANH_GELU,
        has_added_one=True,
        rope_types=("default", "linear"),
        check=_check_gemma3,
        describe=_describe_gemma3,
    ),
    "PhiForCausalLM": Architecture("phi2", _TANH_GELU, norm="layer", rope_types=("default",), check=_check_phi),
    "Phi3ForCausalLM": Architecture("phi3", rope_types=("default",)),
}
