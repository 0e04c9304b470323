"""Ends a run early where the eval loss no longer improves (`run.early_stopping`).

In: events of the Trainer, and how many evaluations brought no improvement before the checkpoint that a run resumes
from. Out: the request to stop, lines for the screens, an entry for run.json. transformers' `EarlyStoppingCallback`
decides. Deliberately absent: the keys that it needs (`recipe.early_stopping`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState
from trl import SFTConfig

from trl_sft import checkpoints, console
from trl_sft.recipe import early_stopping
from trl_sft.recipe.checked import Run
from trl_sft.recipe.early_stopping import StoppingRule
from trl_sft.recipe.folder_decision import FolderDecision

COUNT = "evaluations_without_improvement"  # in the progress of a checkpoint's record


@dataclass(frozen=True)
class EarlyStop:
    """Where and why a run stopped early, as run.json has it."""

    step: int
    planned_steps: int
    evaluations: int  # in a row without an improvement
    threshold: float  # a change up to this size was no improvement
    metric: str  # as it is logged
    best_step: int  # whose weights are saved
    best_value: float

    def as_json(self) -> dict[str, Any]:
        """Return the entry of run.json."""
        return asdict(self)

    def __str__(self) -> str:
        """Return the line of the last screen."""
        reason = _describe_reason(self.metric, self.evaluations, self.threshold)
        best = f"The best was {self.best_value:.4g} at step {self.best_step}, whose weights are saved"
        return f"Stopped early at step {self.step} of {self.planned_steps}: {reason}. {best}."


class EarlyStopping(TrainerCallback):
    """Counts evaluations without an improvement, and ends the run after as many as the rule says.

    transformers restores the count only with `restore_callback_states_from_checkpoint`, and then replaces the callback;
    so the count stands in the record of each checkpoint.
    """

    def __init__(self, run: Run, decision: FolderDecision, show: Callable[[str], None]) -> None:
        """Take up the count of the checkpoint.

        Args:
            run: the checked recipe.
            decision: about the folder; its checkpoint is the one that the run resumes from.
            show: shows a line on the screen.

        """
        self._rule, self._show = early_stopping.read_rule(run.options), show
        patience, threshold = self._rule or StoppingRule(1, 0.0)
        self._upstream = EarlyStoppingCallback(patience, threshold)
        record = checkpoints.read_record(decision.checkpoint) if decision.checkpoint else {}
        self._upstream.early_stopping_patience_counter = record.get("progress", {}).get(COUNT, 0)
        self._is_over = False
        self._stop_step: int | None = None

    @property
    def count(self) -> int:
        """Evaluations in a row without an improvement, up to now."""
        return int(self._upstream.early_stopping_patience_counter)

    def first_screen(self, args: SFTConfig, state: TrainerState) -> list[tuple[str, str]]:
        """Return the line of the table before step 1."""
        if self._rule is None:
            return []
        steps = int(state.eval_steps or 1)
        every = f"{steps:,} steps" if steps > 1 else "step"
        if args.eval_strategy == "epoch":
            every = "epoch"
        number = f"{self._rule.patience} evaluations" if self._rule.patience > 1 else "1 evaluation"
        return [("early stop", f"after {number} without an improvement, one every {every}")]

    def on_train_begin(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Train no further step where the checkpoint is of the step at which the run stopped."""
        if self._rule is not None and self.count >= self._rule.patience and state.global_step < state.max_steps:
            self._stop(state, control)

    def on_evaluate(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count an evaluation; of several evaluation sets that of the metric alone."""
        metrics: Mapping[str, float] = kwargs["metrics"]
        if self._rule is None or self._is_over or _get_metric(args) not in metrics:
            return
        was_stopping = control.should_training_stop  # at the last step
        self._upstream.on_evaluate(args, state, control, metrics)
        if control.should_training_stop and not was_stopping and state.global_step < state.max_steps:
            self._stop(state, control)
            reason = _describe_reason(_get_metric(args), self.count, self._rule.threshold)
            text = f"Early stopping: the run ends at step {state.global_step:,} of {state.max_steps:,}: {reason}."
            for line in console.wrap(text, indent="  ", first_indent=""):
                self._show(line)

    def on_train_end(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count no further evaluation: it is of the weights that are saved."""
        self._is_over = True

    def describe(self, args: SFTConfig, state: TrainerState) -> EarlyStop | None:
        """Return where and why the run stopped early; None = it did not.

        Args:
            args: the live settings.
            state: the Trainer's state after training.

        """
        if self._rule is None or self._stop_step is None:
            return None
        return EarlyStop(
            step=self._stop_step,
            planned_steps=state.max_steps,
            evaluations=self.count,
            threshold=self._rule.threshold,
            metric=_get_metric(args),
            best_step=int(state.best_global_step or 0),
            best_value=float(state.best_metric),
        )

    def _stop(self, state: TrainerState, control: TrainerControl) -> None:
        """End the run after the present step."""
        self._stop_step = state.global_step
        control.should_training_stop = True


def _get_metric(args: SFTConfig) -> str:
    """Return the metric that decides, as it is logged."""
    return f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}"


def _describe_reason(metric: str, evaluations: int, threshold: float) -> str:
    """Return why a run stops, as a clause."""
    name = "the eval loss" if metric == "eval_loss" else metric
    more = f" by more than {threshold:g}" if threshold else ""
    return f"{name} has not improved{more} for {evaluations} evaluation{'s' * (evaluations != 1)}"
