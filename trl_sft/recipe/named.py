"""What a recipe names: its model, a chat template, the user's functions, each found or a fault.

In: a value of a recipe. Out: a place or a function, or a line in `faults`. Nothing is loaded.
"""

from __future__ import annotations

from trl_sft.errors import Fault
from trl_sft.recipe import paths, sections
from trl_sft.recipe.yaml_reader import Key, Recipe
from trl_sft.suggestions import LOOSE, nearest_name


def base(recipe: Recipe, value: str | None, faults: list[Fault]) -> paths.Location | None:
    """Return the model's place; a folder has to hold a model or an adapter."""
    key: Key = ("model", "name_or_path")
    if value is None:
        if "name_or_path" not in (recipe.values.get("model") or {}):
            faults.append(Fault(recipe.where(key), "no model is named", "a folder, a hub id, or trl_sft:tiny"))
        return None
    place = paths.resolve_location(value, recipe.folder(key))
    if isinstance(place, paths.LocationProblem):
        faults.append(Fault(recipe.where(key), f"{value}: {place.problem}", place.fix))
        return None
    if place.files and not any((place.files[0] / name).is_file() for name in ("config.json", paths.ADAPTER_CONFIG)):
        found = "a folder without config.json" if place.files[0].is_dir() else "a file"
        faults.append(Fault(recipe.where(key), f"{value}: {found}", "a folder that save_pretrained wrote"))
    if place.files and paths.is_adapter(place.files[0]) and recipe.values.get("lora") is not None:
        found = f"{value} is an adapter: training goes on with it, so `lora:` would be a second one"
        faults.append(Fault(recipe.where(("lora",)), found, "no `lora:`, or the base model of the adapter"))
    return place


def template(recipe: Recipe, value: str | None, faults: list[Fault]) -> paths.Location | None:
    """Return the place of a chat template; None = the tokenizer's own."""
    if value is None:
        return None
    key: Key = ("tokenizer", "chat_template")
    place = paths.resolve_template(value, recipe.folder(key))
    if isinstance(place, paths.LocationProblem):
        faults.append(Fault(recipe.where(key), f"{value}: {place.problem}", place.fix))
        return None
    return place


def function(recipe: Recipe, key: Key, value: str, faults: list[Fault]) -> paths.FunctionLocation | None:
    """Return the user's function that a format names; None where it is a layout."""
    if value in sections.FORMATS or not value:
        return None
    found = paths.resolve_function(value, recipe.folder(key)) if ":" in value else None
    if isinstance(found, paths.FunctionLocation):
        return found
    near = nearest_name(value, sections.FORMATS, cutoff=LOOSE)
    known = near or f"one of {', '.join(sections.FORMATS)}, or your function as FILE.py:FUNCTION"
    fault = Fault(recipe.where(key), f"{value}: {found.problem}", found.fix) if found else None
    faults.append(fault or Fault(recipe.where(key), f"no format {value}", known))
    return None
