"""Where the time of a run goes, how many tokens it trains in a second, and how much of the device that uses.

In: events of the training loop with their times. Out: measured numbers, for the screen and run.json. Deliberately
absent: estimates before training (`training.memory` estimates memory).
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from trl import SFTTrainer

from trl_sft.training.verify import Verification

_WARMING_STEPS = 1  # the first step also allocates memory
_MIN_TIMED_STEPS = 2  # fewer say nothing about the time of a step
_Z = 1.96  # of a 95% interval

# Dense operations in a second, of bfloat16 with float32 sums (float16 for T4 and V100), by the beginning of the
# device's name. Source: NVIDIA's data sheets of each card, without sparsity.
PEAK_FLOPS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A10": 125e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "Tesla V100": 125e12,
    "Tesla T4": 65e12,
}


@dataclass
class Clock:
    """Measures the training loop between its events.

    An event is the end of a step, an evaluation or a checkpoint; the time since the event before belongs to it. So the
    time of a step includes waiting for its batches.
    """

    step_seconds: list[float] = field(default_factory=list)  # of each step but the first
    evaluation_seconds: list[float] = field(default_factory=list)
    saving_seconds: list[float] = field(default_factory=list)
    _steps: int = 0
    _last: float = 0.0

    def start(self) -> None:
        """Begin to measure; called when the loop begins."""
        self._last = time.monotonic()

    def end_step(self) -> None:
        """Note that a step ended."""
        seconds = self._read()
        self._steps += 1
        if self._steps > _WARMING_STEPS:
            self.step_seconds.append(seconds)

    def end_evaluation(self) -> None:
        """Note that an evaluation ended."""
        self.evaluation_seconds.append(self._read())

    def end_saving(self) -> None:
        """Note that a checkpoint is written."""
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
        """Return the seconds of steps (without the first), evaluations and checkpoints, and of a step."""
        described = {
            "training_seconds": sum(self.step_seconds),
            "evaluation_seconds": sum(self.evaluation_seconds),
            "saving_seconds": sum(self.saving_seconds),
        }
        if self.step_seconds:
            described["seconds_per_step"] = statistics.median(self.step_seconds)
        return {name: round(value, 4) for name, value in described.items()}

    def _read(self) -> float:
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        return seconds


def measure_peak_memory(device: torch.device) -> int | None:
    """Return the most bytes that this process had in use: of the device where it counts them, else of the machine."""
    if device.type in ("cuda", "xpu"):
        return int(getattr(torch, device.type).max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def find_peak_flops(device: torch.device) -> float | None:
    """Return the dense operations that a device does in a second, by its data sheet; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for begin, flops in PEAK_FLOPS.items() if name.startswith(begin)), None)


class Throughput:
    """Measures a process's part of a run: times by kind, and what the steps consumed after the first one."""

    def __init__(self, trainer: SFTTrainer, verification: Verification) -> None:
        """Keep what counts: the Trainer counts operations, the verification counts tokens."""
        self.clock = Clock()
        self._trainer, self._verification = trainer, verification
        self._before: dict[str, float | None] = {}
        self._after: dict[str, float | None] = {}

    def end_step(self) -> None:
        """Note that a step ended; what follows the first one is counted."""
        self.clock.end_step()
        if not self._before:
            self._before = self._read()

    def finish(self) -> None:
        """Note that training ended."""
        self._after = self._read()

    def describe(self) -> dict[str, Any]:
        """Return the throughput for run.json; what is not known is absent.

        Returns:
            Seconds by kind and of a step, `tokens_per_second`, `loss_tokens_per_second`, `padding` (its share of all
            positions), `flops_per_second` (as transformers estimates operations: 6 for each parameter and token),
            `mfu` (share of what the devices can do by their data sheets), `peak_memory_bytes`.
        """
        described: dict[str, Any] = self.clock.describe()
        device, devices = self._trainer.args.device, self._trainer.accelerator.num_processes
        consumed = {name: _subtract(self._after.get(name), self._before.get(name)) for name in self._after}
        seconds = sum(self.clock.step_seconds)
        tokens, positions = consumed.get("tokens"), consumed.get("positions")
        if seconds and tokens:
            described["tokens_per_second"] = round(tokens / seconds, 1)
            if loss_tokens := consumed.get("loss_tokens"):
                described["loss_tokens_per_second"] = round(loss_tokens / seconds, 1)
            if positions:
                described["padding"] = round(max(0.0, 1 - tokens / (positions * devices)), 4)
        if seconds and (flops := consumed.get("flops")):
            described["flops_per_second"] = round(flops / seconds)
            if peak := find_peak_flops(device):
                described["mfu"] = round(flops / seconds / (peak * devices), 4)
        if memory := measure_peak_memory(device):
            described["peak_memory_bytes"] = memory
        return described

    def _read(self) -> dict[str, float | None]:
        """Return what was consumed so far, over all processes; positions are those of this one."""
        trainer = self._trainer
        flops = trainer.state.total_flos + trainer.current_flos * trainer.accelerator.num_processes
        counts = self._verification.count_consumed()
        return {
            "tokens": counts["tokens"],
            "loss_tokens": counts["loss_tokens"],
            "positions": self._verification.positions,
            "flops": flops,
        }


def _subtract(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before
