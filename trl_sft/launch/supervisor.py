"""Prepares the rows of a run, lets an engine start its processes, and turns their endings into one exit code.

A signal to this process is handed on to every process by the engine; the processes save and stop together as one
process does. Inputs: a `LaunchPlan`, and the function that starts the processes (`torchrun`, `ray`). Output: an exit
code. Not here: how the processes are started, the plan, and what the processes do.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from trl_sft import console, errors, json_output, ranks
from trl_sft.errors import Fault, LaunchError
from trl_sft.launch import endings
from trl_sft.launch.endings import Ending
from trl_sft.launch.plan import LaunchPlan

GRACE = 10.0  # seconds after a second signal until the processes are killed
_SIGNALS = ("SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1")
_SHOWN = 25  # lines of the output of a process that failed


class KilledProcess(NamedTuple):
    """The process of a run that was ended from outside, and so ended the others."""

    number: int
    cause: str  # the name of a signal, or what an engine says
    is_memory: bool  # whether memory may have run out


class Processes:
    """What this process knows of the processes of a run: the signals for them, and how they ended."""

    def __init__(self, folder: Path) -> None:
        """Take the folder in which the processes leave how they ended."""
        self.folder = folder
        self.signals: list[int] = []
        self.killed: KilledProcess | None = None
        self.fault: Fault | None = None  # why no process could be started
        self._preparation: subprocess.Popen[bytes] | None = None
        self._killed_at = float("inf")

    def add_signal(self, number: int, _frame: FrameType | None = None) -> None:
        """Note a signal for every process; the second one also starts the time after which they are killed."""
        self.signals.append(number)
        if len(self.signals) > 1:
            self._killed_at = min(self._killed_at, time.monotonic() + GRACE)
        if self._preparation is not None:
            self._preparation.send_signal(signal.SIGINT)

    def must_kill(self) -> bool:
        """Tell whether the time after the second signal is over."""
        return time.monotonic() > self._killed_at

    def handle_signals(self) -> None:
        """Note the signals to this process from now on; Ray and torchrun put handlers of their own there."""
        for number in _list_signals():
            signal.signal(number, self.add_signal)

    def prepare(self, command: list[str]) -> int:
        """Run a command in front of the processes; return its exit code."""
        self._preparation = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            return self._preparation.wait()
        finally:
            self._preparation = None


def start(plan: LaunchPlan, run_processes: Callable[[LaunchPlan, Processes], None]) -> int:
    """Prepare the rows, start the processes, and wait for them; return the exit code of the run.

    Args:
        plan: what this host runs.
        run_processes: starts the processes, hands signals on to them, and returns when all have ended.

    Raises:
        LaunchError: the hosts do not meet, or a process was killed.

    """
    with tempfile.TemporaryDirectory(prefix="trl_sft-") as name, _environment(plan.environment):
        processes = Processes(Path(name))
        with _handled(processes):
            exit_code = _prepare(plan, processes)
            if exit_code or processes.signals:
                return errors.EXIT_SIGNAL + processes.signals[0] if processes.signals else exit_code
            with _environment({ranks.FOLDER: name}):
                run_processes(plan, processes)
            return _conclude(plan, processes)


def _prepare(plan: LaunchPlan, processes: Processes) -> int:
    """Tokenize the rows before any process starts: they only read the cache. Return the exit code."""
    console.say("preparing the rows, which the processes then read from the cache")
    command = [sys.executable, "-m", "trl_sft", "prepare", *plan.arguments]
    exit_code = processes.prepare(command)
    if exit_code and json_output.is_requested():
        fix = f"Run `{console.get_python_command()} -m trl_sft check` with the same arguments."
        fault = Fault("the rows", "they cannot be prepared; standard error says why", fix, code="launch.preparation")
        json_output.add_faults([fault])
    return exit_code


def _conclude(plan: LaunchPlan, processes: Processes) -> int:
    """Return the exit code of the run, and say what ended it where no process could. Raises LaunchError."""
    ended = endings.read(processes.folder)
    failed = [ending for ending in ended if ending.exit_code]
    first = next((ending for ending in ended if ending.number == 0), None)
    if processes.signals and (processes.killed or not failed):  # before training, or by the second signal
        return errors.EXIT_SIGNAL + processes.signals[0]
    if processes.killed:
        raise LaunchError(_describe_killed(plan, processes.killed))
    if failed:
        root = failed[0]
        if first is None or first.exit_code == 0 or [*first.faults] != [*root.faults]:
            _show_failure(processes.folder, root)
        json_output.add_values(**root.values)
        json_output.add_faults(root.faults)
        return root.exit_code
    if processes.fault is not None:
        raise LaunchError(processes.fault)
    if first is not None:
        json_output.add_values(**first.values)
    return errors.EXIT_DONE


def _describe_killed(plan: LaunchPlan, killed: KilledProcess) -> Fault:
    """Return the fault of a process that something else ended."""
    problem = f"process {killed.number} of {plan.total} was ended by {killed.cause}, so the others were ended too"
    command = f"{console.get_python_command()} -m trl_sft launch {' '.join(plan.arguments)}"
    cause = "Often memory ran out: free some. " if killed.is_memory else ""
    fix = f"{cause}Run the same command again: it resumes from the last checkpoint. ({command})"
    return Fault("the processes", problem, fix, code="launch.process_killed")


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
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the processes inside the block."""
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
def _handled(processes: Processes) -> Iterator[None]:
    """Note the signals to this process inside the block."""
    before = {number: signal.getsignal(number) for number in _list_signals()}
    processes.handle_signals()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _list_signals() -> list[signal.Signals]:
    """Return the signals of this system that are handed on to the processes."""
    return [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
