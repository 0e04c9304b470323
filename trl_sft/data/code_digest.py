"""What keys of caches are made of: a digest of the package's own code, and the fingerprints that datasets keeps.

In: folders of the package, or rows. Out: one sha256, or a fingerprint. Cached rows and tokens never outlive the code
that made them. Whole folders are read in place of lists of files kept by hand: a module that is added counts without
anybody having to remember it.
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
    """Return the key by which datasets caches what is computed of these rows.

    datasets 4.8 to 5.2 keep it in `_fingerprint` and have no public way to read it.
    """
    return str(rows._fingerprint)


def set_fingerprint(rows: Dataset, key: str) -> None:
    """Give rows that were read from a file a fingerprint that is the same in every process.

    datasets 4.8 to 5.2 choose a random one, so that nothing computed of the rows would be found again.
    """
    rows._fingerprint = key
