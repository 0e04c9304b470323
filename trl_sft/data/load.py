"""Reads the rows of one source with `datasets` and renames its columns.

Inputs: a `Source` of the recipe. Outputs: a `Dataset` (or an `IterableDataset`), or a fault that names the file
and, where JSON is broken, the line and the column, which upstream's readers do not report.
Deliberately not here: what the columns mean (`source_format`) and what becomes of a row (`pipeline`).
"""

from __future__ import annotations

import glob
from pathlib import Path

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

from trl_sft.data.file_diagnosis import diagnose
from trl_sft.errors import DataError, Fault, UserError, first_line
from trl_sft.recipe import hub, sections
from trl_sft.recipe.checked import Source
from trl_sft.recipe.yaml_reader import Recipe
from trl_sft.suggestions import LOOSE, nearest_name

MAX_SHOWN = 5  # faulty lines, or rows, that are listed one by one
_SAVED_DATASET_FILES = ("dataset_dict.json", "state.json")  # what Dataset.save_to_disk writes beside the rows
# key below `data:` -> the split of a folder or a hub id where the source names none
_DEFAULT_SPLITS = {"train": "train", "eval": "test"}


def load_source(recipe: Recipe, source: Source, max_rows: int | None = None) -> Dataset:
    """Return the rows of a source as `datasets` reads them, with the columns renamed.

    Args:
        recipe: the recipe, for the place of a fault.
        source: the entry of `data.train` or `data.eval`.
        max_rows: the number of rows to read from the beginning, without reading the rest; None = all rows.

    Raises:
        DataError: the source cannot be read, or `rename` does not fit its columns.

    """
    rows = _load_dataset(recipe, source, streaming=max_rows is not None)
    if isinstance(rows, IterableDataset):
        try:
            rows = _first_rows(rows, max_rows or 0)
        except Exception as error:
            raise explain_unreadable(recipe, source, error) from None
    if not source.rename:
        return rows
    _check_renames(recipe, source, rows)
    return rows.rename_columns(source.rename)


def stream_source(recipe: Recipe, source: Source) -> IterableDataset:
    """Return the rows of a source as a stream, with the columns renamed. Raises DataError."""
    rows = _load_dataset(recipe, source, streaming=True)
    assert isinstance(rows, IterableDataset)
    return rows.rename_columns(source.rename) if source.rename else rows


def find_unread_files(source: Source) -> list[str]:
    """Return the data files in a folder that `datasets` does not read, because their names belong to no split."""
    if source.builder or not source.location.files or _is_saved_dataset(source):
        return []
    folder = source.location.files[0]
    keywords = {name: value for name, value in source.load_kwargs.items() if name not in ("split", "streaming")}
    splits = load_dataset_builder(str(folder), **keywords).config.data_files or {}
    read_files = {Path(file) for files in splits.values() for file in files}
    unread = []
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in sections.BUILDERS or path in read_files or path.name in FILES_TO_IGNORE:
            continue
        relative = path.relative_to(folder)
        if not any(part.startswith(".") for part in relative.parts):
            unread.append(str(relative))
    return unread


def explain_unreadable(recipe: Recipe, source: Source, error: Exception) -> UserError:
    """Return our error for an exception with which `datasets`, pyarrow or the hub refused a source."""
    where = recipe.where(source.key)
    hub_error = None if source.location.files else hub.translate_error(where, source.location.name, error)
    if hub_error is not None:
        return hub_error
    faults = [
        fault
        for file in source.location.files
        if file.is_file()
        for fault in diagnose.explain_file(recipe, source, file)
    ]
    if faults:
        return DataError(faults)
    if "corresponds to no data" in str(error):
        return DataError(
            Fault(where, f"{source.name} has no rows", "Name a source that has rows.", code="data.no_rows")
        )
    cause = error.__cause__ or error
    if isinstance(cause, UnicodeDecodeError):
        fix = "Save the file as UTF-8, or set `encoding`."
    elif "split" in str(error):
        fix = "Set `split` to one that the source has."
    else:
        fix = "Name a file whose content fits its suffix, or correct the keys of the source."
    return DataError(
        Fault(where, f"{source.name} cannot be read: {first_line(cause)}", fix, code="data.unreadable_source")
    )


def _load_dataset(recipe: Recipe, source: Source, streaming: bool) -> Dataset | IterableDataset:
    """Return the rows of a source as they are; exceptions of other packages become DataError here."""
    for file in source.location.files:
        if file.is_file() and file.stat().st_size == 0:
            where = recipe.where(source.key)
            raise DataError(
                Fault(where, f"{source.name} is empty: 0 bytes", "Name a file that has rows.", code="data.no_rows")
            )
        if file.is_file() and (faults := diagnose.check_head(recipe, source, file)):
            raise DataError(faults)
    default_split = "train" if source.builder else _DEFAULT_SPLITS[str(source.key[1])]
    keywords = {"split": default_split} | source.load_kwargs | {"streaming": streaming}
    try:
        if source.builder:
            files = [glob.escape(str(file)) for file in source.location.files]  # datasets reads names as patterns
            rows = load_dataset(source.builder, data_files=files, **keywords)
        elif source.location.files and _is_saved_dataset(source):
            rows = _load_saved_dataset(source, str(keywords["split"]), streaming)
        else:
            if not source.location.files:
                hub.check_id("dataset", source.location.name, keywords)
            rows = load_dataset(source.location.name, **keywords)
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        raise explain_unreadable(recipe, source, error) from None
    return rows if isinstance(rows, Dataset | IterableDataset) else concatenate_datasets(rows)


def _is_saved_dataset(source: Source) -> bool:
    """Tell whether a folder is what `Dataset.save_to_disk` wrote."""
    return any((source.location.files[0] / name).is_file() for name in _SAVED_DATASET_FILES)


def _load_saved_dataset(source: Source, split: str, streaming: bool) -> Dataset | IterableDataset:
    """Return the rows that `save_to_disk` wrote; of one split, where several were saved."""
    rows = load_from_disk(str(source.location.files[0]))
    if isinstance(rows, DatasetDict):
        if split not in rows:
            raise ValueError(f"no split {split}; it has {', '.join(rows)}")
        rows = rows[split]
    elif "split" in source.load_kwargs:
        raise ValueError(f"split: {split}, but it was saved as one data set without splits")
    return rows.to_iterable_dataset() if streaming else rows


def _first_rows(rows: IterableDataset, number: int) -> Dataset:
    """Return the first rows of a stream."""
    table = next(iter(rows.with_format("arrow").iter(number)), None)
    return Dataset.from_dict({}) if table is None else Dataset(table)


def _check_renames(recipe: Recipe, source: Source, rows: Dataset) -> None:
    """Refuse to rename a column that is missing, or to a name that another column has. Raises DataError."""
    columns = ", ".join(rows.column_names)
    for old in source.rename:
        if old not in rows.column_names:
            nearest = nearest_name(old, rows.column_names, cutoff=LOOSE)
            fix = f"Did you mean `{nearest}`?" if nearest else "Name a column that the source has."
            problem = f"{source.name} has no column {old}; its columns are {columns}"
            raise DataError(Fault(recipe.where((*source.key, "rename", old)), problem, fix, code="data.missing_column"))
    where = recipe.where((*source.key, "rename"))
    for new in source.rename.values():
        if new in rows.column_names and new not in source.rename:
            fix = "Choose another name, or rename that column too."
            raise DataError(
                Fault(where, f"{source.name} already has a column {new}", fix, code="data.duplicate_column")
            )
    if len(set(source.rename.values())) < len(source.rename):
        raise DataError(
            Fault(
                where,
                "two columns get the same name",
                "Give each column a name of its own.",
                code="data.duplicate_column",
            )
        )
