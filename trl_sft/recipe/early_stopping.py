"""What `run.early_stopping` sets: evaluations and checkpoints at the same steps, and the best weights at the end.

Inputs: the checked sections of a recipe.
Outputs: keys of `train:` that the recipe leaves open, each with the reason; a fault for each key that contradicts.
Not here: when a run stops (`training.early_stopping`), and whether an evaluation has the metric (`training.stages`).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from trl_sft.errors import Edit, Fault
from trl_sft.recipe import sections
from trl_sft.recipe.checked import Setting
from trl_sft.recipe.yaml_reader import Key, Recipe, format_value

_KEY = ("run", "early_stopping")
_DEFAULTS = {name: ast.literal_eval(default) for name, (_, default) in sections.OWN_NESTED_KEYS[_KEY].items()}
_SHARE = 0.05  # of the steps of a run, after which it is evaluated: 20 times, however long it is
_LIMIT = 2  # checkpoints that are kept: the best one and the newest
_SAVING = ("save_strategy", "save_steps", "save_total_limit")
_SCHEDULES = ("steps", "epoch")
_REMOVE_ONE = "Remove one of the two."
_REASON = "run.early_stopping"


class StoppingRule(NamedTuple):
    """When a run stops early."""

    patience: int  # evaluations in a row without an improvement, after which the run stops
    threshold: float  # a change of the metric up to this size is no improvement


def read_rule(options: Mapping[str, Any]) -> StoppingRule | None:
    """Return the rule of a recipe; None = it does not stop early.

    Args:
        options: the section `run:`.

    """
    value = options.get("early_stopping")
    if value is None or value is False:
        return None
    values = _DEFAULTS | (value if isinstance(value, dict) else {})
    return StoppingRule(values["patience"], values["threshold"])


def choose_settings(options: Mapping[str, Any], train: Mapping[str, Any]) -> dict[Key, Setting]:
    """Return the keys of `train:` that early stopping needs and the recipe leaves open.

    Args:
        options: the section `run:`.
        train: the section `train:`, as the recipe has it.

    """
    if read_rule(options) is None or "no" in (train.get("eval_strategy"), train.get("save_strategy")):
        return {}
    strategy = _choose_strategy(train)
    at_evaluation = f"{_REASON} decides at each evaluation"
    at_best = f"{_REASON} keeps the weights of the best evaluation"
    values = {"eval_strategy": Setting(strategy, at_evaluation)}
    if strategy == "epoch" and train.get("save_steps") is not None:
        return {}  # they contradict each other
    values["save_strategy"] = Setting(strategy, at_best)
    if strategy == "steps":
        steps = train.get("eval_steps") or train.get("save_steps") or _SHARE
        every = f" ({steps} = every {steps:.0%} of the steps)" if steps < 1 else ""
        values["eval_steps"] = Setting(steps, at_evaluation + every)
        if train.get("save_strategy", "steps") == "steps":
            values["save_steps"] = Setting(steps, at_best + every)
    values["load_best_model_at_end"] = Setting(True, f"{_REASON} saves the weights of the best evaluation at the end")
    values["metric_for_best_model"] = Setting("eval_loss", f"{_REASON} compares the eval loss")
    if str(train.get("metric_for_best_model", "loss")).endswith("loss"):
        values["greater_is_better"] = Setting(False, f"{_REASON}: a lower eval loss is better")
    if all(train.get(name) is None for name in _SAVING):
        values["save_total_limit"] = Setting(_LIMIT, f"{_REASON} needs the best checkpoint and the newest one")
    return {("train", name): setting for name, setting in values.items() if train.get(name) is None}


def add_settings(train: Mapping[str, Any], settings: Mapping[Key, Setting]) -> dict[str, Any]:
    """Return the section `train:` with settings that another key implies."""
    return {**train, **{str(key[-1]): setting.value for key, setting in settings.items()}}


def check(
    recipe: Recipe, options: Mapping[str, Any], train: Mapping[str, Any], *, has_evaluation_set: bool
) -> Iterator[Fault]:
    """Yield the faults of `run.early_stopping` and of the keys that contradict it.

    Args:
        recipe: the recipe, for the places of the faults.
        options: the section `run:`.
        train: the section `train:`, as the recipe has it.
        has_evaluation_set: whether the recipe names one.

    """
    rule = read_rule(options)
    if rule is None:
        return
    for name, value, least in (("patience", rule.patience, 1), ("threshold", rule.threshold, 0)):
        if not value >= least:
            problem, fix = f"the value is {format_value(value)}", f"Write a number of at least {least}."
            yield recipe.fault((*_KEY, name), problem, fix, code="recipe.out_of_range")
    if not has_evaluation_set:
        problem = "`early_stopping` compares eval losses, but the recipe has no evaluation set"
        fix = "Set `data.eval`, or `data.eval_fraction: 0.05`."
        yield recipe.fault(_KEY, problem, fix, code="recipe.needs_evaluation_set")
    yield from _find_contradictions(recipe, train)
    yield from _compare_schedules(recipe, train)


def describe_settings(settings: Mapping[Key, Setting]) -> list[tuple[str, str]]:
    """Return a line, name and value, on the keys that early stopping set; empty if it set none."""
    names = [(key, setting) for key, setting in settings.items() if setting.reason.startswith(_REASON)]
    values = ", ".join(f"{key[-1]}: {_show(setting.value)}" for key, setting in names)
    return [("stopping", f"run.early_stopping sets {values}")] if values else []


def _choose_strategy(train: Mapping[str, Any]) -> str:
    """Return when a run is evaluated: as the keys of the recipe say, else after a number of steps."""
    if train.get("eval_strategy") in _SCHEDULES:
        return str(train["eval_strategy"])
    if train.get("eval_steps") is None and train.get("save_strategy") == "epoch":
        return "epoch"
    return "steps"


def _find_contradictions(recipe: Recipe, train: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield a fault for each key that turns off what early stopping needs."""
    problems: dict[str, tuple[Any, str]] = {  # key -> the value that contradicts, and why
        "eval_strategy": ("no", "turns off the evaluations at which `run.early_stopping` decides"),
        "save_strategy": ("no", "saves no checkpoint, but `run.early_stopping` needs that of the best evaluation"),
        "load_best_model_at_end": (
            False,
            "keeps the weights of the last step, but `run.early_stopping` saves those of the best evaluation",
        ),
    }
    if str(train.get("metric_for_best_model", "loss")).endswith("loss"):
        problems["greater_is_better"] = (True, "looks for the highest loss, but `run.early_stopping` for the lowest")
    for name, (value, reason) in problems.items():
        if train.get(name) == value and type(train.get(name)) is type(value):
            problem = f"`{name}: {_show(value)}` {reason}"
            yield recipe.fault(("train", name), problem, _REMOVE_ONE, code="recipe.contradiction")


def _compare_schedules(recipe: Recipe, train: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield a fault where the recipe saves at other steps than it evaluates: the best weights would be lost."""
    strategy, saving = _choose_strategy(train), train.get("save_strategy")
    eval_steps, save_steps = train.get("eval_steps"), train.get("save_steps")
    edit = None
    if saving in _SCHEDULES and saving != strategy:
        edit = Edit("set", ("train", "save_strategy"), strategy)
    elif strategy == "epoch" and saving is None and save_steps is not None:
        edit = Edit("remove", ("train", "save_steps"))
    elif strategy == "steps" and saving != "best" and None not in (eval_steps, save_steps) and eval_steps != save_steps:
        edit = Edit("set", ("train", "save_steps"), eval_steps)
    if edit is None:
        return
    name = str(edit.key[-1])
    evaluated = [key for key in ("eval_strategy", "eval_steps") if train.get(key) is not None]
    at_evaluations = " and ".join(f"`{key}: {_show(train[key])}`" for key in evaluated)
    problem = f"`{name}: {_show(train[name])}` does not fit {at_evaluations}: `run.early_stopping` needs a"
    problem += " checkpoint at each evaluation"
    fix = f"Remove `{name}`." if edit.action == "remove" else f"Set `{name}: {_show(edit.value)}`."
    yield recipe.fault(edit.key, problem, fix, code="recipe.contradiction", edits=(edit,))


def _show(value: Any) -> str:
    """Return a value as a recipe has it; a word without quotation marks."""
    return value if isinstance(value, str) else format_value(value)
