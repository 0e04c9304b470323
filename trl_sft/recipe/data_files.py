"""The local files that the rows depend on: their digests before the rows are read, and whether they changed.

Inputs: a checked `Run`. Outputs: `DataFiles`.
Not here: what is in the files (`data`), and whether other files mean other tokens (`tokenization.token_digest`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from trl_sft.errors import DataError, Fault
from trl_sft.file_digests import hash_file
from trl_sft.recipe import resolved
from trl_sft.recipe.checked import Run


class DataFiles(NamedTuple):
    """The files at one moment, each by its absolute path."""

    digests: dict[str, str]  # sha256
    versions: dict[str, tuple[int, ...]]  # size, times and number of the file: what changes when it is written


def read(run: Run) -> DataFiles:
    """Return the files as they are now; one that cannot be read is left out, since reading its rows says why."""
    paths = resolved.list_files(run)
    return DataFiles({str(path): hash_file(path) for path in paths}, _read_versions(paths))


def check_unchanged(run: Run, files: DataFiles) -> None:
    """Refuse files that changed since `files` was read. Raises DataError.

    The rows may then be of the file before or after the change, and no digest would be that of the rows.
    """
    if _read_versions(resolved.list_files(run)) == files.versions:
        return
    now = resolved.hash_files(run)
    names = [path for path in dict.fromkeys((*files.digests, *now)) if files.digests.get(path) != now.get(path)]
    if names:
        problem = f"{', '.join(names[:3])} changed while the rows were read"
        fix = "Wait until nothing writes to the files, then run the same command again."
        raise DataError(Fault(run.recipe.where(("data",)), problem, fix, code="data.changed_while_read"))


def _read_versions(paths: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Return what changes when a file is written again, by the path of each."""
    versions: dict[str, tuple[int, ...]] = {}
    for path in paths:
        status = path.stat()
        versions[str(path)] = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    return versions
