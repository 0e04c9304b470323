"""A run that resumes: its tokens are those of the checkpoint, its counters go on, and what differs is told.

In: the decision about the folder, the run's inputs, its live trainer. Out: a record in each checkpoint, a trainer that
goes on as if it had not been stopped, and lines for the screen. Which keys may change is in `recipe.resume_keys`; the
Trainer itself loads weights, optimizer, schedule and random states.

Private parts of upstream that are read and set, written for transformers 5.17 to 5.23 and TRL 1.8 to 1.16:
`Trainer._tr_loss`, `_total_loss_scalar`, `_globalstep_last_logged`; `SFTTrainer._metrics`, `_total_train_tokens`; the
name `rotate_checkpoints` in the module of the Trainer.
tests/training/test_resume.py compares every logged value with those of an uninterrupted run.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers.trainer
from transformers import TrainerCallback, TrainerControl, TrainerState, get_scheduler
from transformers.trainer_utils import rotate_checkpoints
from trl import SFTConfig, SFTTrainer

from trl_sft import checkpoints, console, earlier_run, ranks, run_folder
from trl_sft.errors import Fault, LaunchError, RecipeError
from trl_sft.recipe import data_files, folder_decision, resolved, resume_keys
from trl_sft.recipe.checked import Run
from trl_sft.recipe.folder_decision import CHANGED_DATA, FolderDecision
from trl_sft.tokenization import token_digest
from trl_sft.training import early_stopping, live, manifest, stages
from trl_sft.training.callbacks import AlreadyTrained, ends_epoch, is_trained
from trl_sft.training.early_stopping import EarlyStopping
from trl_sft.training.source_losses import SourceLosses
from trl_sft.training.stages import TrainingInputs
from trl_sft.training.verify import Verification

_TOKENS, _PROGRESS = "tokens", "progress"
_EPOCH_RANDOM_STATE, _MEASURED, _LOSSES = "random_state_of_epoch", "measured", "losses_by_source"  # in `_PROGRESS`


def prepare(run: Run, decision: FolderDecision) -> tuple[TrainingInputs, dict[str, Any]]:
    """Run all stages that need no weights, and compare the tokens with those of the checkpoint.

    Args:
        run: the checked recipe.
        decision: about the folder.

    Returns:
        The inputs of the run, and the digests of its tokens.

    Raises:
        UserError: a fault of the recipe, the rows, the tokenizer or the machine; a data file that changes meanwhile;
            or tokens that differ.

    """
    files = data_files.read(run)
    inputs = stages.prepare(run)
    data_files.check_unchanged(run, files)
    tokens = token_digest.compute(inputs.datasets, files.digests)
    check_tokens(run, decision, tokens, show=False)
    return inputs, tokens


@contextlib.contextmanager
def claim_folder(run: Run, tokens: dict[str, Any]) -> Iterator[FolderDecision]:
    """Lock the run folder inside the block, and decide once more: another process may have trained there meanwhile.

    Args:
        run: the checked recipe.
        tokens: digests of the prepared tokens.

    Yields:
        The final decision about the folder.

    Raises:
        LaunchError: another process trains in the folder, or not every process of the run sees it.
        RecipeError: the folder may no longer be used.

    """
    with contextlib.ExitStack() as claims:

        def claim() -> FolderDecision:
            """Lock the folder and decide."""
            if not claims.enter_context(run_folder.lock(run.output_dir)):
                where = run.recipe.where(("train", "output_dir"))
                problem = f"{run.output_dir}: another process trains there now"
                fix = "Wait until that process ends, or set another train.output_dir."
                raise LaunchError(Fault(where, problem, fix, code="run.folder_in_use"))
            earlier_run.restore_interrupted(run.output_dir)
            return check_tokens(run, folder_decision.check_folder(run, read_contents=True), tokens)

        yield ranks.share(claim) if ranks.count() == 1 else _claim_together(run, claim)


def _claim_together(run: Run, claim: Callable[[], FolderDecision]) -> FolderDecision:
    """Claim the folder in the first of several processes, and check that all of them see it. Raises LaunchError."""
    from trl_sft.training import shared_folder

    decision = ranks.share(claim)
    shared_folder.check(run)
    return decision


def check_tokens(run: Run, decision: FolderDecision, tokens: dict[str, Any], *, show: bool = True) -> FolderDecision:
    """Compare the prepared tokens with those that the checkpoint was trained on, and return the final decision.

    Args:
        run: the checked recipe.
        decision: about the folder.
        tokens: what `token_digest.compute` returns for this run.
        show: whether a difference that is accepted is printed.

    Raises:
        RecipeError: the tokens differ, and `run.allow` does not accept it.

    """
    if decision.checkpoint is None:
        return decision
    record = checkpoints.read_record(decision.checkpoint)
    before = record.get(_TOKENS, {}) | {"files": record.get("data", {})}
    difference = token_digest.describe_difference(before, tokens)
    if not difference:
        return decision
    if CHANGED_DATA in run.options.get("allow", []):
        if show:
            console.say(f"changed   other tokens than before the checkpoint: {difference}")
        return decision
    is_path = run.options.get("resume", "auto") not in ("auto", "never")
    if run.options.get("overwrite") and not is_path:
        return FolderDecision(replaces_earlier=True)
    problem = f"{decision.checkpoint} was trained on other tokens than the recipe prepares now: {difference}"
    fix = f"Restore what changed, or set `run.allow: [{CHANGED_DATA}]` to continue with the new tokens"
    fix += "." if is_path else ", or `run.overwrite: true` to start again."
    where = run.recipe.where(("run", "resume") if is_path else ("train", "output_dir"))
    raise RecipeError(Fault(where, problem, fix, code="resume.changed"))


class ResumeState(TrainerCallback):
    """Writes the record of each checkpoint, and sets the counters that the Trainer starts anew when it resumes."""

    def __init__(
        self,
        decision: FolderDecision,
        trainer: SFTTrainer,
        *,
        verification: Verification,
        stopping: EarlyStopping,
        losses: SourceLosses,
        entries: dict[str, Any],
    ) -> None:
        """Store the live objects.

        Args:
            decision: about the folder; its checkpoint is the one that the run resumes from.
            trainer: the live trainer.
            verification: counts what the loop consumes.
            stopping: counts evaluations without an improvement.
            losses: adds up losses by source and task.
            entries: what every checkpoint of the run records: recipe, tokens, the date that the template writes.

        """
        self._decision, self._trainer, self._verification = decision, trainer, verification
        self._entries, self._stopping, self._losses = entries, stopping, losses
        record = checkpoints.read_record(decision.checkpoint) if decision.checkpoint else {}
        self._record: dict[str, Any] = record
        self._random_state = torch.get_rng_state()
        self._is_first_epoch = True
        self._evaluates_on_start = trainer.args.eval_on_start

    def on_train_begin(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse weights or an optimizer that are not finite; restore the counters. Raises RecipeError."""
        self._losses.begin(state.global_step)
        if self._decision.checkpoint is None or state.global_step == 0:
            return
        self._check_finite(self._decision.checkpoint)
        best = Path(str(args.output_dir)) / Path(state.best_model_checkpoint or "").name
        if state.best_model_checkpoint and best.is_dir():  # the run folder may have had another path then
            state.best_model_checkpoint = str(best)
        args.eval_on_start = False  # it is an evaluation before step 1
        progress = self._record.get(_PROGRESS)
        if progress is None:  # a checkpoint that another program wrote
            return
        self._restore_counters(progress)
        if args.dataloader_persistent_workers and args.dataloader_num_workers:
            self._spare_random_state(state, kwargs["train_dataloader"])
        if is_trained(state, control):  # so nothing can be measured
            self._verification.measured |= progress.get(_MEASURED, {})

    def _restore_counters(self, progress: dict[str, Any]) -> None:
        """Set the counters that the Trainer has just set to zero."""
        trainer = self._trainer
        trainer._tr_loss = trainer._tr_loss + progress["loss_since_log"]
        trainer._total_loss_scalar = progress["loss_until_log"]
        trainer._globalstep_last_logged = progress["last_logged_step"]
        trainer._total_train_tokens = progress["num_tokens"]
        for name, values in progress["metrics"].items():
            trainer._metrics["train"][name] = list(values)
        self._verification.add_earlier_counts(progress["consumed"])
        self._losses.restore_window(progress.get(_LOSSES, {}), last_logged=progress["last_logged_step"])

    def _spare_random_state(self, state: TrainerState, train_loader: Any) -> None:
        """Give the loaders a generator of their own, where those of the stopped run had their workers already.

        A loader draws a number from torch's generator when it starts its workers, and persistent workers start once.
        The Trainer keeps the loader of each evaluation set, by the name of the set.
        """
        loaders = [train_loader]
        if any("eval" in name for entry in state.log_history for name in entry):
            datasets = self._trainer.eval_dataset
            names = datasets if isinstance(datasets, dict) else [None]
            loaders += [self._trainer.get_eval_dataloader(name) for name in names]
        for loader in loaders:
            getattr(loader, "base_dataloader", loader).generator = torch.Generator()  # accelerate wraps torch's loader

    def on_epoch_begin(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Draw the order of the epoch's rows from the same random state as before the stop.

        Grouping by length draws it from torch's own generator when the epoch begins; the Trainer restores that
        generator only after it has skipped the rows that are trained already.
        """
        saved = self._record.get(_PROGRESS, {}).get(_EPOCH_RANDOM_STATE)
        if self._is_first_epoch and saved and not args.ignore_data_skip:
            torch.set_rng_state(torch.frombuffer(bytearray(base64.b64decode(saved)), dtype=torch.uint8))
        self._is_first_epoch = False
        args.eval_on_start = self._evaluates_on_start
        self._random_state = torch.get_rng_state()

    def on_train_end(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Set back the argument that resuming changed: the arguments are saved with the model."""
        args.eval_on_start = self._evaluates_on_start

    def on_save(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the record of the checkpoint, then remove the checkpoints that `save_total_limit` does not keep."""
        if ends_epoch(state):  # the next epoch begins with the present random state
            self._random_state = torch.get_rng_state()
        progress = self._describe_progress()  # on every process: it adds up what all of them consumed
        folder = Path(str(args.output_dir)) / f"{run_folder.CHECKPOINT}{state.global_step}"
        if args.should_save and folder.is_dir():
            checkpoints.write_record(folder, self._entries | {_PROGRESS: progress})
            remove_old_checkpoints(args, state)

    def on_log(
        self, args: SFTConfig, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Correct the mean of the train loss: upstream divides by the steps of this process alone."""
        if "train_loss" in logs and state.global_step:
            mean = self._trainer._total_loss_scalar / state.global_step
            logs["train_loss"] = mean
            if state.log_history and "train_loss" in state.log_history[-1]:
                state.log_history[-1]["train_loss"] = mean

    def describe_changes(self, args: SFTConfig, state: TrainerState) -> list[tuple[str, str]]:
        """Return lines about what differs from the run that the checkpoint is of: keys, rows, the learning rate."""
        changes = self._decision.changes
        lines = [("changed", str(change)) for change in changes]
        effects = {change.effect for change in changes}
        if self._decision.checkpoint is not None:
            lines += [("changed", line) for line in self._compare_rows(args, state)]
            lines += [("changed", line) for line in self._compare_environment()]
        if resume_keys.EFFECT_SCHEDULE in effects or resume_keys.EFFECT_BATCH in effects:
            lines += [("changed", line) for line in self._compare_rates(args, state)]
        return lines

    def _compare_rows(self, args: SFTConfig, state: TrainerState) -> list[str]:
        """Return how many rows are skipped or trained twice, since the Trainer skips by steps."""
        before, now = self._record.get(checkpoints.ROWS_PER_STEP), count_rows_per_step(args)
        if before is None or (before == now and not args.ignore_data_skip):
            return []
        dataset = self._trainer.train_dataset
        rows = len(dataset) if hasattr(dataset, "__len__") else None
        trained = _find_position(state.global_step, before, rows)
        continues = _find_position(state.global_step, now, rows)
        if args.ignore_data_skip:  # the epoch, or the stream, begins again
            continues = continues // rows * rows if rows else 0
        kind = "packs" if args.packing else "rows"
        counts = f"{before} {kind} a step before the checkpoint, {now} now"
        if continues > trained:
            return [f"{counts}: {continues - trained:,} {kind} are skipped"]
        if continues < trained:
            return [f"{counts}: {trained - continues:,} {kind} are trained again"]
        return [f"{counts}: no {kind} are skipped or repeated"]

    def _compare_environment(self) -> list[str]:
        """Return which packages and parts of the machine are others than those that trained the checkpoint."""
        changes = manifest.list_environment_changes(self._record, self._entries)
        if not changes:
            return []
        return [f"{', '.join(changes)}: the numbers may differ from those of a run that was never stopped"]

    def _compare_rates(self, args: SFTConfig, state: TrainerState) -> list[str]:
        """Return the learning rate of the next step, if it is not the one that the recipe asks for."""
        optimizer = self._trainer.optimizer
        rate = optimizer.param_groups[0]["lr"]
        _, keywords = self._trainer.get_optimizer_cls_and_kwargs(args, self._trainer.model)
        expected = compute_learning_rate(args, state, keywords["lr"])
        if expected is None or math.isclose(rate, expected, rel_tol=1e-6):
            return []
        step = state.global_step + 1
        return [
            f"step {step} has the learning rate of the checkpoint, {rate:.4g}; the recipe asks for {expected:.4g}. "
            f"From step {step + 1} on the schedule of the recipe applies"
        ]

    def _describe_progress(self) -> dict[str, Any]:
        """Return the counters that a run needs to go on as if it had not been stopped."""
        trainer, measured = self._trainer, self._verification.measured
        return {
            "loss_since_log": trainer._tr_loss.item(),
            "loss_until_log": trainer._total_loss_scalar,
            "last_logged_step": trainer._globalstep_last_logged,
            "num_tokens": trainer._total_train_tokens,
            "metrics": {name: list(values) for name, values in trainer._metrics["train"].items() if values},
            "consumed": self._verification.count_consumed(),
            early_stopping.COUNT: self._stopping.count,
            _LOSSES: self._losses.describe_window(),
            _MEASURED: {name: measured[name] for name in ("first_step", "after_training") if name in measured},
            _EPOCH_RANDOM_STATE: base64.b64encode(self._random_state.numpy().tobytes()).decode(),
        }

    def _check_finite(self, checkpoint: Path) -> None:
        """Refuse a checkpoint with numbers that are not finite. Raises RecipeError."""
        part = live.find_not_finite(self._trainer.model, self._trainer.optimizer)
        if not part:
            return
        verb = "hold" if part == "weights" else "holds"
        problem = f"the {part} of {checkpoint} {verb} numbers that are not finite"
        fix = "Set `run.resume` to an earlier checkpoint, with another `train.output_dir`; or start a new run."
        raise RecipeError(Fault(str(checkpoint), problem, fix, code="resume.unreadable_checkpoint"))


def describe_run(run: Run, args: SFTConfig, *, tokens: dict[str, Any], day: datetime.date | None) -> dict[str, Any]:
    """Return what run.json and every checkpoint record, so that a later process can tell what changed.

    Args:
        run: the checked recipe.
        args: the live settings.
        tokens: what `token_digest.compute` returns.
        day: that the template writes; None = none.

    """
    entries = {
        "fingerprint": resolved.compute_fingerprint(run),
        folder_decision.VALUES: folder_decision.list_values(run),
        "data": tokens["files"],
        _TOKENS: {name: value for name, value in tokens.items() if name != "files"},
        checkpoints.ROWS_PER_STEP: count_rows_per_step(args),
        **manifest.describe_environment(run),
    }
    return entries | {folder_decision.TEMPLATE_DATE: day.isoformat() if day else None}


@contextlib.contextmanager
def removing_no_checkpoints() -> Iterator[None]:
    """Inside the block the Trainer itself removes no old checkpoint.

    It removes them before `on_save`: a process that is killed then leaves the new checkpoint without its record, and
    no older one to resume from.
    """
    upstream = transformers.trainer.rotate_checkpoints
    transformers.trainer.rotate_checkpoints = lambda *_, **__: None
    try:
        yield
    finally:
        transformers.trainer.rotate_checkpoints = upstream


def remove_old_checkpoints(args: SFTConfig, state: TrainerState) -> None:
    """Remove the checkpoints that `save_total_limit` does not keep, the lowest step first.

    The Trainer goes by the times of the folders, which a copy or a wrong clock changes.
    """
    rotate_checkpoints(
        output_dir=args.output_dir,
        save_total_limit=args.save_total_limit,
        best_model_checkpoint=state.best_model_checkpoint,
        use_mtime=False,
    )


def train(trainer: SFTTrainer, checkpoint: Path | None) -> None:
    """Train; a run whose checkpoint is of its last step is only made ready to be saved.

    Args:
        trainer: with the callbacks of the run.
        checkpoint: that the run resumes from; None = it begins.

    """
    try:
        with removing_no_checkpoints():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except AlreadyTrained:
        finalize(trainer)


def finalize(trainer: SFTTrainer) -> None:
    """Log the train loss and load the best weights, where the checkpoint is of the last step.

    `Trainer.train` would train one more step. Written for transformers 5.17 to 5.23.
    """
    if ranks.is_first():
        remove_old_checkpoints(trainer.args, trainer.state)  # the process may have been killed before
    trainer._finalize_training(trial=None, num_train_samples=0, start_time=time.time())


def count_rows_per_step(args: SFTConfig) -> int:
    """Return the rows, or packs, of an optimizer step over all processes."""
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
    return int(rows * live.count_row_groups() if args.world_size > 1 else rows)


def compute_learning_rate(args: SFTConfig, state: TrainerState, first_rate: float | None) -> float | None:
    """Return the learning rate that the recipe's own schedule has for the next step.

    Args:
        args: the live settings.
        state: the Trainer's state, with the steps so far and in all.
        first_rate: the learning rate of the recipe; None = the optimizer chooses its own.

    Returns:
        The learning rate; None = it depends on the loss or the optimizer.

    """
    if first_rate is None or args.lr_scheduler_type.value in resume_keys.LOSS_SCHEDULES:
        return None
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], first_rate)
    schedule = get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(state.max_steps),
        num_training_steps=state.max_steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    optimizer.step()
    for _ in range(state.global_step):
        schedule.step()
    return float(optimizer.param_groups[0]["lr"])


def _find_position(steps: int, rows_per_step: int, rows: int | None) -> int:
    """Return how many rows lie before the next step, as the Trainer counts: whole epochs, then steps."""
    if rows is None:
        return steps * rows_per_step
    steps_per_epoch = math.ceil(rows / rows_per_step)
    return steps // steps_per_epoch * rows + min(rows, steps % steps_per_epoch * rows_per_step)
