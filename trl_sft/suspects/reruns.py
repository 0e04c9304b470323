"""Short reruns: the recipe trained on chosen rows with a seed, and the losses of held-out rows after it.

Inputs: a `ShortRun`, which rows, how many steps, a seed. Outputs: the loss of each judging row; the time of a rerun. A
rerun is trained by the trainer of every run (`stages.build_trainer`), from the base model of the run. Not here: which
rows (`plan`), and what the losses tell (`evaluation.paired_reruns`).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import SFTConfig, SFTTrainer, pack_dataset

from trl_sft import errors
from trl_sft.errors import RunStopped
from trl_sft.model import cpu_loss
from trl_sft.suspects import token_rows
from trl_sft.suspects.plan import Arm
from trl_sft.suspects.short_run import ShortRun
from trl_sft.training import failures, stages, time_probe

_TRIAL_STEPS = 4  # the first one is not measured: it also allocates memory


def train(short: ShortRun, arm: Arm) -> list[float]:
    """Train one rerun; return the loss of each judging row after it.

    Raises:
        RunStopped: the losses are not finite, or memory ran out.

    """
    with _built(short, arm.places, steps=arm.steps, seed=arm.seed) as trainer:
        trainer.train()
        losses = _measure(short, trainer)
    if not all(map(math.isfinite, losses)):
        message = f"the losses of held-out rows are not finite after a rerun of {arm.steps} steps\n"
        message += "Lower `train.learning_rate` in the recipe, train, and name that run."
        raise RunStopped(message, errors.EXIT_TRAINING_FAILED, code="run.not_finite")
    return losses


def estimate_time(short: ShortRun, arms: Sequence[Arm]) -> tuple[float, float, float]:
    """Measure a trial of few steps; return the seconds of all reruns, and both ends of their interval."""
    began = time.perf_counter()
    clock = _StepClock()
    with _built(short, arms[0].places, steps=_TRIAL_STEPS, seed=arms[0].seed) as trainer:
        trainer.add_callback(clock)
        trainer.train()
        beginning = clock.ends[0] - began
        ended = time.perf_counter()
        _measure(short, trainer)
        rest = time.perf_counter() - ended
    steps = np.diff(clock.ends)
    per_step = float(steps.mean())
    spread = 2 * float(steps.std(ddof=1)) / (per_step * math.sqrt(len(steps)))
    seconds = sum(beginning + (arm.steps - 1) * per_step + rest for arm in arms)
    return seconds, *time_probe.bound_time(seconds, spread, 0.0)


class _StepClock(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self) -> None:
        """Begin without a step."""
        self.ends: list[float] = []

    def on_step_end(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the time, once the device has done the step."""
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self.ends.append(time.perf_counter())


def _measure(short: ShortRun, trainer: SFTTrainer) -> list[float]:
    """Return the losses of the judging rows."""
    trainer.model.eval()
    gib = short.run.options.get("logits_gib", cpu_loss.LOGITS_GIB)
    losses = token_rows.measure_losses(trainer.model, short.judging.rows, logits_gib=gib, count=lambda _: None)
    return [float(loss) for loss in losses]


@contextlib.contextmanager
def _built(short: ShortRun, places: np.ndarray, *, steps: int, seed: int) -> Iterator[SFTTrainer]:
    """Build the trainer of a rerun, and free its memory after the block. Raises RunStopped where memory runs out."""
    trainer = None
    try:
        trainer = _build_trainer(short, places, steps=steps, seed=seed)
        yield trainer
    except Exception as error:
        if not failures.is_out_of_memory(error):
            raise
        message = "out of memory in a rerun\nSet a smaller `train.per_device_train_batch_size` with more "
        message += "`train.gradient_accumulation_steps` in the recipe, train, and name that run."
        raise RunStopped(message, errors.EXIT_OUT_OF_MEMORY, code="run.out_of_memory") from error
    finally:
        if trainer is not None:
            trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None
            trainer.accelerator.free_memory()  # it collects garbage and empties the cache of a GPU


def _build_trainer(short: ShortRun, places: np.ndarray, *, steps: int, seed: int) -> SFTTrainer:
    """Return the trainer of a rerun."""
    inputs = short.inputs
    args = copy.copy(inputs.args)
    args.model_init_kwargs = copy.copy(args.model_init_kwargs)
    args.seed, args.max_steps = seed, steps
    args.train_sampling_strategy = "sequential"  # the order of the arm, in each epoch again
    if args.warmup_steps >= 1:  # a number of steps, else a share of them
        args.warmup_steps = round(args.warmup_steps * steps / short.steps)
    table = inputs.datasets.encoded["train"][1].rows.data.table
    numbers = table["row"].to_numpy()
    wanted = np.array([short.train.rows[place].number for place in places.tolist()])
    order = np.argsort(numbers, kind="stable")  # with weights a row stands there several times
    begins, ends = (np.searchsorted(numbers, wanted, side=side, sorter=order) for side in ("left", "right"))
    chosen = np.concatenate([order[begin:end] for begin, end in zip(begins, ends, strict=True)])
    rows = Dataset(table.take(chosen)).select_columns(["input_ids", "labels"])
    if args.packing:
        rows = pack_dataset(rows, args.max_length, args.packing_strategy)
    own = dataclasses.replace(
        inputs,
        settings=dataclasses.replace(inputs.settings, args=args),
        datasets=inputs.datasets._replace(train=rows, eval=None),
    )
    trainer = stages.build_trainer(short.run, own)
    stages.replace_callbacks(trainer, [])
    return trainer
