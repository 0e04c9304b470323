"""The model of a run on fake tensors: the shapes and dtypes of the real model, without storage.

In: what a run has before its weights. Out: inside `fake_tensors()` a model that can be trained, whose operations are
those of the real one: its dtype, adapter, quantized layers, attention, loss. Fake tensors claim to be on a CPU; where a
CUDA device takes another kernel, `device_type` says so. Deliberately absent: anything that reads weights or a device.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import transformers
from peft import PeftConfig, get_peft_model
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.quantizers import AutoHfQuantizer
from trl import SFTConfig
from trl.trainer import utils

from trl_sft.model import cpu_loss, load, packed_attention, patches
from trl_sft.recipe.checked import Run
from trl_sft.training.memory import chunked_loss, cuda_kernels
from trl_sft.training.memory.fake_tensors import real_tensors
from trl_sft.training.stages import TrainingInputs

ATTENTION = "trl_sft_estimate"  # the name of the attention in transformers' registry
_FUSED_OUTPUTS = ("log_probs", "entropy", "is_top1")  # what SFTTrainer asks of its fused head


class Batch(NamedTuple):
    """The shape of one batch of one device."""

    rows: int
    tokens: int  # of each row, padding included
    labelled: int  # positions that carry loss, of all rows
    flat: bool = False  # all documents in one row: packs, or rows without padding
    padded: bool = False  # rows of several lengths, with a mask over the padding
    documents: tuple[int, ...] = ()  # tokens of each document of a flat batch; () = one in each row

    def __str__(self) -> str:
        """Return the shape as the screen shows it."""
        return f"{self.rows} x {self.tokens:,} tokens"


@dataclass(frozen=True)
class Borders:
    """The borders of documents as numbers, because attention reads their values and a fake tensor has none."""

    values: list[int]  # (documents + 1,)

    def tolist(self) -> list[int]:
        """Return the values, as a tensor does."""
        return self.values


def build_fake_model(
    run: Run, inputs: TrainingInputs, batch: Batch, *, device_type: str, layers: int | None = None
) -> PreTrainedModel:
    """Build the model of a run as SFTTrainer would train it. Call it inside `fake_tensors()`.

    Args:
        run: The checked recipe.
        inputs: What the run has before its weights.
        batch: The batch that the model will see; attention depends on it.
        device_type: cpu or cuda.
        layers: How many of its layers; None = all.

    Raises:
        Exception: Whatever upstream raises for a model that it cannot build.
    """
    config = copy.deepcopy(inputs.model.config)
    if layers is not None:
        shorten(config, layers)
    with real_tensors(), torch.device("meta"):  # modules are built faster there, and by any class of weights
        base = _build_base(run, inputs, config)
        if inputs.quantization is not None:
            quantizer = AutoHfQuantizer.from_config(inputs.quantization)
            quantizer.preprocess_model(model=base, dtype=base.dtype, device_map=None)
            quantizer.postprocess_model(base)
            base.requires_grad_(False)
        model = _add_adapter(run, inputs, base)
    _replace_meta_tensors(model, base.dtype)
    model.train()
    if inputs.args.gradient_checkpointing:
        _enable_checkpointing(model, inputs.args)
    if patches.has_fused_head():
        utils.add_fused_lm_head(base, outputs=_FUSED_OUTPUTS)
        patches.repair(model)
        if device_type != "cuda":
            cpu_loss.install(model, run.options.get("logits_gib", cpu_loss.LOGITS_GIB))
    elif chunked_loss.is_used(inputs.args):
        chunked_loss.add(base)
    if patches.get_attention_name(base.config.get_text_config()) == "sdpa":
        requested = str(run.model.get("attn_implementation") or "sdpa")
        _set_attention(base, batch, device_type=device_type, requested=requested)
    return model


def shorten(config: PretrainedConfig, layers: int) -> None:
    """Reduce a configuration to fewer layers, and its lists of one value a layer to as many values."""
    text = config.get_text_config()
    for name in list_values_by_layer(text):
        setattr(text, name, getattr(text, name)[:layers])
    text.num_hidden_layers = layers


def list_values_by_layer(text: PretrainedConfig) -> list[str]:
    """Return the names of a text configuration's lists that hold one value for each layer."""
    values = vars(text).items()
    return [name for name, value in values if isinstance(value, list) and len(value) == text.num_hidden_layers]


def _build_base(run: Run, inputs: TrainingInputs, config: PretrainedConfig) -> PreTrainedModel:
    """Return the model without an adapter, with as many rows in its embedding as the tokenizer needs."""
    dtype_name = run.model.get("dtype", "float32")
    dtype = (config.dtype or torch.float32) if dtype_name == "auto" else getattr(torch, dtype_name)
    keywords: dict[str, Any] = {"dtype": dtype}
    requested = run.model.get("attn_implementation")
    if requested:
        keywords["attn_implementation"] = requested if requested in ("eager", "sdpa") else "sdpa"
    model_class = getattr(transformers, config.architectures[0], None)
    if model_class is None:
        keywords["trust_remote_code"] = bool(run.model.get("trust_remote_code"))
        model = AutoModelForCausalLM.from_config(config, **keywords)
    else:
        model = patches.build_from_config(model_class, config, **keywords)
    chat = inputs.chat
    if chat.new_tokens and chat.num_embeddings > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(chat.num_embeddings, mean_resizing=False)
    return model


def _add_adapter(run: Run, inputs: TrainingInputs, base: PreTrainedModel) -> PreTrainedModel:
    """Return the model with its adapter, of the types that TRL trains it in; `base` itself without one."""
    config = load.make_lora_config(run)
    if inputs.model.adapter:
        config = PeftConfig.from_pretrained(inputs.model.adapter)
    if config is None:
        return base
    if inputs.chat.new_tokens and not inputs.model.adapter:
        load.train_new_rows(run, base, config, new_tokens=list(inputs.chat.new_tokens))
    config.inference_mode = False
    model = get_peft_model(base, config)
    if inputs.quantization is not None:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    if inputs.args.gradient_checkpointing:
        model.enable_input_require_grads()
    return model


def _replace_meta_tensors(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace meta tensors with fake tensors, keeping tied weights tied."""
    replaced: dict[int, tuple[Any, Any]] = {}  # id of a meta tensor -> (itself, which keeps the id taken; the fake one)
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes.") and hasattr(module, "weight"):
            _quantize(module, dtype)
        own_tensors = [
            *module.named_parameters(recurse=False, remove_duplicate=False),
            *module.named_buffers(recurse=False, remove_duplicate=False),
        ]
        for name, tensor in own_tensors:
            if not tensor.is_meta:
                continue
            if id(tensor) not in replaced:
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
                if isinstance(tensor, torch.nn.Parameter):
                    fake = torch.nn.Parameter(fake, tensor.requires_grad)
                replaced[id(tensor)] = tensor, fake
            setattr(module, name, replaced[id(tensor)][1])


def _quantize(layer: Any, dtype: torch.dtype) -> None:
    """Give a layer of bitsandbytes weights of its kind, made of weights of `dtype` by bitsandbytes' own functions."""
    from bitsandbytes import functional

    meta, weight = layer.weight, torch.empty(layer.out_features, layer.in_features, dtype=dtype)
    if type(layer).__name__ == "Linear4bit":
        names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        options = {name: getattr(meta, name) for name in names}
        data, layer.quant_state = functional.quantize_4bit(weight, **options)
        attributes = options | {"quant_state": layer.quant_state, "bnb_quantized": True}
    else:
        data, scale, _ = functional.int8_vectorwise_quant(weight.half())
        attributes = {"CB": data, "SCB": scale, "has_fp16_weights": meta.has_fp16_weights}
    # bitsandbytes' own classes of weights hold no fake tensor; a plain parameter has all that is read of them
    layer.weight = torch.nn.Parameter(data, requires_grad=False)
    for name, value in attributes.items():
        setattr(layer.weight, name, value)


def _enable_checkpointing(model: PreTrainedModel, args: SFTConfig) -> None:
    """Have layers compute their activations again in the backward pass, as the Trainer does."""
    # transformers' own choice where none is given; keywords without `use_reentrant` take PyTorch's, which differs
    keywords = dict(args.gradient_checkpointing_kwargs or {"use_reentrant": False})
    own = {name: keywords.pop(name) for name in ("every_n_layers", "offload") if name in keywords}
    keywords.pop("selective", None)
    keywords["preserve_rng_state"] = False
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=keywords, **own)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keywords)


def _set_attention(base: PreTrainedModel, batch: Batch, *, device_type: str, requested: str) -> None:
    """Have the model attend as it will on its device: transformers' own choice reads values, which there are not.

    Args:
        base: The model without adapter.
        batch: The batch that it will see.
        device_type: cpu or cuda.
        requested: model.attn_implementation of the recipe.
    """
    has_own_kernel = requested not in ("sdpa", "eager")  # one that handles borders and padding needs no mask
    by_document = batch.flat and device_type != "cuda" and requested == "sdpa"

    def make_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
        if by_document:
            return packed_attention.make_mask(*args, **kwargs)
        if has_own_kernel:
            return None
        kwargs["allow_is_causal_skip"] = not (batch.flat or batch.padded)
        mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
        return mask

    attend: Any = sdpa_attention_forward
    if by_document:
        attend = packed_attention.attend
    elif device_type == "cuda":
        attend = cuda_kernels.attend
    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, make_mask)
    base.set_attn_implementation(ATTENTION)


def build_batch(batch: Batch) -> dict[str, Any]:
    """Build a batch as TRL's collator does: (1, all tokens) where it is flat, else (rows, tokens)."""
    documents = batch.documents or (batch.tokens,) * batch.rows
    shape = (1, sum(documents)) if batch.flat else (batch.rows, batch.tokens)
    tensors: dict[str, Any] = {name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "labels")}
    if not batch.flat:
        if batch.padded:  # transformers drops a mask that hides nothing, for which it reads the values
            tensors["attention_mask"] = torch.ones(shape, dtype=torch.long)
        return tensors
    borders = Borders([0, *itertools.accumulate(documents)])
    tensors["position_ids"] = torch.zeros(shape, dtype=torch.long)
    tensors["cu_seq_lens_q"] = tensors["cu_seq_lens_k"] = borders
    tensors["max_length_q"] = tensors["max_length_k"] = max(documents)
    return tensors
