"""What the settings of a LLaMA-Factory file become.

Input: the settings, with the content of dataset_info.json among them. Output: lines of a recipe, and reasons for the
settings that need none. A default of LLaMA-Factory that changes the training compared with trl_sft's becomes a
line too. Names, defaults and most notes stand in `llamafactory.yaml`, which also names the release; the code here
follows its sources. Deliberately not here: what one data set becomes (`llamafactory_rows`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trl_sft import redaction, user_paths
from trl_sft.errors import Fault, RecipeError
from trl_sft.importers import llamafactory_rows, recipe_parts, secret_settings, tables
from trl_sft.importers.llamafactory_rows import FILE, FOLDER, INFO
from trl_sft.importers.row_functions import RowFunction, make_file
from trl_sft.importers.settings import OmittedSetting, Outcome, RecipeLine, Settings, check_depth
from trl_sft.importers.tables import Table
from trl_sft.recipe import paths, sections
from trl_sft.recipe.upstream import fields
from trl_sft.recipe.yaml_reader import format_value

# settings that only a LLaMA-Factory file has
MARKS = ("stage", "finetuning_type", "dataset", "dataset_dir", "template", "cutoff_len", "do_train", "lora_target")
# settings that only the layout of LLaMA-Factory's v1 has
_V1_MARKS = {
    "model",
    "model_class",
    "train_dataset",
    "eval_dataset_path",
    "peft_config",
    "dist_config",
    "kernel_config",
}
_LORA_NAMES = (
    *("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "additional_target", "use_rslora", "use_dora"),
    *("pissa_init", "pissa_iter"),
)
_TRAINING_ARGUMENTS = "transformers.training_args:TrainingArguments"
# defaults of transformers' TrainingArguments, for which TRL has others
_TRANSFORMERS_DEFAULTS = {"learning_rate": 5e-5, "logging_steps": 500}


def _load_table() -> Table:
    """Return the table of LLaMA-Factory's settings."""
    return tables.load_table("llamafactory")


def list_names() -> set[str]:
    """Return every setting that is known here."""
    return {*_load_table().entries, *_list_training_arguments()}


def add_dataset_info(settings: Settings, file: Path | None, folder: Path) -> Settings:
    """Return the settings together with the descriptions of their data sets.

    Args:
        settings: The user's settings.
        file: A dataset_info.json; None = where LLaMA-Factory looks for it, or else beside the settings.
        folder: The folder of the file of settings.

    Raises:
        RecipeError: The dataset_info.json cannot be read, or the settings are for LLaMA-Factory's v1.
    """
    if _V1_MARKS & set(settings.values) and not settings.has("model_name_or_path"):
        name = next(name for name in settings.values if name in _V1_MARKS)
        problem = "this is a file for LLaMA-Factory v1, whose settings have other names and are not read here"
        fix = "Import a file for LLaMA-Factory 0.9, with `model_name_or_path` and `stage`."
        raise settings.make_error(name, problem, fix, code="import.other_release")
    place = settings.get("dataset_dir", "data")
    if isinstance(place, dict):
        return _add_info(settings, place, ".")
    if file is None:
        file = _find_file_beside(settings, folder)
    if file is None and str(place) == "ONLINE":
        hub_ids = [*_list_datasets(settings, "dataset"), *_list_datasets(settings, "eval_dataset")]
        return _add_info(settings, {name: {"hf_hub_url": name} for name in hub_ids}, str(place))
    file = file or Path(str(place), FILE)
    if found := user_paths.find_problem(file, user_paths.FILE):
        problem = f"{user_paths.shorten(str(file))}: {found.problem}"
        raise RecipeError(Fault(settings.where("dataset_dir"), problem, found.fix, code=found.code))
    try:
        text = file.read_text(encoding="utf-8")
        redaction.register_text(text)
        info = dict(json.loads(text))
        check_depth(info)
        secret_settings.register_secrets(info)
    except (OSError, ValueError, TypeError, RecursionError, OverflowError) as error:
        reason = (error.strerror if isinstance(error, OSError) else str(error)) or "its values are nested too deeply"
        problem = f"{file}: {reason}"
        fix = f"Add `--dataset-info FILE`, the {FILE} of LLaMA-Factory."
        raise RecipeError(Fault(settings.where("dataset_dir"), problem, fix, code="import.missing_file")) from None
    return _add_info(settings, info, str(file.parent))


def _find_file_beside(settings: Settings, folder: Path) -> Path | None:
    """Return the dataset_info.json near the file of settings; None = there is none, or LLaMA-Factory's own exists."""
    place = Path(str(settings.get("dataset_dir", "data")))
    if os.path.isfile(place / FILE):  # noqa: PTH113 (pathlib raises on a name that is too long)
        return None
    return next((path for path in (folder / place / FILE, folder / FILE) if os.path.isfile(path)), None)  # noqa: PTH113


def _add_info(settings: Settings, info: dict[str, Any], folder: str) -> Settings:
    """Return the settings with the descriptions of data sets and the folder of their files."""

    def where(name: str, *path: str | int) -> str:
        if name != INFO:
            return settings.where(name, *path)
        inside = isinstance(settings.get("dataset_dir"), dict)
        return settings.where("dataset_dir", *path) if inside else f"{FILE} {'.'.join(map(str, path))}"

    return Settings(settings.values | {INFO: info, FOLDER: folder}, where)


def _convert_table(settings: Settings) -> Iterator[Outcome]:
    """Yield the lines and the omitted settings that the table alone decides on."""
    stage = settings.get("stage", "sft")
    if stage not in ("sft", "pt"):
        problem = f"the value is {format_value(stage)}; trl_sft does supervised fine-tuning only"
        fix = "Import a file whose stage is `sft` or `pt`."
        raise settings.make_error("stage", problem, fix, code="import.other_objective")
    if settings.has("stage"):
        reason = "The rows are texts." if stage == "pt" else "trl_sft does supervised fine-tuning only."
        yield OmittedSetting("stage", reason)
    yield from _load_table().make_outcomes(settings)
    if not settings.has("model_name_or_path"):
        fix = "Set `model_name_or_path` to a folder or a hub id."
        raise settings.make_error("model_name_or_path", recipe_parts.NO_MODEL, fix, code="import.no_model")


def _convert_model(settings: Settings) -> Iterator[Outcome]:
    """Yield the attention, gradient checkpointing and new tokens."""
    table = _load_table()
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
    names = settings.list_enabled(("add_special_tokens", "add_tokens"))
    if names:
        tokens = [token for name in names for token in _split_list(settings.get(name))]
        yield RecipeLine(("tokenizer", "extra_special_tokens"), tokens, names)


def _convert_finetuning(settings: Settings) -> Iterator[Outcome]:
    """Yield the section `lora:`, which full fine-tuning does without."""
    table = _load_table()
    kind = settings.get("finetuning_type", "lora")
    if kind == "full":
        yield OmittedSetting("finetuning_type", "Without a section `lora:` a recipe trains all weights.")
        for name in settings.list_present(*_LORA_NAMES):
            yield OmittedSetting(name, "LLaMA-Factory reads it with `finetuning_type: lora`.")
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
    for name in settings.list_present("use_rslora", "use_dora"):
        yield RecipeLine(("lora", name), settings.get(name), (name,))
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


def _convert_quantization(settings: Settings) -> Iterator[Outcome]:
    """Yield the section `quantization:`."""
    table = _load_table()
    bits = settings.get("quantization_bit")
    if bits is None:
        for name in settings.list_present("quantization_method", "quantization_type", "double_quantization"):
            yield OmittedSetting(name, "It has no effect without `quantization_bit`.")
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


def _convert_data(settings: Settings) -> Iterator[Outcome]:
    """Yield the training rows and the evaluation set."""
    table = _load_table()
    names = _list_datasets(settings, "dataset")
    if not names:
        problem, fix = recipe_parts.NO_ROWS, f"Set `dataset` to a name in {FILE}."
        if settings.list_enabled(("do_predict", "export_dir", "infer_backend")) and not settings.get("do_train"):
            problem, fix = "the settings are not for training, and name no training rows", "Import a file that trains."
        raise settings.make_error("dataset", problem, fix, code="import.no_rows")
    functions: list[RowFunction] = []
    outcomes: list[Outcome] = []

    def make_sources(setting: str) -> list[Any]:
        return [
            llamafactory_rows.make_source(
                settings, table, name, setting=setting, functions=functions, outcomes=outcomes
            )
            for name in _list_datasets(settings, setting)
        ]

    sources = [_add_keys(source, keys) for source, keys in zip(make_sources("dataset"), _mix(settings), strict=True)]
    line_names = ("dataset", "dataset_dir", INFO, FOLDER, *settings.list_present("streaming", "mix_strategy"))
    yield RecipeLine(("data", "train"), recipe_parts.unwrap_single(sources), line_names)
    yield from _explain_mix(settings)
    if isinstance(settings.get("dataset_dir"), str):
        yield OmittedSetting("dataset_dir", f"The {FILE} in {settings.get(FOLDER)} is read.")
    if _list_datasets(settings, "eval_dataset"):
        sources = make_sources("eval_dataset")
        yield RecipeLine(("data", "eval"), recipe_parts.unwrap_single(sources), ("eval_dataset",))
        if settings.get("val_size"):
            yield OmittedSetting("val_size", "LLaMA-Factory does not take it beside `eval_dataset`.")
    elif settings.has("val_size"):
        yield from recipe_parts.convert_eval_fraction("val_size", settings.get("val_size"))
    yield from outcomes
    if functions:
        yield make_file(functions, "LLaMA-Factory")


def _list_datasets(settings: Settings, setting: str) -> list[str]:
    """Return the names of data sets, which LLaMA-Factory takes as a list or as a text with commas."""
    return [str(name) for name in _split_list(settings.get(setting, []))]


def _mix(settings: Settings) -> list[dict[str, Any]]:
    """Return the keys that each source has because of how the data sets are mixed. Raises RecipeError."""
    count = len(_list_datasets(settings, "dataset"))
    keys: dict[str, Any] = {"streaming": True} if settings.get("streaming") else {}
    if settings.get("mix_strategy", "concat") == "concat":
        return [keys] * count
    text = str(settings.get("interleave_probs") or "")
    try:
        weights = [float(part) for part in text.split(",") if part] or [1.0] * count
    except ValueError:
        weights = []
    if len(weights) != count:
        problem = f"the value is {format_value(text)}, and there are {count} data sets"
        fix = "Write one number for each data set, with commas between them."
        raise settings.make_error("interleave_probs", problem, fix, code="import.wrong_type")
    return [keys | {"weight": weight} for weight in weights]


def _explain_mix(settings: Settings) -> Iterator[Outcome]:
    """Yield what a mixture of data sets has and the sources lack."""
    if settings.get("max_samples"):
        yield OmittedSetting("max_samples", "Each source of the recipe is limited to this number of rows.")
    strategy = settings.get("mix_strategy", "concat")
    if strategy != "concat":
        reason = (
            "LLaMA-Factory draws rows until one source, or each, is used up. trl_sft ends an epoch after as many rows "
            "as all sources have."
        )
        yield OmittedSetting("mix_strategy", reason, "rows")
        if settings.has("interleave_probs"):
            yield OmittedSetting("interleave_probs", "They are the `weight` of each source.")
    elif settings.has("interleave_probs"):
        yield OmittedSetting("interleave_probs", "LLaMA-Factory reads it with a `mix_strategy` that interleaves.")
    if settings.get("disable_shuffling"):
        yield RecipeLine(("train", "train_sampling_strategy"), "sequential", ("disable_shuffling",))
    elif settings.has("disable_shuffling"):
        yield OmittedSetting("disable_shuffling", tables.OFF)


def _add_keys(source: Any, keys: dict[str, Any]) -> Any:
    """Return a source with more keys."""
    if not keys:
        return source
    return (source if isinstance(source, dict) else {"path": source}) | keys


def _convert_loss(settings: Settings) -> Iterator[Outcome]:
    """Yield which tokens carry loss."""
    if settings.get("stage") == "pt":
        for name in settings.list_present("train_on_prompt", "mask_history"):
            yield OmittedSetting(name, "Every token of a text carries loss.")
        return
    if settings.get("train_on_prompt"):
        word, names = "all", settings.list_present("train_on_prompt", "mask_history")
        yield RecipeLine(("data", "loss_on"), word, names)
        return
    if settings.get("mask_history"):
        yield RecipeLine(("data", "loss_on"), "last_turn", ("mask_history",))
    else:
        yield RecipeLine(("data", "loss_on"), "assistant", (), _load_table().default_note)
    for name in settings.list_present("train_on_prompt", "mask_history"):
        if not settings.get(name):
            yield OmittedSetting(name, tables.OFF)


def _convert_packing(settings: Settings) -> Iterator[Outcome]:
    """Yield whether several rows share a sequence; texts of the stage pt are joined and split."""
    names = settings.list_present("packing", "neat_packing")
    is_text = settings.get("stage") == "pt"
    if is_text and settings.get("packing", True):
        note = (
            "LLaMA-Factory joins all texts and splits them every `cutoff_len` tokens, so that all of them are trained."
        )
        yield RecipeLine(("train", "packing"), True, names, note)
        yield RecipeLine(("train", "packing_strategy"), "wrapped", ())
        allow_note = "Texts of a pack attend to each other, as in LLaMA-Factory."
        yield RecipeLine(("run", "allow"), ["leaking_packing"], (), allow_note)
        return
    if settings.get("neat_packing") or settings.get("packing"):
        yield RecipeLine(("train", "packing"), True, names)
        if not settings.get("neat_packing"):
            reason = (
                "Without `neat_packing` LLaMA-Factory lets the rows of a pack attend to each other. In trl_sft they do "
                "not."
            )
            yield OmittedSetting("packing", reason, "rows")
    elif names:
        yield RecipeLine(("train", "packing"), False, names)


def _convert_chat_template(settings: Settings) -> Iterator[Outcome]:
    """Yield the chat template: LLaMA-Factory has one for each family of models, trl_sft takes the tokenizer's."""
    is_thinking = settings.get("template") in _load_table().vocabulary["thinking_templates"]
    if settings.get("enable_thinking") is False and not is_thinking:
        yield OmittedSetting("enable_thinking", "LLaMA-Factory reads it with a template that has thoughts.")
    elif settings.get("enable_thinking") is False:
        yield RecipeLine(("tokenizer", "chat_template_kwargs"), {"enable_thinking": False}, ("enable_thinking",))
        reason = "LLaMA-Factory removes the thoughts of all answers. The recipe does not: remove them from the rows."
        yield OmittedSetting("enable_thinking", reason, "wording")
    elif settings.has("enable_thinking"):
        yield OmittedSetting("enable_thinking", "This is the default of a template.")
    if not settings.has("template"):
        return
    template = settings.get("template")
    name = _load_table().vocabulary["templates"].get(template, "")
    if settings.get("stage") == "pt":
        yield OmittedSetting("template", "The rows are texts.")
    elif name in paths.list_templates():
        note = "Its words may differ from those of the tokenizer's template, which trl_sft uses without this line."
        if name in _load_table().vocabulary["trimming_templates"]:
            note += " It removes spaces and line breaks around a message, which LLaMA-Factory keeps."
        yield RecipeLine(("tokenizer", "chat_template"), name, ("template",), note)
        yield from recipe_parts.explain_template("template", template, _load_table().vocabulary["template_differences"])
    else:
        problem = f"trl_sft has no template {format_value(template)} and uses the tokenizer's."
        reason = f"{problem} Compare the two with `preview`."
        yield OmittedSetting("template", reason, "wording")


def _list_training_arguments() -> set[str]:
    """Return the keys of `train:` that LLaMA-Factory takes: those of transformers, and not those of TRL."""
    own = set(fields.read_fields(sections.OWNERS["train"][1])) - set(fields.read_fields(_TRAINING_ARGUMENTS))
    return recipe_parts.list_train_keys() - own


def _convert_training(settings: Settings) -> Iterator[Outcome]:
    """Yield the fields of transformers' TrainingArguments, which are keys of `train:`, and its defaults."""
    table = _load_table()
    known = _list_training_arguments() - set(sections.REFUSED["train"]) - set(table.entries)
    if _stops_early(settings):
        known -= {"save_steps", "save_strategy"}
        yield from recipe_parts.omit_checkpoints(
            settings, ("save_steps", "eval_steps"), ("save_strategy", "eval_strategy")
        )
    for name in settings.values:
        if settings.has(name) and name in known:
            yield RecipeLine(("train", name), settings.get(name), (name,))
    for name, value in _TRANSFORMERS_DEFAULTS.items():
        if not settings.has(name):
            yield RecipeLine(("train", name), value, (), "This is transformers' default.")
    if settings.get("pure_bf16"):
        yield RecipeLine(("model", "dtype"), "bfloat16", ("pure_bf16",))
    if settings.get("pure_bf16") and not settings.has("bf16"):
        yield RecipeLine(("train", "bf16"), False, ("pure_bf16",), "LLaMA-Factory computes in the type of the weights.")
    elif settings.get("pure_bf16"):
        return
    elif not settings.has("bf16"):
        yield RecipeLine(("train", "bf16"), False, (), table.default_note)
    elif settings.get("bf16") and settings.get("finetuning_type", "lora") == "lora":
        note = "LLaMA-Factory loads frozen weights in this type and trains a float32 adapter."
        yield RecipeLine(("model", "dtype"), "bfloat16", ("bf16",), note)


def _stops_early(settings: Settings) -> bool:
    """Return whether a recipe for these settings stops early, which needs an evaluation set."""
    has_evaluation_set = bool(settings.get("eval_dataset")) or 0 < settings.get("val_size", 0) < 1
    return bool(settings.get("early_stopping_steps")) and has_evaluation_set


def _convert_early_stopping(settings: Settings) -> Iterator[Outcome]:
    """Yield when a run stops early: LLaMA-Factory then saves the best weights only if it is told to load them."""
    name = "early_stopping_steps"
    if settings.get(name) and not _stops_early(settings):
        yield OmittedSetting(name, "Without an evaluation set no run stops early.", "weights")
    if not _stops_early(settings):
        return
    yield RecipeLine(("run", "early_stopping"), {"patience": settings.get(name)}, (name,))
    if not settings.get("load_best_model_at_end"):
        reason = "LLaMA-Factory saves the weights of the last step, `run.early_stopping` those of the best evaluation."
        yield OmittedSetting(name, reason, "weights")


def _convert_launch(settings: Settings) -> Iterator[Outcome]:
    """Yield the sections `run:` and `launch:`."""
    yield from recipe_parts.convert_resume(settings)
    yield from recipe_parts.convert_launch(settings, fsdp=bool(settings.get("fsdp")))


STEPS = (
    _convert_table,
    _convert_model,
    _convert_finetuning,
    _convert_quantization,
    _convert_data,
    _convert_loss,
    _convert_packing,
    _convert_chat_template,
    _convert_training,
    _convert_early_stopping,
    _convert_launch,
)
