"""Says the findings of a run while it runs, each once, and keeps them for run.json.

In: events of the Trainer. Out: lines on the screen, the findings, the phases of the loss. Nothing here stops a run:
`callbacks.Guard` stops one whose numbers are not finite. The rules are in `diagnosis`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState
from trl import SFTConfig

from trl_sft import console
from trl_sft.evaluation.completions import Completions
from trl_sft.training import live, summary
from trl_sft.training.clock import DATA, Clock
from trl_sft.training.diagnosis import find, findings, phases
from trl_sft.training.diagnosis.findings import Curves, Finding, InputTime, RunFacts

_EVERY_ENTRY = 100  # log entries after each of which the log is read; of a longer log after each hundredth of it
_MORE_ENTRIES = 1.2  # times the log entries of the last look, after which phases are looked for again
_LOW_LOSS = 0.2  # train loss below which the rows may be known by heart (Unsloth's guide)


def read_facts(
    args: SFTConfig, state: TrainerState, model: PreTrainedModel, *, optimizer: Any, loss_tokens: Mapping[str, int]
) -> RunFacts:
    """Return what findings need to know, from the live objects.

    Args:
        args: the live settings.
        state: the Trainer's state, with the number of steps.
        model: the live model.
        optimizer: the live optimizer.
        loss_tokens: tokens with loss of each evaluation set, by its name.

    """
    return RunFacts(
        is_adapter=hasattr(model, "peft_config"),
        peak_rate=live.read_peak_rate(optimizer),
        parameters=summary.count_parameters(model),
        optimizer=str(getattr(args.optim, "value", args.optim)),
        max_steps=state.max_steps,
        warmup_steps=args.get_warmup_steps(state.max_steps),
        max_grad_norm=args.max_grad_norm or 0.0,
        has_loss_scale=bool(args.fp16),
        loss_tokens=dict(loss_tokens),
        saves_best=bool(args.load_best_model_at_end),
    )


class Monitor(TrainerCallback):
    """Reads the log after each entry and says what is new."""

    def __init__(
        self,
        show: Callable[[str], None],
        loss_tokens: Mapping[str, int],
        *,
        clock: Clock,
        measure_completions: Callable[[], Completions | None],
    ) -> None:
        """Store how to show a line and how to measure what the model knows by heart.

        Args:
            show: prints one line.
            loss_tokens: tokens with loss of each evaluation set, by its name.
            clock: measures the training loop.
            measure_completions: completes rows; it returns None where nothing may be generated.

        """
        self.facts: RunFacts | None = None
        self.findings: list[Finding] = []
        self.alert: Callable[[Finding], None] = lambda _: None  # sends a finding to the trackers
        self._show, self._loss_tokens = show, loss_tokens
        self._measure_completions = measure_completions
        self._completions: Completions | None = None
        self._tried_completions = False
        self._entries_at_last_look = 0
        self._said_first_steps = False
        self._said_phases: set[str] = set()
        self._entries_of_phases = 0  # of the log when its phases were last looked for
        self._clock = clock

    def on_train_begin(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Read the facts. What a resumed run said before it stopped is not said again."""
        optimizer, model = kwargs.get("optimizer"), kwargs["model"]
        self.facts = read_facts(args, state, model, optimizer=optimizer, loss_tokens=self._loss_tokens)
        self.findings = find.find_all(state.log_history, self.facts) if state.global_step else []
        self._said_first_steps = state.global_step >= phases.FIRST_VERDICT_STEP
        self._entries_at_last_look = self._entries_of_phases = len(state.log_history)
        reached = phases.describe_new_phase(Curves(state.log_history, self.facts), set())
        self._said_phases = {reached[0]} if reached else set()
        if not state.global_step:
            self._look(state)

    def on_log(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Say new findings and, after 50 steps, what can be told so far."""
        logs = kwargs.get("logs") or {}
        is_evaluation = any(key.startswith("eval_") for key in logs)
        is_last = "train_loss" in logs
        new = len(state.log_history) - self._entries_at_last_look
        if is_last:
            self._measure_memorisation(state)
        if is_evaluation or is_last or new >= max(1, len(state.log_history) // _EVERY_ENTRY):
            self._look(state)
        if not is_evaluation and not is_last:
            self._say_first_steps(state)
            self._say_phase(state)
        self._clock.end_part(None)  # what was said here is no waiting for batches

    def note(self, finding: Finding) -> None:
        """Keep a finding for run.json that somebody else says, and send it to the trackers."""
        self.findings.append(finding)
        self.alert(finding)

    def describe_phases(self, log_history: Sequence[Mapping[str, Any]]) -> str:
        """Return one line on the phases of the train loss; "" where none is recognised."""
        if self.facts is None:
            return ""
        curves = Curves(log_history, self.facts)
        recognised = phases.recognise_phases(curves)
        return phases.describe_phases(recognised, float(curves.losses[0])) if recognised else ""

    def list_phases(self, log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the phases of the train loss as run.json has them; [] where none is recognised."""
        if self.facts is None:
            return []
        return [asdict(phase) for phase in phases.recognise_phases(Curves(log_history, self.facts))]

    def list_findings(self) -> list[dict[str, Any]]:
        """Return the findings as run.json has them, in the order in which they were said.

        A finding that a later one gives the reason of is left out.
        """
        explained = {code for finding in self.findings for code in find.list_explained(finding.code)}
        kept = [finding for finding in self.findings if finding.code not in explained]
        return [asdict(finding) | {"steps": list(finding.steps), "numbers": dict(finding.numbers)} for finding in kept]

    def _look(self, state: TrainerState) -> None:
        """Read the log and say what is new."""
        if self.facts is None:  # the checkpoint was of the last step, and no step was trained
            return
        self._entries_at_last_look = len(state.log_history)
        current = self._find(state)
        if any(finding.code == findings.OVERFITTING for finding in current) and self._measure_memorisation(state):
            current = self._find(state)
        known = {finding.code for finding in self.findings}
        for finding in current:
            if finding.code not in known:
                self.note(finding)
                if not finding.stops:  # the message that ends the run says it
                    self._say(finding)

    def _find(self, state: TrainerState) -> list[Finding]:
        if self.facts is None:  # the checkpoint was of the last step, and no step was trained
            return []
        waiting, steps = self._clock.parts.read()[DATA], self._clock.step_seconds
        input_time = InputTime(len(steps), waiting, sum(steps))
        return find.find_all(state.log_history, self.facts, completions=self._completions, input_time=input_time)

    def _measure_memorisation(self, state: TrainerState) -> bool:
        """Complete rows from their first half, once, where the train loss is low or the run overfits."""
        losses = [entry["loss"] for entry in state.log_history[-20:] if "loss" in entry]
        has_repeated_rows = (state.epoch or 0) > 1
        overfits = any(finding.code == findings.OVERFITTING for finding in self._find(state))
        if self._tried_completions or not has_repeated_rows:
            return False
        if not overfits and (not losses or losses[-1] >= _LOW_LOSS):
            return False
        self._tried_completions, self._completions = True, self._measure_completions()
        return True

    def _say_first_steps(self, state: TrainerState) -> None:
        """Say, once, what the first 50 steps allow to say."""
        if self._said_first_steps or not phases.FIRST_VERDICT_STEP <= state.global_step < state.max_steps:
            return
        assert self.facts is not None
        self._said_first_steps = True
        self._show(phases.describe_first_steps(Curves(state.log_history, self.facts)))

    def _say_phase(self, state: TrainerState) -> None:
        """Say, once each, that the train loss levels off and that it has converged."""
        assert self.facts is not None
        entries = sum("loss" in entry for entry in state.log_history[self._entries_of_phases :])
        if entries < max(1, (_MORE_ENTRIES - 1) * self._entries_of_phases) or state.global_step >= state.max_steps:
            return  # at the end the last screen says it
        self._entries_of_phases = len(state.log_history)
        new = phases.describe_new_phase(Curves(state.log_history, self.facts), self._said_phases)
        if new is not None:
            self._said_phases.add(new[0])
            for line in console.wrap(new[1], indent="  ", first_indent=""):
                self._show(line)

    def _say(self, finding: Finding) -> None:
        """Show a finding: what was seen, what it may mean, what to try."""
        lines = [f"Finding: {finding.code.replace('_', ' ')}. {finding.observation}"]
        lines += [f"{finding.meaning} What to try: {finding.advice}"]
        for first, text in zip(("", "  "), lines, strict=True):
            for line in console.wrap(text, indent="  ", first_indent=first):
                self._show(line)
