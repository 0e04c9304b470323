"""SIGTERM and SIGHUP become an exception inside a block, so that it can clean up as after Ctrl-C.

Inputs: none. Outputs: `errors.Interrupted`, whose first argument is the number of the signal; that of Ctrl-C has none.
Deliberately not here: what is cleaned up.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any, NoReturn

from trl_sft.errors import Interrupted

_SIGNALS = ("SIGTERM", "SIGHUP")


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Let the signals that end a process raise `errors.Interrupted` inside the block."""
    before: dict[int, Any] = {}
    for name in _SIGNALS:
        if (number := getattr(signal, name, None)) is not None:
            with contextlib.suppress(ValueError):  # not the main thread
                before[number] = signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def get_number(error: KeyboardInterrupt) -> int:
    """Return the number of the signal that an exception stands for."""
    return int(error.args[0]) if error.args else int(signal.SIGINT)


def _raise(number: int, _frame: object) -> NoReturn:
    """Raise the exception of a signal."""
    raise Interrupted(number)
