"""Runs code of a model under limits of the operating system; started by `sandbox` as a process of its own.

Inputs: JSON on standard input: the code, limits, and the folder it may write to. Outputs: the exit code of the process,
and what the code prints. Limits: CPU time, memory, file sizes (setrlimit); on Linux also no network (a network
namespace of its own, else Landlock), no other process's memory and no process left behind (a process namespace), and no
file that is written outside the folder (Landlock). What the system refuses is not limited; `sandbox.measure_limits`
tries it. Nothing of trl_sft is imported here.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
from typing import Any

_NEW_USER, _NEW_PROCESSES, _NEW_NETWORK, _NEW_IPC = 0x10000000, 0x20000000, 0x40000000, 0x08000000  # linux/sched.h
_DIE_WITH_PARENT, _NO_NEW_PRIVILEGES = 1, 38  # linux/prctl.h
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # system calls of Landlock, on every architecture
_PATH_BENEATH, _GET_VERSION = 1, 1
# Rights of linux/landlock.h: writing, removing, making, renaming (2), truncating (3).
_WRITING = sum(1 << bit for bit in (1, 4, 5, 6, 7, 8, 9, 10, 11, 12))
_RENAMING, _TRUNCATING, _TCP = 1 << 13, 1 << 14, 3


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64))


class _PathRule(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed", ctypes.c_uint64), ("descriptor", ctypes.c_int32))


def main() -> None:
    """Limit this process, then run the code of standard input."""
    task = json.loads(sys.stdin.read())
    _limit_resources(task)
    if sys.platform == "linux":
        _limit_linux(task["folder"])
    program = compile(task["code"], "answer.py", "exec")
    exec(program, {"__name__": "__main__"})
    print("\n" + task["mark"])


def _limit_resources(task: dict[str, Any]) -> None:
    """Limit CPU time, memory, sizes of files and their number."""
    import resource

    limits = {
        resource.RLIMIT_CPU: task["seconds"],
        resource.RLIMIT_FSIZE: task["file_bytes"],
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_AS: task["memory_bytes"],
    }
    for kind, value in limits.items():
        with contextlib.suppress(ValueError, OSError):  # a lower limit of the system holds already
            resource.setrlimit(kind, (value, value))


def _limit_linux(folder: str) -> None:
    """Leave the network and processes of the machine, and write to one folder only, as far as the kernel permits."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    with contextlib.suppress(OSError):
        if libc.unshare(_NEW_USER | _NEW_PROCESSES | _NEW_NETWORK | _NEW_IPC) == 0:
            _become_first_process(libc)
    _restrict_with_landlock(libc, folder)


def _become_first_process(libc: ctypes.CDLL) -> None:
    """Go on as the first process of the new namespace; when it ends, the kernel ends all others there."""
    child = os.fork()
    if child:
        signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGKILL))
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)


def _restrict_with_landlock(libc: ctypes.CDLL, folder: str) -> None:
    """Refuse writes outside a folder, and TCP, where the kernel has Landlock."""
    version = libc.syscall(_CREATE_RULESET, None, 0, _GET_VERSION)
    if version < 1:
        return
    files = _WRITING | (_RENAMING if version >= 2 else 0) | (_TRUNCATING if version >= 3 else 0)
    ruleset = _Ruleset(files, _TCP if version >= 4 else 0)
    size = ctypes.sizeof(ruleset) if version >= 4 else 8
    descriptor = libc.syscall(_CREATE_RULESET, ctypes.byref(ruleset), size, 0)
    if descriptor < 0:
        return
    beneath = os.open(folder, os.O_PATH)  # only Linux has O_PATH
    rule = _PathRule(files, beneath)
    libc.syscall(_ADD_RULE, descriptor, _PATH_BENEATH, ctypes.byref(rule), 0)
    libc.syscall(_RESTRICT_SELF, descriptor, 0)
    os.close(beneath)
    os.close(descriptor)


if __name__ == "__main__":
    main()
