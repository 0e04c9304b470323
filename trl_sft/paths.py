"""Which file, folder, embedded thing or hub id a value of a recipe names.

In: the value as written and the folder it is relative to. Out: a `Place`. Nothing is loaded and no
hub is asked.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
from pathlib import Path
from typing import NamedTuple

EMBEDDED = Path(__file__).parent / "embedded"
PREFIX = "trl_sft:"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_GLOB = re.compile(r"[*?\[]")


class Place(NamedTuple):
    """What a value names: files or a folder on this machine, or an id on a hub."""

    files: tuple[Path, ...]  # empty: a hub id
    name: str  # the absolute path, or the hub id


class Absent(NamedTuple):
    """A value that names nothing, and what to write instead."""

    found: str
    write: str


def resolve(value: str, folder: Path, suffixes: tuple[str, ...] = ()) -> Place | Absent:
    """Return what `value` names: an existing path is a path, ./ ../ ~ force one, else it is a hub id.

    `suffixes` are endings that make a value a path even where no such file stands.
    """
    if value.startswith(PREFIX):
        name = value.removeprefix(PREFIX)
        known = sorted(path.name for path in EMBEDDED.iterdir() if path.is_dir() and path.name != "__pycache__")
        if name in known:
            return Place((EMBEDDED / name,), str(EMBEDDED / name))
        return Absent(f"the package embeds no {name!r}", " or ".join(PREFIX + word for word in known))
    path = absolute(value, folder)
    if value and os.path.exists(path):  # noqa: PTH110 (pathlib raises on a name too long)
        return Place((path.resolve(),), str(path.resolve()))
    if _GLOB.search(value):
        names = glob.glob(str(path), recursive=True)  # noqa: PTH207 (pathlib takes no absolute pattern)
        files = tuple(sorted(Path(name).resolve() for name in names if Path(name).is_file()))
        return Place(files, str(path)) if files else Absent("no file matches", f"a pattern that matches in {folder}")
    forced = value.startswith(("./", "../", "~", "/")) or value.endswith(suffixes or ("/",))
    if not forced and _HUB_ID.match(value):
        return Place((), value)
    return Absent("no such file or folder" + (f" in {folder}" if forced else ""), _near(path))


def absolute(value: str, folder: Path) -> Path:
    """Return a path as written, relative to `folder`, with ~ for the home folder; it need not exist."""
    return folder / os.path.expanduser(value)  # noqa: PTH111 (pathlib raises on an unknown user)


def _near(path: Path) -> str:
    names = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    names = [name for name in names if not name.startswith(".")]
    near = difflib.get_close_matches(path.name, names, 3, 0.5) or names[:5]
    if not path.parent.is_dir():
        return f"a path that exists; {path.parent} does not"
    return f"one that exists; nearest there: {', '.join(near)}" if near else f"one that exists; {path.parent} is empty"
