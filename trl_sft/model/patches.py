"""Private parts of transformers, TRL and torch that this package reads or changes, one function for each.

In: upstream's classes and live objects. Out: the value of a private attribute, or the object with a defect repaired.
Each function names the versions that it was written for and, where it repairs a defect, when it can go.
`tests/model/test_upstream_internals.py` fails where upstream renames or changes one of these parts.

Deliberately absent: the private parts of PyTorch under fake tensors (`training.memory.fake_tensors`), of datasets
(`data.code_digest`), of tokenizers (`tokenization.special_tokens`), the clock of chat templates
(`tokenization.template_date`), the counters that a resumed run restores (`training.resume`), and upstream's sources
(`recipe.upstream`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import trl
from transformers import PretrainedConfig, PreTrainedModel
from trl.trainer import utils

# TRL's fused head in trl 1.16: names that it reads in `trl.trainer.utils`, and the parameters of its autograd function.
FUSED_HEAD_SINCE = (1, 16)
_FUSED_HEAD_NAMES = ("add_fused_lm_head", "_ChunkedLogProbFunction", "_use_triton", "maybe_gather_lm_head_ctx")
_FUSED_LOSS_PARAMETERS = (
    *("ctx", "hidden", "weight", "bias", "targets"),
    *("temperature", "chunk_size", "final_logit_softcapping", "logit_scale", "outputs"),
)
_TILE_FUNCTIONS = ("_forward_tile", "_backward_tile", "_addmm_fp32")  # of trl.kernels.chunked_logprob


# Reading private attributes


def get_attention_name(config: PretrainedConfig) -> str | None:
    """Return the name of the attention in a text configuration; None if it has none.

    transformers 5.17 to 5.23 keep it in `_attn_implementation` and have no public way to read it.
    """
    name: str | None = getattr(config, "_attn_implementation", None)
    return name


def build_from_config(model_class: Any, config: PretrainedConfig, **keywords: Any) -> PreTrainedModel:
    """Return a model of exactly this class, without loading weights.

    TRL loads the class that the configuration names; `AutoModelForCausalLM.from_config` may choose another one.
    transformers 5.17 to 5.23.
    """
    model: PreTrainedModel = model_class._from_config(config, **keywords)
    return model


def list_float32_modules(model: PreTrainedModel) -> list[str]:
    """Return parts of parameter names: a model class keeps such weights in float32. transformers 5.17 to 5.23."""
    return [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]


def unwrap_compiled(model: Any) -> Any:
    """Return the model inside `torch.compile`'s wrapper; `model` itself without one. torch 2.8 to 2.13."""
    return getattr(model, "_orig_mod", model)


def uses_triton(device: torch.device) -> bool:
    """Tell whether TRL's fused head computes with Triton on a device. trl 1.16; older versions have no fused head."""
    return bool(utils._use_triton(device))


def keep_columns(trainer: Any, names: Sequence[str]) -> None:
    """Let a trainer hand more columns of its datasets to its data collator, whatever the model's forward pass takes.

    transformers 5.17 to 5.23 keep the names in `_signature_columns`, which TRL fills when it is empty.
    """
    trainer._set_signature_columns_if_needed()
    trainer._signature_columns = [*trainer._signature_columns, *names]


# TRL's fused head


def has_fused_head() -> bool:
    """Tell whether the installed TRL computes the loss with a fused head."""
    return hasattr(utils, "add_fused_lm_head")


def find_fused_head_problem() -> str:
    """Return the reason why `replace_fused_loss` does not fit the installed TRL; "" if it fits."""
    missing = [name for name in _FUSED_HEAD_NAMES if not hasattr(utils, name)]
    if missing:
        return f"trl.trainer.utils has no {', '.join(missing)}"
    parameters = tuple(inspect.signature(utils._ChunkedLogProbFunction.forward).parameters)
    if parameters != _FUSED_LOSS_PARAMETERS:
        return f"the autograd function of TRL's fused head takes {', '.join(parameters)}"
    return ""


def expects_fused_head() -> bool:
    """Tell whether the installed TRL is version 1.16 or newer, which should have the fused head."""
    major, minor = trl.__version__.split(".")[:2]
    return (int(major), int(minor)) >= FUSED_HEAD_SINCE


@contextlib.contextmanager
def replace_fused_loss(function: Callable[..., Any]) -> Iterator[None]:
    """Let TRL's fused head call `function` inside the block, for labelled positions only.

    Without Triton, trl 1.16 computes every position. Remove this function when TRL's own fallback is as fast.
    """
    originals = utils._ChunkedLogProbFunction, utils._use_triton
    utils._ChunkedLogProbFunction = types.SimpleNamespace(apply=function)
    utils._use_triton = lambda _: True  # TRL then passes labelled positions only
    try:
        yield
    finally:
        utils._ChunkedLogProbFunction, utils._use_triton = originals


@contextlib.contextmanager
def imitate_triton_head() -> Iterator[None]:
    """Let TRL's fused head run inside the block as with Triton, whose kernels work in place. trl 1.16."""
    if find_fused_head_problem():
        yield
        return
    kernels = importlib.import_module(utils._ChunkedLogProbFunction.__module__)
    originals = {name: getattr(kernels, name) for name in _TILE_FUNCTIONS}
    uses_triton_original = utils._use_triton
    utils._use_triton = lambda _: True
    for name in _TILE_FUNCTIONS:
        setattr(kernels, name, lambda *_, **__: None)
    try:
        yield
    finally:
        utils._use_triton = uses_triton_original
        for name, function in originals.items():
            setattr(kernels, name, function)


# Repairs of a live model


def repair(model: PreTrainedModel) -> None:
    """Repair four defects of upstream that affect some models; the functions below describe them."""
    keep_backward_of_4bit_weights(model)
    dequantize_rows_of_any_length()
    resume_quantized_adapter_in_bfloat16(model)
    complete_head_of_trained_rows(model)


def keep_backward_of_4bit_weights(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from packing 4-bit weights for a kernel without a backward pass.

    bitsandbytes 0.50, on a CPU with AVX512-BF16: the first evaluation packs the weights, and they stay packed. Later
    gradients were wrong by up to 106% (docs/development/log.md). Remove this function when
    `test_four_bit_gradients_are_the_same_after_an_evaluation` passes without it.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def dequantize_rows_of_any_length() -> None:
    """Let bitsandbytes dequantize 4-bit weights on a CPU whose rows are no multiple of its blocks of 64 values.

    bitsandbytes 0.50, on a CPU with AVX-512: a block runs on from the end of a row into the next row, but the kernel
    begins each row with a new block, and so takes wrong scales. Weights with rows of 144 values differed from the
    original ones by 27% to 37%, and NF4 explains 9%. The same values as rows of one block each come out right. Remove
    this function when `test_four_bit_rows_that_no_block_divides_are_dequantized_rightly` says so. It does nothing where
    bitsandbytes is not loaded.
    """
    kernels: Any = sys.modules.get("bitsandbytes.backends.cpu.ops")
    if kernels is not None and not isinstance(kernels.lib, _RowsOfOneBlock):
        kernels.lib = _RowsOfOneBlock(kernels.lib)


class _RowsOfOneBlock:
    """bitsandbytes' compiled library, which gets 4-bit weights as rows that blocks divide."""

    def __init__(self, library: Any) -> None:
        """Take the library."""
        self._library = library

    def __getattr__(self, name: str) -> Any:
        """Return a function of the library; that of 4-bit weights with other rows."""
        function = getattr(self._library, name)
        if not name.startswith(("cdequantize_blockwise_cpu_fp4_", "cdequantize_blockwise_cpu_nf4_")):
            return function

        def dequantize(*arguments: Any) -> None:
            *pointers, block, rows, columns = arguments
            values = rows.value * columns.value
            if columns.value % block.value:  # rows of one block; one row where the last block is not full
                length = values if values % block.value else block.value
                rows, columns = type(rows)(values // length), type(columns)(length)
            function(*pointers, block, rows, columns)

        return dequantize


def resume_quantized_adapter_in_bfloat16(model: PreTrainedModel) -> None:
    """Keep the dtype of a quantized model's adapter when a run is resumed.

    trl 1.16 creates that adapter in bfloat16, but peft 0.21 loads the adapter of a checkpoint in float32. A resumed run
    would then differ from a run that never stopped. Remove this function when TRL or peft keeps the dtype.
    """
    if getattr(model, "peft_config", None) and getattr(model, "is_quantized", False):
        model.load_adapter = functools.partial(model.load_adapter, autocast_adapter_dtype=False)


def complete_head_of_trained_rows(model: PreTrainedModel) -> None:
    """Add the missing `bias` to peft's wrapper of the LM head, and let peft save only the trained rows.

    peft 0.21: `TrainableTokensWrapper` has no `bias`. The fused head of trl 1.16 reads it, so every step raises. And
    peft would save the whole embeddings beside the trained rows. Remove this function when the wrapper has `bias`.
    """
    head = model.get_output_embeddings()
    if type(head).__name__ == "TrainableTokensWrapper":
        head.bias = head.original_module.bias
        model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)
