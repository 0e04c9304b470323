"""The source that a new recipe names: its path, and the keys without which its rows could not be read.

Inputs: a model and a source, as a recipe names them. Outputs: a `SourceDraft`. A key is set only where the diagnosis of
the file names exactly one value (the encoding of a CSV file, the renames of its columns); each stands in the recipe
with the reason. Deliberately not here: the text of the recipe (`recipe_writer`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_sft.data import pipeline
from trl_sft.errors import Edit, UserError
from trl_sft.recipe import build
from trl_sft.recipe.checked import Run
from trl_sft.recipe.yaml_reader import Key, Recipe

_SOURCE: Key = ("data", "train")
_MAX_EDITS = 6  # keys that are set for a source; more means that a fault does not go away


@dataclass
class SourceDraft:
    """The source of a new recipe."""

    path: str
    keys: dict[str, Any] = field(default_factory=dict)  # beside the path
    reasons: list[str] = field(default_factory=list)  # why each key is set

    @property
    def entry(self) -> dict[str, Any]:
        """The source as a recipe writes it."""
        return {"path": self.path, **self.keys}


def draft_source(output: Path, model: str, path: str) -> tuple[SourceDraft, Run, tuple[str, list[str], int]]:
    """Return the source, the checked run with it, and format, columns and number of its rows.

    Args:
        output: the recipe to write; paths are relative to the current folder all the same.
        model: a folder, a hub id, or `trl_sft:tiny`.
        path: a file of rows, a folder, or a hub id.

    Raises:
        UserError: the model or the rows cannot be read, and no key of the source would change that.

    """
    draft = SourceDraft(path)
    while True:
        recipe = _make_recipe(output, model, draft)
        try:
            run = build.build_run(recipe)
            return draft, run, pipeline.inspect_source(recipe, run.sources["train"][0])
        except UserError as error:
            edits = [edit for fault in error.faults for edit in fault.edits]
            if not all(fault.edits for fault in error.faults) or len(draft.reasons) + len(edits) > _MAX_EDITS:
                raise
            if not all(_apply(draft, edit) for edit in edits):
                raise
            draft.reasons += [fault.problem for fault in error.faults]


def _make_recipe(output: Path, model: str, draft: SourceDraft) -> Recipe:
    """Return a recipe of the model and the source alone; they are checked before anything is written."""
    places: dict[Key, str] = {("model", "name_or_path"): "MODEL", _SOURCE: "DATA"}
    values = {"model": {"name_or_path": model}, "data": {"train": draft.entry if draft.keys else draft.path}}
    return Recipe(output.absolute(), "", values, {(): "init", **places}, frozenset(places), ())


def _apply(draft: SourceDraft, edit: Edit) -> bool:
    """Set what an edit says of the source; return False if it is about something else, or changes nothing."""
    if edit.action != "set":
        return False
    if edit.key == _SOURCE and isinstance(edit.value, dict):
        keys = {name: value for name, value in edit.value.items() if name != "path"}
    elif edit.key[:-1] == _SOURCE:
        keys = {str(edit.key[-1]): edit.value}
    else:
        return False
    if all(draft.keys.get(name) == value for name, value in keys.items()):
        return False
    draft.keys |= keys
    return True
