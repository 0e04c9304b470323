"""A few held-out prompts are answered at each evaluation, so that a person can read how the answers change.

In: the prompts of `evaluation.before_after`, the live trainer. Out: lines on the screen, and the answers by step in
samples.jsonl. Deliberately absent: the answers before and after training (`evaluation.before_after`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import SFTConfig, SFTTrainer

from trl_sft import console, run_folder
from trl_sft.evaluation import before_after
from trl_sft.evaluation.before_after import PromptSet
from trl_sft.evaluation.generate import answer_prompts, build_generation_config
from trl_sft.recipe.checked import Run

_PROMPTS = 3  # that are answered at each evaluation


class SampleAnswers(TrainerCallback):
    """Answers the same few prompts at each evaluation but the first and the last, which all prompts are asked at."""

    def __init__(self, run: Run, trainer: SFTTrainer, prompts: PromptSet, *, show: Callable[[str], None]) -> None:
        """Choose the prompts, evenly from those of the evaluation.

        Args:
            run: the checked recipe.
            trainer: holds the live model.
            prompts: what base and tuned model are asked; empty = nothing is answered.
            show: shows a line on the screen.

        """
        self._run, self._trainer, self._show = run, trainer, show
        every = max(1, len(prompts.prompts) // _PROMPTS)
        self._prompts, self._ids = prompts.prompts[::every][:_PROMPTS], prompts.ids[::every][:_PROMPTS]
        self._answered = 0  # the last step whose evaluation was answered
        self._is_over = False  # then the weights may be those of an earlier step

    def on_train_end(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Answer nothing from now on."""
        self._is_over = True

    def on_evaluate(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Answer the prompts; once where there are several evaluation sets."""
        step = state.global_step
        if not self._prompts or self._is_over or step in (0, self._answered) or step >= state.max_steps:
            return
        self._answered = step
        began = time.monotonic()
        generation = (self._run.evaluate or {}).get("generation", {})
        config = build_generation_config(self._trainer, [prompt.reference for prompt in self._prompts], generation)
        devices = [args.device] if args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # sampled answers change nothing in the training that follows
            torch.manual_seed(args.seed)
            answers = [answer.text for answer in answer_prompts(self._trainer, self._ids, config, label="so far")]
        rows = [prompt.row for prompt in self._prompts]
        before_after.add_answers(self._run.output_dir / run_folder.SAMPLES, step, dict(zip(rows, answers, strict=True)))
        self._show(f"answers at step {step:,} ({console.format_duration(time.monotonic() - began)})")
        lines = [
            (before_after.read_last_message(prompt.content), prompt.reference, answer.strip() or "(nothing)")
            for prompt, answer in zip(self._prompts, answers, strict=True)
        ]
        for line in console.format_columns([("prompt", "expected", "answer"), *lines], width=80):
            self._show(line)
