"""What ends a run early: signals, the time limit, losses and weights that are not finite.

In: events of the Trainer. Out: `RunStopped`, raised after the checkpoint is complete; a second signal ends the run at
once. Deliberately absent: the screen (`progress`).
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import SFTConfig, SFTTrainer

from trl_sft import console, errors, ranks, run_folder
from trl_sft.training import live
from trl_sft.training.diagnosis import signal_rules
from trl_sft.training.diagnosis.findings import Finding
from trl_sft.training.throughput import Throughput

_SIGNALS = ("SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1")


class AlreadyTrained(Exception):
    """The checkpoint to resume from is of the step at which training ended; the Trainer would train one more step."""


class Guard(TrainerCallback):
    """Ends a run early: with a checkpoint at a signal or the time limit, without one at a loss that is not finite."""

    def __init__(self, max_hours: float | None, resume_command: str, *, note: Callable[[Finding], None]) -> None:
        """Start the clock.

        Args:
            max_hours: None = no limit.
            resume_command: shown when the run is stopped.
            note: takes the finding of a loss that is not finite, for run.json.

        """
        self._note = note
        self._limit = math.inf if max_hours is None else time.monotonic() + max_hours * 3600
        self._resume_command = resume_command
        self._signal = 0
        self._notice = ""  # what the signal does, until it was said
        self._saving = False
        self._saves_at_epoch_end = False

    @contextlib.contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Handle signals inside the block: the first one saves and stops, the second one stops at once."""
        numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
        if _ignores_hangup():  # started by nohup: the run outlives its terminal
            numbers.remove(signal.SIGHUP)
        try:
            before = {number: signal.signal(number, self._on_signal) for number in numbers}
        except ValueError:  # not the main thread, as in some notebooks: signals stay as they are
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def watch_losses(self, trainer: SFTTrainer) -> Iterator[None]:
        """End the run, inside the block, at the first loss that is not finite.

        Upstream replaces such a loss by the mean of those before it (`logging_nan_inf_filter`, on by default;
        transformers 5.23, Trainer._inner_training_loop), so the log shows a number, or 0. Upstream waits for each loss
        to test it, so this test costs no further wait; without the filter the log shows the loss itself.
        """
        training_step = trainer.training_step

        def step_and_test(*args: Any, **kwargs: Any) -> Any:
            loss = training_step(*args, **kwargs)
            # fp16's loss scaler skips a step whose loss overflows, by design
            is_hidden = trainer.args.logging_nan_inf_filter and not trainer.args.fp16
            if is_hidden and not math.isfinite(value := ranks.find_largest(float(loss))):
                entry = {"step": trainer.state.global_step + 1, "loss": value}
                finding = signal_rules.find_not_finite([entry], has_loss_scale=False)
                assert finding is not None
                self._note(finding)
                self._stop(trainer.args, finding)
            return loss

        trainer.training_step = step_and_test
        try:
            yield
        finally:
            vars(trainer).pop("training_step", None)  # the method of the class again

    def on_train_begin(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Train nothing where the earlier process stopped between the last step and the end. Raises AlreadyTrained."""
        if is_trained(state, control):
            raise AlreadyTrained

    def on_step_end(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Request a checkpoint when the run has to end."""
        if self._notice:
            self._show_notice()
        self._signal = int(ranks.find_largest(self._signal))  # a launcher may signal one process, or one host
        if self._signal or ranks.is_any(time.monotonic() > self._limit):
            args.save_only_model = False  # resuming needs the optimizer
            control.should_save = self._saving = True
        # A run that resumes begins with the next epoch: what follows on this one has to be in the checkpoint.
        follows = "epoch" in (args.logging_strategy.value, args.eval_strategy.value, args.save_strategy.value)
        if control.should_save and follows and ends_epoch(state):
            control.should_save, self._saves_at_epoch_end = False, True
        if control.should_save:
            self._check_finite(args, state, live.find_not_finite(kwargs["model"], kwargs["optimizer"]))

    def on_epoch_end(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at weights and optimizer before they are saved."""
        control.should_save, self._saves_at_epoch_end = control.should_save or self._saves_at_epoch_end, False
        if control.should_save:
            self._check_finite(args, state, live.find_not_finite(kwargs["model"], kwargs["optimizer"]))

    def on_save(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End the run now that the checkpoint is complete."""
        if self._saving and state.global_step < state.max_steps:
            reason = f"by {signal.Signals(self._signal).name}" if self._signal else "at the time limit (run.max_hours)"
            exit_code = errors.EXIT_SIGNAL + self._signal if self._signal else errors.EXIT_TIME_LIMIT
            code = "run.interrupted" if self._signal else "run.time_limit"
            where = f"{args.output_dir}/{run_folder.CHECKPOINT}{state.global_step}"
            message = f"stopped {reason} after step {state.global_step} of {state.max_steps}; saved in {where}"
            raise errors.RunStopped(f"{message}\nTo resume: {self._resume_command}", exit_code, code=code)

    def on_log(
        self, args: SFTConfig, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """End the run if a logged number is not finite. The loss alone does not show it: upstream logs 0 for NaN."""
        entry = logs | {"step": state.global_step}
        finding = signal_rules.find_not_finite([entry], has_loss_scale=bool(args.fp16))
        if finding:
            self._stop(args, finding)

    def _stop(self, args: SFTConfig, finding: Finding) -> NoReturn:
        """End the run: say what was not finite, and which checkpoint is the last."""
        last = next(reversed(run_folder.list_checkpoints(Path(str(args.output_dir)))), None)
        saved = f"the last checkpoint is {last}" if last else "no checkpoint was saved yet"
        message = f"the training failed: {finding.observation.removesuffix('.')}; {saved}"
        text = f"{message}\n{finding.meaning}\nWhat to try: {finding.advice}"
        raise errors.RunStopped(text, errors.EXIT_TRAINING_FAILED, code="run.not_finite")

    def _check_finite(self, args: SFTConfig, state: TrainerState, problem: str) -> None:
        """End the run before it saves numbers that are not finite; an earlier checkpoint may still be good."""
        if not ranks.is_any(bool(problem)):
            return
        problem = problem or "weights of another process"
        last = next(reversed(run_folder.list_checkpoints(Path(str(args.output_dir)))), None)
        saved = f"the last checkpoint is {last}" if last else "no checkpoint was saved yet"
        message = f"the training failed: {problem} not finite after step {state.global_step}; {saved}"
        raise errors.RunStopped(message, errors.EXIT_TRAINING_FAILED, code="run.not_finite")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal:
            raise errors.Interrupted(number)
        self._signal = number
        name = signal.Signals(number).name
        self._notice = f"{name}: saving at the end of this step, then stopping. Send it once more to stop at once."
        self._show_notice()

    def _show_notice(self) -> None:
        """Say what the signal does: at once, or after the step if it came while a line was being printed."""
        with contextlib.suppress(RuntimeError):  # Python's streams refuse a call inside another one
            console.say(self._notice)
            self._notice = ""


@contextlib.contextmanager
def watch(trainer: SFTTrainer, guard: Guard, measured: Throughput) -> Iterator[None]:
    """Handle signals and closed streams, test each loss and time each backward pass, inside the block."""
    with (
        console.ignoring_closed_streams(),
        guard.handle_signals(),
        guard.watch_losses(trainer),
        measured.time_backward(),
    ):
        yield


def is_trained(state: TrainerState, control: TrainerControl) -> bool:
    """Tell whether no step is left to train, when training begins: after the last step, or that of early stopping."""
    return bool(state.global_step >= state.max_steps or control.should_training_stop)


def ends_epoch(state: TrainerState) -> bool:
    """Tell whether the step that ended last was the last one of its epoch."""
    return float(state.epoch).is_integer()


def _ignores_hangup() -> bool:
    """Tell whether this process was started so that it ignores SIGHUP."""
    return hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
