"""Compares what the recipe asks for with what the live trainer does: before step 1, in it, and at the end.

In: the checked recipe, and the model, optimizer and data loader that SFTTrainer has built. Out: `measured` in
run.json and a line on both screens; a difference stops the run with both values before the first update.
Only properties that can really differ are read: those that a launcher, a fallback, a patch, a checkpoint or another
key can change silently. Deliberately absent: values that upstream only copies from its arguments.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import SFTConfig, SFTTrainer

from trl_sft import errors, ranks
from trl_sft.errors import Fault, NotAsAsked, RecipeError
from trl_sft.model.load import unwrap_adapter
from trl_sft.recipe.checked import Run
from trl_sft.training import live
from trl_sft.training.live import Reading
from trl_sft.training.stages import TrainingInputs

_MAX_NAMES = 3  # of a list of names in a message
_FIX = (
    "Set the key to the value of the live trainer, or remove the key. If the key should work, report it to its library."
)
_FIX_RESUMED = (
    "Set the key to the value of the checkpoint, whose optimizer continues; or start a new run from its weights."
)
_PEFT_PREFIX = "base_model.model."  # of the names of all parameters under peft
_FEW = 0.5  # share of the weights: if fewer change in a whole run, rounding loses updates
_FINER = "the updates are too small for the dtype of the weights. Set model.dtype: float32"


class Verification(TrainerCallback):
    """Reads the live objects when training begins, in the first step and at the end; stops the run if they differ."""

    _trial_lines: tuple[tuple[str, str], ...] = ()  # of saving before step 1

    def __init__(self, run: Run, inputs: TrainingInputs, trainer: SFTTrainer) -> None:
        """Keep the objects; nothing is read before the Trainer has built its optimizer."""
        self.measured: dict[str, Any] = {}  # as in run.json
        self._run, self._prepared, self._trainer = run, inputs, trainer
        self._compared = 0
        self._hooks: list[Any] = []
        self._compute_loss: Callable[..., Any] | None = None  # of the trainer, while it is replaced
        self.is_paused = False
        self._reset()

    def _reset(self) -> None:
        self._remove_hooks()
        self._fingerprints: dict[str, live.Fingerprint] = {}
        self._first_step: dict[str, Any] = {}  # what the hooks saw inside the first step
        self._micro_batches = self._rows_of_step = 0  # since the last optimizer step
        self._rows = self._steps = self._changed = 0
        self.positions = 0  # of the training batches of this process, with padding
        self._tokens: Any = 0  # a tensor on the device, so that counting does not wait for the GPU
        self._loss_tokens: Any = None  # None = no batch had labels, so the number is unknown
        self._learning_rate = self._sum_of_rates = 0.0
        self._earlier: dict[str, Any] = {}  # what earlier processes of this run consumed

    def add_earlier_counts(self, counts: dict[str, Any]) -> None:
        """Add what earlier processes of this run consumed, as `count_consumed` returned it."""
        self._earlier = counts

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing inside the block: its passes are no part of the training."""
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False

    def read_first_rows(self) -> Dataset:
        """Return the tokens of the training rows; of a stream, those of its first rows."""
        return self._prepared.datasets.encoded["train"][1].rows

    def count_consumed(self) -> dict[str, Any]:
        """Return steps, rows, tokens and loss tokens of the whole run so far; the same on every process."""
        accelerator, device = self._trainer.accelerator, self._trainer.args.device
        local = [int(self._tokens), 0 if self._loss_tokens is None else int(self._loss_tokens)]
        sums = accelerator.reduce(torch.tensor(local, device=device), "sum") // live.read_group_sizes()["tp"]
        tokens, loss_tokens = sums.tolist()  # each process of a tensor parallel group had the whole row
        counts = {"optimizer_steps": self._steps, "rows": self._rows, "tokens": tokens}
        for name, number in self._earlier.items():
            if name in counts:
                counts[name] += number
        earlier = self._earlier.get("loss_tokens")
        unknown = self._loss_tokens is None and earlier is None
        return counts | {"loss_tokens": None if unknown else loss_tokens + (earlier or 0)}

    def on_train_begin(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compare the readings before the first step with the recipe. Raises RecipeError, NotAsAsked."""
        began = time.monotonic()
        self._reset()  # auto_find_batch_size begins again
        self._compared = 0
        readings = list(live.read_before_training(self._run, self._prepared, self._trainer))
        self.measured["before_training"] = {reading.name: reading.value for reading in readings}
        self._compare(readings)
        model = self._trainer.model
        self._fingerprints = live.fingerprints(model)
        self._hooks = [self._trainer.model_wrapped.register_forward_pre_hook(self._count, with_kwargs=True)]
        self._count_labels_before_loss()
        if not args.torch_compile:  # a hook would make torch.compile compile again
            embedding = unwrap_adapter(model).get_input_embeddings()
            self._hooks.append(embedding.register_forward_pre_hook(self._read_autocast))
        self.measured["seconds"] = round(time.monotonic() - began, 3)
        if ranks.count() > 1 or self._prepared.quantization is not None:  # saving then takes more than a file
            from trl_sft.training import save_trial

            trial = save_trial.try_save(self._run, self._trainer)
            self.measured["save_trial"], self._trial_lines = trial.as_json(), (("saving", trial.describe()),)

    def on_pre_optimizer_step(
        self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Compare the rows of the step, and in the first step what the hooks saw. Raises RecipeError, NotAsAsked."""
        rows = self._count_rows(args)
        expected = args.per_device_train_batch_size * args.gradient_accumulation_steps * live.count_row_groups()
        last_of_epoch = self._trainer.accelerator.gradient_state.end_of_dataloader  # which may hold fewer
        if not args.auto_find_batch_size and not (last_of_epoch and rows <= expected):
            key = ("train", "per_device_train_batch_size")
            self._compare([Reading("rows_per_step", rows, (expected,), key)])
        if self._steps == 0:
            streamed = not hasattr(self._trainer.train_dataset, "__len__")
            self.measured["first_step"] = self._first_step | {"rows_per_step": rows}
            self._compare(live.read_first_step(args, self._first_step, streamed=streamed))
        self._rows += rows
        self._steps += 1
        self._learning_rate = self._trainer.optimizer.param_groups[0]["lr"] or 0.0
        self._micro_batches = self._rows_of_step = 0

    def on_step_end(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compare the weights with those of the beginning at the last step, before another checkpoint is loaded."""
        if not self._trainer.accelerator.optimizer_step_was_skipped:  # fp16 skips a step whose scale is too high
            self._sum_of_rates += float(self._learning_rate)
        if state.global_step >= state.max_steps:
            self._measure_end(state)

    def on_evaluate(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compare the weights where the run stops early, before the best ones are loaded."""
        if control.should_training_stop and "after_training" not in self.measured:
            self._measure_end(state)

    def on_train_end(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure the end of training. Raises RunStopped if training changed no weight."""
        if "after_training" not in self.measured:
            self._measure_end(state)
        self._remove_hooks()
        if self.measured["after_training"]["unchanged_tensors"] and self._changed == 0 and self._sum_of_rates > 0:
            message = f"the training failed: no trainable weight changed in {self._steps} steps; no model is saved"
            raise errors.RunStopped(f"{message}: {_FINER}.", errors.EXIT_TRAINING_FAILED, code="run.no_weight_changed")

    def first_screen(self) -> list[tuple[str, str]]:
        """Return the line of the table before step 1."""
        return [
            ("verified", f"{self._compared} properties of the live trainer match the recipe"),
            *self._trial_lines,
        ]

    def last_screen(self) -> Iterator[str]:
        """Yield what the training loop did: steps, rows, tokens, changed tensors, and differences from the plan."""
        end = self.measured.get("after_training")
        if not end or not end["optimizer_steps"]:
            return
        changed, unchanged = end["changed_tensors"], end["unchanged_tensors"]
        tensors = f"{changed} of {changed + len(unchanged)}" if unchanged else f"all {changed}"
        steps = f"{end['optimizer_steps']} step{'s' * (end['optimizer_steps'] != 1)}"
        counts = f"{end['rows']:,} rows, {end['tokens']:,} tokens"
        counts += "" if end["loss_tokens"] is None else f", {end['loss_tokens']:,} of them with loss"
        if not self._steps:  # an earlier process trained them
            yield f"Trained: {steps}, {counts}"
            return
        rate = f"last learning rate {end['last_learning_rate']:.3g}"
        yield f"Trained: {steps}, {counts}; {rate}; {tensors} trainable tensors changed"
        if unchanged and end["optimizer_steps"] > 1:  # in the first step one half of LoRA has no gradient
            yield f"  unchanged: {_some([name.removeprefix(_PEFT_PREFIX) for name in unchanged])}"
        dtypes = self.measured["before_training"]
        coarse = any(dtype != "float32" for part in ("weight_dtypes", "adapter_dtypes") for dtype in dtypes[part])
        if coarse and end["changed_share"] < _FEW and self._sum_of_rates > 0:
            yield f"  only {end['changed_share']:.1%} of the weights changed: {_FINER}."
        if end["planned_steps"] != end["finished_steps"]:
            yield f"  planned {end['planned_steps']} steps, finished {end['finished_steps']}"

    def _compare(self, readings: Iterable[Reading]) -> None:
        """Stop the run, in every process, where a reading in one of them is not what the recipe asks for."""
        checked = [reading for reading in readings if reading.expected]
        wrong = [reading for reading in checked if reading.value not in reading.expected]
        self._compared += len(checked)
        if not ranks.is_any(bool(wrong)):
            return
        recipe = self._run.recipe
        resumed = self._trainer.state.global_step > 0 and self._steps == 0
        fix = _FIX_RESUMED if resumed else _FIX
        faults = [
            Fault(recipe.where(reading.key), _describe(reading), fix, code="run.not_as_asked") for reading in wrong
        ]
        is_written = any(reading.key in recipe.places and len(reading.key) > 1 for reading in wrong)
        of_processes = ranks.collect((faults, is_written))
        faults = list(dict.fromkeys(fault for process, _ in of_processes for fault in process))
        if any(is_written for _, is_written in of_processes):
            raise RecipeError(faults)
        raise NotAsAsked(faults)

    def _count_rows(self, args: SFTConfig) -> int:
        """Return the rows of the step that ends now, over all processes; one row of a flattened batch is a pack."""
        processes = live.count_row_groups()
        size = self.measured["before_training"]["rows_per_micro_batch"] or 0
        gradients = self._trainer.accelerator.gradient_state
        partial = gradients.end_of_dataloader and gradients.remainder > 0
        missing = size * processes - gradients.remainder if partial else 0
        if self._rows_of_step:  # with several processes the rows that are missing were filled up with repeated ones
            return self._rows_of_step * processes - (missing if processes > 1 else 0)
        return self._micro_batches * size * processes - missing

    def _count(self, model: torch.nn.Module, _: Any, batch: dict[str, Any]) -> None:
        """Count a forward pass of the training loop; evaluation and generation take no gradient."""
        input_ids = batch.get("input_ids")
        if self.is_paused or not torch.is_grad_enabled() or input_ids is None:
            return
        # TRL before 1.10 hands position_ids along without cu_seq_lens
        flattened = "cu_seq_lens_q" in batch or ("position_ids" in batch and batch.get("attention_mask") is None)
        if not self._first_step:
            self._first_step["modules_in_eval_mode"] = live.modules_in_eval_mode(model)
            self._first_step["documents_separated"] = flattened
        mask = batch.get("attention_mask")
        self._micro_batches += 1
        if not flattened:  # else all packs lie in one row
            self._rows_of_step += input_ids.shape[0]
        self.positions += input_ids.numel()
        self._tokens = self._tokens + (input_ids.numel() if mask is None else mask.sum())

    def _count_labels_before_loss(self) -> None:
        """Count the loss tokens of each training batch where `compute_loss` receives it.

        The model does not always see the labels: upstream takes them out of the batch before the forward pass where
        the loss is smoothed or the user's own.
        """
        compute_loss = self._compute_loss = self._trainer.compute_loss

        def count_and_compute(model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            labels = inputs.get("labels", inputs.get("shift_labels"))  # the second with context parallelism
            if torch.is_grad_enabled() and labels is not None and not self.is_paused:
                before = 0 if self._loss_tokens is None else self._loss_tokens
                self._loss_tokens = before + (labels != -100).sum()
            return compute_loss(model, inputs, *args, **kwargs)

        self._trainer.compute_loss = count_and_compute

    def _read_autocast(self, module: torch.nn.Module, _: Any) -> None:
        """Note, once, in which dtype autocast computes the first layer."""
        if torch.is_grad_enabled() and self._first_step:
            self._first_step["autocast_dtype"] = (
                read_computed_dtype(self._trainer, module)
                if ranks.count() > 1
                else live.autocast_dtype(next(module.parameters()).device.type)
            )
            self._hooks.pop().remove()

    def _remove_hooks(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        if self._compute_loss is not None:
            self._trainer.compute_loss, self._compute_loss = self._compute_loss, None

    def _measure_end(self, state: TrainerState) -> None:
        """Measure what was consumed and which tensors changed, on any process."""
        fingerprints, reduce = live.fingerprints(self._trainer.model), self._trainer.accelerator.reduce
        device = self._trainer.args.device
        names = [name for name in self._fingerprints if name in fingerprints]
        pairs = [(fingerprints[name], self._fingerprints[name]) for name in names]
        changed = reduce(torch.tensor([int(now.bits != then.bits) for now, then in pairs], device=device), "sum")
        elements_changed = sum(int((now.sample != then.sample).sum()) for now, then in pairs)
        elements = sum(now.sample.numel() for now, _ in pairs)
        counts = torch.tensor([elements_changed, elements], device=device)
        elements_changed, elements = reduce(counts, "sum").tolist()
        unchanged = [name for name, times in zip(names, changed.tolist(), strict=True) if not times]
        self._changed = len(names) - len(unchanged)
        self.measured["after_training"] = {
            **self.count_consumed(),
            "finished_steps": state.global_step,
            "planned_steps": state.max_steps,
            "last_learning_rate": live.round_to_digits(self._learning_rate),
            "changed_tensors": self._changed,
            "unchanged_tensors": unchanged,
            "changed_share": round(elements_changed / max(elements, 1), 4),  # of the elements of the samples
        }


def read_computed_dtype(trainer: SFTTrainer, layer: torch.nn.Module) -> str | None:
    """Return the dtype of mixed precision that a layer computes in here and now; None = that of its own weights.

    FSDP2 and DeepSpeed do without autocast: they give the layers weights in the dtype.
    """
    weight = next(layer.parameters())
    dtype = live.autocast_dtype(weight.device.type)
    is_mixed = trainer.args.bf16 or trainer.args.fp16
    if dtype is None and is_mixed and live.live_engine(trainer) not in (live.ONE_PROCESS, live.DDP):
        return str(weight.dtype).removeprefix("torch.")
    return dtype


def _describe(reading: Reading) -> str:
    """Return what differs: violations by name, else both values."""
    name = reading.name.replace("_", " ")
    if isinstance(reading.value, list) and reading.expected[0] == []:
        return f"{name}: {_some(reading.value)}"
    return f"{name}: the recipe asks for {_word(reading.expected[0])}, but the live trainer has {_word(reading.value)}"


def _some(names: list[Any]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(map(str, names[:_MAX_NAMES])) + more


def _word(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
