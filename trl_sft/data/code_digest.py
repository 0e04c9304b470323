"""The parts of cache keys: a digest of the package's own code, and the fingerprints that `datasets` stores.

Inputs: folders of the package, or a dataset. Outputs: a sha256, or a fingerprint. Cached rows and tokens never
outlive the code that made them. Whole folders are digested, so that a new module counts without an entry in a list.
Deliberately not here: the other parts of a key (`pipeline.fingerprint`, `tokenization.cache`).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from datasets import Dataset


def digest_code(*folders: Path) -> str:
    """Return the sha256 of every Python file below the folders, by relative path and content."""
    out = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            out.update(f"{folder.name}/{file.relative_to(folder).as_posix()}\0".encode())
            out.update(hashlib.sha256(file.read_bytes()).digest())
    return out.hexdigest()


def get_fingerprint(rows: Dataset) -> str:
    """Return the key under which `datasets` caches what is computed from these rows.

    datasets 4.8 to 5.2 store it in `_fingerprint` and have no public way to read it.
    """
    return str(rows._fingerprint)
