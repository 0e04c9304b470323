"""What the settings of a file for TRL's `sft` script become, or for alignment-handbook's, which takes some more.

Input: the settings. Output: lines of a recipe, and reasons for the settings that need none. TRL's names and defaults
are read from the installed version; names that differ from those of a recipe stand in `trl.yaml`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from trl_sft.importers import recipe_parts, tables
from trl_sft.importers.settings import CompanionFile, OmittedSetting, Outcome, RecipeLine, Settings
from trl_sft.importers.tables import Table
from trl_sft.recipe import paths, sections, yaml_reader
from trl_sft.recipe.upstream import fields

_MODEL_CONFIG = "trl.trainer.model_config:ModelConfig"
_OWNERS = (_MODEL_CONFIG, "trl.scripts.utils:ScriptArguments", "trl.scripts.utils:DatasetMixtureConfig")
# settings that only a file of TRL's scripts has, and those that only alignment-handbook has
MARKS = ("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "use_peft", "eos_token")
HANDBOOK_MARKS = ("dataset_mixer", "dataset_mixture", "dataset_splits", "dataset_configs", "preprocessing_num_workers")
# values of `loss_type` that belong to a trainer for preferences or rewards
_LOSSES = ("nll", "dft", "chunked_nll")
_UNKNOWN_ROWS = (
    "TRL trains every token of chats and texts, but only the completion of rows with prompt and completion. Remove "
    "this line if the rows have these columns, and set `wording: plain` of the source if they are texts."
)


def _load_table() -> Table:
    """Return the table of the names that differ from those of a recipe."""
    return tables.load_table("trl")


def list_names() -> set[str]:
    """Return every setting that the two scripts take."""
    upstream = {name for owner in _OWNERS for name in fields.read_fields(owner)}
    return upstream | recipe_parts.list_train_keys() | set(_load_table().entries)


def _convert_table(settings: Settings) -> Iterator[Outcome]:
    """Yield the lines and the omitted settings that the table alone decides on."""
    loss = settings.get("loss_type")
    if loss is not None and loss not in _LOSSES:
        problem = f"the value is {yaml_reader.format_value(loss)}; trl_sft does supervised fine-tuning only"
        fix = "Import a file for TRL's sft script."
        raise settings.make_error("loss_type", problem, fix, code=tables.OTHER_OBJECTIVE)
    if not settings.has("model_name_or_path"):
        fix = "Set `model_name_or_path` to a folder or a hub id."
        raise settings.make_error("model_name_or_path", recipe_parts.NO_MODEL, fix, code="import.no_model")
    yield from _load_table().make_outcomes(settings)


def _convert_chat_template(settings: Settings) -> Iterator[Outcome]:
    """Yield the chat template of alignment-handbook: a text, which goes to a file, or a name."""
    if not settings.has("chat_template"):
        return
    template = settings.get("chat_template")
    if settings.has("chat_template_path"):
        yield OmittedSetting("chat_template", "`chat_template_path` takes its place.", "wording")
    elif template in paths.list_templates():
        yield RecipeLine(("tokenizer", "chat_template"), template, ("chat_template",))
    elif "{" in template:
        yield CompanionFile("{stem}.jinja", template)
        note = "This file holds the template of the settings."
        yield RecipeLine(("tokenizer", "chat_template"), "{stem}.jinja", ("chat_template",), note)
    else:
        reason = f"trl_sft has no template {yaml_reader.format_value(template)} and uses the tokenizer's."
        yield OmittedSetting("chat_template", reason, "wording")


def _convert_model(settings: Settings) -> Iterator[Outcome]:
    """Yield the attention and the arguments of the model."""
    if settings.get("use_flash_attention_2"):
        yield RecipeLine(("model", "attn_implementation"), "flash_attention_2", ("use_flash_attention_2",))
    elif settings.has("use_flash_attention_2"):
        yield OmittedSetting("use_flash_attention_2", tables.OFF)
    for key, value in (settings.get("model_init_kwargs") or {}).items():
        section = "train" if key == "use_cache" else "model"  # TRL has a setting of its own for this one
        yield RecipeLine((section, key), value, ("model_init_kwargs",))
    if settings.get("dataset_kwargs"):
        yield from _load_table().audit("dataset_kwargs", settings, "dataset_kwargs")


def _get_default(name: str) -> Any:
    """Return the default of a field of the installed ModelConfig."""
    return ast.literal_eval(fields.read_fields(_MODEL_CONFIG)[name].default)


def _convert_lora(settings: Settings) -> Iterator[Outcome]:
    """Yield the section `lora:`."""
    table = _load_table()
    if not settings.get("use_peft"):
        for name, _ in table.list_group("lora"):
            if settings.has(name):
                yield OmittedSetting(name, "TRL reads it with `use_peft: true`.")
        if settings.has("use_peft"):
            yield OmittedSetting("use_peft", tables.OFF)
        return
    for name, entry in table.list_group("lora"):
        value = settings.get(name, _get_default(name))
        if value is not None and value is not False:  # 0 is a value; the recipe's check refuses it
            note = "" if settings.has(name) else table.default_note
            yield RecipeLine(tuple(entry.key.split(".")), value, (*settings.list_present(name), "use_peft"), note)
        elif settings.has(name):
            yield OmittedSetting(name, tables.OFF)


def _convert_quantization(settings: Settings) -> Iterator[Outcome]:
    """Yield the section `quantization:`."""
    table = _load_table()
    for name in ("load_in_4bit", "load_in_8bit"):
        if settings.has(name) and not settings.get(name):
            yield OmittedSetting(name, tables.OFF)
    if not settings.get("load_in_4bit"):
        if settings.get("load_in_8bit"):
            yield RecipeLine(("quantization", "load_in_8bit"), True, ("load_in_8bit",))
        for name, _ in table.list_group("4bit"):
            if settings.has(name):
                yield OmittedSetting(name, "It has no effect without `load_in_4bit: true`.")
        return
    yield RecipeLine(("quantization", "load_in_4bit"), True, ("load_in_4bit",))
    if settings.get("load_in_8bit"):
        yield OmittedSetting("load_in_8bit", "TRL takes `load_in_4bit` first.")
    for name, entry in table.list_group("4bit"):
        value = settings.get(name, _get_default(name))
        if value is not None:
            note = "" if settings.has(name) else table.default_note
            yield RecipeLine(tuple(entry.key.split(".")), value, (name,), note)
    dtype = settings.get("dtype", settings.get("torch_dtype", _get_default("dtype")))
    if dtype != "auto":
        yield RecipeLine(("quantization", "bnb_4bit_compute_dtype"), dtype, (), "TRL computes in `dtype`.")


def _convert_data(settings: Settings) -> Iterator[Outcome]:
    """Yield the training rows and the evaluation set."""
    outcomes: list[Outcome] = []
    train, test, names = _make_sources(settings, outcomes)
    if not train:
        fix = "Add `dataset_name`, `datasets`, or alignment-handbook's `dataset_mixer`."
        raise settings.make_error("dataset_name", recipe_parts.NO_ROWS, fix, code="import.no_rows")
    train, test = [_set_wording(source) for source in train], [_set_wording(source) for source in test]
    yield RecipeLine(("data", "train"), recipe_parts.unwrap_single(train), names)
    yield from _convert_loss(settings, train)
    yield from outcomes
    mixture = settings.get("dataset_mixture") or {}
    if "test_split_size" in mixture:
        size = mixture["test_split_size"]
        yield from recipe_parts.convert_eval_fraction("dataset_mixture", size, ("test_split_size",))
    if settings.has("test_split_size"):
        yield from recipe_parts.convert_eval_fraction("test_split_size", settings.get("test_split_size"))
    strategy = settings.get("eval_strategy", settings.get("evaluation_strategy", "no"))
    if test and strategy != "no" and not settings.has("test_split_size"):
        names = (*settings.list_present("dataset_test_split"), "eval_strategy", *names)
        yield RecipeLine(("data", "eval"), recipe_parts.unwrap_single(test), names)
    elif test and strategy == "no":
        for name in settings.list_present("dataset_test_split", "dataset_splits"):
            yield OmittedSetting(name, "Nothing is evaluated without `eval_strategy`.")
    elif test and settings.has("dataset_test_split"):
        yield OmittedSetting("dataset_test_split", "`test_split_size` takes its place.")


def _set_wording(source: Any) -> Any:
    """Return a source whose prompts are texts with `wording: plain`: TRL puts a chat template around chats alone."""
    row = recipe_parts.read_first_row(source["path"] if isinstance(source, dict) else source)
    if not isinstance(row.get("prompt"), str) or "completion" not in row:
        return source
    return (source if isinstance(source, dict) else {"path": source}) | {"wording": "plain"}


def _convert_loss(settings: Settings, sources: list[Any]) -> Iterator[Outcome]:
    """Yield which tokens carry loss: TRL's default depends on the columns of the rows."""
    answers, completion = settings.get("assistant_only_loss"), settings.get("completion_only_loss")
    names = settings.list_present("assistant_only_loss", "completion_only_loss")
    key = ("data", "loss_on")
    if answers:
        yield RecipeLine(key, "assistant", names)
        return
    if completion is not None:
        yield RecipeLine(key, "completion" if completion else "all", names)
        return
    columns = _list_columns(settings, sources)
    are_pairs = [{"prompt", "completion"} <= known for known in columns]
    if all(are_pairs):
        yield RecipeLine(key, "completion", names, "TRL's default for rows with prompt and completion.")
    elif any(are_pairs):
        reason = "TRL trains the completion of some of these sources and every token of the others."
        yield OmittedSetting("datasets" if settings.has("datasets") else "dataset_name", reason, "mask")
    else:
        note = "TRL's default for chats and texts." if all(columns) else _UNKNOWN_ROWS
        yield RecipeLine(key, "all", names, note)


def _list_columns(settings: Settings, sources: list[Any]) -> list[set[str]]:
    """Return the columns of each source: those of its file here, or those that its entry names; empty = unknown."""
    name, path = _find_mixture(settings)
    entries = settings.get_inner(name, path) if name else []
    columns = []
    for number, source in enumerate(sources):
        known = set(recipe_parts.read_first_row(source["path"] if isinstance(source, dict) else source))
        entry = entries[number] if number < len(entries) else {}
        columns.append(known or set(map(str, entry.get("columns") or ())))
    return columns


def _find_mixture(settings: Settings) -> tuple[str, tuple[str | int, ...]]:
    """Return the setting that lists data sets, and the keys that lead to the list inside it; "" = none does."""
    if settings.get("datasets"):
        return "datasets", ()
    return ("dataset_mixture", ("datasets",)) if settings.get("dataset_mixture") else ("", ())


def _make_sources(settings: Settings, outcomes: list[Outcome]) -> tuple[list[Any], list[Any], tuple[str, ...]]:
    """Return the sources of training rows, those of the evaluation set, and the settings that name them."""
    column = settings.get("dataset_text_field", settings.get("text_column", "text"))
    text: dict[str, Any] = {} if column == "text" else {"rename": {column: "text"}, "format": "text"}
    text_names = settings.list_present("dataset_text_field", "text_column")
    if settings.get("dataset_mixture") or settings.get("datasets"):
        sources, names = _make_mixture_sources(settings, text, outcomes)
        others = settings.list_present("dataset_name", "dataset_mixer")
        outcomes += [OmittedSetting(name, f"`{names[0]}` takes its place.", "rows") for name in others]
        return sources, [], (*names, *text_names)
    if settings.get("dataset_mixer"):
        train, test, names = _make_mixer_sources(settings, text, outcomes)
        return train, test, (*names, *text_names)
    path = settings.get("dataset_name")
    if not path:
        return [], [], ()
    config = settings.get("dataset_config")
    if settings.has("dataset_configs"):
        reason = "alignment-handbook reads it with `dataset_mixer`. Set `name` of the source to the configuration."
        outcomes.append(OmittedSetting("dataset_configs", reason, "rows"))
    split = recipe_parts.omit_train_split(settings.get("dataset_train_split"))
    streaming = settings.get("dataset_streaming") or None
    train = recipe_parts.make_source(path, split=split, name=config, streaming=streaming, **text)
    test_split = settings.get("dataset_test_split", "test")
    test = recipe_parts.make_source(path, split=test_split, name=config, **text)
    names = settings.list_present("dataset_name", "dataset_config", "dataset_train_split", "dataset_streaming")
    return [train], [test], (*names, *text_names)


def _make_mixer_sources(
    settings: Settings, text: dict[str, Any], outcomes: list[Outcome]
) -> tuple[list[Any], list[Any], tuple[str, ...]]:
    """Return the same as `_make_sources` for `dataset_mixer`, which names a share of each data set."""
    mixer = settings.get("dataset_mixer")
    configs = settings.get("dataset_configs") or [None] * len(mixer)
    train, test = [], []
    for (path, share), config in zip(mixer.items(), configs, strict=False):
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            problem = f"the value is {yaml_reader.describe_value(share)}"
            fix = "Write the share of the rows, a number above 0, up to 1."
            raise settings.make_error("dataset_mixer", problem, fix, code="import.wrong_type", path=(path,))
        for split in map(str, settings.get("dataset_splits", ["train", "test"])):
            if "test" in split:
                test.append(recipe_parts.make_source(path, name=config, split=split, **text))
            else:
                part = recipe_parts.omit_train_split(split + _format_share(share))
                train.append(recipe_parts.make_source(path, name=config, split=part, **text))
    unused = range(len(mixer), len(configs))
    outcomes += [OmittedSetting("dataset_configs", "There is no data set for it.", "", (number,)) for number in unused]
    return train, test, ("dataset_mixer", *settings.list_present("dataset_splits", "dataset_configs"))


def _convert_mixer_script(settings: Settings) -> Iterator[Outcome]:
    """Yield what alignment-handbook's older scripts do, which are the only ones that read `dataset_mixer`.

    Follows `scripts/run_sft.py` and `scripts/run_cpt.py` as they were before `scripts/sft.py`.
    """
    name = "auto_insert_empty_system_msg"
    if not settings.get("dataset_mixer") or _find_mixture(settings)[0]:
        if settings.has(name):
            yield OmittedSetting(name, "alignment-handbook reads it with `dataset_mixer`.")
        return
    if not settings.has("packing"):
        note = "The scripts that read `dataset_mixer` always pack. Rows of a pack attend to each other there."
        yield RecipeLine(("train", "packing"), True, (), note)
        yield RecipeLine(("train", "packing_strategy"), "wrapped", ())
        yield RecipeLine(("run", "allow"), ["leaking_packing"], ())
    if settings.has("text_column"):
        return
    additions = []
    if settings.get(name, True):
        additions.append("an empty system prompt before a chat without one")
    elif settings.has(name):
        yield OmittedSetting(name, "No system prompt is inserted, as in a recipe.")
    if settings.get_inner("dataset_kwargs", ("append_concat_token",)) is not False:
        additions.append("an end-of-text token after each chat")
    written = f"write {' and '.join(additions)}, and " if additions else ""
    reason = (
        f"The scripts that read it {written}leave out rows that hold a problem of HumanEval. The recipe does not. "
        "Change the rows if your run needs that."
    )
    yield OmittedSetting("dataset_mixer", reason, "wording")
    if settings.get(name):
        yield OmittedSetting(name, "The recipe inserts no system prompt.", "wording")


def _format_share(share: float | None) -> str:
    """Return the slice of a split that holds this share of it: `[:25%]`; "" = all of it."""
    return f"[:{share * 100:g}%]" if share is not None and share < 1 else ""


def _make_mixture_sources(
    settings: Settings, text: dict[str, Any], outcomes: list[Outcome]
) -> tuple[list[Any], tuple[str, ...]]:
    """Return the sources of TRL's `datasets`, or of alignment-handbook's `dataset_mixture`, and their settings."""
    table = _load_table()
    name, path = _find_mixture(settings)
    if settings.get("dataset_mixture"):
        outcomes += table.audit("dataset_mixture", settings, "dataset_mixture")
        if name == "datasets":
            outcomes.append(OmittedSetting("dataset_mixture", "`datasets` takes its place.", "rows"))
    entries = settings.get_inner(name, path)
    if not isinstance(entries, list) or not entries:
        fix = "Write a list of data sets, each with its `id`."
        raise settings.make_error(name, "the mixture names no data sets", fix, code="import.no_rows")
    streaming = bool(settings.get("streaming")) or None
    sources = []
    for number, entry in enumerate(entries):
        place = (*path, number)
        if not isinstance(entry, dict):
            problem = f"the value is {yaml_reader.describe_value(entry)}"
            fix = "Write a mapping with `path`."
            raise settings.make_error(name, problem, fix, code="import.wrong_type", path=place)
        outcomes += table.audit("source", settings, name, path=place)
        sources.append(
            _make_mixture_source(settings, name, place, text=text | {"streaming": streaming}, outcomes=outcomes)
        )
    return sources, (name, *settings.list_present("streaming"))


def _make_mixture_source(
    settings: Settings, name: str, place: tuple[str | int, ...], *, text: dict[str, Any], outcomes: list[Outcome]
) -> Any:
    """Return the source for one entry of TRL's `datasets`, or of alignment-handbook's `dataset_mixture`."""
    entry = settings.get_inner(name, place)
    path = entry.get("path", entry.get("id"))
    if not path:
        fix = "Set its `path` to a file, a folder or a hub id."
        raise settings.make_error(name, "a data set has no path", fix, code="import.no_rows", path=place)
    resolved = recipe_parts.resolve_data_files(path, entry.get("data_files"))
    if not resolved:
        outcomes.append(OmittedSetting(name, recipe_parts.explain_data_files(path), "rows", (*place, "data_files")))
    if entry.get("columns"):
        media = {"chosen", "rejected", "images", "image", "videos", "audio"} & set(map(str, entry["columns"]))
        if media:
            problem = f"the value has {', '.join(sorted(media))}; trl_sft does supervised fine-tuning on text only"
            fix = "Import a file for supervised fine-tuning on text."
            inner = (*place, "columns")
            raise settings.make_error(name, problem, fix, code=tables.OTHER_OBJECTIVE, path=inner)
        reason = "A format reads the columns that it knows."
        outcomes.append(OmittedSetting(name, reason, "", (*place, "columns")))
        if "chat_template_kwargs" in entry["columns"]:
            reason = (
                "trl_sft does not read `chat_template_kwargs` of a row: the template gets the same ones for all rows."
            )
            outcomes.append(OmittedSetting(name, reason, "wording", (*place, "columns")))
    split = entry.get("split") or "train"
    keys: dict[str, Any] = {"data_dir": entry.get("data_dir"), "name": entry.get("name", entry.get("config"))}
    if entry.get("fraction") is not None:
        keys["weight"] = entry["fraction"]
        reason = (
            "TRL takes the first rows of each data set, so many that the shares are right and no row comes twice. With "
            "`weight` trl_sft draws rows until as many are trained as all sources have."
        )
        outcomes.append(OmittedSetting(name, reason, "rows", (*place, "fraction")))
    elif entry.get("weight") is not None and entry["weight"] < 1:
        split += _format_share(entry["weight"])
        reason = "alignment-handbook takes this share of the rows at random, the recipe takes the first ones."
        outcomes.append(OmittedSetting(name, reason, "rows", (*place, "weight")))
    elif entry.get("weight") is not None:
        outcomes.append(OmittedSetting(name, "All rows are trained.", "", (*place, "weight")))
    return recipe_parts.make_source(resolved or path, split=recipe_parts.omit_train_split(split), **keys, **text)


def _convert_training(settings: Settings) -> Iterator[Outcome]:
    """Yield the fields of SFTConfig, which are keys of `train:`."""
    table = _load_table()
    elsewhere = {name for name, entry in table.entries.items() if entry.key or entry.reason}
    elsewhere |= {"assistant_only_loss", "completion_only_loss"}
    known = recipe_parts.list_train_keys() - set(sections.REFUSED["train"]) - elsewhere
    for name, value in settings.values.items():
        if name not in known or (value is None and name != "max_length"):  # `max_length: null` = no truncation
            continue
        yield RecipeLine(("train", name), value, (name,))
    if settings.get("packing") and settings.get("packing_strategy") == "wrapped":
        note = "Rows of a pack attend to each other, as in TRL."
        yield RecipeLine(("run", "allow"), ["leaking_packing"], ("packing_strategy",), note)


def _convert_launch(settings: Settings) -> Iterator[Outcome]:
    """Yield the sections `run:` and `launch:`."""
    auto_note = "TRL stops if there is no checkpoint. With `auto` training then starts from the beginning."
    yield from recipe_parts.convert_resume(settings, auto_note)
    yield from recipe_parts.convert_launch(settings, fsdp=bool(settings.get("fsdp")))


STEPS = (
    _convert_chat_template,  # before `chat_template_path`, which is in the table
    _convert_table,
    _convert_model,
    _convert_lora,
    _convert_quantization,
    _convert_data,
    _convert_mixer_script,
    _convert_training,
    _convert_launch,
)
