"""Names of repositories on the hub: which can be one, and the nearest that can.

Inputs: a name as a user wrote it: a URL, a path, an id with letters that the hub does not take. Outputs: a fault with
what to write. Not here: whether the repository exists, and who may write there (`publishing.repository`).
"""

from __future__ import annotations

import re
from pathlib import Path

from trl_sft.errors import Edit, Fault
from trl_sft.recipe.yaml_reader import Key

_URL = re.compile(
    r"(?:(?:https?|ssh|hf)://|git@|(?=[\w.-]+\.[a-z]{2,}/))(?:(?:[\w.-]+\.[a-z]{2,}|localhost|[\d.]+)(?::\d+)?[/:])?(?P<path>.+)",
    re.ASCII,
)
_PATH = re.compile(r"[.~/\\]|[A-Za-z]:[/\\]")  # how a path begins that is no id
_NAME = re.compile(
    r"(?:[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?/)?(?=.{1,96}$)[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?", re.ASCII
)
_MAX_NAME = 96  # characters of NAME
_NO_NAME = re.compile(r"[^A-Za-z0-9._-]+")
_KINDS = ("models", "datasets", "spaces")  # of repositories, in addresses


def check(where: str, name: str, *, key: Key = ()) -> Fault | None:
    """Return the fault of a name that cannot be that of a repository: `OWNER/NAME`, or `NAME` for the token's owner.

    Args:
        where: The key or option that names it.
        name: As the user wrote it.
        key: Of the recipe, for an edit; () = none.

    Returns:
        The fault, with the nearest name that can; None = the name can.

    """
    if _is_name(name):
        return None
    problem = f"{name!r} is no name of a repository on the hub: OWNER/NAME, with letters, digits, `-`, `_` and `.`"
    return _build_fault(where, problem, name, key=key, setting="Write `{}`.")


def check_folder(where: str, folder: str, *, key: Key) -> Fault | None:
    """Return the fault of the name of a run folder, which a repository has where the recipe names none.

    Args:
        where: The key that names the folder.
        folder: Its path.
        key: The key that names a repository.

    """
    name = Path(folder).name
    if _is_name(name):
        return None
    problem = f"the repository has the name of the run folder, and {name!r} is none that the hub takes"
    return _build_fault(where, problem, name, key=key, setting=f"Set `{'.'.join(map(str, key))}: {{}}`.")


def _is_name(name: str) -> bool:
    """Tell whether a name can be that of a repository, by the rule of huggingface_hub.utils.validate_repo_id."""
    if not _NAME.fullmatch(name) or "--" in name or ".." in name or name.endswith(".git"):
        return False
    return not ("/" in name and name.partition("/")[0] in _KINDS)


def _build_fault(where: str, problem: str, name: str, *, key: Key, setting: str) -> Fault:
    """Return the fault of a name, with the nearest one that is possible."""
    nearest = suggest(name)
    fix = setting.format(nearest) if nearest else "Write OWNER/NAME, for example `me/my-model`."
    edits = (Edit("set", key, nearest),) if key and nearest else ()
    return Fault(where, problem, fix, code="hub.bad_repository_name", edits=edits)


def suggest(name: str) -> str:
    """Return the nearest name that can be that of a repository; "" = there is none."""
    name = name.strip()
    match = _URL.fullmatch(name)
    parts = [part for part in re.split(r"[/\\]+", match["path"] if match else name) if part not in ("", ".", "..", "~")]
    if parts and parts[0] in _KINDS:
        parts = parts[1:]
    parts = parts[:2] if match else parts[-1 if _PATH.match(name) else -2 :]
    parts = [_clean_name(part) for part in parts]
    words = "/".join(parts).removesuffix(".git") if all(parts) else ""
    nearest = words[:_MAX_NAME].strip("-./")
    return nearest if _is_name(nearest) else ""


def _clean_name(part: str) -> str:
    """Return one part of a name with the letters that the hub takes."""
    part = re.sub(r"-{2,}", "-", _NO_NAME.sub("-", part))
    return re.sub(r"\.{2,}", ".", part).strip("-.")
