"""The memory that a run really takes: two steps on its largest batch, with its weights, measured.

In: a run that is ready. Out: lines for the screen. Nothing is saved, and the run's folder is not touched.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import tempfile
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from transformers import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from trl import SFTConfig

from trl_sft import ending, errors, memory, training
from trl_sft.console import gib
from trl_sft.errors import RunStopped
from trl_sft.run import Run

_STEPS = 2  # the second meets the optimizer's state
_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure(run: Run, ready: training.Ready, checked: memory.Checked) -> memory.Lines:
    """Return what two steps took at most, beside the estimate. Raises RunStopped where memory does not do."""
    with tempfile.TemporaryDirectory() as folder:
        args = _short(ready.args, folder)
        size = args.per_device_train_batch_size
        rows = _rows(ready.made.train, size) * (args.gradient_accumulation_steps * _STEPS)
        made = ready.made._replace(train=Dataset.from_list(rows), eval=None)
        before = _now(args)
        try:
            trainer = training._trainer(run, ready._replace(args=args, made=made))
            for theirs in (PrinterCallback, ProgressCallback):
                trainer.remove_callback(theirs)
            _forget(args)
            trainer.train()
        except Exception as error:
            if not ending.out_of_memory(error):
                raise
            less = ", ".join(f"train.{name}: {value}" for name, value in ending.lighter(args).items())
            message = f"out of memory in the probe, with a batch of {checked.batch}\nWhat to try: {less}"
            raise RunStopped(message, errors.EXIT_MEMORY) from error
        taken = _most(args) - before
    share = f", {checked.found.peak / taken:.0%} of it" if checked.found and not checked.found.missing else ""
    estimated = f"; estimated: {gib(checked.found.peak)}{share}" if checked.found else ""
    return [("probe", f"{gib(taken)} at most in {_STEPS} steps of {checked.batch}{estimated}")]


def _short(args: SFTConfig, folder: str) -> SFTConfig:
    """Return the settings of a run that trains two steps, and writes and asks nothing."""
    args = copy.copy(args)
    args.max_steps, args.output_dir, args.report_to, args.push_to_hub = _STEPS, folder, [], False
    args.gradient_accumulation_steps = min(args.gradient_accumulation_steps, 2)  # the second meets gradients
    args.save_strategy, args.load_best_model_at_end = SaveStrategy.NO, False
    args.eval_strategy = args.logging_strategy = IntervalStrategy.NO
    args.eval_on_start, args.disable_tqdm = False, True
    return args


def _rows(rows: Dataset | IterableDataset, size: int) -> list[dict[str, object]]:
    """Return the rows of the largest batch; of a stream the first ones."""
    if isinstance(rows, IterableDataset):
        return list(itertools.islice(rows, size))
    longest = memory.longest(rows, size)
    plain = Dataset(rows.data)  # without the order of training, which may be another
    return [plain[int(row)] for row in longest]


def _now(args: SFTConfig) -> int:
    """Return the bytes that this process holds now."""
    if args.device.type == "cuda":
        return int(torch.cuda.memory_allocated())
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what earlier work left free would be taken again unseen
    return _status("VmRSS:")


def _forget(args: SFTConfig) -> None:
    """Begin to watch for the most from here: loading may take more for a moment."""
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif _FORGET.exists():
        _FORGET.write_text("5")  # proc(5): resets the peak of the resident set


def _most(args: SFTConfig) -> int:
    """Return the most bytes that this process held since `_forget`."""
    return int(torch.cuda.max_memory_allocated()) if args.device.type == "cuda" else _status("VmHWM:")


def _status(name: str) -> int:
    """Return a line of Linux's account of this process in bytes; elsewhere the most that it ever held."""
    if not _STATUS.is_file():
        import resource

        unit = 1 if torch.backends.mps.is_available() else 1024  # macOS counts bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
