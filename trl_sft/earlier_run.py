"""The earlier run of a run folder: set aside when a new run replaces it, removed when the new run is finished.

Inputs: a run folder, locked by this process. Outputs: the folder `_earlier_run` in it. `run.json` is moved last, so the
earlier run is whole at any moment: where `run.json` is, once an interrupted move is taken back. Only files that the
earlier run's own `run.json` names are moved or removed; a link is moved as a link. Not here: whether a run may replace
another one (`recipe.folder_decision`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from trl_sft import checkpoints, console, run_folder
from trl_sft.run_folder import EARLIER_RUN, REMOVED_RUN, RUN


def set_aside(folder: Path) -> Path | None:
    """Move the files of the run in a folder to `_earlier_run`, and return that folder.

    A run without a checkpoint that was not finished holds nothing that was trained: its files are removed. So are
    those of an unfinished run that had set another one aside: the older one stays, since it may be a finished one.

    Returns:
        The folder with the earlier run; None = there was nothing to set aside.

    """
    aside = folder / EARLIER_RUN
    earlier = run_folder.read_json(folder / RUN)
    is_finished = earlier.get("outcome") == run_folder.DONE
    if is_set_aside(folder) and not is_finished:
        _remove_files(folder)
        return aside
    if not is_finished and not run_folder.list_checkpoints(folder):
        _remove_files(folder)
        return None
    if is_set_aside(folder):  # the process was killed between the end of a run and the removal of the one before it
        remove(folder)
    aside.mkdir(exist_ok=True)
    for path in list(_list_files(folder)):
        _make_durable_move(path, aside / path.relative_to(folder))
    run_folder.flush(aside)
    run_folder.flush(folder)
    return aside


def recover(folder: Path) -> None:
    """Complete what a process began in a folder before it was killed, unless another process has the lock.

    A run that was being set aside is moved back. The removal of a run that a finished one has replaced goes on.
    """
    left_over = [name for name in (EARLIER_RUN, REMOVED_RUN) if (folder / name).is_dir()]
    is_finished = run_folder.read_json(folder / RUN).get("outcome") == run_folder.DONE
    if is_finished:
        run_folder.remove_half_report(folder)
    if not left_over or (is_set_aside(folder) and not is_finished):
        return
    with run_folder.lock(folder) as is_ours:
        if not is_ours:
            return
        restore_interrupted(folder)
        if run_folder.read_json(folder / RUN).get("outcome") == run_folder.DONE:
            if is_set_aside(folder):
                console.say(f"earlier   {folder / EARLIER_RUN} is removed: the run that replaced it is finished")
            remove(folder)


def restore_interrupted(folder: Path) -> None:
    """Move the files back if the process was killed while it set them aside."""
    aside = folder / EARLIER_RUN
    if not aside.is_dir() or aside.is_symlink() or is_set_aside(folder):
        return
    for path in list(aside.iterdir()):
        if not os.path.lexists(folder / path.name):
            path.rename(folder / path.name)
    _remove_if_empty(aside)


def is_set_aside(folder: Path) -> bool:
    """Tell whether `_earlier_run` holds a whole run."""
    return (folder / EARLIER_RUN / RUN).is_file()


def remove(folder: Path) -> None:
    """Remove the earlier run that was set aside; files that are not the run's stay.

    The folder gets another name first: what an interrupted removal leaves is then not taken for a run.
    """
    aside, removed = folder / EARLIER_RUN, folder / REMOVED_RUN
    if removed.is_dir() and not removed.is_symlink():  # of an interrupted removal
        _remove_files(removed)
        _remove_if_empty(removed)
    if not is_set_aside(folder) or aside.is_symlink() or os.path.lexists(removed):
        return
    aside.rename(removed)
    _remove_files(removed)
    _remove_if_empty(removed)


def remove_replaced(folder: Path) -> None:
    """Remove the earlier run of a folder whose new run is finished; if the disk refuses, say so."""
    try:
        remove(folder)
    except OSError as error:
        places = [str(folder / name) for name in (EARLIER_RUN, REMOVED_RUN) if (folder / name).is_dir()]
        reason = error.strerror or error
        console.say(f"earlier   the run that this one replaced cannot be removed: {reason}. Remove {places[0]}")


def _remove_if_empty(folder: Path) -> None:
    """Remove a folder that holds nothing."""
    if not any(folder.iterdir()):
        folder.rmdir()


def _list_files(folder: Path) -> Iterator[Path]:
    """Yield the files and folders of the run in a folder, `run.json` last, so that an interrupted move can go on."""
    for path in folder.iterdir():
        if run_folder.is_checkpoint(path) or checkpoints.is_damaged_name(path):
            yield path
    names = (*run_folder.OWN_FILES, *run_folder.read_json(folder / RUN).get("files", []))
    for name in dict.fromkeys(map(str, names)):
        if name != RUN and run_folder.is_plain_name(name) and os.path.lexists(folder / name):
            yield folder / name
    if (folder / RUN).is_file():
        yield folder / RUN


def _remove_files(folder: Path) -> None:
    """Remove the files of the run in a folder; links are removed, not followed."""
    for path in list(_list_files(folder)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _make_durable_move(path: Path, target: Path) -> None:
    """Move a file or folder to a name that an interrupted move may have left behind."""
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    path.rename(target)
