"""Where the time of a run goes, how many tokens it trains in a second, and how much of the device that uses.

In: the clock of the training loop, counts of tokens and operations. Out: measured numbers, for the screen and run.json.
Deliberately absent: the clock itself (`clock`), and estimates before training (`time_probe`, `training.memory`).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from trl import SFTTrainer

from trl_sft.training import clock, time_probe
from trl_sft.training.time_probe import TimeEstimate
from trl_sft.training.verify import Verification

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
        self.clock = clock.Clock(clock.PartTimes(trainer.args.device))
        self.estimate: TimeEstimate | None = None  # of the time, before step 1
        self._actual_seconds: float | None = None
        self._logged_before = 0  # entries of the log when training began
        self._trainer, self._verification = trainer, verification
        self._before: dict[str, float | None] = {}
        self._after: dict[str, float | None] = {}

    @contextlib.contextmanager
    def time_backward(self) -> Iterator[None]:
        """Time the backward passes inside the block; what comes before one, since the batches arrived, is forward.

        DeepSpeed's backward also moves the optimizer, so there its time is in it.
        """
        accelerator = self._trainer.accelerator
        backward = accelerator.backward

        def time_and_call(*args: Any, **kwargs: Any) -> Any:
            self.clock.end_part(clock.FORWARD)
            result = backward(*args, **kwargs)
            self.clock.end_part(clock.BACKWARD)
            return result

        accelerator.backward = time_and_call
        try:
            yield
        finally:
            vars(accelerator).pop("backward", None)  # the method of the class again

    def end_step(self) -> None:
        """Note that a step ended; what follows the first one is counted."""
        self.clock.end_step()
        if not self._before:
            self._before = self._read()

    def estimate_time(self, *, price_per_hour: float | None) -> TimeEstimate | str:
        """Estimate the time of the run before step 1, and keep it for run.json; a text says why there is none."""
        estimate = time_probe.estimate_time(self._trainer, self._verification, price_per_hour=price_per_hour)
        if isinstance(estimate, TimeEstimate):
            self.estimate = estimate
        return estimate

    def start(self) -> None:
        """Begin to measure; called when the loop begins."""
        self._logged_before = len(self._trainer.state.log_history)
        self.clock.start()

    def finish(self) -> None:
        """Note that training ended; an evaluation that follows is of the model that is saved."""
        self._after = self._read()
        self._actual_seconds = self._sum_estimated()

    @property
    def actual_seconds(self) -> float | None:
        """The seconds of what was estimated before step 1; None before the end of training."""
        return self._actual_seconds

    def _sum_estimated(self) -> float | None:
        """Return the seconds of what was estimated before step 1, steps and evaluations; None before the last step.

        Those of the evaluations are upstream's, without the answers to prompts.
        """
        state = self._trainer.state
        if not self.clock.step_seconds or state.global_step < state.max_steps:
            return None
        evaluations: Iterator[float] = (
            value
            for entry in state.log_history[self._logged_before :]
            for name, value in entry.items()
            if name.startswith("eval_") and name.endswith("_runtime")
        )
        return self.clock.first_step_seconds + sum(self.clock.step_seconds) + sum(evaluations)

    def describe(self) -> dict[str, Any]:
        """Return the throughput for run.json; what is not known is absent.

        Returns:
            Seconds by kind, of the parts of steps and of a step, `tokens_per_second`, `loss_tokens_per_second`,
            `padding` (its share of all positions), `flops_per_second` (as transformers estimates operations: 6 for each
            parameter and token), `mfu` (share of what the devices can do by their data sheets), `peak_memory_bytes`.
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
        described |= self._describe_estimate()
        if memory := measure_peak_memory(device):
            described["peak_memory_bytes"] = memory
        return described

    def _describe_estimate(self) -> dict[str, float]:
        """Return what was estimated before step 1, with its interval and its price, and what it was."""
        estimate, actual = self.estimate, self._actual_seconds
        if estimate is None:
            return {}
        values = {"": estimate.seconds, "_low": estimate.low, "_high": estimate.high}
        described = {f"estimated_seconds{name}": round(value, 4) for name, value in values.items()}
        described["estimate_probe_seconds"] = round(estimate.probe_seconds, 4)
        described["estimate_waiting"] = round(estimate.waiting, 4)
        if actual is not None:
            described["actual_seconds"] = round(actual, 4)
        if estimate.price_per_hour is not None:
            described["estimated_cost"] = round(estimate.price_per_hour * estimate.seconds / 3600, 4)
            if actual is not None:
                described["actual_cost"] = round(estimate.price_per_hour * actual / 3600, 4)
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
