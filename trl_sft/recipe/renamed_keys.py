"""Names and values that upstream renamed or removed: read as today's, or refused with what to write.

In: a section or source as written. Out: the same under today's names, a line for each that changed, faults.
The tables hold only names that the tested owners lack; where the installed one has a name, it is used as
it is. `tests/old_names.yaml` has the release in which each changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trl_sft.errors import Fault
from trl_sft.recipe.upstream import keys, types
from trl_sft.recipe.yaml_reader import Key, Recipe, flow, kind


@dataclass(frozen=True)
class Old:
    """What became of a name. A value that is neither translated nor done anyway is refused."""

    new: str = ""  # today's name; `accelerator_config.split_batches` stands under another key
    values: Mapping[Any, Any] = field(default_factory=dict)  # what its values became, where they are others
    done: tuple[Any, ...] = ()  # values that say what is done without them
    fix: str = ""  # what to do instead, where nothing can be translated
    below: float | None = None  # the old value has to lie in [0, below)
    what: str = "upstream has it no more"

    def today(self, value: Any) -> Any:
        """Return the value under today's name. Raises KeyError where it has none."""
        if not self.new:
            raise KeyError(value)
        return self.values[value] if self.values else value


_ONE = "leave it out: this version trains in one process"
_PYTHON = "leave it out: a recipe cannot hold Python; SFTTrainer takes it in a script"
_APEX = "leave it out: apex is gone from transformers, fp16: true uses torch"
_TRAINER = "an argument of SFTTrainer, no key of its settings"
_ROWS = "leave it out: rows are made tokens in batches, and packed to max_length"
_FILES = {
    "resume_download": Old(done=(True, False, None)),
    "use_auth_token": Old("token"),
}

TABLE: dict[str, dict[str, Old]] = {
    "train": {
        # 5.23 takes both; v6 drops the old ones, and older versions lack the new ones
        "activation_checkpointing": Old("gradient_checkpointing"),
        "activation_checkpointing_kwargs": Old("gradient_checkpointing_kwargs"),
        "gradient_checkpointing": Old("activation_checkpointing"),
        "gradient_checkpointing_kwargs": Old("activation_checkpointing_kwargs"),
        "adafactor": Old("optim", {True: "adafactor"}, done=(False,)),
        "dispatch_batches": Old("accelerator_config.dispatch_batches", done=(None,)),
        "evaluation_strategy": Old("eval_strategy"),
        "fp16_backend": Old(done=("auto", "amp", "cuda_amp"), fix=_APEX),
        "fp16_opt_level": Old(fix=_APEX),
        "fsdp_min_num_params": Old(done=(0,), fix=_ONE),
        "fsdp_transformer_layer_cls_to_wrap": Old(done=(None,), fix=_ONE),
        "gradient_checkpointing_use_reentrant": Old("gradient_checkpointing_kwargs.use_reentrant"),
        "group_by_length": Old("train_sampling_strategy", {True: "group_by_length"}, done=(False,)),
        "half_precision_backend": Old(done=("auto", "amp", "cuda_amp"), fix=_APEX),
        "include_inputs_for_metrics": Old("include_for_metrics", {True: ["inputs"]}, done=(False,)),
        "include_tokens_per_second": Old(done=(False,), fix="include_num_input_tokens_seen: true"),
        "jit_mode_eval": Old(done=(False,), fix="torch_compile: true"),
        "logging_dir": Old(fix="the variable TENSORBOARD_LOGGING_DIR before the command"),
        "max_seq_length": Old("max_length"),
        "mp_parameters": Old(done=("",), fix=_ONE),
        "no_cuda": Old("use_cpu"),
        "overwrite_output_dir": Old(done=(False,), fix="run.overwrite: true, which replaces a finished run"),
        "past_index": Old(done=(-1,), fix="leave it out: it was for models that hand on a memory"),
        "per_gpu_eval_batch_size": Old("per_device_eval_batch_size"),
        "per_gpu_train_batch_size": Old("per_device_train_batch_size"),
        "push_to_hub_model_id": Old("hub_model_id"),
        "push_to_hub_organization": Old(done=(None,), fix="hub_model_id: ORGANIZATION/NAME"),
        "push_to_hub_token": Old("hub_token"),
        "ray_scope": Old(fix="leave it out: it was for searches of hyperparameters"),
        "save_safetensors": Old(done=(True,), fix="leave it out: weights are written as safetensors"),
        "split_batches": Old("accelerator_config.split_batches", done=(None,)),
        "torchdynamo": Old("torch_compile_backend"),
        "tp_size": Old(done=(0, 1), fix=_ONE),
        "tpu_metrics_debug": Old("debug", {True: "tpu_metrics_debug"}, done=(False,)),
        "tpu_num_cores": Old(done=(None,), fix=_ONE),
        "use_ipex": Old(done=(False,), fix="leave it out: transformers knows it no more"),
        "use_legacy_prediction_loop": Old(done=(False,), fix="leave it out: transformers has one loop"),
        "use_liger": Old("use_liger_kernel"),
        "use_mps_device": Old(done=(True, False)),
        "warmup_ratio": Old("warmup_steps", below=1.0),
        # Arguments of SFTTrainer, now or once.
        "callbacks": Old(fix=_PYTHON, what=_TRAINER),
        "chars_per_token": Old(fix=_ROWS),
        "compute_metrics": Old(fix="evaluate.metrics", what=_TRAINER),
        "data_collator": Old(fix=_PYTHON, what=_TRAINER),
        "dataset_batch_size": Old(fix=_ROWS),
        "eval_dataset": Old(fix="data.eval", what=_TRAINER),
        "formatting_func": Old(fix="data.train: {path: ..., format: rows.py:FUNCTION}", what=_TRAINER),
        "infinite": Old(done=(False,), fix="max_steps"),
        "model_init": Old(fix="model.name_or_path"),
        "num_of_sequences": Old(fix=_ROWS),
        "peft_config": Old(fix="the `lora:` section", what=_TRAINER),
        "processing_class": Old(fix="the `tokenizer:` section", what=_TRAINER),
        "tokenizer": Old(fix="the `tokenizer:` section"),
        "train_dataset": Old(fix="data.train", what=_TRAINER),
    },
    "model": {
        **_FILES,
        **dict.fromkeys(("from_flax", "from_tf"), Old(done=(False,), fix="weights as safetensors, or of torch")),
        "low_cpu_mem_usage": Old(done=(True,), fix="leave it out: weights are always loaded so"),
        "mirror": Old(fix="the variable HF_ENDPOINT before the command"),
        "offload_state_dict": Old(done=(True, False, None)),
        "torch_dtype": Old("dtype"),
        "use_flash_attention_2": Old("attn_implementation", {True: "flash_attention_2"}, done=(False,)),
    },
    "tokenizer": {**_FILES, "additional_special_tokens": Old("extra_special_tokens")},
    keys.GENERATION: {
        "forced_decoder_ids": Old(done=(None,), fix="leave it out: transformers has it no more"),
        "generation_kwargs": Old(fix="leave it out, or its keys themselves"),
        "return_legacy_cache": Old(done=(False,), fix="leave it out: transformers has one kind of cache"),
    },
    keys.SOURCE: {
        "errors": Old("encoding_errors"),
        "ignore_verifications": Old("verification_mode", {True: "no_checks"}, done=(False,)),
        "trust_remote_code": Old(done=(False,), fix="leave it out: datasets runs no code of a data set"),
        "use_auth_token": Old("token"),
    },
}
# key -> what became of its values
VALUES: dict[tuple[str, str], dict[str, Old]] = {
    ("train", "optim"): {
        "adamw_apex_fused": Old(fix="adamw_torch_fused"),
        "adamw_hf": Old("optim", {"adamw_hf": "adamw_torch"}),
    },
    ("train", "packing_strategy"): {"bfd-requeue": Old("packing_strategy", {"bfd-requeue": "bfd_split"})},
}


def of(section: str) -> dict[str, Old]:
    """Return the old names of a section that the installed owner lacks."""
    return {name: old for name, old in TABLE.get(section, {}).items() if name not in keys.get_fields(section)}


def today(recipe: Recipe, key: Key, given: Mapping[Any, Any], faults: list[Fault], notes: list[str]) -> dict[Any, Any]:
    """Return a mapping of a recipe under today's names; a line in `notes` for each that changed."""
    section = keys.SOURCE if key[0] == "data" and len(key) > 1 else ".".join(map(str, key))
    found = dict(given)
    for name in [name for name in given if name in TABLE.get(section, {}) or (section, name) in VALUES]:
        value = found[name]
        old = _of_value(section, name, value) if (section, name) in VALUES else of(section).get(name)
        if old is not None:
            del found[name]
            _translate((recipe, (*key, name)), old, value, found, (faults, notes))
    return found


def _of_value(section: str, name: str, value: Any) -> Old | None:
    old = VALUES[section, name].get(value) if isinstance(value, str) else None
    return None if old is None or types.accepts(keys.get_fields(section)[name], value) else old


def _translate(
    at: tuple[Recipe, Key], old: Old, value: Any, found: dict[Any, Any], told: tuple[list[Fault], list[str]]
) -> None:
    """Put an old name's value under today's; note it, or the fault."""
    (recipe, key), (faults, notes) = at, told
    where, name = recipe.where(key), str(key[-1])
    if any(value == done and type(value) is type(done) for done in old.done):
        notes.append(f"{where}: left out; {flow(value)} is what is done anyway")
        return
    head, _, inner = old.new.partition(".")
    target = found.get(head, {}) if inner else found
    try:
        today = old.today(value)
    except (KeyError, TypeError):
        write = old.fix or f"{old.new}, with a value of today's"
        faults.append(Fault(where, f"{name}: {kind(value)}; {old.what}", write))
        return
    if old.below is not None and not (isinstance(value, int | float) and 0 <= value < old.below):
        faults.append(Fault(where, kind(value), f"a number from 0 to below {old.below:g}, or {old.new}"))
    elif not isinstance(target, dict) or (inner or head) in target:
        faults.append(Fault(where, f"{name} is today's {old.new}, which stands there too", "one of the two"))
    else:
        found[head] = target | {inner: today} if inner else today
        recipe.places.setdefault((*key[:-1], head), recipe.places[key])
        shown = "a secret" if head in ("token", "hub_token") else flow(today)
        if shown != flow(today):
            where = where.replace(str(value), "...")  # an override's place shows its value
        notes.append(f"{where}: read as {old.new}: {shown} (its name today)")
