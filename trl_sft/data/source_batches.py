"""The beginning of a stream of rows, as the rows of one source.

Inputs: batches of `SourceRows`. Outputs: the first of them, joined; where files differ in their types, as records.
Deliberately not here: reading (`load`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from trl_sft.data.readers.data_file import DataFile
from trl_sft.data.source_rows import RECORD, RowPlaces, SourceRows, place_records
from trl_sft.data.typed_rows import make_record_tables


def take_rows(batches: Iterable[SourceRows], number: int) -> list[SourceRows]:
    """Return the first batches that hold so many rows, the last one cut."""
    taken: list[SourceRows] = []
    for batch in batches:
        remaining = number - sum(len(earlier.rows) for earlier in taken)
        taken.append(batch._replace(rows=batch.rows.select(range(min(remaining, len(batch.rows))))))
        if len(batch.rows) >= remaining:
            break
    return taken


def join_batches(batches: Sequence[SourceRows]) -> SourceRows:
    """Return the rows of several batches of one source."""
    if not batches:
        return SourceRows(Dataset.from_dict({}), {}, RowPlaces((), None))
    columns: Counter[str] = Counter()
    for batch in batches:
        columns.update(batch.columns)
    first = batches[0]
    parts = [batch.rows for batch in batches]
    if RECORD in first.rows.column_names:
        rows = concatenate_datasets(parts)
        unparsed = sum(batch.unparsed for batch in batches)
        return SourceRows(rows, columns, place_records(first.places.files, rows), unparsed=unparsed)
    files = [batch.places.files[0] for batch in batches]
    if any(part.features != first.rows.features for part in parts):
        rows = Dataset(pa.concat_tables(make_record_tables(_join_files(files, parts))))
        return SourceRows(rows, columns, place_records(list(dict.fromkeys(files)), rows))
    starts: dict[DataFile, int] = {}
    for file, start in zip(files, np.cumsum([0, *map(len, parts)]).tolist(), strict=False):
        starts.setdefault(file, start)
    return SourceRows(concatenate_datasets(parts), columns, RowPlaces(tuple(starts), None, tuple(starts.values())))


def _join_files(files: Sequence[DataFile], parts: Sequence[Dataset]) -> list[Dataset]:
    """Return one dataset for each file, from batches with the file of each."""
    batches: dict[DataFile, list[Dataset]] = {}
    for file, part in zip(files, parts, strict=True):
        batches.setdefault(file, []).append(part)
    return [concatenate_datasets(parts_of_file) for parts_of_file in batches.values()]
