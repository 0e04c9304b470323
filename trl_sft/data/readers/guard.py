"""Compares what a reader gave with the lines of the file, parsed a second time with the standard library.

Inputs: a file, and the rows that a reader gave. Outputs: none, or `GuardError` at the first difference, which stops the
run. Every row has to begin on the line that the reader says, and every line that is not blank has to belong to a row.
Of each block the first row, the last and some between them are parsed from the raw text and compared. The elements of
an array are compared with its text. Deliberately not here: mending anything.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from trl_sft.data.readers.data_file import DataFile, count_line_breaks, open_text
from trl_sft.data.readers.record_block import BLOCK_CHARACTERS, ReadingError, RecordBlock
from trl_sft.errors import Fault, NotAsAsked

_SAMPLED_ROWS = 8  # of each block, beside its first and its last row
_SEPARATORS = re.compile(r"[ \t\r\n,]+")


class GuardError(NotAsAsked):
    """A reader of this package gave a row that is not in the file: an error of trl_sft, which stops the run."""

    def __init__(self, file: DataFile, line: int, problem: str) -> None:
        """Take the file, the line, from 1, and the difference."""
        fix = "Report this with the line: it is an error of trl_sft."
        super().__init__([Fault(f"{file.name}:{line}", problem, fix, code="data.misread_row")])


class LineGuard:
    """Reads the lines of a file again, in step with a reader."""

    def __init__(
        self,
        file: DataFile,
        parse: Callable[[list[str], int], list[Any]],
        is_equal: Callable[[str, Any], bool],
        *,
        encoding: str,
        errors: str,
    ) -> None:
        """Open the file.

        Args:
            file: the file.
            parse: returns the rows that some lines hold, as the standard library parses them; the second argument is
                the number of the first line.
            is_equal: tells whether a record is such a row.
            encoding: of the text.
            errors: what becomes of bytes that are not in that encoding.

        """
        self.file, self.parse, self.is_equal = file, parse, is_equal
        self.resources = ExitStack()
        stream = self.resources.enter_context(open_text(file, encoding, errors))
        self.lines: Iterator[str] = iter(stream)
        self.line = 1  # the number of the next line of `lines`
        self.waiting: tuple[str, int] | None = None  # the last row, whose end is the beginning of the next
        self.is_sampled = False

    def check(self, block: RecordBlock) -> None:
        """Compare a block of rows. Raises GuardError."""
        sampled = _choose_sample(len(block.records), block.lines[0])
        for index, (record, line) in enumerate(zip(block.records, block.lines, strict=True)):
            if self.waiting is not None:
                self._check_row(self.waiting, until=line)
            else:
                self._take(until=line)  # the header of a CSV file, and blank lines
            self.waiting = (record, line)
            self.is_sampled = index in sampled

    def finish(self) -> None:
        """Compare the last row with the rest of the file. Raises GuardError."""
        if self.waiting is not None:
            self._check_row(self.waiting, until=None)
        self.close()

    def close(self) -> None:
        """Close the file."""
        self.resources.close()

    def _take(self, until: int | None) -> list[str]:
        """Return the lines before the line `until`; None = all that are left."""
        lines = list(itertools.islice(self.lines, None if until is None else max(0, until - self.line)))
        self.line += len(lines)
        return lines

    def _check_row(self, row: tuple[str, int], until: int | None) -> None:
        """Compare a row with its lines. Raises GuardError."""
        record, line = row
        if line != self.line:
            raise GuardError(self.file, self.line, f"the reader says that a row begins on line {line}: {record[:200]}")
        lines = self._take(until)
        if len(lines) != 1 or self.is_sampled:
            try:
                expected = self.parse(lines, line)
            except ReadingError as error:
                raise GuardError(self.file, line, f"the reader gave {record[:200]}, but {error.problem}") from None
            if len(expected) != 1 or not self.is_equal(record, expected[0]):
                shown = "".join(lines)[:200]
                raise GuardError(self.file, line, f"the reader gave {record[:200]}, the file has {shown}")


def parse_json_lines(lines: Sequence[str], _: int) -> list[Any]:
    """Return the JSON values of lines; of a line that is not JSON its text."""
    values = []
    for line in lines:
        if text := line.strip(" \t\r\n"):
            try:
                values.append(json.loads(text))
            except (ValueError, RecursionError):
                values.append(text)
    return values


class ElementGuard:
    """Reads the text of a JSON array again, in step with a reader; between two elements only a comma may stand."""

    def __init__(self, file: DataFile, *, is_whole_file: bool, encoding: str, errors: str) -> None:
        """Open the file.

        Args:
            file: the file.
            is_whole_file: whether the array is all of the file; else it stands under a key.
            encoding: of the text.
            errors: what becomes of bytes that are not in that encoding.

        """
        self.file, self.is_whole_file = file, is_whole_file
        self.resources = ExitStack()
        self.stream = self.resources.enter_context(open_text(file, encoding, errors))
        self.buffer = ""
        self.position = 0
        self.line = 1
        self.is_begun = False  # whether the position is within the array

    def check(self, block: RecordBlock) -> None:
        """Compare a block of rows. Raises GuardError."""
        if not block.is_verbatim:
            return
        sampled = _choose_sample(len(block.records), block.lines[0])
        for index, (record, line) in enumerate(zip(block.records, block.lines, strict=True)):
            if not self.is_begun and not self.is_whole_file:
                self._find_first(record)
            else:
                self._skip_separators()
            self._fill(len(record))
            begin, end = self.position, self.position + len(record)
            is_equal = self.buffer.startswith(record, begin)
            if is_equal and index in sampled:
                is_equal = is_json_value(record, json.loads(self.buffer[begin:end]))
            if not is_equal or line != self.line:
                shown = self.buffer[begin : begin + 200]
                problem = f"the reader gave {record[:200]} of line {line}, the file has {shown}"
                raise GuardError(self.file, self.line, problem)
            self._advance(len(record))

    def finish(self) -> None:
        """Compare the end of the array with that of the rows. Raises GuardError."""
        if self.is_begun or self.is_whole_file:
            self._skip_separators()
            if self.buffer[self.position : self.position + 1] != "]":
                raise GuardError(self.file, self.line, "the reader gave too few rows")
        self.close()

    def close(self) -> None:
        """Close the file."""
        self.resources.close()

    def _fill(self, characters: int) -> bool:
        """Read until so many characters follow the position; False = the file ends before."""
        while len(self.buffer) - self.position < characters:
            block = self.stream.read(BLOCK_CHARACTERS)
            if not block:
                return False
            self.buffer = self.buffer[self.position :] + block
            self.position = 0
        return True

    def _advance(self, characters: int) -> None:
        """Move past so many characters, which are in the buffer, and count their lines."""
        self._fill(characters + 1)
        end = self.position + characters
        passed = self.buffer[self.position : end]
        self.line += count_line_breaks(passed)
        if passed.endswith("\r") and self.buffer.startswith("\n", end):  # the break is counted with its \n
            self.line -= 1
        self.position = end

    def _skip_separators(self) -> None:
        """Move past whitespace, commas and, before the first element, the bracket that opens the array."""
        while self._fill(1):
            match = _SEPARATORS.match(self.buffer, self.position)
            if match is not None:
                self._advance(len(match[0]))
            elif not self.is_begun and self.buffer[self.position] == "[":
                self.is_begun = True
                self._advance(1)
            else:
                return

    def _find_first(self, record: str) -> None:
        """Move to the first row of an array that stands under a key. Raises GuardError."""
        while (position := self.buffer.find(record, self.position)) < 0:
            if not self._fill(len(self.buffer) - self.position + 1):
                raise GuardError(self.file, 1, f"the first row is not in the file: {record[:200]}")
            surplus = len(self.buffer) - self.position - BLOCK_CHARACTERS - len(record)
            if surplus > 0:
                self._advance(surplus)
        self._advance(position - self.position)
        self.is_begun = True


def _choose_sample(rows: int, seed: int) -> set[int]:
    """Return the numbers of the rows of a block that are parsed."""
    if rows <= _SAMPLED_ROWS:
        return set(range(rows))
    numbers = np.random.default_rng(seed).integers(0, rows, _SAMPLED_ROWS).tolist()
    return {0, rows - 1, *numbers}


def is_json_value(record: str, expected: Any) -> bool:
    """Tell whether the text of a record is that value: 1, 1.0 and true are three values, and keys have an order."""
    try:
        value = json.loads(record)
    except (ValueError, RecursionError):
        value = record
    return json.dumps(value) == json.dumps(expected)
