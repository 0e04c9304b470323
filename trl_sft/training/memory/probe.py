"""The memory that a run really takes: two steps on its largest batch, with its weights, measured.

In: a run that is ready. Out: lines for the screen. Nothing is saved, and the run's folder is not touched.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import gc
import itertools
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from trl import SFTConfig

from trl_sft import errors
from trl_sft.console import format_bytes
from trl_sft.errors import RunStopped
from trl_sft.recipe.checked import Run
from trl_sft.training import failures
from trl_sft.training.memory import fit
from trl_sft.training.stages import TrainingInputs, build_trainer, replace_callbacks

_STEPS = 2  # the second meets the optimizer's state
_WORDS = 8  # tokens of a row that only warms up
_STATUS, _FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure(run: Run, inputs: TrainingInputs, checked: fit.Checked) -> fit.Lines:
    """Return what two steps took at most, beside the estimate. Raises RunStopped where memory does not do."""
    with tempfile.TemporaryDirectory() as folder:
        args = _short(inputs.args, folder)
        rows = _rows(inputs.datasets.train, args.per_device_train_batch_size)
        rows *= args.gradient_accumulation_steps * _STEPS
        datasets = inputs.datasets._replace(train=Dataset.from_list([_begun(row) for row in rows]), eval=None)
        try:
            settings = dataclasses.replace(inputs.settings, args=args)
            trainer = build_trainer(run, dataclasses.replace(inputs, settings=settings, datasets=datasets))
            replace_callbacks(trainer, [])
            trainer.train()  # on the beginnings of rows: what is imported and kept at the first step is not the batch's
            trainer.train_dataset = Dataset.from_list(rows)
            trainer.optimizer = trainer.lr_scheduler = trainer.callback_handler.optimizer = None
            trainer.callback_handler.lr_scheduler = None
            trainer.accelerator.free_memory()
            trainer.model.zero_grad()
            before = _now(args)
            trainer.train()
        except Exception as error:
            if not failures.is_out_of_memory(error):
                raise
            less = ", ".join(f"train.{name}: {value}" for name, value in failures.suggest_less_memory(args).items())
            message = f"out of memory in the probe, with a batch of {checked.batch}\nWhat to try: {less}"
            raise RunStopped(message, errors.EXIT_OUT_OF_MEMORY) from error
        weights = [*trainer.model.parameters(), *trainer.model.buffers()]
        taken = _most(args) - before + sum({t.data_ptr(): t.numel() * t.element_size() for t in weights}.values())
    share = f", {checked.found.peak / taken:.0%} of it" if checked.found and not checked.found.missing else ""
    estimated = f"; estimated: {format_bytes(checked.found.peak)}{share}" if checked.found else ""
    return [("probe", f"{format_bytes(taken)} at most in {_STEPS} steps of {checked.batch}{estimated}")]


def _short(args: SFTConfig, folder: str) -> SFTConfig:
    """Return the settings of a run that trains two steps, and writes and asks nothing."""
    args = copy.copy(args)
    args.max_steps, args.output_dir, args.report_to, args.push_to_hub = _STEPS, folder, [], False
    args.gradient_accumulation_steps = min(args.gradient_accumulation_steps, 2)  # the second meets gradients
    args.save_strategy, args.load_best_model_at_end = SaveStrategy.NO, False
    args.eval_strategy = args.logging_strategy = IntervalStrategy.NO
    args.eval_on_start, args.disable_tqdm = False, True
    return args


def _rows(rows: Dataset | IterableDataset, size: int) -> list[dict[str, Any]]:
    """Return the rows of the largest batch; of a stream the first ones."""
    if isinstance(rows, IterableDataset):
        return list(itertools.islice(rows, size))
    longest = fit.longest(rows, size)
    plain = Dataset(rows.data)  # without the order of training, which may be another
    return [plain[int(row)] for row in longest]


def _begun(row: dict[str, Any]) -> dict[str, Any]:
    """Return the beginning of a row."""
    cut = {name: values[:_WORDS] for name, values in row.items()}
    return cut | ({"seq_lengths": [len(cut["input_ids"])]} if "seq_lengths" in row else {})


def _now(args: SFTConfig) -> int:
    """Return the bytes that this process holds now, and watch for the most from here."""
    gc.collect()
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what earlier work left free would be taken again unseen
    if _FORGET.exists():
        _FORGET.write_text("5")  # proc(5): resets the peak of the resident set
    return _status("VmRSS:")


def _most(args: SFTConfig) -> int:
    """Return the most bytes that this process held since `_now`."""
    return int(torch.cuda.max_memory_allocated()) if args.device.type == "cuda" else _status("VmHWM:")


def _status(name: str) -> int:
    """Return a line of Linux's account of this process in bytes; elsewhere the most that it ever held."""
    if not _STATUS.is_file():
        import resource

        unit = 1 if torch.backends.mps.is_available() else 1024  # macOS counts bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
