"""What a run asks for: for each reading of `live` the value that it should have, and the key that asks it.

In: the checked recipe, its SFTConfig, the model's configuration. Out: points by the names of `live`. What upstream may
choose between is said in the point; what the recipe leaves to upstream altogether has none.
"""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import torch
from transformers import BitsAndBytesConfig, get_scheduler
from trl import SFTConfig, SFTTrainer

from trl_sft.model import cpu_loss, load, meta_model, packed_attention, patches
from trl_sft.model.load import ModelSource, unwrap_adapter
from trl_sft.recipe.checked import Run
from trl_sft.recipe.yaml_reader import Key
from trl_sft.training import actual

_OF_TRL = ("bfd", "bfd_split")  # packing strategies whose documents TRL hands to the model apart
_CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")  # the newer name first
_OWN_GROUPS = ("GALORE", "LOMO", "APOLLO")  # optimizers that make their own groups out of the model


class Point(NamedTuple):
    """What one reading should be."""

    value: Any
    key: Key  # of the recipe, that asks it
    also: tuple[Any, ...] = ()  # as good


def before(run: Run, found: ModelSource, quantized: BitsAndBytesConfig | None, trainer: SFTTrainer) -> dict[str, Point]:
    """Return what holds when the first step is next."""
    args: SFTConfig = trainer.args
    points = {
        "processes": Point(max(int(os.environ.get("WORLD_SIZE", "1")), args.world_size), ("launch",)),
        "engine": Point(engine(args), ("launch",)),
        "loss": Point(
            actual.OURS if cpu_loss.replaces_trl_loss(trainer.model.device) else actual.THEIRS,
            ("run",),
        ),
        "attention": _attention(run, found, trainer),
        "neftune": Point(args.neftune_noise_alpha, ("train", "neftune_noise_alpha")),
        "trackers": Point(sorted(args.report_to), ("train", "report_to")),
        "seed": Point(args.seed, ("train", "seed")),
        "divisor of the loss": Point(1, ("train", "gradient_accumulation_steps")),
        "changed arguments": Point([], ("train", *(line.partition(":")[0] for line in changed(run, args)[:1]))),
    }
    if not args.auto_find_batch_size:
        points["rows at a time"] = Point(args.per_device_train_batch_size, ("train", "per_device_train_batch_size"))
    if _every_layer(args):
        name = next((n for n in _CHECKPOINTING if n in run.train), _CHECKPOINTING[0])
        points["activations computed again"] = Point(_checkpointing(args), ("train", name))
    return points | _weights(run, found, quantized, trainer) | _lora(run, found) | _steps(run, trainer)


def engine(args: SFTConfig) -> str:
    """Return what should carry the steps: by the arguments, by an accelerate file, by the number of processes."""
    if (plugin := getattr(args, "deepspeed_plugin", None)) is not None:
        return f"{actual.ZERO}{plugin.zero_stage}"
    if args.fsdp or _on("ACCELERATE_USE_FSDP"):
        return actual.FSDP
    if _on("ACCELERATE_USE_DEEPSPEED"):
        return f"{actual.ZERO}{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    return actual.DDP if max(args.world_size, int(os.environ.get("WORLD_SIZE", "1"))) > 1 else actual.ONE_PROCESS


def changed(run: Run, args: SFTConfig) -> list[str]:
    """Return the numbers and switches of `train:` that upstream replaced by others, with both values."""
    plain = (bool, int, float)
    ours = {name: value for name, value in run.train.items() if isinstance(value, plain) and hasattr(args, name)}
    now = {name: getattr(args, name) for name in ours}  # a switch may become the word for it: true -> all
    return [
        f"{n}: {value} became {now[n]}" for n, value in ours.items() if isinstance(now[n], plain) and now[n] != value
    ]


def in_a_step(args: SFTConfig, streamed: bool) -> dict[str, Point]:
    """Return what holds inside the first step; `streamed`: packs are read while training goes on."""
    mixed = "float16" if args.fp16 else "bfloat16" if args.bf16 else None
    apart = bool(args.padding_free or (args.packing and args.packing_strategy in _OF_TRL))
    points = {
        "modules without training mode": Point([], ("train",)),
        "autocast": Point(mixed, ("train", "fp16" if args.fp16 else "bf16")),
        "documents handed apart": Point(apart, ("train", "packing")),
    }
    return points if not streamed else {k: v for k, v in points.items() if k != "documents handed apart"}


def rows(args: SFTConfig) -> int:
    """Return the rows (packs, with packing) of one optimizer step over all processes."""
    return int(args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size)


def schedule(trainer: SFTTrainer) -> Any:
    """Return a schedule as upstream makes it from the arguments, beside the live one."""
    args, steps = trainer.args, trainer.state.max_steps
    rate = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)[1]["lr"]
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=rate)
    return get_scheduler(
        args.lr_scheduler_type,
        optimizer=stand_in,
        num_warmup_steps=args.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )


def times(trainer: SFTTrainer) -> list[int]:
    """Return the steps at which the schedule is asked: the next ones, the end of the warm-up, the middle, the last."""
    now, last = trainer.state.global_step, trainer.state.max_steps - 1
    picked = {now, now + 1, trainer.args.get_warmup_steps(trainer.state.max_steps), (now + last) // 2, last}
    return sorted(step for step in picked if now <= step <= last)


def _steps(run: Run, trainer: SFTTrainer) -> dict[str, Point]:
    """Return how the steps should go: their number, the optimizer, its rates."""
    args = trainer.args
    key = next((("train", name) for name in run.train if name.endswith("ing_rate")), ("train",))
    points: dict[str, Point] = {}
    if not args.auto_find_batch_size:
        by = "max_steps" if args.max_steps > 0 else "num_train_epochs"
        points["steps"] = Point(_number(trainer), ("train", by))
    if actual.whole(trainer) and not any(name in str(args.optim).upper() for name in _OWN_GROUPS):
        cls, keywords = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
        points["optimizer"] = Point(getattr(cls, "__name__", str(cls)), ("train", "optim"))
        written = {"betas": "adam_beta1" if "adam_beta1" in run.train else "adam_beta2", "eps": "adam_epsilon"}
        for name, value in keywords.items():
            plain = list(value) if isinstance(value, tuple) else value
            points[f"optimizer {name}"] = Point(plain, ("train", written.get(name, "optim_args")))
        points["parameters that the optimizer lacks"] = Point([], ("train", "optim"))
        points["weight decay"] = Point([args.weight_decay], ("train", "weight_decay"), ([],))
        points["weight decay of norms and biases"] = Point([0.0], ("train", "weight_decay"), ([],))
    made = schedule(trainer)
    points["schedule"] = Point(type(made).__name__, ("train", "lr_scheduler_type"))
    if hasattr(made, "lr_lambdas") and made.base_lrs[0] is not None:
        values = [actual.significant(made.base_lrs[0] * made.lr_lambdas[0](step)) for step in times(trainer)]
        points["rates to come"] = Point(values, key)
        if values and trainer.state.global_step == 0:  # a checkpoint's optimizer holds its own for one step more
            points["rate of the next step"] = Point(values[0], key)
    return points


def _number(trainer: SFTTrainer) -> int:
    """Return the number of steps, counted from the rows where the recipe goes by epochs."""
    args = trainer.args
    if args.max_steps > 0:
        return int(args.max_steps)
    batches = len(trainer.train_dataset) / (args.per_device_train_batch_size * args.world_size)
    each = max(1, math.floor(batches) if args.dataloader_drop_last else math.ceil(batches))
    steps: int = math.ceil(args.num_train_epochs * math.ceil(each / args.gradient_accumulation_steps))
    return steps


def _weights(
    run: Run, found: ModelSource, quantized: BitsAndBytesConfig | None, trainer: SFTTrainer
) -> dict[str, Point]:
    """Return in which types the weights should be, how quantized, and which of them are trained."""
    key = ("model", "dtype")
    points = {
        "parameters that are not trained": Point([], ("lora",) if run.lora is not None else ("model",)),
        "parameters that are trained too": Point([], ("lora",) if run.lora is not None else ("model",)),
    }
    asked = run.model.get("dtype", "float32")
    dtype = str(getattr(found.config, "dtype", None)).removeprefix("torch.") if asked == "auto" else asked
    packed = quantized is not None or getattr(found.config, "quantization_config", None) is not None
    if actual.whole(trainer) and dtype != "None":
        both = sorted({dtype, "float32"})
        of_adapter = both if packed else ["float32"]
        mixed = not packed and dtype != "float32" and meta_model.keeps_float32(run, found, dtype)
        points["weights"] = Point([dtype], key, (both, ["float32"], []) if packed else (both,) if mixed else ())
        points["adapter weights"] = Point([], key)
        if run.lora is not None or found.adapter:
            lower = ([dtype], both) if dtype != "float32" else ()
            kbit = (["bfloat16"], ["bfloat16", "float32"]) if packed else ()
            points["adapter weights"] = Point(of_adapter, key, (*lower, *kbit))
    if quantized is not None:
        bits = ("quantization", "load_in_8bit" if quantized.load_in_8bit else "load_in_4bit")
        points["quantized"] = Point([_way(quantized)], bits)
        points["linear layers not quantized"] = Point([], bits)
    elif not packed:
        points["quantized"] = Point([], ("quantization",))
    return points


def _way(config: BitsAndBytesConfig) -> str:
    """Return how weights should be quantized, in the words of `live`."""
    if config.load_in_8bit:
        return f"8-bit, outliers above {config.llm_int8_threshold:g}"
    dtype = str(config.bnb_4bit_compute_dtype).removeprefix("torch.")
    return f"4-bit {config.bnb_4bit_quant_type}{', twice' * config.bnb_4bit_use_double_quant}, computed in {dtype}"


def _lora(run: Run, found: ModelSource) -> dict[str, Point]:
    """Return how the adapter should stand in the model; one that training goes on with brings its own numbers."""
    config = load.make_lora_config(run)
    if config is None:
        points = {"adapter": Point("on" if found.adapter else "none", ("lora",))}
        return points | ({"adapter layers off": Point([], ("lora",))} if found.adapter else {})
    points = {
        "adapter": Point("on", ("lora",)),
        "adapter layers off": Point([], ("lora",)),
        "names without a module": Point([], ("lora", "target_modules")),
    }
    if not config.rank_pattern:
        points["r"] = Point([config.r], ("lora", "r"))
    if not config.alpha_pattern:
        points["lora_alpha"] = Point([config.lora_alpha], ("lora", "lora_alpha"))
    # parameters that are targeted by name and embeddings take no dropout, and hold a 0
    also = ([0.0], sorted({0.0, config.lora_dropout})) if config.target_parameters or _embeds(config) else ()
    points["lora_dropout"] = Point([config.lora_dropout], ("lora", "lora_dropout"), also)
    return points


def nameless(run: Run, adapted: list[str]) -> list[str]:
    """Return the names in `lora:` that no module has, which peft passes over; `adapted` are the adapter's modules."""
    lists = [(run.lora or {}).get(name) for name in ("target_modules", "modules_to_save")]
    names = [name for given in lists if isinstance(given, list) for name in given]
    return [name for name in names if not any(f".{path}".endswith(f".{name}") for path in adapted)]


def _embeds(config: Any) -> bool:
    return isinstance(config.target_modules, set | list) and any("embed" in name for name in config.target_modules)


def _loss(trainer: Any) -> str:
    """Return where the loss is computed: by ours without Triton, else by TRL."""
    ours = cpu_loss.replaces_trl_loss(trainer.model.device)
    return actual.OURS if ours else actual.THEIRS


def _attention(run: Run, found: ModelSource, trainer: SFTTrainer) -> Point:
    """Return which attention should be called: the recipe's, else upstream's for the model, or ours for packs."""
    key = ("model", "attn_implementation")
    asked = run.model.get("attn_implementation")
    if asked is not None:
        # a flash attention that is not installed comes from the hub's kernels, under their name
        given = [name for name in actual.attentions(trainer.model) if "flash" in name and "flash" in asked]
        return Point([asked], key, (given,) if given else ())
    inner = unwrap_adapter(trainer.model)
    saved = patches.get_attention_name(found.config)  # a configuration may name one
    chosen = getattr(inner, "get_correct_attn_implementation", lambda name: name or "sdpa")(saved)
    return Point([chosen], key, ([packed_attention.DOCUMENTS],) if trainer.padding_free else ())


def _checkpointing(args: SFTConfig) -> bool:
    return any(getattr(args, name, False) for name in _CHECKPOINTING)


def _every_layer(args: SFTConfig) -> bool:
    given = getattr(args, "activation_checkpointing_kwargs", None) or {}
    return bool(given.get("every_n_layers", 1) == 1)


def _on(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes", "on")
