"""What this machine is, and the settings that follow from it: device, precision, pinned memory.

In: the recipe's keywords of SFTConfig. Out: further keywords, each with its reason, only where the recipe says nothing;
refusals of what this machine or this version cannot do. These settings depart from upstream's defaults, so their list
is closed (docs/explanation). Deliberately absent: free memory (`training.memory.fit`).
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

# Arguments with which SFTConfig can be made on any machine: it looks for the hardware that it needs.
ANY_MACHINE = {"use_cpu": True, "fp16": False, "tf32": None}


def check_machine(run: Run) -> None:
    """Refuse a machine on which this version cannot train, and processes that it cannot start. Raises LaunchError."""
    train = run.train
    if faults := processes.check(run):
        raise LaunchError(faults)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        problem = f"started as {os.environ['WORLD_SIZE']} processes; this version trains in one"
        raise LaunchError(Fault("WORLD_SIZE", problem, "Run `python -m trl_sft RECIPE` without a launcher."))
    if torch.cuda.device_count() > 1 and not train.get("use_cpu"):
        problem = f"{torch.cuda.device_count()} GPUs are visible; this version trains on one"
        raise LaunchError(Fault("CUDA_VISIBLE_DEVICES", problem, "Write CUDA_VISIBLE_DEVICES=0 before the command."))
    if train.get("fp16") and (train.get("use_cpu") or get_device_type() == "cpu"):
        fix = "Remove fp16; bf16 with use_cpu: true works."
        raise LaunchError(Fault("train.fp16", "fp16 on a CPU changes nothing", fix))


def check_packages(run: Run) -> None:
    """Refuse what upstream would miss only once training begins. Raises MissingPackage, LaunchError."""
    if run.train.get("use_liger_kernel") and not is_liger_kernel_available():
        where = run.recipe.where(("train", "use_liger_kernel"))
        fix = "Run `pip install liger-kernel`, or remove the key."
        raise MissingPackage(Fault(where, "liger-kernel is not installed", fix))
    if run.train.get("push_to_hub"):
        where = run.recipe.where(("train", "push_to_hub"))
        if constants.HF_HUB_OFFLINE:
            fix = "Remove it and push the folder later; or unset HF_HUB_OFFLINE."
            raise LaunchError(Fault(where, "a push to the hub, while HF_HUB_OFFLINE is set", fix))
        if not (run.train.get("hub_token") or get_token()):
            fix = "Run `hf auth login`, or set HF_TOKEN."
            raise LaunchError(Fault(where, "a push to the hub without a token", fix))


def check_trackers(where: str, names: Sequence[str]) -> None:
    """Refuse trackers that are not installed, before the weights load. Raises MissingPackage."""
    missing = sorted(set(names) & set(INTEGRATION_TO_CALLBACK) - set(get_available_reporting_integrations()))
    if missing:
        fix = "Install the tracker's package with pip, or write report_to: none."
        raise MissingPackage(Fault(where, f"not installed: {', '.join(missing)}", fix))


def choose_machine_settings(train: dict[str, Any], quantization: dict[str, Any]) -> dict[Key, Setting]:
    """Return what this machine needs where the recipe says nothing. `train` and `quantization` are its sections."""
    settings: dict[Key, Setting] = {}
    cpu = train.get("use_cpu", False) or get_device_type() == "cpu"
    precision_is_open = train.get("bf16") is None and not train.get("fp16")
    if precision_is_open and (cpu or not is_torch_bf16_gpu_available()):
        reason = "the CPU trains in float32" if cpu else "this GPU has no bfloat16"
        settings["train", "bf16"] = Setting(False, reason)
        if not cpu and torch.cuda.is_available() and "fp16" not in train:
            settings["train", "fp16"] = Setting(True, "this GPU has no bfloat16")
    if cpu and "dataloader_pin_memory" not in train:
        settings["train", "dataloader_pin_memory"] = Setting(False, "there is no accelerator to copy to")
    bf16 = train.get("bf16", ("train", "bf16") not in settings) and not train.get("fp16")
    if bf16 and quantization.get("load_in_4bit") and "bnb_4bit_compute_dtype" not in quantization:
        reason = "this machine trains in bfloat16; upstream computes with 4-bit weights in float32"
        settings["quantization", "bnb_4bit_compute_dtype"] = Setting("bfloat16", reason)
    return settings


def get_device_type() -> str:
    """Return the type of the device that the Trainer takes: cpu, cuda, mps, ..."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator else "cpu"


def describe_precision(args: SFTConfig, dtype: str, quantization: Any) -> str:
    """Return device and precision in one line.

    Args:
        args: The live arguments.
        dtype: `model.dtype` of the recipe: float32, bfloat16, ..., auto.
        quantization: The live BitsAndBytesConfig; None = no quantized weights.

    """
    device_type = args.device.type
    name = torch.cuda.get_device_name() if device_type == "cuda" else f"{torch.get_num_threads()} threads"
    precision = ""
    if args.fp16 or args.bf16:
        precision = f"{'fp16' if args.fp16 else 'bf16'} mixed precision, "
    saved = "the type they were saved in" if dtype == "auto" else dtype
    layers = ""
    if quantization is not None:
        layers = f"{'8-bit' if quantization.load_in_8bit else '4-bit'} linear layers, other "
    return f"{device_type} ({name}), {precision}{layers}weights in {saved}"


def describe_hardware() -> dict[str, Any]:
    """Return what run.json says of the machine; no host name, no user name."""
    return {
        "device": get_device_type(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cpu": platform.machine(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
    }
