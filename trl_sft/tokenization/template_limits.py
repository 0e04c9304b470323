"""Limits on the time, the memory and the length of what a chat template renders.

Input: a tokenizer with a template, which may come from somebody else. Output: nothing, or a fault. jinja2's sandbox,
in which transformers renders, limits neither: two nested loops or `10 ** 10 ** 8` take hours or all memory. The trial
chats are rendered in a copy of this process that the system ends at the limits. Loops that only certain rows start
are ended by a timer (`limit_seconds`). Not here: systems that cannot copy a process (Windows), where the template is
not tried; rows that a thread of a data loader renders; and a single operation that a row makes very large.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from trl_sft.data.messages import Message
from trl_sft.errors import Fault, TemplateError
from trl_sft.tokenization import chat_template

MAX_SECONDS = (
    5  # of processor time for the trial chats, or for a chat of a row, which templates in use render in milliseconds
)
MAX_BYTES = 1 << 30  # of memory beside what the process has
MAX_CHARACTERS = 1_000_000  # of all trial chats together, or of a chat of a row; templates in use write thousands
MAX_GROWTH = 100  # a chat may be longer than that, if it is no more than so many times as long as its row
_WALL_SECONDS = 60  # the process is ended after so long, however little processor time it got
_FINISHED, _TOO_LONG, _NO_MEMORY = 0, 3, 4  # exit codes of the copy
_POLL_SECONDS = 0.002
_FIX = "Use another template. Look for loops and powers in this one if it is yours."


class RenderTimeout(BaseException):
    """A chat takes too long to render. No `Exception`, so that nothing takes it for an error of the template."""


@contextlib.contextmanager
def limit_seconds() -> Iterator[None]:
    """End what the block renders after `MAX_SECONDS` of this thread's processor time.

    Signals reach the main thread alone, so a block in another thread has no limit.

    Raises:
        RenderTimeout: the limit is exceeded.

    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    began = time.thread_time()

    def end(_number: int, _frame: object) -> None:
        left = MAX_SECONDS - (time.thread_time() - began)
        if left <= 0:
            raise RenderTimeout
        signal.setitimer(signal.ITIMER_VIRTUAL, max(left, _POLL_SECONDS))  # other threads took a part of it

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def check_length(turns: Sequence[Message], tools: Sequence[Any] | None, text: str) -> None:
    """Refuse a rendered chat that is much longer than its row. Raises TemplateError."""
    if len(text) <= MAX_CHARACTERS:
        return
    size = _count_characters([list(turns), list(tools or [])])
    if len(text) > MAX_GROWTH * size:
        raise build_fault(turns, f"writes {len(text):,} characters for a chat of {size:,} characters")


def build_fault(turns: Sequence[Message], problem: str = "") -> TemplateError:
    """Return the error for a chat that a template renders too long, in words of `problem`; "" = in too much time."""
    begin = next((str(turn["content"]) for turn in turns if turn.get("content")), "")
    problem = problem or f"takes more than {MAX_SECONDS} s of processor time to render one chat"
    problem = f"the chat template {problem}, which begins with {begin.strip()[:60]!r}"
    return TemplateError(Fault("tokenizer.chat_template", problem, _FIX, code="template.too_expensive"))


def _count_characters(value: Any) -> int:
    """Return how many characters the texts of a value have together."""
    if isinstance(value, Mapping):
        return sum(_count_characters(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(map(_count_characters, value))
    return len(str(value))


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
        problem = f"the chat template {problem} to render short trial chats"
        raise TemplateError(Fault(where, problem, _FIX, code="template.too_expensive"))


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
