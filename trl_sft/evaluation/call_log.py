"""Every call of a model behind an endpoint, in a JSONL file that only grows: prompt, answer, tokens; and failures.

Inputs: keys, prompts and answers. Outputs: the file, and the answers in it by their keys. Each line is
given to the system before the next one is written, so a process that is killed loses only the calls that are under
way; while calls go on, the disk confirms the lines ten times a second, so a power cut costs those of the last moment. A
last line that was half written is removed, and its call is made again. Not here: who calls (`model_calls`).
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

from trl_sft import redaction
from trl_sft.errors import Fault, LaunchError

_SYNC_SECONDS = 0.1
_LEAST_KEYS = {"key", "text", "finish", "input_tokens", "output_tokens"}


class ModelAnswer(NamedTuple):
    """What a model answered to one request."""

    text: str  # "" where the model refused
    finish: str  # why it ended: `stop`, `length`, `content_filter`, as the server says
    refusal: str  # the server's field for a refusal; "" = none
    input_tokens: int | None  # as the server counted them; None = it did not
    output_tokens: int | None


class CallLog:
    """The file, open for this process alone."""

    def __init__(self, path: Path) -> None:
        """Open the file, and read its answers.

        Args:
            path: of the file; its folder exists.

        Raises:
            LaunchError: another process writes to the file.

        """
        self.path = path
        self._next_sync = 0.0  # by the monotonic clock
        self._file = path.open("a+b")
        if not _lock(self._file):
            self._file.close()
            problem = "another process writes to this file"
            fix = "Wait for that process to end, or name another file or folder for the output."
            raise LaunchError(Fault(str(path), problem, fix, code="evaluation.log_in_use"))
        self._remove_half_line()
        self.answers = dict(_read_answers(self._file))

    def __enter__(self) -> CallLog:
        """Return the log."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        """Close the file, which unlocks it."""
        with contextlib.suppress(OSError):  # every line was given to the system before
            os.fsync(self._file.fileno())
        self._file.close()

    def add_answer(self, key: str, facts: Mapping[str, Any], answer: ModelAnswer) -> ModelAnswer:
        """Write an answer; return it as it is read back, which is without secrets.

        Args:
            key: of the request.
            facts: what else the line says of the request: its name, messages and decoding.
            answer: the answer.

        """
        line = self._write({"key": key, **facts, **answer._asdict()})
        stored = _read_answer(line)
        assert stored is not None
        self.answers[key] = stored[1]
        return stored[1]

    def add_failure(self, key: str, facts: Mapping[str, Any], problem: str) -> None:
        """Write why a call brought no answer. The request stays without one."""
        self._write({"key": key, **facts, "problem": problem})

    def _write(self, entry: Mapping[str, Any]) -> str:
        """Append one line, and have it written to the disk; return it. Raises OSError for a disk that cannot.

        A disk takes some milliseconds to confirm a write, in which no answer can arrive: many calls share one.
        """
        line = redaction.redact_json(json.dumps(entry, ensure_ascii=True))
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        if time.monotonic() >= self._next_sync:
            os.fsync(self._file.fileno())
            self._next_sync = time.monotonic() + _SYNC_SECONDS
        return line

    def _remove_half_line(self) -> None:
        """Remove what stands after the last line break: a process was killed while it wrote."""
        size = self._file.seek(0, os.SEEK_END)
        end, block = size, 65536
        while end:
            start = max(0, end - block)
            self._file.seek(start)
            found = self._file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            self._file.truncate(end)
        self._file.seek(0)


def _read_answers(file: BinaryIO) -> Iterator[tuple[str, ModelAnswer]]:
    """Yield the key and the answer of each line; lines without an answer, or of another form, are left out."""
    for line in file:
        if (stored := _read_answer(line.decode("utf-8", "replace"))) is not None:
            yield stored


def _read_answer(line: str) -> tuple[str, ModelAnswer] | None:
    """Return the key and the answer of a line; None = it has none."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or not entry.keys() >= _LEAST_KEYS or not isinstance(entry["text"], str):
        return None
    tokens = [entry[name] if isinstance(entry[name], int) else None for name in ("input_tokens", "output_tokens")]
    refusal = entry.get("refusal")
    answer = ModelAnswer(
        _pair_surrogates(entry["text"]), str(entry["finish"]), refusal if isinstance(refusal, str) else "", *tokens
    )
    return str(entry["key"]), answer


def _pair_surrogates(text: str) -> str:
    """Return a text in which halves of a character that JSON can hold alone are U+FFFD: no file and no request can."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _lock(file: BinaryIO) -> bool:
    """Lock a file for this process; tell whether no other process has it. Without fcntl (Windows) nothing is locked."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a disk without locks
        return True
    return True
