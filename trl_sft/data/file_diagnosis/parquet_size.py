"""How large the rows of a Parquet file become: a file of kilobytes may hold one long text millions of times.

Inputs: a Parquet file. Outputs: a `Content` that says what is too large, before a row is read. Columns of text whose
values are repeated are read as numbers of a dictionary, so that nothing is repeated in memory. Deliberately not here:
reading rows.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trl_sft.console import format_bytes
from trl_sft.data.file_diagnosis.content import Content
from trl_sft.data.readers.record_block import LONGEST_RECORD

MOST_AT_ONCE = 8 << 30  # bytes of one column in a row group, which is read at once
_HARMLESS = 1 << 30  # bytes that a column of a row group may become without a look
# A column is repeated if its values take less than so many bytes each, or if it was compressed by more than this
_FEW_BYTES, _STRONG_COMPRESSION = 64, 100


class _Chunk(NamedTuple):
    """A column of one row group."""

    row_group: int
    path: str  # messages.list.element.content
    metadata: Any  # of pyarrow


def find_large_rows(path: Path, cache: Path) -> Content | None:
    """Return what is too large in a Parquet file; None = nothing is, or the file cannot be read, as its reader says.

    Args:
        path: the file.
        cache: the folder in which the rows are stored.

    """
    try:
        chunks = list(_list_texts(pq.read_metadata(path)))
        return _find_long_value(chunks) or _find_repeated(path, chunks, cache)
    except (pa.ArrowException, OSError):
        return None


def _list_texts(metadata: pq.FileMetaData) -> Iterator[_Chunk]:
    """Yield the columns of text of each row group."""
    for number in range(metadata.num_row_groups):
        row_group = metadata.row_group(number)
        columns = [row_group.column(index) for index in range(metadata.num_columns)]
        yield from (_Chunk(number, c.path_in_schema, c) for c in columns if c.physical_type == "BYTE_ARRAY")


def _find_long_value(chunks: list[_Chunk]) -> Content | None:
    """Return the problem of a column whose values are too long for a row."""
    for row_group, path, metadata in chunks:
        if metadata.total_uncompressed_size > LONGEST_RECORD * max(metadata.num_values, 1):
            problem = f"has a value of more than {LONGEST_RECORD:,} bytes, the most that are read"
            problem += f", in the column {path} of row group {row_group + 1}"
            return Content(problem, "Split it into several rows, or remove it.", code="data.long_record")
    return None


def _find_repeated(path: Path, chunks: list[_Chunk], cache: Path) -> Content | None:
    """Return the problem of a column that becomes larger than the memory or the disk allows."""
    total = 0
    for chunk in chunks:
        if not _is_repeated(chunk):
            continue
        size = _measure(path, chunk)
        total += size
        if size > MOST_AT_ONCE:
            problem = f"has {format_bytes(path.stat().st_size)}, but the column {chunk.path} of row group "
            problem += f"{chunk.row_group + 1} has {format_bytes(size)} of repeated text, which is read at once"
            return Content(problem, "Remove the repeated text, or write smaller row groups.", code="data.too_large")
    existing = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if total > free:
        problem = f"has {format_bytes(path.stat().st_size)}, but {format_bytes(total)} of repeated text, and the cache "
        problem += f"{cache} has {format_bytes(free)} free"
        fix = "Remove the repeated text, or set `cache_dir` in the source to a folder with more space."
        return Content(problem, fix, code="data.too_large")
    return None


def _is_repeated(chunk: _Chunk) -> bool:
    """Tell whether the values of a column may be far larger than what the file stores of them."""
    stored, values = chunk.metadata.total_uncompressed_size, chunk.metadata.num_values
    is_small = stored < _FEW_BYTES * values or stored > _STRONG_COMPRESSION * chunk.metadata.total_compressed_size
    return bool(chunk.metadata.has_dictionary_page and is_small and stored * values > _HARMLESS)


def _measure(path: Path, chunk: _Chunk) -> int:
    """Return how many bytes the texts of a column of a row group have when they are read."""
    file = pq.ParquetFile(path, read_dictionary=[chunk.path])
    table = file.read_row_group(chunk.row_group, columns=[chunk.path])
    arrays = [array for column in table.columns for part in column.chunks for array in _list_dictionaries(part)]
    return sum(pc.sum(pc.take(pc.binary_length(array.dictionary), array.indices)).as_py() or 0 for array in arrays)


def _list_dictionaries(array: Any) -> Iterator[Any]:
    """Yield the arrays of dictionary numbers in an array of lists and structs."""
    if pa.types.is_dictionary(array.type):
        yield array
    elif pa.types.is_struct(array.type):
        for field in array.flatten():
            yield from _list_dictionaries(field)
    elif pa.types.is_map(array.type):
        yield from _list_dictionaries(array.keys)
        yield from _list_dictionaries(array.items)
    elif pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        yield from _list_dictionaries(array.flatten())
