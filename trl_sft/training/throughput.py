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

from trl_sft.training import clock
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

    def finish(self) -> None:
        """Note that training ended."""
        self._after = self._read()

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
