"""All output on a terminal: lines, tables, faults, numbers in words; and which warnings of upstream are shown.

Inputs: texts and numbers. Outputs: standard output for results, standard error for progress, warnings and faults.
`rich` does columns and colours; it is imported where they are needed, because it takes a tenth of a second. Not here:
what a run prints, and progress bars (tqdm, as upstream's own are).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from trl_sft.errors import Fault

if TYPE_CHECKING:
    from rich.text import Text

# Upstream's messages that tell the user nothing to act on, with the versions that print them. Anything
# else passes, once each, on one line.
_NOISE = re.compile(
    "|".join(
        (
            # trl 1.16 sets the name that transformers 5.23 deprecates
            r"`gradient_checkpointing` is deprecated",
            # transformers 5.23 in its own Trainer
            r"`is_gradient_checkpointing` is deprecated",
            # datasets, before it raises: the fault that we show says file and line
            r"Failed to (load JSON|read (schema|file)) from file",
            # transformers 5.23 on resuming a model with tied weights, which hold one copy
            r"missing keys in the checkpoint model loaded: \['lm_head.weight'\]",
            # TRL tokenizes first and cuts at max_length after
            r"Token indices sequence length is longer than the specified maximum",
            # bitsandbytes 0.50 without the optional `kernels`
            r"Failed to load CPU gemm_4bit_forward",
            # bitsandbytes 0.50, at every 8-bit layer: how LLM.int8() works
            r"MatMul8bitLt: inputs will be cast",
            # transformers 5.x, where tokens are added: the line `tokens` says what grows and is trained
            r"The new (embeddings|lm_head weights) will be initialized from",
            # transformers 5.x: TRL aligns special tokens of model and tokenizer, as it should
            r"The tokenizer has new PAD/BOS/EOS tokens",
            # torch 2.13 on a machine without an accelerator
            r"'pin_memory' argument is set as true but no accelerator is found",
            # trl 1.x labels its own experimental parts
            r"TRL.*experimental",
        )
    )
)
_INDENT = "  "
# What steers a terminal, reorders its text or cannot be encoded: control characters but tab and newline, bidirectional
# overrides, halves of surrogate pairs.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_UPSTREAM = ("transformers", "trl", "datasets", "peft", "accelerate", "huggingface_hub", "bitsandbytes", "torch")


def say(text: str = "") -> None:
    """Print one line of result."""
    print(text, flush=True)


def print_lines(lines: Iterable[tuple[str, str]]) -> None:
    """Print names and values, a line each, as results arrive."""
    for name, value in lines:
        say(f"{name:<9} {value}")


def print_table(rows: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        say(f"  {name:<{width}}  {value}")


def format_columns(rows: Sequence[Sequence[str]], width: int | None = None) -> list[str]:
    """Return rows of texts side by side, each row on one line.

    Args:
        rows: (rows, columns), each text of any length.
        width: Cells of a line; None: those of the terminal, 100 without one. A text that is too long is cut.

    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = (width or shutil.get_terminal_size((100, 24)).columns) - len(_INDENT)
    table = Table.grid(padding=(0, 2))
    for row in rows:
        lines = [escape_control_characters(" ".join(text.split())) for text in row]
        table.add_row(*(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))
    console = Console(width=cells, color_system=None, force_jupyter=False)
    with console.capture() as output:
        console.print(table)
    return [(_INDENT + line).rstrip() for line in output.get().splitlines()]


def escape_control_characters(text: str) -> str:
    """Return a text in which what would steer the terminal is written as its code in hexadecimal."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def print_faults(problems: Sequence[Fault]) -> None:
    """Print faults to standard error, all at once; in colour on a terminal."""
    heading = "1 problem to fix" if len(problems) == 1 else f"{len(problems)} problems to fix"
    text = "\n\n".join([f"trl_sft: {heading}", *map(str, problems)])
    if shows_colour(sys.stderr):
        from rich.text import Text

        coloured = Text(text)
        coloured.highlight_regex(r"(?m)^\S.*", "bold")  # the heading, and the place of each fault
        coloured.highlight_regex(r"(?m)^ +-> .*", "green")
        text = render_colours(coloured)
    print(text, file=sys.stderr, flush=True)


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


class _Once(logging.Handler):
    """Shows each warning of upstream once, on one line, unless it is known noise."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record as a note."""
        text = " ".join(record.getMessage().split()).removeprefix("[RANK 0] ")
        if text in self._seen or _NOISE.search(text):
            return
        self._seen.add(text)
        name = "Python" if record.name == "py.warnings" else record.name.partition(".")[0]
        print(f"note from {name}: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Show upstream's warnings inside the block once each, on one line, and none that is known noise.

    Import upstream inside the block: the packages add handlers to their loggers while they are imported, and those
    are not added here.
    """
    handler = _Once()
    loggers = [logging.getLogger(name) for name in (*_UPSTREAM, "py.warnings")]
    before = [(logger.handlers[:], logger.propagate, logger.level, logger.addHandler) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
        logger.addHandler = _ignore_handler  # type: ignore[assignment, method-assign]
        logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        for category in (DeprecationWarning, ResourceWarning):  # for upstream's developers
            warnings.simplefilter("ignore", category)
        warnings.showwarning = _log_warning
        try:
            yield
        finally:
            for logger, (handlers, propagate, level, add_handler) in zip(loggers, before, strict=True):
                logger.handlers, logger.propagate = handlers, propagate
                logger.addHandler = add_handler  # type: ignore[method-assign]
                logger.setLevel(level)


def _ignore_handler(_handler: logging.Handler) -> None:
    """Stand in for `Logger.addHandler` inside `quiet`."""


def _log_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Stand in for `warnings.showwarning` inside `quiet`."""
    logging.getLogger("py.warnings").warning("%s", message)


def get_python_command() -> str:
    """Return what to type for the Python that runs: `python` where the shell finds the same one, else its path."""
    on_path = shutil.which("python")
    if on_path and Path(on_path).absolute() == Path(sys.executable).absolute():
        return "python"
    return shlex.quote(
        os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else sys.executable
    )


def format_rows(number: int) -> str:
    """Return a number of rows: 1 row, 1,024 rows."""
    return f"{number:,} row{'s' * (number != 1)}"


def format_bytes(size: float) -> str:
    """Return a number of bytes in the largest unit that it fills: 512 B, 1.5 GiB."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    power = min(int(math.log(max(size, 1), 1024)), len(units) - 1)
    return f"{size / 1024**power:.{min(power, 1)}f} {units[power]}"


def format_duration(seconds: float) -> str:
    """Return a duration: 4.2 s, 42 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
