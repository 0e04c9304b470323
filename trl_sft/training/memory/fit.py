"""Whether a run fits: what a step and the checkpoints take, against what this machine has.

In: a run that is ready but for its weights, its rows. Out: lines for the screen, or a refusal where nothing
could make it fit. Bytes come from `tally`. Absent: any device but the one of this process.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from trl import SFTConfig

from trl_sft.console import format_bytes
from trl_sft.errors import Fault, LaunchError, first_line
from trl_sft.model import device
from trl_sft.recipe.checked import Run
from trl_sft.training.memory import estimate as memory_estimate
from trl_sft.training.memory.estimate import Estimate
from trl_sft.training.memory.fake_model import Batch
from trl_sft.training.stages import TrainingInputs

_CHUNK = 0.1  # of what is there, that an allocator may lose between tensors before a run is said to fit
_GROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat")
Lines = list[tuple[str, str]]


class Checked(NamedTuple):
    """What was found of a run's memory."""

    batch: Batch  # the largest
    found: Estimate | None  # None: it cannot be foreseen
    lines: Lines


def check(run: Run, inputs: TrainingInputs, rows: Dataset | IterableDataset, card: int | None = None) -> Checked:
    """Return what the run takes of memory and disk. Raises LaunchError where the machine cannot hold its weights.

    `card`: bytes of a card of another machine; None = this machine's device.
    """
    kind = "cuda" if card else inputs.args.device.type
    batch = largest(rows, inputs.args)
    try:
        found = estimate(run, inputs, batch, kind)
    except Exception as error:  # upstream's, for a model of its own kind; the run itself may do
        why = f"cannot be foreseen: {type(error).__name__}: {first_line(error)}"
        return Checked(batch, None, [("memory", why)])
    here = card or available(kind)
    if found.certain > here:
        parts = f"weights, gradients and the optimizer's state alone take {format_bytes(found.certain)}"
        told = Fault(
            run.recipe.where(("model", "name_or_path")), f"{parts}; {kind} has {format_bytes(here)} free", advice(run)
        )
        raise LaunchError(told)
    lines = said(found, here, str(batch))
    if not isinstance(rows, IterableDataset):
        lines += disk(run, inputs, found, len(rows))
    return Checked(batch, found, lines)


def estimate(run: Run, inputs: TrainingInputs, batch: Batch, kind: str) -> Estimate:
    """Return what a step of `batch` takes on a device of `kind` (cpu, cuda).

    Raises what upstream raises for a model that it cannot make.
    """
    return memory_estimate.estimate(run, inputs, batch, kind)


def said(found: Estimate, available: int, batch: str = "") -> Lines:
    """Return an estimate in lines, against bytes that are available; a second one warns."""
    state = f"weights {format_bytes(found.weights)}, gradients {format_bytes(found.gradients)}"
    state += f", optimizer {format_bytes(found.optimizer)}"
    if found.missing:
        told = f"{state}; activations cannot be foreseen ({found.missing}); {format_bytes(available)} free"
        return [("memory", told)]
    largest = f" of {batch}" if batch else ""
    work = f"activations {format_bytes(found.activations)}, logits {format_bytes(found.logits)}"
    peak = f"about {format_bytes(found.peak)} at most in a step{largest}, of {format_bytes(available)} free"
    lines = [("memory", f"{peak}: {state}, {work}")]
    if found.peak > available * (1 - _CHUNK):
        how = "more than there is" if found.peak > available else "little is left"
        lines.append(("memory", f"NOT ENOUGH, by this estimate {how}: {_smaller(found)}"))
    return lines


def advice(run: Run) -> str:
    """Return what a recipe could write to hold less than weights, gradients and the optimizer's state."""
    ways = []
    if run.lora is None:
        ways.append("lora: {r: 16, target_modules: all-linear}")
    if run.quantization is None:
        ways.append("quantization: {load_in_4bit: true}" + (" beside it" if run.lora is None else ""))
    if run.model.get("dtype", "float32") == "float32":
        ways.append("model.dtype: bfloat16")
    if run.lora is None and "8bit" not in str(run.train.get("optim", "")):
        ways.append("train.optim: adamw_8bit")
    return ", ".join([*ways, "a smaller model, or a machine with more"])


def largest(rows: Dataset | IterableDataset, args: SFTConfig) -> Batch:
    """Return the shape of the largest batch that rows can make; of a stream, of rows as long as `max_length`."""
    size = args.per_device_train_batch_size
    flat = bool(args.padding_free or (args.packing and args.packing_strategy in ("bfd", "bfd_split")))
    if isinstance(rows, IterableDataset):
        tokens = args.max_length or 0
        return Batch(size, tokens, size * tokens, flat, padded=not flat)
    first, lengths = longest(rows, size), _lengths(rows, "input_ids")
    labels = rows.data.column("labels")
    labelled = sum(sum(label != -100 for label in labels[int(row)].as_py()) for row in first)
    several = args.pad_to_multiple_of or 1
    tokens = math.ceil(int(lengths[first[0]]) / several) * several
    padded = not flat and size > 1 and bool(lengths.min() < tokens)
    documents: list[int] = []
    for row in first if flat else ():
        documents += rows.data.column("seq_lengths")[int(row)].as_py() if args.packing else [int(lengths[row])]
    return Batch(len(first), tokens, labelled, flat, padded, tuple(documents))


def longest(rows: Dataset, size: int) -> np.ndarray:
    """Return the numbers of the longest rows in the table that lies under a dataset: (size,).

    Of packs of one length those come first that hold the fewest documents: attention costs their square.
    """
    keys = [-_lengths(rows, "input_ids")]
    if "seq_lengths" in rows.data.column_names:
        keys.insert(0, _lengths(rows, "seq_lengths"))
    return np.lexsort(keys)[:size]  # the last key counts first


def _lengths(rows: Dataset, column: str) -> np.ndarray:
    """Return how many values each list of a column has, in the table that lies under a dataset: (rows,)."""
    return np.concatenate([pc.list_value_length(part).to_numpy() for part in rows.data.column(column).chunks])


def available(kind: str | None = None) -> int:
    """Return the bytes that are free on a device of this machine; None = the device that the Trainer takes."""
    kind = kind or device.get_device_type()
    if kind == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    free = [_meminfo("MemAvailable:")]
    limit, used, stat = (Path(name) for name in _GROUPS)
    if limit.is_file() and limit.read_text().strip().isdigit():  # a container's own limit; its file cache can go
        cached = sum(
            int(line.split()[1]) for line in stat.read_text().splitlines() if line.startswith("inactive_file ")
        )
        free.append(int(limit.read_text()) - int(used.read_text()) + cached)
    return min(size for size in free if size is not None)


def kept(args: SFTConfig, max_steps: int, epochs: float) -> int:
    """Return how many checkpoints a run has on the disk at most."""
    strategy = args.save_strategy.value
    every = args.save_steps if args.save_steps >= 1 else math.ceil(max_steps * args.save_steps)
    between = {"steps": every, "epoch": max_steps / max(epochs, 1)}.get(strategy, 0)
    number = math.ceil(max_steps / between) if between else int(strategy != "no")
    return min(number, args.save_total_limit or number)


def saved(run: Run, inputs: TrainingInputs, found: Estimate) -> tuple[int, int]:
    """Return the bytes of what a run saves: the model or adapter at the end, and a checkpoint."""
    whole = run.lora is None and not inputs.model.adapter
    weights = found.weights if whole else found.gradients  # an adapter is what is trained
    return weights, weights + (0 if inputs.args.save_only_model else found.optimizer)


def disk(run: Run, inputs: TrainingInputs, found: Estimate, rows: int) -> Lines:
    """Return what checkpoints and the model at the end take, in lines, against what the disk has free."""
    args = inputs.args
    weights, each = saved(run, inputs, found)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    steps = args.max_steps if args.max_steps > 0 else math.ceil(math.ceil(rows / batch) * args.num_train_epochs)
    number = kept(args, steps, steps * batch / max(rows, 1))
    free = shutil.disk_usage(next(p for p in (run.output_dir, *run.output_dir.parents) if p.exists())).free
    at_once = number + (args.save_total_limit is not None and number > 0)  # a new one is whole before the oldest goes
    short = " - NOT ENOUGH: set train.save_total_limit" if at_once * each + weights > free else ""
    kinds = f"at most {number} checkpoint{'s' * (number != 1)} of {format_bytes(each)}" if number else "no checkpoints"
    return [
        ("disk", f"{kinds}, and what is saved at the end: {format_bytes(weights)}; {format_bytes(free)} free{short}")
    ]


def _smaller(found: Estimate) -> str:
    """Return what usually helps, by the largest part that can shrink."""
    parts: Sequence[tuple[int, str]] = (
        (found.activations, "gradient_checkpointing: true, or a smaller per_device_train_batch_size or max_length"),
        (found.logits, "a smaller per_device_train_batch_size, or run.logits_gib"),
        (found.gradients + found.optimizer, "lora, or train.optim: adamw_8bit"),
    )
    return max(parts)[1]


def _meminfo(name: str) -> int:
    """Return a line of Linux's account of memory in bytes; elsewhere all memory that there is."""
    file = Path("/proc/meminfo")
    if not file.is_file():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    line = next(line for line in file.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
