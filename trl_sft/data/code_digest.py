"""A digest of the package's own code, so that cached rows and tokens never outlive the code that made them.

In: folders of the package. Out: one sha256. Whole folders are read in place of lists of files kept by hand: a
module that is added counts without anybody having to remember it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest_code(*folders: Path) -> str:
    """Return the sha256 of every Python file below the folders, by relative path and content."""
    out = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            out.update(f"{folder.name}/{file.relative_to(folder).as_posix()}\0".encode())
            out.update(hashlib.sha256(file.read_bytes()).digest())
    return out.hexdigest()
