"""Which file, folder, embedded thing, hub id, chat template or function a value of a recipe names.

In: the value as written and the folder it is relative to. Out: a `Place`. Nothing is loaded and no
hub is asked.
"""

from __future__ import annotations

import functools
import glob
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

from trl_sft.suggestions import LOOSE, nearest_name

EMBEDDED = Path(__file__).parents[1] / "embedded"
TEMPLATES = Path(__file__).parents[1] / "templates"
PREFIX = "trl_sft:"
ADAPTER_CONFIG = "adapter_config.json"  # the file by which peft and we recognise an adapter's folder
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_GLOB = re.compile(r"[*?\[]")


class Location(NamedTuple):
    """What a value names: files or a folder on this machine, or an id on a hub."""

    files: tuple[Path, ...]  # empty: a hub id
    name: str  # the absolute path, or the hub id


class LocationProblem(NamedTuple):
    """A value that names nothing, and what to write instead."""

    problem: str
    fix: str


class FunctionLocation(NamedTuple):
    """A function of the user's."""

    file: Path
    root: Path  # the folder that `module` is imported from
    module: str
    name: str
    as_module: bool = False  # imported by name, as a part of a package is; else by its file


@functools.cache
def list_templates() -> dict[str, Path]:
    """Return the chat templates that have a name: ours, and those that the installed TRL has for training.

    TRL's are found without importing it; the variant with {% generation %} markers is the one taken.
    """
    spec = importlib.util.find_spec("trl")
    folder = (
        Path(spec.submodule_search_locations[0], "chat_templates") if spec and spec.submodule_search_locations else None
    )
    theirs = sorted(folder.glob("*_training.jinja")) if folder else []
    ours = sorted(TEMPLATES.glob("*.jinja"))
    return {path.stem.removesuffix("_training"): path for path in theirs} | {path.stem: path for path in ours}


def resolve_template(value: str, folder: Path) -> Location | LocationProblem:
    """Return the chat template that `value` names: a file, a named one, or a tokenizer's (folder or hub id)."""
    place = resolve_location(value, folder, (".jinja", ".j2"))
    if isinstance(place, Location) and place.files:
        path = place.files[0]
        if path.is_dir() or path.suffix in (".jinja", ".j2"):
            return place
        return LocationProblem("a file that is no .jinja", "a .jinja file, a tokenizer's folder or id, or a name")
    if value in list_templates():
        return Location((list_templates()[value],), value)
    if isinstance(place, LocationProblem) or "/" in value:
        return place
    names = nearest_name(value, list_templates(), cutoff=LOOSE) or ", ".join(list_templates())
    return LocationProblem(
        "no chat template of that name", f"{names}; a .jinja file; or a tokenizer as FOLDER or OWNER/NAME"
    )


def resolve_function(value: str, folder: Path) -> FunctionLocation | LocationProblem:
    """Return the function that FILE.py:NAME or PACKAGE.MODULE:NAME names; nothing is imported."""
    where, _, name = value.rpartition(":")
    if not name.isidentifier() or not where:
        return LocationProblem("no FILE.py:FUNCTION or MODULE:FUNCTION", "both parts, as in rows.py:chat")
    if where.endswith(".py"):
        file = make_absolute(where, folder)
        found = FunctionLocation(file.resolve(), file.resolve().parent, file.stem, name)
        # as written: a link beside the recipe is the user's own
        inside = os.path.isabs(where) or where.startswith("~") or Path(os.path.normpath(file)).is_relative_to(folder)  # noqa: PTH117
        if file.is_file() and not inside:
            return LocationProblem(
                f"a file outside {folder}, whose code would run", f"it beside the recipe, or {file.resolve()}"
            )
        return found if file.is_file() else LocationProblem("no such file", _near(file))
    parts = where.split(".")
    for root in dict.fromkeys([folder, Path.cwd(), *map(Path, sys.path)]):
        for file in (root.joinpath(*parts).with_suffix(".py"), root.joinpath(*parts, "__init__.py")):
            if file.is_file():
                package = len(parts) > 1 or file.name == "__init__.py"
                return FunctionLocation(file.resolve(), root.resolve(), where, name, as_module=package)
    return LocationProblem(
        f"no module {where} beside the recipe, in the current folder or installed", "FILE.py:FUNCTION"
    )


def resolve_location(value: str, folder: Path, suffixes: tuple[str, ...] = ()) -> Location | LocationProblem:
    """Return what `value` names: an existing path is a path, ./ ../ ~ force one, else it is a hub id.

    `suffixes` are endings that make a value a path even where no such file stands.
    """
    if value.startswith(PREFIX):
        name = value.removeprefix(PREFIX)
        known = sorted(path.name for path in EMBEDDED.iterdir() if path.is_dir() and path.name != "__pycache__")
        if name in known:
            return Location((EMBEDDED / name,), str(EMBEDDED / name))
        return LocationProblem(f"the package embeds no {name!r}", " or ".join(PREFIX + word for word in known))
    path = make_absolute(value, folder)
    if value and os.path.exists(path):  # noqa: PTH110 (pathlib raises on a name too long)
        return Location((path.resolve(),), str(path.resolve()))
    if _GLOB.search(value):
        names = glob.glob(str(path), recursive=True)  # noqa: PTH207 (pathlib takes no absolute pattern)
        files = tuple(sorted(Path(name).resolve() for name in names if Path(name).is_file()))
        return (
            Location(files, str(path))
            if files
            else LocationProblem("no file matches", f"a pattern that matches in {folder}")
        )
    forced = value.startswith(("./", "../", "~", "/")) or value.endswith(suffixes or ("/",))
    if not forced and _HUB_ID.match(value):
        return Location((), value)
    return LocationProblem("no such file or folder" + (f" in {folder}" if forced else ""), _near(path))


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds an adapter that peft saved."""
    return (folder / ADAPTER_CONFIG).is_file()


def make_absolute(value: str, folder: Path) -> Path:
    """Return a path as written, relative to `folder`, with ~ for the home folder; it need not exist."""
    return folder / os.path.expanduser(value)  # noqa: PTH111 (pathlib raises on an unknown user)


def relative_to_file(file: Path, value: str) -> str:
    """Return a path relative to the current folder as `file` would name it; what is no path here as it is."""
    path = Path(value).expanduser()
    if not path.exists() or path.is_absolute():
        return value
    try:
        return str(path.absolute().relative_to(file.absolute().parent))
    except ValueError:
        return str(path.absolute())


def _near(path: Path) -> str:
    names = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
    names = [name for name in names if not name.startswith(".")]
    near = nearest_name(path.name, names, cutoff=LOOSE, limit=3) or ", ".join(names[:5])
    if not path.parent.is_dir():
        return f"a path that exists; {path.parent} does not"
    return f"one that exists; nearest there: {near}" if near else f"one that exists; {path.parent} is empty"
