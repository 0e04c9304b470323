"""Shows how far the work on many rows is: a progress bar on a terminal, else a line every half minute.

Inputs: numbers of rows as they are done. Outputs: standard error. Short work shows nothing without a terminal.
Deliberately not here: the progress of training (`training.progress`).
"""

from __future__ import annotations

import time

from tqdm.auto import tqdm

from trl_sft import console

FIRST_LINE, NEXT_LINE = 10.0, 30.0  # seconds until a line is printed, without a terminal


class RowProgress:
    """The progress of one piece of work."""

    def __init__(self, title: str, total: int | None = None, *, shows_bar: bool = True) -> None:
        """Begin.

        Args:
            title: what is done, as in "Tokenizing train".
            total: the number of rows; None = not known.
            shows_bar: whether a terminal gets a bar; False = another package shows one.

        """
        self.title, self.total = title, total
        self.done = 0
        self.begin = time.monotonic()
        self.due = self.begin + FIRST_LINE
        self.is_terminal = console.shows_progress()
        is_hidden = not (self.is_terminal and shows_bar)
        self.bar = tqdm(total=total, desc=title, unit=" rows", disable=is_hidden, leave=False)

    def __enter__(self) -> RowProgress:
        """Return the progress itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the bar."""
        self.bar.close()

    def update(self, rows: int) -> None:
        """Count rows that are done."""
        self.done += rows
        self.bar.update(rows)
        now = time.monotonic()
        if not self.is_terminal and now >= self.due:
            self.due = now + NEXT_LINE
            console.say_error(self._describe(now - self.begin))

    def _describe(self, seconds: float) -> str:
        """Return the line after so many seconds of work."""
        if self.total is None:
            return f"{self.title}: {console.format_rows(self.done)} so far"
        line = f"{self.title}: {self.done:,} of {console.format_rows(self.total)}"
        if not self.done:
            return line
        remaining = seconds / self.done * (self.total - self.done)
        return f"{line}, about {console.format_duration(remaining)} left"
