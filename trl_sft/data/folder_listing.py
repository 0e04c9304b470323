"""Lets `datasets` find the files of a folder on this machine with one listing of the folder.

Inputs: the folder. Outputs: a context in which `datasets.load_dataset` and `load_dataset_builder` choose the same files
as elsewhere, but sooner: they try more than 60 patterns, list the folder anew for each of them, and ask for the status
of every file each time. Deliberately not here: what becomes of the files (`load`), and documents (`folder`).
"""

from __future__ import annotations

import contextlib
import functools
import glob
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

_NO_WORD = re.compile(r"\[[^]]*\]|[*?/]")  # parts of a pattern that match other characters, and the slash


@contextlib.contextmanager
def list_once(folder: Path) -> Iterator[None]:
    """Let fsspec list each folder once, and try no pattern below `folder` of which a word stands in no name.

    Written for fsspec 2023.12 to 2026.9, whose `glob` calls `find` for the names. After the context both are as before.

    Args:
        folder: the folder that is a source.

    """
    find, match_pattern = LocalFileSystem.find, LocalFileSystem.glob
    root = f"{folder}/"

    @functools.cache
    def find_once(system: LocalFileSystem, path: str, **keywords: Any) -> Any:
        return find(system, path, **keywords)

    @functools.cache
    def join_names(system: LocalFileSystem) -> str:
        return "\n".join(system.find(root, maxdepth=None, withdirs=True, detail=True))

    def match_possible(system: LocalFileSystem, path: str, **keywords: Any) -> Any:
        is_listed = path.startswith(f"{root}**") and not glob.has_magic(root)
        if is_listed and not all(word in join_names(system) for word in _NO_WORD.split(path)):
            return {} if keywords.get("detail") else []
        return match_pattern(system, path, **keywords)

    LocalFileSystem.find, LocalFileSystem.glob = find_once, match_possible
    try:
        yield
    finally:
        LocalFileSystem.find, LocalFileSystem.glob = find, match_pattern
