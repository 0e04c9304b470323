"""The rows of an audit: read as a recipe reads them, one after another, and again by number.

In: the sources of a checked run. Out: candidate rows, their names in messages, and their records as they stand in the
file. The rows stay on the disk. Not here: how files are read (`data.load`) and formatted (`data.pipeline`).
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from trl_sft.building.candidates import CandidateRow
from trl_sft.data import load, pipeline
from trl_sft.data.formats import TASK, TokenizerFeatures
from trl_sft.data.formatted_columns import read_columns, read_turns
from trl_sft.data.messages import FormatError
from trl_sft.data.source_rows import RECORD, decode_batch
from trl_sft.recipe.checked import Run, Source

_BATCH = 1000  # rows
UNREADABLE = "unreadable"


class UnreadableRow(NamedTuple):
    """A row that no recipe could train."""

    problem: str
    is_empty: bool  # whether what it lacks is a text


class AuditSource:
    """The rows of the sources of a run, numbered from 0 over all sources."""

    def __init__(self, run: Run, sources: Sequence[Source], features: TokenizerFeatures) -> None:
        """Read and format the rows.

        Args:
            run: the checked run.
            sources: entries of `data.train` or `data.eval`.
            features: of a tokenizer that takes everything that rows can hold.

        Raises:
            UserError: a source cannot be read, or its columns fit no format.

        """
        self._run, self._sources = run, sources
        self._split = pipeline.join_splits([pipeline.format_source(run, source, features) for source in sources])
        self._rows = self._split.rows
        self.notes = [note for source in self._split.sources for note in source.notes]
        self.notes += [f"{fault.where}: {fault.problem}" for source in self._split.sources for fault in source.faults]
        self.unreadable: dict[int, UnreadableRow] = {}
        for name, numbers in self._split.removed_rows.items():
            kind = self._split.bad_rows.get(name)
            unreadable = UnreadableRow(name, is_empty=False)
            if kind is not None:
                unreadable = UnreadableRow(kind.bad_row.problem, kind.bad_row.code == "data.empty_value")
            self.unreadable |= dict.fromkeys(numbers.tolist(), unreadable)

    def __len__(self) -> int:
        """Return the number of rows, with those that cannot be read."""
        return len(self._rows)

    def iterate(self) -> Iterator[list[tuple[CandidateRow, str]]]:
        """Yield batches of rows and their tasks; the id of a row is its number. Unreadable rows have no turns."""
        rows = self._rows.with_format("arrow")
        for start in range(0, len(rows), _BATCH):
            columns = read_columns(rows[start : start + _BATCH])
            tasks = columns.get(TASK) or [None] * len(next(iter(columns.values())))
            batch = []
            for offset, task in enumerate(tasks):
                values = {name: column[offset] for name, column in columns.items()}
                batch.append((CandidateRow(str(start + offset), _make_messages(values)), str(task or "")))
            yield batch

    def read_row(self, number: int) -> CandidateRow:
        """Return a row whose id is its number."""
        table = self._rows.data.fast_slice(number, 1)
        return CandidateRow(str(number), _make_messages(read_turns(table)))

    def _read_values(self, number: int) -> dict[str, Any]:
        """Return the columns of a row, straight from the table: `Dataset` takes milliseconds for one row."""
        columns = read_columns(self._rows.data.fast_slice(number, 1))
        return {name: values[0] for name, values in columns.items()}

    def name_row(self, number: int) -> str:
        """Return the name of a row: its file, its number there from 1, and its line."""
        return self._split.row_name(number)

    def locate_row(self, number: int) -> dict[str, Any]:
        """Return `file` and `line` of a row, without those that are not known."""
        places = self._split.sources[self._split.source_indices[number]].places
        place: dict[str, Any] = places.locate_row(int(self._split.row_numbers[number]))
        return place

    def iterate_records(self, numbers: np.ndarray) -> Iterator[str]:
        """Yield rows as lines of JSON: as they stand in the file where there is one source, else as chats.

        Args:
            numbers: (rows,) of the rows, in rising order.

        """
        if len(self._sources) > 1:
            for number in numbers.tolist():
                row = self._read_values(number)
                yield json.dumps({name: value for name, value in row.items() if value is not None}, ensure_ascii=False)
            return
        source_rows = load.load_source(self._run.recipe, self._sources[0])
        own_numbers = self._split.row_numbers[numbers]
        for start in range(0, len(own_numbers), _BATCH):
            batch = source_rows.rows[own_numbers[start : start + _BATCH].tolist()]
            if RECORD in batch:
                yield from (_join_lines(text) for text in batch[RECORD])
                continue
            for decoded in decode_batch(batch, source_rows.rows.features, {}):
                if not isinstance(decoded, FormatError):
                    yield json.dumps(decoded, ensure_ascii=False, default=str)


class AuditStore:
    """Rows that passed a gate: their numbers are kept, and the rows are read again where they are compared."""

    def __init__(self, source: AuditSource) -> None:
        """Begin with no row."""
        self._source, self._numbers = source, array("q")

    def append(self, row: CandidateRow, /) -> None:
        """Add a row of the source."""
        self._numbers.append(int(row.id))

    def __getitem__(self, number: int, /) -> CandidateRow:
        """Return a row."""
        return self._source.read_row(self._numbers[number])

    def name_row(self, number: int, /) -> str:
        """Return the name of a row in messages."""
        return self._source.name_row(self._numbers[number])


def _make_messages(row: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """Return the turns of a formatted row; a plain text is one of the assistant. An unreadable row has none."""
    if row.get("text"):
        return ({"role": "assistant", "content": row["text"]},)
    prompt, completion = row.get("prompt") or [], row.get("completion") or []
    if isinstance(prompt, str) or isinstance(completion, str):
        turns = (("user", prompt), ("assistant", completion))
        return tuple({"role": role, "content": content} for role, content in turns if content)
    return (*prompt, *completion)


def _join_lines(text: str) -> str:
    """Return a record as one line of JSON."""
    return text if "\n" not in text and "\r" not in text else json.dumps(json.loads(text), ensure_ascii=False)
