"""Whether the engine of a run, and its number of processes, can read a checkpoint.

Inputs: a checked recipe, the folder of a checkpoint. Output: a fault, or None. transformers passes over the optimizer
of another engine without a word, or fails after the weights are loaded. FSDP2 divides a checkpoint anew among any
number of processes from two on, and DeepSpeed does not. Read and tried with transformers 5.23,
accelerate 1.15 and DeepSpeed 0.19. Not here: whether the checkpoint is whole (`checkpoints`).
"""

from __future__ import annotations

from pathlib import Path

from trl_sft import ranks
from trl_sft.errors import Fault
from trl_sft.recipe import engines
from trl_sft.recipe.checked import Run

_DEEPSPEED, _FSDP, _PLAIN = "DeepSpeed", "FSDP", "one process or DDP"
_STATES = "rng_state_*.pth"  # one for each process, where there were several


def check(run: Run, checkpoint: Path) -> Fault | None:
    """Return the fault of a checkpoint that the engine of a run cannot read.

    Args:
        run: The checked recipe.
        checkpoint: That the run would resume from.

    """
    before, now = _find_family(checkpoint), _choose_family(run)
    instead = (
        f"start a new run from its weights: set `model.name_or_path` to {checkpoint}, and another `train.output_dir`."
    )
    if before != now:
        problem = f"{checkpoint} was saved by {before}, and {now} cannot read its optimizer"
        engine = {_DEEPSPEED: "zero2 or zero3, as before", _FSDP: "fsdp", _PLAIN: "ddp"}[before]
        fix = f"Set `launch.engine` to {engine}; or {instead}"
        return Fault(run.recipe.where(("launch", "engine")), problem, fix, code="resume.other_engine")
    saved = len(list(checkpoint.glob(_STATES))) or 1
    if before == _DEEPSPEED and ranks.count() > 1 and saved != ranks.count():
        problem = (
            f"{checkpoint} has the optimizer of {saved} processes, and {ranks.count()} train; DeepSpeed cannot divide"
        )
        problem += " it anew"
        fix = f"Start {saved} processes; or {instead}"
        return Fault(run.recipe.where(("launch", "nproc_per_node")), problem, fix, code="resume.other_engine")
    return None


def _find_family(checkpoint: Path) -> str:
    """Return which kind of engine saved a checkpoint, from its files."""
    if any(checkpoint.glob("global_step*")):
        return _DEEPSPEED
    is_fsdp = any(checkpoint.glob("pytorch_model_fsdp*")) or any(checkpoint.glob("optimizer_*/"))
    return _FSDP if is_fsdp else _PLAIN


def _choose_family(run: Run) -> str:
    """Return which kind of engine the recipe chooses."""
    engine = engines.get_engine(run)
    if engine in engines.STAGES:
        return _DEEPSPEED
    return _FSDP if engine == engines.FSDP else _PLAIN
