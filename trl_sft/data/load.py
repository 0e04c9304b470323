"""Loads one source of rows and finds out what its columns mean.

In: a `Source`. Out: a `Dataset` as datasets read it, columns renamed as the recipe says, and its layout.
Every fault names the file. Deliberately absent: what becomes of a row; `formatting` and `data` do that.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.data_files import FILES_TO_IGNORE

from trl_sft.data import formats, messages, text_files, wordings
from trl_sft.errors import DataError, Fault, RecipeError, UserError, first_line
from trl_sft.recipe import hub, sections
from trl_sft.recipe.checked import Source
from trl_sft.recipe.yaml_reader import Recipe
from trl_sft.suggestions import LOOSE, nearest_name

_SAVED = ("dataset_dict.json", "state.json")  # what Dataset.save_to_disk writes beside the rows
# part -> the split that a folder or a hub id gives where the source names none
_SPLITS = {"train": "train", "eval": "test"}


def load(recipe: Recipe, source: Source, part: str, head: int | None = None) -> Dataset:
    """Return the rows of a source as datasets reads them, renamed. Raises DataError.

    `head`: only so many from its beginning, without reading the rest; None = all.
    """
    rows = _loaded(recipe, source, part, head is not None)
    if isinstance(rows, IterableDataset):
        try:
            rows = _head(rows, head or 0)
        except Exception as error:
            raise unreadable(recipe, source, error) from None
    _check_renames(recipe, source, rows)
    return rows.rename_columns(source.rename) if source.rename else rows


def stream(recipe: Recipe, source: Source, part: str) -> IterableDataset:
    """Return the rows of a source as a stream, renamed. Raises DataError."""
    rows = _loaded(recipe, source, part, streaming=True)
    assert isinstance(rows, IterableDataset)
    return rows.rename_columns(source.rename) if source.rename else rows


def passed_over(source: Source) -> list[str]:
    """Return the files of rows in a folder that no split of it holds: datasets goes by names as in train.jsonl."""
    if source.builder or not source.location.files or _is_saved(source):
        return []
    folder = source.location.files[0]
    how = {name: value for name, value in source.load_kwargs.items() if name not in ("split", "streaming")}
    splits = load_dataset_builder(str(folder), **how).config.data_files or {}
    taken = {Path(file) for files in splits.values() for file in files}
    there = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in sections.BUILDERS]
    left = [path.relative_to(folder) for path in there if path not in taken and path.name not in FILES_TO_IGNORE]
    return [str(path) for path in left if not any(part.startswith(".") for part in path.parts)]


def _is_saved(source: Source) -> bool:
    """Tell whether a folder is what `Dataset.save_to_disk` wrote."""
    return any((source.location.files[0] / name).is_file() for name in _SAVED)


def _check_renames(recipe: Recipe, source: Source, rows: Dataset) -> None:
    """Refuse names that are not there, or there already. Raises DataError."""
    missing = [old for old in source.rename if old not in rows.column_names]
    if missing:
        near = nearest_name(missing[0], rows.column_names, cutoff=LOOSE)
        write = near or "{a column that is there: the name it shall have}"
        found = f"{source.name} has no column {missing[0]} (those present: {', '.join(rows.column_names)})"
        raise DataError(Fault(recipe.where((*source.key, "rename", missing[0])), found, write))
    taken = [new for old, new in source.rename.items() if new in rows.column_names and new not in source.rename]
    if taken or len(set(source.rename.values())) < len(source.rename):
        found = f"{source.name} has a column {taken[0]} already" if taken else "two columns get one name"
        raise DataError(
            Fault(recipe.where((*source.key, "rename")), found, "a name that is free, or rename that one too")
        )


def recognised(recipe: Recipe, source: Source, columns: Sequence[str], what: str = "") -> str:
    """Return the layout that the columns show. Raises DataError where they show none or several."""
    fits = formats.recognise(columns)
    if len(fits) == 1:
        return fits[0]
    have = f"{what or source.name} has the columns {', '.join(columns)}"
    where = recipe.where(source.key)
    if fits:
        raise DataError(Fault(where, f"{have}: they fit {' and '.join(fits)}", f"format: {' or '.join(fits)}"))
    wanted = "; ".join(f"{name} ({', '.join(layout.columns)})" for name, layout in formats.LAYOUTS.items())
    write = f"columns of a known format: {wanted}; rename: {{yours: ours}}; or wording: {{prompt: '...{{column}}...', "
    raise DataError(Fault(where, f"{have}: of no known format", write + "completion: '{column}'}"))


def used_columns(recipe: Recipe, source: Source, rows: Dataset, layout: str) -> set[str]:
    """Return the columns that formatting reads. Raises DataError where one is missing, RecipeError."""
    media = [column for column in rows.column_names if column in messages.MEDIA]
    if media:
        found = f"{source.name} has a column {media[0]}: this version trains on text alone"
        raise DataError(Fault(recipe.where(source.key), found, "rows of text, or TRL itself"))
    if source.function:
        return set(rows.column_names)
    needed, optional = _own_columns(recipe, source), set()
    if not needed:
        needed = set(formats.LAYOUTS[layout].columns) - ({"task"} if source.task else set())
        optional = set(formats.LAYOUTS[layout].optional)
    faults = []
    for column in sorted(needed - set(rows.column_names)):
        near = nearest_name(column, rows.column_names, cutoff=LOOSE)
        write = f"rename: {{{near or 'yours'}: {column}}}, or the column under that name"
        if isinstance(source.wording, dict):
            write = f"a column that is there{f', as {near}' if near else ''}"
        found = f"{source.name} has no column {column} (those present: {', '.join(rows.column_names)})"
        faults.append(Fault(recipe.where(source.key), found, write))
    if faults:
        raise DataError(faults)
    return needed | optional | {formats.LABEL}


def _from_disk(source: Source, keywords: dict[str, Any]) -> Dataset | IterableDataset:
    """Return the rows that `save_to_disk` wrote, of one of its splits where it has several."""
    rows = load_from_disk(str(source.location.files[0]))
    if "split" in source.load_kwargs and not isinstance(rows, DatasetDict):
        raise ValueError(f"split: {source.load_kwargs['split']}, but it was saved as one data set without splits")
    if isinstance(rows, DatasetDict):
        if keywords["split"] not in rows:
            raise ValueError(f"no split {keywords['split']}; it has {', '.join(rows)}")
        rows = rows[keywords["split"]]
    return rows.to_iterable_dataset() if keywords["streaming"] else rows


def _head(rows: IterableDataset, number: int) -> Dataset:
    """Return the first rows of a stream."""
    table = next(iter(rows.with_format("arrow").iter(number)), None)
    return Dataset.from_dict({}) if table is None else Dataset(table)


def _own_columns(recipe: Recipe, source: Source) -> set[str]:
    """Return the columns that a wording of the recipe's own names; empty = it has none."""
    if not isinstance(source.wording, dict):
        return set()
    where = recipe.where((*source.key, "wording"))
    try:
        needed = {name for part in source.wording.values() for name in wordings.fields(part)}
    except messages.FormatError as error:
        raise RecipeError(Fault(where, error.problem, error.fix)) from None
    if set(source.wording) not in ({"prompt", "completion"}, {"text"}):
        raise RecipeError(Fault(where, f"a wording with {', '.join(source.wording)}", "prompt and completion, or text"))
    if not needed:
        raise RecipeError(Fault(where, "a wording without a column: every row the same", "columns in braces"))
    return needed


def _loaded(recipe: Recipe, source: Source, part: str, streaming: bool) -> Dataset | IterableDataset:
    """Return the rows of a source as they are. Foreign errors become DataError here."""
    keywords = {"split": _SPLITS[part]} | source.load_kwargs | {"streaming": streaming}
    where = recipe.where(source.key)
    files = [glob.escape(str(file)) for file in source.location.files]  # datasets takes them for patterns
    for file in source.location.files:
        if file.is_file() and file.stat().st_size == 0:
            raise DataError(Fault(where, f"{source.name} is empty: 0 bytes", "a file with rows"))
    try:
        if source.builder:
            keywords["split"] = source.load_kwargs.get("split", "train")
            rows = load_dataset(source.builder, data_files=files, **keywords)
        elif source.location.files and _is_saved(source):
            rows = _from_disk(source, keywords)
        else:
            if not source.location.files:
                hub.check_id("dataset", source.location.name, keywords)
            rows = load_dataset(source.location.name, **keywords)
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        raise unreadable(recipe, source, error) from None
    return rows if isinstance(rows, Dataset | IterableDataset) else concatenate_datasets(rows)


def unreadable(recipe: Recipe, source: Source, error: Exception) -> UserError:
    """Return what keeps a source from being read in our words."""
    where = recipe.where(source.key)
    told = None if source.location.files else hub.translate_error(where, source.location.name, error)
    if told is not None:
        return told
    files = source.location.files if source.builder == "json" else ()
    bad = [fault for file in files for fault in text_files.faults(file)]
    cause = error.__cause__ or error
    found, write = f"{source.name} cannot be read: {first_line(cause)}", "a file of that kind, or its keywords"
    if "corresponds to no data" in str(error):
        found, write = f"{source.name} has no rows", "a source with rows"
    elif "split" in str(error):
        write = "split: one that it has"
    return DataError(bad or Fault(where, found, write))
