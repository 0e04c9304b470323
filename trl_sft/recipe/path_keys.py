"""The keys whose value is the path of a folder or of a JSON file that an owner opens later.

Inputs: the checked keys of each section. Outputs: a fault for each path that cannot be used. Not here: the paths of
models, rows, templates and functions (`paths` resolves them), and whether a run may use its folder
(`folder_decision`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_sft import user_paths
from trl_sft.errors import Fault, first_line
from trl_sft.recipe import answer_checks, paths, prompts
from trl_sft.recipe.checked import Source
from trl_sft.recipe.upstream import nested, types
from trl_sft.recipe.yaml_reader import Key, Recipe

# Folders that upstream or the run creates; relative to the current folder, as for upstream.
_WRITTEN_FOLDERS: tuple[tuple[str, str], ...] = (
    ("train", "output_dir"),
    ("model", "cache_dir"),
    ("model", "offload_folder"),
    ("tokenizer", "cache_dir"),
    ("launch", "log_dir"),
)
_RESUME_WORDS = ("auto", "never")
_JSON_FILE = ("train", "accelerator_config")  # a mapping, or the path of a file that holds it
_MAX_JSON_BYTES = 2**20


def check(recipe: Recipe, values: Mapping[str, dict[str, Any]], sources: Sequence[Source]) -> Iterator[Fault]:
    """Yield a fault for each path that cannot be used; take it out of `values`.

    Args:
        recipe: The recipe, for the places of the faults.
        values: The checked keys of each section.
        sources: The sources of `data:`.

    """
    for section, name in _WRITTEN_FOLDERS:
        value = values[section].get(name)
        if isinstance(value, str):
            fault = _check_path(recipe, (section, name), value, folder=Path.cwd(), is_output=True)
            yield from _take_out(values[section], name, fault)
    for source in sources:
        value = source.load_kwargs.get("cache_dir")
        if isinstance(value, str):
            yield from _check_path(recipe, (*source.key, "cache_dir"), value, folder=Path.cwd(), is_output=True)
    resume = values["run"].get("resume")
    if isinstance(resume, str) and resume not in _RESUME_WORDS:
        key: Key = ("run", "resume")
        fault = _check_path(recipe, key, resume, folder=recipe.folder(key), is_output=False)
        yield from _take_out(values["run"], "resume", fault)
    if "prompts" in values["evaluate"]:
        yield from prompts.check(recipe, values["evaluate"])
    if "checks" in values["evaluate"]:
        yield from answer_checks.check(recipe, values["evaluate"])
    file = values[_JSON_FILE[0]].get(_JSON_FILE[1])
    if isinstance(file, str):
        yield from _take_out(values[_JSON_FILE[0]], _JSON_FILE[1], _check_json_file(recipe, file, values["train"]))


def _check_path(recipe: Recipe, key: Key, value: str, *, folder: Path, is_output: bool) -> list[Fault]:
    """Return the fault of the path of a folder; empty if it can be used."""
    if not value.strip():
        return [recipe.fault(key, "the path is empty", "Write a path, or remove the key.", code="path.empty")]
    found = user_paths.find_problem(paths.make_absolute(value, folder), user_paths.FOLDER, is_output=is_output)
    if found is None:
        return []
    return [recipe.fault(key, f"{user_paths.shorten(value)}: {found.problem}", found.fix, code=found.code)]


def _take_out(values: dict[str, Any], name: str, faults: list[Fault]) -> list[Fault]:
    """Remove a value that has faults, so that no later check opens it; return the faults."""
    if faults:
        values.pop(name)
    return faults


def _check_json_file(recipe: Recipe, value: str, train: Mapping[str, Any]) -> list[Fault]:
    """Return the faults of a JSON file whose mapping an owner reads."""
    file, shown = paths.make_absolute(value, Path.cwd()), user_paths.shorten(value)
    instead = "Write the mapping itself, or the path of a JSON file that holds it."
    if found := user_paths.find_problem(file, user_paths.FILE):
        return [recipe.fault(_JSON_FILE, f"{shown}: {found.problem}", instead, code=found.code)]
    if not file.is_file():
        return [recipe.fault(_JSON_FILE, f"{shown}: there is no such file", instead, code="recipe.missing_file")]
    try:
        with file.open("rb") as stream:
            content = json.loads(stream.read(_MAX_JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        problem = f"{shown}: the file is no JSON: {first_line(error)}"
        return [recipe.fault(_JSON_FILE, problem, instead, code="path.invalid_json")]
    if not isinstance(content, dict):
        problem = f"{shown}: the file holds no JSON object"
        return [recipe.fault(_JSON_FILE, problem, instead, code="path.invalid_json")]
    owner = nested.get_nested_fields(*_JSON_FILE, train)
    fields = owner.fields if owner else {}
    wrong = [name for name, inner in content.items() if name not in fields or not types.accepts(fields[name], inner)]
    if not wrong:
        return []
    problem = f"{shown}: {owner.owner_name if owner else 'its owner'} does not take {', '.join(wrong[:3])}"
    fix = f"Correct the file. Its keys are {', '.join(sorted(fields))}."
    return [recipe.fault(_JSON_FILE, problem, fix, code="path.invalid_json")]
