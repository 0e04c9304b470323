"""An output folder that appears in one step: complete, or not at all.

Inputs: the path that the user names. Outputs: a hidden folder beside it to write into, which is renamed at the end.
A process that is stopped by a signal removes it; what a process that was killed leaves is removed by the next one.
Deliberately not here: what is written.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from trl_sft import run_folder, user_paths
from trl_sft.errors import EXIT_SIGNAL, Fault, RecipeError, RunStopped
from trl_sft.serving import stop_signals


def check(folder: Path) -> None:
    """Refuse an output folder that cannot be used, or that holds something. Raises RecipeError."""
    user_paths.check("--output", folder, user_paths.FOLDER, is_output=True)
    if folder.is_symlink() or (folder.is_dir() and any(folder.iterdir())):
        problem = f"{folder}: holds something already, and nothing is replaced"
        fix = "Name a folder that does not exist, or remove this one."
        raise RecipeError(Fault("--output", problem, fix, code="merge.output_exists"))


@contextlib.contextmanager
def create(folder: Path) -> Iterator[Path]:
    """Yield a folder to write into; when the block ends it gets the name that the user wrote.

    Raises:
        RecipeError: Another process writes to the same folder.
        RunStopped: A signal arrived; nothing is left behind.

    """
    folder = folder.absolute()
    part = folder.with_name(f".{folder.name}.part")
    new_parents = [path for path in folder.parents if not path.exists()]
    with stop_signals.raising(), run_folder.lock(part) as is_ours:
        if not is_ours:
            problem = f"{folder}: another process writes to this folder"
            fix = "Wait until it ends, or name another folder."
            raise RecipeError(Fault("--output", problem, fix, code="merge.output_in_use"))
        try:
            _empty(part)
            yield part
            for path in part.iterdir():
                run_folder.flush(path)
            (part / run_folder.LOCK).unlink(missing_ok=True)
            part.rename(folder)  # onto an empty folder too
            run_folder.flush(folder.parent)
        except BaseException as error:
            shutil.rmtree(part, ignore_errors=True)
            for path in new_parents:
                with contextlib.suppress(OSError):
                    path.rmdir()
            if isinstance(error, KeyboardInterrupt):
                number = stop_signals.get_number(error)
                message = "stopped before the end; nothing is left behind\nRun the same command again."
                raise RunStopped(message, EXIT_SIGNAL + number, code="run.interrupted") from None
            raise


def _empty(part: Path) -> None:
    """Remove what a killed process left, except the lock of this one."""
    for path in part.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != run_folder.LOCK:
            path.unlink()
