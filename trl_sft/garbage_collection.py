"""Python's garbage collector and the objects of upstream's packages, which live as long as the process.

torch, transformers and TRL make a million objects while they are imported. The collector searches them several times
until the imports are done (0.8 s of 4.8 s on one core), and once more at each `gc.collect()`, of which a run of the
Trainer has some (0.25 s each). Input and output: the state of `gc`. Not here: objects of a run, which are collected as
always, also while memory is estimated.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

_STATE = {"owns_process": False}


def own_process() -> None:
    """Let later imports exempt all objects from the collector: this process runs one command, and nothing else.

    Not for a program or a notebook that calls the functions of the package: the objects of its user could never be
    collected again.
    """
    _STATE["owns_process"] = True


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Collect nothing inside the block, which imports packages; then exempt their objects if the process is ours."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if _STATE["owns_process"]:
            gc.freeze()
        if was_enabled:
            gc.enable()
