"""What this machine is, and the settings that follow from it: device, precision, pinned memory.

In: the recipe's SFTConfig keywords. Out: further keywords, each with its reason, only where the recipe
says nothing. These are departures from the owners' defaults, so the list is closed (docs/explanation).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub import constants, get_token
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import is_liger_kernel_available, is_torch_bf16_gpu_available
from trl import SFTConfig

from trl_sft.errors import Fault, LaunchError, MissingPackage
from trl_sft.recipe import processes
from trl_sft.recipe.checked import Run, Setting
from trl_sft.recipe.yaml_reader import Key

# What makes SFTConfig look for hardware, set so that it finds what it asks for on any machine.
ANYWHERE = {"use_cpu": True, "fp16": False, "tf32": None}


def check(run: Run) -> None:
    """Refuse a machine on which this version cannot train, and processes that it cannot start. Raises LaunchError."""
    train = run.train
    if faults := processes.check(run):
        raise LaunchError(faults)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        found = f"started as {os.environ['WORLD_SIZE']} processes; this version trains in one"
        raise LaunchError(Fault("WORLD_SIZE", found, "python -m trl_sft RECIPE, without a launcher"))
    if torch.cuda.device_count() > 1 and not train.get("use_cpu"):
        found = f"{torch.cuda.device_count()} GPUs are visible; this version trains on one"
        raise LaunchError(Fault("CUDA_VISIBLE_DEVICES", found, "CUDA_VISIBLE_DEVICES=0 before the command"))
    if train.get("fp16") and (train.get("use_cpu") or device() == "cpu"):
        raise LaunchError(
            Fault("train.fp16", "fp16 on a CPU changes nothing", "no fp16; bf16 with use_cpu: true works")
        )


def check_packages(run: Run) -> None:
    """Refuse what upstream would miss once training begins: a package, the hub to push to. Raises UserError."""
    if run.train.get("use_liger_kernel") and not is_liger_kernel_available():
        where = run.recipe.where(("train", "use_liger_kernel"))
        raise MissingPackage(Fault(where, "liger-kernel: not installed", "pip install liger-kernel, or leave it out"))
    if run.train.get("push_to_hub"):
        where = run.recipe.where(("train", "push_to_hub"))
        if constants.HF_HUB_OFFLINE:
            write = "leave it out, and push the folder later; or unset HF_HUB_OFFLINE"
            raise LaunchError(Fault(where, "a push to the hub, and HF_HUB_OFFLINE is set", write))
        if not (run.train.get("hub_token") or get_token()):
            raise LaunchError(Fault(where, "a push to the hub, and no token for it", "hf auth login, or HF_TOKEN"))


def check_trackers(where: str, names: Sequence[str]) -> None:
    """Refuse a tracker that is not installed, before the weights. Raises MissingPackage."""
    missing = sorted(set(names) & set(INTEGRATION_TO_CALLBACK) - set(get_available_reporting_integrations()))
    if missing:
        found = f"{', '.join(missing)}: not installed"
        raise MissingPackage(Fault(where, found, "pip install the tracker's package, or report_to: none"))


def settings(train: dict[str, Any], quantization: dict[str, Any]) -> dict[Key, Setting]:
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
    bf16 = train.get("bf16", ("train", "bf16") not in found) and not train.get("fp16")
    if bf16 and quantization.get("load_in_4bit") and "bnb_4bit_compute_dtype" not in quantization:
        why = "this machine trains in bfloat16; upstream computes with 4-bit weights in float32"
        found["quantization", "bnb_4bit_compute_dtype"] = Setting("bfloat16", why)
    return found


def device() -> str:
    """Return the kind of device that the Trainer takes."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator else "cpu"


def describe(args: SFTConfig, dtype: str, quantized: Any) -> str:
    """Return device and precision in one line, from the live arguments and the weights' dtype."""
    kind = args.device.type
    name = torch.cuda.get_device_name() if kind == "cuda" else f"{torch.get_num_threads()} threads"
    precision = "fp16" if args.fp16 else "bf16" if args.bf16 else "float32"
    mixed = "" if precision == "float32" else f"{precision} mixed precision, "
    saved = "the type they were saved in" if dtype == "auto" else dtype
    bits = "" if quantized is None else f"{'8-bit' if quantized.load_in_8bit else '4-bit'} linear layers, other "
    return f"{kind} ({name}), {mixed}{bits}weights in {saved}"


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
