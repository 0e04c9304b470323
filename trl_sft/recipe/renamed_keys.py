"""Names and values that upstream renamed or removed: read under their current names, or refused with what to write.

Inputs: a section or a source as written.
Outputs: the same under current names, a note for each key that changed, faults.
Not here: names that the installed owner still has, which are used as they are. The tables hold only names that the
tested owners lack; `tests/recipe/renamed_keys.yaml` has the release in which each changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trl_sft.errors import Edit, Fault
from trl_sft.recipe import yaml_scalars
from trl_sft.recipe.upstream import keys, types
from trl_sft.recipe.yaml_reader import Key, Recipe, describe_value, format_value

REMOVED = "upstream has removed this key"


@dataclass(frozen=True)
class RenamedKey:
    """What became of a key. A value that can neither be translated nor ignored is refused.

    Attributes:
        new: The current name; `accelerator_config.split_batches` is a key of a mapping; "" = there is none.
        values: Old value -> current value; empty = values are unchanged.
        no_op: Values that mean the same as leaving the key out; the key is then ignored.
        fix: What to do where the value cannot be translated; "" = write the current key.
        below: The old value has to be at least 0 and less than this; None = any value.
        reason: Why the key is refused, as the end of a sentence.

    """

    new: str = ""
    values: Mapping[Any, Any] = field(default_factory=dict)
    no_op: tuple[Any, ...] = ()
    fix: str = ""
    below: float | None = None
    reason: str = REMOVED

    def translate_value(self, value: Any) -> Any:
        """Return the value under the current name. Raises KeyError if there is none."""
        if not self.new:
            raise KeyError(value)
        return self.values[value] if self.values else value


_SINGLE_PROCESS = "Remove it: this version trains in one process."
_PYTHON = "Remove it: a recipe cannot hold Python objects. Call SFTTrainer in a script of your own for this."
_APEX = "Remove it: transformers no longer uses apex. `fp16: true` uses torch."
_TRAINER = "it is an argument of SFTTrainer, not of its settings"
_ROWS = "Remove it: rows are tokenized in batches, and packed up to `max_length`."
_SHARED = {  # by models, tokenizers and data
    "resume_download": RenamedKey(no_op=(True, False, None)),
    "use_auth_token": RenamedKey("token"),
}
_SECRETS = ("token", "hub_token")  # current names of keys whose values no message shows

RENAMED_KEYS: dict[str, dict[str, RenamedKey]] = {
    "train": {
        # 5.23 takes both; v6 drops the old ones, and older versions lack the new ones
        "activation_checkpointing": RenamedKey("gradient_checkpointing"),
        "activation_checkpointing_kwargs": RenamedKey("gradient_checkpointing_kwargs"),
        "gradient_checkpointing": RenamedKey("activation_checkpointing"),
        "gradient_checkpointing_kwargs": RenamedKey("activation_checkpointing_kwargs"),
        "adafactor": RenamedKey("optim", {True: "adafactor"}, no_op=(False,)),
        "dispatch_batches": RenamedKey("accelerator_config.dispatch_batches", no_op=(None,)),
        "evaluation_strategy": RenamedKey("eval_strategy"),
        "fp16_backend": RenamedKey(no_op=("auto", "amp", "cuda_amp"), fix=_APEX),
        "fp16_opt_level": RenamedKey(fix=_APEX),
        "fsdp_min_num_params": RenamedKey(no_op=(0,), fix=_SINGLE_PROCESS),
        "fsdp_transformer_layer_cls_to_wrap": RenamedKey(no_op=(None,), fix=_SINGLE_PROCESS),
        "gradient_checkpointing_use_reentrant": RenamedKey("gradient_checkpointing_kwargs.use_reentrant"),
        "group_by_length": RenamedKey("train_sampling_strategy", {True: "group_by_length"}, no_op=(False,)),
        "half_precision_backend": RenamedKey(no_op=("auto", "amp", "cuda_amp"), fix=_APEX),
        "include_inputs_for_metrics": RenamedKey("include_for_metrics", {True: ["inputs"]}, no_op=(False,)),
        "include_tokens_per_second": RenamedKey(no_op=(False,), fix="Set `include_num_input_tokens_seen: true`."),
        "jit_mode_eval": RenamedKey(no_op=(False,), fix="Set `torch_compile: true`."),
        "logging_dir": RenamedKey(fix="Set the environment variable TENSORBOARD_LOGGING_DIR."),
        "max_seq_length": RenamedKey("max_length"),
        "mp_parameters": RenamedKey(no_op=("",), fix=_SINGLE_PROCESS),
        "no_cuda": RenamedKey("use_cpu"),
        "overwrite_output_dir": RenamedKey(
            no_op=(False,), fix="Set `run.overwrite: true`: it replaces a finished run."
        ),
        "past_index": RenamedKey(no_op=(-1,), fix="Remove it: it was for models with a recurrent memory."),
        "per_gpu_eval_batch_size": RenamedKey("per_device_eval_batch_size"),
        "per_gpu_train_batch_size": RenamedKey("per_device_train_batch_size"),
        "push_to_hub_model_id": RenamedKey("hub_model_id"),
        "push_to_hub_organization": RenamedKey(no_op=(None,), fix="Set `hub_model_id: ORGANIZATION/NAME`."),
        "push_to_hub_token": RenamedKey("hub_token"),
        "ray_scope": RenamedKey(fix="Remove it: upstream had it for hyperparameter searches."),
        "save_safetensors": RenamedKey(no_op=(True,), fix="Remove it: weights are always saved as safetensors."),
        "split_batches": RenamedKey("accelerator_config.split_batches", no_op=(None,)),
        "torchdynamo": RenamedKey("torch_compile_backend"),
        "tp_size": RenamedKey(no_op=(0, 1), fix=_SINGLE_PROCESS),
        "tpu_metrics_debug": RenamedKey("debug", {True: "tpu_metrics_debug"}, no_op=(False,)),
        "tpu_num_cores": RenamedKey(no_op=(None,), fix=_SINGLE_PROCESS),
        "use_ipex": RenamedKey(no_op=(False,), fix="Remove it: transformers no longer has this feature."),
        "use_legacy_prediction_loop": RenamedKey(no_op=(False,), fix="Remove it: transformers has only one loop."),
        "use_liger": RenamedKey("use_liger_kernel"),
        "use_mps_device": RenamedKey(no_op=(True, False)),
        "warmup_ratio": RenamedKey("warmup_steps", below=1.0),
        # Arguments of SFTTrainer, now or once.
        "callbacks": RenamedKey(fix=_PYTHON, reason=_TRAINER),
        "chars_per_token": RenamedKey(fix=_ROWS),
        "compute_metrics": RenamedKey(fix="Use `evaluate.metrics`.", reason=_TRAINER),
        "data_collator": RenamedKey(fix=_PYTHON, reason=_TRAINER),
        "dataset_batch_size": RenamedKey(fix=_ROWS),
        "eval_dataset": RenamedKey(fix="Use `data.eval`.", reason=_TRAINER),
        "formatting_func": RenamedKey(fix="Use `data.train: {path: ..., format: rows.py:FUNCTION}`.", reason=_TRAINER),
        "infinite": RenamedKey(no_op=(False,), fix="Use `max_steps`."),
        "model_init": RenamedKey(fix="Use `model.name_or_path`."),
        "num_of_sequences": RenamedKey(fix=_ROWS),
        "peft_config": RenamedKey(fix="Use the section `lora:`.", reason=_TRAINER),
        "processing_class": RenamedKey(fix="Use the section `tokenizer:`.", reason=_TRAINER),
        "tokenizer": RenamedKey(fix="Use the section `tokenizer:`."),
        "train_dataset": RenamedKey(fix="Use `data.train`.", reason=_TRAINER),
    },
    "model": {
        **_SHARED,
        **dict.fromkeys(
            ("from_flax", "from_tf"), RenamedKey(no_op=(False,), fix="Use weights of PyTorch, or as safetensors.")
        ),
        "low_cpu_mem_usage": RenamedKey(no_op=(True,), fix="Remove it: weights are always loaded in this way."),
        "mirror": RenamedKey(fix="Set the environment variable HF_ENDPOINT."),
        "offload_state_dict": RenamedKey(no_op=(True, False, None)),
        "torch_dtype": RenamedKey("dtype"),
        "use_flash_attention_2": RenamedKey("attn_implementation", {True: "flash_attention_2"}, no_op=(False,)),
    },
    "tokenizer": {**_SHARED, "additional_special_tokens": RenamedKey("extra_special_tokens")},
    keys.GENERATION: {
        "forced_decoder_ids": RenamedKey(no_op=(None,), fix="Remove it: transformers no longer has it."),
        "generation_kwargs": RenamedKey(fix="Write its keys directly under `generation`, or remove it."),
        "return_legacy_cache": RenamedKey(no_op=(False,), fix="Remove it: transformers has only one kind of cache."),
    },
    keys.SOURCE: {
        "errors": RenamedKey("encoding_errors"),
        "ignore_verifications": RenamedKey("verification_mode", {True: "no_checks"}, no_op=(False,)),
        "trust_remote_code": RenamedKey(no_op=(False,), fix="Remove it: datasets no longer runs code of a data set."),
        "use_auth_token": RenamedKey("token"),
    },
}
# (section, key) -> what became of its values
RENAMED_VALUES: dict[tuple[str, str], dict[str, RenamedKey]] = {
    ("train", "optim"): {
        "adamw_apex_fused": RenamedKey(fix="Use `adamw_torch_fused`."),
        "adamw_hf": RenamedKey("optim", {"adamw_hf": "adamw_torch"}),
    },
    ("train", "packing_strategy"): {"bfd-requeue": RenamedKey("packing_strategy", {"bfd-requeue": "bfd_split"})},
}


def renamed_in(section: str) -> dict[str, RenamedKey]:
    """Return the old names of a section that the installed owner lacks."""
    current = keys.get_fields(section)
    return {name: rule for name, rule in RENAMED_KEYS.get(section, {}).items() if name not in current}


def translate(
    recipe: Recipe, key: Key, values: Mapping[Any, Any], *, faults: list[Fault], notes: list[str]
) -> dict[Any, Any]:
    """Return a section or a source under current names.

    Args:
        recipe: The recipe; the places of translated keys are added to it.
        key: Where the mapping is: `("train",)`, `("data", "train", 0)`.
        values: The mapping as written.
        faults: Collects what cannot be translated.
        notes: Collects a line for each key that changed.

    Returns:
        A new mapping.

    """
    section = keys.SOURCE if key[0] == "data" and len(key) > 1 else ".".join(map(str, key))
    translated = dict(values)
    for name, value in values.items():
        rule = _find_rule(section, name, value)
        if rule is not None:
            _apply(rule, recipe, (*key, name), target=translated, faults=faults, notes=notes)
    return translated


def _find_rule(section: str, name: Any, value: Any) -> RenamedKey | None:
    """Return what became of a key or of its value; None if the installed owner takes it as it is."""
    rules = RENAMED_VALUES.get((section, name))
    if rules is None:
        return renamed_in(section).get(name) if name in RENAMED_KEYS.get(section, {}) else None
    rule = rules.get(value) if isinstance(value, str) else None
    if rule is None or types.accepts(keys.get_fields(section)[name], value):
        return None
    return rule


def _apply(
    rule: RenamedKey, recipe: Recipe, key: Key, *, target: dict[Any, Any], faults: list[Fault], notes: list[str]
) -> None:
    """Move the value of an old key in `target` to its current name; append a note or a fault."""
    name, value = str(key[-1]), target.pop(key[-1])
    if any(value == no_op and type(value) is type(no_op) for no_op in rule.no_op):
        notes.append(
            f"{recipe.where(key)}: ignored, because {format_value(value)} means the same as leaving the key out."
        )
        return
    try:
        current = rule.translate_value(value)
    except (KeyError, TypeError):  # TypeError: a list or a mapping is no key of a table
        fix = rule.fix or f"Use `{rule.new}`, with one of its current values."
        faults.append(
            recipe.fault(key, f"`{name}` is {describe_value(value)}, but {rule.reason}", fix, code="recipe.removed_key")
        )
        return
    outer, _, inner = rule.new.partition(".")
    mapping = target.get(outer, {}) if inner else target
    if rule.below is not None and not (isinstance(value, int | float) and 0 <= value < rule.below):
        fix = f"Write a number from 0 to less than {rule.below:g}, or use `{rule.new}`."
        number = yaml_scalars.read(value.strip()) if isinstance(value, str) else None
        is_quoted = isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number < rule.below
        edits = (Edit("set", key, number),) if is_quoted else ()
        problem = f"the value is {describe_value(value)}"
        faults.append(recipe.fault(key, problem, fix, code="recipe.out_of_range", edits=edits))
    elif not isinstance(mapping, dict) or (inner or outer) in mapping:
        problem = f"`{name}` is the old name of `{rule.new}`, which the recipe sets too"
        is_same = isinstance(mapping, dict) and mapping.get(inner or outer) == current
        edits = (Edit("remove", key),) if is_same else ()
        faults.append(recipe.fault(key, problem, "Remove one of the two.", code="recipe.old_and_new_key", edits=edits))
    else:
        target[outer] = mapping | {inner: current} if inner else current
        recipe.places.setdefault((*key[:-1], outer), recipe.places[key])
        notes.append(_describe_translation(rule.new, recipe.where(key), value=value, current=current))


def _describe_translation(name: str, where: str, *, value: Any, current: Any) -> str:
    """Return the note on a translated key; it shows no secret."""
    shown = format_value(current)
    if name in _SECRETS:
        shown = "(a secret)"
        where = where.replace(str(value), "...")  # the place of an override shows its value
    return f"{where}: read as `{name}: {shown}`, its current name."
