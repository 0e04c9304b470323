"""The packages that the keys of a recipe need beside those that are installed with trl_sft.

Inputs: a checked recipe (`Run`). Outputs: one fault that names every missing package, with one line for pip. Nothing is
imported. Not here: packages without which no recipe can be read (`recipe.upstream.packages`).
"""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from trl_sft.errors import Fault, MissingPackage
from trl_sft.recipe.checked import Run
from trl_sft.recipe.yaml_reader import Key


class NeededPackage(NamedTuple):
    """A package that a key needs."""

    modules: str  # what Python imports; of several one is enough
    name: str  # what pip installs
    key: Key


_TRACKING = "trl-sft[trackers]"  # pyproject.toml: tensorboard and trackio in tested versions
# name in `train.report_to` -> (module, what pip installs); transformers.integrations has the classes
_TRACKERS = {
    "azure_ml": ("azureml", "azureml-core"),
    "clearml": ("clearml", "clearml"),
    "codecarbon": ("codecarbon", "codecarbon"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "dagshub": ("dagshub", "dagshub"),
    "dvclive": ("dvclive", "dvclive"),
    "flyte": ("flytekit", "flytekit"),
    "mlflow": ("mlflow", "mlflow"),
    "neptune": ("neptune", "neptune"),
    "swanlab": ("swanlab", "swanlab"),
    "tensorboard": ("tensorboard tensorboardX", _TRACKING),
    "trackio": ("trackio", _TRACKING),
    "wandb": ("wandb", "wandb"),
}
_QUANTIZATION = "trl-sft[quantization]"  # pyproject.toml: bitsandbytes in a tested version
# part of `train.optim` -> (module, what pip installs); transformers.trainer_optimizer imports them
_OPTIMIZERS = {
    "galore": ("galore_torch", "galore-torch"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "schedule_free": ("schedulefree", "schedulefree"),
    "apollo": ("apollo_torch", "apollo-torch"),
    "adamw_torch_4bit": ("torchao", "torchao"),
    "adamw_torch_8bit": ("torchao", "torchao"),
    **dict.fromkeys(["_bnb", "adamw_8bit", "paged_", "lion_", "ademamix"], ("bitsandbytes", _QUANTIZATION)),
}


def check(run: Run, trackers: Sequence[str] = ()) -> None:
    """Refuse a run whose packages upstream would miss only later.

    Args:
        run: The checked recipe.
        trackers: The trackers that SFTConfig chose, beside those of the recipe.

    Raises:
        MissingPackage: With one fault for all missing packages.

    """
    needed = [*_list_needed(run), *_list_trackers(trackers)]
    missing = [package for package in needed if not is_installed(package.modules)]
    if not missing:
        return
    keys = {package.name: ".".join(map(str, package.key)) for package in reversed(missing)}
    names = sorted(keys)
    problem = f"not installed: {', '.join(f'{name} (for `{keys[name]}`)' for name in names)}"
    these = "the key" if len(names) == 1 else "these keys"
    fix = f"Run `pip install {shlex.join(names)}` in this Python environment, or remove {these}."
    raise MissingPackage(Fault(run.recipe.where(missing[0].key), problem, fix, code="package.missing"))


def is_installed(modules: str) -> bool:
    """Tell whether one of several modules can be imported, without importing it."""
    return any(importlib.util.find_spec(module) is not None for module in modules.split())


def _list_needed(run: Run) -> Iterator[NeededPackage]:
    """Yield the packages that the keys of a recipe need."""
    if run.quantization is not None:
        yield NeededPackage("bitsandbytes", _QUANTIZATION, ("quantization",))
    optimizer = str(run.train.get("optim", ""))
    for part, (module, name) in _OPTIMIZERS.items():
        if part in optimizer:
            yield NeededPackage(module, name, ("train", "optim"))
            break
    if run.train.get("use_liger_kernel"):
        yield NeededPackage("liger_kernel", "liger-kernel", ("train", "use_liger_kernel"))
    if "/" in str(run.model.get("attn_implementation", "")) or run.model.get("use_kernels"):
        key = "attn_implementation" if "attn_implementation" in run.model else "use_kernels"
        yield NeededPackage("kernels", "kernels", ("model", key))
    written = run.train.get("report_to") or ()
    yield from _list_trackers([written] if isinstance(written, str) else written)


def _list_trackers(names: Sequence[str]) -> Iterator[NeededPackage]:
    """Yield the packages of trackers; `all` and `none` need none."""
    for name in names:
        if name in _TRACKERS:
            yield NeededPackage(*_TRACKERS[name], ("train", "report_to"))
