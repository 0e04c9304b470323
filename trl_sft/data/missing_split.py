"""The fault of a split that a source does not have.

Inputs: the source, and the `SplitError` of its files. Outputs: the fault, with the change of the recipe where the
source has one split only. Not here: which files belong to a split (`hub_files`).
"""

from __future__ import annotations

from trl_sft.data.file_diagnosis import diagnose
from trl_sft.data.hub_files import SplitError
from trl_sft.errors import Edit, Fault
from trl_sft.recipe.checked import Source
from trl_sft.recipe.yaml_reader import Recipe


def explain(recipe: Recipe, source: Source, error: Exception) -> Fault:
    """Return the fault, at the place of the source."""
    assert isinstance(error, SplitError)
    problem, where = f"{source.name}: {error}", recipe.where(source.key)
    if len(error.splits) != 1:
        return Fault(where, problem, "Set `split` to one of these.", code="data.unreadable_source")
    only, written = error.splits[0], source.load_kwargs.get("split")
    if written is not None and written != error.name:  # a part of a split, or several
        fix = f"Write {only} in place of {error.name} in `split`."
        return Fault(where, problem, fix, code="data.unreadable_source")
    if written is not None and only == "train":
        problem += ", since files that name no split are the split train"
        edits: tuple[Edit, ...] = (Edit("remove", (*source.key, "split")),)
        fix = "Remove `split`. To hold rows out, set `data.eval_fraction: 0.05`."
        return Fault(where, problem, fix, code="data.unreadable_source", edits=edits)
    fix = f"Set `split: {only}` in the source, if these rows are meant."
    edits = diagnose.make_edits(recipe, source, {"split": only})
    return Fault(where, problem, fix, code="data.unreadable_source", edits=edits)
