"""Rows that are longer than the positions that the model knows.

Inputs: the tokens of all rows, the model's configuration. Outputs: lines for the screen; or a refusal, where the model
has a table of positions, so that the first longer row would stop the training. Deliberately not here: what a model's
positions are (`model.positions`), and truncation (`tokenization`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
from trl import SFTConfig

from trl_sft.console import format_rows
from trl_sft.errors import DataError, Edit, Fault
from trl_sft.model import meta_model, positions
from trl_sft.model.load import ModelSource
from trl_sft.recipe.checked import Run
from trl_sft.tokenization.build import TokenizedRows


class LongRows(NamedTuple):
    """The rows of one part of the run that are longer than the positions of the model."""

    part: str  # train, or the name of an evaluation set
    number: int
    first: str  # the name of the first of them, and its tokens


def check(run: Run, source: ModelSource, datasets: TokenizedRows, *, args: SFTConfig) -> Iterator[tuple[str, str]]:
    """Yield a line, name and value, on rows that are longer than the positions that the model was trained on.

    Args:
        run: the checked recipe.
        source: the model.
        datasets: the tokens of all rows.
        args: the settings of the trainer.

    Raises:
        DataError: the model has a table of positions, and rows are longer than it.

    """
    limit = positions.read_limit(source.config)
    if limit is None:
        return
    long_rows = [rows for part in datasets.encoded if (rows := _find_long_rows(datasets, part, limit, args=args))]
    reads_on = datasets.stream_counts is not None and (args.max_length is None or args.max_length > limit)
    if not long_rows and not reads_on:
        return
    table = positions.find_table(meta_model.build(run, source), limit)
    if table is None:
        for rows in long_rows:
            count = f"{format_rows(rows.number)} of {rows.part} {'is' if rows.number == 1 else 'are'} longer than"
            known = f"the {limit:,} positions that the model was trained on (max_position_embeddings)"
            yield "positions", f"{count} {known}; the first is {rows.first}"
        return
    raise DataError(_explain(run, source, long_rows, table=table))


def _find_long_rows(datasets: TokenizedRows, part: str, limit: int, *, args: SFTConfig) -> LongRows | None:
    """Return the rows of a part that are longer than the limit; None = there are none."""
    split, encoded = datasets.encoded[part]
    lengths = pc.list_value_length(encoded.rows.data["input_ids"]).to_numpy()
    if args.max_length is not None:  # packing may split rows that `tokenization` did not truncate
        lengths = np.minimum(lengths, args.max_length)
    longer = np.flatnonzero(lengths > limit)
    if not len(longer):
        return None
    numbers = encoded.rows.data["row"].to_numpy()[longer]
    first = int(np.argmin(numbers))
    tokens = int(lengths[longer[first]])
    return LongRows(part, len(np.unique(numbers)), f"{split.row_name(int(numbers[first]))}, {tokens:,} tokens")


def _explain(run: Run, source: ModelSource, long_rows: list[LongRows], *, table: int) -> list[Fault]:
    """Return a fault for each part whose rows have no position; of a stream one, since its later rows are unknown."""
    edits = (Edit("set", ("train", "max_length"), table),)
    fix = f"Set train.max_length: {table}; data.overlong says what happens to longer rows."
    where = run.recipe.where(("train", "max_length"))
    knows = f"{source.config.architectures[0]} knows {table:,} positions"
    if not long_rows:
        problem = f"{knows}, and rows of the stream may be longer: the first one would stop the training"
        return [Fault(where, problem, fix, code="model.too_few_positions", edits=edits)]
    faults = []
    for rows in long_rows:
        verb = "is" if rows.number == 1 else "are"
        problem = f"{knows}, but {format_rows(rows.number)} of {rows.part} {verb} longer; the first is {rows.first}"
        faults.append(Fault(where, problem, fix, code="model.too_few_positions", edits=edits))
    return faults
