"""The model of a run on tensors without storage: shapes and types as they will be, no bytes behind them.

In: what is known of a run before its weights. Out: inside `tensors()` a model that can be trained, whose
operations are those of the real one: its dtype, adapter, quantized layers, attention, loss. PyTorch's fake
tensors do the work. They claim to be on a CPU; where a CUDA device chooses another kernel, `kind` says so.
Absent: anything that reads weights or a device.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import itertools
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import transformers
from peft import PeftConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
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

from trl_sft.model import cpu_loss, packed_attention, patches
from trl_sft.model import load as models
from trl_sft.recipe.checked import Run
from trl_sft.training.memory import cuda_kernels
from trl_sft.training.stages import TrainingInputs

_WAY = "shadow"  # the name of our attention in transformers' registry
_OUTPUTS = ("log_probs", "entropy", "is_top1")  # what SFTTrainer asks of its head


class Batch(NamedTuple):
    """The shape of one batch of one device."""

    rows: int
    tokens: int  # of each row, padding included
    labelled: int  # positions that carry loss, of all rows
    flat: bool = False  # laid end to end as one row: packs, or rows without padding
    padded: bool = False  # rows of several lengths, which a mask sets apart
    documents: tuple[int, ...] = ()  # tokens of each, of a batch that is flat; none named = one in each row

    def __str__(self) -> str:
        """Say the shape as a user thinks of it."""
        return f"{self.rows} x {self.tokens:,} tokens"


@contextlib.contextmanager
def tensors() -> Iterator[None]:
    """Make every tensor that is made inside the block one without storage."""
    with contextlib.ExitStack() as stack:
        if importlib.util.find_spec("bitsandbytes") is not None:
            stack.enter_context(_bitsandbytes())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


@contextlib.contextmanager
def _bitsandbytes() -> Iterator[None]:
    """Let bitsandbytes make the tables that it reads, and keep nothing of the block, which a real run would meet."""
    from bitsandbytes import functional
    from bitsandbytes.optim import GlobalOptimManager

    def table(*args: Any, **kwargs: Any) -> torch.Tensor:
        with _disable_current_modes():
            made: torch.Tensor = theirs(*args, **kwargs)
            return made

    theirs, functional.create_dynamic_map = functional.create_dynamic_map, table
    kept = functional.name2qmap, GlobalOptimManager.get_instance().__dict__
    before = [{name: copy.copy(value) for name, value in values.items()} for values in kept]
    try:
        yield
    finally:
        functional.create_dynamic_map = theirs
        for values, old in zip(kept, before, strict=True):
            values.clear()
            values.update(old)


def model(run: Run, inputs: TrainingInputs, batch: Batch, kind: str, layers: int | None = None) -> PreTrainedModel:
    """Return the model of a run as SFTTrainer would train it on a device of `kind` (cpu, cuda), inside `tensors()`.

    `layers`: only so many of them. Raises whatever upstream raises for a model that it cannot make.
    """
    config = copy.deepcopy(inputs.model.config) if layers is None else cut(inputs.model.config, layers)
    with _disable_current_modes(), torch.device("meta"):  # modules are made quicker there, and by any class of weights
        base = _base(run, inputs, config)
        if inputs.quantization is not None:
            quantizer = AutoHfQuantizer.from_config(inputs.quantization)
            quantizer.preprocess_model(model=base, dtype=base.dtype, device_map=None)
            quantizer.postprocess_model(base)
            base.requires_grad_(False)
        made = _adapted(run, inputs, base)
    _lend(made, base.dtype)
    made.train()
    if inputs.args.gradient_checkpointing:
        _checkpointing(made, inputs.args)
    if hasattr(utils, "add_fused_lm_head"):
        utils.add_fused_lm_head(base, outputs=_OUTPUTS)
        patches.repair(made)
        if kind != "cuda":
            cpu_loss.install(made, run.options.get("logits_gib", cpu_loss.LOGITS_GIB))
    if patches.get_attention_name(base.config.get_text_config()) == "sdpa":
        _attend(base, batch, kind, str(run.model.get("attn_implementation") or "sdpa"))
    return made


def cut(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """Return a configuration with fewer layers, and so many entries in its lists of layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name in listed(text):
        setattr(text, name, getattr(text, name)[:layers])
    text.num_hidden_layers = layers
    return config


def listed(text: PretrainedConfig) -> list[str]:
    """Return which entries of a configuration have a value for each layer."""
    values = vars(text).items()
    return [name for name, value in values if isinstance(value, list) and len(value) == text.num_hidden_layers]


def _base(run: Run, inputs: TrainingInputs, config: PretrainedConfig) -> PreTrainedModel:
    """Return the bare model, with as many rows in its embedding as the template needs."""
    asked = run.model.get("dtype", "float32")
    dtype = (config.dtype or torch.float32) if asked == "auto" else getattr(torch, asked)
    kind = getattr(transformers, config.architectures[0], None)
    way = run.model.get("attn_implementation")
    keywords = {"dtype": dtype} | ({"attn_implementation": way if way in ("eager", "sdpa") else "sdpa"} if way else {})
    if kind is None:
        keywords["trust_remote_code"] = bool(run.model.get("trust_remote_code"))
        made = AutoModelForCausalLM.from_config(config, **keywords)
    else:
        made = patches.build_from_config(kind, config, **keywords)
    if inputs.chat.new and inputs.chat.rows > made.get_input_embeddings().weight.shape[0]:
        made.resize_token_embeddings(inputs.chat.rows, mean_resizing=False)
    return made


def _adapted(run: Run, inputs: TrainingInputs, base: PreTrainedModel) -> PreTrainedModel:
    """Return the model with its adapter, of the types that TRL trains it in; `base` itself without one."""
    config = models.make_lora_config(run)
    if inputs.model.adapter:
        config = PeftConfig.from_pretrained(inputs.model.adapter)
    if config is None:
        return base
    if inputs.chat.new and not inputs.model.adapter:
        models.train_new_rows(run, base, config, list(inputs.chat.new))
    config.inference_mode = False
    made = get_peft_model(base, config)
    if inputs.quantization is not None:
        for name, parameter in made.named_parameters():
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    if inputs.args.gradient_checkpointing:
        made.enable_input_require_grads()
    return made


def _lend(made: PreTrainedModel, dtype: torch.dtype) -> None:
    """Put tensors of our block in the place of those of the meta device; tied ones stay one."""
    lent: dict[int, Any] = {}
    for module in made.modules():
        if type(module).__module__.startswith("bitsandbytes.") and hasattr(module, "weight"):
            _quantize(module, dtype)
        for home in (module._parameters, module._buffers):
            for name, old in home.items():
                if old is None or not old.is_meta:
                    continue
                if id(old) not in lent:
                    new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device="cpu")
                    new = torch.nn.Parameter(new, old.requires_grad) if home is module._parameters else new
                    lent[id(old)] = old, new  # both, so that no id comes twice
                home[name] = lent[id(old)][1]


def _quantize(layer: Any, dtype: torch.dtype) -> None:
    """Give a layer of bitsandbytes weights of its kind, made from those of `dtype` by bitsandbytes' own functions."""
    from bitsandbytes import functional

    old, plain = layer.weight, torch.empty(layer.out_features, layer.in_features, dtype=dtype)
    if type(layer).__name__ == "Linear4bit":
        how = {name: getattr(old, name) for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage")}
        data, layer.quant_state = functional.quantize_4bit(plain, **how)
        told = how | {"quant_state": layer.quant_state, "bnb_quantized": True}
    else:
        data, scale, _ = functional.int8_vectorwise_quant(plain.half())
        told = {"CB": data, "SCB": scale, "has_fp16_weights": old.has_fp16_weights}
    # their own classes of weights hold no such tensor; what is read of them is there
    layer.weight = torch.nn.Parameter(data, requires_grad=False)
    for name, value in told.items():
        setattr(layer.weight, name, value)


def _checkpointing(made: PreTrainedModel, args: SFTConfig) -> None:
    """Have layers run again in the backward pass, as the Trainer does."""
    # transformers' own choice where none is given; given ones without it take PyTorch's, which is another
    keywords = dict(args.gradient_checkpointing_kwargs or {"use_reentrant": False})
    more = {name: keywords.pop(name) for name in ("every_n_layers", "offload") if name in keywords}
    keywords = {k: v for k, v in keywords.items() if k != "selective"} | {"preserve_rng_state": False}
    if hasattr(made, "activation_checkpointing_enable"):
        made.activation_checkpointing_enable(activation_checkpointing_kwargs=keywords, **more)
    else:
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs=keywords)


def _attend(base: PreTrainedModel, batch: Batch, kind: str, given: str) -> None:
    """Have the model attend as it will on its device: transformers' own choice asks for values, which there are not."""
    bare = given not in ("sdpa", "eager")  # a kernel of its own for borders and padding needs no mask
    documents = batch.flat and kind != "cuda" and given == "sdpa"

    def mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
        if documents:
            return packed_attention.make_mask(*args, **kwargs)
        if bare:
            return None
        found: torch.Tensor | None = sdpa_mask(
            *args, **kwargs | {"allow_is_causal_skip": not (batch.flat or batch.padded)}
        )
        return found

    attend = packed_attention.attend if documents else cuda_kernels.attend if kind == "cuda" else sdpa_attention_forward
    AttentionInterface.register(_WAY, attend)
    AttentionMaskInterface.register(_WAY, mask)
    base.set_attn_implementation(_WAY)


def inputs(batch: Batch) -> dict[str, Any]:
    """Return a batch as TRL's collator makes it: (1, all tokens) where it is flat, else (rows, tokens)."""
    documents = batch.documents or (batch.tokens,) * batch.rows
    shape = (1, sum(documents)) if batch.flat else (batch.rows, batch.tokens)
    made: dict[str, Any] = {name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "labels")}
    if not batch.flat:  # a mask that hides nothing is left out by transformers, which looks at its values
        return made | ({"attention_mask": torch.ones(shape, dtype=torch.long)} if batch.padded else {})
    made["position_ids"] = torch.zeros(shape, dtype=torch.long)
    ends = [0, *itertools.accumulate(documents)]
    borders = types.SimpleNamespace(tolist=lambda: ends)  # all that is asked of them
    longest = dict.fromkeys(("max_length_q", "max_length_k"), max(documents))
    return made | {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders} | longest
