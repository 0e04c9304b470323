"""Checkpoints on disk: which are whole, which are damaged, and the record that this package adds to each.

Inputs: run folders and the `checkpoint-N` folders in them. Outputs: records (`trl_sft.json`), descriptions of damage,
the newest checkpoint that a run can resume from. The record is written last: a checkpoint that has one was complete,
and one of this version that has none was not.
Not here: whether a run may resume from it (`recipe.folder_decision`), and loading. Needs no torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

from trl_sft import run_folder

RECORD = "trl_sft.json"
ROWS_PER_STEP = "rows_per_step"  # of a record, and of a run.json whose checkpoints have records
DAMAGED = "damaged-"  # begins the name of a checkpoint that is set aside
_FILES = "files"
_DIGEST = "xxh128"  # of a file, and of the record itself
_CHUNK = 2**24  # bytes
_TRAINER_STATE = "trainer_state.json"
_STATE_NAMES = {  # pattern of a file or folder -> what is lost without it
    "optimizer*": "the state of the optimizer",
    "scheduler*": "the state of the learning rate schedule",
    "rng_state*": "the states of the random numbers",
}
_SHARDED = "global_step*"  # a folder of DeepSpeed, which holds the optimizer and the schedule
# What the Trainer or peft would read beside the files that were saved, or in their place.
_READ_ON_RESUME = (
    *(*run_folder.WEIGHTS, "*.index.json", run_folder.ADAPTER_CONFIG, _SHARDED),
    *("optimizer.pt", "optimizer.bin", "optimizer_*", "scheduler.pt", "rng_state*.pth", "scaler.pt"),
)


class DamagedCheckpoint(NamedTuple):
    """A checkpoint that a run cannot resume from, and why."""

    path: Path
    damage: str  # `optimizer.pt has 1,000 of 52,344 bytes`


class Choice(NamedTuple):
    """The checkpoint that a run resumes from, and those that it passes over."""

    newest: Path | None  # None = no checkpoint is whole
    damaged: tuple[DamagedCheckpoint, ...]  # newer than `newest`, the newest first
    unfinished: tuple[Path, ...]  # their writing was interrupted: they have no record


def write_record(checkpoint: Path, entries: dict[str, Any]) -> None:
    """Write the record of a checkpoint: name, size and hash of each file, and `entries`; all is on the disk then.

    Args:
        checkpoint: The folder, which the Trainer has written.
        entries: What the run needs to resume exactly, beside the files.
    """
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != RECORD:
            files[path.relative_to(checkpoint).as_posix()] = {"bytes": path.stat().st_size, _DIGEST: hash_file(path)}
            run_folder.flush(path)
    record = entries | {_FILES: files}
    text = json.dumps(record | {_DIGEST: _hash_record(record)}, ensure_ascii=False)
    run_folder.write_text(checkpoint / RECORD, text + "\n")
    run_folder.flush(checkpoint)
    run_folder.flush(checkpoint.parent)


def read_record(checkpoint: Path) -> dict[str, Any]:
    """Return the record of a checkpoint; where there is none, what `run.json` beside it says about the run."""
    record = run_folder.read_json(checkpoint / RECORD)
    record.pop(_DIGEST, None)
    return record or run_folder.read_json(checkpoint.parent / run_folder.RUN)


def hash_file(path: Path) -> str:
    """Return the 128 bits of xxHash of a file, which find damage at more than the speed of a disk."""
    import xxhash  # not at the top: a refused run imports nothing that takes time

    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def choose(folder: Path, *, read_contents: bool = True) -> Choice:
    """Return the newest checkpoint of a folder that is whole, with those that are not.

    Args:
        folder: The run folder.
        read_contents: Whether the files are read and compared with their hashes; else their sizes alone.
    """
    names = [path for path in folder.glob(run_folder.CHECKPOINT + "*") if run_folder.is_checkpoint(path)]
    paths = sorted(names, key=run_folder.get_step, reverse=True)
    unfinished: list[Path] = []
    damaged: list[DamagedCheckpoint] = []
    has_records = ROWS_PER_STEP in run_folder.read_json(folder / run_folder.RUN)
    without_record = [path for path in paths if has_records and not os.path.lexists(path / RECORD)]
    for path in paths:
        # a run writes one after the other, so no other can be interrupted
        if without_record == [path] == paths[:1] and not _was_complete(path):
            unfinished.append(path)
            continue
        if path in without_record:
            damaged.append(DamagedCheckpoint(path, f"{RECORD} is missing"))
            continue
        damage = find_damage(path, read_contents=read_contents)
        if not damage:
            return Choice(path, tuple(damaged), tuple(unfinished))
        if (path / RECORD).is_file() or (path / _TRAINER_STATE).is_file():  # the Trainer writes its state last
            damaged.append(DamagedCheckpoint(path, damage))
        else:
            unfinished.append(path)
    return Choice(None, tuple(damaged), tuple(unfinished))


def _was_complete(checkpoint: Path) -> bool:
    """Tell whether a run went on, or ended, after it had saved a checkpoint: its record was lost later."""
    step, folder = run_folder.get_step(checkpoint), checkpoint.parent
    outcome = str(run_folder.read_json(folder / run_folder.RUN).get("outcome", ""))
    if re.search(rf"; saved in .*{run_folder.CHECKPOINT}{step}$", outcome, re.M):  # `training.callbacks` writes it
        return True
    entries = run_folder.read_last_json(folder / run_folder.LOG)
    return isinstance(last := entries.get("step"), int) and last > step


def find_damage(checkpoint: Path, *, read_contents: bool = True) -> str:
    """Return what is wrong with the files of a checkpoint; "" = it is whole.

    Args:
        checkpoint: The folder.
        read_contents: Whether files are compared with their hashes; else their sizes alone.
    """
    record = run_folder.read_json(checkpoint / RECORD)
    if not os.path.lexists(checkpoint / RECORD):
        return _find_missing(checkpoint) or _find_unreadable(checkpoint)
    if not record:
        return f"{RECORD} cannot be read"
    if record.pop(_DIGEST, None) != _hash_record(record):
        return f"{RECORD} has other contents than when it was saved"
    for name, expected in record[_FILES].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is {'a link to no file' if path.is_symlink() else 'missing'}"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size:,} of {expected['bytes']:,} bytes"
        if read_contents and hash_file(path) != expected[_DIGEST]:
            return f"{name} has other contents than when it was saved"
    return _find_missing(checkpoint) or _find_foreign(checkpoint, record[_FILES])


def is_weights_only(checkpoint: Path) -> bool:
    """Tell whether a checkpoint was saved without everything that training needs (`save_only_model`)."""
    has_state = any(any(checkpoint.glob(pattern)) for pattern in (*_STATE_NAMES, _SHARDED))
    return not has_state and not _find_missing(checkpoint, weights_only=True)


def is_damaged_name(path: Path) -> bool:
    """Tell whether a path has the name of a checkpoint that was set aside."""
    return path.name.startswith(DAMAGED) and run_folder.is_checkpoint(path.with_name(path.name.removeprefix(DAMAGED)))


def set_aside(choice: Choice) -> None:
    """Rename damaged checkpoints, which the Trainer would count as its own, and remove unfinished ones."""
    for path in choice.unfinished:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:  # a file or a link has the name of a checkpoint; a link is removed, not followed
            path.unlink(missing_ok=True)
    for path in (path for path, _ in choice.damaged if not is_weights_only(path)):
        target = path.with_name(DAMAGED + path.name)
        if target.is_symlink():
            target.unlink()
        shutil.rmtree(target, ignore_errors=True)
        path.rename(target)


def _find_missing(checkpoint: Path, *, weights_only: bool = False) -> str:
    """Return which part of a checkpoint is missing; "" = none."""
    if not run_folder.read_json(checkpoint / _TRAINER_STATE):
        state = checkpoint / _TRAINER_STATE
        return f"{_TRAINER_STATE} " + ("cannot be read" if state.is_file() else "is missing")
    if not any(any(checkpoint.glob(pattern)) for pattern in run_folder.WEIGHTS):
        return "the weights are missing"
    if weights_only:
        return ""
    is_sharded = any(checkpoint.glob(_SHARDED))
    for pattern, name in _STATE_NAMES.items():
        if not any(checkpoint.glob(pattern)) and not (is_sharded and pattern != "rng_state*"):
            return f"{pattern.rstrip('*')}, {name}, is missing"
    return ""


def _find_foreign(checkpoint: Path, files: Collection[str]) -> str:
    """Return which file was added to a checkpoint and would be read on resume; "" = none. Other files are no damage."""
    folders = {name.partition("/")[0] for name in files}
    for pattern in _READ_ON_RESUME:
        for path in sorted(checkpoint.glob(pattern)):
            if path.name not in folders:
                return f"{path.name} was added after it was saved"
    return ""


def _hash_record(record: dict[str, Any]) -> str:
    """Return the 128 bits of xxHash of a record without its digest."""
    import xxhash  # not at the top: a refused run imports nothing that takes time

    return xxhash.xxh3_128(json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def _find_unreadable(checkpoint: Path) -> str:
    """Return which file of a checkpoint without a record is cut off; "" = none."""
    for path in sorted(checkpoint.rglob("*")):
        if path.suffix in (".pt", ".pth"):
            try:
                with zipfile.ZipFile(path) as archive:
                    broken = archive.testzip()
            except (zipfile.BadZipFile, OSError):
                broken = path.name
            if broken is not None:
                return f"{path.name} cannot be read"
        if path.suffix == ".safetensors" and not _is_safetensors_whole(path):
            return f"{path.name} is cut off"
    return ""


def _is_safetensors_whole(path: Path) -> bool:
    """Tell whether a file of safetensors is as long as its header says."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                return False
            header = json.loads(file.read(length))
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return path.stat().st_size == 8 + length + max(ends, default=0)
