"""What the user sees: lines, tables, faults; and keeps upstream's noise from it.

In: texts. Out: standard output for results, standard error for progress and faults. Deliberately
absent: any knowledge of runs.
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
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from trl_sft.errors import Fault

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
_UPSTREAM = ("transformers", "trl", "datasets", "peft", "accelerate", "huggingface_hub", "bitsandbytes", "torch")


def say(text: str = "") -> None:
    """Print one line of result."""
    print(text, flush=True)


def table(rows: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        say(f"  {name:<{width}}  {value}")


def width() -> int:
    """Return how many characters a line of the terminal holds; 100 where there is none."""
    return shutil.get_terminal_size((100, 24)).columns


def columns(rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    """Yield rows of texts side by side within `width`, each text on one line and cut where it is too long."""
    rows = [[" ".join(text.split()) for text in row] for row in rows]
    room = max(8, (width - 2 - 2 * (len(rows[0]) - 1)) // len(rows[0]))
    widths = [min(room, max(map(_cells, column))) for column in zip(*rows, strict=True)]
    widths[0] += max(0, width - 2 - sum(widths) - 2 * (len(widths) - 1))  # what the others leave is the first one's
    widths[0] = min(widths[0], max(_cells(row[0]) for row in rows))
    for row in rows:
        cut = [_cut(text, size) for text, size in zip(row, widths, strict=True)]
        yield "  " + "  ".join(t + " " * (size - _cells(t)) for t, size in zip(cut, widths, strict=True)).rstrip()


def _cells(text: str) -> int:
    """Return how many cells of a terminal a text takes: Chinese characters take two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _cut(text: str, cells: int) -> str:
    if _cells(text) <= cells:
        return text
    while _cells(text) > cells - 1:
        text = text[:-1]
    return text + "…"


def faults(problems: Sequence[Fault]) -> None:
    """Print faults to standard error, all at once."""
    heading = "1 problem to fix" if len(problems) == 1 else f"{len(problems)} problems to fix"
    print(f"trl_sft: {heading}\n", file=sys.stderr)
    print("\n\n".join(str(fault) for fault in problems), file=sys.stderr, flush=True)


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


def python() -> str:
    """Return what to type for the Python that runs: `python` only where that is the same one."""
    on_path = shutil.which("python")
    if on_path and Path(on_path).absolute() == Path(sys.executable).absolute():
        return "python"
    return shlex.quote(
        os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else sys.executable
    )


def watched() -> bool:
    """Tell whether standard error is a terminal, where a progress bar makes sense."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def rows(number: int) -> str:
    """Return a number of rows in words."""
    return f"{number:,} row{'s' * (number != 1)}"


def gib(size: float) -> str:
    """Return a number of bytes in a unit that reads well."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    power = min(int(math.log(max(size, 1), 1024)), len(units) - 1)
    return f"{size / 1024**power:.{min(power, 1)}f} {units[power]}"


def span(seconds: float) -> str:
    """Return a duration in words: 42 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
