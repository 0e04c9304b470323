"""Reads the records of files, and keeps those of whole files on disk, memory-mapped, under the digest of their content.

Inputs: files and a `RecordReader`, which says how they are read. Outputs: tables of `RECORD_SCHEMA`, or a dataset of
all records with the columns that occur in them. Every block is compared with the file (`guard`) before it is used.
Deliberately not here: types, and what a row means.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from datasets import Dataset

from trl_sft import run_folder
from trl_sft.data.code_digest import digest_code
from trl_sft.data.readers import csv_records, json_records, text_records
from trl_sft.data.readers.csv_records import CsvOptions
from trl_sft.data.readers.data_file import DataFile, digest_file
from trl_sft.data.readers.guard import ElementGuard, LineGuard, is_json_value, parse_json_lines
from trl_sft.data.readers.record_block import BLOCK_CHARACTERS, BLOCK_ROWS, RecordBlock
from trl_sft.data.source_rows import RECORD_SCHEMA
from trl_sft.row_progress import RowProgress

BUILDERS = ("json", "csv", "text")  # of `datasets`, whose files are read here
_ROWS, _SUMMARY = "rows.arrow", "summary.json"
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
CODE = digest_code(Path(__file__).parent)


class RecordReader(NamedTuple):
    """How files are read; the options are those of the builder of `datasets`."""

    builder: str  # one of `BUILDERS`
    encoding: str = "utf-8"
    errors: str = "strict"
    field: str | None = None  # JSON: the key that holds the rows
    csv: CsvOptions = CsvOptions()
    sample_by: str = "line"  # text: line, paragraph or document
    keep_linebreaks: bool = False  # text: whether a line keeps its line break

    def read(self, file: DataFile) -> Iterator[RecordBlock]:
        """Yield the rows of a file. Raises ReadingError, OptionError, CompressionError or UnicodeDecodeError."""
        if self.builder == "json":
            yield from json_records.read_json(file, field=self.field, encoding=self.encoding, errors=self.errors)
        elif self.builder == "csv":
            yield from csv_records.read_csv(file, self.csv)
        else:
            yield from text_records.read_text(
                file,
                sample_by=self.sample_by,
                keep_linebreaks=self.keep_linebreaks,
                encoding=self.encoding,
                errors=self.errors,
            )


class RecordSummary(NamedTuple):
    """What records hold."""

    columns: dict[str, int]  # column -> the number of rows that have a value other than null there
    unparsed: int  # the number of records that are not JSON objects


class StoredRecords(NamedTuple):
    """The records of all files of a source."""

    rows: Dataset  # the columns of `RECORD_SCHEMA`, memory-mapped
    summary: RecordSummary
    rows_per_file: list[int]  # (files,)


def make_reader(builder: str, keywords: Mapping[str, Any]) -> RecordReader:
    """Return the reader of files of `json`, `csv` or `text`.

    Args:
        builder: one of `BUILDERS`.
        keywords: arguments of the configuration of the builder; further ones are ignored.

    Raises:
        OptionError: a keyword cannot be carried out.

    """
    encoding = str(keywords.get("encoding") or "utf-8")
    errors = str(keywords.get("encoding_errors") or "strict")
    if builder == "csv":
        return RecordReader(builder, encoding, errors, csv=csv_records.read_options(keywords))
    return RecordReader(
        builder,
        encoding,
        errors,
        field=keywords.get("field"),
        sample_by=str(keywords.get("sample_by") or "line"),
        keep_linebreaks=bool(keywords.get("keep_linebreaks")),
    )


def read_tables(reader: RecordReader, files: Sequence[DataFile]) -> Iterator[pa.Table]:
    """Yield the records of files block by block, as tables of `RECORD_SCHEMA`.

    Raises:
        FileError: a file cannot be read; its cause is the reader's error.
        GuardError: a reader gave something else than the file has.

    """
    for index, file in enumerate(files):
        try:
            row_number = 0
            for block in _read_guarded(reader, file):
                yield _make_table(block, index, row_number)
                row_number += len(block.records)
        except (ValueError, OSError, EOFError) as error:
            raise FileError(file, error) from error


def store_records(reader: RecordReader, files: Sequence[DataFile], root: Path, *, fresh: bool = False) -> StoredRecords:
    """Return the records of whole files, from the cache where it has files of this content.

    Args:
        reader: how the files are read.
        files: the files, in this order.
        root: the folder of the cache.
        fresh: whether they are read again although the cache has them.

    Raises:
        FileError: a file cannot be read; its cause is the reader's error.
        GuardError: a reader gave something else than the file has.

    """
    key = digest_key([digest_file(file) for file in files], repr(reader), CODE)
    return store_tables(lambda: read_tables(reader, files), num_files=len(files), root=root, key=key, fresh=fresh)


def store_tables(
    make_tables: Callable[[], Iterator[pa.Table]], *, num_files: int, root: Path, key: str, fresh: bool = False
) -> StoredRecords:
    """Return records from the cache, where it has them, else from the tables, which are then written to the cache.

    Args:
        make_tables: yields tables of `RECORD_SCHEMA`, each of rows of one file.
        num_files: the number of files.
        root: the folder of the cache.
        key: what the records depend on, as `digest_key` names it.
        fresh: whether they are written again although the cache has them.

    """
    folder = root / "trl_sft_rows" / key
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    if not (folder / _SUMMARY).is_file():
        _write(make_tables(), num_files, folder)
    summary = json.loads((folder / _SUMMARY).read_text(encoding="utf-8"))
    rows = Dataset(Dataset.from_file(str(folder / _ROWS)).data, fingerprint=key)
    return StoredRecords(rows, RecordSummary(summary["columns"], summary["unparsed"]), summary["rows_per_file"])


def digest_key(digests: Sequence[str], *parts: str) -> str:
    """Return the name under which something is cached that is made of files with these digests, and of other parts."""
    return hashlib.sha256(json.dumps([list(digests), *parts]).encode()).hexdigest()[:32]


def summarize(records: Sequence[str]) -> RecordSummary:
    """Return what records hold."""
    columns: Counter[str] = Counter()
    unparsed = 0
    for row in _parse_records(records):
        if isinstance(row, str):
            columns["text"] += 1
        elif isinstance(row, dict):
            for column, value in row.items():
                columns[column] += value is not None
        else:
            unparsed += 1
    return RecordSummary(columns, unparsed)


class FileError(Exception):
    """A file that cannot be read; its cause says why."""

    def __init__(self, file: DataFile, error: Exception) -> None:
        """Take the file, and the error of its reader."""
        self.file, self.error = file, error
        super().__init__(f"{file.name}: {error}")


def _write(tables: Iterator[pa.Table], num_files: int, folder: Path) -> None:
    """Write records to `folder`, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
    columns: Counter[str] = Counter()
    unparsed = 0
    rows_per_file = [0] * num_files
    try:
        with (
            pa.ipc.new_stream(str(unfinished / _ROWS), RECORD_SCHEMA) as writer,
            RowProgress("Reading rows") as progress,
        ):
            for table in _join_small_tables(tables):
                progress.update(len(table))
                part = summarize(table.column(0).to_pylist())
                columns.update(part.columns)
                unparsed += part.unparsed
                for count in table.column(1).value_counts():
                    rows_per_file[count["values"].as_py()] += count["counts"].as_py()
                writer.write_table(table)
        summary = {"columns": columns, "unparsed": unparsed, "rows_per_file": rows_per_file}
        run_folder.write_text(unfinished / _SUMMARY, json.dumps(summary))
        with contextlib.suppress(OSError):  # another process was first: it wrote the same
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _join_small_tables(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield the rows of tables in their order, in tables of some size: thousands of files may have one row each."""
    waiting: list[pa.Table] = []
    rows = size = 0
    for table in tables:
        waiting.append(table)
        rows, size = rows + len(table), size + table.nbytes
        if rows >= BLOCK_ROWS or size >= BLOCK_CHARACTERS:
            yield pa.concat_tables(waiting).combine_chunks()
            waiting, rows, size = [], 0, 0
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()


def _parse_records(records: Sequence[str]) -> list[Any]:
    """Return the values of records; in place of a record that is not JSON, None."""
    try:
        values = json.loads(f"[{','.join(records)}]")  # in one call: it takes half of the time
        if len(values) == len(records):
            return list(values)
    except (ValueError, RecursionError):
        pass
    values = []
    for record in records:
        try:
            values.append(json.loads(record))
        except (ValueError, RecursionError):
            values.append(None)
    return values


def _read_guarded(reader: RecordReader, file: DataFile) -> Iterator[RecordBlock]:
    """Yield the rows of a file, each block after it was compared with the text of the file. Raises GuardError."""
    file_guard = _open_guard(reader, file)
    try:
        for block in reader.read(file):
            if file_guard is not None:
                file_guard.check(block)
            yield block
        if file_guard is not None and reader.csv.nrows is None:
            file_guard.finish()
    finally:
        if file_guard is not None:
            file_guard.close()


def _open_guard(reader: RecordReader, file: DataFile) -> LineGuard | ElementGuard | None:
    """Return the guard of a file; None = its one row is the file itself."""
    if reader.builder == "json":
        if json_records.has_lines(file, field=reader.field, encoding=reader.encoding, errors=reader.errors):
            return LineGuard(file, parse_json_lines, is_json_value, encoding=reader.encoding, errors=reader.errors)
        is_whole = reader.field is None
        return ElementGuard(file, is_whole_file=is_whole, encoding=reader.encoding, errors=reader.errors)
    if reader.builder == "csv":
        return LineGuard(
            file,
            lambda lines, first_line: csv_records.parse_lines(lines, first_line, reader.csv),
            lambda record, cells: csv_records.is_row(record, cells, reader.csv),
            encoding=reader.csv.encoding,
            errors=reader.csv.encoding_errors,
        )
    if reader.sample_by != "line":
        return None

    def parse_text_lines(lines: Sequence[str], _: int) -> list[str]:
        return [line if reader.keep_linebreaks else line.rstrip("\r\n") for line in lines]

    return LineGuard(file, parse_text_lines, is_json_value, encoding=reader.encoding, errors=reader.errors)


def _make_table(block: RecordBlock, file_index: int, first_row: int) -> pa.Table:
    """Return a block of rows as a table of `RECORD_SCHEMA`."""
    number = len(block.records)
    try:
        records = pa.array(block.records, pa.string())
    except UnicodeEncodeError:  # `encoding_errors: surrogateescape` leaves characters that UTF-8 does not have
        records = pa.array([_LONE_SURROGATE.sub(_escape_character, text) for text in block.records], pa.string())
    columns = [
        records,
        pa.array([file_index] * number, pa.int32()),
        pa.array(range(first_row, first_row + number), pa.int64()),
        pa.array(block.lines, pa.int64()),
    ]
    return pa.table(columns, schema=RECORD_SCHEMA)


def _escape_character(match: re.Match[str]) -> str:
    """Return a character as JSON writes it in ASCII."""
    return f"\\u{ord(match[0]):04x}"
