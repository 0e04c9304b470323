"""Which rows count together where the loss is logged by source and by task, and how their tokens carry that.

Inputs: formatted rows, and their tokens. Outputs: `RowGroups`, and columns beside the tokens: `groups` has the group of
a row, or those of a pack with `group_lengths` beside them (runs of tokens of one group). Packing is TRL's, which packs
any column that has a value for each token. Not here: the losses (`training.source_losses`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets

from trl_sft.data.formats import TASK
from trl_sft.data.pipeline import FormattedSource, Split
from trl_sft.data.rows import RunRows, make_unique_names
from trl_sft.tokenization.encode import EncodedRows

GROUPS, GROUP_LENGTHS = "groups", "group_lengths"
COLUMNS = (GROUPS, GROUP_LENGTHS)  # they are no tokens: what is trained does not depend on them
LOSS, TASK_LOSS = "loss", "task_loss"  # what a logged name has before `/`
MAX_NAMES = 50  # more names are no longer readable in a log
_NO_TASK = "no_task"  # the name of rows without a task beside rows with one
GROUP = Value("int16")


class RowGroups(NamedTuple):
    """The groups of the rows of a split: rows of one group have the same source and the same task.

    Attributes:
        numbers: (rows,) int16, the group of each formatted row, by the number of the row.
        names: what is logged of them: `LOSS` or `TASK_LOSS` -> the name of each group. Groups of one name count
            together.

    """

    numbers: np.ndarray
    names: Mapping[str, tuple[str, ...]]

    @property
    def number(self) -> int:
        """How many groups there are."""
        return len(next(iter(self.names.values())))


class Grouping(NamedTuple):
    """The groups of a run.

    Attributes:
        parts: train and the evaluation sets, by name; a part whose rows are all alike is absent.
        notes: sentences on what is not logged, and why.

    """

    parts: Mapping[str, RowGroups]
    notes: tuple[str, ...] = ()


def find_groups(rows: RunRows) -> Grouping:
    """Return the groups of a run's rows: by source where there are several, and by task where rows have different ones.

    With one source the tasks are logged under `LOSS`. Of several evaluation sets, which the Trainer logs one by one,
    each is a group of its own.
    """
    notes: list[str] = []
    parts: dict[str, RowGroups] = {}
    train = _group_split(rows.train, notes, with_tasks=not rows.streaming)
    if train is not None:
        parts["train"] = train
    if rows.streaming and len(_read_tasks(rows.train)[1]) > 1:
        notes.append("not logged by task: the tasks of a stream are not known before it is read")
    for name, split in rows.eval.items():
        if len(rows.eval) > 1:
            parts[name] = RowGroups(np.zeros(len(split.rows), dtype=np.int16), {LOSS: (name,)})
        elif (groups := _group_split(split, notes, with_tasks=True)) is not None:
            parts[name] = groups
    return Grouping(parts, tuple(dict.fromkeys(notes)))


def _group_split(split: Split, notes: list[str], *, with_tasks: bool) -> RowGroups | None:
    """Return the groups of a split; None if all its rows are alike. `notes` takes what is not logged."""
    sources = np.asarray(split.source_indices, dtype=np.int64)
    source_names = _name_values(sources[split.order], _name_sources(split.sources), notes, kind="source")
    tasks, labels = _read_tasks(split)
    task_names = _name_values(tasks[split.order], make_unique_names(labels), notes, kind="task") if with_tasks else {}
    if source_names and task_names:
        pairs = np.unique(sources[split.order] * len(labels) + tasks[split.order])
        if len(pairs) == len(source_names) == len(task_names):  # each source is one task, by which it is named
            task_names = {}
    if not source_names and not task_names:
        return None
    # a number for each pair of source and task; what is not told apart counts as one
    alike = np.zeros_like(sources)
    cells = (sources if source_names else alike) * len(labels) + (tasks if task_names else alike)
    used = np.unique(cells[split.order])
    names: dict[str, tuple[str, ...]] = {}
    if source_names:
        names[LOSS] = tuple(source_names[cell // len(labels)] for cell in used.tolist())
    if task_names:
        names[TASK_LOSS if names else LOSS] = tuple(task_names[cell % len(labels)] for cell in used.tolist())
    numbers = np.searchsorted(used, cells).clip(max=len(used) - 1)  # rows outside the order count nowhere
    return RowGroups(numbers.astype(np.int16), names)


def _name_sources(sources: Sequence[FormattedSource]) -> list[str]:
    """Return a name of each source: its task, or its file where several have one task or it has none."""
    counts = Counter(source.source.task for source in sources)
    tasks = [source.source.task if counts[source.source.task] == 1 else "" for source in sources]
    return make_unique_names([task or source.short_name for task, source in zip(tasks, sources, strict=True)])


def _name_values(values: np.ndarray, names: Sequence[str], notes: list[str], *, kind: str) -> dict[int, str]:
    """Return the name of each value that occurs; empty if they are alike, or too many, which `notes` takes."""
    used = np.unique(values).tolist()
    if len(used) > MAX_NAMES:
        notes.append(f"not logged by {kind}: {len(used):,} {kind}s are more than {MAX_NAMES}")
    return {value: names[value] for value in used} if 1 < len(used) <= MAX_NAMES else {}


def _read_tasks(split: Split) -> tuple[np.ndarray, list[str]]:
    """Return the task of each row as a position in a list of labels: int64 (rows,), and the labels."""
    if TASK not in split.rows.column_names:
        return np.zeros(len(split.rows), dtype=np.int64), [_NO_TASK]
    column = split.rows.data[TASK]
    labels = column.unique()
    positions = pc.index_in(column, value_set=labels).to_numpy().astype(np.int64)
    return positions, [label or _NO_TASK for label in labels.to_pylist()]


def number_rows(groups: RowGroups, encoded: EncodedRows) -> np.ndarray:
    """Return the group of each row of tokens: int16 (rows,)."""
    numbers: np.ndarray = groups.numbers[encoded.rows.data["row"].to_numpy()]
    return numbers


def add_to_rows(rows: Dataset, numbers: np.ndarray, *, key: str) -> Dataset:
    """Return a dataset of tokens with the group of each row.

    Args:
        rows: a row of tokens each.
        numbers: (rows,) the group of each.
        key: the key of the tokens in the cache.

    """
    column = Dataset(pa.table({GROUPS: numbers}), fingerprint=_make_fingerprint(key, numbers, "rows"))
    return concatenate_datasets([rows, column], axis=1)


def add_to_tokens(rows: Dataset, numbers: np.ndarray, *, key: str) -> Dataset:
    """Return a dataset of tokens with the group of each token, to be packed. The arguments are those of `add_to_rows`.

    All columns are written to the cache together, batch by batch: TRL packs only columns that lie in memory alike, and
    memory does not grow with the number of rows.
    """

    def add(table: pa.Table, indices: Sequence[int]) -> pa.Table:
        lengths = pc.list_value_length(table["labels"]).to_numpy()
        offsets = np.cumsum([0, *lengths.tolist()], dtype=np.int32)
        values = np.repeat(numbers[np.asarray(indices)], lengths)
        return table.append_column(GROUPS, pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)))

    grouped = rows.with_format("arrow").map(
        add,
        batched=True,
        with_indices=True,
        features=Features({**rows.features, GROUPS: List(GROUP)}),
        new_fingerprint=_make_fingerprint(key, numbers, "tokens"),
        desc="Grouping",
    )
    return grouped.with_format(None)


def add_to_stream(stream: IterableDataset, number: int, *, is_packed: bool) -> IterableDataset:
    """Return a stream of tokens whose rows carry a group; where they are packed later, each of their tokens does."""

    def add(row: dict[str, Any]) -> dict[str, Any]:
        return {GROUPS: [number] * len(row["labels"]) if is_packed else number}

    return stream.map(add, features=Features({**stream.features, GROUPS: List(GROUP) if is_packed else GROUP}))


def merge_runs(packs: Dataset, *, key: str) -> Dataset:
    """Return packs with runs of tokens of one group in place of the group of each token.

    A loader then reads a number for each run, not for each token.
    """
    runs = (
        packs.select_columns([GROUPS])
        .with_format("arrow")
        .map(
            _find_runs,
            batched=True,
            features=Features({GROUPS: List(GROUP), GROUP_LENGTHS: List(Value("int32"))}),
            new_fingerprint=_digest(f"{key} runs"),
            desc="Grouping",
        )
    )
    return concatenate_datasets([packs.remove_columns([GROUPS]), runs.with_format(None)], axis=1)


def _find_runs(table: pa.Table) -> pa.Table:
    """Return the groups of packs as runs: two lists for each pack."""
    column = table[GROUPS].combine_chunks()
    values = pc.list_flatten(column).to_numpy()
    bounds = np.cumsum([0, *pc.list_value_length(column).to_pylist()])
    begins = np.ones(len(values) + 1, dtype=bool)  # whether a run begins at a token; the last one stands for the end
    begins[1:-1] = values[1:] != values[:-1]
    begins[bounds] = True
    starts = np.flatnonzero(begins)
    offsets = pa.array(np.searchsorted(starts, bounds).astype(np.int32))
    runs = {GROUPS: values[starts[:-1]], GROUP_LENGTHS: np.diff(starts).astype(np.int32)}
    return pa.table({name: pa.ListArray.from_arrays(offsets, pa.array(array)) for name, array in runs.items()})


def digest_numbers(numbers: np.ndarray) -> str:
    """Return a digest of the groups of rows."""
    return xxhash.xxh3_128_hexdigest(numbers.tobytes())


def _make_fingerprint(key: str, numbers: np.ndarray, kind: str) -> str:
    """Return the name under which `datasets` caches the column of groups."""
    return _digest(f"{key} {kind} {digest_numbers(numbers)}")


def _digest(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())
