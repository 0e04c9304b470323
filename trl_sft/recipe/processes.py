"""How many processes train, what one process cannot do, and the batch that all of them make together.

In: a `Run`. Out: faults of the machine or of this version, apart from those of the recipe, and the settings
that follow from `run.global_batch_size`. Needs no torch. Deliberately absent: starting a process.
"""

from __future__ import annotations

import ast
import re
from typing import NamedTuple

from trl_sft.errors import Fault, RecipeError
from trl_sft.recipe import sections
from trl_sft.recipe.checked import Run, Setting
from trl_sft.recipe.upstream import fields
from trl_sft.recipe.yaml_reader import Key, describe_value

_CARDS = re.compile(r"([1-9]\d*)x([1-9]\d*(?:\.\d+)?)GiB")
_ALONE = {"nproc_per_node": (1, "1"), "nnodes": (1, "1", "1:1")}
_OURS = ("engine", "config")
_BATCH: Key = ("run", "global_batch_size")
_STEPS: Key = ("train", "gradient_accumulation_steps")


class TargetMachine(NamedTuple):
    """The machine that a run is for."""

    is_this_machine: bool
    num_gpus: int = 1
    gpu_gib: float | None = None  # memory of one GPU in GiB; None = as much as the run needs


def parse_machine(words: str) -> TargetMachine:
    """Return the machine that `--on` names: here, any, or 8x80GiB. Raises RecipeError."""
    if words in ("here", "any"):
        return TargetMachine(words == "here")
    if found := _CARDS.fullmatch(words):
        return TargetMachine(False, int(found[1]), float(found[2]))
    raise RecipeError(Fault("--on", words, "here, any, or cards and their memory: 8x80GiB"))


def check(run: Run) -> list[Fault]:
    """Return what the recipe asks of processes that this version, which trains in one, cannot carry out.

    The recipe itself is right: another machine or a later version may run it.
    """
    faults: list[Fault] = []
    for name, value in run.launch.items():
        where = run.recipe.where(("launch", name))
        if name == "engine" and value not in ("auto", "ddp"):
            found = f"{describe_value(value)}; this version trains in one process, where {value} has nothing to divide"
            faults.append(Fault(where, found, "engine: auto, or ddp; or launch=null after the recipe"))
        elif name in _ALONE and value not in _ALONE[name]:
            faults.append(Fault(where, f"{describe_value(value)}; this version trains in one process", f"{name}: 1"))
        elif name not in _OURS and name not in _ALONE:
            found = (
                f"{describe_value(value)}, an option of torchrun; this version trains in one process and starts none"
            )
            faults.append(Fault(where, found, "leave it out"))
    return faults


def compute_settings(run: Run, processes: int = 1) -> dict[Key, Setting]:
    """Return the accumulation that `run.global_batch_size` makes with so many processes. Raises RecipeError."""
    wanted = run.options.get("global_batch_size")
    if wanted is None:
        return {}
    each = run.train.get("per_device_train_batch_size", default("per_device_train_batch_size"))
    step = each * processes
    parts = f"{each} rows at a time x {processes} process{'es' * (processes > 1)}"
    if wanted % step:
        found = f"{wanted} is no multiple of {step}: {parts} (train.per_device_train_batch_size)"
        below, above = wanted // step * step, (wanted // step + 1) * step
        near = f"{below} or {above}" if below else str(above)
        raise RecipeError(Fault(run.recipe.where(_BATCH), found, f"{near}, or a batch that divides it"))
    steps = wanted // step
    written = run.train.get("gradient_accumulation_steps")
    if written == steps:
        return {}
    if written is not None:
        found = (
            f"{describe_value(written)}, but {wanted} rows a step, {parts}, are {steps} steps (run.global_batch_size)"
        )
        raise RecipeError(Fault(run.recipe.where(_STEPS), found, "one of the two keys alone"))
    return {
        ("train", "gradient_accumulation_steps"): Setting(steps, f"run.global_batch_size {wanted}: {parts} x {steps}")
    }


def describe_settings(settings: dict[Key, Setting]) -> list[tuple[str, str]]:
    """Return a line for the screen on the accumulation that we set."""
    found = settings.get(_STEPS)
    return [("batch", f"gradient_accumulation_steps: {found.value}, for {found.reason}")] if found else []


def default(name: str) -> int:
    """Return the installed SFTConfig's default of a whole number."""
    return int(ast.literal_eval(fields.read_fields(sections.OWNERS["train"][1])[name].default))
