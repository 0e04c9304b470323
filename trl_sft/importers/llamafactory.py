"""What the settings of a LLaMA-Factory file become.

Input: the settings, with the content of dataset_info.json among them. Output: lines of a recipe, and reasons for the
settings that need none. A default of LLaMA-Factory that changes the training compared with trl_sft's becomes a
line too. Names, defaults and most notes stand in `llamafactory.yaml`, which also names the release; the code here
follows its sources.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trl_sft.errors import Fault, RecipeError
from trl_sft.importers import recipe_parts, tables
from trl_sft.importers.settings import OmittedSetting, Outcome, RecipeLine, Settings, join_sentences
from trl_sft.importers.tables import Table
from trl_sft.recipe import paths, sections
from trl_sft.recipe.yaml_reader import format_value

_INFO, _FOLDER = "dataset_info", "_folder"  # content and folder of dataset_info.json, beside the settings
_FILE = "dataset_info.json"
_MEDIA = {"images", "videos", "audios"}
_TAGS = {
    *("from", "value", "role", "content", "human", "gpt", "user", "assistant", "observation", "function_call"),
    "system",
}
# defaults of transformers' TrainingArguments, for which TRL has others
_TRANSFORMERS_DEFAULTS = {"learning_rate": 5e-5, "logging_steps": 500}


def _load_table() -> Table:
    """Return the table of LLaMA-Factory's settings."""
    return tables.load_table("llamafactory")


def list_names() -> set[str]:
    """Return every setting that is known here."""
    return {*_load_table().entries, *recipe_parts.list_train_keys()}


def add_dataset_info(settings: Settings, file: Path | None, folder: Path) -> Settings:
    """Return the settings together with the descriptions of their data sets.

    Args:
        settings: The user's settings.
        file: A dataset_info.json; None = where LLaMA-Factory looks for it, or else beside the settings.
        folder: The folder of the file of settings.

    Raises:
        RecipeError: The dataset_info.json cannot be read.
    """
    place = settings.get("dataset_dir", "data")
    if isinstance(place, dict):
        return _add_info(settings, place, ".")
    if file is None:
        file = _find_file_beside(settings, folder)
    if file is None and str(place) == "ONLINE":
        hub_ids = [*_list_datasets(settings, "dataset"), *_list_datasets(settings, "eval_dataset")]
        return _add_info(settings, {name: {"hf_hub_url": name} for name in hub_ids}, str(place))
    file = file or Path(str(place), _FILE)
    try:
        info = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        problem = f"{file}: {error.strerror if isinstance(error, OSError) else error}"
        fix = f"Add `--dataset-info FILE`, the {_FILE} of LLaMA-Factory."
        raise RecipeError(Fault(settings.where("dataset_dir"), problem, fix, code="import.missing_file")) from None
    return _add_info(settings, info, str(file.parent))


def _find_file_beside(settings: Settings, folder: Path) -> Path | None:
    """Return the dataset_info.json near the file of settings; None = there is none, or LLaMA-Factory's own exists."""
    place = Path(str(settings.get("dataset_dir", "data")))
    if (place / _FILE).is_file():
        return None
    return next((path for path in (folder / place / _FILE, folder / _FILE) if path.is_file()), None)


def _add_info(settings: Settings, info: dict[str, Any], folder: str) -> Settings:
    """Return the settings with the descriptions of data sets and the folder of their files."""
    return settings._replace(values=settings.values | {_INFO: info, _FOLDER: folder})


def convert(settings: Settings) -> Iterator[Outcome]:
    """Yield what becomes of each setting, and the lines for LLaMA-Factory's defaults.

    Raises:
        RecipeError: A value that a recipe needs is missing or cannot be converted.
    """
    table = _load_table()
    stage = settings.get("stage", "sft")
    if stage not in ("sft", "pt"):
        problem = f"the value is {format_value(stage)}; trl_sft does supervised fine-tuning only"
        raise settings.make_error(
            "stage", problem, "Import a file whose stage is `sft` or `pt`.", code="import.other_objective"
        )
    if not settings.has("model_name_or_path"):
        fix = "Set `model_name_or_path` to a folder or a hub id."
        raise settings.make_error("model_name_or_path", recipe_parts.NO_MODEL, fix, code="import.no_model")
    if settings.has("stage"):
        reason = "The rows are texts." if stage == "pt" else "trl_sft does supervised fine-tuning only."
        yield OmittedSetting("stage", reason)
    yield from table.make_outcomes(settings)
    yield from _convert_model(settings, table)
    yield from _convert_finetuning(settings, table)
    yield from _convert_quantization(settings, table)
    yield from _convert_data(settings, table)
    yield from _convert_loss(settings)
    yield from _convert_packing(settings)
    yield from _convert_chat_template(settings, table)
    yield from _convert_training(settings, table)
    yield from recipe_parts.convert_resume(settings)
    yield from recipe_parts.convert_launch(settings, fsdp=bool(settings.get("fsdp")))


def _convert_model(settings: Settings, table: Table) -> Iterator[Outcome]:
    """Yield the attention and gradient checkpointing."""
    attention = settings.get("flash_attn", "auto")
    if attention in table.vocabulary["attention"]:
        yield RecipeLine(("model", "attn_implementation"), table.vocabulary["attention"][attention], ("flash_attn",))
    elif settings.has("flash_attn"):
        yield OmittedSetting("flash_attn", "transformers chooses the attention, in LLaMA-Factory too.")
    key = recipe_parts.get_current_name("gradient_checkpointing")
    saves_memory = not settings.get("disable_gradient_checkpointing")
    if not settings.list_present(key, "gradient_checkpointing"):
        yield table.make_line(settings, f"train.{key}", "disable_gradient_checkpointing", value=saves_memory)
    if saves_memory:
        key = f"train.{recipe_parts.get_current_name('gradient_checkpointing_kwargs')}"
        options = {"use_reentrant": table.get_value(settings, "use_reentrant_gc")}
        yield table.make_line(settings, key, "use_reentrant_gc", value=options)


def _convert_finetuning(settings: Settings, table: Table) -> Iterator[Outcome]:
    """Yield the section `lora:`, which full fine-tuning does without."""
    kind = settings.get("finetuning_type", "lora")
    if kind == "full":
        yield OmittedSetting("finetuning_type", "Without a section `lora:` a recipe trains all weights.")
        return
    if kind != "lora":
        problem = f"the value is {format_value(kind)}; trl_sft does not support it"
        raise settings.make_error(
            "finetuning_type", problem, "Write `lora` or `full`.", code="import.unsupported_value"
        )
    default_names = settings.list_present("finetuning_type")
    lines = [*table.make_lines(settings, "lora"), *_convert_lora_alpha_and_targets(settings, table)]
    yield from (line if line.names else line._replace(names=default_names) for line in lines)
    if settings.get("additional_target"):
        modules = _split_list(settings.get("additional_target"))
        yield RecipeLine(("lora", "modules_to_save"), modules, ("additional_target",))
    for name in settings.list_enabled(("use_rslora", "use_dora")):
        yield RecipeLine(("lora", name), True, (name,))
    if settings.get("pissa_init"):
        steps = table.get_value(settings, "pissa_iter")
        weights = "pissa" if steps == -1 else f"pissa_niter_{steps}"
        yield RecipeLine(("lora", "init_lora_weights"), weights, ("pissa_init", "pissa_iter"))


def _convert_lora_alpha_and_targets(settings: Settings, table: Table) -> Iterator[RecipeLine]:
    """Yield the scale of LoRA, twice its rank by default, and the layers."""
    alpha = settings.get("lora_alpha", 2 * table.get_value(settings, "lora_rank"))
    yield table.make_line(settings, "lora.lora_alpha", "lora_alpha", value=alpha)
    modules = _split_list(table.get_value(settings, "lora_target"))
    targets = "all-linear" if modules == ["all"] else modules
    yield table.make_line(settings, "lora.target_modules", "lora_target", value=targets)


def _split_list(value: Any) -> Any:
    """Return the parts of a text with commas; a list stays as it is."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _convert_quantization(settings: Settings, table: Table) -> Iterator[Outcome]:
    """Yield the section `quantization:`."""
    bits = settings.get("quantization_bit")
    if bits is None:
        return
    method = table.get_value(settings, "quantization_method")
    if bits not in (4, 8) or method not in ("bnb", "bitsandbytes"):
        problem = f"{format_value(bits)} bits by {format_value(method)}: trl_sft quantizes with bitsandbytes only"
        raise settings.make_error(
            "quantization_bit", problem, "Write 4 or 8 bits by `bnb`.", code="import.unsupported_value"
        )
    names = ("quantization_bit", "quantization_method")
    yield RecipeLine(("quantization", f"load_in_{bits}bit"), True, names)
    if bits == 4:
        yield table.make_line(settings, "quantization.bnb_4bit_quant_type", "quantization_type")
        yield table.make_line(settings, "quantization.bnb_4bit_use_double_quant", "double_quantization")


def _convert_data(settings: Settings, table: Table) -> Iterator[Outcome]:
    """Yield the training rows and the evaluation set."""
    names = _list_datasets(settings, "dataset")
    if not names:
        raise settings.make_error(
            "dataset", recipe_parts.NO_ROWS, f"Set `dataset` to a name in {_FILE}.", code="import.no_rows"
        )
    notes: list[str] = []
    sources = [_make_source(settings, table, name, notes=notes) for name in names]
    source_keys: dict[str, Any] = {}
    if settings.get("max_samples"):
        source_keys["max_rows"] = settings.get("max_samples")
        notes.append(
            f"LLaMA-Factory takes the first {source_keys['max_rows']:,} rows. `max_rows` takes as many at random."
        )
    if settings.get("streaming"):
        source_keys["streaming"] = True
    if settings.get("mix_strategy", "concat") != "concat":
        epoch_note = "trl_sft ends an epoch after as many rows as all sources have."
        notes.append(f"LLaMA-Factory draws rows until one source, or each, is used up. {epoch_note}")
        weights = [float(part) for part in str(settings.get("interleave_probs") or "").split(",") if part]
        sources = [
            _add_keys(source, {"weight": weight})
            for source, weight in zip(sources, weights or [1.0] * len(sources), strict=False)
        ]
    if source_keys:
        sources = [_add_keys(source, source_keys) for source in sources]
    setting_names = (
        "dataset",
        "dataset_dir",
        _INFO,
        _FOLDER,
        "max_samples",
        "mix_strategy",
        "interleave_probs",
        "streaming",
    )
    yield RecipeLine(("data", "train"), recipe_parts.unwrap_single(sources), setting_names, join_sentences(*notes))
    if names := _list_datasets(settings, "eval_dataset"):
        sources = [_make_source(settings, table, name, setting="eval_dataset", notes=[]) for name in names]
        yield RecipeLine(("data", "eval"), recipe_parts.unwrap_single(sources), ("eval_dataset",))
    yield from recipe_parts.convert_eval_fraction(settings, "val_size")


def _list_datasets(settings: Settings, setting: str) -> list[str]:
    """Return the names of data sets, which LLaMA-Factory takes as a list or as a text with commas."""
    return list(_split_list(settings.get(setting, [])))


def _add_keys(source: Any, keys: dict[str, Any]) -> dict[str, Any]:
    """Return a source with more keys."""
    return (source if isinstance(source, dict) else {"path": source}) | keys


def _make_source(settings: Settings, table: Table, name: str, *, notes: list[str], setting: str = "dataset") -> Any:
    """Return the source for one data set of dataset_info.json; `notes` takes sentences on what differs."""
    info = settings.get(_INFO, {})
    entry = info.get(name)
    if not isinstance(entry, dict):
        names = ", ".join(sorted(info)[:8]) or "none"
        fix = f"Write a name that it has ({names}), or add `--dataset-info FILE`."
        raise settings.make_error(setting, f"{_FILE} has no data set {name}", fix, code="import.unknown_dataset")
    if entry.get("ranking"):
        fix = "Choose a data set for supervised fine-tuning."
        raise settings.make_error(setting, f"{name} holds pairs of answers to rank", fix, code="import.other_objective")
    path = next((entry[key] for key in ("hf_hub_url", "ms_hub_url", "script_url") if key in entry), None)
    if path is None and "file_name" not in entry:
        fix = f"Add one of the two to {_FILE}."
        raise settings.make_error(setting, f"{name} has neither file_name nor hf_hub_url", fix, code="import.no_rows")
    if path is None:
        path = str(Path(settings.get(_FOLDER, "."), entry["file_name"]))
    if _MEDIA & set(entry.get("columns", {})):
        notes.append(f"{name} has images, video or sound. trl_sft trains on text only.")
    split = recipe_parts.omit_train_split(entry.get("split"))
    keys = {"name": entry.get("subset"), "split": split, "data_dir": entry.get("folder")}
    if settings.get("stage") == "pt":
        keys |= _make_text_format(entry)
    else:
        keys |= _make_row_format(entry, table, notes)
    return recipe_parts.make_source(path, max_rows=entry.get("num_samples"), **keys)


def _make_text_format(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a source for the stage `pt`, whose rows are texts."""
    columns = entry.get("columns", {})
    column = columns.get("prompt", "text" if columns else "instruction")
    return {"format": "text", "rename": recipe_parts.make_rename({column: "text"})}


def _make_row_format(entry: dict[str, Any], table: Table, notes: list[str]) -> dict[str, Any]:
    """Return the keys of a source that say how its rows become text."""
    columns, tags = entry.get("columns", {}), entry.get("tags", {})
    if entry.get("formatting", "alpaca") == "alpaca":
        notes.append("LLaMA-Factory joins question and input by one line break, trl_sft by two.")
        return {
            "format": "alpaca",
            "wording": "chat",
            "rename": _make_rename(columns, table.vocabulary["alpaca_columns"]),
        }
    has_roles = tags.get("role_tag", "from") == "role" or entry.get("formatting") == "openai"
    row_format, name = ("messages", "messages") if has_roles else ("sharegpt", "conversations")
    unknown = sorted(set(tags.values()) - _TAGS)
    if unknown:
        notes.append(f"trl_sft does not know the tags {', '.join(unknown)}. Set `format: rows.py:FUNCTION`.")
    columns_of_chat = recipe_parts.make_rename({columns.get("messages", "conversations"): name})
    columns_of_chat |= _make_rename(columns, table.vocabulary["chat_columns"])
    return {"format": row_format, "wording": "chat", "rename": columns_of_chat}


def _make_rename(columns: dict[str, str], names: Any) -> dict[str, str]:
    """Return `rename:` for the columns of dataset_info.json that have these names here."""
    return recipe_parts.make_rename({columns[old]: new for old, new in names.items() if columns.get(old)})


def _convert_loss(settings: Settings) -> Iterator[Outcome]:
    """Yield which tokens carry loss."""
    if settings.get("train_on_prompt"):
        yield RecipeLine(("data", "loss_on"), "all", ("train_on_prompt",))
    elif settings.get("mask_history"):
        yield RecipeLine(("data", "loss_on"), "last_turn", ("mask_history",))
    elif settings.get("stage") != "pt":
        yield RecipeLine(("data", "loss_on"), "assistant", (), _load_table().default_note)


def _convert_packing(settings: Settings) -> Iterator[Outcome]:
    """Yield whether several rows share a sequence."""
    neat = settings.get("neat_packing")
    if neat or settings.get("packing", settings.get("stage") == "pt"):
        note = "Without `neat_packing` LLaMA-Factory lets documents of a pack attend to each other. trl_sft does not."
        yield RecipeLine(("train", "packing"), True, ("packing", "neat_packing"), "" if neat else note)
    elif settings.has("packing"):
        yield RecipeLine(("train", "packing"), False, ("packing", "neat_packing"))


def _convert_chat_template(settings: Settings, table: Table) -> Iterator[Outcome]:
    """Yield the chat template: LLaMA-Factory has one for each family of models, trl_sft takes the tokenizer's."""
    if settings.get("enable_thinking") is False:
        yield RecipeLine(("tokenizer", "chat_template_kwargs"), {"enable_thinking": False}, ("enable_thinking",))
    elif settings.has("enable_thinking"):
        yield OmittedSetting("enable_thinking", "This is the default of a template.")
    if not settings.has("template"):
        return
    template = settings.get("template")
    name = table.vocabulary["templates"].get(template, template)
    if name in paths.list_templates():
        note = "Its words may differ from those of the tokenizer's template, which trl_sft uses without this line."
        yield RecipeLine(("tokenizer", "chat_template"), name, ("template",), note)
    else:
        problem = f"trl_sft has no template {format_value(template)} and uses the tokenizer's."
        reason = f"{problem} Compare the two with `preview`."
        yield OmittedSetting("template", reason, warn=True)


def _convert_training(settings: Settings, table: Table) -> Iterator[Outcome]:
    """Yield the fields of transformers' TrainingArguments, which are keys of `train:`, and its defaults."""
    known = recipe_parts.list_train_keys() - set(sections.REFUSED["train"]) - set(table.entries)
    for name in settings.values:
        if settings.has(name) and name in known:
            yield RecipeLine(("train", name), settings.get(name), (name,))
    for name, value in _TRANSFORMERS_DEFAULTS.items():
        if not settings.has(name):
            yield RecipeLine(("train", name), value, (), "This is transformers' default.")
    if settings.get("pure_bf16"):
        yield RecipeLine(("model", "dtype"), "bfloat16", ("pure_bf16",))
    elif not settings.has("bf16"):
        yield RecipeLine(("train", "bf16"), False, (), table.default_note)
    elif settings.get("bf16") and settings.get("finetuning_type", "lora") == "lora":
        note = "LLaMA-Factory loads frozen weights in this type and trains a float32 adapter."
        yield RecipeLine(("model", "dtype"), "bfloat16", ("bf16",), note)
