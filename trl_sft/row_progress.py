"""Shows how far the work on many rows, files or sources is: a bar on a terminal, else a line every half minute.

Inputs: numbers of them, as they are done. Outputs: standard error. Short work shows nothing without a terminal.
Deliberately not here: the progress of training (`training.progress`).
"""

from __future__ import annotations

import time

from tqdm.auto import tqdm

from trl_sft import console

FIRST_LINE, NEXT_LINE = 10.0, 30.0  # seconds until a line is printed, without a terminal


class RowProgress:
    """The progress of one piece of work."""

    def __init__(self, title: str, total: int | None = None, *, shows_bar: bool = True, unit: str = "rows") -> None:
        """Begin.

        Args:
            title: what is done, as in "Tokenizing train".
            total: the number of rows; None = not known.
            shows_bar: whether a terminal gets a bar; False = another package shows one.
            unit: what is counted: rows, files or sources.

        """
        self.title, self.total, self.unit = title, total, unit
        self.done = 0
        self.begin = time.monotonic()
        self.due = self.begin + FIRST_LINE
        self.is_terminal = console.shows_progress()
        is_hidden = not (self.is_terminal and shows_bar)
        self.bar = tqdm(total=total, desc=title, unit=f" {unit}", disable=is_hidden, leave=False)

    def __enter__(self) -> RowProgress:
        """Return the progress itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the bar."""
        self.bar.close()

    def update(self, number: int) -> None:
        """Count rows, files or sources that are done."""
        self.done += number
        self.bar.update(number)
        now = time.monotonic()
        if not self.is_terminal and now >= self.due and self.done != self.total:
            self.due = now + NEXT_LINE
            console.say_error(self._describe(now - self.begin))

    def _describe(self, seconds: float) -> str:
        """Return the line after so many seconds of work."""
        if self.total is None:
            return f"{self.title}: {self._format_number(self.done)} so far"
        line = f"{self.title}: {self.done:,} of {self._format_number(self.total)}"
        if not self.done:
            return line
        remaining = seconds / self.done * (self.total - self.done)
        return f"{line}, about {console.format_duration(remaining)} left"

    def _format_number(self, number: int) -> str:
        """Return a number with its unit."""
        return console.format_rows(number) if self.unit == "rows" else f"{number:,} {self.unit}"
