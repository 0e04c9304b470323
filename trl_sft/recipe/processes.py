"""How many processes train: what one process cannot do, and the batch size of all processes together.

Inputs: a `Run`.
Outputs: faults of keys that need several processes, apart from those of the recipe; the settings that follow from
`run.global_batch_size`.
Not here: starting a process. Needs no torch.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import NamedTuple

from trl_sft.errors import Fault, RecipeError
from trl_sft.recipe import parallelism, sections
from trl_sft.recipe.checked import Run, Setting
from trl_sft.recipe.upstream import fields
from trl_sft.recipe.yaml_reader import Key, describe_value

_GPUS = re.compile(r"([1-9]\d{0,5})x([1-9]\d{0,5}(?:\.\d{1,6})?)GiB", re.ASCII)
_BATCH_SIZE: Key = ("run", "global_batch_size")
_ACCUMULATION: Key = ("train", "gradient_accumulation_steps")


class TargetMachine(NamedTuple):
    """The machine that a run is checked for."""

    is_this_machine: bool
    num_gpus: int = 1
    gpu_gib: float | None = None  # memory of one GPU in GiB; None = as much as the run needs


def parse_machine(text: str) -> TargetMachine:
    """Return the machine that `--on` names: here, any, or 8x80GiB.

    Raises:
        RecipeError: The text is none of the three.

    """
    if text in ("here", "any"):
        return TargetMachine(is_this_machine=text == "here")
    if match := _GPUS.fullmatch(text):
        return TargetMachine(is_this_machine=False, num_gpus=int(match[1]), gpu_gib=float(match[2]))
    fix = "Write here, any, or the number and the memory of the GPUs: 8x80GiB."
    raise RecipeError(Fault("--on", f"{text!r} is not a machine", fix, code="run.bad_option"))


def check(run: Run) -> list[Fault]:
    """Return a fault for each key of `launch:` that needs several processes, where the run has one.

    The recipe itself is right: `python -m trl_sft RECIPE` starts the processes.
    """
    launch, faults = run.launch, []
    needs_several = {
        "engine": launch.get("engine", "auto") not in ("auto", "ddp"),
        "nproc_per_node": str(launch.get("nproc_per_node", "auto")) not in ("1", "auto", "cpu"),
        "nnodes": str(launch.get("nnodes", 1)) not in ("1", "1:1"),
    }
    for name in [name for name, needs in needs_several.items() if needs]:
        problem = f"`{name}` is {describe_value(launch[name])}, but this is one process"
        fix = "Run `python -m trl_sft launch RECIPE`, or add launch=null to the command."
        faults.append(run.recipe.fault(("launch", name), problem, fix, code="machine.one_process"))
    key = parallelism.find_key({"train": run.train, "model": run.model})
    if key is not None:
        mapping = (run.train if key == parallelism.ACCELERATE else run.model)[str(key[1])]
        problem = f"{parallelism.describe_sizes(key, mapping)} need several processes, but this is one process"
        fix = "Run `python -m trl_sft launch RECIPE`, or remove the key."
        faults.append(run.recipe.fault(key, problem, fix, code="machine.one_process"))
    return faults


def check_streaming(run: Run, count: int) -> list[Fault]:
    """Return the fault of rows that are streamed to several processes; empty if there is none.

    accelerate would let the first process read them for all. Which rows a resumed run still has to read, and what the
    last steps of a stream do, is proved for one process alone.
    """
    streamed = [source for source in run.sources["train"] if source.load_kwargs.get("streaming")]
    if count == 1 or not streamed:
        return []
    problem = f"rows are streamed to one process alone, and {count} train"
    fix = "Remove `streaming` from the sources, or train with one process."
    return [run.recipe.fault((*streamed[0].key, "streaming"), problem, fix, code="launch.streaming")]


def compute_settings(run: Run, processes: int = 1) -> dict[Key, Setting]:
    """Compute the gradient accumulation that `run.global_batch_size` needs.

    Args:
        run: The checked recipe.
        processes: How many processes train.

    Returns:
        One setting; empty if the recipe has no `run.global_batch_size`, or already agrees with it.

    Raises:
        RecipeError: The batch size cannot be divided, or the recipe sets another accumulation.

    """
    batch_size = run.options.get("global_batch_size")
    if batch_size is None:
        return {}
    per_device = run.train.get("per_device_train_batch_size", _default("per_device_train_batch_size"))
    is_divided = parallelism.ACCELERATE_NAME in run.train or parallelism.TRANSFORMERS_NAME in run.model
    groups = processes
    if is_divided:
        groups = parallelism.read_division(run.train, run.model, processes).count_row_groups(processes)
    rows = per_device * groups
    factors = f"{per_device} per device x {groups} process{'es' if groups > 1 else ''}"
    if groups < processes:
        factors = f"{per_device} a group x {groups} group{'s' * (groups > 1)} of {processes // groups} processes"
    if batch_size % rows:
        problem = f"{batch_size} is not a multiple of {rows} = {factors}"
        below, above = batch_size // rows * rows, (batch_size // rows + 1) * rows
        multiples = f"{below} or {above}" if below else str(above)
        fix = f"Write {multiples}, or change `train.per_device_train_batch_size`."
        raise RecipeError(run.recipe.fault(_BATCH_SIZE, problem, fix, code="recipe.indivisible_batch"))
    steps = batch_size // rows
    written = run.train.get("gradient_accumulation_steps")
    if written == steps:
        return {}
    if written is not None:
        problem = f"the value is {written}, but `run.global_batch_size: {batch_size}` needs {steps} ({factors})"
        raise RecipeError(
            run.recipe.fault(_ACCUMULATION, problem, "Remove one of the two keys.", code="recipe.contradiction")
        )
    reason = f"run.global_batch_size {batch_size} = {factors} x {steps}"
    return {("train", "gradient_accumulation_steps"): Setting(steps, reason)}


def describe_settings(settings: Mapping[Key, Setting]) -> list[tuple[str, str]]:
    """Return the line for the screen on the gradient accumulation that trl_sft set; empty if it set none."""
    setting = settings.get(_ACCUMULATION)
    return [("batch", f"gradient_accumulation_steps: {setting.value}, for {setting.reason}")] if setting else []


def _default(name: str) -> int:
    """Return the default of a whole number in the installed SFTConfig."""
    return int(ast.literal_eval(fields.read_fields(sections.OWNERS["train"][1])[name].default))
