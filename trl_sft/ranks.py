"""Which process of a run this is, and what all processes of the run agree on. Nothing else asks for a rank.

The first process of a run prints, writes the run folder, locks it, pushes to the hub and talks to trackers. The first
process of each host prepares the rows; the others read them from the cache. All processes train, evaluate, answer
prompts and save: sharded weights need every process for each of these, and the first one writes down the outcome.

Inputs: the environment variables that torchrun sets (RANK, LOCAL_RANK, WORLD_SIZE), and torch's process group, which
the Trainer's arguments create. With one process every function answers at once, and torch is not imported.
Not here: starting processes (`launch`).
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Value = TypeVar("Value")

_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_WAIT = 3.0  # seconds in which torchrun ends a process after another one has failed
FOLDER = "TRL_SFT_RANKS"  # the environment variable with the folder in which processes write how they ended


def count() -> int:
    """Return how many processes train this run together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def get_number() -> int:
    """Return the number of this process among those of the run, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def is_first() -> bool:
    """Tell whether this process prints, writes, locks the run folder, pushes and talks to trackers."""
    return count() == 1 or os.environ.get("RANK", "0") == "0"


def is_first_on_host() -> bool:
    """Tell whether this process prepares the rows for the processes of its host."""
    return count() == 1 or os.environ.get("LOCAL_RANK", "0") == "0"


def get_folder() -> Path | None:
    """Return the folder in which this process writes how it ended; None = `launch` did not start it."""
    folder = os.environ.get(FOLDER)
    return Path(folder) if folder else None


def find_missing_variables() -> list[str]:
    """Return the environment variables that a launcher would have set, and that this process of several lacks."""
    return [name for name in _VARIABLES if name not in os.environ]


def is_connected() -> bool:
    """Tell whether this process of several has joined their process group; a verification refuses one that has not."""
    distributed = sys.modules.get("torch.distributed") if count() > 1 else None
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def wait() -> None:
    """Wait until every process of the run is here."""
    if is_connected():
        _get_torch().distributed.barrier()


def share(compute: Callable[[], Value]) -> Value:
    """Compute a value in the first process, and return it in every process.

    Args:
        compute: is called in the first process only, as what it reads (files, the hub, a clock) may differ elsewhere.
            The value is pickled.

    Raises:
        Exception: what `compute` raised, in every process.

    """
    if not is_connected():
        return compute()
    outcome: list[tuple[bool, object]] = [(True, None)]
    if is_first():
        try:
            outcome = [(True, compute())]
        except Exception as error:
            outcome = [(False, error)]
    _get_torch().distributed.broadcast_object_list(outcome, src=0)
    succeeded, value = outcome[0]
    if not succeeded:
        assert isinstance(value, Exception)
        raise value
    return value  # type: ignore[return-value]


def collect(value: Value) -> list[Value]:
    """Return the values of all processes, by their numbers. They are pickled."""
    if not is_connected():
        return [value]
    values: list[Any] = [None] * count()
    _get_torch().distributed.all_gather_object(values, value)
    return values


def find_largest(number: float) -> float:
    """Return the largest of the numbers that the processes have; NaN where one of them has NaN."""
    if not is_connected():
        return number
    torch = _get_torch()
    device = "cpu" if "gloo" in torch.distributed.get_backend() else torch.accelerator.current_accelerator()
    # NaN is neither the largest nor the smallest for every backend, so it travels as a number of its own
    is_nan = math.isnan(number)
    numbers = torch.tensor([0.0 if is_nan else number, float(is_nan)], device=device)
    torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
    largest, has_nan = numbers.tolist()
    return math.nan if has_nan else float(largest)


def is_any(condition: bool) -> bool:
    """Tell whether the condition holds in any process."""
    return find_largest(float(condition)) > 0


def _get_torch() -> Any:
    """Return torch, which a connected process has imported."""
    return sys.modules["torch"]


def silence() -> None:
    """Let only the first process print: the output of another one goes to a file, or nowhere.

    `launch` shows that file where the process fails. Without it errors stay on standard error.
    """
    if is_first():
        return
    os.environ["TQDM_DISABLE"] = "1"
    folder = get_folder()
    target = os.open(folder / f"{get_number()}.txt" if folder else os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr) if folder else (sys.stdout,):
        stream.flush()
        os.dup2(target, stream.fileno())
    os.close(target)


def let_first_speak() -> None:
    """Wait a moment in another process than the first one before it prints why it fails.

    The first process mostly fails likewise and says so; torchrun then ends this one. `launch` needs no wait: there the
    output of this process goes to a file.
    """
    if not is_first() and get_folder() is None:
        time.sleep(_WAIT)


def leave() -> None:
    """Take this process out of the process group, where there is one: torch warns of a process that just ends."""
    if is_connected():
        with contextlib.suppress(Exception):  # another process may be gone
            _get_torch().distributed.destroy_process_group()
