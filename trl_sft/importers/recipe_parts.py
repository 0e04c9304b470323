"""Parts of a recipe that several trainers' settings become in the same way: sources, checkpoints, launch.

Input: a user's settings. Output: values, lines and omitted settings. Deliberately not here: what only one tool has.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trl_sft import user_paths
from trl_sft.importers.settings import OmittedSetting, Outcome, RecipeLine, Settings, join_sentences
from trl_sft.recipe import renamed_keys, sections, yaml_reader
from trl_sft.recipe.upstream import fields

NO_MODEL = "the settings name no model"
NO_ROWS = "the settings name no training rows"
ZERO_ENGINES = {0: "ddp", 1: "zero1", 2: "zero2", 3: "zero3"}  # the stage of ZeRO: the engine of `launch:`
# https://huggingface.co/docs/transformers/attention_interface; a kernel of the hub has a slash in its name
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
_EXPERTS = ("eager", "batched_mm", "grouped_mm")
_STAGE = re.compile(r"z(?:ero)?_?-?([0-3])", re.IGNORECASE)  # in the name of a DeepSpeed file
_MAX_ROWS = 100_000  # of a file that is looked at
_FILE_BUILDERS = ("json", "csv", "parquet", "arrow", "text")  # load_dataset takes these words as a path


def list_train_keys() -> set[str]:
    """Return the keys of `train:`, with the older names of settings of upstream."""
    keys = set(fields.read_fields(sections.OWNERS["train"][1]))
    old = {name for name, rule in renamed_keys.RENAMED_KEYS["train"].items() if rule.reason == renamed_keys.REMOVED}
    return keys | old - {"tokenizer", "model_init"}


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


def explain_data_files(path: str) -> str:
    """Return the reason for `data_files` that a recipe cannot say: several files, or files of a data set on the hub."""
    if os.path.isdir(path) or path in _FILE_BUILDERS:  # noqa: PTH112 (as in `is_local`)
        return f"Write each file as a path of its own in place of {path}."
    return f"The recipe reads all files of {path}. Download these files, and write each as a path of its own."


def take_first_rows(split: str | None, number: int | None) -> str | None:
    """Return a split without the rows after the first `number`; None = it cannot be cut so, or there is nothing to cut.

    Args:
        split: A name, a slice or a sum of splits; None = `train`.
        number: How many rows; None = all.
    """
    name = split or "train"
    return f"{name}[:{number}]" if number and re.fullmatch(r"[\w.-]+", name) else None


def make_rename(columns: dict[str, str]) -> dict[str, str]:
    """Return `rename:` of a source: the columns whose new name differs."""
    return {old: new for old, new in columns.items() if old != new}


def is_local(path: Any) -> bool:
    """Return whether a data set is a file or a folder of this machine; pathlib raises on a name that is too long."""
    return isinstance(path, str) and (os.path.exists(path) or Path(path).suffix in sections.BUILDERS)  # noqa: PTH110


def read_first_row(path: Any) -> dict[str, Any]:
    """Return the first row of a JSON or JSONL file; empty = it cannot be read here."""
    try:
        with Path(str(path)).open(encoding="utf-8") as file:
            text = file.readline() if str(path).endswith(".jsonl") else file.read()
        rows = json.loads(text)
    except (OSError, ValueError):
        return {}
    row = rows[0] if isinstance(rows, list) and rows else rows
    return row if isinstance(row, dict) else {}


def read_rows(path: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON or JSONL file up to those of `_MAX_ROWS`; none = it cannot be read here."""
    try:
        with Path(str(path)).open(encoding="utf-8") as file:
            start = file.read(1)
            file.seek(0)
            is_list = start in ("[", "") or (not str(path).endswith(".jsonl") and start != "{")
            rows = json.load(file) if is_list else map(json.loads, filter(str.strip, file))
            for row in itertools.islice(rows, _MAX_ROWS):
                if isinstance(row, dict):
                    yield row
    except (OSError, ValueError, TypeError):
        return


def read_turns(path: Any, column: str) -> Iterator[dict[str, Any]]:
    """Yield the turns of the chats in a JSON or JSONL file."""
    for row in read_rows(path):
        turns = row.get(column)
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict):
                yield turn


def list_turn_keys(path: Any, column: str) -> list[str]:
    """Return the keys that turns of chats have in a JSON or JSONL file, in the order in which they come."""
    keys: dict[str, None] = {}
    for turn in read_turns(path, column):
        keys |= dict.fromkeys(turn)
    return list(keys)


def resolve_data_files(path: str, data_files: Any) -> str:
    """Return the path of a data set whose settings have `data_files` beside a folder or a type of file.

    Args:
        path: A folder, a hub id, or a type of file such as `json`.
        data_files: A file, a list of files, or None.

    Returns:
        The path; "" if a recipe cannot say the same.
    """
    if data_files is None:
        return path
    file = data_files[0] if isinstance(data_files, list) and len(data_files) == 1 else data_files
    is_folder = os.path.isdir(path)  # noqa: PTH112 (as in `is_local`)
    if not isinstance(file, str) or not (is_folder or path in _FILE_BUILDERS):
        return ""
    return str(Path(path, file)) if is_folder else file


def translate_value(line: RecipeLine) -> RecipeLine | str:
    """Return a line with a value that a recipe takes; or the reason why the value, a tool's own, is left out."""
    key, value = line.key, line.value
    is_attention = key == ("model", "attn_implementation") and isinstance(value, str)
    if is_attention and value not in _ATTENTION and "/" not in value and not value.startswith("paged|"):
        return f"transformers has no attention {value}. It chooses one, which gives the same result."
    if key == ("model", "experts_implementation") and isinstance(value, str) and value not in _EXPERTS:
        return f"transformers has no {value} for experts. It chooses a way that gives the same result."
    if key == ("train", "packing_strategy") and value == "ffd":
        return line._replace(value="bfd", note=join_sentences(line.note, "TRL calls it bfd since release 0.19."))
    return line


def convert_eval_fraction(name: str, value: Any, path: tuple[str, ...] = ()) -> Iterator[Outcome]:
    """Yield what becomes of a setting that holds out a share of the rows, or a number of rows (1 and more).

    Args:
        name: The setting.
        value: The share or the number.
        path: Leads from the value of the setting to the share.
    """
    if value is None:
        return
    if value >= 1:
        reason = (
            f"These are {value} rows, and `data.eval_fraction` is a share. Set it to {value} divided by the number of "
            "all rows. Without it nothing is evaluated."
        )
        yield OmittedSetting(name, reason, "rows", path)
    elif value:
        note = "`train.seed` chooses the rows. The tool chooses other rows."
        yield RecipeLine(("data", "eval_fraction"), value, (name,), note)
    else:
        yield OmittedSetting(name, "No rows are held out, as in a recipe.", "", path)


def explain_template(
    name: str, word: str, differences: Mapping[str, str], *, path: tuple[str | int, ...] = ()
) -> Iterator[Outcome]:
    """Yield what TRL's template of a name writes differently from the tool's template of that name.

    Args:
        name: The setting.
        word: The tool's name of the template.
        differences: A sentence for each template of the tool that differs.
        path: Leads from the value of the setting to the name of the template.
    """
    if word in differences:
        fix = "Compare the two with `preview`, or write the tool's template to a `.jinja` file."
        yield OmittedSetting(name, f"{differences[word]} {fix}", "wording", path)


def omit_checkpoints(settings: Settings, *pairs: tuple[str, str]) -> Iterator[Outcome]:
    """Yield the settings for checkpoints of a run that stops early, which has one at each evaluation.

    Args:
        settings: The user's settings.
        pairs: Settings for checkpoints, each with the one for evaluations that means the same.
    """
    for saving, evaluation in pairs:
        if not settings.has(saving):
            continue
        reason = "`run.early_stopping` writes a checkpoint at each evaluation"
        if settings.get(saving) == settings.get(evaluation):
            yield OmittedSetting(saving, f"{reason}, as the settings do.")
        else:
            yield OmittedSetting(saving, f"{reason}, and so the best weights can be those of any of them.", "weights")


def convert_resume(settings: Settings, note: str = "") -> Iterator[Outcome]:
    """Yield what becomes of `resume_from_checkpoint`, with a note for the value true."""
    value = settings.get("resume_from_checkpoint")
    if value is None:
        return
    word = {True: "auto", False: "never"}.get(value, value) if isinstance(value, bool) else value
    yield RecipeLine(("run", "resume"), word, ("resume_from_checkpoint",), note if value is True else "")


def convert_launch(settings: Settings, *, fsdp: bool) -> Iterator[Outcome]:
    """Yield the section `launch:`, from `deepspeed`, or from `fsdp` and `fsdp_config`.

    Args:
        settings: The user's settings.
        fsdp: Whether they turn FSDP on.
    """
    if settings.has("deepspeed"):
        config = settings.get("deepspeed")
        engine = _get_deepspeed_engine(config)
        if not engine and (stage := _STAGE.search(Path(str(config)).name)):
            engine = ZERO_ENGINES[int(stage[1])]
            reason = f"The file is not here. By its name it is for {engine}. Set `launch.config` to it."
            yield RecipeLine(("launch", "engine"), engine, ("deepspeed",))
            yield OmittedSetting("deepspeed", reason)
            return
        if not engine:
            reason = "trl_sft cannot read the ZeRO stage. Set `launch: {engine: zero2, config: FILE}` in the recipe."
            yield OmittedSetting("deepspeed", reason, "weights")
            return
        yield RecipeLine(("launch", "engine"), engine, ("deepspeed",))
        if engine != "ddp":
            yield RecipeLine(("launch", "config"), config, ("deepspeed",))
        if settings.get("fsdp") or settings.get("fsdp_config"):
            for name in settings.list_present("fsdp", "fsdp_config"):
                yield OmittedSetting(name, "DeepSpeed takes its place.", "unknown")
    elif fsdp:
        value = settings.get("fsdp")
        note = f"The value of `fsdp` was {yaml_reader.format_value(value)}." if value else ""
        yield RecipeLine(("launch", "engine"), "fsdp", ("fsdp", "fsdp_config"), note)
        if settings.get("fsdp_config"):
            yield RecipeLine(("launch", "config"), settings.get("fsdp_config"), ("fsdp_config",))


def _get_deepspeed_engine(config: Any) -> str:
    """Return the engine for a DeepSpeed configuration, a mapping or a JSON file; "" = its stage cannot be read."""
    if isinstance(config, str) and user_paths.find_problem(Path(config), user_paths.FILE):
        return ""
    try:
        values = config if isinstance(config, dict) else json.loads(Path(config).read_text(encoding="utf-8"))
        return ZERO_ENGINES.get((values.get("zero_optimization") or {}).get("stage", 0), "")
    except (OSError, ValueError, AttributeError, TypeError):
        return ""
