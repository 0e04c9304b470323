"""The run folder: names and atomic writes of its files, and its lock.

Inputs: a folder. Outputs: files.
Not here: whether a run may use a folder (`recipe.folder_decision`), what the files mean (`training.manifest`). Needs no
torch.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from trl_sft import redaction

LOCK = ".lock"
_LOCKED_BY_ANOTHER = (errno.EWOULDBLOCK, errno.EACCES)
RECIPE, RESOLVED, RUN, LOG, CARD = "recipe.yaml", "resolved.yaml", "run.json", "log.jsonl", "README.md"
SAMPLES, EVAL = "samples.jsonl", "eval.json"
ANSWERS, EVALUATION, SUITE = "answers.jsonl", "evaluation.jsonl", "suite.jsonl"  # of the command evaluate
JUDGING, VERDICTS = "judging.jsonl", "verdicts.jsonl"  # of the command judge
BISECT = "bisect.jsonl"  # of the command bisect
SUSPECTS, SUSPECT_RERUNS = "suspects.jsonl", "suspect_reruns.jsonl"  # of the command suspects
TASK_ANSWERS, TASK_SAMPLES = "task_answers.jsonl", "task_samples.jsonl"  # of `evaluate --tasks`
LEDGER, REJECTS = "ledger.json", "rejects.jsonl"
ROWS, REPORT = "rows.jsonl", "report.html"
EARLIER_RUN = "_earlier_run"  # holds the run that a new one replaces; a push to the hub leaves out names with _
REMOVED_RUN = "_removed_run"  # what an interrupted removal of it leaves
PUSH_STAGE = "_push"  # second names of the files of checkpoints that are being pushed
MIRROR_STAGE = f"{PUSH_STAGE}/mirror"  # the same for run.mirror, and what is being fetched from there
SAVE_TRIAL = f"{PUSH_STAGE}/save_trial"  # what is saved and read back before step 1
CHECKPOINT = "checkpoint-"  # plus the number of the step
RUNNING, DONE = "running", "done"  # `outcome` in run.json
_TRAINER_STATE = "trainer_state.json"
_TRAINING_ARGS = "training_args.bin"
# the files of a run beside the model; run.json names those of the model
OWN_FILES = (
    RECIPE,
    RESOLVED,
    LOG,
    CARD,
    SAMPLES,
    EVAL,
    LEDGER,
    REJECTS,
    ROWS,
    REPORT,
    _TRAINING_ARGS,
    ANSWERS,
    EVALUATION,
    BISECT,
    SUSPECTS,
    SUSPECT_RERUNS,
    SUITE,
    JUDGING,
    VERDICTS,
    TASK_ANSWERS,
    TASK_SAMPLES,
)
_REPORT_SECONDS = 60  # in which a report is surely written
_TEMPORARY = re.compile(r"\.tmp[A-Za-z0-9]{6}")  # safetensors 0.8 writes to such a name first
ADAPTER_CONFIG = "adapter_config.json"  # the file by which peft and we recognise the folder of an adapter
WEIGHTS = ("model*.safetensors", "adapter_model.safetensors", "pytorch_model*.bin", "adapter_model.bin")


def default_folder(recipe: Path) -> Path:
    """Return the run folder of a recipe without `train.output_dir`: `runs/NAME`.

    For the `resolved.yaml` in a run folder it is `RUN-again` beside that folder: the repeated run replaces nothing.
    """
    if recipe.name == RESOLVED and (recipe.parent / RUN).is_file():
        return recipe.parent.with_name(recipe.parent.name + "-again")
    return Path.cwd() / "runs" / recipe.stem


def shorten_path(path: Path) -> str:
    """Return a path relative to the current folder, where it lies in it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a folder by step, without those whose writing was interrupted."""
    complete = [
        path
        for path in folder.glob(CHECKPOINT + "*")
        if is_checkpoint(path)
        and read_json(path / _TRAINER_STATE)
        and any(any(path.glob(pattern)) for pattern in WEIGHTS)
    ]
    return sorted(complete, key=get_step)


def get_step(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was saved, from its name."""
    return int(checkpoint.name.removeprefix(CHECKPOINT))


def is_checkpoint(path: Path) -> bool:
    """Tell whether a path has the name of a checkpoint's folder."""
    return path.name.startswith(CHECKPOINT) and path.name.removeprefix(CHECKPOINT).isdecimal()


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[bool]:
    """Lock a folder for this process inside the block; yield False if another process has it locked.

    The operating system removes the lock when the process ends, also after a crash. Without fcntl (on Windows), and on
    disks without locks, nothing is locked.
    """
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = _open_locked(folder / LOCK)
    if file is None:
        yield False
        return
    with file:
        try:
            yield True
        finally:
            with contextlib.suppress(OSError):  # of a disk that fails: what ended the block counts
                (folder / LOCK).unlink(missing_ok=True)
            for path in new_folders:  # a run that did not start leaves no empty folder behind
                with contextlib.suppress(OSError):
                    path.rmdir()


def _open_locked(path: Path) -> TextIO | None:
    """Return the file of a lock that this process has; None = another process has it."""
    try:
        import fcntl
    except ImportError:
        return path.open("a")
    attempts = 2
    while True:
        file = path.open("a")  # "w" would empty the file that a link leads to
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _LOCKED_BY_ANOTHER:  # ENOLCK, ENOTSUP: the disk has no locks
                return file
            file.close()
            attempts -= 1
            if not attempts:
                return None
            time.sleep(0.05)  # `is_locked` holds the lock for an instant
            continue
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # the process that had the lock removed this file meanwhile


def is_locked(folder: Path) -> bool:
    """Tell whether a process trains in a folder. Nothing is created; without fcntl the answer is whether a lock exists.

    A lock file alone proves nothing: a process that was killed leaves it behind.
    """
    try:
        import fcntl
    except ImportError:
        return (folder / LOCK).exists()
    try:
        with (folder / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError as error:
        return error.errno in _LOCKED_BY_ANOTHER
    return False


def is_plain_name(name: str) -> bool:
    """Tell whether a name is that of a file in the folder itself, and leads to no other folder."""
    return name not in ("", ".", "..") and Path(name).name == name


def is_left_over(path: Path) -> bool:
    """Tell whether a file is a lock, a half-written file of this package, or a folder of its own."""
    own = {_name_part(name) for name in (*OWN_FILES, RUN)}
    return path.name in (LOCK, EARLIER_RUN, REMOVED_RUN, PUSH_STAGE) or path.name in own


def remove_left_overs(folder: Path) -> None:
    """Remove the half-written files that a killed process left in a run folder."""
    own = {_name_part(name) for name in (*OWN_FILES, RUN)}
    for path in folder.iterdir():
        if path.name in own or (_TEMPORARY.fullmatch(path.name) and path.is_file() and not path.is_symlink()):
            path.unlink()
    shutil.rmtree(folder / PUSH_STAGE, ignore_errors=True)  # a link stays


def remove_save_trial(folder: Path) -> None:
    """Remove what was saved before step 1, and the folder around it where it is empty."""
    shutil.rmtree(folder / SAVE_TRIAL, ignore_errors=True)
    with contextlib.suppress(OSError):
        (folder / SAVE_TRIAL).parent.rmdir()


def remove_half_report(folder: Path) -> None:
    """Remove the report that a process was killed while it wrote; one of the last minute may still be written."""
    part = folder / _name_part(REPORT)
    with contextlib.suppress(OSError):
        if time.time() - part.lstat().st_mtime > _REPORT_SECONDS:
            part.unlink()


def flush(path: Path) -> None:
    """Have the operating system write a file or a folder to the disk; systems that cannot are left as they are.

    Raises:
        OSError: The disk cannot hold the file: it is full, or reports an error.

    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # a folder on Windows
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):  # what was written may be lost
            raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, *, keeps_secrets: bool = False) -> None:
    """Write a text file as a whole or not at all; its contents are on the disk then.

    Args:
        path: The file; its folder is made where it is absent.
        text: Its text. Secrets are left out, since a run folder may be published.
        keeps_secrets: Whether the text is the user's own file, which stays as it is.

    """
    if not keeps_secrets:
        text = redaction.redact_json(text) if path.suffix in (".json", ".jsonl") else redaction.redact(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(_name_part(path.name))
    try:
        part.write_text(text, encoding="utf-8")
        flush(part)
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def _name_part(name: str) -> str:
    """Return the name under which a file is written before it gets its own."""
    return f".{name}.part"


def append_json(path: Path, entry: dict[str, Any]) -> None:
    """Append one line to a JSONL file, without secrets."""
    with path.open("a", encoding="utf-8") as file:
        file.write(redaction.redact_json(json.dumps(entry, ensure_ascii=False)) + "\n")


def read_last_json(path: Path) -> dict[str, Any]:
    """Return the last whole line of a JSONL file of mappings; empty if there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    except OSError:
        return {}
    for line in reversed(lines):
        with contextlib.suppress(ValueError, RecursionError):  # of a line that a killed process began
            if isinstance(value := json.loads(line), dict):
                return value
    return {}


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the mappings of a JSONL file that only grows; damaged lines are left out, and an absent file has none."""
    try:
        lines = path.read_bytes().decode("utf-8", "replace").split("\n")  # a text may hold other line separators
    except OSError:
        return
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):  # of a line that a killed process began
            if isinstance(value := json.loads(line), dict):
                yield value


def read_first_lines(path: Path, limit: int) -> list[dict[str, Any]]:
    """Return the first mappings of a JSONL file: `limit` at most, and those before the first damaged line."""
    lines: list[dict[str, Any]] = []
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if len(lines) == limit:
                    break
                if isinstance(value := json.loads(line), dict):
                    lines.append(value)
    except (OSError, ValueError):  # absent, or damaged from here on
        return lines
    return lines


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON mapping; empty if the file is absent or incomplete."""
    try:
        if not path.is_file():  # a named pipe would be waited for
            return {}
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
