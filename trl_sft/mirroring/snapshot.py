"""The copies of a run at its mirror: `checkpoint-N` and `finished`, each with a manifest that is written last.

    checkpoint-20/model.safetensors ...     the files of the checkpoint
    checkpoint-20/_run/run.json ...         what the run folder holds beside it, for a new host
    checkpoint-20/mirror.json               name, size and SHA-256 of each file

Inputs: a storage, local files. Outputs: copies that are complete, or have no manifest and count for nothing. A manifest
is removed before anything else of its copy. Not here: which checkpoints are copied, and when (`uploader`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trl_sft import checkpoints, run_folder
from trl_sft.mirroring import ownership
from trl_sft.mirroring.storage import FileDigest, Storage, digest_file

MANIFEST = "mirror.json"
FINISHED = "finished"  # the folder of a finished run
RUN_FILES = "_run"  # in a copy: the files of the run folder
_FILES, _BYTES, _SHA256 = "files", "bytes", "sha256"
_RECORDS = (run_folder.RUN, run_folder.RECIPE, run_folder.RESOLVED, run_folder.LOG, run_folder.SAMPLES)
Count = Callable[[int], None]  # is called with numbers of bytes


class Snapshot(NamedTuple):
    """A complete copy."""

    name: str  # `checkpoint-20`
    files: Mapping[str, FileDigest]  # by their names in the folder


def list_snapshots(storage: Storage) -> list[str]:
    """Return the names of complete copies: the checkpoints by step, then `finished`."""
    names = [name for name in storage.list_folders() if storage.exists(f"{name}/{MANIFEST}")]
    steps = sorted((name for name in names if run_folder.is_checkpoint(Path(name))), key=get_step)
    return [*steps, *(name for name in names if name == FINISHED)]


def get_step(name: str) -> int:
    """Return the step of a copy of a checkpoint."""
    return run_folder.get_step(Path(name))


def read_snapshot(storage: Storage, name: str) -> Snapshot | None:
    """Return a copy by its manifest; None if the manifest is absent or damaged."""
    if not storage.exists(f"{name}/{MANIFEST}"):
        return None
    try:
        entries: dict[str, Any] = json.loads(storage.read(f"{name}/{MANIFEST}"))[_FILES]
        files = {file: FileDigest(int(entry[_BYTES]), str(entry[_SHA256]), "") for file, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return Snapshot(name, files) if all(map(_is_inside, files)) else None


def collect_checkpoint(folder: Path, checkpoint: Path) -> dict[str, Path]:
    """Return the files of a copy of a checkpoint: name in the copy -> local file.

    Args:
        folder: The run folder.
        checkpoint: The checkpoint, or a second name of it.

    """
    files = {path.relative_to(checkpoint).as_posix(): path for path in sorted(checkpoint.rglob("*")) if path.is_file()}
    return files | {f"{RUN_FILES}/{name}": folder / name for name in _RECORDS if (folder / name).is_file()}


def collect_finished(folder: Path) -> dict[str, Path]:
    """Return the files of a copy of a finished run: the model, its records, and what evaluations of it wrote."""
    model = run_folder.read_json(folder / run_folder.RUN).get("files", [])
    names = [*(name for name in map(str, model) if run_folder.is_plain_name(name)), run_folder.RUN]
    names += run_folder.OWN_FILES
    return {name: folder / name for name in dict.fromkeys(names) if (folder / name).is_file()}


def write_snapshot(
    storage: Storage, name: str, files: Mapping[str, Path], *, count: Count, replaced: Sequence[str] = ()
) -> None:
    """Copy files to the storage, verify each, and write the manifest last.

    Args:
        storage: The mirror.
        name: Of the copy.
        files: name in the copy -> local file.
        count: Is called with numbers of bytes that were sent.
        replaced: Copies of an earlier run. They are removed once the new files are there, before the manifest.

    Raises:
        DamagedCopy: A file arrived with other bytes.
        OtherWriter: Another process writes to the mirror now.

    """
    ownership.check(storage)
    if storage.exists(f"{name}/{MANIFEST}"):
        storage.remove(f"{name}/{MANIFEST}")
    digests = dict(zip(files, storage.upload_files(name, files, count=count), strict=True))
    ownership.check(storage)
    for other in replaced:
        if other != name:
            remove_snapshot(storage, other)
    _write_manifest(storage, name, digests)


def update_snapshot(storage: Storage, name: str, files: Mapping[str, Path]) -> list[str]:
    """Copy the files that a copy lacks, or has with other bytes, and verify each.

    Args:
        storage: The mirror.
        name: Of the copy; it is made where it is absent.
        files: name in the copy -> local file.

    Returns:
        The names of the files that were copied.

    Raises:
        DamagedCopy: A file arrived with other bytes.
        OtherWriter: Another process writes to the mirror now.

    """
    copy = read_snapshot(storage, name)
    digests = dict(copy.files) if copy is not None else {}
    changed = {file: path for file, path in files.items() if not _is_equal(path, digests.get(file))}
    if changed:
        ownership.check(storage)
        storage.remove(f"{name}/{MANIFEST}")
        new = storage.upload_files(name, changed, count=lambda _: None)
        _write_manifest(storage, name, digests | dict(zip(changed, new, strict=True)))
    return list(changed)


def _is_equal(path: Path, digest: FileDigest | None) -> bool:
    """Tell whether a file has the bytes of a copy."""
    if digest is None or path.stat().st_size != digest.size:
        return False
    return digest_file(path).sha256 == digest.sha256


def _write_manifest(storage: Storage, name: str, digests: Mapping[str, FileDigest]) -> None:
    """Write the file that makes a copy complete."""
    entries = {file: {_BYTES: digest.size, _SHA256: digest.sha256} for file, digest in digests.items()}
    storage.write(f"{name}/{MANIFEST}", json.dumps({_FILES: entries}, indent=1).encode())


def remove_snapshot(storage: Storage, name: str) -> None:
    """Remove a copy, its manifest first."""
    storage.remove(f"{name}/{MANIFEST}")
    storage.remove(name)


def download_snapshot(storage: Storage, snapshot: Snapshot, folder: Path, *, count: Count) -> None:
    """Copy the files of a snapshot into a folder, and compare each with its hash. Raises DamagedCopy."""
    for name, digest in snapshot.files.items():
        storage.download(f"{snapshot.name}/{name}", folder / name, digest, count=count)


def read_checkpoint_record(storage: Storage, copy: Snapshot) -> dict[str, Any] | None:
    """Return the record of a checkpoint at the mirror; None if it is absent or has other bytes than were uploaded."""
    expected = copy.files.get(checkpoints.RECORD)
    try:
        content = storage.read(f"{copy.name}/{checkpoints.RECORD}")
    except FileNotFoundError:
        return None
    if expected is None or hashlib.sha256(content).hexdigest() != expected.sha256:
        return None
    record = json.loads(content)
    return record if isinstance(record, dict) else None


def list_incomplete(storage: Storage) -> list[str]:
    """Return the names of copies of checkpoints that were begun and never finished."""
    names = [name for name in storage.list_folders() if run_folder.is_checkpoint(Path(name))]
    return [name for name in names if not storage.exists(f"{name}/{MANIFEST}")]


def choose_removals(names: Sequence[str], limit: int | None, best: str) -> list[str]:
    """Return the copies that `save_total_limit` does not keep, as the Trainer chooses checkpoints.

    Args:
        names: Of all copies of checkpoints.
        limit: `save_total_limit`; None = all are kept.
        best: The checkpoint with the best metric; "" = none.

    """
    if not limit:
        return []
    steps = sorted(names, key=get_step)
    if best in steps[:-1]:  # transformers 5.23, rotate_checkpoints: the best one counts as the second newest
        steps.remove(best)
        steps.insert(len(steps) - 1, best)
        limit = max(limit, 2)
    return steps[:-limit]


def _is_inside(name: str) -> bool:
    """Tell whether the name of a file leads to no other folder."""
    parts = Path(name).parts
    return bool(parts) and not Path(name).is_absolute() and ".." not in parts
