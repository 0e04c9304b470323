"""Rows between a reader and the place where they are stored.

Inputs and outputs: none; the readers make these objects. Deliberately not here: reading.
"""

from __future__ import annotations

from typing import NamedTuple

# Characters of a file that are read at once: they bound the memory of a reader, beside its longest row
BLOCK_CHARACTERS = 1 << 20
# Rows of a block at most: each block is one batch of the Arrow file
BLOCK_ROWS = 1000
# Characters of one row at most, and of white space before a row: a compressed file of a few megabytes may hold a line
# of gigabytes
LONGEST_RECORD = 100_000_000
# Blank lines at most between two rows
MOST_BLANK_LINES = 1_000_000


class RecordBlock(NamedTuple):
    """Some rows of a file, one after another."""

    records: list[str]  # the JSON text of each row, as it stands in the file; of a CSV row the object of its cells
    lines: list[int]  # the line on which each row begins, from 1
    is_verbatim: bool = True  # whether the records stand in the file as they are here


class ReadingError(ValueError):
    """A place of a file from which no row can be read; the caller knows the name of the file."""

    def __init__(self, line: int, problem: str, fix: str, *, code: str) -> None:
        """Take the line, from 1, and the other parts of the fault that the caller raises."""
        self.line, self.problem, self.fix, self.code = line, problem, fix, code
        super().__init__(f"line {line}: {problem}")


class LongRecordError(ReadingError):
    """A row that is too long to be read; nothing else has to be wrong with the file, so it is not looked at again."""

    def __init__(self, line: int, part: str = "the row that begins here") -> None:
        """Take the line, from 1, and what is too long."""
        problem = f"{part} has more than {LONGEST_RECORD:,} characters, the most that are read"
        fix = "Split it into several rows, or remove it. A file that should have shorter rows lacks its line breaks."
        super().__init__(line, problem, fix, code="data.long_record")


class BlankLinesError(ReadingError):
    """A file of which a large part is blank lines."""

    def __init__(self, line: int) -> None:
        """Take the line, from 1, on which the blank lines begin."""
        problem = f"more than {MOST_BLANK_LINES:,} blank lines follow here"
        fix = "Remove the blank lines. If they stand for other data, copy or download the file again."
        super().__init__(line, problem, fix, code="data.long_record")
