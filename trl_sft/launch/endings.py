"""How the processes of a run ended, as each of them leaves it in a folder, and what that means for the run.

Inputs: a folder of its own for each launch, which the environment variable `ranks.FOLDER` names. Outputs: one exit
code, and the values and faults of the run. torchrun itself turns every exit code into 1. Not here: starting processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from trl_sft import errors, ranks
from trl_sft.errors import Fault

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_WAIT = 10.0  # seconds that a process which failed waits for the first one to say the same
# of a process that ended as all of them agreed to: torchrun must not kill the others, which still write
_AGREED = (errors.EXIT_DONE, errors.EXIT_TIME_LIMIT)


class Ending(NamedTuple):
    """How one process ended."""

    number: int
    exit_code: int
    values: dict[str, Any]  # of the answer under --json
    faults: list[Fault]
    moment: float  # seconds since the epoch


def announce(folder: Path) -> None:
    """Write the process id of this process, so that signals reach it; if `launch` is killed, this process saves."""
    with contextlib.suppress(OSError, AttributeError):  # Linux has prctl(2)
        signal.signal(signal.SIGUSR2, _stop_without_parent)
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGUSR2)
    part = folder / f"{ranks.get_number()}.starting"
    part.write_text(str(os.getpid()))
    part.rename(folder / f"{ranks.get_number()}.pid")


def _stop_without_parent(_number: int, _frame: FrameType | None) -> None:
    """Send this process SIGTERM once: Linux sends the signal for each thread of `launch` that ends."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    os.kill(os.getpid(), signal.SIGTERM)


def list_process_ids(folder: Path) -> list[int]:
    """Return the process ids of the processes that have started on this host and have not ended."""
    files = [path for path in folder.glob("*.pid") if not path.with_suffix(".ending").exists()]
    return [int(path.read_text()) for path in files]


def write(folder: Path, exit_code: int, *, values: Mapping[str, Any], faults: list[Fault]) -> int:
    """Write how this process ends; return the exit code that torchrun gets.

    A process that fails waits a moment for the first one: torchrun kills the others when one of them fails, and the
    first process has to write down and print why.
    """
    number = ranks.get_number()
    part = folder / f"{number}.part"
    part.write_bytes(pickle.dumps(Ending(number, exit_code, dict(values), faults, time.time())))
    part.rename(folder / f"{number}.ending")
    if exit_code in _AGREED or exit_code > errors.EXIT_SIGNAL:
        return errors.EXIT_DONE
    until = time.monotonic() + _WAIT
    while number and not (folder / "0.ending").exists() and time.monotonic() < until:
        time.sleep(0.05)
    return exit_code


def read(folder: Path) -> list[Ending]:
    """Return the endings that processes of this host left, the earliest first."""
    endings = [pickle.loads(path.read_bytes()) for path in folder.glob("*.ending")]
    return sorted(endings, key=lambda ending: ending.moment)
