"""Runs torchrun for a plan, sends signals on to the processes, and turns their endings into one exit code.

torchrun runs in a thread of this process: it tells which process failed and how, where its command ends with 1 for
every failure, and the main thread keeps the signals. A signal to this process reaches every process of the host, which
save and stop together as one process does. Inputs: a `LaunchPlan`. Output: an exit code. Not here: the plan, and what
the processes do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from trl_sft import console, errors, json_output, ranks
from trl_sft.errors import Fault, LaunchError
from trl_sft.launch import endings
from trl_sft.launch.endings import Ending
from trl_sft.launch.plan import LaunchPlan

_SIGNALS = ("SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1")
_GRACE = 10.0  # seconds after a second signal until the processes are killed
_MEETING = 300.0  # seconds in which the hosts must meet
_SHOWN = 25  # lines of the output of a process that failed


class _Processes:
    """The processes of this host: signals reach them, and torchrun's thread waits for them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.signals: list[int] = []
        self.error: BaseException | None = None  # with which torchrun ended
        self._preparation: subprocess.Popen[bytes] | None = None
        self._killed_at = float("inf")
        self._waited = 0.0  # seconds since a signal in which no process started
        self._sent: dict[int, int] = {}  # process id -> signals that it has got

    def send(self, number: int, _frame: FrameType | None = None) -> None:
        """Send a signal to every process; the second one also starts the time after which they are killed."""
        self.signals.append(number)
        if len(self.signals) > 1:
            self._killed_at = min(self._killed_at, time.monotonic() + _GRACE)
        if self._preparation is not None:
            self._preparation.send_signal(signal.SIGINT)
        self._forward()

    def _forward(self) -> None:
        """Send every process the signals that it has not got, also to one that has just started."""
        for process_id in endings.list_process_ids(self.folder):
            for number in self.signals[self._sent.get(process_id, 0) :]:
                self._sent[process_id] = self._sent.get(process_id, 0) + 1
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process_id, number)

    def prepare(self, command: list[str]) -> int:
        """Run a command in front of the processes; return its exit code."""
        self._preparation = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            return self._preparation.wait()
        finally:
            self._preparation = None

    def run(self, words: list[str]) -> None:
        """Run torchrun until all processes have ended."""
        thread = threading.Thread(target=self._run_torchrun, args=(words,), daemon=True, name="torchrun")
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
            self._forward()
            if time.monotonic() > self._killed_at:
                self._kill()
            if self.signals and not any(self.folder.glob("*.pid")):  # torchrun still waits for other hosts
                self._waited += 0.2
                if self._waited > _GRACE:
                    return

    def _kill(self) -> None:
        """Kill every process that is left."""
        for process_id in endings.list_process_ids(self.folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)

    def _run_torchrun(self, words: list[str]) -> None:
        """Run torchrun, and keep the error with which it ends."""
        from torch.distributed import run

        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what failed is said once, here
        logging.getLogger("torch.distributed.run").setLevel(logging.CRITICAL)
        try:
            run.run(run.parse_args(words))
        except BaseException as error:
            self.error = error


def start(plan: LaunchPlan) -> int:
    """Prepare the rows, start the processes, and wait for them; return the exit code of the run.

    Raises:
        LaunchError: the hosts do not meet, or a process was killed.

    """
    with tempfile.TemporaryDirectory(prefix="trl_sft-") as name, _environment(plan, Path(name)):
        processes = _Processes(Path(name))
        with _handled(processes):
            exit_code = _prepare(plan, processes)
            if exit_code or processes.signals:
                return errors.EXIT_SIGNAL + processes.signals[0] if processes.signals else exit_code
            _reach_first_host(plan, processes)
            if not processes.signals:
                processes.run(plan.words)
            return _conclude(plan, processes)


def _prepare(plan: LaunchPlan, processes: _Processes) -> int:
    """Tokenize the rows before any process starts: they only read the cache. Return the exit code."""
    console.say("preparing the rows, which the processes then read from the cache")
    command = [sys.executable, "-m", "trl_sft", "prepare", *plan.arguments]
    exit_code = processes.prepare(command)
    if exit_code and json_output.is_requested():
        fix = f"Run `{console.get_python_command()} -m trl_sft check` with the same arguments."
        fault = Fault("the rows", "they cannot be prepared; standard error says why", fix, code="launch.preparation")
        json_output.add_faults([fault])
    return exit_code


def _reach_first_host(plan: LaunchPlan, processes: _Processes) -> None:
    """Wait until host 0 listens, where this is another host. Raises LaunchError."""
    if not plan.host or plan.host_rank == 0:
        return
    began, reason, said = time.monotonic(), "", False
    limit = float(os.environ.get("TRL_SFT_MEETING_SECONDS", _MEETING))
    while time.monotonic() - began < limit and not processes.signals:
        try:
            with socket.create_connection((plan.host, plan.port), timeout=5):
                return
        except OSError as error:
            reason = error.strerror or str(error) or "no answer"
        if not said and time.monotonic() - began > 3:
            said = True
            console.say(f"waiting   for host 0 at {plan.host}:{plan.port}, at most {limit:.0f} s ({reason})")
        time.sleep(0.5)
    if not processes.signals:
        problem = f"host 0 does not answer at {plan.host}:{plan.port} after {limit:.0f} s: {reason}"
        fix = "Start the same command with --host-rank 0 there, and open the port between the hosts."
        raise LaunchError(Fault("--host", problem, fix, code="launch.no_meeting"))


def _conclude(plan: LaunchPlan, processes: _Processes) -> int:
    """Return the exit code of the run, and say what ended it where no process could. Raises LaunchError."""
    ended = endings.read(processes.folder)
    killed = _find_killed(processes.error)
    failed = [ending for ending in ended if ending.exit_code]
    first = next((ending for ending in ended if ending.number == 0), None)
    if processes.signals and (killed or not failed):  # before training, or by the second signal
        return errors.EXIT_SIGNAL + processes.signals[0]
    if killed:
        raise LaunchError(_describe_killed(plan, killed))
    if failed:
        root = failed[0]
        if first is None or first.exit_code == 0 or [*first.faults] != [*root.faults]:
            _show_failure(processes.folder, root)
        json_output.add_values(**root.values)
        json_output.add_faults(root.faults)
        return root.exit_code
    if processes.error is not None:
        raise LaunchError(_describe_error(plan, processes.error))
    if first is not None:
        json_output.add_values(**first.values)
    return errors.EXIT_DONE


def _find_killed(error: BaseException | None) -> tuple[int, int] | None:
    """Return number and signal of the process that failed first, where a signal ended it; None = none did."""
    failures: dict[int, Any] = getattr(error, "failures", None) or {}
    if not failures:
        return None
    number, failure = min(failures.items(), key=lambda item: item[1].timestamp)
    return (number, -failure.exitcode) if failure.exitcode < 0 else None


def _describe_killed(plan: LaunchPlan, killed: tuple[int, int]) -> Fault:
    """Return the fault of a process that a signal ended."""
    number, of_signal = killed
    name = signal.Signals(of_signal).name
    problem = f"process {number} of {plan.total} was ended by {name}, so the others were ended too"
    command = f"{console.get_python_command()} -m trl_sft launch {' '.join(plan.arguments)}"
    cause = "Often memory ran out: free some. " if of_signal == signal.SIGKILL else ""
    fix = f"{cause}Run the same command again: it resumes from the last checkpoint. ({command})"
    return Fault("the processes", problem, fix, code="launch.process_killed")


def _describe_error(plan: LaunchPlan, error: BaseException) -> Fault:
    """Return the fault of a torchrun that started no process."""
    where = f"{plan.host}:{plan.port}" if plan.host else "this host"
    problem = f"torchrun could not bring {plan.hosts} host{'s' * (plan.hosts > 1)} together at {where}"
    fix = "Start the same command on every host, each with its own --host-rank, and open the port between them."
    return Fault("--host", f"{problem}: {errors.first_line(error)}", fix, code="launch.no_meeting")


def _show_failure(folder: Path, root: Ending) -> None:
    """Show why a process failed whose output is in a file."""
    if root.exit_code != errors.EXIT_INTERNAL:
        console.print_faults(root.faults)
        return
    output = folder / f"{root.number}.txt"
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines() if output.is_file() else []
    console.say_error(f"trl_sft: process {root.number} failed first; the end of its output:")
    for line in lines[-_SHOWN:]:
        console.say_error(f"  {line}")


@contextlib.contextmanager
def _environment(plan: LaunchPlan, folder: Path) -> Iterator[None]:
    """Set the variables of the processes inside the block."""
    variables = plan.environment | {ranks.FOLDER: str(folder)}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _handled(processes: _Processes) -> Iterator[None]:
    """Send the signals of this process on to the processes inside the block."""
    numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
    before = {number: signal.signal(number, processes.send) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
