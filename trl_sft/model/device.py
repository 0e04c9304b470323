"""The device and precision of this machine, and the settings that follow from them.

In: the sections `train:` and `quantization:` of the recipe. Out: settings for keys that the recipe does not set, each
with its reason; faults for what this machine or this version cannot do. These settings differ from upstream's defaults:
`docs/explanation/defaults-that-differ.md` lists all of them. Deliberately absent: free memory (`training.memory.fit`).
"""

from __future__ import annotations

import platform
from typing import Any

import torch
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig

from trl_sft import ranks
from trl_sft.errors import Fault, LaunchError
from trl_sft.recipe.checked import Run, Setting
from trl_sft.recipe.yaml_reader import Key

# With these arguments SFTConfig can be created on any machine. Without them it checks that the hardware exists.
ANY_MACHINE = {"use_cpu": True, "fp16": False, "tf32": None}


def check_machine(run: Run) -> None:
    """Refuse a machine on which the run cannot train. Raises LaunchError."""
    train = run.train
    if ranks.count() > 1:
        _check_process(run)
    if run.launch and ranks.count() == 1:
        from trl_sft.recipe import processes

        if faults := processes.check(run):
            raise LaunchError(faults)
    if torch.cuda.device_count() > 1 and ranks.count() == 1 and not train.get("use_cpu"):
        problem = f"{torch.cuda.device_count()} GPUs are visible, but this is one process"
        raise LaunchError(
            Fault(
                "CUDA_VISIBLE_DEVICES",
                problem,
                "Run `python -m trl_sft launch RECIPE`, or write CUDA_VISIBLE_DEVICES=0 before the command.",
                code="machine.several_gpus",
            )
        )
    if train.get("fp16") and (train.get("use_cpu") or get_device_type() == "cpu"):
        fix = "Remove fp16. On a CPU, use bf16: true together with use_cpu: true."
        raise LaunchError(Fault("train.fp16", "fp16 has no effect on a CPU", fix, code="machine.no_fp16"))


def _check_process(run: Run) -> None:
    """Refuse what one of several processes cannot do, which another launcher may have started. Raises LaunchError."""
    from trl_sft.recipe import processes

    if missing := ranks.find_missing_variables():
        problem = f"WORLD_SIZE says that this is one of {ranks.count()} processes, but {', '.join(missing)} is not set"
        fix = "Unset WORLD_SIZE, and run `python -m trl_sft launch RECIPE`."
        raise LaunchError(Fault("WORLD_SIZE", problem, fix, code="machine.several_processes"))
    if faults := processes.check_streaming(run, ranks.count()):
        raise LaunchError(faults)


def choose_machine_settings(train: dict[str, Any], quantization: dict[str, Any]) -> dict[Key, Setting]:
    """Return the settings that this machine needs and that these two sections of the recipe leave open."""
    settings: dict[Key, Setting] = {}
    cpu = train.get("use_cpu", False) or get_device_type() == "cpu"
    precision_is_open = train.get("bf16") is None and not train.get("fp16")
    if precision_is_open and (cpu or not is_torch_bf16_gpu_available()):
        reason = "the CPU trains in float32" if cpu else "this GPU has no bfloat16"
        settings["train", "bf16"] = Setting(False, reason)
        if not cpu and torch.cuda.is_available() and "fp16" not in train:
            settings["train", "fp16"] = Setting(True, "this GPU has no bfloat16")
    if cpu and ranks.count() > 1 and "use_cpu" not in train:
        reason = "accelerate 1.15 leaves the processes of a CPU without it to themselves"
        settings["train", "use_cpu"] = Setting(True, reason)
    if cpu and "dataloader_pin_memory" not in train:
        settings["train", "dataloader_pin_memory"] = Setting(False, "there is no accelerator to copy to")
    bf16 = train.get("bf16", ("train", "bf16") not in settings) and not train.get("fp16")
    if bf16 and quantization.get("load_in_4bit") and "bnb_4bit_compute_dtype" not in quantization:
        reason = "this machine trains in bfloat16; upstream's default for 4-bit weights is float32"
        settings["quantization", "bnb_4bit_compute_dtype"] = Setting("bfloat16", reason)
    return settings


def get_device_type() -> str:
    """Return the type of the device that the Trainer uses: cpu, cuda, mps, ..."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator else "cpu"


def describe_precision(args: SFTConfig, dtype: str, quantization: Any) -> str:
    """Return device and precision in one line.

    Args:
        args: The SFTConfig of the run.
        dtype: `model.dtype` of the recipe: float32, bfloat16, ..., auto.
        quantization: The BitsAndBytesConfig of the run; None = weights are not quantized.

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


def describe_hardware(*, use_cpu: bool) -> dict[str, Any]:
    """Return the description of the machine in run.json, without host name and user name.

    Args:
        use_cpu: `train.use_cpu`: the run computes on the CPU whatever else there is.

    """
    return {
        "device": "cpu" if use_cpu else get_device_type(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cpu": platform.machine(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
    }
