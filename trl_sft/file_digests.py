"""Digests of the content of files, each file read once in a process however often its digest is asked for.

Inputs: a path on this machine. Outputs: its sha256. A digest is remembered in this process alone, for the file as it
was: size, time, number and the time of its last change of any kind (ctime), which no program can set back as `touch`
and `tar` set the time of the content. Nothing is remembered on disk: there, a file with an old time would be taken for
another. Deliberately not here: which files a run depends on (`recipe.resolved`).
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

_FileVersion = tuple[int, int, int, int, int]
_digests: dict[str, tuple[_FileVersion, str]] = {}


def hash_file(path: Path) -> str:
    """Return the sha256 of the bytes of a file as they lie on disk, in hexadecimal digits. Raises OSError."""
    name = str(path)
    with path.open("rb") as file:
        version = _read_version(os.fstat(file.fileno()))
        known = _digests.get(name)
        if known is not None and known[0] == version:
            return known[1]
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if _read_version(os.fstat(file.fileno())) == version:
            _digests[name] = version, digest
    return digest


def _read_version(status: os.stat_result) -> _FileVersion:
    """Return what changes when a file is written again, replaced, or given another time."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev
