"""The time of a run before step 1, and its price: measured by a few passes on batches of sampled lengths.

Inputs: the live trainer, its rows. Outputs: an estimate with its interval, or the reason why there is none. A pass is a
forward and a backward pass; no optimizer step is taken, and gradients, random states, buffers and counters are put back
as they were, so the run is the same, bit by bit, with and without the probe. The optimizer is timed on copies of
weights. Not here: the memory of steps (`memory`), and the estimate after three steps (`progress`).

Upstream's private counters are kept and restored as trl 1.8 to 1.16 name them (`SFTTrainer._metrics`,
`_total_train_tokens`).
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerState
from trl import SFTConfig, SFTTrainer

from trl_sft.console import format_duration
from trl_sft.training import live
from trl_sft.training.memory import fit
from trl_sft.training.repeated_rows import ROW_TOKENS
from trl_sft.training.verify import Verification

_MIN_STEPS = 30  # of a shorter run three steps tell the time as soon
_MIN_PASSES, _MAX_PASSES = 3, 8  # the first one is not measured: it also allocates memory
_SHARE = 0.02  # of the passes of the run that the probe may take, if that is more than `_MIN_PASSES`
_DRAWN_STEPS = 2000  # of which the mean length is taken
_MARGIN = 0.15  # own: what a machine changes between the probe and the run, and what a step takes beside its passes
_Z = 1.96  # of a 95% interval
_MEGA_BATCH = 50  # batches in which upstream sorts rows by length (transformers, LengthGroupedSampler)
_COPIED_ELEMENTS = 2**24  # of the weights, to time the optimizer
_TIMED_UPDATES = 2  # of the optimizer, after one that makes its state
_BUSY = 0.1  # of the probe's time: a longer wait for the processor is said
_WAITS = Path("/proc/thread-self/schedstat")  # of Linux: nanoseconds on a processor, and nanoseconds of waiting for one
_COLUMNS = ("input_ids", "labels", "seq_lengths", "position_ids", "attention_mask")  # that the collator reads


@dataclass(frozen=True)
class TimeEstimate:
    """The estimated time of a run, from step 1 to its last step.

    Attributes:
        seconds: of the steps, and of the evaluations between them.
        low, high: of its interval.
        passes: forward and backward passes that were measured.
        covers_all_rows: whether batches were drawn from all rows; of a stream only its first rows are known.
        probe_seconds: that the probe took.
        waiting: share of the passes' time in which other programs had the processor; 0 = none, or it is not known.
        price_per_hour: None = no price is known.

    """

    seconds: float
    low: float
    high: float
    passes: int
    covers_all_rows: bool
    probe_seconds: float
    waiting: float = 0.0
    price_per_hour: float | None = None

    def write_time(self) -> str:
        """Return the time with its interval."""
        return f"about {format_duration(self.seconds)} ({format_duration(self.low)} to {format_duration(self.high)})"

    def write(self) -> str:
        """Return the time, and the money where a price is known, each with its interval."""
        text = self.write_time()
        if self.price_per_hour is not None:
            money, least, most = (self.price_per_hour * value / 3600 for value in (self.seconds, self.low, self.high))
            text += f", about {money:.2f} ({least:.2f} to {most:.2f}) at {self.price_per_hour:g} an hour"
        if self.waiting > _BUSY:
            text += f"; other programs used the processors for {self.waiting:.0%} of this measurement"
            text += ": the run is faster once they end"
        return text


@dataclass(frozen=True)
class _Batches:
    """Batches as the run may draw them."""

    rows: list[np.ndarray]  # numbers of the rows in the table, of each batch
    positions: np.ndarray  # of each batch, with padding: (batches,)


def estimate_time(
    trainer: SFTTrainer, verification: Verification, *, price_per_hour: float | None
) -> TimeEstimate | str:
    """Measure a few passes and return the estimate; a text says why there is none.

    Args:
        trainer: before its first step, with its optimizer and loaders.
        verification: counts what the loop consumes; it counts none of these passes.
        price_per_hour: of all devices; None = unknown.

    """
    if reason := find_obstacle(trainer):
        return reason
    args, state = trainer.args, trainer.state
    steps, accumulated = state.max_steps - state.global_step, args.gradient_accumulation_steps
    passes = min(max(_MIN_PASSES, int(_SHARE * steps * accumulated)), _MAX_PASSES)
    began = time.monotonic()
    # of a stream its first rows; the order of the table is not that of training, which draws rows anyway
    is_known = isinstance(trainer.train_dataset, Dataset)
    table = Dataset((trainer.train_dataset if is_known else verification.read_first_rows()).data)
    size = verification.measured["before_training"]["rows_per_micro_batch"] or args.per_device_train_batch_size
    drawn = draw_batches(table, args, size=size, processes=live.count_row_groups())
    with verification.paused(), restored(trainer):
        chosen = _choose_batches(drawn, passes - 1)
        waited, started = _read_waiting_time(args.device), time.perf_counter()
        seconds = _gather_slowest(trainer, [_time_pass(trainer, table, drawn.rows[index]) for index in chosen])[1:]
        waiting = (_read_waiting_time(args.device) - waited) / (time.perf_counter() - started)
        waiting = min(1.0, _gather_slowest(trainer, [waiting])[0])
        update = _gather_slowest(trainer, [_time_optimizer(trainer)])[0]
        evaluation = _gather_slowest(trainer, [_time_evaluation(trainer)])[0]
    per_pass, spread = fit_pass_time(drawn.positions[chosen[1:]], np.array(seconds), drawn.positions)
    of_steps = steps * (accumulated * per_pass + update)
    evaluations = count_evaluations(args, state) + bool(args.eval_on_start)
    total = of_steps + evaluations * evaluation
    low, high = bound_time(total, spread, waiting)
    return TimeEstimate(
        total,
        low,
        high,
        passes=len(seconds),
        covers_all_rows=is_known,
        probe_seconds=time.monotonic() - began,
        waiting=waiting,
        price_per_hour=price_per_hour,
    )


def find_obstacle(trainer: SFTTrainer) -> str:
    """Return why no pass can be measured before step 1 without a trace or a cost; "" = one can."""
    args, state = trainer.args, trainer.state
    steps = state.max_steps - state.global_step
    optimizer = str(getattr(args.optim, "value", args.optim))
    if not isinstance(trainer.train_dataset, Dataset) and args.packing:
        return "the packs of a stream are built during training"
    if steps < _MIN_STEPS:
        return f"the run has only {steps} step{'s' * (steps != 1)}"
    if args.device.type not in ("cpu", "cuda"):
        return f"the random state of {args.device.type} cannot be restored"
    if args.torch_compile:
        return "the model is compiled in the first steps"
    engine = live.live_engine(trainer)
    if engine not in (live.ONE_PROCESS, live.DDP):  # DeepSpeed counts each backward pass
        return f"the probe is not made for {engine}"
    if "lomo" in optimizer or "layerwise" in optimizer:
        return f"{optimizer} moves the weights in the backward pass"
    return ""


def count_evaluations(args: SFTConfig, state: TrainerState) -> int:
    """Return how many evaluations are to come between and after the steps."""
    if args.eval_strategy == "steps" and state.eval_steps:
        every = int(state.eval_steps)
        return int(state.max_steps // every - state.global_step // every)
    return max(0, int(state.num_train_epochs - (state.epoch or 0))) if args.eval_strategy == "epoch" else 0


def draw_batches(rows: Dataset, args: SFTConfig, *, size: int, processes: int) -> _Batches:
    """Return batches as the run may draw them, by the length of rows.

    Args:
        rows: the rows, or packs, in a table.
        args: say whether rows are padded, and whether they are grouped by length.
        size: rows of a batch on one process.
        processes: that wait for each other; of their batches the largest is returned.

    """
    lengths = fit.count_values(rows, "input_ids")
    order = np.random.default_rng(args.seed).permutation(len(lengths))
    if getattr(args, "train_sampling_strategy", "") == "group_by_length":
        for start in range(0, len(order), _MEGA_BATCH * size):
            part = order[start : start + _MEGA_BATCH * size]
            order[start : start + _MEGA_BATCH * size] = part[np.argsort(-lengths[part], kind="stable")]
    batches = [order[start : start + size] for start in range(0, len(order) - size + 1, size)] or [order]
    generator = np.random.default_rng(args.seed)
    if len(batches) > _DRAWN_STEPS * processes:
        batches = [batches[index] for index in generator.permutation(len(batches))[: _DRAWN_STEPS * processes]]
    multiple = args.pad_to_multiple_of or 1
    is_flat = fit.is_flat(args)
    positions = np.array([_count_positions(lengths[batch], multiple, is_flat=is_flat) for batch in batches])
    groups = [range(first, min(first + processes, len(batches))) for first in range(0, len(batches), processes)]
    largest = [max(group, key=lambda index: positions[index]) for group in groups]
    return _Batches([batches[index] for index in largest], positions[largest])


def _count_positions(lengths: np.ndarray, multiple: int, *, is_flat: bool) -> int:
    """Return the positions of a batch: the sum of the lengths; with padding each row has those of the longest."""
    if is_flat:
        return int(lengths.sum())
    return len(lengths) * math.ceil(int(lengths.max()) / multiple) * multiple


def _choose_batches(drawn: _Batches, number: int) -> list[int]:
    """Return the batches to measure, spread evenly over the sorted lengths; the longest of them comes first, too.

    The first pass is not measured. With the longest batch it allocates what the others need.
    """
    order = np.argsort(drawn.positions, kind="stable")
    quantiles = [order[int((index + 0.5) / number * len(order))] for index in range(number)]
    return [int(quantiles[-1]), *(int(index) for index in quantiles)]


def fit_pass_time(positions: np.ndarray, seconds: np.ndarray, drawn: np.ndarray) -> tuple[float, float]:
    """Return the mean seconds of a pass over the drawn batches, and the relative half of its interval.

    The time is a line over the positions of a batch; where the lengths differ little, their mean.

    Args:
        positions: of the batches that were measured.
        seconds: that their passes took.
        drawn: positions of batches as the run may draw them.

    """
    expected = np.full(len(seconds), seconds.mean())
    mean, parameters = float(seconds.mean()), 1
    if len(seconds) > 1 and positions.max() > 1.2 * positions.min():
        slope, start = np.polyfit(positions, seconds, 1)
        if start < 0:  # attention costs more than a line: of two errors the smaller
            slope, start = float(positions @ seconds / (positions @ positions)), 0.0
        if slope > 0:
            expected, mean, parameters = start + slope * positions, float(start + slope * drawn.mean()), 2
    free = len(seconds) - parameters
    deviation = math.sqrt(float(((seconds / expected - 1) ** 2).sum()) / free) if free > 0 else 0.0
    return mean, _Z * deviation / math.sqrt(len(seconds))


def bound_time(seconds: float, spread: float, waiting: float) -> tuple[float, float]:
    """Return the ends of the interval of a time: other programs may end, so what they took counts below.

    Args:
        seconds: the estimate.
        spread: the relative half of the interval of a pass.
        waiting: share of the measurement in which other programs had the processor.

    """
    factor = 1 + math.sqrt(_MARGIN**2 + spread**2)
    return seconds / factor * (1 - waiting if waiting > _BUSY else 1), seconds * factor


def _time_pass(trainer: SFTTrainer, table: Dataset, rows: np.ndarray) -> float:
    """Return the seconds of a forward and a backward pass; with those of its batch, where no worker makes it."""
    began = time.perf_counter()
    batch = trainer.data_collator(_read_rows(table, rows))
    batch.pop(ROW_TOKENS, None)  # the Trainer's own loop takes it out
    if trainer.args.dataloader_num_workers:
        began = time.perf_counter()
    # of the class: on the object it is replaced by a function that ends the run at a loss that is not finite
    type(trainer).training_step(trainer, trainer.model_wrapped, batch)
    _wait_for_device(trainer.args.device)
    seconds = time.perf_counter() - began
    trainer.model.zero_grad()
    return seconds


def _time_optimizer(trainer: SFTTrainer) -> float:
    """Return the seconds of an optimizer step with clipping, from one on copies of weights; 0 where that fails."""
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    local = [parameter.to_local() if hasattr(parameter, "to_local") else parameter for parameter in trained]
    copies: list[torch.Tensor] = []
    for parameter in local:
        if copies and sum(copy.numel() for copy in copies) + parameter.numel() > _COPIED_ELEMENTS:
            break
        copies.append(parameter.detach().clone().requires_grad_())
        copies[-1].grad = torch.ones_like(copies[-1])
    elements, copied = sum(p.numel() for p in local), sum(p.numel() for p in copies)
    try:
        kind, keywords = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        optimizer = kind(copies, **keywords)
        for n in range(_TIMED_UPDATES + 1):
            if n == 1:  # the first update loads the kernels of a GPU and is not measured
                _wait_for_device(trainer.args.device)
                began = time.perf_counter()
            torch.nn.utils.clip_grad_norm_(copies, trainer.args.max_grad_norm or 1.0)
            optimizer.step()
        _wait_for_device(trainer.args.device)
    except Exception:  # an optimizer of a package that needs the model itself; its step is the smaller part
        return 0.0
    return float((time.perf_counter() - began) / _TIMED_UPDATES * elements / max(copied, 1))


def _time_evaluation(trainer: SFTTrainer) -> float:
    """Return the seconds of an evaluation, from one batch of each evaluation set; 0 without one."""
    args = trainer.args
    if args.eval_strategy.value == "no" and not args.eval_on_start:
        return 0.0
    sets = trainer.eval_dataset
    seconds = 0.0
    for rows in sets.values() if isinstance(sets, dict) else [sets]:
        if not isinstance(rows, Dataset):
            continue
        table, size = Dataset(rows.data), args.per_device_eval_batch_size
        drawn = draw_batches(table, args, size=size, processes=1)
        middle = int(np.argsort(drawn.positions, kind="stable")[len(drawn.positions) // 2])
        batch = trainer.data_collator(_read_rows(table, drawn.rows[middle]))
        trainer.model.eval()
        for _ in range(1 if args.device.type == "cpu" else 2):  # the first pass loads the kernels of a GPU
            began = time.perf_counter()
            trainer.prediction_step(trainer.model_wrapped, batch, prediction_loss_only=True)
            _wait_for_device(args.device)
        per_position = (time.perf_counter() - began) / drawn.positions[middle]
        batches = math.ceil(len(table) / (size * live.count_row_groups()))
        seconds += float(per_position * drawn.positions.mean() * batches)
    return seconds


def _read_rows(table: Dataset, rows: np.ndarray) -> list[dict[str, Any]]:
    """Return rows with the columns that the data collator reads."""
    columns = [name for name in _COLUMNS if name in table.column_names]
    return list(table.select_columns(columns).select(rows.tolist()))


def _gather_slowest(trainer: SFTTrainer, seconds: list[float]) -> list[float]:
    """Return each time as the slowest process measured it; the processes wait for it."""
    local = torch.tensor([seconds], dtype=torch.float32, device=trainer.args.device)
    slowest: list[float] = trainer.accelerator.gather(local).max(dim=0).values.tolist()
    return slowest


def _read_waiting_time(device: torch.device) -> float:
    """Return the seconds that this thread has waited for a processor; 0 where training needs none, or none are told."""
    if device.type != "cpu":
        return 0.0
    try:
        return int(_WAITS.read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):  # not Linux, or a kernel without these numbers
        return 0.0


def _wait_for_device(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def restored(trainer: SFTTrainer) -> Iterator[None]:
    """Put back, after the block, what passes change.

    These are random states, gradients, buffers and attributes of modules, and the counters of the trainer.
    """
    device = trainer.args.device
    states = random.getstate(), np.random.get_state()
    metrics, tokens = copy.deepcopy(trainer._metrics), trainer._total_train_tokens
    modules = list(trainer.model.modules())
    attributes = [
        {name: value for name, value in vars(module).items() if isinstance(value, bool | int | float)}
        for module in modules
    ]
    buffers = [(module, name, buffer, buffer.clone()) for module in modules for name, buffer in _list_buffers(module)]
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            trainer.model.zero_grad()
            for module, values in zip(modules, attributes, strict=True):
                vars(module).update(values)
            for module, name, buffer, before in buffers:
                buffer.copy_(before)
                setattr(module, name, buffer)  # a longer sequence may have replaced it
            trainer._metrics, trainer._total_train_tokens = metrics, tokens
            random.setstate(states[0])
            np.random.set_state(states[1])


def _list_buffers(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return list(module.named_buffers(recurse=False))
