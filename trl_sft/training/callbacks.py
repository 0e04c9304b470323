"""Callbacks of a run: progress, time left, signals, the time limit, losses that are not finite.

In: events of the Trainer. Out: lines on the screen, log.jsonl, and `RunStopped` when the run has to end early.
`RunStopped` is raised after the checkpoint is complete; a second signal ends the run at once.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState
from trl import SFTConfig

from trl_sft import console, errors, run_folder
from trl_sft.training import live

_TIMED_STEPS = 3  # steps after which the time left is estimated
_HIDDEN = ("total_flos", "runtime", "per_second")  # parts of names that are logged and not shown
_SIGNALS = ("SIGHUP", "SIGINT", "SIGTERM", "SIGUSR1")


class AlreadyTrained(Exception):
    """The checkpoint to resume from is of the last step; the Trainer would train one more step."""


class Progress(TrainerCallback):
    """Shows the table before step 1, a line for each log entry, a progress bar in a terminal; writes log.jsonl."""

    def __init__(self, folder: Path, begin: Callable[..., list[tuple[str, str]]]) -> None:
        """Store `begin`, which prepares the run folder and returns the table before step 1."""
        self._log, self._begin = folder / run_folder.LOG, begin
        self._bar: Any = None
        self._first_step, self._clock_started = 0, 0.0
        self._best_step: int | None = None  # whose weights the Trainer loaded at the end

    def on_train_begin(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the table; bring log.jsonl to the state that training starts from."""
        table = self._begin(args, state, kwargs["model"])
        run_folder.write_text(self._log, "".join(json.dumps(entry) + "\n" for entry in state.log_history))
        if state.global_step >= state.max_steps:  # the earlier process stopped between the last step and the end
            raise AlreadyTrained
        console.say()
        console.print_table(table)
        console.say()
        self._first_step = state.global_step
        if console.shows_progress() and not args.disable_tqdm:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar; after three steps estimate the time left."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)
        steps = state.global_step - self._first_step
        if steps == 1:  # the first step also allocates memory and warms up, so the clock starts after it
            self._clock_started = time.monotonic()
        elif steps == _TIMED_STEPS and state.max_steps > state.global_step:
            seconds = (time.monotonic() - self._clock_started) / (steps - 1)
            left = console.format_duration(seconds * (state.max_steps - state.global_step))
            self._print(f"about {left} left at {seconds:.2g} s per step, not counting evaluation and saving")

    def on_log(
        self, args: SFTConfig, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Write the entry to log.jsonl and show it on one line."""
        # an evaluation after training is of the weights that will be saved, and they may be those of an earlier step
        again = {} if self._best_step is None else {"weights_of_step": self._best_step}
        if state.log_history:
            run_folder.append_json(self._log, state.log_history[-1] | again)
        shown = {name: value for name, value in logs.items() if not any(part in name for part in _HIDDEN)}
        if "train_loss" not in logs and shown:
            values = [f"{n} {v:.4g}" if isinstance(v, float) else f"{n} {v}" for n, v in shown.items() if n != "epoch"]
            step = f"step {state.global_step}/{state.max_steps}"
            if again:
                step = f"step {self._best_step}/{state.max_steps}, the best, loaded and evaluated again"
            self._print(f"{step}  " + "  ".join(values))

    def on_train_end(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remove the bar; note which weights the model has now."""
        self.close()
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        self._best_step = int(Path(best).name.removeprefix(run_folder.CHECKPOINT)) if best else None

    def close(self) -> None:
        """Remove the bar, also when training ended by an exception."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(console.escape_control_characters(text))
        else:
            console.say(text)


class Guard(TrainerCallback):
    """Ends a run early: with a checkpoint at a signal or the time limit, without one at a loss that is not finite."""

    def __init__(self, max_hours: float | None, resume_command: str) -> None:
        """Start the clock of `max_hours`; None = no limit. `resume_command` is shown when the run is stopped."""
        self._limit = math.inf if max_hours is None else time.monotonic() + max_hours * 3600
        self._resume_command = resume_command
        self._signal = 0
        self._saving = False

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
        if control.should_save:
            self._check_weights(args, state, kwargs["model"])

    def on_epoch_end(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at the weights before they are saved."""
        if control.should_save:
            self._check_weights(args, state, kwargs["model"])

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

    def _check_weights(self, args: SFTConfig, state: TrainerState, model: PreTrainedModel) -> None:
        """End the run before it saves weights that are not finite; an earlier checkpoint may still be good."""
        if live.has_finite_weights(model):
            return
        last = next(reversed(run_folder.list_checkpoints(Path(str(args.output_dir)))), None)
        saved = f"the last checkpoint is {last}" if last else "no checkpoint was saved yet"
        message = f"the training failed: weights not finite after step {state.global_step}; {saved}"
        raise errors.RunStopped(message, errors.EXIT_TRAINING_FAILED, code="run.not_finite")

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal:
            raise errors.Interrupted(number)
        self._signal = number
        name = signal.Signals(number).name
        console.say(f"{name}: saving at the end of this step, then stopping. Send it once more to stop at once.")


def _ignores_hangup() -> bool:
    """Tell whether this process was started so that it ignores SIGHUP."""
    return hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
