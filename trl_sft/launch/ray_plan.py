"""What a launch hands to Ray: the cluster, the workers, and what is refused because Ray decides it.

Input: a checked recipe. Outputs: a `RayConfig` with every value that Ray gets, the text of a dry run, and faults of
keys and options that torchrun alone has. Not here: the keys and types of `launch.config` (`recipe.ray_config`), and
the workers (`launch.ray`).
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
from collections.abc import Sequence

from trl_sft.errors import Fault, LaunchError
from trl_sft.recipe import engines, ray_config
from trl_sft.recipe.checked import Run
from trl_sft.recipe.ray_config import RayConfig

LOCAL = "local"  # the address of a cluster that is started for the run, on this host
# Variables of this process and its workers. Ray would send statistics on its use, patch `print`, start
# one more actor, warn of CUDA_VISIBLE_DEVICES, and kill the processes of a worker before they save a checkpoint.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_kill_child_processes_on_worker_exit": "false",
}
_OBJECT_STORE = 100 * 2**20  # bytes: the workers exchange kilobytes, and Ray would take 30% of the memory
_OPTIONS = ("engine", "config", "nproc_per_node", "nnodes")  # of `launch:` that mean something to Ray


def find_address(run: Run) -> str:
    """Return the address of the cluster: as `launch.config` says, else RAY_ADDRESS, else `LOCAL`."""
    init = engines.read_config(run).get("init")
    written = init.get("address") if isinstance(init, dict) else None
    return str(written or os.environ.get("RAY_ADDRESS") or LOCAL)


def has_ray() -> bool:
    """Tell whether Ray is installed, with what Ray Train needs; nothing is imported."""
    return all(importlib.util.find_spec(name) is not None for name in ("ray", "tensorboardX"))


def check(run: Run, options: Sequence[str]) -> None:
    """Refuse what has no meaning under Ray, and a Python environment without it.

    Args:
        run: the checked recipe.
        options: those of the command line that torchrun alone has.

    Raises:
        LaunchError: a key or an option is torchrun's, or Ray is not installed.

    """
    faults = []
    for name in run.launch:
        if name not in _OPTIONS:
            problem = f"`{name}` is an option of torchrun, and Ray starts the processes"
            key = ("launch", name)
            faults.append(run.recipe.fault(key, problem, f"Remove `{name}`.", code="launch.impossible"))
    for option in options:
        problem = "Ray places the processes on the hosts of its cluster, so the command runs once"
        faults.append(Fault(option, problem, f"Remove {option}.", code="launch.impossible"))
    if not has_ray():
        problem = "`ray` needs Ray Train, which is not installed"
        fix = "Run `pip install 'trl-sft[ray]'` in this Python environment, or set `engine: ddp`."
        faults.append(run.recipe.fault(("launch", "engine"), problem, fix, code="package.missing"))
    if faults:
        raise LaunchError(faults)


def complete(run: Run, *, processes: int, uses_cards: bool) -> RayConfig:
    """Return every value that Ray gets. Raises RecipeError for keys of `launch.config` that Ray does not take.

    Args:
        run: the checked recipe.
        processes: how many train, on all hosts.
        uses_cards: whether each of them has a GPU.

    """
    config = ray_config.read(run, engines.read_config(run))
    scaling = {"num_workers": processes, "use_gpu": uses_cards} | config.scaling_config
    address = find_address(run)
    init = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    storage = {}
    if address == LOCAL:
        cpus = (scaling.get("resources_per_worker") or {}).get("CPU", 0 if uses_cards else 1)
        init |= {"num_cpus": max(os.cpu_count() or 1, math.ceil(processes * cpus))}
        init |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE}
    else:  # Ray Train writes a folder that all hosts see; nothing is left in it
        storage = {"storage_path": str(run.output_dir.parent), "name": f".{run.output_dir.name}.ray"}
    return RayConfig(init | config.init, scaling, storage | config.run_config)


def describe(config: RayConfig) -> list[str]:
    """Return the calls of Ray as lines of a shell's comments."""
    lines = [f"ray.init({_format(config.init)})", f"scaling_config = ScalingConfig({_format(config.scaling_config)})"]
    if config.run_config:
        lines.append(f"run_config = RunConfig({_format(config.run_config)})")
    return [f"# {line}" for line in [*lines, "TorchTrainer runs in each worker:"]]


def _format(values: dict[str, object]) -> str:
    """Return keyword arguments as Python writes them."""
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
