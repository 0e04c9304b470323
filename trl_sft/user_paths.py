"""Checks a path that the user wrote, before anything at it is opened.

Inputs: a path of a recipe, of a file of settings or of the command line, and what is due at it. Outputs: a
`PathProblem`, which becomes a fault at the key or argument; None = the path can be used, or nothing is there yet.
Not here: that something has to be there (its reader says so, with the nearest name), and what is in a file.
"""

from __future__ import annotations

import errno
import os
import stat
import unicodedata
from pathlib import Path
from typing import NamedTuple

from trl_sft import redaction
from trl_sft.errors import Fault, RecipeError, first_line

FILE, FOLDER, FILE_OR_FOLDER = "a file", "a folder", "a file or a folder"  # what is due at a path
_MAX_NAME, _MAX_PATH = 255, 4096  # bytes of one name and of a whole path: NAME_MAX and PATH_MAX of Linux
_JOINERS = "\u200c\u200d"  # parts of words and of emoji
_KERNEL_FOLDERS = ("/proc/", "/sys/")
_MAX_SHOWN = 80  # characters of a path in a message
_SHOWN_PART = 30  # characters of the beginning and of the end of a longer one
_SPECIAL_FILES = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


class PathProblem(NamedTuple):
    """Why a path cannot be used, and the instruction that solves it."""

    problem: str
    fix: str
    code: str  # `path.too_long`


def find_problem(path: Path, expected: str, *, is_output: bool = False) -> PathProblem | None:
    """Return why a path cannot be used; None if it can be, or if nothing is there.

    Args:
        path: The path; it need not exist.
        expected: `FILE`, `FOLDER` or `FILE_OR_FOLDER`.
        is_output: Whether the path is written; then it need not be readable.

    """
    try:
        written = os.fsencode(path)
    except ValueError:  # half a character
        written = b"\0"
    if b"\0" in written:
        problem = "the path has a character that no file name can have"
        return PathProblem(problem, "Remove this character.", code="path.invalid_character")
    longest = max(map(len, written.split(b"/")))
    if longest > _MAX_NAME or len(written) >= _MAX_PATH:
        return _explain_length(longest, len(written))
    if not is_output and os.path.realpath(path).startswith(_KERNEL_FOLDERS):
        problem = "this belongs to the files of the kernel, which are no data"
        return PathProblem(problem, f"Write the path of {expected}.", code="path.special_file")
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return _explain_error(path, error, expected, is_output=is_output)
    for is_special, kind in _SPECIAL_FILES:
        if is_special(mode):
            fix = f"Write the path of {expected}."
            return PathProblem(f"this is {kind}, not {expected}", fix, code="path.special_file")
    if expected == FILE and stat.S_ISDIR(mode):
        return PathProblem("this is a folder, not a file", "Write the path of a file.", code="path.is_folder")
    if expected == FOLDER and not stat.S_ISDIR(mode):
        return PathProblem("this is a file, not a folder", "Write the path of a folder.", code="path.is_file")
    needed = os.R_OK | os.X_OK if stat.S_ISDIR(mode) else os.R_OK
    if not is_output and not os.access(path, needed):
        return _explain_permission(path)
    return None


def check(where: str, path: Path, expected: str, *, is_output: bool = False) -> None:
    """Refuse a path of the command line that cannot be used.

    Args:
        where: The argument for the message: `--output`; "" = the path itself.
        path: The path; it need not exist.
        expected: `FILE`, `FOLDER` or `FILE_OR_FOLDER`.
        is_output: Whether the path is written; then it need not be readable.

    Raises:
        RecipeError: The path cannot be used.

    """
    if found := find_problem(path, expected, is_output=is_output):
        shown = shorten(str(path))
        problem = f"{shown}: {found.problem}" if where else found.problem
        raise RecipeError(Fault(where or shown, problem, found.fix, code=found.code))


def shorten(path: str) -> str:
    """Return a path of a length that a message can show: its beginning and its end, without secrets."""
    path = redaction.redact_shapes(path)  # before it is cut: a part of a secret is not recognised
    return path if len(path) <= _MAX_SHOWN else f"{path[:_SHOWN_PART]}...{path[-_SHOWN_PART:]}"


def _find_unseen_character(path: Path) -> PathProblem | None:
    """Return the problem of a new path with a control character or a mark of format; None if it has none."""
    new = [part.name for part in (path, *path.parents) if not part.exists()]
    for letter in "".join(new):
        if unicodedata.category(letter) in ("Cc", "Cf") and letter not in _JOINERS:
            problem = f"the path has the character U+{ord(letter):04X}, which is not seen"
            return PathProblem(problem, "Remove this character.", code="path.invalid_character")
    return None


def _explain_length(name: int, path: int) -> PathProblem:
    """Return the problem of a path that no file system takes; the lengths are in bytes."""
    problem = f"the path has {path:,} bytes, and a path has fewer than {_MAX_PATH:,}"
    if name > _MAX_NAME:
        problem = f"a name in the path has {name:,} bytes, and a name has at most {_MAX_NAME}"
    return PathProblem(problem, "Write a shorter path.", code="path.too_long")


def _explain_error(path: Path, error: OSError, expected: str, *, is_output: bool) -> PathProblem | None:
    """Return the problem of a path that the system cannot look up; None if nothing is there."""
    match error.errno:
        case errno.ENOENT if path.is_symlink() and not is_output:
            problem = f"this is a link to {shorten(str(path.readlink()))}, which does not exist"
            return PathProblem(problem, "Correct the link, or write another path.", code="path.broken_link")
        case errno.ENOENT if is_output:
            return _find_unseen_character(path)
        case errno.ENOENT:
            return None
        case errno.ENAMETOOLONG:
            problem = "the file system of this folder takes no name of this length"
            return PathProblem(problem, "Write a shorter path.", code="path.too_long")
        case errno.ELOOP:
            problem = "the path leads in a circle of links"
            return PathProblem(problem, "Correct the links, or write another path.", code="path.link_loop")
        case errno.ENOTDIR:
            file = next((parent for parent in path.parents if parent.exists()), path.parent)
            problem = f"{shorten(str(file))} is a file, so nothing can be in it"
            fix = f"Name {expected} that can be written." if is_output else "Correct the path."
            return PathProblem(problem, fix, code="path.is_file")
        case errno.EACCES | errno.EPERM if not is_output:
            return _explain_permission(path)
        case errno.EACCES | errno.EPERM:  # the check of the folder says so, and what to do
            return None
    problem = f"the path cannot be looked up: {(error.strerror or first_line(error)).lower()}"
    return PathProblem(problem, "Write another path.", code="path.unreadable")


def _explain_permission(path: Path) -> PathProblem:
    """Return the problem of a path that this user may not read."""
    fix = f"Give your user the right to read it: `chmod -R u+rX {shorten(str(path))}`. Or write another path."
    return PathProblem("this user may not read it", fix, code="path.unreadable")
