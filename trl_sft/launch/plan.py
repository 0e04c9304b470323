"""What a launch runs: how many processes, on which hosts, with which options of torchrun.

Inputs: a checked recipe, and the options of the command line. Outputs: a `LaunchPlan`, the text that `--dry-run`
prints, and faults of what this machine cannot launch. Not here: the processes themselves (`torchrun`, `ray`).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from trl_sft import ranks
from trl_sft.errors import Fault, LaunchError
from trl_sft.launch import ray_plan
from trl_sft.recipe import engines, parallelism, processes
from trl_sft.recipe.checked import Run
from trl_sft.recipe.ray_config import RayConfig

_PORT = 29500  # torchrun's own default
_ALONE = "Remove `standalone`, and add --host ADDRESS and --host-rank NUMBER to the command of each host."
_OF_HOSTS = ("nnodes", "nproc_per_node", "node_rank", "master_addr", "master_port")
_CPU_ENGINES = (engines.DDP, engines.RAY, *engines.STAGES)  # accelerate makes DDP of FSDP on a CPU, without a word


@dataclass(frozen=True)
class HostOptions:
    """What the command line says about processes and hosts; None = the recipe, or torchrun's own default."""

    processes: int | None = None  # on this host
    hosts: int | None = None
    host_rank: int | None = None  # number of this host, from 0
    host: str | None = None  # where host 0 listens
    port: int | None = None


@dataclass(frozen=True)
class LaunchPlan:
    """Everything that a launch runs on this host."""

    engine: str
    processes: int  # on this host
    hosts: int
    host_rank: int
    host: str  # where host 0 listens; "" = there is one host
    port: int
    options: tuple[str, ...]  # of torchrun, in front of the program
    arguments: tuple[str, ...]  # of each process, after `python -m trl_sft`
    environment: dict[str, str]  # that is set for the processes
    ray: RayConfig | None = None  # what Ray gets; None = torchrun starts the processes

    @property
    def total(self) -> int:
        """The number of processes on all hosts."""
        return self.processes * self.hosts

    @property
    def words(self) -> list[str]:
        """The arguments of torchrun, or those of Python in each worker of Ray."""
        return [*self.options, "-m", "trl_sft", *self.arguments]

    def describe(self) -> str:
        """Return the environment and the command, as a shell would run them."""
        module = [] if self.ray else ["-m", "torch.distributed.run"]
        command = shlex.join([sys.executable, *module, *self.words])
        variables = [f"{name}={shlex.quote(value)} \\" for name, value in self.environment.items()]
        return "\n".join([*(ray_plan.describe(self.ray) if self.ray else []), *variables, command])

    def summarize(self) -> str:
        """Return processes, hosts and engine in one line."""
        hosts = "" if self.hosts == 1 else f" on each of {self.hosts} hosts, {self.total} in all, this is host"
        hosts += "" if self.hosts == 1 else f" {self.host_rank}"
        return f"{self.processes} process{'es' * (self.processes > 1)}{hosts}, engine {self.engine}"


def needs_processes(run: Run) -> bool:
    """Tell whether a run takes several processes: its recipe asks for them, or this host has several cards."""
    if processes.check(run):
        return True
    is_open = run.launch.get("nproc_per_node") is None and not run.train.get("use_cpu")
    return is_open and _may_have_several_cards() and count_cards() > 1


def make_plan(run: Run, options: HostOptions, *, elsewhere: bool = False) -> LaunchPlan:
    """Return what a launch runs on this host.

    Args:
        run: the checked recipe.
        options: of the command line.
        elsewhere: the run is for other hosts, so what this one lacks is no fault.

    Raises:
        LaunchError: this host cannot run it.
        RecipeError: the batch size cannot be divided, or `launch.config` is for another engine.

    """
    launch = run.launch
    if engines.get_engine(run) == engines.RAY:
        return _make_ray_plan(run, options, unfit=["--slurm"] if elsewhere else [])
    hosts = options.hosts or _read_number(run, "nnodes", 1)
    number = options.processes or _count_processes(run)
    host_rank = options.host_rank if options.host_rank is not None else int(launch.get("node_rank") or 0)
    has_rendezvous = any(name.startswith("rdzv_") or name == "standalone" for name in launch)
    plan = LaunchPlan(
        engine=engines.get_engine(run),
        processes=number,
        hosts=hosts,
        host_rank=host_rank,
        host="" if hosts == 1 or has_rendezvous else options.host or launch.get("master_addr") or "",
        port=options.port or int(launch.get("master_port") or _PORT),
        options=(),
        arguments=tuple(run.recipe.arguments),
        environment=_choose_environment(number),
    )
    if hosts > 1 and not plan.host and not has_rendezvous and not elsewhere:
        fix = "Add --host ADDRESS (of host 0) and --host-rank NUMBER to the command of each host."
        raise _impossible(run, "nnodes", f"the run takes {hosts} hosts, but nothing says where they meet", fix=fix)
    if not 0 <= host_rank < hosts:
        problem = f"this is host {host_rank} of {hosts}, and hosts are counted from 0"
        fix = f"Add --host-rank with a number from 0 to {hosts - 1}."
        fix = "Add --hosts NUMBER, or remove the number of the host." if hosts == 1 else fix
        raise _impossible(run, "node_rank", problem, fix=fix)
    _check_meeting(run, options, hosts=hosts, has_rendezvous=has_rendezvous)
    if not elsewhere:
        _check(run, plan, cards=0 if run.train.get("use_cpu") else count_cards())
    processes.compute_settings(run, plan.total)
    engines.build_arguments(run)
    return replace(plan, options=tuple(_list_options(run, plan, has_rendezvous=has_rendezvous)))


def _make_ray_plan(run: Run, options: HostOptions, *, unfit: list[str]) -> LaunchPlan:
    """Return the plan of a run whose processes Ray starts, on the hosts of its cluster. Raises as `make_plan` does."""
    of_torchrun = {"--host-rank": options.host_rank, "--host": options.host, "--port": options.port}
    ray_plan.check(run, [*unfit, *(name for name, value in of_torchrun.items() if value is not None)])
    is_local = ray_plan.find_address(run) == ray_plan.LOCAL
    hosts = options.hosts or _read_number(run, "nnodes", 1)
    total = hosts * (options.processes or _count_processes(run, counts_cards=is_local))
    uses_cards = not run.train.get("use_cpu") and (not is_local or count_cards() > 0)
    variables = _choose_environment(total) if is_local else {}
    variables |= {name: value for name, value in ray_plan.ENVIRONMENT.items() if name not in os.environ}
    plan = LaunchPlan(
        engine=engines.RAY,
        processes=total,
        hosts=1,  # for this command, which runs once
        host_rank=0,
        host="",
        port=0,
        options=(),
        arguments=tuple(run.recipe.arguments),
        environment=variables,
        ray=ray_plan.complete(run, processes=total, uses_cards=uses_cards),
    )
    _check(run, plan, cards=count_cards() if uses_cards and is_local else 0)
    processes.compute_settings(run, total)
    return plan


def _check_meeting(run: Run, options: HostOptions, *, hosts: int, has_rendezvous: bool) -> None:
    """Refuse a place to meet that the hosts of a run do not use, and one that cannot be. Raises LaunchError."""
    if hosts > 1 and run.launch.get("standalone"):
        raise _impossible(run, "standalone", f"`standalone` is for one host, and the run takes {hosts}", fix=_ALONE)
    places = {"--host": options.host, "--port": options.port}
    places |= {f"launch.{name}": run.launch.get(name) for name in ("master_addr", "master_port")}
    for where, value in places.items():
        if value is None or (hosts > 1 and not has_rendezvous):
            continue
        reason = "the run takes one host" if hosts == 1 else "the hosts meet as `launch.rdzv_...` says"
        problem = f"{value} has no effect: {reason}"
        raise LaunchError(Fault(where, problem, f"Remove {where}, or add --hosts NUMBER.", code="launch.impossible"))
    port = options.port or run.launch.get("master_port") or _PORT
    if not 0 < int(port) < 2**16:
        problem = f"{port} is no port"
        raise LaunchError(Fault("--port", problem, "Write a number from 1 to 65535.", code="launch.impossible"))


def check_place() -> None:
    """Refuse a launch inside a launch: each of several processes would start processes of its own. Raises LaunchError.

    torchrun sets WORLD_SIZE, and srun SLURM_STEP_TASKS_PER_NODE ("8", "1(x2)").
    """
    if ranks.count() > 1:
        problem = f"WORLD_SIZE says that this is one of {ranks.count()} processes, and each would start processes"
        fix = "Run `python -m trl_sft RECIPE` under the other launcher, or unset WORLD_SIZE."
        raise LaunchError(Fault("WORLD_SIZE", problem, fix, code="machine.several_processes"))
    tasks = re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if tasks and int(tasks[0]) > 1:
        problem = f"srun runs this command {tasks[0]} times on a host, and each would start processes"
        fix = "Add --ntasks-per-node=1 to srun: `launch` starts the processes of its host."
        raise LaunchError(Fault("SLURM_STEP_TASKS_PER_NODE", problem, fix, code="machine.several_processes"))


def _list_options(run: Run, plan: LaunchPlan, *, has_rendezvous: bool) -> Iterator[str]:
    """Yield the options of torchrun; those of the recipe are handed on as they are."""
    yield f"--nnodes={plan.hosts}"
    yield f"--nproc-per-node={plan.processes}"
    if plan.host:
        yield from (f"--node-rank={plan.host_rank}", f"--master-addr={plan.host}", f"--master-port={plan.port}")
    elif not has_rendezvous:
        yield "--standalone"
    for name, value in run.launch.items():
        if name not in (*_OF_HOSTS, "engine", "config"):
            option = f"--{name.replace('_', '-')}"
            yield option if value is True else f"{option}={value}"


def count_cards() -> int:
    """Return how many cards torch sees on this host."""
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def has_package(name: str) -> bool:
    """Tell whether a package is installed; it is not imported."""
    return importlib.util.find_spec(name) is not None


def _check(run: Run, plan: LaunchPlan, *, cards: int) -> None:
    """Refuse what a host with so many cards that the run may use cannot run. Raises LaunchError."""
    key = ("launch", "engine")
    if cards and plan.processes > cards:
        problem = f"{plan.processes} processes on a host with {cards} card{'s' * (cards > 1)}"
        fix = f"Add --processes {cards}, or set `nproc_per_node: {cards}`."
        raise _impossible(run, "nproc_per_node", problem, fix=fix)
    if faults := processes.check_streaming(run, plan.total):
        raise LaunchError(faults)
    if plan.total == 1 and plan.engine != engines.DDP:
        fix = "Add --processes with a larger number, or set `engine: ddp`."
        raise _impossible(run, "engine", f"`{plan.engine}` is for several processes, and the run has one", fix=fix)
    if not cards and plan.engine not in _CPU_ENGINES:
        problem = "FSDP needs a card for each process, and this host has none that the run may use"
        fix = "Set `engine: ddp`, or run on a machine with GPUs."
        raise LaunchError(run.recipe.fault(key, problem, fix, code="launch.engine_needs_card"))
    divided = parallelism.find_key({"train": run.train, "model": run.model})
    if not cards and divided is not None:
        problem = "accelerate divides layers and rows among cards alone, and this host has none that the run may use"
        fix = "Remove the key, or run on a machine with GPUs."
        raise LaunchError(run.recipe.fault(divided, problem, fix, code="launch.engine_needs_card"))
    if plan.engine in engines.STAGES and not has_package("deepspeed"):
        problem = f"`{plan.engine}` needs DeepSpeed, which is not installed"
        fix = "Run: pip install 'trl-sft[deepspeed]' (it needs a C++ compiler), or set `engine: fsdp`."
        raise LaunchError(run.recipe.fault(key, problem, fix, code="package.missing"))


def _impossible(run: Run, name: str, problem: str, *, fix: str) -> LaunchError:
    """Return the error of a key of `launch:` that this host cannot carry out."""
    return LaunchError(run.recipe.fault(("launch", name), problem, fix, code="launch.impossible"))


def _count_processes(run: Run, *, counts_cards: bool = True) -> int:
    """Return the processes of this host: as the recipe says, else one for each card. Raises LaunchError."""
    written = str(run.launch.get("nproc_per_node", "auto"))
    if written.isdecimal():
        return int(written)
    cards = 0 if run.train.get("use_cpu") or written == "cpu" or not counts_cards else count_cards()
    if cards:
        return cards
    reason = "this host has no card" if counts_cards else "the cards of a Ray cluster are not counted"
    fix = "Add --processes NUMBER, or set `launch: {nproc_per_node: NUMBER}`."
    raise _impossible(run, "nproc_per_node", f"{reason}, so the number of processes is not known", fix=fix)


def _read_number(run: Run, name: str, default: int) -> int:
    """Return a whole number of `launch:`. Raises LaunchError for a range, as torchrun's elastic jobs have."""
    value = str(run.launch.get(name, default))
    low, _, high = value.partition(":")
    if high and high != low:
        problem = f"`{name}` is {value}, and a run whose number of hosts changes cannot keep its batch size"
        raise _impossible(run, name, problem, fix=f"Set `{name}: {high}`.")
    return int(low)


def _choose_environment(number: int) -> dict[str, str]:
    """Return the variables that the processes need and that are not set: their share of this host's processors."""
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, available // number))}


def _may_have_several_cards() -> bool:
    """Tell, without torch, whether this host may have several cards: torch takes a second to import."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return "," in visible
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*"))) > 1 or Path("/dev/kfd").exists()
