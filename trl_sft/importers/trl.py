"""What the settings of a file for TRL's `sft` script become, or for alignment-handbook's, which takes some more.

Input: the settings. Output: lines of a recipe, and reasons for the settings that need none. TRL's names and defaults
are read from the installed version; names that differ from those of a recipe stand in `trl.yaml`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from trl_sft.importers import recipe_parts, tables
from trl_sft.importers.settings import OmittedSetting, Outcome, RecipeLine, Settings, join_sentences
from trl_sft.importers.tables import Table
from trl_sft.recipe import paths, sections, yaml_reader
from trl_sft.recipe.upstream import fields

_MODEL_CONFIG = "trl.trainer.model_config:ModelConfig"
_OWNERS = (_MODEL_CONFIG, "trl.scripts.utils:ScriptArguments", "trl.scripts.utils:DatasetMixtureConfig")
_MIXTURE_KEYS = {
    *("path", "id", "name", "config", "data_dir", "data_files", "split", "fraction", "weight", "columns"),
}
_LOSS = (
    "TRL trains every token of a chat or a text unless `assistant_only_loss` is true, and the completion of prompt and "
    "completion. trl_sft trains the answers by default. Set `data.loss_on: all` to train all tokens."
)


def _load_table() -> Table:
    """Return the table of the names that differ from those of a recipe."""
    return tables.load_table("trl")


def list_names() -> set[str]:
    """Return every setting that the two scripts take."""
    upstream = {name for owner in _OWNERS for name in fields.read_fields(owner)}
    return upstream | recipe_parts.list_train_keys() | set(_load_table().entries)


def convert(settings: Settings) -> Iterator[Outcome]:
    """Yield what becomes of each setting, and the lines for TRL's defaults.

    Raises:
        RecipeError: A value that a recipe needs is missing or cannot be converted.
    """
    table = _load_table()
    yield from _convert_chat_template(settings)  # it goes before `chat_template_path`, which is in the table
    yield from table.make_outcomes(settings)
    yield from _convert_model(settings)
    yield from _convert_lora(settings, table)
    yield from _convert_quantization(settings, table)
    yield from _convert_data(settings, table)
    yield from _convert_training(settings, table)
    auto_note = "TRL stops if there is no checkpoint. With `auto` training then starts from the beginning."
    yield from recipe_parts.convert_resume(settings, auto_note)
    yield from recipe_parts.convert_launch(settings, fsdp=bool(settings.get("fsdp")))


def _convert_chat_template(settings: Settings) -> Iterator[Outcome]:
    """Yield the chat template of alignment-handbook: a text, which a recipe takes only by the name of a template."""
    if not settings.has("chat_template"):
        return
    template = settings.get("chat_template")
    if template in paths.list_templates():
        yield RecipeLine(("tokenizer", "chat_template"), template, ("chat_template",))
    else:
        reason = "Write the template to a file and set `tokenizer.chat_template: FILE.jinja`."
        yield OmittedSetting("chat_template", reason, warn=True)


def _convert_model(settings: Settings) -> Iterator[Outcome]:
    """Yield the attention and the arguments of the model."""
    if settings.get("use_flash_attention_2"):
        yield RecipeLine(("model", "attn_implementation"), "flash_attention_2", ("use_flash_attention_2",))
    for key, value in (settings.get("model_init_kwargs") or {}).items():
        yield RecipeLine(("model", key), value, ("model_init_kwargs",))


def _get_default(name: str) -> Any:
    """Return the default of a field of the installed ModelConfig."""
    return ast.literal_eval(fields.read_fields(_MODEL_CONFIG)[name].default)


def _convert_lora(settings: Settings, table: Table) -> Iterator[Outcome]:
    """Yield the section `lora:`."""
    for name in ("use_peft", "load_in_4bit", "load_in_8bit"):
        if not isinstance(settings.get(name, False), bool):
            problem = f"the value is {yaml_reader.describe_value(settings.get(name))}"
            raise settings.make_error(name, problem, "Write `true` or `false`.", code="import.wrong_type")
    if not settings.get("use_peft"):
        return
    for name, entry in table.list_group("lora"):
        value = settings.get(name, _get_default(name))
        if value is not None and value is not False:  # 0 is a value; the recipe's check refuses it
            note = "" if settings.has(name) else table.default_note
            yield RecipeLine(tuple(entry.key.split(".")), value, (*settings.list_present(name), "use_peft"), note)


def _convert_quantization(settings: Settings, table: Table) -> Iterator[Outcome]:
    """Yield the section `quantization:`."""
    if not settings.get("load_in_4bit"):
        if settings.get("load_in_8bit"):
            yield RecipeLine(("quantization", "load_in_8bit"), True, ("load_in_8bit",))
        return
    yield RecipeLine(("quantization", "load_in_4bit"), True, ("load_in_4bit",))
    for name, entry in table.list_group("4bit"):
        value = settings.get(name, _get_default(name))
        if value is not None:
            note = "" if settings.has(name) else table.default_note
            yield RecipeLine(tuple(entry.key.split(".")), value, (name,), note)
    dtype = settings.get("dtype", settings.get("torch_dtype", _get_default("dtype")))
    if dtype != "auto":
        yield RecipeLine(("quantization", "bnb_4bit_compute_dtype"), dtype, (), "TRL computes in `dtype`.")


def _convert_data(settings: Settings, table: Table) -> Iterator[Outcome]:
    """Yield the training rows and the evaluation set."""
    notes: list[str] = []
    train, test, names = _make_sources(settings, notes)
    if not train:
        fix = "Add `dataset_name`, `datasets`, or alignment-handbook's `dataset_mixer`."
        raise settings.make_error("dataset_name", recipe_parts.NO_ROWS, fix, code="import.no_rows")
    if settings.get("assistant_only_loss") is not True and not settings.has("completion_only_loss"):
        notes.append(_LOSS)
    yield RecipeLine(("data", "train"), recipe_parts.unwrap_single(train), names, join_sentences(*notes))
    mixture = settings.get("dataset_mixture") or {}
    if mixture.get("test_split_size"):
        note = table.entries["test_split_size"].note
        yield RecipeLine(("data", "eval_fraction"), mixture["test_split_size"], ("dataset_mixture",), note)
    strategy = settings.get("eval_strategy", settings.get("evaluation_strategy", "no"))
    if test and strategy != "no" and not settings.has("test_split_size"):
        names = ("dataset_test_split", "eval_strategy", *names)
        yield RecipeLine(("data", "eval"), recipe_parts.unwrap_single(test), names)


def _make_sources(settings: Settings, notes: list[str]) -> tuple[list[Any], list[Any], tuple[str, ...]]:
    """Return the sources of training rows, those of the evaluation set, and the settings that name them."""
    column = settings.get("dataset_text_field", "text")
    text: dict[str, Any] = {} if column == "text" else {"rename": {column: "text"}, "format": "text"}
    mixture = settings.get("dataset_mixture") or {}
    if entries := settings.get("datasets", mixture.get("datasets")):
        text["streaming"] = bool(settings.get("streaming")) or None
        sources = [_make_mixture_source(entry, text, notes) for entry in entries]
        if "seed" in mixture:
            notes.append("`train.seed` takes the place of the mixture's own seed.")
        return sources, [], ("datasets", "dataset_mixture", "streaming", "dataset_text_field")
    if settings.get("dataset_mixer"):
        return _make_mixer_sources(settings, text)
    path = settings.get("dataset_name")
    if not path:
        return [], [], ()
    config = settings.get("dataset_config")
    split = recipe_parts.omit_train_split(settings.get("dataset_train_split"))
    streaming = settings.get("dataset_streaming") or None
    train = recipe_parts.make_source(path, split=split, name=config, streaming=streaming, **text)
    test_split = settings.get("dataset_test_split", "test")
    test = recipe_parts.make_source(path, split=test_split, name=config, **text)
    names = ("dataset_name", "dataset_config", "dataset_train_split", "dataset_streaming", "dataset_text_field")
    return [train], [test], names


def _make_mixer_sources(settings: Settings, text: dict[str, Any]) -> tuple[list[Any], list[Any], tuple[str, ...]]:
    """Return the same as `_make_sources` for `dataset_mixer`, which names a share of each data set."""
    mixer = settings.get("dataset_mixer")
    configs = settings.get("dataset_configs") or [None] * len(mixer)
    train, test = [], []
    for (path, share), config in zip(mixer.items(), configs, strict=False):
        for split in settings.get("dataset_splits", ["train", "test"]):
            if "test" in split:
                test.append(recipe_parts.make_source(path, name=config, split=split, **text))
            else:
                train.append(recipe_parts.make_source(path, name=config, split=split + _format_share(share), **text))
    return train, test, ("dataset_mixer", "dataset_splits", "dataset_configs", "dataset_text_field")


def _format_share(share: float | None) -> str:
    """Return the slice of a split that holds this share of it: `[:25%]`; "" = all of it."""
    return f"[:{share * 100:g}%]" if share is not None and share < 1 else ""


def _make_mixture_source(entry: dict[str, Any], text: dict[str, Any], notes: list[str]) -> Any:
    """Return the source for one entry of TRL's `datasets`, or of alignment-handbook's `dataset_mixture`."""
    path = recipe_parts.resolve_data_files(entry.get("path", entry.get("id", "")), entry.get("data_files"), notes)
    notes += [f"trl_sft does not support `{key}` of {path}." for key in entry if key not in _MIXTURE_KEYS]
    if "columns" in entry:
        notes.append(f"`columns` of {path} is not in the recipe: a format reads the columns that it knows.")
        if "chat_template_kwargs" in entry["columns"]:
            notes.append("trl_sft does not read `chat_template_kwargs` of a row.")
    split = (entry.get("split") or "train") + _format_share(entry.get("fraction", entry.get("weight")))
    config = entry.get("name", entry.get("config"))
    split = recipe_parts.omit_train_split(split)
    return recipe_parts.make_source(path, split=split, data_dir=entry.get("data_dir"), name=config, **text)


def _convert_training(settings: Settings, table: Table) -> Iterator[Outcome]:
    """Yield the fields of SFTConfig, which are keys of `train:`."""
    elsewhere = {name for name, entry in table.entries.items() if entry.key or entry.reason}
    known = recipe_parts.list_train_keys() - set(sections.REFUSED["train"]) - elsewhere
    for name, value in settings.values.items():
        if name not in known or (value is None and name != "max_length"):  # `max_length: null` = no truncation
            continue
        if name == "assistant_only_loss" and value is False:
            reason = "This is its default, which does not say which tokens carry loss. `data.loss_on` does."
            yield OmittedSetting(name, reason)
        else:
            yield RecipeLine(("train", name), value, (name,))
    if settings.has("gradient_checkpointing_use_reentrant"):
        options = {"use_reentrant": settings.get("gradient_checkpointing_use_reentrant")}
        names = ("gradient_checkpointing_use_reentrant",)
        yield RecipeLine(("train", "gradient_checkpointing_kwargs"), options, names)
