"""The screen of a running run: the table before step 1, a line for each log entry, one live line; and log.jsonl.

In: events of the Trainer. Out: lines on the screen, and the entries of log.jsonl. In a log file there are plain lines
without control characters. In a terminal a live line stands below them, in a notebook too. Deliberately absent: what
ends a run early (`callbacks`), and what is measured (`throughput`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import SFTConfig

from trl_sft import console, ranks, run_folder
from trl_sft.training import clock, throughput, time_probe
from trl_sft.training.callbacks import is_trained
from trl_sft.training.throughput import Throughput
from trl_sft.training.time_probe import TimeEstimate

_TIMED_STEPS = 3  # steps after which the time left is estimated
_HIDDEN = ("total_flos", "runtime", "per_second")  # parts of names that are logged and not shown
_LOSS = "loss"
# Columns of the log with their widths. Together with two spaces between them they take less than 80 characters.
_COLUMNS = {"step": 15, "train loss": 10, "eval loss": 9, "learning rate": 13, "tokens/s": 8, "time left": 12}


class Progress(TrainerCallback):
    """Shows how a run goes, and writes log.jsonl."""

    def __init__(
        self,
        folder: Path,
        begin: Callable[..., list[tuple[str, str]]],
        measured: Throughput,
        *,
        price_per_hour: float | None = None,
    ) -> None:
        """Keep what is called and measured.

        Args:
            folder: the run folder.
            begin: prepares the run folder, and returns the table before step 1.
            measured: measures steps, evaluations and checkpoints.
            price_per_hour: of all devices, in the user's currency; None = money is not shown.

        """
        self._price = price_per_hour
        self._log, self._begin, self._measured = folder / run_folder.LOG, begin, measured
        self._line: console.LiveLine | None = None
        self._first_step = 0
        self._has_header = False
        self._best_step: int | None = None  # whose weights the Trainer loaded at the end
        self._estimate: float | None = None  # seconds of the steps after the third, as estimated then
        self._losses: dict[str, float] = {}  # the newest train loss, eval loss and learning rate
        self._counted: tuple[float, int] | None = None  # tokens and timed steps at the last log entry
        self._rate: float | None = None  # tokens in a second, since the log entry before

    def estimate_time(self, state: TrainerState) -> list[tuple[str, str]]:
        """Estimate the time of the run before step 1; return the line of the table that says it, or why it cannot."""
        estimate = self._measured.estimate_time(price_per_hour=self._price)
        if isinstance(estimate, TimeEstimate):
            took = console.format_duration(estimate.probe_seconds)
            rows = "" if estimate.covers_all_rows else " of the stream's first rows"
            batches = f"{estimate.passes} sampled batches{rows}"
            return [("time", f"{estimate.write()}; measured on {batches} in {took}")]
        is_long = state.max_steps - state.global_step > _TIMED_STEPS
        when = f"estimated after step {state.global_step + _TIMED_STEPS}" if is_long else "not estimated"
        return [("time", f"{when}: {estimate}")]

    def on_train_begin(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the table; bring log.jsonl to the state that training starts from."""
        table = self._begin(args, state, kwargs["model"])
        if ranks.is_first():
            run_folder.write_text(self._log, "".join(json.dumps(entry) + "\n" for entry in state.log_history))
        self._measured.start()
        if is_trained(state, control):
            return
        console.say()
        console.print_table(table)
        console.say()
        self._first_step = state.global_step
        if not args.disable_tqdm:
            self._line = console.start_live_line(total=state.max_steps, initial=state.global_step)

    def on_step_begin(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note that the batches of the step have arrived."""
        self._measured.clock.end_part(clock.DATA)

    def on_step_end(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the live line; after three steps estimate the time left."""
        self._measured.end_step()
        steps, left = state.global_step - self._first_step, state.max_steps - state.global_step
        if steps == _TIMED_STEPS and left and (estimate := self._measured.clock.estimate_left(left, evaluations=0)):
            self._estimate, margin = estimate
            shown, spread = console.format_duration(self._estimate), console.format_duration(margin)
            price = self._describe_price(self._estimate)
            self.show(f"about {shown}{price} left (give or take {spread}), not counting evaluation and saving")
        if self._line is not None:
            self._line.update(state.global_step, self._describe_live(args, state))

    def on_log(
        self, args: SFTConfig, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """Write the entry to log.jsonl and show it on one line."""
        # an evaluation after training is of the weights that will be saved, and they may be those of an earlier step
        again = {} if self._best_step is None else {"weights_of_step": self._best_step}
        if state.log_history and ranks.is_first():
            run_folder.append_json(self._log, state.log_history[-1] | again)
        if "train_loss" in logs:  # the last entry; the last screen shows it
            return
        if self._best_step is not None:
            self.show(f"The weights of step {self._best_step}, the best, were loaded and evaluated again:")
        self._count_tokens(logs)
        self._show_entry(args, state, logs)
        if console.is_verbose():
            shown = {name: value for name, value in logs.items() if not any(part in name for part in _HIDDEN)}
            values = [f"{n} {v:.4g}" if isinstance(v, float) else f"{n} {v}" for n, v in shown.items()]
            for line in console.wrap("  ".join(values), indent=" " * 4):
                self.show(line)
            if _LOSS in logs and (parts := self._measured.clock.describe_parts()):
                self.show(f"    time of the steps so far: {parts}")

    def on_evaluate(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note how long the evaluation took."""
        self._measured.clock.end_evaluation()

    def on_save(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note how long the checkpoint took."""
        self._measured.clock.end_saving()

    def on_train_end(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remove the live line; note which weights the model has now."""
        self.close()
        self._measured.finish()
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        self._best_step = int(Path(best).name.removeprefix(run_folder.CHECKPOINT)) if best else None

    def close(self) -> None:
        """Remove the live line, also when training ended by an exception."""
        if self._line is not None:
            self._line.close()
            self._line = None

    def show(self, text: str) -> None:
        """Show one line, above the live line where there is one."""
        if self._line is None:
            console.say(text)
        else:
            self._line.show_above(text)

    def describe_time(self) -> list[str]:
        """Return how long the run took against the estimates, for the last screen; [] if too few steps were timed."""
        times, lines = self._measured.clock, []
        if (before := self._measured.estimate) and (seconds := self._measured.actual_seconds):
            took = f"{console.format_duration(seconds)}{self._describe_price(seconds).rstrip(',')}"
            lines.append(f"Time: steps and evaluations {took}; estimated before step 1: {before.write_time()}")
        if self._estimate is None:
            return lines
        took = console.format_duration(sum(times.step_seconds[_TIMED_STEPS - 1 :]))
        took += self._describe_price(sum(times.step_seconds[_TIMED_STEPS - 1 :]))
        estimate = f"estimated after step {self._first_step + _TIMED_STEPS}: {console.format_duration(self._estimate)}"
        others = {"evaluation": times.evaluation_seconds, "saving": times.saving_seconds}
        named = [f"{name} {console.format_duration(sum(seconds))}" for name, seconds in others.items() if seconds]
        return [*lines, ", ".join([f"Time: the steps took {took} ({estimate})", *named])]

    def _describe_price(self, seconds: float) -> str:
        """Return what a time costs, to be read behind it; "" without a price."""
        return "" if self._price is None else f", {self._price * seconds / 3600:.2f} at {self._price:g} an hour,"

    def _show_entry(self, args: SFTConfig, state: TrainerState, logs: Mapping[str, Any]) -> None:
        """Show a log entry as a line of the table; an evaluation set that has a name stands behind it."""
        evaluations = [name for name in logs if name.startswith("eval_") and name.endswith("_loss")]
        name = evaluations[0] if evaluations else ""
        if _LOSS in logs:
            self._losses["train loss"] = logs[_LOSS]
        if "learning_rate" in logs:
            self._losses["learning rate"] = logs["learning_rate"]
        if name:
            self._losses["eval loss"] = logs[name]
        if not name and _LOSS not in logs:
            return
        is_training = _LOSS in logs
        cells = {
            "step": f"{state.global_step:,}/{state.max_steps:,}",
            "train loss": f"{logs[_LOSS]:.4g}" if is_training else "",
            "eval loss": f"{logs[name]:.4g}" if name else "",
            "learning rate": f"{logs['learning_rate']:.3g}" if "learning_rate" in logs else "",
            "tokens/s": console.format_count(self._rate) if is_training and self._rate else "",
            "time left": self._describe_left(args, state) if is_training else "",
        }
        if not self._has_header:
            self._has_header = True
            self.show("  ".join(f"{column:>{width}}" for column, width in _COLUMNS.items()))
        line = "  ".join(f"{cells[column]:>{width}}" for column, width in _COLUMNS.items()).rstrip()
        of_set = name.removeprefix("eval_").removesuffix("loss").removesuffix("_")
        self.show(f"{line}  {of_set}" if of_set else line)

    def _count_tokens(self, logs: Mapping[str, Any]) -> None:
        """Measure the tokens in a second since the log entry before."""
        tokens, steps = logs.get("num_tokens"), self._measured.clock.step_seconds
        if not isinstance(tokens, float | int) or not steps:
            return
        if self._counted is not None and len(steps) > self._counted[1]:
            self._rate = (tokens - self._counted[0]) / sum(steps[self._counted[1] :])
        self._counted = (tokens, len(steps))

    def _describe_left(self, args: SFTConfig, state: TrainerState) -> str:
        """Return the time that is left, evaluations included; "" if it is not known or nothing is left."""
        left = state.max_steps - state.global_step
        estimate = self._measured.clock.estimate_left(left, evaluations=time_probe.count_evaluations(args, state))
        return console.format_duration(estimate[0]) if estimate and left else ""

    def _describe_live(self, args: SFTConfig, state: TrainerState) -> str:
        """Return the live line behind the steps: losses, learning rate, tokens/s, memory, time left with its spread."""
        parts = [f"{name} {value:.4g}" for name, value in self._losses.items()]
        if self._rate:
            parts.append(f"{console.format_count(self._rate)} tokens/s")
        if memory := throughput.measure_peak_memory(args.device):
            parts.append(f"peak {console.format_bytes(memory)}")
        left, evaluations = state.max_steps - state.global_step, time_probe.count_evaluations(args, state)
        if estimate := self._measured.clock.estimate_left(left, evaluations=evaluations):
            seconds, margin = (console.format_duration(value) for value in estimate)
            parts.append(f"{seconds} left ± {margin}")
        return ", ".join(parts)
