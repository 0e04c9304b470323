"""The columns of formatted rows in Arrow: messages are JSON texts, written and read without a change.

Inputs: rows in TRL's dataset types, by column; or tables of them. Outputs: the table, or the columns. The type `Json`
of `datasets` writes numbers with nine digits and refuses large integers (4.8 to 5.2, `ujson_dumps`), so `json` of the
standard library writes and reads them here. Deliberately not here: what a message is (`messages`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features


def write_table(columns: Mapping[str, Sequence[Any]], features: Features) -> pa.Table:
    """Return columns as a table.

    Args:
        columns: name -> values, (rows,) each; prompt and completion may be lists of messages.
        features: the type of each column.

    """
    arrays = []
    for name, values in columns.items():
        kind = features.arrow_schema.field(name).type
        if name in ("prompt", "completion") and pa.types.is_list(kind):
            texts = [json.dumps(message, ensure_ascii=False) for messages in values for message in messages]
            offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
            arrays.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(texts, pa.string())))
        else:
            arrays.append(pa.array(values, kind))
    return pa.table(arrays, names=list(columns)).cast(features.arrow_schema)


def read_columns(table: pa.Table) -> dict[str, list[Any]]:
    """Return a batch of formatted rows as Python's values by column."""
    columns = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if name in ("prompt", "completion") and pa.types.is_list(column.type):
            messages = json.loads("[" + ",".join(column.flatten().to_pylist()) + "]")
            ends = np.cumsum(column.value_lengths().to_numpy(zero_copy_only=False)).tolist()
            columns[name] = [messages[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        elif name == "tools":
            columns[name] = [json.loads(value) if value else None for value in column.to_pylist()]
        else:
            columns[name] = column.to_pylist()
    return columns


def read_turns(table: pa.Table) -> dict[str, Any]:
    """Return prompt, completion and text of a table of one row, in a third of the time of `read_columns`."""
    values: dict[str, Any] = {}
    for name in table.column_names:
        if name not in ("prompt", "completion", "text"):
            continue
        column = table[name].chunk(0)
        if pa.types.is_list(column.type):
            values[name] = [json.loads(message) for message in column.flatten().to_pylist()]
        else:
            values[name] = column[0].as_py()
    return values


def read_row(rows: Dataset, number: int) -> dict[str, Any]:
    """Return one formatted row."""
    columns = read_columns(rows.with_format("arrow")[number : number + 1])
    return {name: values[0] for name, values in columns.items()}
