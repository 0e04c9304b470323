"""Finds what a value of a recipe names: a file, a folder, an embedded model, a hub id, a chat template, a function.

Inputs: the value as written, and the folder that it is relative to.
Outputs: a `Location` or a `FunctionLocation`; or a `LocationProblem` with the instruction that solves it.
Not here: loading anything, and asking the hub.
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

from trl_sft import run_folder, user_paths
from trl_sft.recipe import foreign_letters
from trl_sft.suggestions import LOOSE, STRICT, is_misspelling, nearest_name

EMBEDDED = Path(__file__).parents[1] / "embedded"
TEMPLATES = Path(__file__).parents[1] / "templates"
PREFIX = "trl_sft:"  # of the names of embedded models and data
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_MAX_HUB_NAME = 96  # characters: huggingface_hub.utils.validate_repo_id
_MAX_MODULE_NAME = 255
_GLOB = re.compile(r"[*?\[]")
_TEMPLATE_SUFFIXES = (".jinja", ".j2")


class Location(NamedTuple):
    """What a value names: files or a folder on this machine, or an id on the hub."""

    files: tuple[Path, ...]  # empty = a hub id
    name: str  # the absolute path, or the hub id


class LocationProblem(NamedTuple):
    """Why a value names nothing, and the instruction that solves it."""

    problem: str
    fix: str
    code: str
    meant: str = ""  # the value that was surely meant, of which the value is a misspelling


class FunctionLocation(NamedTuple):
    """A Python function of the user."""

    file: Path
    root: Path  # the folder that `module` is imported from
    module: str
    name: str
    as_module: bool = False  # whether it is imported by the name of its module, as part of a package; else by its file


@functools.cache
def list_templates() -> dict[str, Path]:
    """Return the chat templates that have a name: ours, and those of the installed TRL for training.

    TRL is not imported for this. Of its variants of a template, the training variant is listed: that one has
    {% generation %} markers.
    """
    templates: dict[str, Path] = {}
    spec = importlib.util.find_spec("trl")
    if spec and spec.submodule_search_locations:
        folder = Path(spec.submodule_search_locations[0], "chat_templates")
        for path in sorted(folder.glob("*_training.jinja")):
            templates[path.stem.removesuffix("_training")] = path
    for path in sorted(TEMPLATES.glob("*.jinja")):
        templates[path.stem] = path
    return templates


def resolve_template(value: str, folder: Path) -> Location | LocationProblem:
    """Return the location of a chat template.

    Args:
        value: A .jinja file, the name of a template, or the folder or hub id of a tokenizer.
        folder: The folder that a path is relative to.

    Returns:
        The location; a folder or a hub id is that of a tokenizer.

    """
    location = resolve_location(value, folder, _TEMPLATE_SUFFIXES)
    if isinstance(location, Location) and location.files:
        path = location.files[0]
        if path.is_dir() or path.suffix in _TEMPLATE_SUFFIXES:
            return location
        fix = "Name a .jinja file, a template by its name, or a tokenizer by its folder or hub id."
        return LocationProblem("this file is not a .jinja file", fix, code="template.wrong_file")
    templates = list_templates()
    if value in templates:
        return Location((templates[value],), value)
    if isinstance(location, LocationProblem) or "/" in value:
        return location
    nearest = nearest_name(value, templates, cutoff=LOOSE)
    names = f"Did you mean `{nearest}`?" if nearest else f"Use one of {', '.join(templates)}."
    fix = f"{names} You can also name a .jinja file, or a tokenizer as FOLDER or OWNER/NAME."
    meant = nearest if is_misspelling(value, nearest, templates) else ""
    return LocationProblem("there is no chat template of this name", fix, code="template.unknown_name", meant=meant)


def resolve_function(value: str, folder: Path) -> FunctionLocation | LocationProblem:
    """Return the location of the function that `FILE.py:NAME` or `PACKAGE.MODULE:NAME` names, without importing it."""
    source, _, name = value.rpartition(":")
    if not name.isidentifier() or not source:
        return LocationProblem(
            "this is not FILE.py:FUNCTION", "Write both parts, for example rows.py:chat.", code="data.missing_function"
        )
    if source.endswith(".py"):
        return _function_of_file(source, name, folder)
    parts = source.split(".")
    if not all(map(str.isidentifier, parts)) or len(source) > _MAX_MODULE_NAME:
        problem, fix = "this is no name of a module", "Write FILE.py:FUNCTION, for example rows.py:chat."
        return LocationProblem(problem, fix, code="data.missing_function")
    for root in dict.fromkeys([folder, Path.cwd(), *map(Path, sys.path)]):
        for file in (root.joinpath(*parts).with_suffix(".py"), root.joinpath(*parts, "__init__.py")):
            if file.is_file():
                is_package = len(parts) > 1 or file.name == "__init__.py"
                return FunctionLocation(file.resolve(), root.resolve(), source, name, as_module=is_package)
    problem = f"there is no module {source} beside the recipe, in the current folder or among the installed packages"
    return LocationProblem(
        problem, "Correct the name of the module, or write FILE.py:FUNCTION.", code="data.missing_function"
    )


def _function_of_file(source: str, name: str, folder: Path) -> FunctionLocation | LocationProblem:
    """Return the location of a function of a file; a relative path must not leave the folder of the recipe."""
    file = make_absolute(source, folder)
    if found := user_paths.find_problem(file, user_paths.FILE):
        return LocationProblem(found.problem, found.fix, code=found.code)
    if not file.is_file():
        return LocationProblem("there is no such file", _suggest_path(file), code="recipe.missing_file")
    is_absolute = os.path.isabs(source) or source.startswith("~")  # noqa: PTH117 (as written)
    # The path as written decides: a link beside the recipe is the user's own.
    is_inside = Path(os.path.normpath(file)).is_relative_to(folder)
    if not is_absolute and not is_inside:
        fix = f"Move the file beside the recipe, or write {file.resolve()}."
        return LocationProblem(
            f"this file is outside {folder}, and its code would run", fix, code="data.function_outside"
        )
    return FunctionLocation(file.resolve(), file.resolve().parent, file.stem, name)


def resolve_location(
    value: str, folder: Path, suffixes: tuple[str, ...] = (), *, suggests: bool = True
) -> Location | LocationProblem:
    """Return what a value names.

    A path that exists is a path. `./`, `../`, `~`, `/` and the suffixes make a value a path. Everything else is an id
    on the hub.

    Args:
        value: A path, a pattern, an embedded name (`trl_sft:tiny`) or a hub id.
        folder: The folder that a path is relative to.
        suffixes: Endings that only a path has: `.jsonl`.
        suggests: Whether a similar name is searched where the path does not exist; in a large folder this takes time.

    Returns:
        The location, with absolute paths.

    """
    if value.startswith(PREFIX):
        return _resolve_embedded(value)
    path = make_absolute(value, folder)
    if found := user_paths.find_problem(path, user_paths.FILE_OR_FOLDER):
        return LocationProblem(found.problem, found.fix, code=found.code)
    if value and os.path.exists(path):  # noqa: PTH110 (pathlib raises on a name that is too long)
        return Location((path.resolve(),), str(path.resolve()))
    if _GLOB.search(value):
        names = glob.glob(str(path), recursive=True)  # noqa: PTH207 (pathlib takes no absolute pattern)
        files = tuple(sorted(Path(name).resolve() for name in names if Path(name).is_file()))
        if files:
            return Location(files, str(path))
        return LocationProblem(
            "no file matches this pattern",
            f"Correct the pattern. It is relative to {folder}.",
            code="recipe.missing_file",
        )
    is_path = value.startswith(("./", "../", "~", "/")) or value.endswith(suffixes or ("/",))
    if not is_path and _HUB_ID.match(value) and max(map(len, value.split("/"))) <= _MAX_HUB_NAME:
        return Location((), value)
    problem = f"there is no such file or folder in {folder}" if is_path else "there is no such file or folder"
    problem += foreign_letters.describe(value)
    if not suggests:
        return LocationProblem(problem, "Correct the path.", code="recipe.missing_file")
    return LocationProblem(problem, _suggest_path(path), code="recipe.missing_file", meant=_find_meant(value, path))


def _find_meant(value: str, path: Path) -> str:
    """Return a path whose last part is misspelt with the only name that it can mean; "" if there is none."""
    if not path.parent.is_dir() or not path.name:
        return ""
    names = [file.name for file in path.parent.iterdir()]
    nearest = nearest_name(path.name, names, cutoff=STRICT)
    return value.removesuffix(path.name) + nearest if is_misspelling(path.name, nearest, names) else ""


def _resolve_embedded(value: str) -> Location | LocationProblem:
    """Return the folder of an embedded model or data set, `trl_sft:NAME`."""
    name = value.removeprefix(PREFIX)
    names = sorted(path.name for path in EMBEDDED.iterdir() if path.is_dir() and path.name != "__pycache__")
    if name in names:
        return Location((EMBEDDED / name,), str(EMBEDDED / name))
    known = " or ".join(PREFIX + other for other in names)
    return LocationProblem(
        f"trl_sft has no embedded model or data set {name!r}", f"Use {known}.", code="recipe.unknown_embedded"
    )


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds an adapter that peft saved."""
    return (folder / run_folder.ADAPTER_CONFIG).is_file()


def make_absolute(value: str, folder: Path) -> Path:
    """Return a path relative to `folder`, with ~ for the home folder; it need not exist."""
    return folder / os.path.expanduser(value)  # noqa: PTH111 (pathlib raises on an unknown user)


def relative_to_file(file: Path, value: str) -> str:
    """Return a path relative to the current folder as a path relative to the folder of `file`.

    A value that is not an existing relative path is returned unchanged.
    """
    path = Path(os.path.expanduser(value))  # noqa: PTH111 (pathlib raises on an unknown user)
    if not os.path.exists(path) or path.is_absolute():  # noqa: PTH110 (pathlib raises on a name that is too long)
        return value
    try:
        return str(path.absolute().relative_to(file.absolute().parent))
    except ValueError:
        return str(path.absolute())


def _suggest_path(path: Path) -> str:
    """Return the instruction for a path that does not exist."""
    if not path.parent.is_dir():
        return f"Correct the path: the folder {path.parent} does not exist."
    names = sorted(file.name for file in path.parent.iterdir() if not file.name.startswith("."))
    if not names:
        return f"Correct the path: the folder {path.parent} is empty."
    nearest = nearest_name(path.name, names, cutoff=LOOSE, limit=3)
    if nearest:
        return "Did you mean " + " or ".join(f"`{name}`" for name in nearest.split(" or ")) + "?"
    return f"Correct the path. The folder has {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}."
