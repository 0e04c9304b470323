"""Runs torchrun for a plan, and sends signals on to the processes that it starts.

torchrun runs in a thread of this process: it tells which process failed and how, where its command ends with 1 for
every failure, and the main thread keeps the signals. Inputs: a `LaunchPlan`, and what the supervisor knows of the
processes. Not here: the plan, what comes before and after (`supervisor`), and what the processes do.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from typing import Any

from trl_sft import console, errors
from trl_sft.errors import Fault, LaunchError
from trl_sft.launch import endings
from trl_sft.launch.plan import LaunchPlan
from trl_sft.launch.supervisor import GRACE, KilledProcess, Processes

_MEETING = 300.0  # seconds in which the hosts must meet


def run(plan: LaunchPlan, processes: Processes) -> None:
    """Run torchrun until all processes of this host have ended. Raises LaunchError where the hosts do not meet."""
    _reach_first_host(plan, processes)
    if processes.signals:
        return
    ended: list[BaseException] = []  # the error with which torchrun ended, if it did
    thread = threading.Thread(target=_run_torchrun, args=(plan.words, ended), daemon=True, name="torchrun")
    thread.start()
    sent: dict[int, int] = {}  # process id -> signals that it has got
    waited = 0.0  # seconds since a signal in which no process started
    while thread.is_alive():
        thread.join(0.2)
        _forward(processes, sent)
        if processes.must_kill():
            _kill(processes)
        if processes.signals and not any(processes.folder.glob("*.pid")):  # torchrun still waits for other hosts
            waited += 0.2
            if waited > GRACE:
                return
    if ended:
        processes.killed = _find_killed(ended[0])
        processes.fault = _describe_error(plan, ended[0])


def _run_torchrun(words: list[str], ended: list[BaseException]) -> None:
    """Run torchrun, and keep the error with which it ends."""
    from torch.distributed import run as torchrun

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what failed is said once, here
    logging.getLogger("torch.distributed.run").setLevel(logging.CRITICAL)
    try:
        torchrun.run(torchrun.parse_args(words))
    except BaseException as error:
        ended.append(error)


def _forward(processes: Processes, sent: dict[int, int]) -> None:
    """Send every process the signals that it has not got, also to one that has just started."""
    for process_id in endings.list_process_ids(processes.folder):
        for number in processes.signals[sent.get(process_id, 0) :]:
            sent[process_id] = sent.get(process_id, 0) + 1
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, number)


def _kill(processes: Processes) -> None:
    """Kill every process that is left."""
    for process_id in endings.list_process_ids(processes.folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id, signal.SIGKILL)


def _reach_first_host(plan: LaunchPlan, processes: Processes) -> None:
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


def _find_killed(error: BaseException) -> KilledProcess | None:
    """Return the process that failed first, where a signal ended it; None = none did."""
    failures: dict[int, Any] = getattr(error, "failures", None) or {}
    if not failures:
        return None
    number, failure = min(failures.items(), key=lambda item: item[1].timestamp)
    if failure.exitcode >= 0:
        return None
    cause = signal.Signals(-failure.exitcode)
    return KilledProcess(number, cause.name, is_memory=cause == signal.SIGKILL)


def _describe_error(plan: LaunchPlan, error: BaseException) -> Fault:
    """Return the fault of a torchrun that started no process."""
    where = f"{plan.host}:{plan.port}" if plan.host else "this host"
    problem = f"torchrun could not bring {plan.hosts} host{'s' * (plan.hosts > 1)} together at {where}"
    fix = "Start the same command on every host, each with its own --host-rank, and open the port between them."
    return Fault("--host", f"{problem}: {errors.first_line(error)}", fix, code="launch.no_meeting")
