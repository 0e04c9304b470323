"""A recipe in the words of axolotl, LLaMA-Factory and plain `trl sft`: `translate` for `others.py`.

In: a recipe as a run would carry it out (`others.Work`). Out: `Written`: one program's configuration, which key
carries what, and what is left. No key is dropped: what no table and no rule knows is left, and said.
"""

import functools
from typing import Any, NamedTuple

from other_names import (
    ALWAYS,
    AXOLOTL_TRAIN,
    BITS,
    LLAMAFACTORY_ATTENTION,
    LLAMAFACTORY_TEMPLATES,
    LLAMAFACTORY_TRAIN,
    LORA,
    NEWER,
    PROGRAMS,
    RENAMED,
    TRACKERS,
)


class Written(NamedTuple):
    """What one program gets."""

    config: dict[str, Any]
    carried: dict[str, str]  # key of the recipe -> what carries it
    left: dict[str, Any]  # key of the recipe without equivalent -> its value


def keys(work):
    """Return every key that counts, by today's name: those of the recipe, of its sources, and ALWAYS."""
    from trl_sft.recipe import renamed_keys

    found = []
    for section, values in work.run.recipe.values.items():
        if not isinstance(values, dict):
            found.append(section)  # `evaluate: false`
            continue
        for name, value in values.items():
            old = renamed_keys.RENAMED_KEYS.get(section, {}).get(name)
            if old and name not in work.run.section(section):
                name = old.new.partition(".")[0]  # noqa: PLW2901 (none: it says what is done anyway)
            found += [f"{section}.{name}"] if name else []
            if section == "data" and name in ("train", "eval"):
                sources = [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, dict)]
                found += [f"data.{name}.{key}" for one in sources for key in one]
    four = (work.run.quantization or {}).get("load_in_4bit")
    return list(dict.fromkeys([*found, *ALWAYS, *(LORA if work.lora else ()), *(BITS if four else ())]))


def translate(program, work):
    """Return the configuration of one program; each key is carried or left, none is dropped."""
    config, carried, left = dict(START[program](work)), {}, {}
    for key in keys(work):
        section, _, name = key.partition(".")
        rule = RULES[program].get(key) or renamed(program, section, name)
        found = {rule: work.value(key)} if isinstance(rule, str) else rule(work) if rule else None
        if section == "data" and name not in ("loss_on", "overlong", "special_tokens_in_text"):
            carried[key] = "the rows"
        elif key == "evaluate":
            carried[key] = "none of them asks for answers"
        elif found is None:
            written = {**work.run.recipe.values.get(section, {}), **(work.run.section(section) or {})}
            left[key] = written.get(name, f"{work.value(key)}, the default")
        else:
            config |= found
            carried[key] = ", ".join(found) or "what it does anyway"
    return Written(config, carried, left)


def renamed(program, section, name):
    """Return the program's name for a key; None = it has none."""
    if section != "train":
        theirs = RENAMED.get(f"{section}.{name}", (None,) * len(PROGRAMS))[PROGRAMS.index(program)]
        # whatever else `from_pretrained` takes, SFTConfig hands on
        init = theirs is None and program == "trl" and section == "model"
        return functools.partial(handed_on, name) if init else theirs
    if program == "axolotl":
        return AXOLOTL_TRAIN.get(name)
    if program == "trl":
        return name
    from transformers import TrainingArguments

    known = name in TrainingArguments.__dataclass_fields__ and name not in NEWER
    return LLAMAFACTORY_TRAIN.get(name) or (name if known else None)


def handed_on(name, work):
    others = {key for key in work.run.model if RENAMED.get(f"model.{key}", (None,))[-1] is None} - {"dtype"}
    return {"model_init_kwargs": {key: work.run.model[key] for key in sorted(others | {name})}}


# What a program gets before any key: where rows, tokenizer and results lie.


def for_axolotl(work):
    kind = {"a chat": "chat_template", "prompts with completions": "input_output"}.get(work.rows.row_type, "completion")
    # each turn says whether it is trained
    chat = {"field_messages": "messages", "message_field_training": "train"}
    chat |= {"roles_to_train": [], "train_on_eos": "turn"}
    source = {"ds_type": "json", "type": kind} | (chat if work.chats else {})
    found = {"datasets": [{"path": str(work.folder / "rows.jsonl")} | source], "val_set_size": 0.0}
    if work.rows.eval and work.args.eval_strategy != "no":
        found["test_datasets"] = [{"path": str(work.folder / "held_out.jsonl"), "split": "train"} | source]
    if work.chats:
        found |= {"chat_template": "jinja", "chat_template_jinja": str(work.folder / "template.jinja")}
        end = work.chat.stop and work.chat.stop != work.chat.tokenizer.eos_token
        found |= {"eot_tokens": [work.chat.stop]} if end else {}
    if work.lora:
        found["adapter"] = "qlora" if (work.run.quantization or {}).get("load_in_4bit") else "lora"
    places = {"tokenizer_config": str(work.folder / "tokenizer"), "dataset_prepared_path": str(work.folder / "axolotl")}
    return found | places | {"shuffle_merged_datasets": False, "use_tensorboard": False}


def for_llamafactory(work):
    # of a named template the name says it; else it is read off the tokenizer
    found = {"stage": "pt" if work.rows.row_type == "plain text" else "sft", "do_train": True, "dataset": "rows"}
    found |= {"finetuning_type": "lora" if work.lora else "full", "dataset_dir": str(work.folder)}
    found |= {"eval_dataset": "held_out"} if work.rows.eval and work.args.eval_strategy != "no" else {}
    found |= {} if work.chats else {"template": "empty"}
    return found | ({"quantization_method": "bnb"} if work.run.quantization else {})


def for_trl(work):
    found = {"dataset_name": str(work.folder / "trl"), "use_peft": work.lora is not None}
    found |= {"assistant_only_loss": True} if work.chats and work.rows.loss_on == "assistant" and work.several else {}
    found |= {"eos_token": work.args.eos_token} if work.args.eos_token else {}
    found |= {"lora_task_type": "CAUSAL_LM"} if work.lora else {}
    return found | ({"chat_template_path": str(work.folder / "template.jinja")} if work.run.chat_template else {})


# Keys whose value has to be said otherwise. None = it cannot be said; an empty dict = the program does so anyway.


def warmup(work):
    steps = work.args.warmup_steps
    return {"warmup_ratio": steps} if 0 < steps < 1 else {"warmup_steps": int(steps)}


def strategy(part, work):
    """`save_steps` alone says that it goes by steps, in axolotl."""
    how = work.value(f"train.{part}_strategy")
    steps = getattr(work.args, f"{part}_steps") or work.args.logging_steps
    if how == "no" and part == "eval":
        return {}
    return {f"{part}_steps": int(steps) if steps >= 1 else steps} if how == "steps" else {f"{part}_strategy": how}


def trackers(work):
    found = {TRACKERS.get(name): True for name in work.args.report_to}
    return None if None in found else found


def targets(name, every, join, work):
    """Return which layers LoRA adapts; peft's own choice where the recipe is silent."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as CHOICES
    from transformers import AutoConfig

    given = work.lora.target_modules
    if given is None:
        given = sorted(CHOICES.get(AutoConfig.from_pretrained(work.run.model_location.name).model_type, ()))
    if isinstance(given, str):
        return every if given == "all-linear" else None
    return {name: ",".join(sorted(given)) if join else sorted(given)} if given else None


def four_bits(work):
    """axolotl's own values for 4-bit weights differ from those of BitsAndBytesConfig: all are written."""
    given = {key: value for key, value in work.run.quantization.items() if key.startswith("bnb_4bit_")}
    defaults = {key.partition(".")[2]: work.value(key) for key in BITS} | {"bnb_4bit_quant_storage": "uint8"}
    return {"bnb_config_kwargs": defaults | given}


def precision(program, work):
    """Weights in another type than the arithmetic: axolotl has no key for it."""
    dtype, mixed = work.value("model.dtype"), work.args.bf16 or work.args.fp16
    if program == "axolotl":
        return {} if {"float32": not mixed, "bfloat16": work.args.bf16, "float16": work.args.fp16}.get(dtype) else None
    if dtype == "bfloat16" and work.args.bf16:
        return {"pure_bf16": True}
    return {} if dtype == "float32" and not work.run.quantization else None


def loss(program, work):
    on = work.rows.loss_on
    if program == "axolotl":  # each turn or segment says it, but headers of turns stay without loss
        return {"train_on_inputs": False} if not (work.chats and on == "all") else None
    if program == "trl":
        return {} if on != "completion" or not work.chats or work.single else None
    if on == "all":
        return {"train_on_prompt": True}
    if on == "assistant" or not work.chats or not work.several:
        return {}
    return {"mask_history": True} if on == "last_turn" or work.single else None


def overlong(program, work):
    what = work.value("data.overlong")
    if program == "axolotl":
        found = {"truncate": "truncate", "drop": "drop", "error": "raise"}.get(what)
        return {"excess_length_strategy": found} if found else None
    return {} if what == "truncate" and program == "trl" else None


def named_template(work):
    name = work.run.recipe.values["tokenizer"]["chat_template"]
    return {"template": name} if name in LLAMAFACTORY_TEMPLATES else None


def in_tokenizer(work):
    return {"tokenizer_config": str(work.folder / "tokenizer")}


def resume(work):
    given = work.run.options["resume"]
    known = {"auto": {"auto_resume_from_checkpoints": True}, "never": {}}
    return known.get(given, {"resume_from_checkpoint": given})


def out(program, work):
    return {"output_dir": str(work.folder / f"{program}-out")}


def attention(work):
    found = LLAMAFACTORY_ATTENTION.get(work.run.model["attn_implementation"])
    return {"flash_attn": found} if found else None


def specials(work):  # that are plain text in a row are tokens to all of them
    return None if work.rows.has_escaped_tokens else {}


def accumulated(work):  # `run.global_batch_size`, on the one device that these files are for
    return {"gradient_accumulation_steps": work.args.gradient_accumulation_steps}


PART = functools.partial
TOKENIZER = (
    "chat_template",
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "extra_special_tokens",
    "add_bos_token",
)
START = {"axolotl": for_axolotl, "llamafactory": for_llamafactory, "trl": for_trl}
RULES = {
    "axolotl": {f"tokenizer.{name}": in_tokenizer for name in TOKENIZER}
    | {f"train.{part}_{what}": PART(strategy, part) for part in ("save", "eval") for what in ("strategy", "steps")}
    | {f"quantization.{name}": four_bits for name in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage")}
    | dict.fromkeys(BITS, four_bits)
    | {
        "tokenizer.chat_template_kwargs": lambda work: {"chat_template_kwargs": work.run.chat_template_kwargs},
        "train.warmup_steps": warmup,
        "train.max_steps": lambda work: {"max_steps": work.args.max_steps} if work.args.max_steps > 0 else {},
        "train.eval_on_start": lambda work: {} if work.args.eval_on_start else None,
        "train.use_cpu": lambda _: {},  # by the command
        "train.report_to": trackers,
        "lora.target_modules": PART(targets, "lora_target_modules", {"lora_target_linear": True}, False),
        "lora.task_type": lambda _: {},
        "lora.bias": lambda work: {} if work.lora.bias == "none" else None,
        "run.resume": resume,
    },
    "llamafactory": {
        "model.attn_implementation": attention,
        "tokenizer.chat_template": named_template,
        "train.packing": lambda work: {"packing": work.args.packing, "neat_packing": work.args.packing},
        "train.gradient_checkpointing": lambda work: {
            "disable_gradient_checkpointing": not work.args.gradient_checkpointing
        },
        "quantization.load_in_8bit": lambda _: {"quantization_bit": 8},
        "quantization.load_in_4bit": lambda _: {"quantization_bit": 4},
        "lora.target_modules": PART(targets, "lora_target", {"lora_target": "all"}, True),
        "lora.modules_to_save": lambda work: {"additional_target": ",".join(work.lora.modules_to_save)},
        "lora.task_type": lambda _: {},
        "lora.bias": lambda work: {} if work.lora.bias == "none" else None,
    },
    "trl": {
        "model.dtype": lambda work: {"dtype": work.value("model.dtype")},
        "tokenizer.chat_template": lambda work: {"chat_template_path": str(work.folder / "template.jinja")},
        "tokenizer.chat_template_kwargs": lambda work: {} if work.chats else None,  # a column of the rows
        "tokenizer.pad_token": lambda work: {"pad_token": work.chat.tokenizer.pad_token},
        "tokenizer.eos_token": lambda work: {"eos_token": work.chat.tokenizer.eos_token},
        "lora.target_modules": PART(targets, "lora_target_modules", {"lora_target_modules": ["all-linear"]}, False),
        "lora.task_type": lambda work: {"lora_task_type": str(work.lora.task_type)},
        "lora.bias": lambda work: {} if work.lora.bias == "none" else None,
        "run.resume": lambda work: {} if work.run.options["resume"] == "never" else None,
    },
}
for _program in PROGRAMS:
    RULES[_program] |= {"train.output_dir": PART(out, _program), "data.overlong": PART(overlong, _program)}
    RULES[_program] |= {"data.loss_on": PART(loss, _program), "data.special_tokens_in_text": specials}
    RULES[_program] |= {"run.global_batch_size": accumulated}
    if _program != "trl":  # which takes these two as they are
        RULES[_program] |= {f"train.{name}_only_loss": PART(loss, _program) for name in ("completion", "assistant")}
        RULES[_program] |= {"model.dtype": PART(precision, _program)}
RULES["llamafactory"]["train.activation_checkpointing"] = RULES["llamafactory"]["train.gradient_checkpointing"]
