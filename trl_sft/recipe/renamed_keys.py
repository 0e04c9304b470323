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
from trl_sft.recipe.yaml_reader import Key, Recipe, describe_value, format_value


@dataclass(frozen=True)
class RenamedKey:
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
    "resume_download": RenamedKey(done=(True, False, None)),
    "use_auth_token": RenamedKey("token"),
}

RENAMED_KEYS: dict[str, dict[str, RenamedKey]] = {
    "train": {
        # 5.23 takes both; v6 drops the old ones, and older versions lack the new ones
        "activation_checkpointing": RenamedKey("gradient_checkpointing"),
        "activation_checkpointing_kwargs": RenamedKey("gradient_checkpointing_kwargs"),
        "gradient_checkpointing": RenamedKey("activation_checkpointing"),
        "gradient_checkpointing_kwargs": RenamedKey("activation_checkpointing_kwargs"),
        "adafactor": RenamedKey("optim", {True: "adafactor"}, done=(False,)),
        "dispatch_batches": RenamedKey("accelerator_config.dispatch_batches", done=(None,)),
        "evaluation_strategy": RenamedKey("eval_strategy"),
        "fp16_backend": RenamedKey(done=("auto", "amp", "cuda_amp"), fix=_APEX),
        "fp16_opt_level": RenamedKey(fix=_APEX),
        "fsdp_min_num_params": RenamedKey(done=(0,), fix=_ONE),
        "fsdp_transformer_layer_cls_to_wrap": RenamedKey(done=(None,), fix=_ONE),
        "gradient_checkpointing_use_reentrant": RenamedKey("gradient_checkpointing_kwargs.use_reentrant"),
        "group_by_length": RenamedKey("train_sampling_strategy", {True: "group_by_length"}, done=(False,)),
        "half_precision_backend": RenamedKey(done=("auto", "amp", "cuda_amp"), fix=_APEX),
        "include_inputs_for_metrics": RenamedKey("include_for_metrics", {True: ["inputs"]}, done=(False,)),
        "include_tokens_per_second": RenamedKey(done=(False,), fix="include_num_input_tokens_seen: true"),
        "jit_mode_eval": RenamedKey(done=(False,), fix="torch_compile: true"),
        "logging_dir": RenamedKey(fix="the variable TENSORBOARD_LOGGING_DIR before the command"),
        "max_seq_length": RenamedKey("max_length"),
        "mp_parameters": RenamedKey(done=("",), fix=_ONE),
        "no_cuda": RenamedKey("use_cpu"),
        "overwrite_output_dir": RenamedKey(done=(False,), fix="run.overwrite: true, which replaces a finished run"),
        "past_index": RenamedKey(done=(-1,), fix="leave it out: it was for models that hand on a memory"),
        "per_gpu_eval_batch_size": RenamedKey("per_device_eval_batch_size"),
        "per_gpu_train_batch_size": RenamedKey("per_device_train_batch_size"),
        "push_to_hub_model_id": RenamedKey("hub_model_id"),
        "push_to_hub_organization": RenamedKey(done=(None,), fix="hub_model_id: ORGANIZATION/NAME"),
        "push_to_hub_token": RenamedKey("hub_token"),
        "ray_scope": RenamedKey(fix="leave it out: it was for searches of hyperparameters"),
        "save_safetensors": RenamedKey(done=(True,), fix="leave it out: weights are written as safetensors"),
        "split_batches": RenamedKey("accelerator_config.split_batches", done=(None,)),
        "torchdynamo": RenamedKey("torch_compile_backend"),
        "tp_size": RenamedKey(done=(0, 1), fix=_ONE),
        "tpu_metrics_debug": RenamedKey("debug", {True: "tpu_metrics_debug"}, done=(False,)),
        "tpu_num_cores": RenamedKey(done=(None,), fix=_ONE),
        "use_ipex": RenamedKey(done=(False,), fix="leave it out: transformers knows it no more"),
        "use_legacy_prediction_loop": RenamedKey(done=(False,), fix="leave it out: transformers has one loop"),
        "use_liger": RenamedKey("use_liger_kernel"),
        "use_mps_device": RenamedKey(done=(True, False)),
        "warmup_ratio": RenamedKey("warmup_steps", below=1.0),
        # Arguments of SFTTrainer, now or once.
        "callbacks": RenamedKey(fix=_PYTHON, what=_TRAINER),
        "chars_per_token": RenamedKey(fix=_ROWS),
        "compute_metrics": RenamedKey(fix="evaluate.metrics", what=_TRAINER),
        "data_collator": RenamedKey(fix=_PYTHON, what=_TRAINER),
        "dataset_batch_size": RenamedKey(fix=_ROWS),
        "eval_dataset": RenamedKey(fix="data.eval", what=_TRAINER),
        "formatting_func": RenamedKey(fix="data.train: {path: ..., format: rows.py:FUNCTION}", what=_TRAINER),
        "infinite": RenamedKey(done=(False,), fix="max_steps"),
        "model_init": RenamedKey(fix="model.name_or_path"),
        "num_of_sequences": RenamedKey(fix=_ROWS),
        "peft_config": RenamedKey(fix="the `lora:` section", what=_TRAINER),
        "processing_class": RenamedKey(fix="the `tokenizer:` section", what=_TRAINER),
        "tokenizer": RenamedKey(fix="the `tokenizer:` section"),
        "train_dataset": RenamedKey(fix="data.train", what=_TRAINER),
    },
    "model": {
        **_FILES,
        **dict.fromkeys(("from_flax", "from_tf"), RenamedKey(done=(False,), fix="weights as safetensors, or of torch")),
        "low_cpu_mem_usage": RenamedKey(done=(True,), fix="leave it out: weights are always loaded so"),
        "mirror": RenamedKey(fix="the variable HF_ENDPOINT before the command"),
        "offload_state_dict": RenamedKey(done=(True, False, None)),
        "torch_dtype": RenamedKey("dtype"),
        "use_flash_attention_2": RenamedKey("attn_implementation", {True: "flash_attention_2"}, done=(False,)),
    },
    "tokenizer": {**_FILES, "additional_special_tokens": RenamedKey("extra_special_tokens")},
    keys.GENERATION: {
        "forced_decoder_ids": RenamedKey(done=(None,), fix="leave it out: transformers has it no more"),
        "generation_kwargs": RenamedKey(fix="leave it out, or its keys themselves"),
        "return_legacy_cache": RenamedKey(done=(False,), fix="leave it out: transformers has one kind of cache"),
    },
    keys.SOURCE: {
        "errors": RenamedKey("encoding_errors"),
        "ignore_verifications": RenamedKey("verification_mode", {True: "no_checks"}, done=(False,)),
        "trust_remote_code": RenamedKey(done=(False,), fix="leave it out: datasets runs no code of a data set"),
        "use_auth_token": RenamedKey("token"),
    },
}
# key -> what became of its values
RENAMED_VALUES: dict[tuple[str, str], dict[str, RenamedKey]] = {
    ("train", "optim"): {
        "adamw_apex_fused": RenamedKey(fix="adamw_torch_fused"),
        "adamw_hf": RenamedKey("optim", {"adamw_hf": "adamw_torch"}),
    },
    ("train", "packing_strategy"): {"bfd-requeue": RenamedKey("packing_strategy", {"bfd-requeue": "bfd_split"})},
}


def renamed_in(section: str) -> dict[str, RenamedKey]:
    """Return the old names of a section that the installed owner lacks."""
    return {name: old for name, old in RENAMED_KEYS.get(section, {}).items() if name not in keys.get_fields(section)}


def translate(
    recipe: Recipe, key: Key, given: Mapping[Any, Any], faults: list[Fault], notes: list[str]
) -> dict[Any, Any]:
    """Return a mapping of a recipe under today's names; a line in `notes` for each that changed."""
    section = keys.SOURCE if key[0] == "data" and len(key) > 1 else ".".join(map(str, key))
    found = dict(given)
    for name in [name for name in given if name in RENAMED_KEYS.get(section, {}) or (section, name) in RENAMED_VALUES]:
        value = found[name]
        old = _of_value(section, name, value) if (section, name) in RENAMED_VALUES else renamed_in(section).get(name)
        if old is not None:
            del found[name]
            _translate((recipe, (*key, name)), old, value, found, (faults, notes))
    return found


def _of_value(section: str, name: str, value: Any) -> RenamedKey | None:
    old = RENAMED_VALUES[section, name].get(value) if isinstance(value, str) else None
    return None if old is None or types.accepts(keys.get_fields(section)[name], value) else old


def _translate(
    at: tuple[Recipe, Key], old: RenamedKey, value: Any, found: dict[Any, Any], told: tuple[list[Fault], list[str]]
) -> None:
    """Put an old name's value under today's; note it, or the fault."""
    (recipe, key), (faults, notes) = at, told
    where, name = recipe.where(key), str(key[-1])
    if any(value == done and type(value) is type(done) for done in old.done):
        notes.append(f"{where}: left out; {format_value(value)} is what is done anyway")
        return
    head, _, inner = old.new.partition(".")
    target = found.get(head, {}) if inner else found
    try:
        today = old.today(value)
    except (KeyError, TypeError):
        write = old.fix or f"{old.new}, with a value of today's"
        faults.append(Fault(where, f"{name}: {describe_value(value)}; {old.what}", write))
        return
    if old.below is not None and not (isinstance(value, int | float) and 0 <= value < old.below):
        faults.append(Fault(where, describe_value(value), f"a number from 0 to below {old.below:g}, or {old.new}"))
    elif not isinstance(target, dict) or (inner or head) in target:
        faults.append(Fault(where, f"{name} is today's {old.new}, which stands there too", "one of the two"))
    else:
        found[head] = target | {inner: today} if inner else today
        recipe.places.setdefault((*key[:-1], head), recipe.places[key])
        shown = "a secret" if head in ("token", "hub_token") else format_value(today)
        if shown != format_value(today):
            where = where.replace(str(value), "...")  # an override's place shows its value
        notes.append(f"{where}: read as {old.new}: {shown} (its name today)")
