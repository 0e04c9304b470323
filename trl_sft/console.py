"""All output on a terminal: lines, tables, faults, numbers with their units.

Inputs: texts and numbers. Outputs: standard output for results, standard error for faults. `rich` does columns and
colours; it is imported only when it is needed, so that `--help` and `check --fast` start quickly. Not here: the lines
of a run's screen, progress bars (tqdm, like upstream's), and upstream's warnings (`upstream_warnings`).
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from trl_sft import json_output, redaction
from trl_sft.errors import Fault

if TYPE_CHECKING:
    from rich.text import Text

MOST_NAMES = 20  # that a message lists
_LONGEST_NAME = 60  # characters of a name in such a list
MOST_FAULTS = 50  # that are printed one by one
_INDENT = "  "
_WIDTH = 80  # characters of a line of prose
# Characters that control a terminal, reorder its text, are not seen or cannot be encoded: control characters except tab
# and newline; marks, embeddings, overrides and isolates of direction; separators of lines; spaces of no width; tags;
# halves of surrogate pairs. The two joiners are a part of emoji and of Persian words; elsewhere they are codes.
_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\ud800-\udfff\U000e0000-\U000e007f]|(?<![^\x00-\x7f])[\u200c\u200d]"
)


_COLOURS = re.compile(r"(\x1b\[[0-9;]*m)")  # what `render_colours` writes
# Whether a stream that nothing reads any more is ignored. Not a ContextVar: `datasets` pickles what a stream refers to.
_STATE = {"ignores_closed": False, "is_verbose": False}


def say(text: str = "", *, has_colours: bool = False) -> None:
    """Print one line of result; under `--json` it goes to standard error.

    Args:
        text: What rows, files, keys and models contain is escaped: no control character reaches the terminal.
        has_colours: Whether the text comes from `render_colours`; its colours are then kept.

    """
    _print(text, sys.stdout, has_colours=has_colours)


def say_part(text: str) -> None:
    """Print a part of a line of result at once, escaped as `say` does; the rest of the line follows."""
    _print(text, sys.stdout, end="")


def say_error(text: str) -> None:
    """Print one line to standard error, escaped as `say` does."""
    _print(text, sys.stderr)


@contextlib.contextmanager
def ignoring_closed_streams() -> Iterator[None]:
    """Inside the block a reader that goes away (`| head`, a closed terminal) does not end the command."""
    before, _STATE["ignores_closed"] = _STATE["ignores_closed"], True
    try:
        yield
    finally:
        _STATE["ignores_closed"] = before


def discard_output(stream: TextIO) -> None:
    """Send the rest of a stream to the null device, so that Python's last flush raises nothing."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def _print(text: str, stream: TextIO, *, has_colours: bool = False, end: str = "\n") -> None:
    """Print a text, escaped and without secrets; what the stream's encoding lacks is printed as its code."""
    text = redaction.redact(text)
    if has_colours:
        parts = _COLOURS.split(text)  # every second part is a colour
        text = "".join(part if number % 2 else escape_control_characters(part) for number, part in enumerate(parts))
    else:
        text = escape_control_characters(text)
    try:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, end=end, flush=True)
    except OSError:  # a pipe without a reader (EPIPE), a terminal that is gone (EIO)
        if not _STATE["ignores_closed"]:
            raise
        with contextlib.suppress(OSError, ValueError):
            discard_output(stream)


def print_lines(lines: Iterable[tuple[str, str]]) -> None:
    """Print a line for each name and its value, as soon as the iterator yields it."""
    for name, value in lines:
        say(f"{name:<9} {value}")


def print_table(rows: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        say(f"  {name:<{width}}  {value}")


def format_columns(rows: Sequence[Sequence[str]], width: int | None = None) -> list[str]:
    """Return a table as text: one line for each row, with aligned columns.

    Args:
        rows: (rows, columns), each text of any length.
        width: Characters of a line; None = the width of the terminal, or 100 without one. Longer texts are cut.

    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = (width or shutil.get_terminal_size((100, 24)).columns) - len(_INDENT)
    table = Table.grid(padding=(0, 2))
    for row in rows:
        lines = [escape_control_characters(" ".join(redaction.redact(text).split())) for text in row]
        table.add_row(*(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))
    console = Console(width=cells, color_system=None, force_jupyter=False)
    with console.capture() as output:
        console.print(table)
    return [(_INDENT + line).rstrip() for line in output.get().splitlines()]


def wrap(text: str, *, indent: str, first_indent: str | None = None) -> list[str]:
    """Return a text in lines of at most 80 characters; a word, and so the name of a key, is never broken.

    Args:
        text: One paragraph.
        indent: What the lines begin with.
        first_indent: What the first line begins with; None = `indent`.

    """
    first = indent if first_indent is None else first_indent
    return textwrap.wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def escape_control_characters(text: str) -> str:
    """Return a text in which each control character of a terminal is replaced by its hexadecimal code."""
    return _CONTROL.sub(_write_code, text)


def _write_code(match: re.Match[str]) -> str:
    """Return the code of a character, as Python writes it in a text."""
    number = ord(match[0])
    if number > 0xFFFF:
        return f"\\U{number:08x}"
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"


def print_faults(faults: Sequence[Fault]) -> None:
    """Print faults to standard error, all at once; in colour on a terminal. They are part of a JSON answer."""
    json_output.add_faults(faults)
    heading = "1 problem to fix" if len(faults) == 1 else f"{len(faults)} problems to fix"
    parts = [f"trl_sft: {heading}", *map(str, faults[:MOST_FAULTS])]
    if more := len(faults[MOST_FAULTS:]):
        parts.append(f"{more:,} more {'problem' if more == 1 else 'problems'}: fix those above first, and check again.")
    text = escape_control_characters("\n\n".join(parts))
    if shows_colour(sys.stderr):
        from rich.text import Text

        coloured = Text(text)
        coloured.highlight_regex(r"(?m)^\S.*", "bold")  # the heading, and the place of each fault
        coloured.highlight_regex(r"(?m)^ +-> .*", "green")
        text = render_colours(coloured)
    _print(text, sys.stderr, has_colours=shows_colour(sys.stderr))


class LiveLine:
    """One line that is redrawn: below the lines of a terminal, or as an output of a notebook's cell."""

    def __init__(self, total: int, initial: int) -> None:
        """Show the line. `total` and `initial` are steps."""
        self._total = total
        self._bar: Any = None
        self._output: Any = None
        if _is_notebook():
            from IPython.display import display

            self._output = display({"text/plain": ""}, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            from tqdm import tqdm

            layout = "step {n_fmt}/{total_fmt} |{bar:10}| {postfix}"
            self._bar = tqdm(total=total, initial=initial, bar_format=layout, dynamic_ncols=True, delay=0)

    def update(self, step: int, text: str) -> None:
        """Redraw the line."""
        text = escape_control_characters(text)
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._output is not None:
            line = f"step {step}/{self._total}  {text}"
            self._output.update({"text/plain": line}, raw=True)

    def show_above(self, text: str) -> None:
        """Print a line that stays."""
        if self._bar is not None:
            self._bar.write(escape_control_characters(text))
        else:
            say(text)

    def close(self) -> None:
        """Remove the line; in a notebook its last state stays."""
        if self._bar is not None:
            self._bar.close()


def start_live_line(*, total: int, initial: int) -> LiveLine | None:
    """Return a line that is redrawn; None where nothing can be redrawn, as in a file."""
    return LiveLine(total, initial) if shows_progress() or _is_notebook() else None


def _is_notebook() -> bool:
    """Tell whether the process runs the cells of a notebook."""
    return "ipykernel" in sys.modules and "IPython" in sys.modules


def set_verbose(verbose: bool) -> None:
    """Set whether a run shows every logged value."""
    _STATE["is_verbose"] = verbose


def is_verbose() -> bool:
    """Tell whether a run shows every logged value."""
    return _STATE["is_verbose"]


def render_colours(text: Text) -> str:
    """Return a text with its styles as control sequences; lines are not wrapped."""
    from rich.console import Console

    console = Console(force_terminal=True, color_system="standard", force_jupyter=False)
    with console.capture() as output:
        console.print(text, soft_wrap=True, end="")
    return output.get()


def shows_progress() -> bool:
    """Tell whether standard error is a terminal on which a progress bar can be redrawn."""
    return _is_terminal(sys.stderr)


def shows_colour(stream: TextIO) -> bool:
    """Tell whether a stream is a terminal that shows colours; NO_COLOR switches them off."""
    return _is_terminal(stream) and not os.environ.get("NO_COLOR")


def _is_terminal(stream: TextIO) -> bool:
    """Tell whether a stream is a terminal that understands control sequences."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def get_python_command() -> str:
    """Return the command that starts the running Python: `python` if the shell finds the same one, else its path."""
    on_path = shutil.which("python")
    executable = Path(sys.executable)
    if on_path and Path(on_path).absolute() == executable.absolute():
        return "python"
    if executable.is_relative_to(Path.cwd()):
        return shlex.quote(os.path.relpath(executable))
    return shlex.quote(sys.executable)


def format_names(names: Collection[str], most: int = MOST_NAMES) -> str:
    """Return names joined by commas, the first `most` of them, each cut to one line; the number of the others follows.

    Example:
        `format_names(["a", "b", "c"], most=2)` is "a, b and 1 more".

    """
    first = [name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..." for name in islice(names, most)]
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(first) + more


def format_rows(number: int) -> str:
    """Return a number of rows: 1 row, 1,024 rows."""
    return format_number_of(number, "row")


def format_number_of(number: int, noun: str) -> str:
    """Return a number with a noun that takes an s: 1 step, 1,024 steps."""
    return f"1 {noun}" if number == 1 else f"{number:,} {noun}s"


def format_bytes(size: float) -> str:
    """Return a number of bytes in the largest unit that it fills: 512 B, 1.5 GiB."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    power = min(int(math.log(max(size, 1), 1024)), len(units) - 1)
    decimals = 0 if power == 0 else 1
    return f"{size / 1024**power:.{decimals}f} {units[power]}"


def format_count(number: float) -> str:
    """Return a number with three digits and its power of a thousand: 950, 12.3k, 1.23M."""
    power = min(max(int(math.log(max(number, 1), 1000)), 0), 4)
    if number / 1000**power >= 999.5 and power < 4:
        power += 1
    unit = ("", "k", "M", "G", "T")[power]
    return f"{number / 1000**power:.3g}{unit}"


def format_duration(seconds: float) -> str:
    """Return a duration: 4.2 s, 42 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
