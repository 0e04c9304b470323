"""What happens during training: progress, the time left, signals, the time limit, non-finite losses.

In: events of the Trainer. Out: lines, log.jsonl, and `RunStopped` when the run has to end early, raised
after the checkpoint is whole; a second signal waits for nothing.
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
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import SFTConfig

from trl_sft import console, errors, run_folder

_TIMED_STEPS = 3  # the first steps after which the time left is told
_QUIET = ("total_flos", "runtime", "per_second")  # parts of log names that the lines leave out
_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")


class AlreadyTrained(Exception):
    """The checkpoint that the run goes on from is of its last step; the Trainer would train one more."""


class Progress(TrainerCallback):
    """Shows the table before step 1, a line for each log, a bar where somebody watches; writes log.jsonl."""

    def __init__(self, folder: Path, begin: Callable[..., list[tuple[str, str]]]) -> None:
        """`begin` takes the folder and makes the rows of the first screen from the Trainer's live objects."""
        self._log, self._begin = folder / run_folder.LOG, begin
        self._bar: Any = None
        self._first, self._warm = 0, 0.0

    def on_train_begin(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **live: Any) -> None:
        """Show the table; bring log.jsonl to the state that training starts from."""
        table = self._begin(args, state, live["model"])
        run_folder.write_text(self._log, "".join(json.dumps(entry) + "\n" for entry in state.log_history))
        if state.global_step >= state.max_steps:  # stopped between the last step and the end
            raise AlreadyTrained
        console.say()
        console.print_table(table)
        console.say()
        self._first = state.global_step
        if console.shows_progress() and not args.disable_tqdm:
            self._bar = tqdm(total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True)

    def on_step_end(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **live: Any) -> None:
        """Move the bar; after three steps tell the time left."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)
        done = state.global_step - self._first
        if done == 1:  # it also allocates and warms up, so the clock starts after it
            self._warm = time.monotonic()
        elif done == _TIMED_STEPS and state.max_steps > state.global_step:
            step = (time.monotonic() - self._warm) / (done - 1)
            left = console.format_duration(step * (state.max_steps - state.global_step))
            self._line(f"about {left} left at {step:.2g} s a step, evaluation and saving not counted")

    def on_log(
        self, args: SFTConfig, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **live: Any
    ) -> None:
        """Write the entry down and show it on one line."""
        if state.log_history:
            run_folder.append_json(self._log, state.log_history[-1])
        shown = {name: value for name, value in logs.items() if not any(part in name for part in _QUIET)}
        if "train_loss" not in logs and shown:
            words = (f"{n} {v:.4g}" if isinstance(v, float) else f"{n} {v}" for n, v in shown.items() if n != "epoch")
            self._line(f"step {state.global_step}/{state.max_steps}  " + "  ".join(words))

    def on_train_end(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **live: Any) -> None:
        """Take the bar down."""
        self.close()

    def close(self) -> None:
        """Take the bar down, also when training ended by an exception."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text)
        else:
            console.say(text)


class Guard(TrainerCallback):
    """Ends a run early, with a checkpoint: a signal, the time limit. Without one: a non-finite loss."""

    def __init__(self, max_hours: float | None, again: str) -> None:
        """`again` is the command that goes on with the run."""
        self._limit = math.inf if max_hours is None else time.monotonic() + max_hours * 3600
        self._again = again
        self._signal = 0
        self._saving = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals inside the block; the second one ends the process at once."""
        numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
        try:
            before = {number: signal.signal(number, self._take) for number in numbers}
        except ValueError:  # not the main thread, as in some notebooks: signals stay as they are
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **live: Any) -> None:
        """Ask for a checkpoint when the run has to end."""
        if self._signal or time.monotonic() > self._limit:
            args.save_only_model = False  # to go on, the optimizer has to be there
            control.should_save = self._saving = True

    def on_save(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **live: Any) -> None:
        """End the run now that the checkpoint is whole."""
        if self._saving and state.global_step < state.max_steps:
            why = f"by {signal.Signals(self._signal).name}" if self._signal else "at the time limit (run.max_hours)"
            code = errors.EXIT_SIGNAL + self._signal if self._signal else errors.EXIT_TIME_LIMIT
            where = f"{args.output_dir}/{run_folder.CHECKPOINT}{state.global_step}"
            message = f"stopped {why} after step {state.global_step} of {state.max_steps}; saved in {where}"
            raise errors.RunStopped(f"{message}\nTo go on: {self._again}", code)

    def on_log(
        self, args: SFTConfig, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **live: Any
    ) -> None:
        """End the run where a number is not finite. The loss alone does not show it: upstream logs 0 for NaN."""
        # fp16's loss scaler skips steps with an infinite gradient norm, by design
        watched = [name for name in logs if name != "grad_norm" or not args.fp16]
        bad = [name for name in watched if isinstance(logs[name], float) and not math.isfinite(logs[name])]
        if bad:
            last = next(reversed(run_folder.list_checkpoints(Path(str(args.output_dir)))), None)
            kept = f"the last checkpoint is {last}" if last else "no checkpoint was written yet"
            advice = (
                "a smaller step size or a smaller max_grad_norm usually helps; look at the rows before that step too"
            )
            message = f"the training failed: {', '.join(bad)} not finite at step {state.global_step}; {kept}"
            raise errors.RunStopped(f"{message}\nWhat to try: {advice}", errors.EXIT_TRAINING_FAILED)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._signal:
            raise errors.Interrupted(number)
        self._signal = number
        console.say(
            f"{signal.Signals(number).name}: saving at the end of this step, then stopping; once more to stop at once"
        )
