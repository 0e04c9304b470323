"""Readings of the live trainer, each with the values that the recipe accepts.

In: the checked recipe and an SFTTrainer whose model, optimizer and data loader exist. Out: `Reading`s, and fingerprints
of the trainable tensors. A reading whose value is a list of names lists violations, so it should be empty. Values that
upstream only copies from its arguments (schedule, seed, LoRA's rank, NEFTune) are not read: they cannot differ.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from accelerate import state as accelerate_state
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.quantizers.quantizers_utils import should_convert_module
from trl import SFTConfig, SFTTrainer

from trl_sft import ranks
from trl_sft.model import cpu_loss, meta_model, packed_attention, patches
from trl_sft.model.load import unwrap_adapter
from trl_sft.recipe import engines, parallelism
from trl_sft.recipe.checked import Run
from trl_sft.recipe.resume_keys import LOSS_SCHEDULES
from trl_sft.recipe.yaml_reader import Key
from trl_sft.training import dry_run
from trl_sft.training.stages import TrainingInputs

ONE_PROCESS, DDP, FSDP, ZERO, TENSOR = "one process", "DDP", "FSDP", "ZeRO-", "tensor parallelism"
OUR_LOSS, TRL_LOSS = cpu_loss.__name__, "trl"
_WRAPPERS = {"DistributedDataParallel": DDP, "FullyShardedDataParallel": FSDP}
_ENGINES = {engines.DDP: DDP, engines.RAY: DDP, engines.FSDP: FSDP} | {
    name: f"{ZERO}{stage}" for name, stage in engines.STAGES.items()
}
_DIVIDED = (FSDP, f"{ZERO}3", TENSOR)  # engines that divide the weights themselves among the processes
_PEFT_PARTS = ("modules_to_save.", "trainable_tokens_")  # names of what peft trains beside its layers
_SEPARATED = ("bfd", "bfd_split")  # packing strategies whose documents TRL hands to the model apart
_OWN_GROUPS = ("GALORE", "LOMO", "APOLLO")  # optimizers that make groups of their own out of the model
_FINGERPRINT = 2**16  # elements of a tensor that count: of a large vocabulary one of every row or two
_REPLACED = ("push_to_hub",)  # off in the live arguments, since `hub_push` pushes
_SAMPLE = 512  # elements of a tensor that are kept, to tell which share of the weights changed


class Reading(NamedTuple):
    """One property of the live trainer."""

    name: str  # its key in run.json
    value: Any  # what the live objects show
    expected: tuple[Any, ...]  # the recipe's value first, then other accepted values; () = only recorded, not compared
    key: Key  # the key of the recipe that sets it


class Fingerprint(NamedTuple):
    """A digest that shows whether a tensor changed; even the smallest update changes it."""

    bits: int  # sum of the bits, of a large tensor at even distances: a sum of floats would lose small steps
    sample: torch.Tensor  # a few elements: (at most twice _SAMPLE,)


def read_before_training(run: Run, inputs: TrainingInputs, trainer: SFTTrainer) -> Iterator[Reading]:
    """Yield every reading that can be taken before the first step."""
    yield from _read_engine(run, trainer)
    yield from _read_weights(run, inputs, trainer)
    yield from _read_quantization(inputs, trainer.model)
    yield _read_attention(run, inputs, trainer)
    yield _read_loss(trainer)
    yield from _read_adapter(run, inputs, trainer.model)
    yield from _read_trained(run, trainer.model)
    yield from _read_optimizer(run, trainer)
    changes = changed_arguments(run, trainer.args)
    first_key = ("train", *(change.partition(":")[0] for change in changes[:1]))
    yield Reading("changed_arguments", changes, ([],), first_key)
    loader = trainer.callback_handler.train_dataloader
    sampler = getattr(loader, "batch_sampler", None)
    size = getattr(sampler, "batch_size", None) or getattr(loader, "batch_size", None)
    yield Reading("rows_per_micro_batch", size, (), ("train", "per_device_train_batch_size"))


def read_first_step(args: SFTConfig, seen: Mapping[str, Any], *, streamed: bool) -> Iterator[Reading]:
    """Yield what the hooks saw inside the first step.

    Args:
        args: the live settings.
        seen: what the hooks noted, by the names of the readings.
        streamed: whether rows are read during training; their packs are built by the loader then.

    """
    mixed = "float16" if args.fp16 else "bfloat16" if args.bf16 else None
    separated = bool(args.padding_free or (args.packing and args.packing_strategy in _SEPARATED))
    expected: dict[str, tuple[Any, Key]] = {
        "modules_in_eval_mode": ([], ("train",)),
        "autocast_dtype": (mixed, ("train", "fp16" if args.fp16 else "bf16")),
        "documents_separated": (separated, ("train", "packing")),
    }
    for name, (value, key) in expected.items():
        if name in seen and not (streamed and name == "documents_separated"):
            yield Reading(name, seen[name], (value,), key)


def count_processes() -> int:
    """Return the size of the process group; 1 where there is none."""
    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if initialized else 1


def count_row_groups() -> int:
    """Return how many groups of processes train rows of their own; the processes of one group share each row."""
    return max(1, count_processes() // math.prod(read_group_sizes().values()))


def read_group_sizes() -> dict[str, int]:
    """Return how many processes of accelerate's live state share a layer (`tp`), or a row (`cp`, `sp`)."""
    config = accelerate_state.AcceleratorState().parallelism_config if accelerate_state.is_initialized() else None
    return {name: getattr(config, f"{name}_size", None) or 1 for name in ("tp", "cp", "sp")}


def read_peak_rate(optimizer: Any) -> float | None:
    """Return the learning rate of the first group of parameters before the schedule; None = the optimizer has none."""
    groups = getattr(optimizer, "param_groups", None)
    rate = groups[0].get("initial_lr", groups[0].get("lr")) if groups else None
    return None if rate is None else float(rate)


def live_engine(trainer: SFTTrainer) -> str:
    """Return the engine that runs the steps, from the class that wraps the model; DeepSpeed with its stage."""
    wrapped = patches.unwrap_compiled(trainer.model_wrapped)
    kind = type(wrapped).__name__
    if kind == "DeepSpeedEngine":
        return f"{ZERO}{wrapped.zero_optimization_stage()}"
    if kind in _WRAPPERS:
        return _WRAPPERS[kind]
    if any(parent.__name__ == "FSDPModule" for parent in type(wrapped).__mro__):
        return FSDP
    if ranks.count() > 1 and any(hasattr(parameter, "device_mesh") for parameter in wrapped.parameters()):
        return TENSOR  # without a wrapper: transformers divides the weights as it loads them
    return ONE_PROCESS if isinstance(wrapped, PreTrainedModel) or hasattr(wrapped, "peft_config") else kind


def expected_engine(run: Run, args: SFTConfig) -> str:
    """Return the engine of the recipe; where it names none, that of arguments and accelerate's variables."""
    if ranks.count() > 1 and (divided := parallelism.find_engine_at_load(run.model)):
        return FSDP if divided == engines.FSDP else TENSOR
    if ranks.count() > 1 and engines.get_engine(run) != engines.DDP:
        return _ENGINES[engines.get_engine(run)]
    if (plugin := getattr(args, "deepspeed_plugin", None)) is not None:
        return f"{ZERO}{plugin.zero_stage}"
    if args.fsdp or _is_on("ACCELERATE_USE_FSDP"):
        return FSDP
    if _is_on("ACCELERATE_USE_DEEPSPEED"):
        return f"{ZERO}{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    return DDP if _expected_processes(args) > 1 else ONE_PROCESS


def measure_share(model: PreTrainedModel) -> float:
    """Return which share of the parameters lies on this process: 1 = it holds each of them whole."""
    own = total = 0
    for parameter in model.parameters():
        local: Any = getattr(parameter, "ds_tensor", parameter)  # ZeRO-3
        own += local.to_local().numel() if hasattr(local, "to_local") else local.numel()  # FSDP2
        total += getattr(parameter, "ds_numel", parameter.numel())
    return round(own / max(total, 1), 3)


def changed_arguments(run: Run, args: SFTConfig) -> list[str]:
    """Return the numbers and switches of `train:` that upstream replaced by others, with both values."""
    plain = (bool, int, float)
    changes = []
    for name, value in run.train.items():
        now = getattr(args, name, value)
        # a switch may become the word for it: true -> all
        if isinstance(value, plain) and isinstance(now, plain) and now != value and name not in _REPLACED:
            changes.append(f"{name}: {value} became {now}")
    return changes


def modules_in_eval_mode(model: PreTrainedModel) -> list[str]:
    """Return the modules that are not in training mode, so that their dropout is off."""
    return [name or type(model).__name__ for name, module in model.named_modules() if not module.training]


def autocast_dtype(device: str) -> str | None:
    """Return the dtype that autocast computes in here and now; None where it is off."""
    return _short(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None


def fingerprints(model: PreTrainedModel) -> dict[str, Fingerprint]:
    """Return a fingerprint of each trainable tensor; of a sharded one, of the part on this process."""
    return {name: _fingerprint(p) for name, p in model.named_parameters() if p.requires_grad}


def has_finite_weights(model: PreTrainedModel) -> bool:
    """Tell whether every trainable weight on this process is a finite number."""
    return all(bool(torch.isfinite(p).all()) for p in model.parameters() if p.requires_grad)


def find_not_finite(model: PreTrainedModel, optimizer: Any) -> str:
    """Return what of this process holds a number that is not finite: `weights`, `optimizer state`; "" = nothing.

    Args:
        model: the live model.
        optimizer: the live optimizer; its states in 8 or 4 bits are not read.

    """
    if not has_finite_weights(model):
        return "weights"
    values = [value for state in optimizer.state.values() for value in state.values()]
    tensors = [value for value in values if type(value) is torch.Tensor and value.is_floating_point()]
    return "" if all(bool(torch.isfinite(tensor).all()) for tensor in tensors) else "optimizer state"


def round_to_digits(value: Any) -> float:
    """Return a number to six significant digits."""
    return float(f"{float(value):.6g}")


def _read_engine(run: Run, trainer: SFTTrainer) -> Iterator[Reading]:
    """Yield processes and engine. accelerate may silently run one process, or DDP instead of FSDP on a CPU."""
    yield Reading("processes", count_processes(), (_expected_processes(trainer.args),), ("launch",))
    yield Reading("engine", live_engine(trainer), (expected_engine(run, trainer.args),), ("launch", "engine"))
    if ranks.count() > 1:
        divides = live_engine(trainer) in _DIVIDED
        share = measure_share(trainer.model)
        yield Reading("parameter_share", share, (), ("launch", "engine"))
        yield Reading(
            "parameters_of_a_process", "a part" if share < 1 else "all", ("a part" if divides else "all",), ("launch",)
        )
        from trl_sft.training import live_parallelism  # noqa: PLC0415 (for few runs)

        for name, size, expected, key in live_parallelism.read_sizes(run, trainer):
            yield Reading(name, size, (expected,), key)


def _read_weights(run: Run, inputs: TrainingInputs, trainer: SFTTrainer) -> Iterator[Reading]:
    """Yield the dtypes of the weights that are not quantized: of the base, and of the adapter."""
    key: Key = ("model", "dtype")
    dtypes = _dtypes(trainer.model)
    wanted = run.model.get("dtype", "float32")
    config = inputs.model.config
    dtype = _short(getattr(config, "dtype", None)) if wanted == "auto" else wanted
    if not _is_whole(trainer) or dtype == "None":
        yield Reading("weight_dtypes", dtypes["weights"], (), key)
        yield Reading("adapter_dtypes", dtypes["adapter"], (), key)
        return
    quantized = _is_quantized(inputs)
    both = sorted({dtype, "float32"})
    accepted: tuple[Any, ...] = ([dtype],)
    if quantized:
        accepted = ([dtype], both, ["float32"], [])
    elif dtype != "float32" and meta_model.keeps_float32(run, inputs.model, dtype):
        accepted = ([dtype], both)
    yield Reading("weight_dtypes", dtypes["weights"], accepted, key)
    if run.lora is None and not inputs.model.adapter:
        yield Reading("adapter_dtypes", dtypes["adapter"], ([],), key)
        return
    of_adapter: list[Any] = [both if quantized else ["float32"]]
    of_adapter += [[dtype], both] if dtype != "float32" else []
    of_adapter += [["bfloat16"], ["bfloat16", "float32"]] if quantized else []  # TRL casts adapters of 4 and 8 bits
    yield Reading("adapter_dtypes", dtypes["adapter"], tuple(of_adapter), key)


def _read_quantization(inputs: TrainingInputs, model: PreTrainedModel) -> Iterator[Reading]:
    """Yield how linear layers are quantized, and those that are not though the quantizer does not skip them."""
    layers = [module for module in model.modules() if type(module).__module__.startswith("bitsandbytes.")]
    formats = [name for module in layers if (name := _quantized_format(module))]
    quantizer = getattr(unwrap_adapter(model), "hf_quantizer", None)
    skipped = list(getattr(quantizer, "modules_to_not_convert", None) or ())
    plain = [
        name
        for name, module in model.named_modules()
        if quantizer is not None and type(module) is torch.nn.Linear and not _quantizer_skips(name, skipped)
    ]
    config = inputs.quantization
    key: Key = ("quantization",)
    expected: tuple[Any, ...] = () if _is_quantized(inputs) else ([],)
    if config is not None:
        key = ("quantization", "load_in_8bit" if config.load_in_8bit else "load_in_4bit")
        expected = ([_expected_format(config)],)
    yield Reading("quantization", sorted(set(formats)), expected, key)
    yield Reading("quantized_layers", len(formats), (), key)
    yield Reading("linear_layers_not_quantized", plain, ([],) if config is not None else (), key)


def _read_attention(run: Run, inputs: TrainingInputs, trainer: SFTTrainer) -> Reading:
    """Return which attention the modules call; upstream falls back where a kernel is missing."""
    key: Key = ("model", "attn_implementation")
    names = _attention_names(trainer.model)
    wanted = run.model.get("attn_implementation")
    if wanted is not None:
        # a flash attention that is not installed comes from the hub's kernels, under their name
        kernels = [name for name in names if "flash" in name and "flash" in wanted]
        return Reading("attention", names, ([wanted], kernels) if kernels else ([wanted],), key)
    saved = patches.get_attention_name(inputs.model.config)  # a configuration may name one
    choose = getattr(unwrap_adapter(trainer.model), "get_correct_attn_implementation", lambda name: name or "sdpa")
    by_document = ([packed_attention.DOCUMENTS],) if trainer.padding_free else ()
    return Reading("attention", names, ([choose(saved)], *by_document), key)


def _read_loss(trainer: SFTTrainer) -> Reading:
    """Return whose loss the forward pass computes, from the chain of functions that it calls."""
    ours = cpu_loss.replaces_trl_loss(trainer.model.device)
    function: Any = unwrap_adapter(trainer.model).forward
    name = TRL_LOSS
    for _ in range(20):
        function = getattr(function, "__func__", function)
        if getattr(getattr(function, "__code__", None), "co_filename", "") == cpu_loss.__file__:
            name = OUR_LOSS
        if name == OUR_LOSS or not hasattr(function, "__wrapped__"):
            break
        function = function.__wrapped__
    return Reading("loss", name, (OUR_LOSS if ours else TRL_LOSS,), ("run",))


def _read_adapter(run: Run, inputs: TrainingInputs, model: PreTrainedModel) -> Iterator[Reading]:
    """Yield whether the adapter is on, and which of its layers are off."""
    expected = "on" if run.lora is not None or inputs.model.adapter else "none"
    status = model.get_layer_status() if hasattr(model, "get_layer_status") else []
    state, layers_off = "none", []
    if status:
        layers_off = [layer.name for layer in status if not (layer.enabled and layer.active_adapters)]
        state = "off" if len(layers_off) == len(status) else "on"
        state = "merged" if any(layer.merged_adapters for layer in status) else state
    yield Reading("adapter", state, (expected,), ("lora",))
    yield Reading("adapter_layers", len(status), (), ("lora",))
    yield Reading("adapter_layers_off", layers_off, ([],), ("lora",))
    if run.lora is not None:
        missing = dry_run.list_unknown_lora_names(run, dry_run.list_adapted_modules(model))
        yield Reading("lora_names_without_module", missing, ([],), ("lora", "target_modules"))


def _read_trained(run: Run, model: PreTrainedModel) -> Iterator[Reading]:
    """Yield parameters that should be trained and are frozen, and those that are trained though they should not be."""
    key: Key = ("lora",) if run.lora is not None else ("model",)
    peft = hasattr(model, "peft_config")
    bias = any(getattr(config, "bias", "none") != "none" for config in getattr(model, "peft_config", {}).values())
    named = [(name, p) for name, p in model.named_parameters() if not (bias and name.endswith("bias"))]
    wanted = {name for name, p in named if p.is_floating_point() and (not peft or _of_adapter(model, name))}
    yield Reading("frozen_parameters", [n for n, p in named if n in wanted and not p.requires_grad], ([],), key)
    surplus = [name for name, p in named if p.requires_grad and name not in wanted]
    yield Reading("unexpected_trainable_parameters", surplus, ([],), key)
    count = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    yield Reading("trainable_parameters", count, (), key)


def _read_optimizer(run: Run, trainer: SFTTrainer) -> Iterator[Reading]:
    """Yield the optimizer's class and values, parameters that it lacks, and the learning rate.

    A checkpoint's optimizer keeps its values whatever the recipe says now, so they can differ on resume.
    """
    optimizer, args = getattr(trainer.optimizer, "optimizer", trainer.optimizer), trainer.args
    key: Key = ("train", "optim")
    name = type(optimizer).__name__
    if not _is_whole(trainer) or any(word in str(args.optim).upper() for word in _OWN_GROUPS):
        yield Reading("optimizer", name, (), key)
        return
    kind, keywords = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
    yield Reading("optimizer", name, (getattr(kind, "__name__", str(kind)),), key)
    groups = optimizer.param_groups
    held = {id(p) for group in groups for p in group["params"]}
    missing = [n for n, p in trainer.model.named_parameters() if p.requires_grad and id(p) not in held]
    yield Reading("parameters_missing_from_optimizer", missing, ([],), key)
    written = {"betas": "adam_beta1" if "adam_beta1" in run.train else "adam_beta2", "eps": "adam_epsilon"}
    for argument, value in keywords.items():
        if argument != "lr" and argument in groups[0]:
            values = [group[argument] for group in groups]
            live = values[0] if all(other == values[0] for other in values) else values
            place: Key = ("train", written.get(argument, "optim_args"))
            yield Reading(f"optimizer_{argument}", _plain(live), (_plain(value),), place)
    decays = sorted({group.get("weight_decay") or 0.0 for group in groups} - {0.0})
    decay = args.weight_decay
    yield Reading("weight_decay", decays, ([decay], []) if decay else ([],), ("train", "weight_decay"))
    schedule = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)
    rate = getattr(schedule, "base_lrs", [groups[0].get("initial_lr", groups[0]["lr"])])[0]
    key = next((("train", name) for name in run.train if name.endswith("ing_rate")), ("train",))
    # schedules that follow the loss store no first rate, and that of a checkpoint is one which they lowered
    is_lowered = args.lr_scheduler_type.value in LOSS_SCHEDULES and trainer.state.global_step > 0
    if rate is not None and keywords["lr"] is not None:  # an optimizer may choose its own
        expected = () if is_lowered else (round_to_digits(keywords["lr"]),)
        yield Reading("learning_rate", round_to_digits(rate), expected, key)


def _dtypes(model: PreTrainedModel) -> dict[str, list[str]]:
    """Return the dtypes of the floating-point parameters that are not quantized, of the base and of the adapter."""
    inner = unwrap_adapter(model)
    in_float32 = patches.list_float32_modules(inner)
    exempt = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in in_float32)) if in_float32 else None
    dtypes: dict[str, set[str]] = {"weights": set(), "adapter": set()}
    for name, parameter in model.named_parameters():
        packed = type(parameter).__name__ in ("Params4bit", "Int8Params")  # which may be stored as floats
        if packed or not parameter.is_floating_point() or (exempt and exempt.search(name)):
            continue
        dtypes["adapter" if _of_adapter(model, name) else "weights"].add(_short(parameter.dtype))
    return {part: sorted(names) for part, names in dtypes.items()}


def _attention_names(model: PreTrainedModel) -> list[str]:
    """Return the attention that each module's configuration names now.

    Beside a name stands its function, where it is neither upstream's nor ours.
    """
    inner = unwrap_adapter(model)
    text = inner.config.get_text_config()
    # a model that also reads pictures attends there by a configuration of another kind
    configs = [m.config for m in inner.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "config")]
    chosen = {patches.get_attention_name(config) for config in configs if type(config) is type(text)}
    names = []
    for name in chosen or {patches.get_attention_name(text)}:
        function = ALL_ATTENTION_FUNCTIONS.get(name)
        module = getattr(function, "__module__", "transformers")
        known = module.startswith("transformers.") or function is packed_attention.attend
        known = known or name == "eager" or "/" in str(name)  # a kernel of the hub
        names.append(
            str(name) if known else f"{name}, which calls {module}.{getattr(function, '__qualname__', function)}"
        )
    return sorted(names)


def _quantized_format(module: torch.nn.Module) -> str:
    """Return how one of bitsandbytes' layers holds its weights, as the weights say; "" = it is no such layer."""
    weight: Any = getattr(module, "weight", None)
    if type(weight).__name__ == "Params4bit":
        state = getattr(weight, "quant_state", None)
        kind = state.quant_type if state is not None else weight.quant_type
        double = state.nested if state is not None else weight.compress_statistics
        return _format_4bit(kind, double=double, dtype=module.compute_dtype)
    if type(weight).__name__ == "Int8Params":
        return f"8-bit, outliers above {getattr(getattr(module, 'state', None), 'threshold', 0.0):g}"
    return ""


def _expected_format(config: BitsAndBytesConfig) -> str:
    """Return how weights should be quantized, in the words of `_quantized_format`."""
    if config.load_in_8bit:
        return f"8-bit, outliers above {config.llm_int8_threshold:g}"
    double = config.bnb_4bit_use_double_quant
    return _format_4bit(config.bnb_4bit_quant_type, double=double, dtype=config.bnb_4bit_compute_dtype)


def _format_4bit(kind: str, *, double: bool, dtype: Any) -> str:
    return f"4-bit {kind}{', double quantization' if double else ''}, computed in {_short(dtype)}"


def _quantizer_skips(name: str, skipped: list[str]) -> bool:
    """Tell whether the quantizer leaves a layer as it is: one of the adapter, or one that upstream's rule names."""
    own = name.removeprefix("base_model.model.").removesuffix(".base_layer")
    return any(part in name for part in ("lora_", *_PEFT_PARTS)) or not should_convert_module(own, skipped)


def _is_quantized(inputs: TrainingInputs) -> bool:
    """Tell whether weights are quantized, by the recipe or as they were saved."""
    saved = getattr(inputs.model.config, "quantization_config", None)
    return inputs.quantization is not None or saved is not None


def _is_whole(trainer: SFTTrainer) -> bool:
    """Tell whether this process holds every parameter itself, in the dtype that it was loaded in."""
    return live_engine(trainer) in (ONE_PROCESS, DDP)


def _of_adapter(model: PreTrainedModel, name: str) -> bool:
    """Tell whether a parameter is one that peft trains."""
    if not hasattr(model, "peft_config"):
        return False
    prefix = getattr(model.base_model, "prefix", None)
    return prefix is not None and any(part in name for part in (prefix, *_PEFT_PARTS) if part)


def _fingerprint(parameter: torch.Tensor) -> Fingerprint:
    local: Any = getattr(parameter, "ds_tensor", parameter).detach()  # ZeRO-3 keeps this process's part there
    local = local.to_local() if hasattr(local, "to_local") else local  # FSDP2
    flat = local.reshape(-1)
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    bits = flat[:: max(1, local.numel() // _FINGERPRINT)].view(kind).sum(dtype=torch.int64)
    return Fingerprint(int(bits), flat[:: max(1, local.numel() // _SAMPLE)].clone())


def _expected_processes(args: SFTConfig) -> int:
    return max(ranks.count(), int(args.world_size))


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _is_on(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes", "on")
