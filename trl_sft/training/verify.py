"""Asked against ran: the live objects are read before the first step, inside it and at the end, and compared.

In: events of the Trainer. Out: `ran` of run.json, a line on each screen; where they differ before the first step is
taken the run stops, with both values. Nothing is read from arguments but what was asked.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import BitsAndBytesConfig, TrainerCallback, TrainerControl, TrainerState
from trl import SFTConfig, SFTTrainer

from trl_sft import errors
from trl_sft.errors import Fault, NotAsAsked, RecipeError
from trl_sft.model.load import ModelSource, unwrap_adapter
from trl_sft.recipe.checked import Run
from trl_sft.training import actual, expected
from trl_sft.training.expected import Point

_NAMED = 3  # of a list of names
_WRITE = "what would run, or leave the key out; if upstream promises it, tell upstream"
_RESUMED = "the checkpoint's value, whose optimizer goes on as it was; or a run that begins with its weights"
_HALF = 0.5  # of the weights: where fewer move, steps are lost
_FINER = "the steps are too small for the type of the weights; model.dtype: float32 holds finer ones"


class Watch(TrainerCallback):
    """Compares what the live objects say with what the recipe asks."""

    def __init__(self, run: Run, found: ModelSource, quantized: BitsAndBytesConfig | None, trainer: SFTTrainer) -> None:
        """Take what was asked; the readings follow when the Trainer is ready."""
        self.ran: dict[str, Any] = {}  # as in run.json
        self._run, self._found, self._quantized, self._trainer = run, found, quantized, trainer
        self._compared = 0
        self._handles: list[Any] = []
        self._prints: dict[str, actual.Print] = {}
        self._batches = self._rows = self._seen = self._steps = 0
        self._tokens: Any = 0
        self._trained: Any = 0
        self._rate = self._moved = 0.0
        self._changed = 0
        self._inside: dict[str, Any] = {}

    def on_train_begin(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Read and compare what stands before the first step. Raises RecipeError, NotAsAsked."""
        began = time.monotonic()
        self._let_go()  # auto_find_batch_size begins again, from nothing
        self._batches = self._rows = self._seen = self._steps = self._compared = 0
        self._tokens, self._trained, self._moved, self._inside = 0, 0, 0.0, {}
        readings = self._readings(given["train_dataloader"])
        self.ran["before"] = readings
        self._compare(expected.before(self._run, self._found, self._quantized, self._trainer), readings)
        self._prints = actual.prints(self._trainer.model)
        self._handles = [self._trainer.model_wrapped.register_forward_pre_hook(self._count, with_kwargs=True)]
        if not args.torch_compile:  # a hook would make the compiler start anew
            inside = unwrap_adapter(self._trainer.model).get_input_embeddings()
            self._handles.append(inside.register_forward_pre_hook(self._look))
        self.ran["seconds"] = round(time.monotonic() - began, 3)

    def on_pre_optimizer_step(
        self, args: SFTConfig, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Compare what the loop consumed with the batch that was asked. Raises RecipeError, NotAsAsked."""
        wanted, rows = expected.rows(args), self._rows_of_step()
        # the last batches of an epoch may be fewer
        ends = self._trainer.accelerator.gradient_state.end_of_dataloader
        key = ("train", "per_device_train_batch_size")
        if not args.auto_find_batch_size and (rows > wanted if ends else rows != wanted):
            self._compare({"rows of a step": Point(wanted, key)}, {"rows of a step": rows})
        if self._steps == 0:
            self._in_the_first(args, rows)
        self._seen += rows
        self._steps += 1
        self._rate = self._trainer.optimizer.param_groups[0]["lr"] or 0.0
        self._batches = self._rows = 0

    def on_step_end(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Compare the weights with those of the beginning, at the last step and before another checkpoint is loaded."""
        if not self._trainer.accelerator.optimizer_step_was_skipped:  # as fp16 does with a scale too high
            self._moved += float(self._rate)
        if state.global_step >= state.max_steps:
            self._end(state)

    def on_train_end(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Take the readings of the end. Raises RunStopped where training changed nothing."""
        if "end" not in self.ran:
            self._end(state)
        self._let_go()
        if self.ran["end"]["unchanged"] and self._changed == 0 and self._moved > 0:
            message = f"the training failed: no trainable weight changed in {self._steps} steps; no model is saved"
            raise errors.RunStopped(f"{message}: {_FINER}", errors.EXIT_TRAINING_FAILED)

    def lines(self) -> list[tuple[str, str]]:
        """Return what the first screen says."""
        return [("as asked", f"{self._compared} readings of the live objects are what the recipe asks for")]

    def told(self) -> list[str]:
        """Return what the last screen says: what the loop really did, and what it did not."""
        end = self.ran.get("end")
        if not end or not end["steps"]:
            return []
        tensors = f"all {self._changed} trained tensors changed"
        if end["unchanged"]:
            tensors = f"{self._changed} of {self._changed + len(end['unchanged'])} trained tensors changed"
        steps = f"{end['steps']} step{'s' * (end['steps'] != 1)}"
        counts = f"{end['rows']:,} rows, {end['tokens']:,} tokens, {end['trained_tokens']:,} of them trained"
        lines = [f"Ran: {steps}, {counts}; last rate {end['last_rate']:.3g}; {tensors}"]
        if end["unchanged"] and end["steps"] > 1:  # in the first step one half of LoRA has no gradient
            lines.append(f"  not changed: {_some(end['unchanged'])}")
        coarse = any(kind != "float32" for part in ("weights", "adapter weights") for kind in self.ran["before"][part])
        if coarse and end["share_changed"] < _HALF and self._moved > 0:
            lines.append(f"  only {end['share_changed']:.1%} of the weights moved: {_FINER}")
        if end["last_rate_asked"] not in (None, end["last_rate"]):
            lines.append(f"  the recipe asks for a last rate of {end['last_rate_asked']:.3g}")
        if end["steps_asked"] != end["steps_done"]:
            lines.append(f"  asked for {end['steps_asked']} steps, {end['steps_done']} were taken")
        return lines

    def _readings(self, loader: Any) -> dict[str, Any]:
        """Return every reading that is there before the first step."""
        trainer, model = self._trainer, self._trainer.model
        found: dict[str, Any] = {
            "processes": actual.processes(),
            "engine": actual.engine(trainer),
            **actual.weights(model),
            **actual.quantized(model),
            "attention": actual.attentions(model),
            "loss": actual.loss_path(model),
            **actual.adapter(model),
            "names without a module": expected.nameless(self._run, actual.adapted(model)),
            **actual.trained(model),
            **actual.optimized(trainer),
            **actual.rates(trainer, expected.times(trainer)),
            "activations computed again": actual.checkpointing(model),
            **actual.loader(trainer, loader),
            "neftune": actual.neftune(model),
            "trackers": actual.trackers(trainer),
            "seed": torch.initial_seed(),
            "steps": trainer.state.max_steps,
            "changed arguments": expected.changed(self._run, trainer.args),
        }
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}

    def _rows_of_step(self) -> int:
        """Return the rows of the step that comes to its end, over all processes; packs lie in one row, uncounted."""
        processes, at_a_time = actual.processes(), self.ran["before"]["rows at a time"] or 0
        if self._rows:
            return self._rows * processes
        of_loader = self._trainer.accelerator.gradient_state
        missing = at_a_time * processes - of_loader.remainder if of_loader.end_of_dataloader else 0
        return self._batches * at_a_time * processes - (missing if of_loader.remainder > 0 else 0)

    def _compare(self, points: Mapping[str, Point], readings: Mapping[str, Any]) -> None:
        """Stop the run where a reading is not what was asked; a key that the recipe writes can be mended there."""
        both = [name for name in points if name in readings]
        wrong = [n for n in both if readings[n] not in (points[n].value, *points[n].also)]
        self._compared += len(both)
        if not wrong:
            return
        recipe = self._run.recipe
        resumed = self._trainer.state.global_step > 0 and self._steps == 0
        write = _RESUMED if resumed else _WRITE
        faults = [Fault(recipe.where(points[n].key), _differs(n, points[n].value, readings[n]), write) for n in wrong]
        if any(points[n].key in recipe.places and len(points[n].key) > 1 for n in wrong):
            raise RecipeError(faults)
        raise NotAsAsked("\n".join(str(fault) for fault in faults))

    def _in_the_first(self, args: SFTConfig, rows: int) -> None:
        """Compare what the first step showed from inside."""
        inside = self._inside | {"rows of a step": rows}
        self.ran["first step"] = inside
        self._compare(expected.in_a_step(args, streamed=not hasattr(self._trainer.train_dataset, "__len__")), inside)

    def _count(self, model: torch.nn.Module, _: Any, batch: dict[str, Any]) -> None:
        """Count what a forward of the training loop gets; evaluation and generation take no gradient."""
        ids = batch.get("input_ids")
        if not torch.is_grad_enabled() or ids is None:
            return
        # the older TRL hands positions alone along
        apart = "cu_seq_lens_q" in batch or ("position_ids" in batch and batch.get("attention_mask") is None)
        if not self._inside:
            self._inside["modules without training mode"] = actual.asleep(model)
            self._inside["documents handed apart"] = apart
        mask, labels = batch.get("attention_mask"), batch.get("labels")
        self._batches += 1
        if not apart:  # else the packs lie in one row
            self._rows += ids.shape[0]
        self._tokens = self._tokens + (ids.numel() if mask is None else mask.sum())
        self._trained = self._trained + (0 if labels is None else (labels != -100).sum())

    def _look(self, module: torch.nn.Module, _: Any) -> None:
        """Note, once, what the first layer is computed in."""
        if torch.is_grad_enabled() and "modules without training mode" in self._inside:
            self._inside["autocast"] = actual.autocast(next(module.parameters()).device.type)
            self._handles.pop().remove()

    def _let_go(self) -> None:
        """Take the hooks off."""
        while self._handles:
            self._handles.pop().remove()

    def _end(self, state: TrainerState) -> None:
        """Take the readings of the end: what was consumed, which tensors changed on any process."""
        now, reduce = actual.prints(self._trainer.model), self._trainer.accelerator.reduce
        device = self._trainer.args.device
        names = [name for name in self._prints if name in now]
        moved = reduce(torch.tensor([int(now[n].bits != self._prints[n].bits) for n in names], device=device), "sum")
        pairs = [(now[n].some, self._prints[n].some) for n in names]
        elements = [int((new != old).sum()) for new, old in pairs], [new.numel() for new, _ in pairs]
        counted = [int(self._tokens), int(self._trained), *map(sum, elements)]
        sums = reduce(torch.tensor(counted, device=device), "sum").tolist()
        still = [name for name, there in zip(names, moved.tolist(), strict=True) if not there]
        self._changed = len(names) - len(still)
        self.ran["end"] = {
            "steps": self._steps,
            "steps_done": state.global_step,
            "steps_asked": state.max_steps,
            "rows": self._seen,
            "tokens": sums[0],
            "trained_tokens": sums[1],
            "last_rate": actual.significant(self._rate),
            "last_rate_asked": next(iter(self.ran["before"].get("rates to come", [])[-1:]), None),
            "changed": self._changed,
            "unchanged": still,
            "share_changed": round(sums[2] / max(sums[3], 1), 4),  # of the elements that are looked at
        }


def _differs(name: str, value: Any, reading: Any) -> str:
    if isinstance(reading, list) and value == []:
        return f"{name}: {_some(reading)}"
    return f"{name}: asked {_said(value)}, but {_said(reading)} would run"


def _some(names: list[Any]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(str, names[:_NAMED])) + more


def _said(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
