"""What ends a run early: signals, the time limit, losses and weights that are not finite.

In: events of the Trainer. Out: `RunStopped`, raised after the checkpoint is complete; a second signal ends the run at
once. Deliberately absent: the screen (`progress`).
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import SFTConfig

from trl_sft import console, errors, run_folder
from trl_sft.training import live

_SIGNALS = ("SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1")


class AlreadyTrained(Exception):
    """The checkpoint to resume from is of the last step; the Trainer would train one more step."""


class Guard(TrainerCallback):
    """Ends a run early: with a checkpoint at a signal or the time limit, without one at a loss that is not finite."""

    def __init__(self, max_hours: float | None, resume_command: str) -> None:
        """Start the clock of `max_hours`; None = no limit. `resume_command` is shown when the run is stopped."""
        self._limit = math.inf if max_hours is None else time.monotonic() + max_hours * 3600
        self._resume_command = resume_command
        self._signal = 0
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

    def on_step_end(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Request a checkpoint when the run has to end."""
        if self._signal or time.monotonic() > self._limit:
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
        # fp16's loss scaler skips steps with an infinite gradient norm, by design
        finite_names = [name for name in logs if name != "grad_norm" or not args.fp16]
        bad = [name for name in finite_names if isinstance(logs[name], float) and not math.isfinite(logs[name])]
        if bad:
            last = next(reversed(run_folder.list_checkpoints(Path(str(args.output_dir)))), None)
            saved = f"the last checkpoint is {last}" if last else "no checkpoint was saved yet"
            advice = "Lower the learning rate or train.max_grad_norm. Also look at the rows before that step."
            message = f"the training failed: {', '.join(bad)} not finite at step {state.global_step}; {saved}"
            raise errors.RunStopped(
                f"{message}\nWhat to try: {advice}", errors.EXIT_TRAINING_FAILED, code="run.not_finite"
            )

    def _check_finite(self, args: SFTConfig, state: TrainerState, problem: str) -> None:
        """End the run before it saves numbers that are not finite; an earlier checkpoint may still be good."""
        if not problem:
            return
        last = next(reversed(run_folder.list_checkpoints(Path(str(args.output_dir)))), None)
        saved = f"the last checkpoint is {last}" if last else "no checkpoint was saved yet"
        message = f"the training failed: {problem} not finite after step {state.global_step}; {saved}"
        raise errors.RunStopped(message, errors.EXIT_TRAINING_FAILED, code="run.not_finite")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal:
            raise errors.Interrupted(number)
        self._signal = number
        name = signal.Signals(number).name
        console.say(f"{name}: saving at the end of this step, then stopping. Send it once more to stop at once.")


def ends_epoch(state: TrainerState) -> bool:
    """Tell whether the step that ended last was the last one of its epoch."""
    return float(state.epoch).is_integer()


def _ignores_hangup() -> bool:
    """Tell whether this process was started so that it ignores SIGHUP."""
    return hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
