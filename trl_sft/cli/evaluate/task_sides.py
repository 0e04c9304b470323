"""Base and tuned model do the tasks of lm-eval; what was done once is kept in `task_answers.jsonl`.

Inputs: tasks and the sides of an evaluation. Outputs: `task_answers.jsonl` (a line for each side and task, so that a
command that is stopped goes on with the next one), `task_samples.jsonl`, and what `eval.json` has under
`evaluation.lm_eval`. Not here: lm-eval (`evaluation.task_suites`), and statistics (`evaluation.task_results`).
"""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash

from trl_sft import console, run_folder
from trl_sft.cli.evaluate.sides import Answerer, Side
from trl_sft.errors import EXIT_OUT_OF_MEMORY, Fault, RecipeError, RunStopped
from trl_sft.evaluation import eval_packages, task_results, task_suites
from trl_sft.evaluation.task_results import BASE, PLAIN, TUNED
from trl_sft.evaluation.task_suites import PromptForm, SideScores, SuiteTask

_NO_TEMPLATE = "none: the task's own text"


class _TaskSide(NamedTuple):
    """A side of the evaluation as lm-eval asks it."""

    side: Side
    has_template: bool


def check_tasks(names: Sequence[str], *, has_endpoint: bool, has_gguf: bool) -> None:
    """Refuse tasks that cannot be run at all, before anything is loaded. Raises UserError."""
    if not names:
        return
    eval_packages.require_packages("--tasks", "lm_eval", extra=eval_packages.SUITES_EXTRA)
    if has_endpoint:
        problem = "tasks of lm-eval need a local model, and --endpoint names a server"
        fix = "Leave out --endpoint, or run the tasks with `lm_eval run --model local-chat-completions`."
        raise RecipeError(Fault("--tasks", problem, fix, code="run.bad_option"))
    if has_gguf:
        problem = "tasks of lm-eval need a model that transformers loads, and --tuned names a GGUF file"
        fix = "Leave out --tuned, or run the tasks with `lm_eval run --model gguf`."
        raise RecipeError(Fault("--tasks", problem, fix, code="run.bad_option"))


def run(
    answerer: Answerer,
    planned: Sequence[Side],
    names: Sequence[str],
    *,
    max_items: int | None,
    base_has_template: bool,
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Let base and tuned model do tasks, and compare them.

    Args:
        answerer: loads the models, with the tokenizer, template and precision of the run.
        planned: sides of the evaluation; those named base and tuned are used.
        names: of tasks, or YAML files; [] = none.
        max_items: of each task; None = all.
        base_has_template: whether the base model's own tokenizer has a chat template. If not, it also does the tasks
            without one, because a template that it never saw can cost it more than it lacks in knowledge.

    Returns:
        What `eval.json` has under `evaluation.lm_eval`, None = no tasks; and for each task and side how long it took.

    Raises:
        UserError: a task cannot be loaded or run.

    """
    if not names:
        return None, {}
    console.say("loading   lm-eval and its tasks")
    tasks = task_suites.load_tasks(names, max_items=max_items)
    sides = _plan(answerer, planned, base_has_template=base_has_template)
    runner = _TaskRunner(answerer, answerer.path.with_name(run_folder.TASK_ANSWERS))
    for name, task_side in sides.items():
        runner.run(name, task_side, tasks)
    answerer.release()
    facts = {name: _describe_side(answerer, task_side) for name, task_side in sides.items()}
    metrics = {task.name: task_suites.list_metrics(task) for task in tasks}
    version = importlib.metadata.version("lm_eval")
    records = [record for task in tasks for record in task_results.join_samples(task, runner.results[task.name])]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    run_folder.write_text(answerer.path.with_name(run_folder.TASK_SAMPLES), lines)
    result = task_results.build(tasks, runner.results, version=version, facts=facts, metrics=metrics)
    return result, runner.calls


def _plan(answerer: Answerer, planned: Sequence[Side], *, base_has_template: bool) -> dict[str, _TaskSide]:
    """Return the sides that do the tasks, by name."""
    found = {side.name: side for side in planned}
    has_template = answerer.renderer.has_history
    sides = {TUNED: _TaskSide(found[TUNED], has_template), BASE: _TaskSide(found[BASE], has_template)}
    if has_template and not base_has_template:
        sides[PLAIN] = _TaskSide(found[BASE], False)
    return sides


class _TaskRunner:
    """Runs tasks side by side; what the file has is not run again, and what is done is added to it at once.

    Attributes:
        results: by task, by side.
        calls: by task, by side: whether the file had it, and how long it took.

    """

    def __init__(self, answerer: Answerer, path: Path) -> None:
        """Read the file."""
        self.answerer, self.path = answerer, path
        self.results: dict[str, dict[str, SideScores]] = {}
        self.calls: dict[str, dict[str, Any]] = {}
        self._known = _read(path)
        if path.is_file() and not path.read_bytes().endswith(b"\n"):  # a killed process left half a line
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def run(self, name: str, task_side: _TaskSide, tasks: Sequence[SuiteTask]) -> None:
        """Let a side do tasks. Raises UserError, RunStopped."""
        keys = {task.name: _compute_key(self.answerer, task_side, task) for task in tasks}
        missing = [task for task in tasks if keys[task.name] not in self._known]
        for task in tasks:
            if task not in missing:
                self._keep(task, name, self._known[keys[task.name]], is_cached=True, seconds=0.0)
        if cached := len(tasks) - len(missing):
            console.say(f"lm-eval   {name}: {console.format_number_of(cached, 'task')} from {self.path.name}")
        if not missing:
            return
        with self.answerer.open_model(task_side.side) as model:
            for task in missing:
                began = time.monotonic()
                scores = self._run_task(task, task_side, model)
                seconds = round(time.monotonic() - began, 3)
                entry = {"key": keys[task.name], "side": name, "task": task.name, **scores._asdict()}
                run_folder.append_json(self.path, entry)
                run_folder.flush(self.path)
                self._keep(task, name, scores, is_cached=False, seconds=seconds)
                console.say(f"lm-eval   {name}: {task.name}, {task.items:,} items in {seconds:.1f} s")

    def _keep(self, task: SuiteTask, name: str, scores: SideScores, *, is_cached: bool, seconds: float) -> None:
        """Keep what a side did in a task."""
        self.results.setdefault(task.name, {})[name] = scores
        self.calls.setdefault(task.name, {})[name] = {"is_cached": is_cached, "seconds": seconds}

    def _run_task(self, task: SuiteTask, task_side: _TaskSide, model: Any) -> SideScores:
        """Return what a side did in a task. Raises UserError, RunStopped."""
        encoder = self.answerer.renderer.encoder
        marks = encoder.thoughts if task_side.has_template else None
        thought_end = marks.closing if marks is not None else ""
        form = PromptForm(task_side.has_template, encoder.template_kwargs, thought_end)
        tokenizer, batch_size = self.answerer.tokenizer, self.answerer.batch_size
        try:
            return task_suites.run_task(task, model, tokenizer, batch_size=batch_size, prompt_form=form)
        except torch.OutOfMemoryError:
            message = f"out of memory while the task {task.name} ran; finished tasks are kept\n"
            message += "Run the same command with a smaller --batch-size: it continues."
            raise RunStopped(message, EXIT_OUT_OF_MEMORY, code="run.out_of_memory") from None


def _compute_key(answerer: Answerer, task_side: _TaskSide, task: SuiteTask) -> str:
    """Return the key of what a side did in a task: the model, the task with its items, the prompt's form, lm-eval."""
    encoder = answerer.renderer.encoder
    template = [str(answerer.tokenizer.chat_template), dict(encoder.template_kwargs)] if task_side.has_template else []
    stops = answerer.config.eos_token_id
    parts = [task_side.side.digest, task.sha256, template, stops, importlib.metadata.version("lm_eval")]
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, default=str)
    return xxhash.xxh3_128(text.encode()).hexdigest()


def _describe_side(answerer: Answerer, task_side: _TaskSide) -> dict[str, Any]:
    """Return what stands beside the scores of a side."""
    facts = dict(task_side.side.facts)
    facts.pop("prompt_opens_thought", None)
    if not task_side.has_template:
        facts |= {"template": _NO_TEMPLATE, "template_sha256": None, "template_kwargs": {}, "thinking": "none"}
    return facts | {"batch_size": answerer.batch_size}


def _read(path: Path) -> dict[str, SideScores]:
    """Return what was done before, by key; a line that is damaged is left out."""
    entries = [entry for entry in run_folder.read_json_lines(path) if {"key", "scores", "samples"} <= entry.keys()]
    return {str(entry["key"]): SideScores(entry["scores"], entry["samples"]) for entry in entries}
