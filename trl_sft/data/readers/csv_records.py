r"""Reads CSV files row by row; every cell is text, as it stands in the file.

Inputs: a file and the keys of `datasets.CsvConfig`, whose meaning is that of `pandas.read_csv`. Outputs: blocks of
rows, each the JSON object of its cells, with the line on which the row begins. `5`, `007`, `True`, `NA` and the empty
cell are texts; `na_values`, `keep_default_na: true` and `na_filter: true` name the texts that are null. A row with too
few cells lacks the last columns; one with too many is refused. Deliberately not here: what a cell means.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
import sys
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from json.encoder import encode_basestring
from typing import Any, NamedTuple

from trl_sft.console import format_names
from trl_sft.data.readers.data_file import DataFile, open_text, read_lines
from trl_sft.data.readers.record_block import (
    BLOCK_CHARACTERS,
    BLOCK_ROWS,
    LONGEST_RECORD,
    MOST_BLANK_LINES,
    BlankLinesError,
    LongRecordError,
    ReadingError,
    RecordBlock,
)

# https://pandas.pydata.org/docs/reference/api/pandas.read_csv.html, `na_values`
_PANDAS_NULLS = frozenset(
    ["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"]
) | {"NULL", "NaN", "None", "n/a", "nan", "null"}
# Keys of CsvConfig that decide the type of a column, and what to do instead: columns have no type here.
_TYPE_KEYS = ("converters", "true_values", "false_values", "thousands", "decimal", "float_precision", "date_format")
# Keys that pandas no longer has, or that say how it works inside: they change no cell.
_PANDAS_KEYS = ("prefix", "mangle_dupe_cols", "error_bad_lines", "warn_bad_lines", "verbose", "engine", "memory_map")
_MOST_COLUMNS = 100_000
_NO_QUOTES = "Or set `quoting: 3` if quotes have no meaning."
_EDITOR_LINE_BREAKS = ("\n", "\r", "\r\n")


class CsvOptions(NamedTuple):
    """How a CSV file is read; the names are those of `datasets.CsvConfig`."""

    sep: str = ","
    header: int | None = 0  # the number of the row with the names of the columns, from 0; None = there is none
    names: tuple[str, ...] = ()
    usecols: tuple[str | int, ...] = ()
    skiprows: int | frozenset[int] = 0
    skipfooter: int = 0
    nrows: int | None = None
    skip_blank_lines: bool = True
    comment: str = ""
    quotechar: str = '"'
    quoting: int = csv.QUOTE_MINIMAL
    escapechar: str | None = None
    doublequote: bool = True
    skipinitialspace: bool = False
    nulls: frozenset[str] = frozenset()  # texts that are null
    drop_long_rows: bool = False  # whether rows with too many cells are left out
    encoding: str = "utf-8"
    encoding_errors: str = "strict"


class OptionError(ValueError):
    """A key of a source that cannot be carried out: `key`, `problem`, `fix` and `code` are parts of the fault."""

    def __init__(self, key: str, problem: str, fix: str, *, code: str = "data.wrong_keyword") -> None:
        """Take the key, and the other parts of the fault."""
        self.key, self.problem, self.fix, self.code = key, problem, fix, code
        super().__init__(problem)


class _Row(NamedTuple):
    """The cells of a row, and the line on which it begins, from 1."""

    cells: list[str]
    line: int


def read_csv(file: DataFile, options: CsvOptions) -> Iterator[RecordBlock]:
    """Yield the rows of a CSV file as JSON objects of texts.

    Raises:
        ReadingError: a quoted cell is not closed, a row has more cells than there are columns, or there is no header.
        UnicodeDecodeError: the file has another encoding.

    """
    rows = _read_rows(file, options)
    columns, first = _read_header(rows, options)
    if not columns:
        return
    _check_columns(columns)
    writer = _RecordWriter(columns, options)
    records: list[str] = []
    lines: list[int] = []
    characters = 0
    for row in itertools.islice(itertools.chain(first, rows), options.nrows):
        if len(row.cells) > len(columns):
            if options.drop_long_rows:
                continue
            raise _explain_long_row(row, columns)
        record = writer.write(row.cells)
        records.append(record)
        lines.append(row.line)
        characters += len(record)
        if len(records) == BLOCK_ROWS or characters > BLOCK_CHARACTERS:
            yield RecordBlock(records, lines)
            records, lines, characters = [], [], 0
    if records:
        yield RecordBlock(records, lines)


def read_options(keywords: Mapping[str, Any]) -> CsvOptions:
    """Return the options that the keys of `datasets.CsvConfig` mean. Raises OptionError."""
    values = {name: value for name, value in keywords.items() if value is not None}
    for name in (*_TYPE_KEYS, *_PANDAS_KEYS, "index_col"):
        if name in values:
            problem = f"{name} has no effect: all cells of a CSV file are read as text, and no column becomes an index"
            raise OptionError(name, problem, f"Remove `{name}`.")
    terminator = values.get("lineterminator")
    if terminator not in (None, *_EDITOR_LINE_BREAKS):
        raise OptionError("lineterminator", f"lineterminator: {terminator!r} is no line break", "Remove it.")
    if isinstance(values.get("header"), list):
        raise OptionError("header", "several header rows cannot be read", "Set `header` to one row, and `skiprows`.")
    names = tuple(values.get("column_names") or values.get("names") or ())
    header = values.get("header", "infer")
    if header == "infer":
        header = None if names else 0
    if "header" in keywords and keywords["header"] is None:
        header = None
    dialect = csv.get_dialect(str(values["dialect"])) if "dialect" in values else None
    quoting = {
        name: getattr(dialect, name) if dialect is not None else values[name]
        for name in ("quotechar", "quoting", "escapechar", "doublequote", "skipinitialspace")
        if dialect is not None or name in values
    }
    separator = dialect.delimiter if dialect is not None else values.get("delimiter", values.get("sep", ","))
    skiprows = values.get("skiprows", 0)
    return CsvOptions(
        sep=separator,
        header=header,
        names=names,
        usecols=tuple(values.get("usecols", ())),
        skiprows=frozenset(skiprows) if isinstance(skiprows, list) else skiprows,
        nulls=_read_nulls(values),
        drop_long_rows=values.get("on_bad_lines", "error") != "error",
        **{
            name: values[name]
            for name in ("skipfooter", "nrows", "skip_blank_lines", "comment", "encoding", "encoding_errors")
            if name in values
        },
        **quoting,
    )


def parse_lines(lines: Sequence[str], first_line: int, options: CsvOptions) -> list[list[str | None]]:
    """Return the rows that some lines of a file hold, for the comparison with what was read.

    Args:
        lines: the lines of one row, from its beginning to the beginning of the next row.
        first_line: the number of the first of them in the file, from 1.
        options: how the file is read.

    Returns:
        The cells of each row; only of the first, where the options leave out rows behind it.

    """
    skipped = options.skiprows if isinstance(options.skiprows, frozenset) else frozenset()
    counted = iter([line for number, line in enumerate(lines, first_line - 1) if number not in skipped])
    rows = _split_lines(counted, options) if len(options.sep) > 1 else _parse_lines(counted, options)
    if options.drop_long_rows or options.skipfooter or options.nrows is not None:
        rows = itertools.islice(rows, 1)
    return [[None if cell in options.nulls else cell for cell in row.cells] for row in rows]


def is_row(record: str, cells: Sequence[str | None], options: CsvOptions) -> bool:
    """Tell whether a record has these cells; with `usecols` it has some of them, in their order."""
    values = list(json.loads(record).values())
    if not options.usecols:
        return values == list(cells)
    remaining = iter(cells)
    return all(value in remaining for value in values)


def make_reader(lines: Iterator[str], options: CsvOptions) -> Any:
    """Return the standard library's reader of these lines."""
    csv.field_size_limit(sys.maxsize)  # 131,072 characters by default: a long answer has more
    return csv.reader(
        lines,
        delimiter=options.sep,
        quotechar=options.quotechar,
        quoting=options.quoting,  # type: ignore[arg-type]
        escapechar=options.escapechar,
        doublequote=options.doublequote,
        skipinitialspace=options.skipinitialspace,
        strict=True,  # else a quote that is not closed takes the rest of the file into one cell
    )


def _read_nulls(values: Mapping[str, Any]) -> frozenset[str]:
    """Return the texts that are null, by `na_values`, `keep_default_na` and `na_filter`, where the recipe has them."""
    if values.get("na_filter") is False:
        return frozenset()
    listed = values.get("na_values", [])
    nulls = frozenset(map(str, listed if isinstance(listed, list) else [listed]))
    if values.get("keep_default_na") or (values.get("na_filter") and values.get("keep_default_na") is not False):
        nulls |= _PANDAS_NULLS
    return nulls


def _read_rows(file: DataFile, options: CsvOptions) -> Iterator[_Row]:
    """Yield the rows of a file, the header among them, without blank ones, comments, and what the options skip."""
    with open_text(file, options.encoding, options.encoding_errors) as stream:
        skipped = options.skiprows
        lines: Iterator[str] = read_lines(stream, LONGEST_RECORD)
        before = 0
        if isinstance(skipped, int):
            before = sum(1 for _ in itertools.islice(lines, skipped))
        else:
            lines = (line for number, line in enumerate(lines) if number not in skipped)
        rows = _split_lines(lines, options) if len(options.sep) > 1 else _parse_lines(lines, options)
        numbered = _Renumbered(rows, skipped if isinstance(skipped, frozenset) else frozenset(), before)
        yield from _leave_out_footer(numbered.read(), options)


class _Renumbered:
    """Rows whose lines count those that were skipped before them."""

    def __init__(self, rows: Iterator[_Row], skipped: frozenset[int], before: int) -> None:
        """Take rows, the numbers of skipped lines from 0, and the number of lines skipped at the beginning."""
        self.rows, self.skipped, self.before = rows, sorted(skipped), before

    def read(self) -> Iterator[_Row]:
        """Yield the rows with the lines of the file. Raises ReadingError with the line of the file."""
        try:
            for row in self.rows:
                yield row._replace(line=self._line(row.line)) if self.skipped or self.before else row
        except ReadingError as error:
            error.line = self._line(error.line)
            raise

    def _line(self, line: int) -> int:
        """Return the line of the file for a line among those that were read."""
        line += self.before
        for number in self.skipped:
            line += number < line
        return line


def _parse_lines(lines: Iterator[str], options: CsvOptions) -> Iterator[_Row]:
    """Yield the rows of CSV with a separator of one character. Raises ReadingError."""
    bounded = _BoundedLines(lines)
    lines = _cut_comments(bounded, options) if options.comment else bounded
    reader = make_reader(lines, options)
    begin = 1
    try:
        for cells in reader:
            if cells or not options.skip_blank_lines:
                yield _Row(cells or [""], begin)
            begin = reader.line_num + 1
            bounded.end_row(has_cells=bool(cells))
    except csv.Error as error:
        raise _explain_csv_error(begin, error, options) from None


class _BoundedLines:
    """Lines of which those of one row together have a limit, as the blank lines between two rows have."""

    def __init__(self, lines: Iterator[str]) -> None:
        """Take the lines."""
        self.lines = lines
        self.number = 0  # of lines that were read
        self.first_line = 1  # of the row that is read
        self.characters = 0  # of that row
        self.blank_lines = 0

    def __iter__(self) -> Iterator[str]:
        """Return the lines themselves."""
        return self

    def __next__(self) -> str:
        """Return the next line. Raises LongRecordError."""
        line = next(self.lines)
        self.number += 1
        self.characters += len(line)
        if self.characters > LONGEST_RECORD:
            raise LongRecordError(self.first_line)
        return line

    def end_row(self, *, has_cells: bool) -> None:
        """Note that a row ends with the last line. Raises BlankLinesError."""
        self.characters, self.first_line = 0, self.number + 1
        self.blank_lines = 0 if has_cells else self.blank_lines + 1
        if self.blank_lines > MOST_BLANK_LINES:
            raise BlankLinesError(self.first_line - self.blank_lines)


def _split_lines(lines: Iterator[str], options: CsvOptions) -> Iterator[_Row]:
    """Yield the rows of lines that a regular expression separates, as `pandas` reads a `sep` of several characters."""
    try:
        pattern = re.compile(options.sep)
    except re.error as error:
        raise OptionError(
            "sep", f"sep: {options.sep!r} is not a regular expression: {error}", "Correct `sep`."
        ) from None
    for number, line in enumerate(lines, 1):
        if len(line) > LONGEST_RECORD:
            raise LongRecordError(number)
        text = line.rstrip("\r\n")
        if text.strip() or not options.skip_blank_lines:
            if options.comment and options.comment in text:
                text = text.partition(options.comment)[0]
            if text:
                yield _Row(pattern.split(text), number)


def _cut_comments(lines: Iterator[str], options: CsvOptions) -> Iterator[str]:
    """Yield lines without their comments. A line that has a comment and a quote is refused: which is first is open."""
    for number, line in enumerate(lines, 1):
        position = line.find(options.comment)
        if position < 0:
            yield line
        elif options.quotechar in line[:position]:
            problem = f"the line holds quotes before {options.comment}, which begins a comment"
            raise ReadingError(
                number, problem, "Remove the comment from the line, or remove `comment`.", code="data.invalid_table"
            )
        else:
            yield line[:position] + "\n"


def _leave_out_footer(rows: Iterator[_Row], options: CsvOptions) -> Iterator[_Row]:
    """Yield all rows but the last `skipfooter`."""
    waiting: deque[_Row] = deque()
    for row in rows:
        waiting.append(row)
        if len(waiting) > options.skipfooter:
            yield waiting.popleft()


def _read_header(rows: Iterator[_Row], options: CsvOptions) -> tuple[list[str], Iterator[_Row]]:
    """Return the names of the columns, and the rows that were read to find them; without rows there are no columns."""
    if options.header is not None:
        header = next(itertools.islice(rows, options.header, None), None)
        if header is None:
            return [], iter(())
        names = list(options.names) or header.cells
        _check_number(names)
        return _name_unnamed(names), iter(())
    first = next(rows, None)
    if first is None:
        return [], iter(())
    names = list(options.names) or [str(number) for number in range(len(first.cells))]
    return names, iter([first])


def _name_unnamed(names: list[str]) -> list[str]:
    """Return the names of columns, those without a name as `pandas` names them."""
    return [name or f"Unnamed: {number}" for number, name in enumerate(names)]


def _check_number(names: Sequence[str]) -> None:
    """Refuse a header with more columns than a table has. Raises ReadingError."""
    if len(names) > _MOST_COLUMNS:
        unnamed = sum(not name for name in names)
        problem = f"the header has {len(names):,} columns, {unnamed:,} of them without a name"
        fix = "Remove the columns that are not needed, or correct the separators in the header."
        raise ReadingError(1, problem, fix, code="data.invalid_table")


def _check_columns(columns: Sequence[str]) -> None:
    """Refuse two columns of one name. Raises ReadingError."""
    repeated = sorted(name for name, number in Counter(columns).items() if number > 1)
    if repeated:
        problem = f"the header has the column {repeated[0]} twice"
        raise ReadingError(
            1, problem, "Rename one of the two in the file, or set `names` and `header: 0`.", code="data.invalid_table"
        )


class _RecordWriter:
    """Writes the cells of rows as JSON objects."""

    def __init__(self, columns: Sequence[str], options: CsvOptions) -> None:
        """Take the names of the columns, and the options for the columns and the texts that count."""
        chosen = options.usecols
        unknown = [name for name in chosen if name not in columns and not isinstance(name, int)]
        if unknown:
            problem = f"there is no column {unknown[0]}; the columns are {format_names(columns)}"
            raise OptionError("usecols", problem, "Correct `usecols`.")
        self.keys = [
            f"{json.dumps(name, ensure_ascii=False)}: " if not chosen or name in chosen or number in chosen else ""
            for number, name in enumerate(columns)
        ]
        self.nulls, self.takes_all = options.nulls, not chosen

    def write(self, cells: Sequence[str]) -> str:
        """Return the JSON object of a row; it lacks the columns for which the row has no cell."""
        pairs = zip(self.keys, cells, strict=False)
        if self.nulls or not self.takes_all:
            values = [key + ("null" if cell in self.nulls else encode_basestring(cell)) for key, cell in pairs if key]
        else:
            values = [key + encode_basestring(cell) for key, cell in pairs]
        return "{" + ", ".join(values) + "}"


def _explain_long_row(row: _Row, columns: Sequence[str]) -> ReadingError:
    """Return the error of a row with more cells than there are columns."""
    extra = row.cells[len(columns)]
    problem = f"the row has {len(row.cells)} cells, but there are {len(columns)} columns: {format_names(columns)}"
    fix = "Quote the cells that hold the separator, or set `sep` to the separator of the file."
    return ReadingError(
        row.line, f"{problem}; the first cell too many is {extra[:40]!r}", fix, code="data.invalid_table"
    )


def _explain_csv_error(line: int, error: csv.Error, options: CsvOptions) -> ReadingError:
    """Return the error for which the standard library refused a row."""
    quote = options.quotechar
    if "unexpected end of data" in str(error):
        problem = f"the row has a cell that begins with {quote} and is not closed before the end of the file"
        return ReadingError(
            line,
            problem,
            f"Close the quote, or write {quote}{quote} for a quote inside a cell. {_NO_QUOTES}",
            code="data.invalid_table",
        )
    if "expected after" in str(error):
        problem = f"the row has a quoted cell with text after its closing {quote}"
        fix = (
            f"Write {quote}{quote} for a quote inside a cell. "
            f'If the file writes \\{quote}, set `escapechar: "\\\\"`. {_NO_QUOTES}'
        )
        return ReadingError(line, problem, fix, code="data.invalid_table")
    return ReadingError(line, str(error), "Correct the row, or the keys of the source.", code="data.invalid_table")
