"""Measures the memory of two real training steps on the largest batch, with the weights loaded.

In: what a run has before its weights. Out: a line for the screen. Deliberately absent: saving anything; the run folder
is not touched.
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
from trl import SFTConfig, SFTTrainer

from trl_sft import errors
from trl_sft.console import format_bytes
from trl_sft.errors import RunStopped
from trl_sft.recipe.checked import Run
from trl_sft.training import failures
from trl_sft.training.memory import fit
from trl_sft.training.stages import TrainingInputs, build_trainer, replace_callbacks

_STEPS = 2  # in the second step the optimizer state exists
_WARM_UP_TOKENS = 8  # of each row of the steps that are not measured
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure_steps(run: Run, inputs: TrainingInputs, report: fit.MemoryReport) -> fit.Lines:
    """Train two steps on the largest batch, and return the most memory that they took, beside the estimate.

    Raises:
        RunStopped: Memory ran out.
    """
    with tempfile.TemporaryDirectory() as folder:
        args = _shorten(inputs.args, folder)
        rows = _select_rows(inputs.datasets.train, args.per_device_train_batch_size)
        rows *= args.gradient_accumulation_steps * _STEPS
        warm_up = Dataset.from_list([_cut(row) for row in rows])
        try:
            trainer = build_trainer(
                run,
                dataclasses.replace(
                    inputs,
                    settings=dataclasses.replace(inputs.settings, args=args),
                    datasets=inputs.datasets._replace(train=warm_up, eval=None),
                ),
            )
            measured = _train_twice(trainer, rows)
        except Exception as error:
            if not failures.is_out_of_memory(error):
                raise
            settings = failures.suggest_less_memory(args).items()
            fix = ", ".join(f"train.{name}: {value}" for name, value in settings)
            message = f"out of memory in the probe, with a batch of {report.batch}\nWhat to try: {fix}"
            raise RunStopped(message, errors.EXIT_OUT_OF_MEMORY, code="run.out_of_memory") from error
    text = f"{format_bytes(measured)} at most in {_STEPS} steps of {report.batch}"
    if report.estimate:
        text += f"; estimated: {format_bytes(report.estimate.peak)}"
        if not report.estimate.missing:
            text += f", {report.estimate.peak / measured:.0%} of the measured peak"
    return [("probe", text)]


def _train_twice(trainer: SFTTrainer, rows: list[dict[str, Any]]) -> int:
    """Train on short rows and then on `rows`; return the most bytes of the second training, weights included."""
    args = trainer.args
    replace_callbacks(trainer, [])
    trainer.train()  # what is imported and cached at the first step is no part of the batch
    trainer.train_dataset = Dataset.from_list(rows)
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.callback_handler.optimizer = trainer.callback_handler.lr_scheduler = None
    trainer.accelerator.free_memory()
    trainer.model.zero_grad()
    before = _start_measuring(args)
    trainer.train()
    tensors: list[torch.Tensor] = [*trainer.model.parameters(), *trainer.model.buffers()]
    weights = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}
    return _read_peak(args) - before + sum(weights.values())


def _shorten(args: SFTConfig, folder: str) -> SFTConfig:
    """Return the settings of a run that trains two steps, and writes and sends nothing."""
    args = copy.copy(args)
    args.max_steps, args.output_dir, args.report_to, args.push_to_hub = _STEPS, folder, [], False
    args.gradient_accumulation_steps = min(args.gradient_accumulation_steps, 2)  # the second meets gradients
    args.save_strategy, args.load_best_model_at_end = SaveStrategy.NO, False
    args.eval_strategy = args.logging_strategy = IntervalStrategy.NO
    args.eval_on_start, args.disable_tqdm = False, True
    return args


def _select_rows(rows: Dataset | IterableDataset, size: int) -> list[dict[str, Any]]:
    """Return the rows of the largest batch; of a stream the first ones."""
    if isinstance(rows, IterableDataset):
        return list(itertools.islice(rows, size))
    longest = fit.find_longest_rows(rows, size)
    table = Dataset(rows.data)  # in the order of the table, which need not be the order of training
    return [table[int(row)] for row in longest]


def _cut(row: dict[str, Any]) -> dict[str, Any]:
    """Return the first tokens of a row; the numbers of its source and its task stay."""
    short = {name: value[:_WARM_UP_TOKENS] if isinstance(value, list) else value for name, value in row.items()}
    if "seq_lengths" in row:
        short["seq_lengths"] = [len(short["input_ids"])]
    return short


def _start_measuring(args: SFTConfig) -> int:
    """Return the bytes that this process holds now, and restart the count of its peak."""
    gc.collect()
    if args.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # freed memory that stays with the process would be used again unseen
    if _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")  # proc(5): resets the peak of the resident set
    return _read_status("VmRSS:")


def _read_peak(args: SFTConfig) -> int:
    """Return the most bytes that this process held since `_start_measuring`."""
    return int(torch.cuda.max_memory_allocated()) if args.device.type == "cuda" else _read_status("VmHWM:")


def _read_status(name: str) -> int:
    """Return a line of Linux's /proc/self/status in bytes; on other systems the most that the process ever held."""
    if not _STATUS.is_file():
        import resource

        unit = 1 if torch.backends.mps.is_available() else 1024  # macOS counts bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
