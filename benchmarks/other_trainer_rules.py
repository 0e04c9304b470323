"""Translates a recipe for axolotl, LLaMA-Factory and plain `trl sft`.

Input: a recipe as a run carries it out (`other_trainers.PreparedRun`). Output: a `Translation` for each trainer: its
configuration, what each key of the recipe became, and the keys without an equivalent. No key is dropped: a key that
no table and no rule has is one without an equivalent.
"""

import functools
from typing import Any, NamedTuple

from other_trainer_keys import (
    ALWAYS,
    AXOLOTL_TRACKERS,
    AXOLOTL_TRAIN,
    FOUR_BIT,
    LLAMAFACTORY_ATTENTION,
    LLAMAFACTORY_TEMPLATES,
    LLAMAFACTORY_TRAIN,
    LORA,
    NEWER_THAN_LLAMAFACTORY,
    RENAMED,
    TRAINERS,
)


class Translation(NamedTuple):
    """The configuration of one trainer, and what became of each key of the recipe."""

    config: dict[str, Any]
    carried: dict[str, str]  # key of the recipe: the settings that carry it
    missing: dict[str, Any]  # key of the recipe without an equivalent: its value


def list_keys(prepared):
    """Return the keys to translate, under their current names: those of the recipe and of its sources, and ALWAYS."""
    from trl_sft.recipe import renamed_keys

    keys = []
    for section, values in prepared.run.recipe.values.items():
        if not isinstance(values, dict):
            keys.append(section)  # `evaluate: false`
            continue
        for name, value in values.items():
            renamed_key = renamed_keys.RENAMED_KEYS.get(section, {}).get(name)
            current = name
            if renamed_key and name not in prepared.run.section(section):
                current = renamed_key.new.partition(".")[0]
            if current:  # a removed key without a new name has no effect
                keys.append(f"{section}.{current}")
            if section == "data" and name in ("train", "eval"):
                keys += [f"data.{name}.{key}" for key in list_source_keys(value)]
    keys += ALWAYS
    if prepared.lora:
        keys += LORA
    if (prepared.run.quantization or {}).get("load_in_4bit"):
        keys += FOUR_BIT
    return list(dict.fromkeys(keys))


def list_source_keys(value):
    """Return the keys of all sources of `data.train` or `data.eval`."""
    sources = value if isinstance(value, list) else [value]
    return [key for source in sources if isinstance(source, dict) for key in source]


def translate(trainer, prepared):
    """Return the Translation for one trainer."""
    translation = Translation(dict(START[trainer](prepared)), {}, {})
    for key in list_keys(prepared):
        section, _, name = key.partition(".")
        settings = translate_key(trainer, key, prepared)
        if section == "data" and name not in ("loss_on", "overlong", "special_tokens_in_text"):
            translation.carried[key] = "the rows"
        elif key == "evaluate":
            translation.carried[key] = "no trainer generates answers"
        elif settings is None:
            values = {**prepared.run.recipe.values.get(section, {}), **(prepared.run.section(section) or {})}
            translation.missing[key] = values.get(name, f"{prepared.get_value(key)}, the default")
        else:
            translation.config.update(settings)
            translation.carried[key] = ", ".join(settings) or "done in any case"
    return translation


def translate_key(trainer, key, prepared):
    """Return the trainer's settings for one key; empty = it does so anyway, None = it has no equivalent."""
    section, _, name = key.partition(".")
    rule = RULES[trainer].get(key)
    if rule:
        return rule(prepared)
    if section == "train":
        setting = get_train_setting(trainer, name)
    else:
        setting = dict(zip(TRAINERS, RENAMED.get(key, (None, None, None)), strict=True))[trainer]
    if setting:
        return {setting: prepared.get_value(key)}
    if trainer == "trl" and section == "model":
        return translate_model_init(name, prepared)
    return None


def get_train_setting(trainer, name):
    """Return the trainer's name for a key of `train:`; None = it has none."""
    if trainer == "axolotl":
        return AXOLOTL_TRAIN.get(name)
    if trainer == "trl":
        return name
    from transformers import TrainingArguments

    if name in LLAMAFACTORY_TRAIN:
        return LLAMAFACTORY_TRAIN[name]
    return name if name in TrainingArguments.__dataclass_fields__ and name not in NEWER_THAN_LLAMAFACTORY else None


def translate_model_init(name, prepared):
    """SFTConfig passes all other arguments on to `from_pretrained`."""
    unnamed = {key for key in prepared.run.model if RENAMED.get(f"model.{key}", (None,))[-1] is None} - {"dtype"}
    return {"model_init_kwargs": {key: prepared.run.model[key] for key in sorted(unnamed | {name})}}


# The settings of a trainer before any key: where rows, tokenizer and results are.


def start_axolotl(prepared):
    """Return axolotl's settings for rows, template and adapter."""
    types = {"a chat": "chat_template", "prompts with completions": "input_output"}
    source = {"ds_type": "json", "type": types.get(prepared.rows.row_type, "completion")}
    if prepared.is_chat:  # each turn says whether it is trained
        source |= {"field_messages": "messages", "message_field_training": "train"}
        source |= {"roles_to_train": [], "train_on_eos": "turn"}
    settings = {"datasets": [{"path": str(prepared.folder / "rows.jsonl")} | source], "val_set_size": 0.0}
    if prepared.evaluates:
        path = str(prepared.folder / "held_out.jsonl")
        settings["test_datasets"] = [{"path": path, "split": "train"} | source]
    if prepared.is_chat:
        settings |= {"chat_template": "jinja", "chat_template_jinja": str(prepared.folder / "template.jinja")}
        stop = prepared.chat.stop_token
        if stop and stop != prepared.chat.tokenizer.eos_token:
            settings["eot_tokens"] = [stop]
    if prepared.lora:
        settings["adapter"] = "qlora" if (prepared.run.quantization or {}).get("load_in_4bit") else "lora"
    settings["tokenizer_config"] = str(prepared.folder / "tokenizer")
    settings["dataset_prepared_path"] = str(prepared.folder / "axolotl")
    return settings | {"shuffle_merged_datasets": False, "use_tensorboard": False}


def start_llamafactory(prepared):
    """Return LLaMA-Factory's settings for rows and adapter; it reads the template off the tokenizer."""
    stage = "pt" if prepared.rows.row_type == "plain text" else "sft"
    settings = {"stage": stage, "do_train": True, "dataset": "rows"}
    settings |= {"finetuning_type": "lora" if prepared.lora else "full", "dataset_dir": str(prepared.folder)}
    if prepared.evaluates:
        settings["eval_dataset"] = "held_out"
    if not prepared.is_chat:
        settings["template"] = "empty"
    if prepared.run.quantization:
        settings["quantization_method"] = "bnb"
    return settings


def start_trl(prepared):
    """Return TRL's settings for rows, template and adapter."""
    settings = {"dataset_name": str(prepared.folder / "trl"), "use_peft": prepared.lora is not None}
    if prepared.is_chat and prepared.rows.loss_on == "assistant" and prepared.has_several_answers:
        settings["assistant_only_loss"] = True
    if prepared.args.eos_token:
        settings["eos_token"] = prepared.args.eos_token
    if prepared.lora:
        settings["lora_task_type"] = "CAUSAL_LM"
    if prepared.run.chat_template:
        settings["chat_template_path"] = str(prepared.folder / "template.jinja")
    return settings


# Rules for keys whose value changes. None = there is no equivalent; an empty dict = the trainer does so anyway.


def translate_warmup(prepared):
    steps = prepared.args.warmup_steps
    return {"warmup_ratio": steps} if 0 < steps < 1 else {"warmup_steps": int(steps)}


def translate_strategy(part, prepared):
    """In axolotl `save_steps` alone turns saving by steps on."""
    strategy = prepared.get_value(f"train.{part}_strategy")
    if strategy == "no" and part == "eval":
        return {}
    if strategy != "steps":
        return {f"{part}_strategy": strategy}
    steps = getattr(prepared.args, f"{part}_steps") or prepared.args.logging_steps
    return {f"{part}_steps": int(steps) if steps >= 1 else steps}


def translate_trackers(prepared):
    if any(name not in AXOLOTL_TRACKERS for name in prepared.args.report_to):
        return None
    return {AXOLOTL_TRACKERS[name]: True for name in prepared.args.report_to}


def translate_targets(prepared, *, name, all_linear, join):
    """Return the layers that LoRA adapts; peft's own choice where the recipe names none."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
    from transformers import AutoConfig

    modules = prepared.lora.target_modules
    if modules is None:
        model_type = AutoConfig.from_pretrained(prepared.run.model_location.name).model_type
        modules = DEFAULT_TARGETS.get(model_type, ())
    if isinstance(modules, str):
        return all_linear if modules == "all-linear" else None
    modules = sorted(modules)
    return {name: ",".join(modules) if join else modules} if modules else None


def translate_four_bit(prepared):
    """Write every option of 4-bit weights: axolotl's defaults differ from those of BitsAndBytesConfig."""
    options = {key.partition(".")[2]: prepared.get_value(key) for key in FOUR_BIT} | {"bnb_4bit_quant_storage": "uint8"}
    options |= {key: value for key, value in prepared.run.quantization.items() if key.startswith("bnb_4bit_")}
    return {"bnb_config_kwargs": options}


def translate_dtype_for_axolotl(prepared):
    """axolotl has no key for weights in another type than the arithmetic."""
    args = prepared.args
    same = {"float32": not (args.bf16 or args.fp16), "bfloat16": args.bf16, "float16": args.fp16}
    return {} if same.get(prepared.get_value("model.dtype")) else None


def translate_dtype_for_llamafactory(prepared):
    dtype = prepared.get_value("model.dtype")
    if dtype == "bfloat16" and prepared.args.bf16:
        return {"pure_bf16": True}
    return {} if dtype == "float32" and not prepared.run.quantization else None


def translate_loss_for_axolotl(prepared):
    """Each turn or segment says whether it is trained, but the headers of turns never carry loss."""
    return None if prepared.is_chat and prepared.rows.loss_on == "all" else {"train_on_inputs": False}


def translate_loss_for_llamafactory(prepared):
    loss_on = prepared.rows.loss_on
    if loss_on == "all":
        return {"train_on_prompt": True}
    if loss_on == "assistant" or not prepared.is_chat or not prepared.has_several_answers:
        return {}
    return {"mask_history": True} if loss_on == "last_turn" or prepared.has_single_completions else None


def translate_loss_for_trl(prepared):
    several = prepared.is_chat and not prepared.has_single_completions
    return None if prepared.rows.loss_on == "completion" and several else {}


def translate_overlong_for_axolotl(prepared):
    words = {"truncate": "truncate", "drop": "drop", "error": "raise"}
    word = words.get(prepared.get_value("data.overlong"))
    return {"excess_length_strategy": word} if word else None


def translate_overlong_for_trl(prepared):
    return {} if prepared.get_value("data.overlong") == "truncate" else None


def translate_template_name(prepared):
    name = prepared.run.recipe.values["tokenizer"]["chat_template"]
    return {"template": name} if name in LLAMAFACTORY_TEMPLATES else None


def name_tokenizer_folder(prepared):
    return {"tokenizer_config": str(prepared.folder / "tokenizer")}


def translate_resume(prepared):
    value = prepared.run.options["resume"]
    words = {"auto": {"auto_resume_from_checkpoints": True}, "never": {}}
    return words.get(value, {"resume_from_checkpoint": value})


def name_output_folder(trainer, prepared):
    return {"output_dir": str(prepared.folder / f"{trainer}-out")}


def translate_attention(prepared):
    word = LLAMAFACTORY_ATTENTION.get(prepared.run.model["attn_implementation"])
    return {"flash_attn": word} if word else None


def translate_special_tokens(prepared):
    """Every trainer reads special tokens in a text as tokens."""
    splits = (prepared.rows.train, *prepared.rows.eval.values())
    return None if any(source.has_escaped_tokens for split in splits for source in split.sources) else {}


def translate_global_batch(prepared):
    """The files are for one device, so accumulation alone makes up `run.global_batch_size`."""
    return {"gradient_accumulation_steps": prepared.args.gradient_accumulation_steps}


def translate_bias(prepared):
    return {} if prepared.lora.bias == "none" else None


def translate_checkpointing(prepared):
    return {"disable_gradient_checkpointing": not prepared.args.gradient_checkpointing}


def do_anyway(_):
    return {}


def find_no_equivalent(_):
    return None


TOKENIZER_KEYS = (
    *("chat_template", "bos_token", "eos_token", "pad_token", "unk_token", "extra_special_tokens", "add_bos_token"),
)
START = {"axolotl": start_axolotl, "llamafactory": start_llamafactory, "trl": start_trl}
SHARED_RULES = {
    "data.special_tokens_in_text": translate_special_tokens,
    "lora.bias": translate_bias,
    "run.global_batch_size": translate_global_batch,
}
RULES = {
    "axolotl": {
        **SHARED_RULES,
        **{f"tokenizer.{name}": name_tokenizer_folder for name in TOKENIZER_KEYS},
        **dict.fromkeys(FOUR_BIT, translate_four_bit),
        "quantization.bnb_4bit_compute_dtype": translate_four_bit,
        "quantization.bnb_4bit_quant_storage": translate_four_bit,
        "model.dtype": translate_dtype_for_axolotl,
        "tokenizer.chat_template_kwargs": lambda prepared: {"chat_template_kwargs": prepared.run.chat_template_kwargs},
        "data.loss_on": translate_loss_for_axolotl,
        "data.overlong": translate_overlong_for_axolotl,
        "train.completion_only_loss": translate_loss_for_axolotl,
        "train.assistant_only_loss": translate_loss_for_axolotl,
        "train.output_dir": functools.partial(name_output_folder, "axolotl"),
        "train.save_strategy": functools.partial(translate_strategy, "save"),
        "train.save_steps": functools.partial(translate_strategy, "save"),
        "train.eval_strategy": functools.partial(translate_strategy, "eval"),
        "train.eval_steps": functools.partial(translate_strategy, "eval"),
        "train.warmup_steps": translate_warmup,
        "train.max_steps": lambda prepared: (
            {"max_steps": prepared.args.max_steps} if prepared.args.max_steps > 0 else {}
        ),
        "train.eval_on_start": lambda prepared: {} if prepared.args.eval_on_start else None,
        "train.use_cpu": do_anyway,  # the command sets it
        "train.report_to": translate_trackers,
        "lora.target_modules": functools.partial(
            translate_targets, name="lora_target_modules", all_linear={"lora_target_linear": True}, join=False
        ),
        "lora.task_type": do_anyway,
        "run.resume": translate_resume,
    },
    "llamafactory": {
        **SHARED_RULES,
        "model.attn_implementation": translate_attention,
        "model.dtype": translate_dtype_for_llamafactory,
        "tokenizer.chat_template": translate_template_name,
        "quantization.load_in_8bit": lambda _: {"quantization_bit": 8},
        "quantization.load_in_4bit": lambda _: {"quantization_bit": 4},
        "data.loss_on": translate_loss_for_llamafactory,
        "data.overlong": find_no_equivalent,
        "train.completion_only_loss": translate_loss_for_llamafactory,
        "train.assistant_only_loss": translate_loss_for_llamafactory,
        "train.output_dir": functools.partial(name_output_folder, "llamafactory"),
        "train.packing": lambda prepared: dict.fromkeys(("packing", "neat_packing"), prepared.args.packing),
        "train.gradient_checkpointing": translate_checkpointing,
        "train.activation_checkpointing": translate_checkpointing,
        "lora.target_modules": functools.partial(
            translate_targets, name="lora_target", all_linear={"lora_target": "all"}, join=True
        ),
        "lora.modules_to_save": lambda prepared: {"additional_target": ",".join(prepared.lora.modules_to_save)},
        "lora.task_type": do_anyway,
    },
    "trl": {
        **SHARED_RULES,
        "model.dtype": lambda prepared: {"dtype": prepared.get_value("model.dtype")},
        "tokenizer.chat_template": lambda prepared: {"chat_template_path": str(prepared.folder / "template.jinja")},
        "tokenizer.chat_template_kwargs": lambda prepared: {} if prepared.is_chat else None,  # a column of the rows
        "tokenizer.pad_token": lambda prepared: {"pad_token": prepared.chat.tokenizer.pad_token},
        "tokenizer.eos_token": lambda prepared: {"eos_token": prepared.chat.tokenizer.eos_token},
        "data.loss_on": translate_loss_for_trl,
        "data.overlong": translate_overlong_for_trl,
        "train.output_dir": functools.partial(name_output_folder, "trl"),
        "lora.target_modules": functools.partial(
            translate_targets,
            name="lora_target_modules",
            all_linear={"lora_target_modules": ["all-linear"]},
            join=False,
        ),
        "lora.task_type": lambda prepared: {"lora_task_type": str(prepared.lora.task_type)},
        "run.resume": lambda prepared: {} if prepared.run.options["resume"] == "never" else None,
    },
}
