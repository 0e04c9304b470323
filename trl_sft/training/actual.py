"""What really runs: readings of the live objects of a Trainer, each by the name that `asked` gives it.

In: an SFTTrainer that has prepared model, optimizer and schedule. Out: plain values. Deliberately absent: the recipe
and the arguments, which say what was asked; a list of names is one of what should not be, so it should be empty.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.quantizers.quantizers_utils import should_convert_module
from trl import SFTTrainer

from trl_sft.model import cpu_loss, packed_attention, patches
from trl_sft.model.load import unwrap_adapter

ONE_PROCESS, DDP, FSDP, ZERO = "one process", "DDP", "FSDP", "ZeRO-"
OURS, THEIRS = cpu_loss.__name__, "trl"
_WRAPPERS = {"DistributedDataParallel": DDP, "FullyShardedDataParallel": FSDP}
_ADAPTER = ("modules_to_save.", "trainable_tokens_")  # parts of the names of what peft trains beside its layers
_SAMPLED = 2**16  # elements of a tensor that its fingerprint takes: of a large vocabulary one of every row or two
_KEPT = 512  # elements of a tensor that are kept, to tell at the end which share of the weights moved

Names = list[str]


def processes() -> int:
    """Return the size of the process group; 1 where there is none."""
    on = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if on else 1


def engine(trainer: SFTTrainer) -> str:
    """Return what carries the steps, by the class that wraps the model; DeepSpeed's with the stage that it says."""
    wrapped = patches.unwrap_compiled(trainer.model_wrapped)
    kind = type(wrapped).__name__
    if kind == "DeepSpeedEngine":
        return f"{ZERO}{wrapped.zero_optimization_stage()}"
    if kind in _WRAPPERS:
        return _WRAPPERS[kind]
    if any(parent.__name__ == "FSDPModule" for parent in type(wrapped).__mro__):
        return FSDP
    return ONE_PROCESS if isinstance(wrapped, PreTrainedModel) or hasattr(wrapped, "peft_config") else kind


def whole(trainer: SFTTrainer) -> bool:
    """Tell whether this process holds every parameter itself, in the type that it was loaded in."""
    return engine(trainer) in (ONE_PROCESS, DDP)


def weights(model: PreTrainedModel) -> dict[str, list[str]]:
    """Return the types of the floating parameters that are not quantized, of the base and of the adapter."""
    inner = unwrap_adapter(model)
    kept = patches.list_float32_modules(inner)
    held = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in kept)) if kept else None
    found: dict[str, set[str]] = {"weights": set(), "adapter weights": set()}
    for name, parameter in model.named_parameters():
        packed = type(parameter).__name__ in ("Params4bit", "Int8Params")  # which may be stored as floats
        if packed or not parameter.is_floating_point() or (held and held.search(name)):
            continue
        found["adapter weights" if _of_adapter(model, name) else "weights"].add(_short(parameter.dtype))
    return {part: sorted(kinds) for part, kinds in found.items()}


def quantized(model: PreTrainedModel) -> dict[str, Any]:
    """Return how the live layers are quantized, and which linear ones are not though the quantizer spares them not."""
    ways: dict[str, int] = {}
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes.") and (way := _way(module)):
            ways[way] = ways.get(way, 0) + 1
    inner = unwrap_adapter(model)
    quantizer = getattr(inner, "hf_quantizer", None)
    plain: Names = []
    if quantizer is not None:
        kept = list(getattr(quantizer, "modules_to_not_convert", None) or ())
        plain = [
            name
            for name, module in model.named_modules()
            if type(module) is torch.nn.Linear and not _spared(name, kept)
        ]
    return {"quantized": sorted(ways), "linear layers not quantized": plain, "quantized layers": sum(ways.values())}


def _spared(name: str, kept: list[str]) -> bool:
    """Tell whether the quantizer leaves a layer as it is: of the adapter, or by upstream's own rule on its name."""
    own = name.removeprefix("base_model.model.").removesuffix(".base_layer")
    return any(part in name for part in ("lora_", *_ADAPTER)) or not should_convert_module(own, kept)


def _way(module: torch.nn.Module) -> str:
    """Return how one of bitsandbytes' layers holds its weights, as the weights say; "" = it is no such layer."""
    weight: Any = getattr(module, "weight", None)
    if type(weight).__name__ == "Params4bit":
        state = getattr(weight, "quant_state", None)
        kind = state.quant_type if state is not None else weight.quant_type
        double = state.nested if state is not None else weight.compress_statistics
        return f"4-bit {kind}{', twice' if double else ''}, computed in {_short(module.compute_dtype)}"  # type: ignore[arg-type]
    if type(weight).__name__ == "Int8Params":
        state = getattr(module, "state", None)
        return f"8-bit, outliers above {getattr(state, 'threshold', 0.0):g}"
    return ""


def attentions(model: PreTrainedModel) -> list[str]:
    """Return what the attention modules call: the name that each one's configuration holds now.

    Beside it stands the function, where the name calls one that is neither upstream's nor ours.
    """
    inner = unwrap_adapter(model)
    text = inner.config.get_text_config()
    # one that also reads pictures attends there by a configuration of another kind
    configs = [m.config for m in inner.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "config")]
    names = {patches.get_attention_name(config) for config in configs if type(config) is type(text)}
    names = names or {patches.get_attention_name(text)}
    found = []
    for name in names:
        called = ALL_ATTENTION_FUNCTIONS.get(name)
        home = getattr(called, "__module__", "transformers")
        wanted = (
            home.startswith("transformers.") or called is packed_attention.attend or name == "eager" or "/" in str(name)
        )
        found.append(str(name) if wanted else f"{name}, which calls {home}.{getattr(called, '__qualname__', called)}")
    return sorted(found)


def loss_path(model: PreTrainedModel) -> str:
    """Return whose loss the forward of the model computes, found in the chain of functions that it calls."""
    called: Any = unwrap_adapter(model).forward
    for _ in range(20):
        called = getattr(called, "__func__", called)
        if getattr(getattr(called, "__code__", None), "co_filename", "") == cpu_loss.__file__:
            return OURS
        if not hasattr(called, "__wrapped__"):
            break
        called = called.__wrapped__
    return THEIRS


def adapter(model: PreTrainedModel) -> dict[str, Any]:
    """Return how the adapter stands in the model: rank and scale of its layers, and layers that it leaves out."""
    if not hasattr(model, "get_layer_status"):
        return {"adapter": "none"}
    layers = [layer for _, layer in _lora_layers(model)]
    status = model.get_layer_status()
    on = [layer for layer in status if layer.enabled and layer.active_adapters]
    dropouts = {d.p if hasattr(d, "p") else 0.0 for layer in layers for d in layer.lora_dropout.values()}
    return {
        "adapter": "merged" if any(layer.merged_adapters for layer in status) else "on" if on else "off",
        "adapter layers off": [layer.name for layer in status if layer not in on],
        "r": sorted({r for layer in layers for r in layer.r.values()}),
        "lora_alpha": sorted({alpha for layer in layers for alpha in layer.lora_alpha.values()}),
        "lora_dropout": sorted(dropouts),
        "adapter layers": len(status),
    }


def adapted(model: PreTrainedModel) -> Names:
    """Return the names of the modules that the adapter has a part in."""
    kept = [
        n for n, m in model.named_modules() if type(m).__name__ in ("ModulesToSaveWrapper", "TrainableTokensWrapper")
    ]
    return [name for name, _ in _lora_layers(model)] + kept


def trained(model: PreTrainedModel) -> dict[str, Any]:
    """Return how much is trained, what stands still of that which training is for, and what moves beside it."""
    peft = hasattr(model, "peft_config")
    bias = any(getattr(config, "bias", "none") != "none" for config in getattr(model, "peft_config", {}).values())
    named = [(n, p) for n, p in model.named_parameters() if not (bias and n.endswith("bias"))]
    wanted = [(n, p) for n, p in named if p.is_floating_point() and (not peft or _of_adapter(model, n))]
    ours = {id(p) for _, p in wanted}
    return {
        "parameters that are not trained": [n for n, p in wanted if not p.requires_grad],
        "parameters that are trained too": [n for n, p in named if p.requires_grad and id(p) not in ours],
        "trainable parameters": sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad),
    }


def optimized(trainer: SFTTrainer) -> dict[str, Any]:
    """Return what the optimizer holds: its class, its groups' values, parameters that it lacks, where it decays."""
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    found: dict[str, Any] = {"optimizer": type(optimizer).__name__}
    if not whole(trainer):
        return found
    groups = optimizer.param_groups
    decay = {id(p): group.get("weight_decay") for group in groups for p in group["params"]}
    named = [(n, p) for n, p in trainer.model.named_parameters() if p.requires_grad]
    decayed = {*trainer.get_decay_parameter_names(trainer.model)}
    found["parameters that the optimizer lacks"] = [n for n, p in named if id(p) not in decay]
    found["weight decay"] = sorted({decay[id(p)] for n, p in named if id(p) in decay and n in decayed})
    found["weight decay of norms and biases"] = sorted(
        {decay[id(p)] for n, p in named if id(p) in decay and n not in decayed}
    )
    for name in sorted({name for group in groups for name in group} - {"params", "lr", "initial_lr", "weight_decay"}):
        values = [group.get(name) for group in groups]
        found[f"optimizer {name}"] = values[0] if all(value == values[0] for value in values) else values
    return found


def rates(trainer: SFTTrainer, steps: Sequence[int]) -> dict[str, Any]:
    """Return the rate that the next step takes, and those that the schedule will give at `steps`."""
    now = trainer.optimizer.param_groups[0]["lr"]
    found: dict[str, Any] = {"rate of the next step": None if now is None else significant(now)}
    schedule = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)
    found["schedule"] = type(schedule).__name__
    if hasattr(schedule, "lr_lambdas"):  # a function of the step, so later values can be asked for
        first, start = schedule.lr_lambdas[0], schedule.base_lrs[0]
        found["rates to come"] = [significant(start * first(step)) for step in steps]
    return found


def significant(value: Any) -> float:
    """Return a number to six digits."""
    return float(f"{float(value):.6g}")


def checkpointing(model: PreTrainedModel) -> bool | str:
    """Tell whether activations are computed again in the backward pass; how many modules where not in all."""
    able = [module for module in unwrap_adapter(model).modules() if hasattr(module, "gradient_checkpointing")]
    # a whole model has the flag too and computes nothing by itself, where its layers have it
    layers = [module for module in able if not isinstance(module, PreTrainedModel)] or able
    flags = [bool(module.gradient_checkpointing) for module in layers]
    return all(flags) and bool(flags) if len({*flags}) < 2 else f"in {sum(flags)} of {len(flags)} modules"


def loader(trainer: SFTTrainer, given: Any) -> dict[str, Any]:
    """Return how the live loader batches: rows at a time, and by what the loss is divided beside the Trainer's own."""
    sampler = getattr(given, "batch_sampler", None)
    size = getattr(sampler, "batch_size", None) or getattr(given, "batch_size", None)
    return {"rows at a time": size, "divisor of the loss": trainer.accelerator.gradient_accumulation_steps}


def neftune(model: PreTrainedModel) -> float | None:
    """Return the noise that the embedding's hook adds; None without one."""
    inside = model.get_input_embeddings()
    return (
        getattr(inside, "neftune_noise_alpha", None)
        if "neftune_post_forward_hook" in patches.list_forward_hooks(inside)
        else None
    )


def trackers(trainer: SFTTrainer) -> Names:
    """Return the trackers whose callbacks the Trainer calls."""
    kinds = {kind: name for name, kind in INTEGRATION_TO_CALLBACK.items()}
    return sorted(kinds[type(c)] for c in trainer.callback_handler.callbacks if type(c) in kinds)


def asleep(model: PreTrainedModel) -> Names:
    """Return the modules that are not in training mode, so that their dropout is off."""
    return [name or type(model).__name__ for name, module in model.named_modules() if not module.training]


def autocast(device: str) -> str | None:
    """Return the type that autocast computes in here and now; None where it is off."""
    return _short(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None


class Print(NamedTuple):
    """The fingerprint of a tensor: a step changes it, however small."""

    bits: int  # their sum, of a large tensor at even distances; a sum of floats would lose small steps
    some: torch.Tensor  # a few elements as they are: (at most twice _KEPT,)


def prints(model: PreTrainedModel) -> dict[str, Print]:
    """Return a fingerprint of each trainable tensor; of one that is spread over processes, of the part that is here."""
    return {name: _print(p) for name, p in model.named_parameters() if p.requires_grad}


def _print(parameter: torch.Tensor) -> Print:
    held: Any = getattr(parameter, "ds_tensor", parameter).detach()  # ZeRO-3 keeps this process's part there
    held = held.to_local() if hasattr(held, "to_local") else held  # FSDP2
    flat = held.reshape(-1)
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    bits = flat[:: max(1, held.numel() // _SAMPLED)].view(kind).sum(dtype=torch.int64)
    return Print(int(bits), flat[:: max(1, held.numel() // _KEPT)].clone())


def _lora_layers(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "active_adapters"):
            yield name, module


def _of_adapter(model: PreTrainedModel, name: str) -> bool:
    """Tell whether a parameter is one that peft trains."""
    prefix = getattr(getattr(model, "base_model", None), "prefix", None) if hasattr(model, "peft_config") else None
    return prefix is not None and any(part in name for part in (prefix, *_ADAPTER) if part)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
