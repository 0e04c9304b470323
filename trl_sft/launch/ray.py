"""Runs the processes of a plan in the workers of Ray Train, on this host or on those of a cluster.

Each worker of a `TorchTrainer` starts the same command as torchrun does, as a process of its own: Ray runs a function
in a thread, where no signal can be handled, and the process keeps signals, exit codes and the run folder as they are.
An actor is the mailbox between this process and the workers: output and endings come from them, signals go to them. Ray
Train forms no process group (each GPU would hold a context for it); the processes form theirs.
Inputs: a `LaunchPlan` with what Ray gets. Output: files of endings, as torchrun's processes leave them.
Not here: what Ray gets (`ray_plan`). Written for Ray 2.60.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from trl_sft import console, errors, ranks
from trl_sft.errors import Fault, LaunchError
from trl_sft.launch import ray_plan
from trl_sft.launch.plan import LaunchPlan
from trl_sft.launch.supervisor import KilledProcess, Processes

_POLL = 0.2  # seconds between two looks into the mailbox
_STARTING = 300.0  # seconds in which a cluster must start the workers
_STOPPING = 30.0  # seconds that the other processes have after one has failed, as under torchrun
_ORPHANED = 60.0  # seconds that processes whose workers are gone have to save a checkpoint
_UNREACHABLE = 10.0  # seconds in which the address of a cluster must answer
_SHOWN = 16 * 2**10  # bytes of the end of a failed process's output
# Beginnings of the variables that processes on other hosts get too; paths and cards of this host stay here.
_HANDED_ON = tuple(
    "ACCELERATE_ AWS_ CLEARML_ COMET_ DS_ FSSPEC_ GLOO_ HF_ HUGGING MLFLOW_ NCCL_ OMP_ PYTHONPATH PYTORCH_ TOKENIZERS_"
    " TORCH_ TQDM_ TRACKIO_ TRANSFORMERS_ TRL_SFT_ WANDB_".split()
)


class _Message(NamedTuple):
    """What a worker sends: that its process started, lines of output, or how the process ended."""

    number: int  # of the process
    output: tuple[str, str] = ("", "")  # whole lines for standard output and standard error
    exit_code: int | None = None  # of the process, negative for a signal; None = it runs
    ending: bytes = b""  # the file that the process left
    last_output: bytes = b""  # of a process whose output goes to a file


class _Mailbox:
    """Becomes an actor: keeps the messages of the workers for this process, and its signals for them."""

    def __init__(self) -> None:
        self._messages: list[_Message] = []
        self._signals: list[int] = []

    def exchange(self, message: _Message) -> list[int]:
        """Leave a message; return all signals so far."""
        self._messages.append(message)
        return self._signals

    def take(self, signals: list[int]) -> list[_Message]:
        """Set the signals; return the messages since the last call."""
        self._signals = signals
        messages, self._messages = self._messages, []
        return messages


class _Workers:
    """What is known of the workers: who started, who ended, and which signals they get."""

    def __init__(self, plan: LaunchPlan, processes: Processes) -> None:
        self.plan = plan
        self.processes = processes
        self.started: set[int] = set()
        self.exit_codes: dict[int, int] = {}
        self.signals: list[int] = []  # that the workers get: those of the user, and those that end the others
        self._kill_at = float("inf")

    def has_ended(self) -> bool:
        """Tell whether every process has ended."""
        return len(self.exit_codes) == self.plan.total

    def read(self, message: _Message) -> None:
        """Print the output of a process, and keep how it ended."""
        self.started.add(message.number)
        for text, say in zip(message.output, (console.say, console.say_error), strict=True):
            for line in text.splitlines():
                say(line)
        if message.exit_code is None:
            return
        self.exit_codes[message.number] = message.exit_code
        folder = self.processes.folder
        if message.last_output:
            (folder / f"{message.number}.txt").write_bytes(message.last_output)
        if message.ending:
            (folder / f"{message.number}.ending").write_bytes(message.ending)
        if message.exit_code and self._kill_at == float("inf"):
            if message.exit_code < 0:
                cause = signal.Signals(-message.exit_code)
                self.processes.killed = KilledProcess(message.number, cause.name, is_memory=cause == signal.SIGKILL)
            self.stop_others()

    def stop_others(self) -> None:
        """End the processes that are left: one has failed, and they wait for it."""
        self.signals.append(signal.SIGTERM)
        self._kill_at = time.monotonic() + _STOPPING

    def choose_signals(self) -> list[int]:
        """Return all signals that the workers get by now."""
        if (time.monotonic() > self._kill_at or self.processes.must_kill()) and signal.SIGKILL not in self.signals:
            self.signals.append(signal.SIGKILL)
        return [*self.processes.signals, *self.signals]


def run(plan: LaunchPlan, processes: Processes) -> None:
    """Run the processes in workers of Ray Train until all have ended.

    Raises:
        LaunchError: the cluster does not answer, refuses, or does not start the workers in time.

    """
    assert plan.ray is not None
    _connect(plan.ray.init, processes.folder)
    processes.handle_signals()  # Ray has put a handler of its own for SIGTERM
    import ray

    try:
        workers = _Workers(plan, processes)
        mailbox = ray.remote(num_cpus=0)(_Mailbox).remote()
        failures: list[BaseException] = []
        fit = functools.partial(_fit, plan, mailbox, folder=processes.folder, failures=failures)
        thread = threading.Thread(target=fit, daemon=True, name="Ray Train")
        thread.start()
        _watch(workers, mailbox, thread)
        thread.join(_STOPPING if workers.has_ended() else 0)
        if failures and not workers.has_ended():
            _explain(workers, failures[0])
    finally:
        ray.shutdown()
        _wait_for_orphans(processes.folder)
        if "name" in plan.ray.run_config and plan.ray.run_config["name"].endswith(".ray"):
            shutil.rmtree(Path(plan.ray.run_config["storage_path"]) / plan.ray.run_config["name"], ignore_errors=True)


def _connect(init: Mapping[str, Any], folder: Path) -> None:
    """Start the cluster of this run, or connect to the one at an address. Raises LaunchError."""
    address = init["address"]
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "/" not in host:  # Ray itself would wait for minutes, and end this process
        try:
            socket.create_connection((host, int(port)), timeout=_UNREACHABLE).close()
        except OSError as error:
            raise _refusal(address, error.strerror or str(error)) from None
    import ray

    is_short = len(str(folder)) < 40  # the path of a socket has at most 107 characters
    temporary = {"_temp_dir": str(folder / "ray")} if address == ray_plan.LOCAL and is_short else {}
    try:
        ray.init(**(temporary | dict(init)))
    except Exception as error:
        raise _refusal(address, errors.first_line(error)) from None


def _refusal(address: str, reason: str) -> LaunchError:
    """Return the error of a cluster that cannot be used."""
    problem = f"the Ray cluster at {address} cannot be used: {reason}"
    if address == ray_plan.LOCAL:
        problem = f"Ray cannot start on this host: {reason}"
    fix = "Correct `launch.config` (init) or RAY_ADDRESS; `ray status` says whether a cluster runs."
    return LaunchError(Fault("Ray", problem, fix, code="launch.no_cluster"))


def _fit(plan: LaunchPlan, mailbox: Any, *, folder: Path, failures: list[BaseException]) -> None:
    """Run the trainer of Ray Train, and keep the error with which it ends."""
    assert plan.ray is not None
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        settings = {"storage_path": str(folder), "name": "ray_train"} | plan.ray.run_config
        failure_config = FailureConfig(max_failures=0, max_preemption_failures=0)
        instructions = {
            "mailbox": mailbox,
            "arguments": plan.arguments,
            "environment": {name: value for name, value in os.environ.items() if name.startswith(_HANDED_ON)},
            "folder": str(Path.cwd()),
            "endings": str(folder / "workers"),
        }
        TorchTrainer(
            _work,
            train_loop_config=instructions,
            torch_config=_make_torch_config(),
            scaling_config=ScalingConfig(**plan.ray.scaling_config),
            run_config=RunConfig(**settings, failure_config=failure_config),
        ).fit()
    except BaseException as error:
        failures.append(error)


def _make_torch_config() -> Any:
    """Return a configuration of Ray Train that sets CUDA_VISIBLE_DEVICES as for torch, and forms no process group."""
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig

    class NoProcessGroup(Backend):
        """Leaves the process group to the processes."""

        share_cuda_visible_devices = True

    class TorchConfigOfProcesses(TorchConfig):
        """What Ray Train does around the function of a worker: nothing."""

        backend_cls = NoProcessGroup
        train_func_context = contextlib.nullcontext

    return TorchConfigOfProcesses(backend="gloo")


def _watch(workers: _Workers, mailbox: Any, thread: threading.Thread) -> None:
    """Read the mailbox until every process has ended, or Ray Train has. Raises LaunchError."""
    import ray

    limit = float(os.environ.get("TRL_SFT_MEETING_SECONDS", _STARTING))
    until = time.monotonic() + limit
    while not workers.has_ended():
        runs = thread.is_alive()
        try:
            messages = ray.get(mailbox.take.remote(workers.choose_signals()))
        except ray.exceptions.RayError as error:
            problem = f"the Ray cluster is gone: {errors.first_line(error)}"
            fix = "Start the cluster, then run the same command again: it resumes from the last checkpoint."
            raise LaunchError(Fault("Ray", problem, fix, code="launch.no_cluster")) from None
        for message in messages:
            workers.read(message)
        has_only_signals = bool(workers.processes.signals) and not workers.started
        if not runs or has_only_signals:
            return
        if len(workers.started) < workers.plan.total and time.monotonic() > until:
            raise LaunchError(_describe_full_cluster(workers, limit))
        time.sleep(_POLL)


def _describe_full_cluster(workers: _Workers, limit: float) -> Fault:
    """Return the fault of a cluster that has not started all workers in time."""
    import ray

    assert workers.plan.ray is not None
    total = workers.plan.total
    free = {name: ray.available_resources().get(name, 0) for name in ("CPU", "GPU")}
    problem = (
        f"Ray has started {len(workers.started)} of {total} workers after {limit:.0f} s; free in the cluster are"
        f" {free['CPU']:g} CPUs and {free['GPU']:g} GPUs, and each worker takes"
        f" {_describe_resources(workers.plan.ray.scaling_config)}"
    )
    fix = "Free the cluster, lower --processes or `scaling_config.resources_per_worker`, or set `train.use_cpu: true`."
    return Fault("Ray", problem, fix, code="launch.no_cluster")


def _describe_resources(scaling: Mapping[str, Any]) -> str:
    """Return what a worker takes, as Ray counts it."""
    needed = scaling.get("resources_per_worker") or {"GPU" if scaling["use_gpu"] else "CPU": 1}
    return ", ".join(f"{number:g} {name}" for name, number in needed.items())


def _explain(workers: _Workers, failure: BaseException) -> None:
    """Keep why Ray Train ended before the processes did."""
    import ray

    lost: dict[int, BaseException] = getattr(failure, "worker_failures", None) or {}
    number, error = next(iter(sorted(lost.items())), (0, failure))
    # the second name: what Ray Train makes of a worker that does not answer (its internal WorkerHealthCheckFailedError)
    if isinstance(error, ray.exceptions.RayError) or "WorkerHealthCheck" in type(error).__name__:
        cause = f"the end of its Ray worker ({errors.first_line(error)})"
        workers.processes.killed = KilledProcess(number, cause, is_memory=True)
    else:
        fix = "Correct what the message says; `launch.config` is handed on to Ray."
        problem = f"Ray Train ended before the run: {errors.first_line(error)}"
        workers.processes.fault = Fault("Ray", problem, fix, code="launch.no_cluster")


def _wait_for_orphans(folder: Path) -> None:
    """Wait until the processes on this host whose workers are gone have saved: they lock the run folder until then."""
    until = time.monotonic() + _ORPHANED
    for path in (folder / "workers").glob("*.pid"):
        while Path(f"/proc/{path.read_text()}").exists() and time.monotonic() < until:
            time.sleep(_POLL)


def _work(instructions: dict[str, Any]) -> None:
    """Run one process of the run inside a worker of Ray, and tell the mailbox what it does."""
    from ray.train import collective, get_context

    context = get_context()
    number = context.get_world_rank()
    host, port = collective.broadcast_from_rank_zero(_choose_meeting() if number == 0 else None)
    folder = Path(instructions["endings"])
    folder.mkdir(parents=True, exist_ok=True)
    variables = {
        "RANK": number,
        "LOCAL_RANK": context.get_local_rank(),
        "WORLD_SIZE": context.get_world_size(),
        "LOCAL_WORLD_SIZE": context.get_local_world_size(),
        "GROUP_RANK": context.get_node_rank(),
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        ranks.FOLDER: folder,
    }
    environment = os.environ | instructions["environment"] | {name: str(value) for name, value in variables.items()}
    _run_process(instructions, environment, number=number, folder=folder)
    collective.barrier()
    if context.get_local_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)


def _choose_meeting() -> tuple[str, int]:
    """Return the address of this host and a free port, where the processes form their group."""
    import ray

    with socket.socket() as free:
        free.bind(("", 0))
        return ray.util.get_node_ip_address(), free.getsockname()[1]


def _run_process(instructions: Mapping[str, Any], environment: Mapping[str, str], *, number: int, folder: Path) -> None:
    """Start the process, and exchange its output for signals until it has ended.

    Its output goes to files, not to pipes: if the worker is killed, the process can still write while it saves.
    """
    import ray

    mailbox, sent = instructions["mailbox"], 0
    paths = [folder / f"{number}.{name}" for name in ("stdout", "stderr")]
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(path.open("wb")) for path in paths]
        readers = [stack.enter_context(path.open(encoding="utf-8", errors="replace")) for path in paths]
        process = subprocess.Popen(
            [sys.executable, "-m", "trl_sft", *instructions["arguments"]],
            cwd=instructions["folder"],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=writers[0],
            stderr=writers[1],
        )
        try:
            while (exit_code := process.poll()) is None:
                message = _Message(number, (_read_lines(readers[0]), _read_lines(readers[1])))
                signals = ray.get(mailbox.exchange.remote(message))
                sent = _send(process, signals, sent=sent, announcement=folder / f"{number}.pid")
                time.sleep(_POLL)
            ray.get(mailbox.exchange.remote(_describe_end(number, exit_code, readers=readers, folder=folder)))
        except ray.exceptions.RayError:  # the command that launched the run is gone
            process.terminate()
            process.wait()


def _send(process: subprocess.Popen[bytes], signals: list[int], *, sent: int, announcement: Path) -> int:
    """Send a process the signals that it has not got, once it handles them; return how many it has got."""
    if signal.SIGKILL in signals:
        process.kill()
    elif announcement.exists():
        for number in signals[sent:]:
            process.send_signal(number)
        return len(signals)
    return sent


def _read_lines(reader: TextIO) -> str:
    """Return the whole lines that were written since the last call."""
    position, text = reader.tell(), reader.read()
    lines, _, rest = text.rpartition("\n")
    if rest:
        reader.seek(position)
        return reader.read(len(lines) + 1) if lines else ""
    return text


def _describe_end(number: int, exit_code: int, *, readers: Sequence[TextIO], folder: Path) -> _Message:
    """Return the last message on a process."""
    ending, log = folder / f"{number}.ending", folder / f"{number}.txt"
    return _Message(
        number,
        (readers[0].read(), readers[1].read()),
        exit_code,
        ending.read_bytes() if ending.is_file() else b"",
        log.read_bytes()[-_SHOWN:] if exit_code and log.is_file() else b"",
    )
