"""The key `evaluate.prompts`: a list of prompts, or the path of a file with one prompt on each line.

Inputs: the checked section `evaluate:`. Outputs: the path made absolute; a fault for a file that is not there, and for
items that are no prompts. Not here: what stands in a file, and the turns of a chat (`data.prompts` reads them).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trl_sft import user_paths
from trl_sft.errors import Edit, Fault
from trl_sft.recipe import paths
from trl_sft.recipe.yaml_reader import Key, Recipe, describe_value, format_value

SUFFIXES = (".txt", ".jsonl")
_KEY: Key = ("evaluate", "prompts")


def check(recipe: Recipe, evaluate: dict[str, Any]) -> Iterator[Fault]:
    """Yield the faults of `evaluate.prompts`; make its path absolute, and take out a value that has faults.

    Args:
        recipe: The recipe, for the places of the faults.
        evaluate: The checked section `evaluate:`.

    """
    value = evaluate.get("prompts")
    if value is None:
        return
    faults = _check_list(recipe, value) if isinstance(value, list) else _check_file(recipe, value, evaluate)
    if faults:
        evaluate.pop("prompts")
    yield from faults


def _check_list(recipe: Recipe, items: list[Any]) -> list[Fault]:
    """Return a fault for each item that is neither a text nor a mapping."""
    if not items:
        return [recipe.fault(_KEY, "the list has no prompts", "Write a prompt, or remove it.", code="data.no_rows")]
    faults = []
    for number, item in enumerate(items):
        key: Key = (*_KEY, number)
        if isinstance(item, str) and not item.strip():
            fix = "Write text there, or remove it."
            faults.append(recipe.fault(key, "the prompt is empty", fix, code="data.empty_value"))
        elif not isinstance(item, str | dict):
            fix = "Write a text, {prompt: TEXT} or {messages: [...]}."
            faults.append(recipe.fault(key, f"the prompt is {describe_value(item)}", fix, code="data.wrong_type"))
    return faults


def _check_file(recipe: Recipe, value: str, evaluate: dict[str, Any]) -> list[Fault]:
    """Return the fault of a path that cannot be used; make one that can be used absolute."""
    path = paths.make_absolute(value, recipe.folder(_KEY))
    shown = user_paths.shorten(value)
    if value and (found := user_paths.find_problem(path, user_paths.FILE)):
        return [recipe.fault(_KEY, f"{shown}: {found.problem}", found.fix, code=found.code)]
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        evaluate["prompts"] = str(path.resolve())
        return []
    if path.is_file():
        fix = "Use a file that ends in .txt (one prompt on each line) or .jsonl (`prompt` or `messages`)."
        problem = f"{shown}: prompts cannot be read from a file of this type"
        return [recipe.fault(_KEY, problem, fix, code="data.unknown_file_type")]
    if any(character.isspace() for character in value.strip()) and not value.lower().endswith(SUFFIXES):
        fix, edits = f"Write a list: {format_value([value])}.", (Edit("set", _KEY, [value]),)
        return [recipe.fault(_KEY, f"{shown}: there is no such file", fix, code="recipe.missing_file", edits=edits)]
    location = paths.resolve_location(value, recipe.folder(_KEY), SUFFIXES)
    fix = (
        location.fix if isinstance(location, paths.LocationProblem) else "Name a .txt or .jsonl file, or write a list."
    )
    return [recipe.fault(_KEY, f"{shown}: there is no such file", fix, code="recipe.missing_file")]
