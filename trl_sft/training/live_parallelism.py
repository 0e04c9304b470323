"""Reads from live objects among how many processes a run divides rows, layers and weights.

In: the checked recipe, and an SFTTrainer that has prepared its model. Out: each size with the one that the recipe asks
for. Sizes come from the device mesh, from divided parameters and from DeepSpeed's groups, not from the arguments.
Deliberately absent: the engine itself, and the share of the parameters (`live`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch.distributed.device_mesh import DeviceMesh
from trl import SFTTrainer

from trl_sft import ranks
from trl_sft.recipe import parallelism
from trl_sft.recipe.checked import Run
from trl_sft.recipe.yaml_reader import Key


class LiveSize(NamedTuple):
    """A number of processes that share something."""

    name: str  # its key in run.json
    size: int
    expected: int  # of the recipe
    key: Key  # the key of the recipe that sets it


def read_sizes(run: Run, trainer: SFTTrainer) -> Iterator[LiveSize]:
    """Yield the sizes that a recipe sets, or that the live trainer has; a run that divides nothing has none.

    Args:
        run: The checked recipe.
        trainer: With its model prepared for several processes.

    """
    tensor_key = _find_tensor_key(run)
    sizes = (
        LiveSize(
            "context_parallel_size", _read_context(trainer), _read(run, "cp_size"), (*parallelism.ACCELERATE, "cp_size")
        ),
        LiveSize(
            "sequence_parallel_size",
            _read_sequence(trainer),
            _read(run, "sp_size"),
            (*parallelism.ACCELERATE, "sp_size"),
        ),
        LiveSize("tensor_parallel_size", _read_tensor(trainer), _get_division(run).tensor, tensor_key),
    )
    yield from (size for size in sizes if size.size > 1 or size.expected > 1)


def _read_context(trainer: SFTTrainer) -> int:
    """Return how many processes share the tokens of a row by context parallelism: those of accelerate's mesh."""
    accelerator: Any = trainer.accelerator
    if getattr(accelerator, "_cp_context", None) is None:  # accelerate 1.12 to 1.15: it was not prepared
        return 1
    return _read_mesh(accelerator.torch_device_mesh, "cp")


def _read_sequence(trainer: SFTTrainer) -> int:
    """Return how many processes share the tokens of a row by DeepSpeed's sequence parallelism."""
    if type(trainer.model_wrapped).__name__ != "DeepSpeedEngine":
        return 1
    return int(getattr(trainer.model_wrapped, "sequence_parallel_size", 1))


def _read_tensor(trainer: SFTTrainer) -> int:
    """Return how many processes share a layer: the dimension `tp` of the mesh that divided parameters lie on."""
    sizes = [_read_mesh(getattr(parameter, "device_mesh", None), "tp") for parameter in trainer.model.parameters()]
    return max(sizes, default=1)


def _read_mesh(mesh: DeviceMesh | None, name: str) -> int:
    """Return the size of a dimension of a mesh; 1 where there is none of this name."""
    names = (mesh.mesh_dim_names if mesh is not None else None) or ()
    return int(mesh.size(names.index(name))) if mesh is not None and name in names else 1


def _get_division(run: Run) -> parallelism.Division:
    return parallelism.read_division(run.train, run.model, ranks.count())


def _read(run: Run, name: str) -> int:
    """Return a size of `train.parallelism_config`; 1 where the recipe sets none."""
    return int((run.train.get(parallelism.ACCELERATE_NAME) or {}).get(name) or 1)


def _find_tensor_key(run: Run) -> Key:
    """Return the key that sets the size of tensor parallelism."""
    loaded = run.model.get(parallelism.TRANSFORMERS_NAME) or {}
    return (*(parallelism.TRANSFORMERS if "tp_size" in loaded else parallelism.ACCELERATE), "tp_size")
