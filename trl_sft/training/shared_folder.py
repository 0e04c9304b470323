"""Whether every process of a run sees the run folder of the first one, and may write there.

Inputs: a checked recipe whose run folder exists. Output: a fault in every process. A run folder on a disk of one host
is found before the weights load, and not at the first checkpoint. Not here: what is saved there (`save_trial`).
"""

from __future__ import annotations

import contextlib
import platform
import shutil
import time
import uuid
from pathlib import Path
from typing import NamedTuple

from trl_sft import disk, ranks, run_folder
from trl_sft.errors import Fault, LaunchError
from trl_sft.recipe.checked import Run

_TOKEN = "token"
_MAX_NAMES = 3  # of processes in a message
_PATIENCE = 5.0  # seconds in which a network disk must show a file that another host wrote


class Sight(NamedTuple):
    """What one process sees of the run folder."""

    process: str  # `process 1 on node-b`
    folder: str
    sees_first: bool  # what the first process wrote there


def check(run: Run) -> None:
    """Write a file in the first process, read it in all of them, and let each of them write one.

    Args:
        run: the checked recipe.

    Raises:
        LaunchError: a process sees another folder, or may not write; in every process.
        OSError: the disk refuses for another reason.

    """
    folder = run.output_dir / run_folder.SAVE_TRIAL
    token = ranks.share(lambda: _write_token(folder))
    process = f"process {ranks.get_number()} on {platform.node()}"
    try:
        sights = ranks.collect(Sight(process, str(run.output_dir), _reads_token(folder, token)))
        blind = [sight.process for sight in sights if not sight.sees_first]
        if blind:
            names = ", ".join(blind[:_MAX_NAMES]) + (f" and {len(blind) - _MAX_NAMES} more" * (len(blind) > _MAX_NAMES))
            problem = f"the run folder of {sights[0].process} is {sights[0].folder}, and {names} cannot see it"
            fix = "Set `train.output_dir` to a folder on a disk that all hosts share, under the same path."
            where = run.recipe.where(("train", "output_dir"))
            raise LaunchError(Fault(where, problem, fix, code="launch.folder_not_shared"))
        faults = list(dict.fromkeys(filter(None, ranks.collect(_try_to_write(folder)))))
        if faults:
            raise LaunchError(faults)
    finally:
        if ranks.is_first():
            run_folder.remove_save_trial(run.output_dir)


def _write_token(folder: Path) -> str:
    """Make an empty folder with a file; return the text of the file."""
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    folder.mkdir(parents=True)
    token = uuid.uuid4().hex
    (folder / _TOKEN).write_text(token)
    return token


def _reads_token(folder: Path, token: str) -> bool:
    """Tell whether this process reads what the first one wrote."""
    until = time.monotonic() + _PATIENCE
    while True:
        with contextlib.suppress(OSError):
            if (folder / _TOKEN).read_text() == token:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.2)


def _try_to_write(folder: Path) -> Fault | None:
    """Write a file; return why the disk refuses it. Raises OSError for another reason."""
    try:
        (folder / f"process-{ranks.get_number()}").write_text("x")
    except OSError as error:
        fault = disk.explain(error, [folder])
        if fault is None:
            raise
        return fault
    return None
