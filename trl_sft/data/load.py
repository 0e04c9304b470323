"""Reads the rows of one source: files of JSON, CSV and text without types, all others as `datasets` reads them.

Inputs: a `Source` of the recipe. Outputs: `SourceRows`, whose rows `source_rows.decode_batch` parses: of all files, of
their beginning, or batch by batch as a stream; the same rows each time. Files of folders and of the hub are read like
files that a recipe names. What is cached has the digest of the files' content in its key, never their time alone.
Every exception of another package becomes a fault here; `explain_unreadable` is the one place for what is wrong with a
file. Deliberately not here: how a file is read (`readers`), what the columns mean (`source_format`), and what becomes
of a row (`pipeline`).
"""

from __future__ import annotations

import contextlib
import glob
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    ReadInstruction,
    concatenate_datasets,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError

from trl_sft import disk
from trl_sft.console import format_names
from trl_sft.data import folder, folder_listing, hub_files, missing_split
from trl_sft.data.file_diagnosis import diagnose, upstream_message
from trl_sft.data.hub_files import SourceFiles, SplitError
from trl_sft.data.messages import FormatError
from trl_sft.data.readers import record_store
from trl_sft.data.readers.csv_records import OptionError
from trl_sft.data.readers.data_file import CompressionError, DataFile, digest_file
from trl_sft.data.readers.record_block import BlankLinesError, LongRecordError, ReadingError
from trl_sft.data.readers.record_store import FileError, RecordReader
from trl_sft.data.source_batches import join_batches, take_rows
from trl_sft.data.source_rows import FILE, RECORD, RowPlaces, SourceRows, place_records
from trl_sft.data.typed_rows import make_record_tables, read_schema
from trl_sft.errors import DataError, Edit, Fault, LaunchError, NotAsAsked, Place, RecipeError, UserError, first_line
from trl_sft.recipe import hub
from trl_sft.recipe.checked import Source
from trl_sft.recipe.yaml_reader import Recipe
from trl_sft.suggestions import LOOSE, is_misspelling, nearest_name

MAX_SHOWN = 5  # faulty lines, or rows, that are listed one by one
_SAVED_DATASET_FILES = ("dataset_dict.json", "state.json")  # what Dataset.save_to_disk writes beside the rows
# key below `data:` -> the split of a folder or a hub id where the source names none
_DEFAULT_SPLITS = {"train": "train", "eval": "test"}
_STREAM_ROWS = 1000  # rows of a batch of a stream
_REPEATED_COLUMN = re.compile(r"Multiple matches for FieldRef\.Name\((.+?)\)")  # pyarrow
# `datasets` for a column of a type that it does not have
_UNREADABLE_TYPE = re.compile(r"Arrow type (\S.*) \('(.+)'\)> does not have a datasets dtype equivalent")
_SPLIT = re.compile(r"(\w+(?:\.\w+)*)(\[[^]]*\](?:\(\w+\))?)?")  # the name of a split, and a part of it


def load_source(recipe: Recipe, source: Source, max_rows: int | None = None) -> SourceRows:
    """Return the rows of a source.

    Args:
        recipe: the recipe, for the place of a fault.
        source: the entry of `data.train` or `data.eval`.
        max_rows: the number of rows to read from the beginning, without reading the rest; None = all rows.

    Raises:
        DataError: the source cannot be read, or `rename` does not fit its columns.
        RecipeError: a key of the source cannot be carried out.

    """
    if max_rows is not None:
        batches = take_rows(stream_source(recipe, source), max_rows)
        rows = join_batches(batches)
        if batches:
            rows = rows._replace(unread_files=batches[0].unread_files, splits=batches[0].splits)
    else:
        with _explaining(recipe, source):
            rows = _load_all(recipe, source)
    if rows.unparsed:
        _refuse_unparsed(recipe, source, rows)
    is_single = len(rows.rows) == 1 and source.builder == "json" and not source.function
    if is_single and (faults := diagnose.explain_columns(recipe, source, stored=True)):  # the row is a file of columns
        raise DataError(faults)
    if source.rename:
        _check_renames(recipe, source, list(rows.columns))
        columns = {source.rename.get(column, column): count for column, count in rows.columns.items()}
        rows = rows._replace(columns=columns, rename=source.rename)
    return rows


def stream_source(recipe: Recipe, source: Source) -> Iterator[SourceRows]:
    """Yield the rows of a source batch by batch, reading on only when the next batch is due.

    Raises:
        DataError: the source cannot be read.
        RecipeError: a key of the source cannot be carried out.

    """
    with _explaining(recipe, source):
        for rows in _stream_all(recipe, source):
            if rows.unparsed:
                _refuse_unparsed(recipe, source, rows)
            yield rows._replace(rename=source.rename)


def list_read_splits(source: Source) -> set[str]:
    """Return the names of the splits that a source reads."""
    spec = source.load_kwargs.get("split") or _default_split(source)
    return {name for part in (spec if isinstance(spec, list) else [spec]) for name in _split_names(part)}


def explain_unreadable(recipe: Recipe, source: Source, error: Exception) -> UserError:
    """Return our error for an exception with which a reader, `datasets`, pyarrow or the hub refused a source."""
    where = recipe.where(source.key)
    file: DataFile | None = None
    if isinstance(error, FileError):
        file, error = error.file, error.error
    if isinstance(error, LongRecordError | BlankLinesError) and file is not None:
        return DataError(Fault(f"{file.name}:{error.line}", error.problem, error.fix, code=error.code))
    if disk_fault := disk.explain(error):  # of the cache: the source itself is only read
        return LaunchError(disk_fault)
    if not isinstance(error, OptionError) and (faults := _diagnose_files(recipe, source, file)):
        return DataError(faults)
    if isinstance(error, ReadingError) and file is not None:
        return DataError(Fault(f"{file.name}:{error.line}", error.problem, error.fix, code=error.code))
    if isinstance(error, OptionError):
        return RecipeError(Fault(recipe.where((*source.key, error.key)), error.problem, error.fix, code=error.code))
    name = file.name if file is not None else source.name
    if isinstance(error, CompressionError):
        return DataError(Fault(where, f"{name} cannot be read: {error}", error.fix, code="data.unreadable_source"))
    hub_error = None if source.location.files else hub.translate_error(where, source.location.name, error)
    if hub_error is not None:
        return hub_error
    if source.location.files and isinstance(error, DataFilesNotFoundError | EmptyDatasetError):
        return DataError(folder.explain_no_data(recipe, source))
    if "corresponds to no data" in str(error) or "BatchSize must be greater than 0" in str(error.__cause__):
        return DataError(Fault(where, f"{name} has no rows", "Name a source that has rows.", code="data.no_rows"))
    cause = error.__cause__ or error
    is_split = isinstance(error, SplitError)
    fault = missing_split.explain(recipe, source, error) if is_split else _explain_typed_column(where, name, cause)
    if fault is not None:
        return DataError(fault)
    if isinstance(cause, UnicodeDecodeError):
        fix = "Save the file as UTF-8, or set `encoding`."
    elif "split" in str(error).lower():
        fix = "Set `split` to one that the source has."
    else:
        fix = "Name a file whose content fits its suffix, or correct the keys of the source."
    problem = f"{name} cannot be read: {first_line(cause)}"
    if whole_message := upstream_message.keep_message(source.name, error):
        problem = f"{problem}. {whole_message}"
    return DataError(Fault(where, problem, fix, code="data.unreadable_source"))


def _explain_typed_column(where: Place | str, name: str, cause: BaseException) -> Fault | None:
    """Return the fault of a file of typed columns of which one cannot be read; None = the cause is another one."""
    if repeated := _REPEATED_COLUMN.search(str(cause)):
        fix = "Rename or drop one of the two in the file."
        return Fault(where, f"{name} has the column {repeated[1]} twice", fix, code="data.duplicate_column")
    if unreadable := _UNREADABLE_TYPE.search(str(cause)):
        problem = f"{name} has the column {unreadable[2]} of the Arrow type {unreadable[1]}>, which cannot be read"
        fix = "Save the file without that column, or with its values as text: `table.drop_columns([...])` in pyarrow."
        return Fault(where, problem, fix, code="data.unreadable_source")
    return None


def _diagnose_files(recipe: Recipe, source: Source, file: DataFile | None) -> list[Fault]:
    """Return what the bytes of a file show to be wrong; without a file those of each file of the source."""
    paths = list(source.location.files) if file is None else [Path(file.path)]
    return [fault for path in paths if path.is_file() for fault in diagnose.explain_file(recipe, source, path)]


@contextlib.contextmanager
def _explaining(recipe: Recipe, source: Source) -> Iterator[None]:
    """Turn exceptions of readers and of other packages into faults."""
    try:
        yield
    except (UserError, NotAsAsked, MemoryError):
        raise
    except Exception as error:
        raise explain_unreadable(recipe, source, error) from None


def _load_all(recipe: Recipe, source: Source) -> SourceRows:
    """Return all rows of a source, under the names of its own columns."""
    split = source.load_kwargs.get("split") or _default_split(source)
    if source.location.files and not source.builder and _is_saved_dataset(source):
        return _make_typed_rows(_load_saved_dataset(source, split), DataFile(source.name, ""))
    files = _find_files(recipe, source)
    return _load_files(source, files, split)._replace(unread_files=files.unread, splits=files.list_names())


def _load_files(source: Source, files: SourceFiles, split: Any) -> SourceRows:
    """Return all rows of the files of a source that belong to the splits."""
    if files.builder in record_store.BUILDERS:
        return _load_records(source, files, split)
    if source.builder:
        return _load_typed_files(source, files, split)
    if not files.chosen_by_datasets:
        names = _split_names(split) if isinstance(split, str) else list(files.splits)
        local = hub_files.download_splits(source, files, names)
        every = [file for name in names for file in hub_files.get_split(local, name)]
        if _have_different_types(every):
            return _load_different_files(source, local, every, split=split)
    with _listing_once(source):
        rows = load_dataset(source.location.name, **({"split": split} | dict(source.load_kwargs)))
    rows = rows if isinstance(rows, Dataset) else concatenate_datasets(rows)
    return _make_typed_rows(rows, DataFile(source.name, ""))


def _stream_all(recipe: Recipe, source: Source) -> Iterator[SourceRows]:
    """Yield all rows of a source batch by batch, under the names of its own columns."""
    split = str(source.load_kwargs.get("split") or _default_split(source))
    if "[" in split and not source.load_kwargs.get("streaming"):  # the first rows of a part, for a preview
        yield _load_all(recipe, source)
        return
    if source.location.files and not source.builder and _is_saved_dataset(source):
        yield from _split_rows(_load_saved_dataset(source, split), DataFile(source.name, ""))
        return
    files = _find_files(recipe, source)
    for rows in _stream_files(source, files, split):
        yield rows._replace(unread_files=files.unread, splits=files.list_names())


def _stream_files(source: Source, files: SourceFiles, split: str) -> Iterator[SourceRows]:
    """Yield the rows of the files of a source that belong to the splits, batch by batch."""
    if files.builder in record_store.BUILDERS:
        chosen = [file for name in _split_names(split, streaming=True) for file in hub_files.get_split(files, name)]
        for table in record_store.read_tables(_make_reader(files), chosen):
            rows = Dataset(table)
            summary = record_store.summarize(table[0].to_pylist())
            yield SourceRows(rows, summary.columns, place_records(chosen, rows), unparsed=summary.unparsed)
        return
    keywords = {"split": split} | dict(source.load_kwargs) | {"streaming": True}
    if not (
        files.has_declared_types or files.chosen_by_datasets
    ):  # file by file: nothing is cast to the types of the first
        if not source.builder:
            keywords = dict(files.keywords) | {"split": "train", "streaming": True}
            keywords |= {name: value for name, value in source.load_kwargs.items() if name == "token"}
        names = ["train"] if source.builder else _split_names(split, streaming=True)
        for file in (file for name in names for file in hub_files.get_split(files, name)):
            stream = load_dataset(files.builder, data_files=[glob.escape(file.path)], **keywords)
            yield from _iterate_stream(stream, file._replace(download_config=None))
    else:
        with _listing_once(source):
            stream = load_dataset(source.location.name, **keywords)
        yield from _iterate_stream(stream, DataFile(source.name, ""))


def _iterate_stream(stream: IterableDataset, file: DataFile) -> Iterator[SourceRows]:
    """Yield the rows of a stream of typed columns batch by batch."""
    start = 0
    for table in stream.with_format("arrow").iter(_STREAM_ROWS):
        features = stream.features or datasets.Features.from_arrow_schema(table.schema)
        rows = Dataset(table, info=datasets.DatasetInfo(features=features))
        yield _make_typed_rows(rows, file, first_row=-start)
        start += len(rows)


def _split_rows(rows: Dataset, file: DataFile) -> Iterator[SourceRows]:
    """Yield the rows of a dataset batch by batch."""
    for start in range(0, len(rows), _STREAM_ROWS):
        batch = rows.select(range(start, min(start + _STREAM_ROWS, len(rows))))
        yield _make_typed_rows(batch, file, first_row=-start)


def _listing_once(source: Source) -> contextlib.AbstractContextManager[None]:
    """Return the context in which `datasets` lists the folder of a source once; the hub lists its files by itself."""
    return folder_listing.list_once(source.location.files[0]) if source.location.files else contextlib.nullcontext()


def _find_files(recipe: Recipe, source: Source) -> SourceFiles:
    """Return the files of a source by split. Raises DataError."""
    if source.builder:
        for file in source.location.files:
            if file.stat().st_size == 0:
                where = recipe.where(source.key)
                problem = f"{file.name} is empty: 0 bytes"
                raise DataError(Fault(where, problem, "Name a file that has rows.", code="data.no_rows"))
        folder.check_heads(recipe, source, source.location.files)
        files = [DataFile(file.name, str(file)) for file in source.location.files]
        return SourceFiles(source.builder, {"train": files}, source.load_kwargs)
    if not source.location.files:
        return hub_files.find_files(source)
    return _find_folder_files(recipe, source)


def _find_folder_files(recipe: Recipe, source: Source) -> SourceFiles:
    """Return the files of a folder by split. Raises DataError."""
    path = source.location.files[0]
    every = folder.list_files(path)
    if documents := folder.find_documents(path, every):
        return folder.make_document_files(recipe, source, documents, every=every)
    with folder_listing.list_once(path):
        builder = load_dataset_builder(source.location.name, **hub_files.select_builder_keywords(source))
    name = type(builder).__module__.rpartition(".")[2]
    found = builder.config.data_files or {}
    read_files = [Path(file) for files in found.values() for file in files]
    folder.check(recipe, source, builder_name=name, files=every, read_files=read_files)
    splits = {
        str(split): [DataFile(str(Path(file).relative_to(path)), file) for file in files]
        for split, files in found.items()
    }
    is_record = name in record_store.BUILDERS
    has_different_types = name in hub_files.TYPED_BUILDERS and any(map(_have_different_types, splits.values()))
    return SourceFiles(
        name,
        splits,
        hub_files.list_config_keywords(builder.config),
        chosen_by_datasets=not (is_record or has_different_types),
        unread=folder.find_unread(path, every, {str(file) for file in read_files}),
    )


def _make_reader(files: SourceFiles) -> RecordReader:
    """Return the reader of the files of a source. Raises OptionError."""
    return record_store.make_reader(files.builder, files.keywords)


def _load_records(source: Source, files: SourceFiles, split: Any) -> SourceRows:
    """Return the rows of files of JSON, CSV or text, of the splits that `split` names, or of parts of them."""
    specs = split if isinstance(split, list) else [split]
    splits = list(dict.fromkeys(name for spec in specs for name in _split_names(spec)))
    files = hub_files.download_splits(source, files, splits)
    chosen = [(name, file) for name in splits for file in hub_files.get_split(files, name)]
    fresh = source.load_kwargs.get("download_mode") not in (None, "reuse_dataset_if_exists")
    stored = record_store.store_records(
        _make_reader(files), [file for _, file in chosen], _cache_folder(source), fresh=fresh
    )
    lengths: Counter[str] = Counter()
    for (name, _), length in zip(chosen, stored.rows_per_file, strict=True):
        lengths[name] += length
    starts = dict(zip(splits, np.cumsum([0, *(lengths[name] for name in splits)]).tolist(), strict=False))
    parts = [part for spec in specs for part in ReadInstruction.from_spec(spec).to_absolute(lengths)]
    numbers = [np.arange(starts[part.splitname] + part.from_, starts[part.splitname] + part.to) for part in parts]
    rows, summary = stored.rows, stored.summary
    if len(parts) != len(splits) or sum(map(len, numbers)) != len(rows):
        rows = rows.select(np.concatenate(numbers))
        summary = record_store.summarize(rows[RECORD][:])
    places = place_records([file for _, file in chosen], rows)
    return SourceRows(rows, summary.columns, places, unparsed=summary.unparsed)


def _load_typed_files(source: Source, files: SourceFiles, split: Any) -> SourceRows:
    """Return the rows of files with types of their own; without a cast where the files differ in their types."""
    every = files.splits["train"]
    if _have_different_types(every):
        return _load_different_files(source, files, every, split=split)
    rows = _load_typed(source, files, every, split=split)
    schemas = [read_schema(file.path) for file in every]
    is_counted = files.builder == "parquet" or len(every) == 1
    if split != "train" or not is_counted or "filters" in source.load_kwargs:
        return _make_typed_rows(rows, DataFile(source.name, ""))
    lengths = [schema.num_rows for schema in schemas]
    places = RowPlaces(tuple(every), None, (0, *np.cumsum(lengths[:-1]).tolist()))
    return _make_typed_rows(rows, every[0])._replace(places=places)


def _have_different_types(files: Sequence[DataFile]) -> bool:
    """Tell whether the columns of files on this machine, or their types, differ."""
    return len({read_schema(file.path).columns for file in files}) > 1


def _load_different_files(source: Source, files: SourceFiles, every: Sequence[DataFile], *, split: Any) -> SourceRows:
    """Return the rows of files of different types, which are not cast to one another.

    Args:
        source: the source.
        files: how its files are read.
        every: those of them that are read.
        split: the splits that they belong to.

    """
    if not isinstance(split, str) or "[" in split:
        problem = f"the files have different types, so no part of them can be read: {split}"
        raise OptionError("split", problem, "Name whole splits, or one file.", code="data.wrong_keyword")
    parts = [_load_typed(source, files, [file], split="train") for file in every]
    key = record_store.digest_key([digest_file(file) for file in every], repr(dict(files.keywords)))
    stored = record_store.store_tables(
        lambda: make_record_tables(parts), num_files=len(every), root=_cache_folder(source), key=key
    )
    return SourceRows(stored.rows, stored.summary.columns, place_records(every, stored.rows))


def _load_typed(source: Source, files: SourceFiles, chosen: Sequence[DataFile], *, split: Any) -> Dataset:
    """Return the rows of files of one type; what `datasets` caches of them lies in a folder of their digest."""
    digests = [digest_file(file) for file in chosen]
    folder = _cache_folder(source) / "trl_sft_files" / record_store.digest_key(digests)
    patterns = [glob.escape(file.path) for file in chosen]  # datasets reads names as patterns
    keywords = dict(files.keywords) | {"split": split, "cache_dir": str(folder)}
    rows = load_dataset(files.builder, data_files=patterns, **keywords)
    return rows if isinstance(rows, Dataset) else concatenate_datasets(rows)


def _cache_folder(source: Source) -> Path:
    """Return the folder of the cache: `cache_dir` of the source, or that of `datasets`."""
    return Path(source.load_kwargs.get("cache_dir") or datasets.config.HF_DATASETS_CACHE)


def _default_split(source: Source) -> str:
    """Return the split of a source that names none."""
    return "train" if source.builder else _DEFAULT_SPLITS[str(source.key[1])]


def _split_names(spec: str, *, streaming: bool = False) -> list[str]:
    """Return the names of the splits in a value of `split`: `train[:10%]+test`. Raises ValueError."""
    names = []
    for part in str(spec).split("+"):
        match = _SPLIT.fullmatch(part.strip())
        if match is None or (streaming and match[2]):
            raise ValueError(f"split: {spec} is not the name of a split" + (", as streaming needs" * streaming))
        names.append(match[1])
    return names


def _make_typed_rows(rows: Dataset, file: DataFile, *, first_row: int = 0) -> SourceRows:
    """Return rows with typed columns; `first_row` is minus the number of rows of the source before them."""
    columns = {name: len(rows) - rows.data[name].null_count for name in rows.column_names}
    return SourceRows(rows, columns, RowPlaces((file,), None, (first_row,)))


def _is_saved_dataset(source: Source) -> bool:
    """Tell whether a folder is what `Dataset.save_to_disk` wrote."""
    return any((source.location.files[0] / name).is_file() for name in _SAVED_DATASET_FILES)


def _load_saved_dataset(source: Source, split: Any) -> Dataset:
    """Return the rows that `save_to_disk` wrote, under the digest of their files; of one split, if it wrote several."""
    folder = source.location.files[0]
    rows = load_from_disk(str(folder))
    if isinstance(rows, DatasetDict):
        if split not in rows:
            raise ValueError(f"no split {split}; it has {format_names(rows)}")
        rows, folder = rows[split], folder / split
    elif "split" in source.load_kwargs:
        raise ValueError(f"split: {split}, but it was saved as one data set without splits")
    # the fingerprint that it was saved with does not change with its files
    digests = [digest_file(DataFile(file.name, str(file))) for file in sorted(folder.iterdir()) if file.is_file()]
    rows._fingerprint = record_store.digest_key(digests)
    return rows


def _refuse_unparsed(recipe: Recipe, source: Source, rows: SourceRows) -> None:
    """Refuse rows that are not JSON, unless the recipe drops such rows and others are left. Raises DataError."""
    if recipe.values["data"].get("on_bad_row") == "drop" and rows.unparsed < len(rows.rows):
        return
    for number in range(len(rows.rows)):
        try:
            rows.decode_row(number)
        except FormatError as error:
            fault = Fault(rows.places.name_row(number), error.problem, error.fix, code=error.code)
            place = rows.places.rows[number] if rows.places.rows is not None else {FILE: 0}
            file = rows.places.files[place[FILE]]
            raise DataError(_diagnose_files(recipe, source, file) or fault) from None


def _check_renames(recipe: Recipe, source: Source, columns: Sequence[str]) -> None:
    """Refuse to rename a column that is missing, or to a name that another column has. Raises DataError."""
    for old in source.rename:
        if old not in columns:
            nearest = nearest_name(old, columns, cutoff=LOOSE)
            fix = f"Did you mean `{nearest}`?" if nearest else "Name a column that the source has."
            problem = f"{source.name} has no column {old}; its columns are {format_names(columns)}"
            key = (*source.key, "rename", old)
            is_certain = is_misspelling(old, nearest, columns)
            edits = (Edit("rename", key, new=(*key[:-1], nearest)),) if is_certain else ()
            raise DataError(Fault(recipe.where(key), problem, fix, code="data.missing_column", edits=edits))
    where = recipe.where((*source.key, "rename"))
    for new in source.rename.values():
        if new in columns and new not in source.rename:
            fix = "Choose another name, or rename that column too."
            problem = f"{source.name} already has a column {new}"
            raise DataError(Fault(where, problem, fix, code="data.duplicate_column"))
    if len(set(source.rename.values())) < len(source.rename):
        fix = "Give each column a name of its own."
        raise DataError(Fault(where, "two columns get the same name", fix, code="data.duplicate_column"))
