"""The rows of one source as they were read: the container between the readers and formatting.

Rows of JSON, CSV and text are kept as records: `RECORD` is the JSON text of a row as it stands in the file, and
`FILE`, `ROW` and `LINE` say where that is. Nothing about them is inferred; `decode_batch` parses them when they are
formatted, so only what is used matters. Rows of Parquet, Arrow and saved data sets have typed columns. Inputs: a batch
of either kind. Outputs: rows as dicts, or the problem of a row. Deliberately not here: reading (`load`), and what
columns mean (`formats`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, Json, Value

from trl_sft.data.messages import FormatError
from trl_sft.data.readers.data_file import DataFile

RECORD, FILE, ROW, LINE = "_record", "_file", "_row", "_line"
# the JSON text of a row; the number of its file, from 0; of the row in that file, from 0; of its line, from 1
RECORD_SCHEMA = pa.schema({RECORD: pa.string(), FILE: pa.int32(), ROW: pa.int64(), LINE: pa.int64()})
_TYPE_NAMES = {list: "a list", type(None): "null", bool: "true or false", int: "a number", float: "a number"}


class RowPlaces(NamedTuple):
    """Where the rows of a source stand, for messages."""

    files: tuple[DataFile, ...]
    rows: Dataset | None  # memory-mapped FILE, ROW and LINE of each row; None = the rows have no lines
    first_rows: tuple[int, ...] = (0,)  # without lines: the number of the first row of each file

    def name_row(self, number: int) -> str:
        """Return the name of a row by its number in the source, from 0: `b.jsonl row 8 (line 9)`."""
        if self.rows is None:
            index = max(index for index, first in enumerate(self.first_rows) if first <= number)
            return f"{self.files[index].name} row {number - self.first_rows[index] + 1}"
        return name_place(self.files, self.rows[number])

    def locate_row(self, number: int) -> dict[str, Any]:
        """Return `file` and `line` of a row by its number in the source, from 0; without those that are not known."""
        if self.rows is None:
            return {}
        place = self.rows[number]
        return {"file": self.files[place[FILE]].name} | ({"line": place[LINE]} if place[LINE] else {})


class SourceRows(NamedTuple):
    """The rows of a source as they were read.

    Attributes:
        rows: records (the columns of `RECORD_SCHEMA`), or typed columns.
        columns: the columns of all rows, after `rename` -> the number of rows that have a value other than null there;
            of typed rows 0, for they are not counted.
        places: where each row stands.
        rename: column of the file -> its new name; `decode_batch` applies it.
        unparsed: the number of records that are not JSON objects.
        unread_files: the files in a folder that belong to no split: their kind is another than that of the others.
        splits: the splits of a folder or of a data set of the hub -> the names of their files.

    """

    rows: Dataset
    columns: Mapping[str, int]
    places: RowPlaces
    rename: Mapping[str, str] = MappingProxyType({})
    unparsed: int = 0
    unread_files: tuple[str, ...] = ()
    splits: Mapping[str, tuple[str, ...]] = MappingProxyType({})

    def decode_row(self, number: int) -> dict[str, Any]:
        """Return one row. Raises FormatError if it cannot be parsed."""
        batch = self.rows[number : number + 1]
        row = next(decode_batch(batch, self.rows.features, self.rename))
        if isinstance(row, FormatError):
            raise row
        return row


def place_records(files: Sequence[DataFile], rows: Dataset) -> RowPlaces:
    """Return where records stand; `rows` has the columns of `RECORD_SCHEMA`."""
    return RowPlaces(tuple(files), rows.select_columns([FILE, ROW, LINE]))


def name_place(files: Sequence[DataFile], place: Mapping[str, int]) -> str:
    """Return the name of a row by its FILE, ROW and LINE: `b.jsonl row 8 (line 9)`; LINE 0 = the file has no lines."""
    line = f" (line {place[LINE]})" if place[LINE] else ""
    return f"{files[place[FILE]].name} row {place[ROW] + 1}{line}"


def decode_batch(
    batch: Mapping[str, Sequence[Any]], column_types: Features, rename: Mapping[str, str]
) -> Iterator[dict[str, Any] | FormatError]:
    """Yield the rows of a batch, columns renamed; in place of a row that is no object, the problem with it.

    Args:
        batch: column -> values, (rows,) each.
        column_types: the types of the columns.
        rename: column of the file -> its new name.

    """
    if RECORD in batch:
        for record in batch[RECORD]:
            try:
                yield _rename_columns(parse_record(record), rename)
            except FormatError as error:
                yield error
        return
    columns = {}
    for column, values in batch.items():
        column_type = column_types[column]
        name = rename.get(column, column)
        if not isinstance(column_type, Value | Json):  # structs may lie inside
            columns[name] = [_read_typed_value(value, column_type) for value in values]
        else:
            columns[name] = list(values)
    for values in zip(*columns.values(), strict=True):
        yield dict(zip(columns, values, strict=True))


def parse_record(record: str) -> dict[str, Any]:
    """Return the row of a record; a JSON string is a row with the column `text`.

    Raises:
        FormatError: the record is not JSON, no object, or writes a key twice.

    """
    try:
        row = _DECODER.decode(record)
    except _RepeatedKeyError as error:
        problem = f"the key {error} is written twice in one object"
        raise FormatError(problem, "Remove one of the two.", code="data.repeated_key") from None
    except json.JSONDecodeError as error:
        line = record.count("\n", 0, error.pos) + 1
        place = f"column {error.colno}" if line == 1 else f"its line {line}, column {error.colno}"
        excerpt = record[max(0, error.pos - 30) : error.pos + 10]
        problem = f"not JSON at {place}: ...{excerpt}"
        raise FormatError(problem, "Write one JSON object per line.", code="data.invalid_json") from None
    except RecursionError:
        problem = "the row is nested too deeply to be read"
        raise FormatError(problem, "Remove levels of lists and objects.", code="data.invalid_json") from None
    except ValueError:  # https://docs.python.org/3/library/stdtypes.html#int-max-str-digits
        problem = "a number has more than 4,300 digits"
        raise FormatError(problem, "Write the number as text, or shorten it.", code="data.invalid_json") from None
    if isinstance(row, str):
        return {"text": row}
    if not isinstance(row, dict):
        problem = f"the row is {_TYPE_NAMES[type(row)]}, not an object with keys: {record[:40]}"
        fix = 'Write each row as an object, as in {"question": ..., "answer": ...}.'
        raise FormatError(problem, fix, code="data.not_rows")
    return row


class _RepeatedKeyError(Exception):
    """An object has a key twice; the text of the exception is the key."""


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object from its keys and values; raise _RepeatedKeyError if it has a key twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise _RepeatedKeyError(next(name for name, number in counts.items() if number > 1))
    return result


_DECODER = json.JSONDecoder(object_pairs_hook=_make_object)  # making one takes as long as decoding a short record


def _rename_columns(row: dict[str, Any], rename: Mapping[str, str]) -> dict[str, Any]:
    """Return a row with its columns renamed. Raises FormatError if two columns get one name."""
    if not rename:
        return row
    renamed: dict[str, Any] = {}
    for column, value in row.items():
        name = rename.get(column, column)
        if name in renamed:
            problem = f"the row has two columns {name} after `rename`"
            raise FormatError(problem, "Rename the other column too, or remove it.", code="data.duplicate_column")
        renamed[name] = value
    return renamed


def _read_typed_value(value: Any, column_type: Any) -> Any:
    """Return a value as the data set means it: class labels by their names, without the nulls of Arrow's structs.

    Arrow puts a null into a struct where a row lacks a key; a null that a row's JSON holds stays.
    `trl.trainer.utils.remove_none_values` (TRL 1.16) does not know the column types, so it removes both.
    """
    if isinstance(column_type, ClassLabel):
        is_label = isinstance(value, int) and value >= 0  # -1 = not labelled
        return column_type.int2str(value) if is_label else None
    if isinstance(column_type, dict) and isinstance(value, Mapping):
        return {
            key: _read_typed_value(value[key], column_type[key]) for key in column_type if value.get(key) is not None
        }
    item_type = column_type[0] if isinstance(column_type, list) else getattr(column_type, "feature", None)
    if item_type is not None and isinstance(value, list):
        return [_read_typed_value(item, item_type) for item in value]
    return value
