"""The flags of OpenRLHF's `train_sft`: flat ones up to 0.9, dotted ones from 0.10.2, with their defaults; read here.

Names and defaults are those of openrlhf/cli/train_sft.py in 0.8.9 and 0.11.0. In: words of a command line.
Out: settings by flag. What they mean stands in `from_openrlhf`.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, NoReturn

from trl_sft.errors import Fault, RecipeError
from trl_sft.importers.settings import Given


class Flag(NamedTuple):
    """One flag: its dotted name ("" = there is none), its type (bool = a switch) and its default."""

    dotted: str
    type: type
    default: Any = None
    nargs: Any = None


# Flat names; flags that came later stand under their dotted name.
FLAGS = {
    "pretrain": Flag("model.model_name_or_path", str),
    "dataset": Flag("data.dataset", str),
    "dataset_probs": Flag("data.dataset_probs", str),
    "dataset_split": Flag("data.dataset_split", str, "train"),
    "train_split": Flag("", str, "train"),
    "eval_dataset": Flag("eval.dataset", str),
    "eval_split": Flag("eval.split", str, "train"),
    "max_samples": Flag("data.max_samples", int, 1_000_000),
    "input_key": Flag("data.input_key", str, "input"),
    "output_key": Flag("data.output_key", str),
    "input_template": Flag("data.input_template", str, "User: {}\nAssistant: "),
    "apply_chat_template": Flag("data.apply_chat_template", bool),
    "tokenizer_chat_template": Flag("data.tokenizer_chat_template", str),
    "multiturn": Flag("data.multiturn", bool),
    "max_len": Flag("data.max_len", int, 2048),
    "train_batch_size": Flag("train.batch_size", int, 128),
    "micro_train_batch_size": Flag("train.micro_batch_size", int, 8),
    "max_epochs": Flag("train.max_epochs", int, 2),
    "save_path": Flag("ckpt.output_dir", str, "./ckpt"),
    "save_steps": Flag("ckpt.save_steps", int, -1),
    "ckpt_path": Flag("ckpt.path", str),
    "load_checkpoint": Flag("ckpt.load_enable", bool),
    "save_hf_ckpt": Flag("ckpt.save_hf", bool),
    "disable_ds_ckpt": Flag("ckpt.disable_ds", bool),
    "max_ckpt_num": Flag("ckpt.max_num", int, 3),
    "max_ckpt_mem": Flag("ckpt.max_mem", int),
    "use_ds_universal_ckpt": Flag("ds.use_universal_ckpt", bool),
    "logging_steps": Flag("logger.logging_steps", int, 1),
    "eval_steps": Flag("eval.steps", int, -1),
    "zero_stage": Flag("ds.zero_stage", int, 2),
    "bf16": Flag("", bool),
    "ds.param_dtype": Flag("ds.param_dtype", str, "bf16"),
    "flash_attn": Flag("", bool),
    "ds.attn_implementation": Flag("ds.attn_implementation", str, "flash_attention_2"),
    "ds.experts_implementation": Flag("ds.experts_implementation", str),
    "learning_rate": Flag("adam.lr", float, 5e-6),
    "lr_warmup_ratio": Flag("lr_warmup_ratio", float, 0.03),
    "lr_scheduler": Flag("lr_scheduler", str, "cosine_with_min_lr"),
    "min_lr_ratio": Flag("min_lr_ratio", float, 0.1),
    "l2": Flag("adam.weight_decay", float, 0.0),
    "adam_betas": Flag("adam.betas", float, [0.9, 0.95], 2),
    "adam.eps": Flag("adam.eps", float),
    "optim": Flag("optim", str, "adam"),
    **{f"muon.{name}": Flag(f"muon.{name}", float) for name in ("lr", "momentum", "ns_steps")},
    **{f"muon.{name}": Flag(f"muon.{name}", bool) for name in ("nesterov", "no_nesterov")},
    "max_norm": Flag("max_norm", float, 1.0),
    "gradient_checkpointing": Flag("model.gradient_checkpointing_enable", bool),
    "gradient_checkpointing_use_reentrant": Flag("model.gradient_checkpointing_reentrant", bool),
    "adam_offload": Flag("ds.adam_offload", bool),
    "zpg": Flag("ds.zpg", int),
    "overlap_comm": Flag("ds.overlap_comm", bool),
    "grad_accum_dtype": Flag("ds.grad_accum_dtype", str),
    "deepcompile": Flag("ds.deepcompile", bool),
    "ds_tensor_parallel_size": Flag("ds.tensor_parallel_size", int),
    "ring_attn_size": Flag("ds.ring_attn_size", int),
    "ring_head_stride": Flag("ds.ring_attn_head_stride", int),
    "packing_samples": Flag("ds.packing_samples", bool),
    "use_liger_kernel": Flag("ds.use_liger_kernel", bool),
    "lora_rank": Flag("ds.lora.rank", int, 0),
    "lora_alpha": Flag("ds.lora.alpha", int, 16),
    "lora_dropout": Flag("ds.lora.dropout", float, 0.0),
    "target_modules": Flag("ds.lora.target_modules", str, "all-linear", "*"),
    "load_in_4bit": Flag("ds.load_in_4bit", bool),
    "aux_loss_coef": Flag("model.aux_loss_coef", float),
    "pretrain_mode": Flag("model.pretrain_mode_enable", bool),
    "disable_fast_tokenizer": Flag("data.disable_fast_tokenizer", bool),
    "data.dataloader_num_workers": Flag("data.dataloader_num_workers", int),
    "use_ms": Flag("use_ms", bool),
    "local_rank": Flag("local_rank", int),
    "seed": Flag("train.seed", int, 42),
    "full_determinism": Flag("train.full_determinism_enable", bool),
    "use_wandb": Flag("logger.wandb.key", str),
    **{f"wandb_{name}": Flag(f"logger.wandb.{name}", str) for name in ("org", "group", "project", "run_name")},
    "use_tensorboard": Flag("logger.tensorboard_dir", str),
    "torch_compile": Flag("", bool),
    "disable_trace_cache": Flag("", bool),
}
# flags without an equivalent, and why
_FILE = "in a DeepSpeed file for launch.config: "
LEFT = {
    "train_split": "OpenRLHF reads --dataset_split and not this one",
    "ckpt_path": "checkpoints lie in train.output_dir",
    "save_hf_ckpt": "every checkpoint can be loaded by transformers",
    "max_ckpt_mem": "there is no limit by size; train.save_total_limit is one by number",
    "use_ds_universal_ckpt": _FILE + "checkpoint.load_universal",
    "adam_offload": _FILE + "zero_optimization.offload_optimizer.device: cpu",
    "zpg": _FILE + "zero_optimization.zero_hpz_partition_size",
    "overlap_comm": _FILE + "zero_optimization.overlap_comm",
    "grad_accum_dtype": _FILE + "data_types.grad_accum_dtype",
    "deepcompile": _FILE + "compile.deepcompile",
    "ds_tensor_parallel_size": "this version does not divide a layer; the global batch stays as it is",
    "ring_attn_size": "this version does not divide a row; the global batch stays as it is",
    "ring_head_stride": "this version does not divide a row",
    "use_ms": "models come from a folder or the Hugging Face hub",
    "local_rank": "the launcher sets it",
    "wandb_org": "set WANDB_ENTITY before the command",
    "wandb_group": "set WANDB_RUN_GROUP before the command",
    "wandb_project": "set WANDB_PROJECT before the command",
    "disable_trace_cache": "a setting of ZeRO-3 that later versions dropped",
    **{f"muon.{name}": "Muon is not built in this version" for name in ("lr", "momentum", "ns_steps")},
    **{f"muon.{name}": "Muon is not built in this version" for name in ("nesterov", "no_nesterov")},
}
DOTTED = {flag.dotted: name for name, flag in FLAGS.items() if flag.dotted and flag.dotted != name}


class _Parser(argparse.ArgumentParser):
    """argparse, whose complaints are ours."""

    def error(self, message: str) -> NoReturn:
        """Raise RecipeError."""
        raise RecipeError(Fault("openrlhf", message, "flags of openrlhf.cli.train_sft, after --"))


def names() -> Collection[str]:
    """Return every flag, flat and dotted."""
    return {*FLAGS, *DOTTED}


def dotted(given: Given) -> bool:
    """Tell whether one of the flags was written with a dot, as from 0.10.2."""
    return any(given.where(name).removeprefix("--") in DOTTED for name in given.values)


def read(words: Sequence[str]) -> Given:
    """Return flags by their flat name, the unknown ones under their own; what stands before them starts OpenRLHF.

    Raises RecipeError.
    """
    start = next((n for n, word in enumerate(words, 1) if word.endswith(("train_sft", "train_sft.py"))), 0)
    words = words[start:]
    parser = _Parser(add_help=False, allow_abbrev=False, exit_on_error=False)
    written: dict[str, str] = {}
    for name, flag in FLAGS.items():
        both = {f"--{name}": name, f"--{flag.dotted}": name} if flag.dotted else {f"--{name}": name}
        how: dict[str, Any] = (
            {"action": "store_true"} if flag.type is bool else {"type": flag.type, "nargs": flag.nargs}
        )
        parser.add_argument(*both, dest=name, default=argparse.SUPPRESS, **how)
        written |= {option: name for option in both if any(word.split("=")[0] == option for word in words)}
    try:
        found, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        said = (error.argument_name or "openrlhf").split("/")
        name = next((option for option in said if option in written), said[0])
        raise RecipeError(Fault(name, error.message, "a value of its type, as OpenRLHF takes it")) from None
    values = vars(found)
    option = ""
    for word in rest:
        if word.startswith("--"):
            option, _, value = word[2:].partition("=")
            values[option] = value or True
        else:
            values[option] = word if values.get(option, True) is True else f"{values[option]} {word}"
    if "" in values:
        raise RecipeError(Fault("openrlhf", f'"{values[""]}": no flag', "--NAME VALUE"))
    options = {name: option for option, name in written.items()}
    return Given(values, lambda name: options.get(name, f"--{name}"))
