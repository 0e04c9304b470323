"""One source of rows, from its files to one of TRL's dataset types: read, sampled, formatted, described.

Inputs: a `Source` of the recipe and what the tokenizer can do. Outputs: a `Split`, the one container of formatted rows,
which tokenization takes as it is; every fault names file and row. Rows are formatted in batches by `datasets.map`,
which caches them. Deliberately not here: what happens to several sources together (`rows`).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Json, List, Value, concatenate_datasets
from datasets.fingerprint import Hasher

from trl_sft.console import escape_control_characters, format_rows
from trl_sft.data import bad_rows, formats, load, messages, mix, unread_files, unread_keys, user_function
from trl_sft.data.bad_rows import BadRow, Kinds
from trl_sft.data.code_digest import digest_code, get_fingerprint
from trl_sft.data.formats import CHAT, PAIRS, TEXT, TokenizerFeatures
from trl_sft.data.formatted_columns import write_table
from trl_sft.data.source_format import SourceFormat, choose_format, describe_format, recognise_format
from trl_sft.data.source_rows import RowPlaces, decode_batch
from trl_sft.data.unread_keys import UnreadKey
from trl_sft.errors import DataError, Fault
from trl_sft.recipe.checked import Run, Source
from trl_sft.recipe.paths import FunctionLocation
from trl_sft.recipe.yaml_reader import Recipe
from trl_sft.row_progress import RowProgress

# Columns that a batch gets beside TRL's, for what is reported of all rows together; they are removed afterwards.
_AS_TEXT = "_as_text"  # what became text because the chat template does not render it, joined by ", "
_UNUSED = "_unused"  # keys of turns, and columns of the user's function, that nothing reads, joined by ", "
UNREAD = "_unread"  # columns and keys of turns that nothing reads although they carry a meaning, joined by ", "
_EARLIER_ANSWERS = "_earlier_answers"  # how many assistant turns the prompt holds
_ESCAPED = "_escaped"  # whether a text holds a special token that is plain text
BAD_ROW = "_bad_row"  # why the row is not trained, as `BadRow.to_json` writes it; its other columns are empty then
_REPORT_COLUMNS = {
    BAD_ROW: Value("string"),
    _AS_TEXT: Value("string"),
    _UNUSED: Value("string"),
    UNREAD: Value("string"),
    _EARLIER_ANSWERS: Value("int32"),
    _ESCAPED: Value("bool"),
}
# Messages are stored as JSON: a struct of Arrow has the keys of all rows, null where a row lacks one, and a chat
# template would render the nulls.
_CHAT_COLUMNS = Features(
    {
        "prompt": List(Json()),
        "completion": List(Json()),
        "tools": Value("string"),
        formats.TASK: Value("string"),
        messages.UNTRAINED: List(Value("int32")),
    }
    | _REPORT_COLUMNS
)
_PAIR_COLUMNS = Features(
    {"prompt": Value("string"), "completion": Value("string"), formats.TASK: Value("string")} | _REPORT_COLUMNS
)
_TEXT_COLUMNS = Features({"text": Value("string"), formats.TASK: Value("string")} | _REPORT_COLUMNS)
_COLUMNS = {CHAT: _CHAT_COLUMNS, PAIRS: _PAIR_COLUMNS, TEXT: _TEXT_COLUMNS}  # TRL's dataset type -> columns
_PURPOSES = {"train": "train", "eval": "evaluate"}  # key below `data:` -> the verb in notes
# Rows that other code formatted must not come from the cache of `datasets`.
CODE = digest_code(Path(__file__).parent)


class FormattedSource(NamedTuple):
    """The description of one source, without its rows."""

    source: Source
    source_format: SourceFormat
    places: RowPlaces  # where its rows stand
    row_type: str  # TRL's dataset type: CHAT, PAIRS or TEXT
    multi_turn: bool  # whether some prompt holds an earlier answer
    has_escaped_tokens: bool  # whether some text holds a special token that is plain text
    notes: tuple[str, ...] = ()  # lines for the screen
    faults: tuple[Fault, ...] = ()  # columns that carry a meaning and are not read

    @property
    def name(self) -> str:
        """The name of the source in messages."""
        return self.source.name

    @property
    def short_name(self) -> str:
        """The name of its file or folder without its ending."""
        return Path(self.name).name.partition(".")[0]

    @property
    def weight(self) -> float | None:
        """The share of an epoch that the recipe asks for, before scaling; None = all rows."""
        return self.source.weight


class Split(NamedTuple):
    """The formatted rows of the training set or of one evaluation set, one source after another.

    Attributes:
        rows: the formatted rows of all sources.
        sources: what is known of each source.
        source_indices: (rows,) the position of a row's source in `sources`.
        row_numbers: (rows,) the number of a row in its source, from 0.
        order: which rows, in the order of training; a row may occur several times.
        removed_rows: reason -> numbers of the rows that are removed for it.
        bad_rows: the kinds of rows that cannot be formatted; each is a reason in `removed_rows` too.
        fingerprint: the key under which `datasets` caches what is computed from `rows`.

    """

    rows: Dataset
    sources: tuple[FormattedSource, ...]
    source_indices: np.ndarray
    row_numbers: np.ndarray
    order: np.ndarray
    removed_rows: dict[str, np.ndarray]
    bad_rows: Kinds
    fingerprint: str

    def row_name(self, number: int) -> str:
        """Return the name of a row in messages: its file, its number there from 1, and its line."""
        places: RowPlaces = self.sources[self.source_indices[number]].places
        return places.name_row(int(self.row_numbers[number]))


def inspect_source(recipe: Recipe, source: Source) -> tuple[str, list[str], int]:
    """Return format, columns and number of rows of a source, without formatting it. Raises DataError."""
    source_rows = load.load_source(recipe, source)
    columns = list(source_rows.columns)
    return recognise_format(recipe, source, columns, rows=source_rows), columns, len(source_rows.rows)


def format_source(run: Run, source: Source, features: TokenizerFeatures, *, max_rows: int | None = None) -> Split:
    """Read and format the rows of one source.

    Args:
        run: the checked recipe.
        source: the entry of `data.train` or `data.eval`.
        features: what the tokenizer can do.
        max_rows: the number of rows to read from the beginning; None = all rows, or a sample where the source says
            `max_rows`.

    Returns:
        All rows that were read; those that cannot be formatted are in `bad_rows` and not in `order`.

    Raises:
        DataError: the source cannot be read, or its columns fit no format.
        RecipeError: the keys of the source contradict each other.

    """
    source_rows = load.load_source(run.recipe, source, max_rows)
    rows = source_rows.rows
    total = len(rows)
    if total == 0:
        where = run.recipe.where(source.key)
        raise DataError(Fault(where, f"{source.name} has no rows", "Name a source that has rows.", code="data.no_rows"))
    row_numbers = None
    if max_rows is None and source.max_rows is not None and source.max_rows < total:
        row_numbers = mix.sample_numbers(total, source.max_rows, mix.run_seed(run))
        rows = rows.select(row_numbers)
    numbers = range(total) if row_numbers is None else row_numbers.tolist()
    source_format, unused_columns = choose_format(run.recipe, source, features, rows=source_rows, numbers=numbers)
    formatted = _map_rows(rows, source_format, num_proc=run.train.get("dataset_num_proc"))
    split = _make_split(source, source_format, formatted, places=source_rows.places, row_numbers=row_numbers)
    notes = list(unread_files.write_notes(run, source, source_rows)) if not source.builder else []
    notes += _write_notes(run, split, formatted, unused=unused_columns, total=total, head=max_rows)
    faults: list[Fault] = []
    unread = _find_unread(split, formatted)
    if unread and unread_keys.is_accepted(run):
        notes.append(unread_keys.describe_accepted(source.name, unread))
    else:
        faults = unread_keys.explain(
            run, source, unread, source_format=source_format, columns=list(source_rows.columns)
        )
    return split._replace(sources=(split.sources[0]._replace(notes=tuple(notes), faults=tuple(faults)),))


def _make_split(
    source: Source,
    source_format: SourceFormat,
    formatted: Dataset,
    *,
    places: RowPlaces,
    row_numbers: np.ndarray | None,
) -> Split:
    """Return the formatted rows of one source, without those that cannot be formatted."""
    every = np.arange(len(formatted), dtype=np.int64)
    rows = formatted.remove_columns(list(_REPORT_COLUMNS))
    formatted_source = FormattedSource(
        source=source,
        source_format=source_format,
        places=places,
        row_type=_row_type(source_format),
        multi_turn=(pc.max(formatted.data[_EARLIER_ANSWERS]).as_py() or 0) > 0,
        has_escaped_tokens=bool(pc.any(formatted.data[_ESCAPED]).as_py()),
    )
    split = Split(
        rows=rows,
        sources=(formatted_source,),
        source_indices=np.zeros_like(every),
        row_numbers=every if row_numbers is None else row_numbers,
        order=every,
        removed_rows={},
        bad_rows={},
        fingerprint=get_fingerprint(rows),
    )
    return _remove_bad_rows(split, formatted)


def _find_unread(split: Split, formatted: Dataset) -> list[UnreadKey]:
    """Return the columns and keys of turns that carry a meaning and are not read, those of the first rows first."""
    column = formatted.data[UNREAD]
    first_rows: dict[str, int] = {}
    counts: Counter[str] = Counter()
    for entry in pc.value_counts(column).to_pylist():
        first = pc.index(column, entry["values"]).as_py() if entry["values"] else 0
        for name in filter(None, entry["values"].split(", ")):
            counts[name] += entry["counts"]
            first_rows[name] = min(first, first_rows.get(name, first))
    names = sorted(counts, key=lambda name: first_rows[name])
    return [UnreadKey(name, counts[name], split.row_name(first_rows[name])) for name in names]


def _remove_bad_rows(split: Split, formatted: Dataset) -> Split:
    """Return a split without the rows that cannot be formatted, or that the user's function drops."""
    kinds: Kinds = {}
    numbers: dict[str, list[int]] = {}
    column = formatted.data[BAD_ROW]
    for number in np.flatnonzero(pc.is_valid(column).to_numpy()).tolist():
        bad_row = bad_rows.read_json(column[number].as_py())
        name = bad_row.kind
        if bad_row.code:
            name = bad_rows.add(kinds, bad_row, number=number, place=split.row_name(number))
        numbers.setdefault(name, []).append(number)
    if not numbers:
        return split
    removed_rows = {name: np.array(rows, dtype=np.int64) for name, rows in numbers.items()}
    order = np.setdiff1d(split.order, np.concatenate(list(removed_rows.values())), assume_unique=True)
    return split._replace(order=order, removed_rows=removed_rows, bad_rows=kinds)


def join_splits(splits: Sequence[Split]) -> Split:
    """Return one split of all rows, source after source."""
    rows = concatenate_datasets([split.rows for split in splits])
    starts = np.cumsum([0, *(len(split.rows) for split in splits)]).tolist()
    removed_rows: dict[str, np.ndarray] = {}
    for start, split in zip(starts, splits, strict=False):
        for reason, numbers in split.removed_rows.items():
            earlier = removed_rows.get(reason, np.zeros(0, dtype=np.int64))
            removed_rows[reason] = np.concatenate([earlier, numbers + start])
    return Split(
        rows=rows,
        sources=tuple(source for split in splits for source in split.sources),
        source_indices=np.repeat(np.arange(len(splits)), [len(split.rows) for split in splits]),
        row_numbers=np.concatenate([split.row_numbers for split in splits]),
        order=np.concatenate([split.order + start for start, split in zip(starts, splits, strict=False)]),
        removed_rows=removed_rows,
        bad_rows=bad_rows.join([split.bad_rows for split in splits], starts),
        fingerprint=get_fingerprint(rows),
    )


def format_batch(
    batch: Mapping[str, list[Any]], *, source_format: SourceFormat, column_types: Features
) -> dict[str, list[Any]]:
    """Format a batch of rows, as `datasets.map` calls it.

    Args:
        batch: column -> values, (rows,) each.
        source_format: how the rows are formatted.
        column_types: the types of the columns of the dataset.

    Returns:
        The columns of TRL's dataset type and `task`, with columns for the report, whose names begin with _. A row that
        cannot be formatted has its problem in `_bad_row`, and its other columns are empty.

    """
    formatted: list[dict[str, Any]] = []
    for row in decode_batch(batch, column_types, dict(source_format.rename)):
        try:
            if isinstance(row, messages.FormatError):
                raise row
            formatted.append(format_one(row, source_format))
        except messages.FormatError as error:
            bad_row = bad_rows.describe_problem(error.problem, error.fix, code=error.code)
            formatted.append(_make_empty_row(source_format, bad_row))
        except RecursionError:
            problem, fix = "the row is nested too deeply to be read", "Remove levels of lists and objects."
            bad_row = bad_rows.describe_problem(problem, fix, code="data.invalid_json")
            formatted.append(_make_empty_row(source_format, bad_row))
    return {column: [row[column] for row in formatted] for column in _COLUMNS[_row_type(source_format)]}


def _make_empty_row(source_format: SourceFormat, bad_row: BadRow) -> dict[str, Any]:
    """Return what stands for a row that is not trained."""
    columns = dict.fromkeys(_COLUMNS[_row_type(source_format)])
    content: Any = [] if source_format.wording == "chat" else ""
    columns |= {name: content for name in ("prompt", "completion", "text") if name in columns}
    return columns | {
        _AS_TEXT: "",
        _UNUSED: "",
        UNREAD: "",
        _EARLIER_ANSWERS: 0,
        _ESCAPED: False,
        BAD_ROW: bad_row.to_json(),
    }


def _format_table(batch: Mapping[str, list[Any]], *, source_format: SourceFormat, column_types: Features) -> pa.Table:
    """Format a batch of rows as the table that `datasets.map` stores. The arguments are those of `format_batch`."""
    columns = format_batch(batch, source_format=source_format, column_types=column_types)
    return write_table(columns, _COLUMNS[_row_type(source_format)])


def fingerprint(rows: Dataset, source_format: SourceFormat) -> str:
    """Return the name under which `datasets` caches the formatted rows.

    The user's function counts with every module that was imported with it, and the code of this package: the hash
    that `datasets` would compute knows neither.
    """
    modules = user_function.digest_modules(source_format.function) if source_format.function else []
    return str(Hasher.hash([get_fingerprint(rows), CODE, source_format, modules]))


def _map_rows(rows: Dataset, source_format: SourceFormat, *, num_proc: int | None) -> Dataset:
    """Return the rows formatted, with the columns for the report; read from the cache of `datasets` where it has them.

    Args:
        rows: the rows of a source, as they were read.
        source_format: how they are formatted.
        num_proc: the number of processes that format them; None = this one.

    """
    title = escape_control_characters(f"Formatting {source_format.source_name}")
    options: dict[str, Any] = {"source_format": source_format, "column_types": rows.features}
    format_table: Callable[[Mapping[str, list[Any]]], pa.Table] = functools.partial(_format_table, **options)
    with RowProgress(title, len(rows), shows_bar=False) as progress:

        def format_here(batch: Mapping[str, list[Any]]) -> pa.Table:
            table = format_table(batch)
            progress.update(len(table))
            return table

        return rows.map(
            format_table if num_proc else format_here,  # another process has no part in the progress
            batched=True,
            remove_columns=rows.column_names,
            features=_COLUMNS[_row_type(source_format)],
            num_proc=num_proc,
            new_fingerprint=fingerprint(rows, source_format),
            desc=title,  # of the bar of `datasets`
        )


def _write_notes(
    run: Run, split: Split, formatted: Dataset, *, unused: set[str], total: int, head: int | None
) -> Iterator[str]:
    """Yield what the screen says of a source.

    Args:
        run: the checked recipe.
        split: the rows of the source.
        formatted: the same rows with the columns for the report.
        unused: the columns that formatting does not read.
        total: the number of rows that were read.
        head: the number of rows to read from the beginning; None = all.

    """
    source, source_format = split.sources[0].source, split.sources[0].source_format
    if head is None and source.max_rows not in (None, total):
        yield _note_sample(source, total)
    count = f"{format_rows(len(split.order))} to {_PURPOSES[str(source.key[1])]}"
    if head is not None:
        count = f"its first {format_rows(total)}"
    unused = unused | _distinct_names(formatted, _UNUSED)
    yield f"{source.name}: {count}; {describe_format(source, source_format, sorted(unused))}"
    if as_text := sorted(_distinct_names(formatted, _AS_TEXT)):
        yield _note_as_text(source_format, as_text)
    for reason, numbers in split.removed_rows.items():
        if bad_rows.drops_bad_rows(run) or reason not in split.bad_rows:
            yield bad_rows.describe_left_out(reason, len(numbers), place=split.row_name(int(numbers[0])))


def _note_sample(source: Source, total: int) -> str:
    """Return a note on what `max_rows` does to a source of so many rows."""
    assert source.max_rows is not None
    if source.max_rows < total:
        return f"{source.name}: {source.max_rows:,} of its {total:,} rows, sampled with the seed (max_rows)"
    return f"{source.name}: has {format_rows(total)}, fewer than max_rows: {source.max_rows:,}"


def _note_as_text(source_format: SourceFormat, parts: Sequence[str]) -> str:
    """Return a note on the parts of chats that became text."""
    reader = "the chat template" if source_format.wording == "chat" else f"wording {source_format.wording}"
    return f"{source_format.source_name}: {reader} does not render {' and '.join(parts)}: kept as text"


def _row_type(source_format: SourceFormat) -> str:
    """Return TRL's dataset type of formatted rows."""
    if source_format.wording == "chat":
        return CHAT
    is_text = "text" in source_format.wording if isinstance(source_format.wording, dict) else False
    return TEXT if is_text or source_format.format == "text" else PAIRS


def format_one(row: dict[str, Any], source_format: SourceFormat) -> dict[str, Any]:
    """Return one row in TRL's dataset type, with its task and the columns for the report.

    Args:
        row: the columns of the row.
        source_format: how the row is formatted.

    Raises:
        FormatError: the row cannot be formatted.

    """
    if source_format.function:
        columns = user_function.call_function(source_format.function, row)
        if columns is None:
            return _make_empty_row(source_format, _describe_dropped(source_format.function))
        row = columns
    unused, meaningful = unread_keys.list_unread(row, source_format.columns_read)
    if source_format.function:
        unused |= set(row) - {*source_format.columns_read, formats.TASK}
    row = {column: value for column, value in row.items() if column in source_format.columns_read}
    has_special_token = _has_special_token(row, source_format)
    if has_special_token:
        row = messages.escape(row, messages.special_pattern(source_format.features.special_tokens))
    formatted = formats.format_row(
        row,
        source_format.format,
        source_format.wording,
        features=source_format.features,
        task=source_format.task,
    )
    messages.refuse_half_characters(formatted.columns)  # also what a text of JSON inside a row holds
    prompt = formatted.columns.get("prompt")
    earlier_messages = prompt if isinstance(prompt, list) else []
    task = source_format.task or row.get(formats.TASK)
    return formatted.columns | {
        formats.TASK: task if isinstance(task, str) and task else None,
        _AS_TEXT: ", ".join(sorted(formatted.as_text)),
        _UNUSED: ", ".join(sorted(unused)),
        UNREAD: ", ".join(sorted(meaningful)),
        _EARLIER_ANSWERS: sum(message["role"] == "assistant" for message in earlier_messages),
        _ESCAPED: has_special_token,
        BAD_ROW: None,
    }


def _describe_dropped(function: FunctionLocation) -> BadRow:
    """Return what stands for a row that the user's function drops; it has no code, because it is no fault."""
    return BadRow("", "", f"dropped by {function.name}", "")


def _has_special_token(row: Mapping[str, Any], source_format: SourceFormat) -> bool:
    """Tell whether a text of a row holds a special token; raise FormatError where the recipe refuses that.

    Texts that are trained as they stand are not searched: their author may have written the template's tokens.
    """
    as_written = source_format.format == "text" or (
        source_format.format == "prompt_completion" and source_format.wording == "plain"
    )
    if as_written or not source_format.features.special_tokens:
        return False
    pattern = messages.special_pattern(source_format.features.special_tokens)
    for text in messages.iterate_texts(row):
        match = pattern.search(text)
        if match and text in messages.iterate_read_texts(row):
            if source_format.features.escape_special_tokens:
                return True
            fix = "Set `data.special_tokens_in_text: text` to train it as plain text, or remove it from the row."
            token = match[0] if match[0].strip() else repr(match[0])  # line breaks may be one
            problem = f"the text holds {token}, a special token of this tokenizer"
            raise messages.FormatError(problem, fix, code="data.special_token_in_text")
    return False


def _distinct_names(rows: Dataset, column: str) -> set[str]:
    """Return the distinct names in a column of names joined by ", "."""
    return {name for names in rows.unique(column) for name in names.split(", ") if name}
