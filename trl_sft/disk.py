"""Recognises what a disk refuses: it is full, over quota, read-only, closed to the user, or a file is too long for it.

Inputs: an exception of any library, and the folders that the command writes to. Outputs: a fault that names the folder
and its free space, or None. Not here: folders that cannot be written to from the beginning (`run_folder`).
"""

from __future__ import annotations

import errno
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from trl_sft.console import format_bytes
from trl_sft.errors import Fault

# error number -> what is wrong, as the end of a sentence
_ANY = -1  # for torch.save, which does not say why it cannot write
_PROBLEMS = {
    _ANY: "a file cannot be written: the disk is full, a quota is used up, or the file is too long (ulimit -f)",
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the user is used up",
    errno.EFBIG: "a file would be longer than the system allows (ulimit -f)",
    errno.EROFS: "the disk is read-only",
    errno.EIO: "the disk reports an error",
    errno.EACCES: "the system no longer lets you write there",
    errno.EPERM: "the system no longer lets you write there",
}
_PERMISSIONS = (errno.EACCES, errno.EPERM)
_RUST_NUMBER = re.compile(r"\(os error (\d+)\)")  # of safetensors and tokenizers
_RUST_WRITES = "serializ"  # in the message where they write
_TEXTS = {
    "No space left on device": errno.ENOSPC,
    "Disk quota exceeded": errno.EDQUOT,
    "File too large": errno.EFBIG,
    "PytorchStreamWriter failed writing file": _ANY,  # torch.save
    "basic_ios::clear: iostream error": _ANY,
    "inline_container.cc": _ANY,
    "Read-only file system": errno.EROFS,
}


def explain(error: BaseException, folders: Iterable[Path] = (), *, command: str = "") -> Fault | None:
    """Return the fault of a disk that refuses to write; None = the error is another one.

    Args:
        error: the exception; those that it was raised from count too.
        folders: where the command writes.
        command: continues the work once there is space; "" = the same command.

    """
    folders = list(folders)
    for cause in _list_causes(error):
        number = _find_number(cause)
        if number is None or (number in _PERMISSIONS and not _is_about_writing(cause, folders)):
            continue
        folder = _find_folder(cause, folders)
        problem = f"{_PROBLEMS[number]}; {_describe_space(folder)}"
        cure = {
            errno.EFBIG: "Raise the limit (ulimit -f unlimited).",
            errno.EROFS: "Use a folder on another disk.",
            **dict.fromkeys(_PERMISSIONS, "Correct the permissions of the folder, or use another one."),
        }.get(number, "Free space there, or use a folder on another disk.")
        again = f" Then run: {command}" if command else " Then run the same command again."
        return Fault(str(folder), problem, cure + again, code="machine.disk_full")
    return None


def _list_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those that it was raised from, the first cause last."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _find_number(error: BaseException) -> int | None:
    """Return the number of the error of a disk that an exception stands for; None = of no disk."""
    if isinstance(error, OSError) and error.errno in _PROBLEMS:
        return error.errno
    match = _RUST_NUMBER.search(str(error))
    if match and int(match[1]) in _PROBLEMS:
        return int(match[1])
    return next((number for text, number in _TEXTS.items() if text in str(error)), None)


def _is_about_writing(error: BaseException, folders: Iterable[Path]) -> bool:
    """Tell whether a refused permission is about a file that the command writes, and not about one that it reads."""
    name = getattr(error, "filename", None)
    if not isinstance(name, str) or not name:
        return _RUST_WRITES in str(error)
    return any(Path(name).absolute().is_relative_to(folder.absolute()) for folder in _list_written(folders))


def _find_folder(error: BaseException, folders: Iterable[Path]) -> Path:
    """Return the folder that the error is about: the file's, or the one of those written to with the least space."""
    name = getattr(error, "filename", None)
    if isinstance(name, str) and name:
        return Path(name).parent
    by_disk: dict[int, Path] = {}  # the first folder of each disk
    for folder in map(_find_existing, _list_written(folders)):
        by_disk.setdefault(folder.stat().st_dev, folder)
    return min(by_disk.values(), key=lambda folder: shutil.disk_usage(folder).free)


def _list_written(folders: Iterable[Path]) -> list[Path]:
    """Return the folders that a command may write to: its own, the cache of rows, the one for temporary files."""
    return [*folders, *_list_caches(), Path(tempfile.gettempdir())]


def _list_caches() -> Iterator[Path]:
    """Yield the cache of prepared rows, where `datasets` is in use."""
    config = sys.modules.get("datasets.config")
    if config is not None:
        yield Path(config.HF_DATASETS_CACHE)


def _find_existing(folder: Path) -> Path:
    """Return a folder, or the first one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())


def _describe_space(folder: Path) -> str:
    """Return the free space of a folder's disk in words."""
    try:
        return f"{format_bytes(shutil.disk_usage(_find_existing(folder)).free)} are free"
    except OSError:
        return "its free space cannot be read"
