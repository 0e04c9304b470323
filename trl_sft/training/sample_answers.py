"""A few prompts are answered during training, so that a person can read how the answers change.

In: held-out prompts of `evaluation.before_after` or those of `evaluate.prompts`, the live trainer. Out: lines on the
screen, and the answers by step in samples.jsonl. Deliberately absent: the answers to held-out prompts before and after
training (`evaluation.before_after`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import SFTConfig, SFTTrainer

from trl_sft import console, ranks, run_folder
from trl_sft.evaluation import before_after, own_prompts
from trl_sft.evaluation.before_after import AFTER, BEFORE, PromptSet
from trl_sft.evaluation.generate import answer_prompts, build_generation_config
from trl_sft.evaluation.own_prompts import OwnPrompt
from trl_sft.recipe.checked import Run
from trl_sft.training.record import RunRecord

_PROMPTS = 3  # held-out ones that are answered at each evaluation
_SHOWN = 5  # of `evaluate.prompts` on the screen; samples.jsonl has all


class SampleAnswers(TrainerCallback):
    """Answers prompts at each evaluation but the first and the last.

    With `evaluate.prompts` it answers those, in place of held-out ones, also before and after training; and where the
    run is not evaluated during training, at each checkpoint.
    """

    def __init__(
        self, run: Run, trainer: SFTTrainer, prompts: PromptSet, *, own: Sequence[OwnPrompt], record: RunRecord
    ) -> None:
        """Choose the prompts: those of the recipe, else evenly from those of the evaluation.

        Args:
            run: the checked recipe.
            trainer: holds the live model.
            prompts: what base and tuned model are asked; empty = no held-out prompt is answered.
            own: the prompts of `evaluate.prompts`.
            record: of the run, for the screen and the clock.

        """
        self._run, self._trainer, self._record, self._own = run, trainer, record, list(own)
        every = max(1, len(prompts.prompts) // _PROMPTS)
        self._prompts, self._ids = prompts.prompts[::every][:_PROMPTS], prompts.ids[::every][:_PROMPTS]
        if self._own:
            self._prompts, self._ids = [], []
        self._path = run.output_dir / run_folder.SAMPLES
        self._answered = 0  # the last step whose evaluation was answered
        self._is_first_step, self._has_saved = True, False  # a checkpoint was written since the last step
        self._is_over = False  # then the weights may be those of an earlier step

    def on_step_begin(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Answer the recipe's own prompts before step 1, and after a checkpoint that training goes on from."""
        is_first, self._is_first_step = self._is_first_step, False
        if not self._own:
            return
        step, follows_checkpoints = state.global_step, args.eval_strategy == "no"
        if is_first and step:  # the run resumes
            before_after.remove_later_steps(self._path, step)
            answered = ranks.share(lambda: own_prompts.list_answered_steps(self._path, self._own))
            self._has_saved = step not in answered
        is_due = is_first if not step else self._has_saved and follows_checkpoints
        self._has_saved = False
        if is_due:
            self._answer_own(str(step) if step else BEFORE)
            if self._record.throughput is not None:  # it is no part of the step that begins
                self._record.throughput.clock.end_evaluation()

    def on_save(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note a checkpoint. It is answered when the next step begins, so that a run that stops here does not wait."""
        self._has_saved = True

    def on_train_end(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Answer the recipe's own prompts with the weights that will be saved, and nothing from then on."""
        if self._own:
            self._answer_own(AFTER)
        self._is_over = True

    def on_evaluate(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Answer the prompts; once where there are several evaluation sets."""
        step = state.global_step
        if self._is_over or step in (0, self._answered) or step >= state.max_steps:
            return
        self._answered = step
        if self._own:
            self._answer_own(str(step))
        elif self._prompts:
            self._answer_held_out(args, step)

    def _answer_held_out(self, args: SFTConfig, step: int) -> None:
        """Answer held-out prompts after a step."""
        began = time.monotonic()
        generation = (self._run.evaluate or {}).get("generation", {})
        config = build_generation_config(self._trainer, [prompt.reference for prompt in self._prompts], generation)
        devices = [args.device] if args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # sampled answers change nothing in the training that follows
            torch.manual_seed(args.seed)
            answers = [answer.text for answer in answer_prompts(self._trainer, self._ids, config, label="so far")]
        rows = [prompt.row for prompt in self._prompts]
        before_after.add_answers(self._path, step, dict(zip(rows, answers, strict=True)))
        lines = [
            (before_after.read_last_message(prompt.content), prompt.reference, answer.strip() or "(nothing)")
            for prompt, answer in zip(self._prompts, answers, strict=True)
        ]
        self._show_table(f"answers at step {step:,}", began, [("prompt", "expected", "answer"), *lines])

    def _answer_own(self, when: str) -> None:
        """Answer the prompts of `evaluate.prompts`. `when`: before, after, or the step."""
        began = time.monotonic()
        answers = own_prompts.answer(self._run, self._trainer, self._own, label="so far" if when.isdecimal() else when)
        entries = own_prompts.write_answers(self._path, self._own, answers, when=when)
        header: tuple[str, ...] = ("prompt", "answer")
        sides: tuple[str, ...] = (when,)
        if when == AFTER:
            header, sides = ("prompt", "base", "tuned"), (BEFORE, AFTER)
        lines = []
        for entry, given in zip(entries[:_SHOWN], answers, strict=False):
            texts = [given.text if side.isdecimal() else entry[side] or "" for side in sides]
            prompt = before_after.read_last_message(entry["prompt"])
            lines.append((prompt, *(text.strip() or "(nothing)" for text in texts)))
        title = f"answers at step {int(when):,}" if when.isdecimal() else f"answers {when} training"
        self._show_table(f"{title} to evaluate.prompts", began, [header, *lines])
        if len(entries) > _SHOWN:
            self._record.show(f"  {len(entries) - _SHOWN:,} more in {run_folder.SAMPLES}")

    def _show_table(self, title: str, began: float, rows: Sequence[tuple[str, ...]]) -> None:
        """Show answers with the time that they took."""
        self._record.show(f"{title} ({console.format_duration(time.monotonic() - began)})")
        for line in console.format_columns(rows, width=80):
            self._record.show(line)
