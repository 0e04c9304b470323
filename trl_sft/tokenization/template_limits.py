"""Limits on the time, the memory and the length of what a chat template renders.

Input: a tokenizer with a template, which may come from somebody else. Output: nothing, or a fault. jinja2's sandbox,
in which transformers renders, limits neither: two nested loops or `10 ** 10 ** 8` take hours or all memory. The trial
chats are rendered in a copy of this process that the system ends at the limits. Not here: systems that cannot copy a
process (Windows), where the template is not tried, and loops that only certain rows start.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from trl_sft.errors import Fault, TemplateError
from trl_sft.tokenization import chat_template

MAX_SECONDS = 10  # of processor time for the trial chats, which templates in use render in milliseconds
MAX_BYTES = 1 << 30  # of memory beside what the process has
MAX_CHARACTERS = 1_000_000  # of all trial chats together; templates in use write thousands
_WALL_SECONDS = 60  # the process is ended after so long, however little processor time it got
_FINISHED, _TOO_LONG, _NO_MEMORY = 0, 3, 4  # exit codes of the copy
_POLL_SECONDS = 0.002


def check_limits(where: str, tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> None:
    """Refuse a template that needs too much time or memory, or writes too much, for the trial chats.

    Args:
        where: the place in the recipe that sets the template, for the message.
        tokenizer: has the template.
        kwargs: what the template gets beside the messages.

    Raises:
        TemplateError: a limit is exceeded.

    """
    if not hasattr(os, "fork") or not tokenizer.chat_template:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns: the copy uses no other thread
        child = os.fork()
    if child == 0:
        _render_and_exit(tokenizer, kwargs)
    problem = _describe(_wait(child))
    if problem:
        fix = "Use another template. Look for loops and powers in this one if it is yours."
        raise TemplateError(
            Fault(where, f"the chat template {problem} to render short trial chats", fix, code="template.too_expensive")
        )


def _render_and_exit(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> None:
    """Render the trial chats within the limits, and end this process."""
    import resource  # not there on Windows

    code = _FINISHED
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS + 1))
        if sys.platform == "linux":
            size = _read_virtual_size() + MAX_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
        if len(chat_template.render_all_trials(tokenizer, kwargs)) > MAX_CHARACTERS:
            code = _TOO_LONG
    except MemoryError:
        code = _NO_MEMORY
    except BaseException:  # what a template raises is found again, and explained, by whoever renders it next
        code = _FINISHED
    finally:
        os._exit(code)


def _read_virtual_size() -> int:
    """Return the virtual memory of this process in bytes (proc_pid_statm(5))."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _wait(child: int) -> int:
    """Return the exit status of a process, which is ended after `_WALL_SECONDS`."""
    deadline = time.monotonic() + _WALL_SECONDS
    try:
        while time.monotonic() < deadline:
            finished, status = os.waitpid(child, os.WNOHANG)
            if finished:
                return status
            time.sleep(_POLL_SECONDS)
    except BaseException:  # Ctrl-C
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        raise
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def _describe(status: int) -> str:
    """Return what a template takes too much of; "" = nothing."""
    if os.WIFSIGNALED(status):
        by_system = os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
        return f"takes more than {MAX_SECONDS} s of processor time" if by_system else "crashes Python"
    return {
        _TOO_LONG: f"writes more than {MAX_CHARACTERS:,} characters",
        _NO_MEMORY: f"takes more than {MAX_BYTES >> 30} GiB of memory",
    }.get(os.WEXITSTATUS(status), "")
