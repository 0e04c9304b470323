"""Times of the training loop: of each step, evaluation and checkpoint, and of the parts of the steps.

Inputs: the events of the loop, as they happen. Outputs: seconds. A GPU works after the call that gave it the work has
returned, so there the parts are measured with CUDA events, which are read when they are complete: nothing waits for the
device. Not here: what the steps consumed (`throughput`), and the estimate before step 1 (`time_probe`).
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch

DATA, FORWARD, BACKWARD, OPTIMIZER = "data", "forward", "backward", "optimizer"
PARTS = (DATA, FORWARD, BACKWARD, OPTIMIZER)
_WARMING_STEPS = 1  # the first step also allocates memory
_MIN_TIMED_STEPS = 2  # fewer say nothing about the time of a step
_Z = 1.96  # of a 95% interval
_MAX_PENDING = 64  # CUDA events after which those that are complete are read


class PartTimes:
    """Measures the parts of steps between marks: the time since the mark before belongs to the part that ends."""

    def __init__(self, device: torch.device) -> None:
        """Choose the timer by the device: CUDA events, or the clock of this process.

        Elsewhere (mps, xpu) only the wait for batches is known: the device still works when a call returns.
        """
        self._uses_events = device.type == "cuda"
        self._known = PARTS if device.type in ("cpu", "cuda") else (DATA,)
        self._seconds = dict.fromkeys(self._known, 0.0)
        self._last: Any = None
        self._pending: list[tuple[str, Any, Any]] = []  # part, and the CUDA events around it

    def mark(self, part: str | None) -> None:
        """End a part now; None = the time since the mark before belongs to none."""
        if self._uses_events:
            now: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            now.record()
        else:
            now = time.monotonic()
        if self._last is not None and part is not None and part in self._seconds:
            if self._uses_events:
                self._pending.append((part, self._last, now))
            else:
                self._seconds[part] += now - self._last
        self._last = now
        if len(self._pending) >= _MAX_PENDING:
            self._collect()

    def read(self) -> dict[str, float]:
        """Return the seconds of each part that is known, without waiting for a device."""
        self._collect()
        return {part: self._seconds[part] for part in self._known}

    def _collect(self) -> None:
        """Add the times between CUDA events that are complete; they complete in their order."""
        while self._pending and self._pending[0][2].query():
            part, begin, end = self._pending.pop(0)
            self._seconds[part] += begin.elapsed_time(end) / 1000  # milliseconds


@dataclass
class Clock:
    """Measures the training loop between its events.

    An event is the end of a step, an evaluation or a checkpoint; the time since the event before belongs to it. So the
    time of a step includes waiting for its batches. Nothing of the first step is counted in the parts.
    """

    parts: PartTimes = field(default_factory=lambda: PartTimes(torch.device("cpu")))
    step_seconds: list[float] = field(default_factory=list)  # of each step but the first
    evaluation_seconds: list[float] = field(default_factory=list)
    saving_seconds: list[float] = field(default_factory=list)
    first_step_seconds: float = 0.0
    _steps: int = 0
    _last: float = 0.0

    def start(self) -> None:
        """Begin to measure; called when the loop begins."""
        self._last = time.monotonic()

    def end_part(self, part: str | None) -> None:
        """Note that a part of a step ended; None = what ends now is no part of one, such as a log entry."""
        if self._steps >= _WARMING_STEPS:
            self.parts.mark(part)

    def end_step(self) -> None:
        """Note that a step ended, and with it the work of the optimizer."""
        self.end_part(OPTIMIZER)
        seconds = self._read()
        self._steps += 1
        if self._steps > _WARMING_STEPS:
            self.step_seconds.append(seconds)
        else:
            self.first_step_seconds = seconds
            self.parts.mark(None)

    def end_evaluation(self) -> None:
        """Note that an evaluation ended."""
        self.end_part(None)
        self.evaluation_seconds.append(self._read())

    def end_saving(self) -> None:
        """Note that a checkpoint is written."""
        self.end_part(None)
        self.saving_seconds.append(self._read())

    def estimate_left(self, steps: int, *, evaluations: int) -> tuple[float, float] | None:
        """Return the seconds that are left and half of their 95% interval; None as long as nothing is known.

        The interval assumes that steps are independent: it covers the spread of lengths, not a machine that changes.

        Args:
            steps: steps to go.
            evaluations: evaluations to go; they count where one was measured.

        """
        if len(self.step_seconds) < _MIN_TIMED_STEPS:
            return None
        seconds = statistics.fmean(self.step_seconds) * steps
        if self.evaluation_seconds:
            seconds += statistics.fmean(self.evaluation_seconds) * evaluations
        spread = statistics.stdev(self.step_seconds)
        # of the steps to come, and of the mean that is measured
        margin = _Z * spread * math.sqrt(steps + steps**2 / len(self.step_seconds))
        return seconds, margin

    def describe(self) -> dict[str, float]:
        """Return the seconds of steps (without the first) and their parts, of evaluations, checkpoints, and a step.

        `other_seconds` is what the steps took beside their parts, such as writing the log.
        """
        training = sum(self.step_seconds)
        described = {"training_seconds": training}
        if self.step_seconds:
            parts = self.parts.read()
            described |= {f"{part}_seconds": seconds for part, seconds in parts.items()}
            if set(parts) == set(PARTS):
                described["other_seconds"] = max(0.0, training - sum(parts.values()))
        described["evaluation_seconds"] = sum(self.evaluation_seconds)
        described["saving_seconds"] = sum(self.saving_seconds)
        if self.step_seconds:
            described["seconds_per_step"] = statistics.median(self.step_seconds)
        return {name: round(value, 4) for name, value in described.items()}

    def describe_parts(self) -> str:
        """Return which share of the steps each part took; "" before the second step."""
        training = sum(self.step_seconds)
        if not training:
            return ""
        parts = self.parts.read()
        if set(parts) == set(PARTS):
            parts["other"] = max(0.0, training - sum(parts.values()))
        return ", ".join(f"{part} {seconds / training:.0%}" for part, seconds in parts.items())

    def _read(self) -> float:
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        return seconds
