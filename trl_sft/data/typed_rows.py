"""Rows of files that have types of their own, Parquet and Arrow, where the types of the files differ.

Inputs: datasets of single files. Outputs: their rows as records (`source_rows`), so that every value is what its file
has: nothing is cast to the types of another file. Deliberately not here: reading the files (`load`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from trl_sft.data.source_rows import RECORD_SCHEMA, decode_batch

_BATCH_ROWS = 1000


class FileSchema(NamedTuple):
    """The columns of a file of Parquet or Arrow."""

    columns: tuple[tuple[str, str], ...]  # name and type of each
    num_rows: int  # 0 = the file does not say it


def read_schema(path: str) -> FileSchema:
    """Return the columns of a file of Parquet or Arrow, without reading its rows."""
    with Path(path).open("rb") as stream:
        if stream.read(4) == b"PAR1":
            metadata = pq.read_metadata(path)
            return FileSchema(_list_columns(metadata.schema.to_arrow_schema()), metadata.num_rows)
    with pa.memory_map(path) as mapped:
        try:
            schema = pa.ipc.open_stream(mapped).schema
        except pa.ArrowInvalid:
            mapped.seek(0)
            schema = pa.ipc.open_file(mapped).schema
    return FileSchema(_list_columns(schema), 0)


def make_record_tables(parts: Sequence[Dataset]) -> Iterator[pa.Table]:
    """Yield the rows of several files as tables of `RECORD_SCHEMA`; such rows have no line, which is 0."""
    for index, part in enumerate(parts):
        for start in range(0, len(part), _BATCH_ROWS):
            rows = decode_batch(part[start : start + _BATCH_ROWS], part.features, {})
            records = [json.dumps(row, ensure_ascii=False, default=_describe_value) for row in rows]
            number = len(records)
            columns = [
                pa.array(records, pa.string()),
                pa.array([index] * number, pa.int32()),
                pa.array(range(start, start + number), pa.int64()),
                pa.array([0] * number, pa.int64()),
            ]
            yield pa.table(columns, schema=RECORD_SCHEMA)


def _describe_value(value: Any) -> dict[str, str]:
    """Return what stands for a value that JSON does not have, such as a time; it is no text, so it is never trained."""
    return {type(value).__name__: str(value)}


def _list_columns(schema: pa.Schema) -> tuple[tuple[str, str], ...]:
    """Return the names and types of the columns of a file; of metadata only the classes of labels."""
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    return tuple((field.name, f"{field.type} {features.get(field.name, '')}") for field in schema)
