"""What a file for TRL's `sft` script means, and one of alignment-handbook, whose names are TRL's with some more.

TRL's names and defaults are read from the installed sources; alignment-handbook's are those of its repository
(recipes/smollm2 and smollm3, recipes/zephyr-7b-beta). In: its settings. Out: lines of a recipe.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from typing import Any

from trl_sft.importers.settings import (
    Given,
    Item,
    Left,
    RecipeLine,
    engine_of,
    left,
    located,
    refuse,
    renamed,
    several,
    source,
    train_names,
)
from trl_sft.recipe import paths, sections, yaml_reader
from trl_sft.recipe.upstream import fields

_OWNERS = ("trainer.model_config:ModelConfig", "scripts.utils:ScriptArguments", "scripts.utils:DatasetMixtureConfig")
_SAME = {
    "model_name_or_path": "model.name_or_path",
    "model_revision": "model.revision",
    "trust_remote_code": "model.trust_remote_code",
    "attn_implementation": "model.attn_implementation",
    "dtype": "model.dtype",
    "torch_dtype": "model.dtype",
    "test_split_size": "data.eval_fraction",
    "pad_token": "tokenizer.pad_token",
    "overwrite_output_dir": "run.overwrite",
    "preprocessing_num_workers": "train.dataset_num_proc",
}
_NOTES = {
    "test_split_size": "the same rows in every process and run, by train.seed",
    "overwrite_output_dir": "here it also takes away what an earlier run left in the folder",
    "chat_template_path": "a tokenizer's template comes with the special tokens that it needs",
}
# ModelConfig's names for LoRA -> peft's
_LORA = {
    **{"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "lora_task_type": "task_type"},
    **{"lora_target_modules": "target_modules", "lora_target_parameters": "target_parameters"},
    **{"lora_modules_to_save": "modules_to_save", "use_rslora": "use_rslora", "use_dora": "use_dora"},
}
_LEFT = {
    "ignore_bias_buffers": "it is for DDP, which one process does not need",
    "local_rank": "the launcher sets it",
    "hub_token": "log in with `hf auth login`",
    "do_train": "a run trains",
    "do_eval": "held-out rows are evaluated where there are some",
    "do_predict": "held-out rows are evaluated where there are some",
    "dataset_kwargs": "rows become tokens here, once, and not in TRL",
    "parallelism_config": "this version trains in one process",
    "env": "set these before the command: the file alone is the run, and it reads no environment",
    "config": "the file itself",
    "tokenizer_name_or_path": "the tokenizer is the model's; tokenizer.chat_template takes another's template",
    "auto_insert_empty_system_msg": "the chat template decides on a system prompt",
    "logging_dir": "the tracker's own settings say where it writes",
}
_HANDBOOK = (
    *("dataset_mixer", "dataset_splits", "dataset_configs", "dataset_mixture", "chat_template", "torch_dtype"),
    *(
        "use_flash_attention_2",
        "gradient_checkpointing_use_reentrant",
        "preprocessing_num_workers",
        "base_model_revision",
    ),
    *("overwrite_output_dir", *_LEFT),
)
_MASK = (
    "TRL trains every token of a chat or a text unless assistant_only_loss says otherwise, and the completion of "
    "prompt and completion; here the default is the answers: loss_on: all trains all"
)


def names() -> Collection[str]:
    """Return every name that the two scripts take."""
    found = {name for owner in _OWNERS for name in fields.read_fields(f"trl.{owner}")}
    return found | set(train_names()) | set(_HANDBOOK)


def lines(given: Given) -> Iterator[Item]:
    """Yield what became of each setting. Raises RecipeError."""
    yield from renamed(given, _SAME, _NOTES)
    yield from left(given, _LEFT)
    yield from _model(given)
    yield from _lora(given)
    yield from _data(given)
    yield from _train(given)
    yield from _launch(given)


def _default(name: str) -> Any:
    return ast.literal_eval(fields.read_fields(f"trl.{_OWNERS[0]}")[name].default)


def _model(given: Given) -> Iterator[Item]:
    if given.get("use_flash_attention_2"):
        yield RecipeLine(("model", "attn_implementation"), "flash_attention_2", ("use_flash_attention_2",))
    if given.get("base_model_revision"):
        yield Left("base_model_revision", "revisions of an adapter's base are not built in this version")
    for name, value in (given.get("model_init_kwargs") or {}).items():
        yield RecipeLine(("model", name), value, ("model_init_kwargs",))
    template = given.get("chat_template")
    if template is not None and template in paths.list_templates():
        yield RecipeLine(("tokenizer", "chat_template"), template, ("chat_template",))
    elif template is not None:
        yield Left("chat_template", "write the template to a file: tokenizer.chat_template: FILE.jinja", aloud=True)
    if (path := given.get("chat_template_path")) is not None:
        yield RecipeLine(("tokenizer", "chat_template"), path, ("chat_template_path",), _NOTES["chat_template_path"])


def _lora(given: Given) -> Iterator[Item]:
    for name in ("use_peft", "load_in_4bit", "load_in_8bit"):
        if not isinstance(given.get(name, False), bool):
            raise refuse(given, name, yaml_reader.describe_value(given.get(name)), "true or false")
    if given.get("use_peft"):
        for name, target in _LORA.items():
            known = given.get(name) is not None
            value = given.get(name) if known else _default(name)
            if value is not None and value is not False:  # 0 is a value, and refused as one
                yield RecipeLine(
                    ("lora", target),
                    value,
                    (name, "use_peft") if known else ("use_peft",),
                    "" if known else "TRL's default",
                )
    bits = next((name for name in ("load_in_4bit", "load_in_8bit") if given.get(name)), None)
    if bits:
        yield RecipeLine(("quantization", bits), True, (bits,))
    if bits == "load_in_4bit":
        quant = {"bnb_4bit_quant_type": "bnb_4bit_quant_type", "use_bnb_nested_quant": "bnb_4bit_use_double_quant"}
        quant |= {"bnb_4bit_quant_storage": "bnb_4bit_quant_storage"}
        for name, target in quant.items():
            value = given.get(name, _default(name))
            if value is not None:
                yield RecipeLine(
                    ("quantization", target), value, (name,), "" if given.get(name) is not None else "TRL's default"
                )
        dtype = given.get("dtype", given.get("torch_dtype", _default("dtype")))
        if dtype != "auto":
            yield RecipeLine(("quantization", "bnb_4bit_compute_dtype"), dtype, (), "TRL computes in dtype")


def _data(given: Given) -> Iterator[Item]:
    notes: list[str] = []
    train, test, used = _sources(given, notes)
    if not train:
        raise refuse(
            given, "dataset_name", "no rows are named", "dataset_name, datasets, or alignment-handbook's dataset_mixer"
        )
    yield RecipeLine(
        ("data", "train"), several(train), used, "; ".join([*notes, *([] if _says_mask(given) else [_MASK])])
    )
    if share := (given.get("dataset_mixture") or {}).get("test_split_size"):
        yield RecipeLine(("data", "eval_fraction"), share, ("dataset_mixture",), _NOTES["test_split_size"])
    if given.get("test_split_size") is not None:
        return
    if test and given.get("eval_strategy", given.get("evaluation_strategy", "no")) != "no":
        yield RecipeLine(("data", "eval"), several(test), ("dataset_test_split", "eval_strategy", *used))


def _says_mask(given: Given) -> bool:
    return given.get("assistant_only_loss") is True or given.get("completion_only_loss") is not None


def _sources(given: Given, notes: list[str]) -> tuple[list[Any], list[Any], tuple[str, ...]]:
    """Return the sources to train, those to evaluate, and the settings that name them."""
    column = given.get("dataset_text_field", "text")
    more = {} if column == "text" else {"rename": {column: "text"}, "format": "text"}
    if mixture := given.get("datasets", (given.get("dataset_mixture") or {}).get("datasets")):
        rows = [_mixed(item, more, bool(given.get("streaming")), notes) for item in mixture]
        if "seed" in (given.get("dataset_mixture") or {}):
            notes.append("seed of the mixture: train.seed draws")
        return rows, [], ("datasets", "dataset_mixture", "streaming", "dataset_text_field")
    if mixer := given.get("dataset_mixer"):
        splits = given.get("dataset_splits", ["train", "test"])
        configs = given.get("dataset_configs") or [None] * len(mixer)
        found: dict[bool, list[Any]] = {True: [], False: []}
        for (path, share), config in zip(mixer.items(), configs, strict=False):
            for split in splits:
                part = f"[:{share * 100:g}%]" if share < 1 and "test" not in split else ""
                found["test" in split].append(source(path, name=config, split=split + part, **more))
        return found[False], found[True], ("dataset_mixer", "dataset_splits", "dataset_configs", "dataset_text_field")
    if not (path := given.get("dataset_name")):
        return [], [], ()
    split = given.get("dataset_train_split", "train")
    keys = {"name": given.get("dataset_config"), "streaming": given.get("dataset_streaming") or None, **more}
    train = source(path, split=split if split != "train" else None, **keys)
    test = source(path, split=given.get("dataset_test_split", "test"), name=given.get("dataset_config"), **more)
    used = ("dataset_name", "dataset_config", "dataset_train_split", "dataset_streaming", "dataset_text_field")
    return [train], [test], used


def _mixed(item: dict[str, Any], more: dict[str, Any], streaming: bool, notes: list[str]) -> Any:
    """Return one entry of TRL's `datasets`, or of alignment-handbook's `dataset_mixture`."""
    share = item.get("fraction", item.get("weight"))
    split = item.get("split") or "train"
    split += f"[:{share * 100:g}%]" if share is not None and share < 1 else ""
    keys = {name: item.get(name) for name in ("data_dir",)} | {"name": item.get("name", item.get("config"))}
    path = located(item.get("path", item.get("id", "")), item.get("data_files"), notes)
    read = ("path", "id", "name", "config", "data_dir", "data_files", "split", "fraction", "weight", "columns")
    notes += [f"{key} of {path} is not built in this version" for key in item if key not in read]
    if "columns" in item:
        of_a_row = "; chat_template_kwargs of a row are not read" if "chat_template_kwargs" in item["columns"] else ""
        notes.append(f"columns of {path}: a format reads those that it knows{of_a_row}")
    return source(path, split=split if split != "train" else None, streaming=streaming or None, **keys, **more)


def _train(given: Given) -> Iterator[Item]:
    """Yield the fields of SFTConfig that stay as they are."""
    known = train_names()
    for name, value in given.values.items():
        if value is None and name != "max_length":  # whose null is a value: nothing is cut
            continue
        if name not in known or name in sections.REFUSED["train"] or name in _LEFT:
            continue
        if name == "assistant_only_loss" and value is False:
            yield Left(name, "its default, which does not say where the loss falls: data.loss_on does")
        else:
            yield RecipeLine(("train", name), value, (name,))
    if (reentrant := given.get("gradient_checkpointing_use_reentrant")) is not None:
        key = ("train", "gradient_checkpointing_kwargs")
        yield RecipeLine(key, {"use_reentrant": reentrant}, ("gradient_checkpointing_use_reentrant",))
    resume = given.get("resume_from_checkpoint")
    if resume is not None:
        auto = "TRL stops where there is no checkpoint; auto starts then"
        note = auto if resume is True else ""
        yield RecipeLine(
            ("run", "resume"), {True: "auto", False: "never"}.get(resume, resume), ("resume_from_checkpoint",), note
        )


def _launch(given: Given) -> Iterator[Item]:
    if (file := given.get("deepspeed")) is not None:
        stage = engine_of(file)
        if not stage:
            yield Left(
                "deepspeed",
                "its ZeRO stage cannot be read from here: launch: {engine: zero2, config: FILE}",
                aloud=True,
            )
        else:
            yield RecipeLine(("launch", "engine"), stage, ("deepspeed",))
            if stage != "ddp":
                yield RecipeLine(("launch", "config"), file, ("deepspeed",))
    elif given.get("fsdp"):
        yield RecipeLine(("launch", "engine"), "fsdp", ("fsdp",), f"TRL's value was {given.get('fsdp')}")
        if (config := given.get("fsdp_config")) is not None:
            yield RecipeLine(("launch", "config"), config, ("fsdp_config",))
