"""The key `evaluate.checks`: the checks that score answers, written as for `evaluate --check`.

Inputs: the checked section `evaluate:`. Outputs: a list of checks with absolute paths; a fault for a check that does
not exist, and for a file that is not there. Not here: what a check does, and whether it fits the held-out rows
(`evaluation.planned_checks`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from trl_sft import user_paths
from trl_sft.errors import Edit, Fault
from trl_sft.recipe import paths, sections
from trl_sft.recipe.yaml_reader import Key, Recipe
from trl_sft.suggestions import LOOSE, is_misspelling, nearest_name

AUTO = "auto"  # the checks that fit the reference answers
_KEY: Key = ("evaluate", "checks")
_SCHEMA = "json_schema"


def check(recipe: Recipe, evaluate: dict[str, Any]) -> Iterator[Fault]:
    """Yield the faults of `evaluate.checks`; make it a list with absolute paths, and take out a value with faults.

    Args:
        recipe: the recipe, for the places of the faults.
        evaluate: the checked section `evaluate:`.

    """
    written = recipe.values["evaluate"].get("checks")
    values: Any = [written] if isinstance(written, str) else written
    evaluate.pop("checks")
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        return  # its type is a fault already
    faults: list[Fault] = []
    absolute = [_check_value(recipe, value, number, faults=faults) for number, value in enumerate(values)]
    if not values or (AUTO in values and len(values) > 1):
        fix = "Name a check, or write `auto` alone for those that fit the reference answers; or remove the key."
        problem = "`auto` stands beside other checks" if values else "the list is empty"
        faults.append(recipe.fault(_KEY, problem, fix, code="evaluation.bad_check"))
    if not faults:
        evaluate["checks"] = absolute
    yield from faults


def split_task(value: str) -> tuple[str, list[str]]:
    """Return the task and the checks of `TASK=CHECK`, `CHECK` or `CHECK,CHECK`; task "" = every task.

    Example:
        >>> split_task("math=numeric,exact")
        ('math', ['numeric', 'exact'])

    """
    task, equals, written = value.partition("=")
    if not equals or task.partition(":")[0] in sections.CHECKS or ".py:" in task:
        task, written = "", value
    names = written.split(",")
    return task, names if set(names) <= set(sections.CHECKS) else [written]


def list_values(checks: Sequence[str]) -> list[str]:
    """Return the checks of a recipe as `--check` takes them; [] = those that fit the reference answers."""
    return [value for value in checks if value != AUTO]


def _check_value(recipe: Recipe, value: str, number: int, *, faults: list[Fault]) -> str:
    """Return a value with absolute paths; add the fault of a check that cannot be used."""
    key: Key = (*_KEY, number) if isinstance(recipe.values["evaluate"].get("checks"), list) else _KEY
    if value == AUTO:
        return value
    task, names = split_task(value)
    prefix = f"{task}=" if task else ""
    for name in names:
        word, colon, parameter = name.partition(":")
        if word == _SCHEMA and colon:
            path = paths.make_absolute(parameter, recipe.folder(_KEY))
            problem = user_paths.find_problem(path, user_paths.FILE)
            if problem is None and path.is_file():
                return f"{prefix}{_SCHEMA}:{path.resolve()}"
            text = problem.problem if problem else "there is no such file"
            code = problem.code if problem else "recipe.missing_file"
            faults.append(recipe.fault(key, f"{parameter}: {text}", "Name a file with a JSON Schema.", code=code))
        elif word not in sections.CHECKS and colon:
            location = paths.resolve_function(name, recipe.folder(_KEY))
            if not isinstance(location, paths.LocationProblem):
                return value if location.as_module else f"{prefix}{location.file}:{location.name}"
            faults.append(recipe.fault(key, f"{name}: {location.problem}", location.fix, code=location.code))
        elif word not in sections.CHECKS:
            faults.append(_explain_unknown(recipe, key, name, prefix=prefix))
    return value


def _explain_unknown(recipe: Recipe, key: Key, name: str, *, prefix: str) -> Fault:
    """Return the fault of a check that does not exist."""
    similar = nearest_name(name, sections.CHECKS, cutoff=LOOSE)
    listed = f"Write one of {', '.join(sections.CHECKS)}, or FILE.py:FUNCTION."
    edits: tuple[Edit, ...] = ()
    if is_misspelling(name, similar, sections.CHECKS):
        edits = (Edit("set", key, f"{prefix}{similar}"),)
    fix = f"Did you mean `{similar}`?" if similar else listed
    return recipe.fault(key, f"there is no check `{name}`", fix, code="evaluation.bad_check", edits=edits)
