"""The contents of run.json.

In: the run, the settings that this package chose, live arguments. Out: texts and mappings, without secrets; `record`
writes them. Deliberately absent: resolved.yaml (`recipe.resolved`), the model card (`publishing.model_card`).
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_sft import __version__, run_folder
from trl_sft.model import device
from trl_sft.recipe.checked import Run, Setting
from trl_sft.recipe.upstream import packages
from trl_sft.recipe.yaml_reader import Key
from trl_sft.training.git_commit import find_commit

_PACKAGES = ("trl", "transformers", "datasets", "peft", "accelerate", "torch", "tokenizers")
_COMPUTING = {  # what a number of a run depends on, in `describe_environment`
    "versions": ("trl", "transformers", "peft", "accelerate", "torch", "bitsandbytes"),
    "hardware": ("device", "gpus", "cpu", "threads"),
}
# keys of SFTConfig that the run sets from other sections of the recipe
_FROM_OTHER_SECTIONS = ("output_dir", "model_init_kwargs", "completion_only_loss", "assistant_only_loss")


def describe_start(run: Run, chosen: Mapping[Key, Setting], args: Any) -> dict[str, Any]:
    """Return run.json as it stands when training starts.

    Args:
        run: the checked recipe.
        chosen: values that this package set.
        args: the live SFTConfig.
    """
    written = {*run.train, *(key[-1] for key in chosen), *_FROM_OTHER_SECTIONS}
    defaults = [field.name for field in dataclasses.fields(args) if field.name not in written]
    return {
        "trl_sft": __version__,
        **describe_environment(run),
        "git_commit": find_commit(run.recipe.path.parent),
        "seed": args.seed,
        "defaults": {name: _as_json(getattr(args, name)) for name in defaults if not name.endswith("token")},
        "overrides": list(run.recipe.arguments[1:]),
        "outcome": run_folder.RUNNING,
    }


def describe_environment(run: Run) -> dict[str, Any]:
    """Return versions of packages, and the machine: on others the same run may have other last digits."""
    names = _PACKAGES if run.quantization is None else (*_PACKAGES, "bitsandbytes")
    versions = {name: packages.get_version(name) for name in names}
    return {"versions": versions, "hardware": device.describe_hardware(use_cpu=run.train.get("use_cpu", False))}


def list_environment_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the packages and parts of the machine that compute and that differ, each with both values.

    Args:
        before: what `describe_environment` returned, or what a file holds of it.
        now: the same of this process.

    """
    changes = []
    for section, names in _COMPUTING.items():
        for name in names:
            earlier, current = before.get(section, {}).get(name), now[section].get(name)
            if earlier is not None and earlier != current:
                changes.append(f"{name} {_write_list(earlier)} -> {_write_list(current)}")
    return changes


def _write_list(value: Any) -> str:
    """Return a value, or the values of a list with commas."""
    return (", ".join(value) or "none") if isinstance(value, list) else str(value)


def describe_best(args: Any, state: Any) -> dict[str, Any] | None:
    """Return the step whose weights the Trainer loaded at the end, for run.json; None = those of the last step.

    Args:
        args: the live SFTConfig.
        state: the Trainer's state after training.

    Returns:
        `step`, `steps` (of the run), `metric` (as it is logged), its `value`, and where there are any `equal`: the
        other steps at which it had this value, of which the Trainer keeps the first.

    """
    if not args.load_best_model_at_end or state.best_model_checkpoint is None:
        return None
    name = str(args.metric_for_best_model or "loss")
    metric = name if name.startswith("eval_") else f"eval_{name}"
    step = int(Path(state.best_model_checkpoint).name.removeprefix(run_folder.CHECKPOINT))
    entries = [entry for entry in state.log_history if metric in entry][:-1]  # the last one is of the loaded weights
    equal = sorted({entry["step"] for entry in entries if entry[metric] == state.best_metric and entry["step"] > step})
    best = {"step": step, "steps": state.global_step, "metric": metric, "value": state.best_metric}
    return best | ({"equal": equal} if equal else {})


def _as_json(value: Any) -> Any:
    """Return a value that JSON can hold: enumerations by value, what is not finite and objects as text."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | dict | None) else str(value)
