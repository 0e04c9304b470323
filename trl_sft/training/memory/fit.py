"""Check whether a run fits: memory of a step and disk space of checkpoints, against what this machine has free.

In: what a run has before its weights, and its rows. Out: lines for the screen, or a refusal where no batch is small
enough to fit. Bytes of a step come from `estimate`. Deliberately absent: any device but the one of this process.
"""

from __future__ import annotations

import math
import os
import shutil
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
from trl_sft.training.memory import sharding
from trl_sft.training.memory.estimate import Estimate, estimate_step
from trl_sft.training.memory.fake_model import Batch
from trl_sft.training.stages import TrainingInputs

_MARGIN = 0.1  # share of the free memory that an allocator may lose between tensors
# the limit, the use and the statistics of the container that this process runs in
_CGROUP_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat")
_IGNORED = -100  # the label of a token that carries no loss
_LIMITS = "The estimate excludes allocator and process overhead"
Lines = list[tuple[str, str]]  # (name, text) each


class MemoryReport(NamedTuple):
    """The memory estimate of a run, with its lines for the screen."""

    batch: Batch  # the largest
    estimate: Estimate | None  # None: upstream cannot build this model without weights
    lines: Lines


class SavedBytes(NamedTuple):
    """Bytes of what a run writes to the disk."""

    model: int  # the model, or the adapter, at the end
    checkpoint: int  # each checkpoint


def check_memory(
    run: Run,
    inputs: TrainingInputs,
    rows: Dataset | IterableDataset,
    *,
    card_bytes: int | None = None,
    processes: int = 1,
) -> MemoryReport:
    """Compare the memory and disk space that the run needs with what is free.

    Args:
        run: The checked recipe.
        inputs: What the run has before its weights.
        rows: The tokenized rows to train.
        card_bytes: Memory of a GPU of another machine; None = the device of this process.
        processes: That train together, each with a card.

    Raises:
        LaunchError: The machine cannot hold weights, gradients and optimizer state, whatever the batch.
    """
    device_type = "cuda" if card_bytes else inputs.args.device.type
    batch = find_largest_batch(rows, inputs.args)
    try:
        part = sharding.divide_batch(batch, run, processes) if processes > 1 else batch
        estimate = whole = estimate_step(run, inputs, part, device_type=device_type)
        if processes > 1:
            config = inputs.model.config
            estimate = sharding.divide(whole, run, inputs.args, config=config, batch=batch, processes=processes)
    except Exception as error:  # upstream's, for an unusual model; the run itself may work
        problem = f"cannot be estimated: {type(error).__name__}: {first_line(error)}"
        return MemoryReport(batch, None, [("memory", problem)])
    free = card_bytes or get_free_bytes(device_type)
    if estimate.minimum > free:
        problem = f"weights, gradients and optimizer state alone take {format_bytes(estimate.minimum)}"
        problem += f" on each of {processes} processes" if processes > 1 else ""
        where = run.recipe.where(("model", "name_or_path"))
        fix = f"Try {suggest_smaller(run)}."
        raise LaunchError(
            Fault(
                where, f"{problem}; {device_type} has {format_bytes(free)} free", fix, code="machine.too_little_memory"
            )
        )
    shape = str(batch) if part == batch else f"{batch}, of which a process computes {part.tokens:,}"
    lines = describe_estimate(estimate, free, shape)
    lines[0] = ("memory", sharding.describe(run, processes) + lines[0][1])
    if device_type == "cuda":
        lines.append(("memory", f"{_LIMITS}; GPU estimates are unverified."))
    else:
        lines.append(("memory", f"{_LIMITS}."))
    if not isinstance(rows, IterableDataset):
        lines.append(("disk", _describe_disk_of(run, inputs, whole, rows=len(rows))))
    return MemoryReport(batch, estimate, lines)


def describe_estimate(estimate: Estimate, free: int, batch: str = "") -> Lines:
    """Return an estimate in lines, against `free` bytes; a second line warns."""
    state = f"weights {format_bytes(estimate.weights)}, gradients {format_bytes(estimate.gradients)}"
    state += f", optimizer {format_bytes(estimate.optimizer)}"
    if estimate.missing:
        text = f"{state}; activations cannot be estimated ({estimate.missing}); {format_bytes(free)} free"
        return [("memory", text)]
    peak = f"about {format_bytes(estimate.peak)} at most in a step{f' of {batch}' if batch else ''}"
    parts = f"{state}, activations {format_bytes(estimate.activations)}, logits {format_bytes(estimate.logits)}"
    parts += f", buffers {format_bytes(estimate.buffers)}" if estimate.buffers else ""
    lines = [("memory", f"{peak}, of {format_bytes(free)} free: {parts}")]
    fix = f"Try {_suggest_for_largest_part(estimate)}."
    if estimate.peak > free:
        lines.append(("memory", f"NOT ENOUGH: the step takes more than is free. {fix}"))
    elif estimate.peak > free * (1 - _MARGIN):
        lines.append(("memory", f"NOT ENOUGH, probably: less than {_MARGIN:.0%} stays free. {fix}"))
    return lines


def suggest_smaller(run: Run) -> str:
    """Return what a recipe could write to need less for weights, gradients and optimizer state."""
    suggestions = []
    if run.lora is None:
        suggestions.append("lora: {r: 16, target_modules: all-linear}")
    if run.quantization is None:
        with_lora = " together with lora" if run.lora is None else ""
        suggestions.append("quantization: {load_in_4bit: true}" + with_lora)
    if run.model.get("dtype", "float32") == "float32":
        suggestions.append("model.dtype: bfloat16")
    if run.lora is None and "8bit" not in str(run.train.get("optim", "")):
        suggestions.append("train.optim: adamw_8bit")
    return ", ".join([*suggestions, "a smaller model, or a machine with more memory"])


def _suggest_for_largest_part(estimate: Estimate) -> str:
    """Return what usually helps, by the largest part that can shrink."""
    smaller_batch = "a smaller train.per_device_train_batch_size"
    suggestions = {
        f"train.gradient_checkpointing: true, {smaller_batch} or a smaller train.max_length": estimate.activations,
        f"{smaller_batch} or a smaller run.logits_gib": estimate.logits,
        "lora: {r: 16} or train.optim: adamw_8bit": estimate.gradients + estimate.optimizer,
    }
    return max(suggestions, key=lambda suggestion: suggestions[suggestion])


def find_largest_batch(rows: Dataset | IterableDataset, args: SFTConfig) -> Batch:
    """Return the shape of the largest batch that rows can make; of a stream, of rows as long as `max_length`."""
    size = args.per_device_train_batch_size
    flat = is_flat(args)
    if isinstance(rows, IterableDataset):
        tokens = args.max_length or 0
        return Batch(size, tokens, size * tokens, flat, padded=not flat)
    longest, lengths = find_longest_rows(rows, size), count_values(rows, "input_ids")
    labels = rows.data.column("labels")
    labelled = sum(label != _IGNORED for row in longest for label in labels[int(row)].as_py())
    multiple = args.pad_to_multiple_of or 1
    tokens = math.ceil(int(lengths[longest[0]]) / multiple) * multiple
    padded = not flat and size > 1 and bool(lengths.min() < tokens)
    documents: list[int] = []
    for row in longest if flat else ():
        documents += rows.data.column("seq_lengths")[int(row)].as_py() if args.packing else [int(lengths[row])]
    return Batch(len(longest), tokens, labelled, flat, padded, tuple(documents))


def is_flat(args: SFTConfig) -> bool:
    """Tell whether the rows of a batch lie one after the other, without padding."""
    return bool(args.padding_free or (args.packing and args.packing_strategy in ("bfd", "bfd_split")))


def find_longest_rows(rows: Dataset, size: int) -> np.ndarray:
    """Return the numbers of the longest rows in the table under a dataset: (size,).

    Of packs of one length those with the fewest documents come first: attention costs the square of a document.
    """
    keys = [-count_values(rows, "input_ids")]
    if "seq_lengths" in rows.data.column_names:
        keys.insert(0, count_values(rows, "seq_lengths"))
    return np.lexsort(keys)[:size]  # the last key counts first


def count_values(rows: Dataset, column: str) -> np.ndarray:
    """Return how many values each list of a column has, in the table under a dataset: (rows,)."""
    return np.concatenate([pc.list_value_length(part).to_numpy() for part in rows.data.column(column).chunks])


def get_free_bytes(device_type: str | None = None) -> int:
    """Return the bytes that are free on a device of this machine; None = the device that the Trainer takes."""
    device_type = device_type or device.get_device_type()
    if device_type == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    free = _read_meminfo("MemAvailable:")
    limit, used, statistics = (Path(name) for name in _CGROUP_FILES)
    if limit.is_file() and limit.read_text().strip().isdigit():
        cached = 0  # the file cache of a container can go
        for line in statistics.read_text().splitlines():
            if line.startswith("inactive_file "):
                cached += int(line.split()[1])
        free = min(free, int(limit.read_text()) - int(used.read_text()) + cached)
    return free


def _read_meminfo(name: str) -> int:
    """Return a line of Linux's /proc/meminfo in bytes; on other systems all memory that there is."""
    file = Path("/proc/meminfo")
    if not file.is_file():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    line = next(line for line in file.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def count_checkpoints(args: SFTConfig, *, max_steps: int, epochs: float) -> int:
    """Return how many checkpoints a run has on the disk at most."""
    strategy = args.save_strategy.value
    steps_between: float = 0
    if strategy == "steps":
        steps_between = args.save_steps if args.save_steps >= 1 else math.ceil(max_steps * args.save_steps)
    elif strategy == "epoch":
        steps_between = max_steps / max(epochs, 1)
    number = math.ceil(max_steps / steps_between) if steps_between else int(strategy != "no")
    return min(number, args.save_total_limit or number)


def compute_saved_bytes(args: SFTConfig, *, weights: int, optimizer: int) -> SavedBytes:
    """Return the bytes of what a run saves.

    Args:
        args: The live settings.
        weights: Bytes of the weights that are saved: of the whole model, or of what an adapter trains.
        optimizer: Bytes of the optimizer's state.
    """
    return SavedBytes(weights, weights + (0 if args.save_only_model else optimizer))


def get_saved_bytes(run: Run, inputs: TrainingInputs, estimate: Estimate) -> SavedBytes:
    """Return the bytes of what a run saves, from the estimate of its step."""
    whole_model = run.lora is None and not inputs.model.adapter
    weights = estimate.weights if whole_model else estimate.gradients  # an adapter is what is trained
    return compute_saved_bytes(inputs.args, weights=weights, optimizer=estimate.optimizer)


def describe_disk(args: SFTConfig, folder: Path, *, saved: SavedBytes, checkpoints: int, note: str = "") -> str:
    """Return what checkpoints and the model at the end take, against what the disk has free.

    Args:
        args: The live settings.
        folder: The run folder, which need not exist.
        saved: Bytes of the model and of each checkpoint.
        checkpoints: How many there are at most.
        note: What to add to the size of a checkpoint.
    """
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    numbers = "no checkpoints"
    if checkpoints == 1:
        numbers = f"at most 1 checkpoint of about {format_bytes(saved.checkpoint)}{note}"
    elif checkpoints:
        numbers = f"at most {checkpoints} checkpoints of about {format_bytes(saved.checkpoint)} each{note}"
    text = f"{numbers}, {format_bytes(saved.model)} for the model at the end; {format_bytes(free)} free"
    at_once = checkpoints
    if checkpoints and args.save_total_limit is not None:
        at_once += 1  # a new one is complete before the oldest is deleted
    if at_once * saved.checkpoint + saved.model > free:
        text += ". NOT ENOUGH: set train.save_total_limit"
    return text


def _describe_disk_of(run: Run, inputs: TrainingInputs, estimate: Estimate, *, rows: int) -> str:
    """Return `describe_disk` for a run of so many rows, from the estimate of its step."""
    args = inputs.args
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    steps = args.max_steps
    if steps <= 0:
        steps = math.ceil(math.ceil(rows / batch) * args.num_train_epochs)
    checkpoints = count_checkpoints(args, max_steps=steps, epochs=steps * batch / max(rows, 1))
    saved = get_saved_bytes(run, inputs, estimate)
    return describe_disk(args, run.output_dir, saved=saved, checkpoints=checkpoints)
