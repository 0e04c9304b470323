"""Checks of the keys that need checkpoints: `load_best_model_at_end` and `run.mirror`.

Inputs: a recipe whose keys are known and well typed. Outputs: faults. Not here: whether the mirror can be written to
(`mirroring.storage`).
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trl_sft import redaction
from trl_sft.errors import Edit, Fault
from trl_sft.recipe.yaml_reader import Key, Recipe
from trl_sft.suggestions import LOOSE, nearest_name

MIRROR: Key = ("run", "mirror")
_USUAL = ("s3", "hf", "file", "gs", "az", "abfs", "sftp", "memory")  # which a misspelt scheme may mean
_READ_ONLY = ("http", "https", "github", "gist", "git", "data", "zip", "tar", "libarchive", "reference", "wandb")
_WRITE = "Write s3://BUCKET/PATH, hf://OWNER/NAME/PATH or file:///PATH."


def check(recipe: Recipe, values: Mapping[str, Mapping[str, Any]]) -> Iterator[Fault]:
    """Yield the faults of keys that need checkpoints.

    Args:
        recipe: The recipe, for the places of the faults.
        values: The checked keys of each section.

    """
    train, mirror = values["train"], values["run"].get("mirror")
    if train.get("load_best_model_at_end") and train.get("save_strategy") == "no":
        problem = "`load_best_model_at_end` needs checkpoints, but `save_strategy` is no"
        fix = "Set `save_strategy` to steps or epoch."
        yield recipe.fault(("train", "load_best_model_at_end"), problem, fix, code="recipe.needs_key")
    if mirror is None:
        return
    if train.get("save_strategy") == "no":
        problem = "`mirror` copies checkpoints, but `train.save_strategy` is no"
        yield recipe.fault(MIRROR, problem, "Set `train.save_strategy` to steps or epoch.", code="recipe.needs_key")
    if train.get("save_only_model"):
        problem = (
            "a run goes on from its mirror with the state of the optimizer, which `train.save_only_model` leaves out"
        )
        yield recipe.fault(MIRROR, problem, "Remove one of the two.", code="recipe.contradiction")
    yield from _check_url(recipe, mirror, train)


def _check_url(recipe: Recipe, url: str, train: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield what no storage can be opened with."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        path = Path(url).expanduser()
        is_path = bool(url.strip()) and (path.is_absolute() or url.startswith("."))
        target = path.absolute().as_uri() if is_path else ""
        edits = (Edit("set", MIRROR, target),) if is_path else ()
        fix = f"Write `{target}`." if is_path else _WRITE
        yield recipe.fault(MIRROR, f"{url!r} has no scheme, such as s3://", fix, code="mirror.scheme", edits=edits)
        return
    if not rest.strip("/"):
        yield recipe.fault(MIRROR, f"{url!r} names no place", _WRITE, code="mirror.scheme")
        return
    from fsspec.registry import known_implementations

    if scheme in _READ_ONLY:
        problem = f"`{scheme}://` can be read, and a mirror is written"
        yield recipe.fault(MIRROR, problem, _WRITE, code="mirror.scheme")
    elif scheme not in known_implementations:
        nearest = nearest_name(scheme, _USUAL, cutoff=LOOSE)
        fix = f"Did you mean `{nearest}://{rest}`?" if nearest else _WRITE
        edits = (Edit("set", MIRROR, f"{nearest}://{rest}"),) if nearest else ()
        yield recipe.fault(MIRROR, f"no file system has the scheme `{scheme}`", fix, code="mirror.scheme", edits=edits)
    elif scheme in ("file", "local"):
        yield from _check_folder(recipe, url, train)
    authority, slash, name = rest.partition("/")
    has_user = urllib.parse.urlsplit(url).password or (scheme.startswith("s3") and "@" in authority)
    place = (
        f"{scheme}://{authority.rpartition('@')[2]}{slash}{name}"  # a user alone is no secret: abfs://CONTAINER@ACCOUNT
    )
    if has_user or redaction.redact_shapes(place) != place:
        problem = "the address holds a password or a key, which would stand in the records of the run"
        fix = "Remove it, and set the environment variables of the service: AWS_ACCESS_KEY_ID, HF_TOKEN and the like."
        yield recipe.fault(MIRROR, problem, fix, code="mirror.secret")


def _check_folder(recipe: Recipe, url: str, train: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield the fault of a mirror that lies in the run folder itself."""
    folder = Path(url.partition("://")[2]).absolute()  # as fsspec reads it
    output = train.get("output_dir")
    if isinstance(output, str) and folder.is_relative_to(Path(output).expanduser().absolute()):
        problem = f"{folder} lies in the run folder, and is lost with it"
        yield recipe.fault(MIRROR, problem, "Name a folder on another disk or machine.", code="mirror.inside_run")
