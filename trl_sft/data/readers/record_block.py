"""Rows between a reader and the place where they are stored.

Inputs and outputs: none; the readers make these objects. Deliberately not here: reading.
"""

from __future__ import annotations

from typing import NamedTuple

# Characters of a file that are read at once: they bound the memory of a reader, beside its longest row
BLOCK_CHARACTERS = 1 << 20
# Rows of a block at most: each block is one batch of the Arrow file
BLOCK_ROWS = 1000


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
