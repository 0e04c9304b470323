"""The git commit of a folder, read from the files of its repository.

Input: a folder. Output: a commit, or None. `git` itself is not started: it runs programs that the repository's own
configuration names (core.fsmonitor, filters), and a recipe may stand in a repository of somebody else. Therefore not
here: whether files differ from the commit, which only git can tell.
"""

from __future__ import annotations

import re
from pathlib import Path

_COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")  # SHA-1, or SHA-256
_LONGEST_FILE = 10_000_000  # bytes; packed-refs has a line for each branch and tag


def find_commit(folder: Path) -> str | None:
    """Return the commit that a folder's repository has checked out; None outside a repository or before a commit.

    The layout of a repository: https://git-scm.com/docs/gitrepository-layout (HEAD, refs, packed-refs, commondir).
    """
    try:
        return _read_commit(folder.resolve())
    except (OSError, ValueError):  # no permission, links in a circle, bytes that are not UTF-8
        return None


def _read_commit(folder: Path) -> str | None:
    """Return the commit of the repository around a folder. Raises OSError, ValueError."""
    git_folder = _find_git_folder(folder)
    if git_folder is None:
        return None
    head = _read(git_folder / "HEAD")
    if not head.startswith("ref: "):
        return head if _COMMIT.fullmatch(head) else None
    name = head.removeprefix("ref: ")
    if not name.startswith("refs/") or ".." in name:
        return None
    common = git_folder
    if (git_folder / "commondir").is_file():  # of a linked worktree
        common = git_folder / _read(git_folder / "commondir")
    for place in (git_folder, common):
        if (place / name).is_file():
            commit = _read(place / name)
            return commit if _COMMIT.fullmatch(commit) else None
    if (common / "packed-refs").is_file():
        for line in _read(common / "packed-refs").splitlines():
            commit, _, packed_name = line.partition(" ")
            if packed_name == name and _COMMIT.fullmatch(commit):
                return commit
    return None


def _find_git_folder(folder: Path) -> Path | None:
    """Return the folder that has HEAD: .git, or the one that a file .git names. Raises OSError, ValueError."""
    for parent in (folder, *folder.parents):
        git = parent / ".git"
        if git.is_file():  # of a worktree or a submodule
            text = _read(git)
            return parent / text.removeprefix("gitdir: ") if text.startswith("gitdir: ") else None
        if (git / "HEAD").is_file():
            return git
    return None


def _read(path: Path) -> str:
    """Return the text of a small file. Raises OSError, ValueError."""
    if not path.is_file() or path.stat().st_size > _LONGEST_FILE:
        raise ValueError(f"{path} is no file, or is too long")
    return path.read_text(encoding="utf-8").strip()
