"""Parts of a recipe that several trainers' settings become in the same way: sources, checkpoints, launch.

Input: a user's settings. Output: values, lines and omitted settings. Deliberately not here: what only one tool has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trl_sft.importers.settings import OmittedSetting, Outcome, RecipeLine, Settings
from trl_sft.recipe import renamed_keys, sections, yaml_reader
from trl_sft.recipe.upstream import fields

NO_MODEL = "the settings name no model"
NO_ROWS = "the settings name no training rows"
ZERO_ENGINES = {0: "ddp", 1: "zero1", 2: "zero2", 3: "zero3"}  # the stage of ZeRO: the engine of `launch:`
_FILE_BUILDERS = ("json", "csv", "parquet", "arrow", "text")  # load_dataset takes these words as a path


def list_train_keys() -> set[str]:
    """Return the keys of `train:`, with the older names of the same settings."""
    keys = set(fields.read_fields(sections.OWNERS["train"][1]))
    for old_name, rule in renamed_keys.RENAMED_KEYS["train"].items():
        if rule.new in keys and not rule.values:
            keys = keys | {old_name}
    return keys


def get_current_name(name: str) -> str:
    """Return a key of `train:` under its newer name, if the installed version has that name."""
    new = renamed_keys.RENAMED_KEYS["train"][name].new
    return new if new in fields.read_fields(sections.OWNERS["train"][1]) else name


def make_source(path: str, **keys: Any) -> Any:
    """Return one entry of `data.train`: a mapping with the keys that are not empty, or the path alone."""
    filled = {name: value for name, value in keys.items() if value not in (None, "", {}, [])}
    return {"path": path} | filled if filled else path


def unwrap_single(sources: list[Any]) -> Any:
    """Return the value of `data.train` for these entries: a single one needs no list."""
    return sources[0] if len(sources) == 1 else sources


def omit_train_split(split: str | None) -> str | None:
    """Return a split, or None for `train`, which is the default of a recipe."""
    return None if split == "train" else split


def make_rename(columns: dict[str, str]) -> dict[str, str]:
    """Return `rename:` of a source: the columns whose new name differs."""
    return {old: new for old, new in columns.items() if old != new}


def resolve_data_files(path: str, data_files: Any, notes: list[str]) -> str:
    """Return the path of a data set whose settings have `data_files` beside a folder or a type of file.

    Args:
        path: A folder, a hub id, or a type of file such as `json`.
        data_files: A file, a list of files, or None.
        notes: Takes a sentence where the recipe cannot say the same.
    """
    if data_files is None:
        return path
    file = data_files[0] if isinstance(data_files, list) and len(data_files) == 1 else data_files
    is_folder = Path(path).is_dir()
    if not isinstance(file, str) or not (is_folder or path in _FILE_BUILDERS):
        notes.append(f"`data_files` of {path} is not in the recipe. Write each file as a path of its own.")
        return path
    return str(Path(path, file)) if is_folder else file


def convert_eval_fraction(settings: Settings, name: str) -> Iterator[Outcome]:
    """Yield what becomes of a setting that holds out a share of the rows, or a number of rows (1 and more)."""
    size = settings.get(name, 0)
    if size >= 1:
        reason = "This is a number of rows. Set `data.eval_fraction` to their share of all rows."
        yield OmittedSetting(name, reason, warn=True)
    elif size:
        note = "`train.seed` chooses the rows. The tool chooses other rows."
        yield RecipeLine(("data", "eval_fraction"), size, (name,), note)


def convert_resume(settings: Settings, note: str = "") -> Iterator[Outcome]:
    """Yield what becomes of `resume_from_checkpoint`, with a note for the value true."""
    value = settings.get("resume_from_checkpoint")
    if value is None:
        return
    word = {True: "auto", False: "never"}.get(value, value)
    yield RecipeLine(("run", "resume"), word, ("resume_from_checkpoint",), note if value is True else "")


def convert_launch(settings: Settings, *, fsdp: bool, config_note: str = "") -> Iterator[Outcome]:
    """Yield the section `launch:`, from `deepspeed`, or from `fsdp` and `fsdp_config`.

    Args:
        settings: The user's settings.
        fsdp: Whether they turn FSDP on.
        config_note: Sentences for the comment at the configuration of FSDP.
    """
    if settings.has("deepspeed"):
        config = settings.get("deepspeed")
        engine = _get_deepspeed_engine(config)
        if not engine:
            reason = "trl_sft cannot read the ZeRO stage. Set `launch: {engine: zero2, config: FILE}` in the recipe."
            yield OmittedSetting("deepspeed", reason, warn=True)
            return
        yield RecipeLine(("launch", "engine"), engine, ("deepspeed",))
        if engine != "ddp":
            yield RecipeLine(("launch", "config"), config, ("deepspeed",))
    elif fsdp:
        value = settings.get("fsdp")
        note = f"The value of `fsdp` was {yaml_reader.format_value(value)}." if value else ""
        yield RecipeLine(("launch", "engine"), "fsdp", ("fsdp", "fsdp_config"), note)
        if settings.get("fsdp_config"):
            yield RecipeLine(("launch", "config"), settings.get("fsdp_config"), ("fsdp_config",), config_note)


def _get_deepspeed_engine(config: Any) -> str:
    """Return the engine for a DeepSpeed configuration, a mapping or a JSON file; "" = its stage cannot be read."""
    try:
        values = config if isinstance(config, dict) else json.loads(Path(config).read_text(encoding="utf-8"))
        return ZERO_ENGINES.get((values.get("zero_optimization") or {}).get("stage", 0), "")
    except (OSError, ValueError, AttributeError, TypeError):
        return ""
