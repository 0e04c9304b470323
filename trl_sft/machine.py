"""What this machine is, and the settings that follow from it: device, precision, pinned memory.

In: the recipe's SFTConfig keywords. Out: further keywords, each with its reason, only where the recipe
says nothing. These are departures from the owners' defaults, so the list is closed (docs/design.md).
"""

from __future__ import annotations

import os
import platform
from typing import Any

import torch
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig

from trl_sft.errors import Fault, LaunchError
from trl_sft.recipe import Key
from trl_sft.run import Setting


def check(train: dict[str, Any]) -> None:
    """Refuse a machine on which this version cannot train. Raises LaunchError."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        found = f"started as {os.environ['WORLD_SIZE']} processes; this version trains in one"
        raise LaunchError(Fault("WORLD_SIZE", found, "python -m trl_sft RECIPE, without a launcher"))
    if torch.cuda.device_count() > 1 and not train.get("use_cpu"):
        found = f"{torch.cuda.device_count()} GPUs are visible; this version trains on one"
        raise LaunchError(Fault("CUDA_VISIBLE_DEVICES", found, "CUDA_VISIBLE_DEVICES=0 before the command"))


def settings(train: dict[str, Any]) -> dict[Key, Setting]:
    """Return what the machine makes us set where the recipe is silent."""
    found: dict[Key, Setting] = {}
    cpu = train.get("use_cpu", False) or device() == "cpu"
    silent = train.get("bf16") is None and not train.get("fp16")
    if silent and (cpu or not is_torch_bf16_gpu_available()):
        found["train", "bf16"] = Setting(False, "the CPU trains in float32" if cpu else "this GPU has no bfloat16")
        if not cpu and torch.cuda.is_available() and "fp16" not in train:
            found["train", "fp16"] = Setting(True, "this GPU has no bfloat16")
    if cpu and "dataloader_pin_memory" not in train:
        found["train", "dataloader_pin_memory"] = Setting(False, "there is no accelerator to copy to")
    return found


def device() -> str:
    """Return the kind of device that the Trainer takes."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator else "cpu"


def describe(args: SFTConfig) -> str:
    """Return device and precision in one line, from the live arguments."""
    kind = args.device.type
    name = torch.cuda.get_device_name() if kind == "cuda" else f"{torch.get_num_threads()} threads"
    precision = "fp16" if args.fp16 else "bf16" if args.bf16 else "float32"
    return f"{kind} ({name}), {precision}{'' if precision == 'float32' else ' mixed precision'}"


def hardware() -> dict[str, Any]:
    """Return what run.json says of the machine; no host name, no user."""
    return {
        "device": device(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cpu": platform.machine(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
    }
