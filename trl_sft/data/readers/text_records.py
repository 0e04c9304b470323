"""Reads text files: one row for each file, each line or each paragraph.

Inputs: a file and the keys of `datasets.TextConfig`. Outputs: blocks of rows, each a JSON string, with their lines.
Deliberately not here: what becomes of the text.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import IO

from trl_sft.data.readers.data_file import DataFile, open_text, read_lines
from trl_sft.data.readers.record_block import (
    BLOCK_CHARACTERS,
    BLOCK_ROWS,
    LONGEST_RECORD,
    LongRecordError,
    RecordBlock,
)


def read_text(
    file: DataFile, *, sample_by: str, keep_linebreaks: bool, encoding: str, errors: str
) -> Iterator[RecordBlock]:
    """Yield the rows of a text file.

    Args:
        file: the file.
        sample_by: what one row is: line, paragraph or document.
        keep_linebreaks: whether a line keeps its line break.
        encoding: of the text.
        errors: what becomes of bytes that are not in that encoding, as `open` has it.

    Raises:
        UnicodeDecodeError: the file has another encoding.

    """
    with open_text(file, encoding, errors) as stream:
        if sample_by == "document":
            rows: Iterator[tuple[str, int]] = iter([(_check_length(stream.read(LONGEST_RECORD + 1), 1), 1)])
        elif sample_by == "paragraph":
            rows = _read_paragraphs(stream)
        else:
            rows = ((line if keep_linebreaks else line.rstrip("\r\n"), n) for n, line in _read_lines(stream))
        yield from _gather(rows)


def _gather(rows: Iterator[tuple[str, int]]) -> Iterator[RecordBlock]:
    """Yield single rows in blocks of `BLOCK_ROWS`, or of `BLOCK_CHARACTERS` where they are long."""
    records: list[str] = []
    lines: list[int] = []
    characters = 0
    for text, line in rows:
        records.append(json.dumps(text, ensure_ascii=False))
        lines.append(line)
        characters += len(text)
        if len(records) == BLOCK_ROWS or characters > BLOCK_CHARACTERS:
            yield RecordBlock(records, lines)
            records, lines, characters = [], [], 0
    if records:
        yield RecordBlock(records, lines)


def _check_length(text: str, line: int) -> str:
    """Return a text that is short enough for a row. Raises LongRecordError."""
    if len(text) > LONGEST_RECORD:
        raise LongRecordError(line)
    return text


def _read_lines(stream: IO[str]) -> Iterator[tuple[int, str]]:
    """Yield lines with their numbers, from 1. Raises LongRecordError."""
    for number, line in enumerate(read_lines(stream, LONGEST_RECORD), 1):
        yield number, _check_length(line, number)


def _read_paragraphs(stream: IO[str]) -> Iterator[tuple[str, int]]:
    """Yield paragraphs, which blank lines separate, each with the line on which it begins. Raises LongRecordError."""
    paragraph = io.StringIO(newline="")  # a list of short lines would take many times their size
    begin = 1
    for number, line in _read_lines(stream):
        if line.strip("\r\n"):
            if not paragraph.tell():
                begin = number
            paragraph.write(line)
            if paragraph.tell() > LONGEST_RECORD:
                raise LongRecordError(begin)
        elif paragraph.tell():
            yield paragraph.getvalue().rstrip("\r\n"), begin
            paragraph = io.StringIO(newline="")
    if paragraph.tell():
        yield paragraph.getvalue().rstrip("\r\n"), begin
