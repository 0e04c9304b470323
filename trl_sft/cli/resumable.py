"""How commands end that keep each answer as it arrives, so that the same command continues them.

Inputs: the files or folders that a command writes. Outputs: the error of an interruption or of the disk. Not here: what
keeps the answers (`evaluation.answer_cache`, `evaluation.call_log`).
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

from trl_sft import disk, errors


@contextlib.contextmanager
def explain_endings(*outputs: Path, kept: str = "answers") -> Iterator[None]:
    """Explain Ctrl-C and errors of the disk inside the block.

    Args:
        outputs: where the command writes.
        kept: what it does not make again.

    Raises:
        RunStopped: the command was interrupted.
        RecipeError: the disk refused to write.

    """
    try:
        yield
    except KeyboardInterrupt:
        message = f"stopped; the {kept} so far are kept\nRun the same command again: it continues."
        raise errors.RunStopped(message, errors.EXIT_SIGNAL + signal.SIGINT, code="run.interrupted") from None
    except OSError as error:
        fault = disk.explain(error, list(outputs))
        if fault is None:
            raise
        raise errors.RecipeError(fault) from None
