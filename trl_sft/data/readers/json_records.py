"""Reads JSON files row by row without parsing them into types: lines of JSON, one array, or an array under a key.

Inputs: a file, its encoding and the key that holds the rows. Outputs: blocks of rows as JSON text, with their lines. A
line that is not JSON is a row too: it is refused where rows are parsed, by its line, so that the others are unchanged.
An array is read element by element; memory holds a block and the longest row. Deliberately not here: parsing of rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import IO, Any

from trl_sft.console import format_names
from trl_sft.data.readers.data_file import DataFile, count_line_breaks, open_text
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

_LINE_BREAK = re.compile(r"\r\n|\n|\r")
_BLANK = " \t\r\n"  # what JSON calls whitespace
_NOT_BLANK = re.compile(r"[^ \t\r\n]")
# A value that the end of the buffer cuts off is found invalid this close to it, or is an unterminated string.
_CUT_MARGIN = 16


def read_json(file: DataFile, *, field: str | None, encoding: str, errors: str) -> Iterator[RecordBlock]:
    """Yield the rows of a JSON file.

    Args:
        file: the file.
        field: the key that holds the rows in the one object of the file; None = lines of JSON, or one array.
        encoding: of the text.
        errors: what becomes of bytes that are not in that encoding, as `open` has it.

    Raises:
        ReadingError: an array is not valid JSON, or the file has no such key.
        UnicodeDecodeError: the file has another encoding.

    """
    with open_text(file, encoding, errors) as text:
        stream = _WholeBreaks(text)
        if field is not None:
            yield from _read_field(_Scanner(stream), field)
            return
        begin, line = _read_past_blanks(stream)
        if begin.startswith("["):
            scanner = _Scanner(stream, begin, line)
            yield from _gather(_read_array(scanner))
            if character := scanner.peek():
                problem = f"{character!r} stands after the list that the file begins with"
                raise ReadingError(
                    scanner.line, problem, "Write one list, or one JSON object per line.", code="data.invalid_json"
                )
        else:
            yield from _read_lines(stream, begin, line)


def has_lines(file: DataFile, *, field: str | None, encoding: str, errors: str) -> bool:
    """Tell whether the rows of a JSON file are lines, and not elements of one value."""
    if field is not None:
        return False
    with open_text(file, encoding, errors) as stream:
        return not _read_past_blanks(_WholeBreaks(stream))[0].startswith("[")


class _WholeBreaks:
    r"""A stream of text of which no block ends between \r and \n."""

    def __init__(self, stream: IO[str]) -> None:
        """Take the stream."""
        self.stream = stream
        self.waiting = ""  # a \r whose next character is not read yet

    def read(self, characters: int) -> str:
        """Return about so many further characters; "" = the end of the stream."""
        block = self.waiting + self.stream.read(characters)
        self.waiting = ""
        if block.endswith("\r") and len(block) > 1:
            self.waiting, block = "\r", block[:-1]
        elif block == "\r":
            block += self.stream.read(1)
        return block


def _read_past_blanks(stream: _WholeBreaks) -> tuple[str, int]:
    """Return the beginning of a stream without the whitespace before it, and its line. Raises LongRecordError."""
    line, blanks = 1, 0
    while block := stream.read(BLOCK_CHARACTERS):
        begin = block.lstrip(_BLANK)
        line += count_line_breaks(block[: len(block) - len(begin)])
        if begin:
            return begin, line
        blanks += len(block)
        if blanks > LONGEST_RECORD:
            raise LongRecordError(1, "the white space at the beginning")
    return "", line


def _read_lines(stream: _WholeBreaks, begin: str, line_number: int) -> Iterator[RecordBlock]:
    """Yield the lines of a stream that are not blank, after `begin`, which was read from it and is on `line_number`.

    Raises ReadingError for a line that is too long, and too many blank ones.
    """
    parts: list[str] = []  # of a line whose end is not read yet
    characters = 0  # of these parts
    last_row = line_number  # the line of the last row
    block = begin
    while block:
        lines = _LINE_BREAK.split(block) if "\r" in block else block.split("\n")
        if len(lines) > 1:
            lines[0] = "".join([*parts, lines[0]])
            parts = [lines.pop()]
            characters = len(parts[0])
            for records in _split_block(lines, line_number):
                last_row = records.lines[-1]
                yield records
            line_number += len(lines)
        else:
            parts.append(block)
            characters += len(block)
        if characters > LONGEST_RECORD:
            raise LongRecordError(line_number)
        if line_number - last_row - 1 > MOST_BLANK_LINES:
            raise BlankLinesError(last_row + 1)
        block = stream.read(BLOCK_CHARACTERS)
    yield from _split_block(["".join(parts)], line_number)


def _split_block(lines: list[str], first_line: int) -> Iterator[RecordBlock]:
    """Yield the lines that are not blank, in blocks of `BLOCK_ROWS`."""
    numbers = [number for number, line in enumerate(lines, first_line) if line.strip(_BLANK)]
    for start in range(0, len(numbers), BLOCK_ROWS):
        block = numbers[start : start + BLOCK_ROWS]
        yield RecordBlock([lines[number - first_line].strip(_BLANK) for number in block], block)


def _gather(rows: Iterator[tuple[str, int]]) -> Iterator[RecordBlock]:
    """Yield single rows in blocks of `BLOCK_ROWS`, or of `BLOCK_CHARACTERS` where they are long."""
    records: list[str] = []
    lines: list[int] = []
    characters = 0
    for record, line in rows:
        records.append(record)
        lines.append(line)
        characters += len(record)
        if len(records) == BLOCK_ROWS or characters > BLOCK_CHARACTERS:
            yield RecordBlock(records, lines)
            records, lines, characters = [], [], 0
    if records:
        yield RecordBlock(records, lines)


class _Scanner:
    """Reads JSON values from a stream of text one by one; the buffer holds a block and what is left of the last."""

    def __init__(self, stream: _WholeBreaks, begin: str = "", line: int = 1) -> None:
        """Take the stream, what was read from it already, and the line on which that begins."""
        self.stream, self.buffer = stream, begin
        self.position = 0
        self.counted = 0  # the position up to which `line` counts
        self.at_line = line
        self.size = BLOCK_CHARACTERS  # of the next block
        self.decoder = json.JSONDecoder()

    @property
    def line(self) -> int:
        """The line of the position, from 1."""
        self.at_line += count_line_breaks(self.buffer[self.counted : self.position])
        self.counted = self.position
        return self.at_line

    def fill(self) -> bool:
        """Read a further block; False = the stream is at its end."""
        block = self.stream.read(self.size)
        if not block:
            return False
        _ = self.line
        self.buffer = self.buffer[self.position :] + block
        self.position = self.counted = 0
        return True

    def peek(self) -> str:
        """Move to the next character that is not whitespace, and return it; "" = there is none."""
        while True:
            match = _NOT_BLANK.search(self.buffer, self.position)
            if match:
                self.position = match.start()
                return match[0]
            self.position = len(self.buffer)
            if not self.fill():
                return ""

    def expect(self, characters: str, context: str) -> str:
        """Move past the next character, which has to be one of `characters`. Raises ReadingError."""
        character = self.peek()
        if not character or character not in characters:
            shown = repr(character) if character else "the end of the file"
            raise ReadingError(
                self.line,
                f"not JSON: {shown} stands {context}",
                "Correct the JSON there; the file may be incomplete.",
                code="data.invalid_json",
            )
        self.position += 1
        return character

    def read_value(self) -> tuple[Any, str]:
        """Move past the next value; return it, and its text. Raises ReadingError."""
        self.peek()
        self.size = BLOCK_CHARACTERS
        while True:
            try:
                value, end = self.decoder.raw_decode(self.buffer, self.position)
            except json.JSONDecodeError as error:
                is_cut = error.pos >= len(self.buffer) - _CUT_MARGIN or error.msg.startswith("Unterminated string")
                if is_cut and self._fill_more():
                    continue
                self.position = error.pos
                excerpt = self.buffer[max(0, error.pos - 30) : error.pos + 10]
                line_begin = max(self.buffer.rfind("\n", 0, error.pos), self.buffer.rfind("\r", 0, error.pos))
                problem = f"not JSON at column {error.pos - line_begin}: ...{excerpt}"
                raise ReadingError(self.line, problem, "Correct the JSON there.", code="data.invalid_json") from None
            except RecursionError:
                raise ReadingError(
                    self.line,
                    "a value is nested too deeply to be read",
                    "Remove levels of lists and objects.",
                    code="data.invalid_json",
                ) from None
            except ValueError as error:  # a number of more than 4,300 digits
                problem = f"a value cannot be read: {error}"
                raise ReadingError(self.line, problem, "Correct the value.", code="data.invalid_json") from None
            rest = self.buffer[end : end + 3]
            is_cut = len(rest) < 3 and not rest.strip(".eE+-")  # a number may go on after the end of the buffer
            if not is_cut or not self._fill_more():
                text = self.buffer[self.position : end]
                self.position = end
                return value, text

    def _fill_more(self) -> bool:
        """Read a block that is twice as long as the last one, so that a long value is not tried too often.

        Raises LongRecordError where the value is too long.
        """
        if len(self.buffer) - self.position > LONGEST_RECORD:
            raise LongRecordError(self.line, "the value that begins here")
        self.size *= 2
        return self.fill()


def _read_array(scanner: _Scanner) -> Iterator[tuple[str, int]]:
    """Yield the elements of an array as JSON text, each with its line. Raises ReadingError."""
    scanner.expect("[", "where a list should begin")
    if scanner.peek() == "]":
        scanner.position += 1
        return
    while True:
        scanner.peek()
        line = scanner.line
        yield scanner.read_value()[1], line
        if scanner.expect(",]", "after an element of the list, where a comma or ] should stand") == "]":
            return


def _read_field(scanner: _Scanner, field: str) -> Iterator[RecordBlock]:
    """Yield the rows under a key of the one object of a file. Raises ReadingError."""
    if scanner.peek() != "{":
        problem = f"field: {field}, but the file is not one object with keys"
        raise ReadingError(scanner.line, problem, "Remove `field`.", code="data.invalid_json")
    scanner.position += 1
    names: list[str] = []
    while scanner.peek() != "}":
        line = scanner.line
        name, _ = scanner.read_value()
        scanner.expect(":", "after a key, where a colon should stand")
        names.append(str(name))
        if name == field:
            if names.count(field) > 1:
                raise ReadingError(
                    line, f"the key {field} is written twice", "Remove one of the two.", code="data.invalid_json"
                )
            yield from _read_rows_of_field(scanner, field)
        else:
            scanner.read_value()
        if scanner.peek() == "}":
            break
        scanner.expect(",", "after a value, where a comma or } should stand")
    if field not in names:
        problem = f"the file has no key {field}; its keys are {format_names(names)}"
        raise ReadingError(1, problem, "Set `field` to the key that holds the rows.", code="data.invalid_json")


def _read_rows_of_field(scanner: _Scanner, field: str) -> Iterator[RecordBlock]:
    """Yield the rows of a list, or of an object of columns, as the scanner stands before it. Raises ReadingError."""
    if scanner.peek() == "[":
        yield from _gather(_read_array(scanner))
        return
    line = scanner.line
    columns, _ = scanner.read_value()
    is_columns = isinstance(columns, dict) and all(isinstance(values, list) for values in columns.values())
    if not is_columns or len({len(values) for values in columns.values()}) != 1:
        problem = f"the key {field} holds neither a list of rows nor columns of one length"
        raise ReadingError(line, problem, "Set `field` to the key that holds the rows.", code="data.invalid_json")
    rows = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    for block in _gather((json.dumps(row, ensure_ascii=False), line) for row in rows):
        yield block._replace(is_verbatim=False)
