"""Runs code that a model wrote, in a process of its own with limits, and tells which limits hold on this machine.

Inputs: Python code. Outputs: whether it ended without an error, and why not. Limits: wall time, CPU time, memory, sizes
of files; on Linux also the network, other processes, and files outside a temporary folder, as far as the kernel
permits. Files can be read. This stops accidents and careless code; a container or a virtual machine is the place for
code of an attacker. Not here: the limits themselves (`sandbox_child`), and whether a user permits code to run.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from trl_sft.errors import Fault, LaunchError

SECONDS = 10  # of wall time and of CPU time
MEMORY_BYTES = 1 << 30  # of address space, Python included
FILE_BYTES = 16 << 20  # of one file
_OUTPUT_CHARACTERS = 2000  # of what the code prints, from its end
_CHILD = Path(__file__).with_name("sandbox_child.py")
_MOST_PRINTED = 2 * FILE_BYTES  # bytes that are read back


class CodeResult(NamedTuple):
    """How a run of code ended."""

    is_done: bool  # the code ran to its end without an error
    reason: str  # why not: the last line of the error, or the limit; "" = it is done
    output: str  # the end of what it printed


def run_code(code: str, *, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> CodeResult:
    """Run Python code under limits.

    Args:
        code: Python source text.
        seconds: of wall time.
        memory_bytes: of address space.

    Raises:
        LaunchError: the system has no limits of processes (Windows).

    """
    if os.name != "posix":
        problem = "this system cannot limit the time and memory of a process"
        fix = "Evaluate code on Linux or macOS."
        raise LaunchError(Fault("the check code", problem, fix, code="evaluation.no_sandbox"))
    mark = f"trl_sft {secrets.token_hex(16)}"  # printed after the code, so that `sys.exit(0)` does not pass for success
    with (
        tempfile.TemporaryDirectory(prefix="trl_sft-code-") as folder,
        tempfile.TemporaryFile() as printed,  # a file, since its size is limited; a pipe would fill this process
    ):
        task = {"code": code, "mark": mark, "folder": folder, "file_bytes": FILE_BYTES}
        task |= {"seconds": max(1, round(seconds)), "memory_bytes": memory_bytes}
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=printed,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            process.communicate(json.dumps(task).encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            return CodeResult(False, f"it took more than {seconds:g} s", "")
        finally:
            _end(process)
        printed.seek(0)
        text = printed.read(_MOST_PRINTED).decode("utf-8", "replace")
    is_done = process.returncode == 0 and text.rstrip().endswith(mark)
    text = text.replace(mark, "").rstrip()[-_OUTPUT_CHARACTERS:]
    return CodeResult(is_done, "" if is_done else _find_reason(text, process.returncode), text)


@functools.cache
def measure_limits() -> dict[str, bool]:
    """Return which limits hold on this machine, each tried by a program that breaks it.

    Returns:
        `network`: no connection to a server of this machine; `files`: no file written outside the folder; `memory`: no
        more than the limit; `time`: a loop without end is ended.

    """
    with socket.socket() as server, tempfile.TemporaryDirectory(prefix="trl_sft-limits-") as folder:
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        connect = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)"
        path = Path(folder) / "outside"
        write = f"open({str(path)!r}, 'w').write('x')"
        return {
            "network": not run_code(connect).is_done,
            "files": not run_code(write).is_done and not path.exists(),
            "memory": not run_code(f"x = bytearray({2 * MEMORY_BYTES})").is_done,
            "time": not run_code("while True: pass", seconds=1).is_done,
        }


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process with all of its group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _find_reason(text: str, exit_code: int) -> str:
    """Return why code failed: the last line that it printed, or the signal that ended it."""
    lines = [line for line in text.splitlines() if line.strip()]
    if exit_code < 0 or exit_code > 128:
        return f"signal {-exit_code if exit_code < 0 else 256 - exit_code}"
    return lines[-1] if lines and exit_code else "it ended before its last line"
