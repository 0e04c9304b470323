"""Scores the answers to the evaluation prompts at each evaluation, as the metric that decides which checkpoint is best.

In: the live trainer, the prompts that base and tuned model answer before and after training, a check. Out: one more
value in the metrics of an evaluation, before the Trainer logs them: so best checkpoint, early stopping, schedule,
trackers, log and report have it. Prompts, token limit and decoding are those of the answers before and after training;
a thought is taken off as `evaluate` does it. Random states and the mode of the model stay as they are, so the training
is the same, bit by bit, with and without it. Not here: which metric decides (`best_metric`).
"""

from __future__ import annotations

import contextlib
import functools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import TrainerState
from trl import SFTConfig, SFTTrainer

from trl_sft import console, run_folder
from trl_sft.evaluation import before_after, thoughts
from trl_sft.evaluation.before_after import BEFORE, PromptSet
from trl_sft.evaluation.checks.answer import CheckedAnswer
from trl_sft.evaluation.generate import GeneratedAnswer
from trl_sft.recipe.checked import Run
from trl_sft.training import best_metric, time_probe
from trl_sft.training.best_metric import AnswerMetric
from trl_sft.training.stages import TrainingInputs, find_answer_metric

_PROMPT_END = 16  # tokens in which the mark that opens a thought stands
_MANY_UNCLOSED = 0.5  # share of the answers that never close their thought, from which the screen says it


class GenerationMetric:
    """Answers the prompts and scores them, each time the Trainer is about to log an evaluation."""

    def __init__(
        self,
        run: Run,
        trainer: SFTTrainer,
        *,
        prompts: PromptSet,
        metric: AnswerMetric,
        inputs: TrainingInputs,
        show: Callable[[str], None],
    ) -> None:
        """Choose the prompts of the evaluation set that is scored, and put the score into what the Trainer logs.

        Args:
            run: the checked recipe.
            trainer: the live trainer; its `log` is replaced.
            prompts: what base and tuned model are asked.
            metric: which check scores the answers.
            inputs: of the run, with its evaluation sets and what the chat template writes around a thought.
            show: prints a line while the run goes on.

        """
        self._run, self._trainer, self._metric, self._show = run, trainer, metric, show
        self._prompts = best_metric.select_prompts(prompts, metric, inputs.rows)
        self._references = [prompt.reference for prompt in prompts.prompts]  # the longest limits every answer
        self._marks = inputs.datasets.encoder.thoughts
        is_single = len(inputs.rows.eval) == 1
        self._logged_loss = "eval_loss" if is_single else f"eval_{metric.evaluation_set}_loss"
        self._latest: dict[int, GeneratedAnswer] = {}  # row -> its answer at the last evaluation of this process
        self._evaluations = self._generated = self._reused = 0
        self._seconds = 0.0
        trainer.log = functools.partial(self._log, trainer.log)

    @property
    def latest_answers(self) -> dict[int, GeneratedAnswer]:
        """The answers at the last evaluation of this process, by row; {} = there was none."""
        return self._latest

    def first_screen(self, args: SFTConfig, state: TrainerState) -> list[tuple[str, str]]:
        """Return the line of the table before step 1: what decides, and how many answers that costs."""
        prompts, number = len(self._prompts.prompts), time_probe.count_evaluations(args, state)
        evaluations = console.format_number_of(number, "evaluation")
        verb = "is" if prompts == 1 else "are"
        asked = f"{console.format_number_of(prompts, 'prompt')} {verb} answered at each of "
        text = f"{self._metric.name} decides: {asked}"
        return [("best", f"{text}{evaluations} to come, {prompts * number:,} answers (evaluate.max_rows)")]

    def last_screen(self) -> list[str]:
        """Return the line of the last screen: what the answers cost; [] = none were scored."""
        if not self._evaluations:
            return []
        text = f"Answers for {self._metric.name}: {self._generated:,} generated"
        text += f", {self._reused:,} of the base model used again" if self._reused else ""
        return [f"{text}, in {console.format_duration(self._seconds)}"]

    def describe(self) -> dict[str, Any]:
        """Return what the answers of this process cost, for run.json."""
        return {
            "metric": self._metric.name,
            "prompts": len(self._prompts.prompts),
            "evaluations": self._evaluations,
            "generated": self._generated,
            "reused": self._reused,
            "seconds": round(self._seconds, 3),
        }

    def _log(self, log: Callable[..., None], logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as upstream does; to the metrics of the evaluation set add the score of its answers."""
        if self._logged_loss in logs:
            logs[self._metric.name] = self._measure()
        log(logs, *args, **kwargs)

    def _measure(self) -> float:
        """Answer and score the prompts; return the mean score."""
        began = time.monotonic()
        step = self._trainer.state.global_step
        with _restored(self._trainer.args.device):
            answers = self._answer_base() if not step else None
            if answers is None:
                torch.manual_seed(self._trainer.args.seed)  # sampled answers are the same after a resume
                answers = before_after.ask(
                    self._run, self._trainer, self._prompts, label="so far", references=self._references
                )
                self._generated += len(answers)
            else:
                self._reused += len(answers)
            value, unclosed = self._score(answers)
        self._latest = {prompt.row: given for prompt, given in zip(self._prompts.prompts, answers, strict=True)}
        self._evaluations += 1
        seconds = time.monotonic() - began
        self._seconds += seconds
        number = console.format_number_of(len(answers), "answer")
        is_over = any("train_loss" in entry for entry in self._trainer.state.log_history)
        weights = "of the weights that are saved" if is_over else f"at step {step:,}"
        self._show(f"{self._metric.name} {value:.4g} {weights} ({number}, {console.format_duration(seconds)})")
        if unclosed > _MANY_UNCLOSED * len(answers):
            advice = "Raise `evaluate.generation: {max_new_tokens: ...}`"
            self._show(f"  {unclosed:,} of them never close their thought, and count as empty. {advice}")
        return value

    def _answer_base(self) -> list[GeneratedAnswer] | None:
        """Return the base model's answers, which samples.jsonl has before step 1; None = some are missing."""
        samples = before_after.read_samples(self._run.output_dir / run_folder.SAMPLES)
        texts = {sample["row"]: sample.get(BEFORE) for sample in samples if not before_after.is_own(sample)}
        answers = [texts.get(prompt.row) for prompt in self._prompts.prompts]
        known = [GeneratedAnswer(text, None) for text in answers if text is not None]
        return known if len(known) == len(answers) else None

    def _score(self, answers: Sequence[GeneratedAnswer]) -> tuple[float, int]:
        """Return the mean score, and how many answers never close their thought."""
        scores, unclosed = [], 0
        for prompt, ids, given in zip(self._prompts.prompts, self._prompts.ids, answers, strict=True):
            split = thoughts.split_thought(
                given.text,
                self._marks.opening if self._marks else "",
                self._marks.closing if self._marks else "",
                is_open=self._opens_thought(ids),
            )
            unclosed += not split.is_closed
            request = self._metric.find_check(prompt.task)
            assert request is not None  # other prompts are not selected
            checked = CheckedAnswer(split.answer, prompt.reference, None, prompt.content, prompt.task)
            scores.append(request.score(checked))
        return sum(scores) / len(scores), unclosed

    def _opens_thought(self, ids: Sequence[int]) -> bool:
        """Tell whether a prompt ends with the mark that opens a thought."""
        if self._marks is None or not self._marks.opening:
            return False
        end = str(self._trainer.processing_class.decode(list(ids[-_PROMPT_END:])))
        return end.rstrip().endswith(self._marks.opening)


def score_answers(
    run: Run, inputs: TrainingInputs, trainer: SFTTrainer, *, prompts: PromptSet, show: Callable[[str], None]
) -> GenerationMetric | None:
    """Let each evaluation have the score of answers, where it decides which checkpoint is the best; None = it does not.

    Args:
        run: the checked recipe.
        inputs: of the run.
        trainer: the live trainer.
        prompts: what base and tuned model are asked.
        show: prints a line while the run goes on.

    """
    metric = find_answer_metric(run, inputs.rows, args=inputs.args)
    if metric is None:
        return None
    return GenerationMetric(run, trainer, prompts=prompts, metric=metric, inputs=inputs, show=show)


@contextlib.contextmanager
def _restored(device: torch.device) -> Iterator[None]:
    """Put back, after the block, the random states of torch, numpy and Python: a check may draw numbers."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
