"""What installed versions of TRL and bitsandbytes cannot train, though they take the keys.

In: a run and its live settings. Out: a fault that names the version. Upstream itself raises an AttributeError in the
first step, after the weights are loaded. Not here: packages that are missing (`model.needed_packages`), and values that
upstream refuses by name (`training.dry_run`).
"""

from __future__ import annotations

import importlib.metadata

import trl
from trl import SFTConfig

from trl_sft.errors import Edit, Fault, MissingPackage, RecipeError
from trl_sft.recipe.checked import Run

_BITSANDBYTES_ON_CPU = (0, 50)  # the first version with optimizers for a CPU


def check(run: Run, args: SFTConfig) -> None:
    """Refuse settings that the installed versions take and cannot train.

    Args:
        run: the checked recipe.
        args: the live settings.

    Raises:
        RecipeError: label smoothing with TRL's loss in chunks.
        MissingPackage: an optimizer of bitsandbytes on a CPU, with a version that has none.

    """
    if args.label_smoothing_factor > 0 and args.loss_type == "chunked_nll":
        problem = (
            f"TRL {trl.__version__} cannot smooth labels with loss_type chunked_nll, "
            "which it uses where the recipe sets no loss_type"
        )
        key = ("train", "loss_type")
        where = run.recipe.where(key if "loss_type" in run.train else ("train", "label_smoothing_factor"))
        fix = "Set train.loss_type: nll, which trains the same loss."
        raise RecipeError(Fault(where, problem, fix, code="package.too_old", edits=(Edit("set", key, "nll"),)))
    if _needs_bitsandbytes(args) and args.device.type == "cpu":
        installed = importlib.metadata.version("bitsandbytes")
        if tuple(map(int, installed.split(".")[:2])) < _BITSANDBYTES_ON_CPU:
            problem = f"{run.train['optim']}: bitsandbytes {installed} has no optimizers for a CPU"
            fix = "Run `pip install 'bitsandbytes>=0.50'` in this Python environment, or remove the key."
            raise MissingPackage(Fault(run.recipe.where(("train", "optim")), problem, fix, code="package.too_old"))


def _needs_bitsandbytes(args: SFTConfig) -> bool:
    """Tell whether the optimizer is one of bitsandbytes."""
    name = str(getattr(args.optim, "value", args.optim))
    is_other = name.startswith("adamw_torch")  # of torchao
    return not is_other and any(part in name for part in ("_bnb", "8bit", "paged_", "lion_", "ademamix"))
