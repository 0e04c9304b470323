"""Upstream's objects for `train.parallelism_config`, and whether as many processes train as the recipe divides.

In: a checked recipe, the number of processes. Out: keyword arguments of SFTConfig, or a fault before the weights load.
Deliberately absent: pairs of keys that exclude each other (`recipe.parallelism`).
"""

from __future__ import annotations

from typing import Any

from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import dataclasses as accelerate_classes

from trl_sft.errors import Fault, LaunchError, RecipeError, first_line
from trl_sft.recipe import parallelism
from trl_sft.recipe.checked import Run

_HANDLERS = {
    "tp_handler": "TorchTensorParallelConfig",
    "cp_handler": "TorchContextParallelConfig",
    "sp_handler": "DeepSpeedSequenceParallelConfig",
}


def build_arguments(run: Run, processes: int | None) -> dict[str, Any]:
    """Return `parallelism_config` as SFTConfig takes it; empty where the recipe has none.

    Args:
        run: the checked recipe.
        processes: how many processes train; None = not known.

    Raises:
        RecipeError: accelerate refuses a value.
        LaunchError: another number of processes trains than the recipe divides the training among.

    """
    key = parallelism.find_key({"train": run.train, "model": run.model})
    if key is not None and processes is not None:
        mapping = (run.train if key == parallelism.ACCELERATE else run.model)[str(key[1])]
        needed = parallelism.count_processes(key, mapping)
        if processes != needed:
            sizes = parallelism.describe_sizes(key, mapping)
            problem = f"{sizes} need {needed} processes, and {processes} {'trains' if processes == 1 else 'train'}"
            fix = f"Start {needed} processes (`launch.nproc_per_node: {needed}`), or change the sizes."
            raise LaunchError(Fault(run.recipe.where(key), problem, fix, code="machine.process_count"))
    if parallelism.ACCELERATE_NAME not in run.train:
        return {}
    values = dict(run.train[parallelism.ACCELERATE_NAME] or {})
    if (values.get("sp_size") or 1) > 1:  # DeepSpeed compares it with the model's, which accelerate 1.15 leaves out
        attention = {"sp_attn_implementation": str(run.model.get("attn_implementation") or "sdpa")}
        values["sp_handler"] = attention | (values.get("sp_handler") or {})
    try:
        for name, class_name in _HANDLERS.items():
            if isinstance(values.get(name), dict):
                values[name] = getattr(accelerate_classes, class_name)(**values[name])
        return {parallelism.ACCELERATE_NAME: ParallelismConfig(**values)}
    except (TypeError, ValueError, ImportError, OSError) as error:
        fix = "Write values that accelerate's ParallelismConfig takes."
        where = run.recipe.where(parallelism.ACCELERATE)
        raise RecipeError(Fault(where, first_line(error), fix, code="recipe.refused_by_library")) from None
