"""The one container of formatted rows: those to train, or those to evaluate under one name.

Inputs: the formatted rows of each source. Outputs: a `Split`, which says for each row which source it is from and
which number it has there, so that a later step needs no function of this package to name a row. Not here: how rows
are formatted (`pipeline`), and which of them an epoch trains (`rows`, `mix`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from datasets import Dataset, concatenate_datasets

from trl_sft.data.source_format import SourceFormat
from trl_sft.recipe.checked import Source


class FormattedSource(NamedTuple):
    """What is known of one source, its rows aside."""

    source: Source
    source_format: SourceFormat
    row_type: str  # TRL's dataset type: CHAT, PAIRS or TEXT
    multi_turn: bool  # whether some prompt holds an earlier answer
    has_escaped_tokens: bool  # whether some text holds a special token that is plain text
    notes: tuple[str, ...] = ()  # lines for the screen

    @property
    def name(self) -> str:
        """The name of the source in messages."""
        return self.source.name

    @property
    def weight(self) -> float | None:
        """The share of an epoch that the recipe asks for, before scaling; None = all rows."""
        return self.source.weight


class Split(NamedTuple):
    """Rows to train, or to evaluate under one name: formatted, one source after another.

    Attributes:
        rows: the formatted rows of all sources.
        sources: what is known of each source.
        source_indices: (rows,) which of the sources a row is from.
        row_numbers: (rows,) the number of a row in its source, from 0.
        order: which rows, in the order of training; a row may occur several times.
        removed_rows: reason -> numbers of the rows that are removed for it.

    """

    rows: Dataset
    sources: tuple[FormattedSource, ...]
    source_indices: np.ndarray
    row_numbers: np.ndarray
    order: np.ndarray
    removed_rows: dict[str, np.ndarray]

    def row_name(self, number: int) -> str:
        """Return the name of a row in messages: its source, and its number there from 1."""
        return f"{self.sources[self.source_indices[number]].name} row {self.row_numbers[number] + 1}"


def split_source(rows: Dataset, source: FormattedSource, row_numbers: np.ndarray | None = None) -> Split:
    """Return the rows of one source as a split.

    Args:
        rows: the formatted rows.
        source: what is known of the source.
        row_numbers: (rows,) the number of each row in the source, from 0; None = it is all rows of the source.

    """
    every = np.arange(len(rows), dtype=np.int64)
    numbers = every if row_numbers is None else row_numbers
    return Split(rows, (source,), np.zeros(len(rows), dtype=np.int64), numbers, every, {})


def join_splits(splits: Sequence[Split]) -> Split:
    """Return one split of all rows, source after source."""
    rows = concatenate_datasets([split.rows for split in splits])
    return Split(
        rows=rows,
        sources=tuple(source for split in splits for source in split.sources),
        source_indices=np.repeat(np.arange(len(splits)), [len(split.rows) for split in splits]),
        row_numbers=np.concatenate([split.row_numbers for split in splits]),
        order=np.arange(len(rows), dtype=np.int64),
        removed_rows={},
    )
