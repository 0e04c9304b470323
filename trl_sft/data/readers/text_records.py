"""Reads text files: one row for each file, each line or each paragraph.

Inputs: a file and the keys of `datasets.TextConfig`. Outputs: blocks of rows, each a JSON string, with their lines.
Deliberately not here: what becomes of the text.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import IO

from trl_sft.data.readers.data_file import DataFile, open_text
from trl_sft.data.readers.record_block import BLOCK_ROWS, RecordBlock


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
            rows: Iterator[tuple[str, int]] = iter([(stream.read(), 1)])
        elif sample_by == "paragraph":
            rows = _read_paragraphs(stream)
        else:
            rows = ((line if keep_linebreaks else line.rstrip("\r\n"), n) for n, line in enumerate(stream, 1))
        while block := list(itertools.islice(rows, BLOCK_ROWS)):
            yield RecordBlock([json.dumps(text, ensure_ascii=False) for text, _ in block], [line for _, line in block])


def _read_paragraphs(stream: IO[str]) -> Iterator[tuple[str, int]]:
    """Yield paragraphs, which blank lines separate, each with the line on which it begins."""
    paragraph: list[str] = []
    begin = 1
    for number, line in enumerate(stream, 1):
        if line.strip("\r\n"):
            if not paragraph:
                begin = number
            paragraph.append(line)
        elif paragraph:
            yield "".join(paragraph).rstrip("\r\n"), begin
            paragraph = []
    if paragraph:
        yield "".join(paragraph).rstrip("\r\n"), begin
