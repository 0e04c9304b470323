"""Before and after: base and tuned model answer the same held-out prompts through the same code.

In: the held-out rows and a live trainer. Out: `samples.jsonl` (each prompt with both answers), `eval.json` (metrics,
losses, perplexities, metrics of each task) and lines for the last screen. The base model answers before step 1, when
the live model still is the base model, and its answers are saved at once. So no second model is loaded, and a resumed
run does not generate them again.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from trl import SFTTrainer

from trl_sft import ranks, run_folder
from trl_sft.console import format_columns
from trl_sft.data.formats import TEXT
from trl_sft.data.formatted_columns import read_row
from trl_sft.data.messages import unescape
from trl_sft.data.rows import RunRows
from trl_sft.evaluation.generate import GeneratedAnswer, answer_prompts, build_generation_config
from trl_sft.evaluation.metrics import METRICS
from trl_sft.recipe.checked import Run, Setting
from trl_sft.recipe.yaml_reader import Key

BEFORE, AFTER = "before", "after"
STEPS = "steps"  # in samples.jsonl: step -> the answer of that step
STOPPED = "stopped"  # in a sample: side -> whether the model ended its answer; None = it cannot be told
LOSS_AFTER = "loss_after"  # in a sample: the mean loss of the row's loss tokens after training
_MAX_ROWS = 100  # held-out prompts that are answered: the default of evaluate.max_rows
_SHOWN = 5  # prompts side by side on the last screen
_LOSS, _ACCURACY = "eval_loss", "eval_mean_token_accuracy"
_LOSS_OF = f"{_LOSS}/"  # begins the loss of a source or a task
_MAX_LOG = 700.0  # the largest loss whose exponential is still a finite float


class Prompt(NamedTuple):
    """One held-out prompt."""

    row: int  # of the held-out rows, from 0
    task: str  # "" = the rows name none
    content: Any  # a text, or messages
    reference: str  # the expected answer
    tools: Any = None  # of its chat; None = none


class PromptSet(NamedTuple):
    """The prompts that base and tuned model answer."""

    prompts: list[Prompt]
    ids: list[list[int]]  # the prompts' tokens, as training rendered them
    loss_tokens: dict[str, int]  # of each evaluation set, by its name


class Comparison(NamedTuple):
    """The answers and metrics before and after training."""

    samples: list[dict[str, Any]]  # row, task, prompt, reference, before, after, stopped, loss_after
    summary: dict[str, Any]  # as in eval.json


def choose_settings(run: Run, *, has_eval_rows: bool) -> dict[Key, Setting]:
    """Return `train.eval_on_start: true` if rows are held out and the recipe leaves the key open."""
    if run.evaluate is None or not has_eval_rows or run.train.get("eval_on_start") is not None:
        return {}
    reason = "to tell at the end what training changed (evaluate: false = off)"
    return {("train", "eval_on_start"): Setting(True, reason)}


def select_prompts(
    run: Run, rows: RunRows, *, encode: Callable[[Any, Any], list[int]], ledger: Mapping[str, Any]
) -> PromptSet:
    """Return held-out prompts, drawn with the run's seed; none for rows of text, or with `evaluate: false`.

    Args:
        run: the checked recipe.
        rows: the formatted rows.
        encode: converts a prompt (a text, or messages) and its tools into the token ids that generation starts from.
        ledger: the counts of rows and tokens, as in `ledger.json`.
    """
    eval_rows = rows.eval_rows
    loss_tokens = {name: counts["tokens"]["loss"] for name, counts in ledger["eval"].items()}
    if run.evaluate is None or eval_rows is None or rows.row_type == TEXT:
        return PromptSet([], [], loss_tokens)
    number = min(int(run.evaluate.get("max_rows", _MAX_ROWS)), len(eval_rows))
    indices = sorted(random.Random(run.train.get("seed", 42)).sample(range(len(eval_rows)), number))
    selected = [read_row(eval_rows, index) for index in indices]
    ids = [encode(row["prompt"], row.get("tools")) for row in selected]
    prompts = [_read_prompt(index, row) for index, row in zip(indices, selected, strict=True)]
    if len(rows.eval) > 1:  # a row without a task gets the name of its evaluation set as its task
        names = list(rows.eval)
        ends = np.cumsum([len(split.order) for split in rows.eval.values()])
        sets = [names[n] for n in np.searchsorted(ends, indices, side="right")]
        prompts = [prompt._replace(task=prompt.task or name) for prompt, name in zip(prompts, sets, strict=True)]
    return PromptSet(prompts, ids, loss_tokens)


def ask_base(run: Run, trainer: SFTTrainer, prompts: PromptSet) -> str:
    """Generate and save the base model's answers; return a note for the screen, "" = none.

    A resumed run keeps the saved answers. If the file is lost, only LoRA can generate them again, with the adapter off.
    """
    path = run.output_dir / run_folder.SAMPLES
    if not prompts.prompts:
        return ""
    if ranks.share(lambda: _has_answers(path, prompts.prompts)):
        remove_later_steps(path, trainer.state.global_step)
        return ""
    resumed = trainer.state.global_step > 0
    if resumed and not hasattr(trainer.model, "disable_adapter"):
        _write_held_out(path, [describe_prompt(prompt) for prompt in prompts.prompts])
        return "samples.jsonl has lost the base model's answers, so the last screen shows no comparison"
    if resumed:
        with trainer.model.disable_adapter():
            answers = ask(run, trainer, prompts, label=BEFORE)
    else:
        answers = ask(run, trainer, prompts, label=BEFORE)
    pairs = zip(prompts.prompts, answers, strict=True)
    _write_held_out(path, [describe_prompt(prompt) | _describe_answer(answer, BEFORE) for prompt, answer in pairs])
    return ""


def compare(
    run: Run,
    trainer: SFTTrainer,
    prompts: PromptSet,
    *,
    metrics: Mapping[str, float],
    measure_losses: Callable[[Sequence[int]], Mapping[int, float]],
    answers: Mapping[int, GeneratedAnswer] | None = None,
) -> Comparison | None:
    """Generate the tuned model's answers; write samples.jsonl and eval.json. None without held-out rows.

    Args:
        run: the checked recipe.
        trainer: holds the tuned model.
        prompts: what to ask.
        metrics: of the last evaluation, as the Trainer names them.
        measure_losses: returns the loss of held-out rows, each by itself.
        answers: of the tuned model, by row, where they were generated already; None = they were not.
    """
    if _LOSS not in metrics or run.evaluate is None:
        return None
    path = run.output_dir / run_folder.SAMPLES
    earlier = {sample["row"]: sample for sample in read_samples(path)} if prompts.prompts else {}
    losses = measure_losses([prompt.row for prompt in prompts.prompts])
    samples = []
    if not answers or any(prompt.row not in answers for prompt in prompts.prompts):
        asked = ask(run, trainer, prompts, label=AFTER)
        answers = {prompt.row: answer for prompt, answer in zip(prompts.prompts, asked, strict=True)}
    for prompt in prompts.prompts:
        answer = answers[prompt.row]
        before = earlier.get(prompt.row, {})
        described = _describe_answer(answer, AFTER)
        described[STOPPED] = {BEFORE: None} | before.get(STOPPED, {}) | described[STOPPED]
        steps = {STEPS: before[STEPS]} if STEPS in before else {}
        loss = {LOSS_AFTER: losses[prompt.row]} if prompt.row in losses else {}
        samples.append(describe_prompt(prompt) | {BEFORE: before.get(BEFORE)} | described | loss | steps)
    first = read_metrics(trainer.state.log_history, 0, prompts.loss_tokens)
    summary = {
        "prompts": len(samples),
        BEFORE: _losses(first, prompts.loss_tokens) | _scores(run, samples, BEFORE),
        AFTER: _losses(metrics, prompts.loss_tokens) | _scores(run, samples, AFTER),
        "tasks": _scores_by_task(run, samples),
    }
    if samples:
        _write_held_out(path, samples)
    if ranks.is_first():
        text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        run_folder.write_text(run.output_dir / run_folder.EVAL, text)
    return Comparison(samples, summary)


def add_answers(path: Path, step: int, answers: Mapping[int, str]) -> None:
    """Write the answers of a step into samples.jsonl.

    Args:
        path: of samples.jsonl, which has a line for each prompt.
        step: the optimizer step.
        answers: row of the prompt -> its answer.

    """
    samples = read_samples(path)
    for sample in samples:
        if sample["row"] in answers:
            sample[STEPS] = sample.get(STEPS, {}) | {str(step): answers[sample["row"]]}
    if samples:
        write_samples(path, samples)


def read_metrics(log_history: Sequence[Mapping[str, Any]], step: int, loss_tokens: Mapping[str, int]) -> dict[str, Any]:
    """Return the metrics of the evaluation after a step; of several evaluation sets also their mean.

    Args:
        log_history: of the Trainer's state.
        step: the optimizer step.
        loss_tokens: the tokens with loss of each evaluation set, by its name.
    """
    metrics: dict[str, Any] = {}
    for entry in log_history:
        if entry["step"] != step:
            continue
        values = {key: value for key, value in entry.items() if key.startswith("eval_")}
        # TRL logs each evaluation set in an entry of its own, and its own metrics without the set's name
        name = next((name for name in loss_tokens if f"eval_{name}_loss" in values), "")
        for key, value in values.items():
            # `eval_loss/NAME`, by source or task, is of that name already
            unnamed = name and "/" not in key and not key.startswith(f"eval_{name}_")
            metrics[f"eval_{name}_{key.removeprefix('eval_')}" if unnamed else key] = value
    return average_metrics(metrics, loss_tokens)


def list_eval_losses(
    log_history: Sequence[Mapping[str, Any]], loss_tokens: Mapping[str, int]
) -> tuple[tuple[int, float], ...]:
    """Return (step, eval loss) of each evaluation during training, in order; step 0 = before training.

    Args:
        log_history: of the Trainer's state; the evaluation after the entry with `train_loss` is of the weights that
            the Trainer loaded at the end, and not in the result.
        loss_tokens: the tokens with loss of each evaluation set, by its name.
    """
    during = itertools.takewhile(lambda entry: "train_loss" not in entry, log_history)
    entries = [entry for entry in during if any(key.startswith("eval_") for key in entry)]
    by_step: dict[int, list[Mapping[str, Any]]] = {}
    for entry in entries:
        by_step.setdefault(entry["step"], []).append(entry)
    metrics = ((step, read_metrics(evaluations, step, loss_tokens)) for step, evaluations in by_step.items())
    return tuple((step, values[_LOSS]) for step, values in metrics if _LOSS in values)


def average_metrics(metrics: Mapping[str, Any], loss_tokens: Mapping[str, int]) -> dict[str, Any]:
    """Return metrics of several evaluation sets with the mean of all, weighted by their tokens with loss."""
    result = dict(metrics)
    if set(loss_tokens) == {"eval"}:
        return result
    for metric in (_LOSS, _ACCURACY):
        keys = {name: f"eval_{name}_{metric.removeprefix('eval_')}" for name in loss_tokens}
        values = {name: metrics[key] for name, key in keys.items() if key in metrics}
        if values and len(values) == len(loss_tokens):
            total = sum(values[name] * loss_tokens[name] for name in loss_tokens)
            result[metric] = total / sum(loss_tokens.values())
    return result


def last_screen(comparison: Comparison) -> Iterator[str]:
    """Yield metrics before and after, by task, and five prompts side by side."""
    summary = comparison.summary
    for name in METRICS:
        if summary[AFTER].get(name) is None:
            continue
        yield f"Held-out prompts, {name.replace('_', ' ')}: {_percentages(summary, name)} of {summary['prompts']}"
        for task, scores in summary["tasks"].items():
            yield f"  {task:<20} {_percentages(scores, name)} of {scores['prompts']}"
    step = max(1, len(comparison.samples) // _SHOWN)
    shown = comparison.samples[::step][:_SHOWN]
    if shown:
        yield ""
        table = [("prompt", "expected", "base", "tuned")]
        for sample in shown:
            before, after = ((sample[side] or "").strip() or "(nothing)" for side in (BEFORE, AFTER))
            table.append((read_last_message(sample["prompt"]), sample["reference"], before, after))
        yield from format_columns(table)


def ask(
    run: Run, trainer: SFTTrainer, prompts: PromptSet, *, label: str, references: Sequence[str] = ()
) -> list[GeneratedAnswer]:
    """Return the live model's answers; of one that is cut before its reference would have ended, `stopped` is None.

    Args:
        run: the checked recipe.
        trainer: holds the model.
        prompts: what to ask.
        label: what the progress bar says of the model.
        references: expected answers, the longest of which limits every answer; () = those of the prompts.

    """
    if not prompts.prompts:
        return []
    limiting = references or [prompt.reference for prompt in prompts.prompts]
    references = [prompt.reference for prompt in prompts.prompts]
    config = build_generation_config(trainer, limiting, (run.evaluate or {}).get("generation", {}))
    answers = answer_prompts(trainer, prompts.ids, config, label=label)
    for index, reference in enumerate(references):
        # the reference and its end token
        needed = len(trainer.processing_class(reference)["input_ids"]) + 1
        if not answers[index].stopped and needed > (config.max_new_tokens or needed):
            answers[index] = answers[index]._replace(stopped=None)
    return answers


def _describe_answer(answer: GeneratedAnswer, side: str) -> dict[str, Any]:
    """Return the keys of samples.jsonl that one answer has."""
    return {side: answer.text, STOPPED: {side: answer.stopped}}


def _percentages(scores: Mapping[str, Any], name: str) -> str:
    values = [scores[side][name] for side in (BEFORE, AFTER) if scores[side].get(name) is not None]
    return " -> ".join(f"{value:.0%}" for value in values)


def _read_prompt(index: int, row: Mapping[str, Any]) -> Prompt:
    content, completion = unescape(row["prompt"]), unescape(row["completion"])
    reference = completion if isinstance(completion, str) else completion[-1]["content"]
    return Prompt(index, row.get("task") or "", content, reference, unescape(row.get("tools")) or None)


def _scores(run: Run, samples: Sequence[dict[str, Any]], side: str) -> dict[str, float]:
    """Return the mean of each metric over the samples that have an answer of that side."""
    answered = [sample for sample in samples if sample.get(side) is not None]
    if not answered:
        return {}
    scores = {}
    for name in (run.evaluate or {}).get("metrics") or list(METRICS):
        values = [METRICS[name](sample[side], sample["reference"]) for sample in answered]
        scores[name] = sum(values) / len(values)
    return scores


def _scores_by_task(run: Run, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    tasks = {}
    for task in sorted({sample["task"] for sample in samples} - {""}):
        members = [sample for sample in samples if sample["task"] == task]
        scores = {side: _scores(run, members, side) for side in (BEFORE, AFTER)}
        tasks[task] = {"prompts": len(members), **scores}
    return tasks


def _losses(metrics: Mapping[str, float], loss_tokens: Mapping[str, int]) -> dict[str, Any]:
    """Return loss, perplexity and token accuracy under the names of eval.json; empty where nothing was evaluated."""
    if _LOSS not in metrics:
        return {}
    losses: dict[str, Any] = {"loss": metrics[_LOSS], "perplexity": math.exp(min(metrics[_LOSS], _MAX_LOG))}
    if _ACCURACY in metrics:
        losses["token_accuracy"] = metrics[_ACCURACY]
    by_name = {key.removeprefix(_LOSS_OF): value for key, value in metrics.items() if key.startswith(_LOSS_OF)}
    if len(loss_tokens) > 1:
        by_name = {name: metrics[f"eval_{name}_loss"] for name in loss_tokens}
    return losses | ({"losses": by_name} if by_name else {})


def describe_prompt(prompt: Prompt) -> dict[str, Any]:
    """Return the keys of samples.jsonl that a prompt has without answers."""
    tools = {"tools": prompt.tools} if prompt.tools else {}
    return {"row": prompt.row, "task": prompt.task, "prompt": prompt.content, "reference": prompt.reference} | tools


def _has_answers(path: Path, prompts: Sequence[Prompt]) -> bool:
    """Tell whether the file holds the base model's answers to these prompts."""
    stored = [
        (s["row"], s["prompt"], s["reference"])
        for s in read_samples(path)
        if s.get(BEFORE) is not None and not is_own(s)
    ]
    return stored == [(prompt.row, prompt.content, prompt.reference) for prompt in prompts]


def is_own(sample: Mapping[str, Any]) -> bool:
    """Tell whether an entry of samples.jsonl is of `evaluate.prompts`, and not of a held-out row."""
    return sample.get("number") is not None


def _write_held_out(path: Path, samples: Sequence[dict[str, Any]]) -> None:
    """Write the entries of held-out prompts; those of `evaluate.prompts` stay."""
    write_samples(path, [*samples, *(sample for sample in read_samples(path) if is_own(sample))])


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Return the entries of samples.jsonl; [] = there is no such file, or it is damaged."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []


def write_samples(path: Path, samples: Sequence[dict[str, Any]]) -> None:
    """Write samples.jsonl; only the first process writes."""
    if ranks.is_first():
        text = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        run_folder.write_text(path, text)


def read_last_message(prompt: Any) -> str:
    """Return a prompt as one text: of messages the last one."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def remove_later_steps(path: Path, step: int) -> None:
    """Remove the answers of steps after `step` from samples.jsonl: the run resumes there."""
    samples = read_samples(path)
    if not any(STEPS in sample for sample in samples):
        return
    for sample in samples:
        sample[STEPS] = {name: text for name, text in sample.pop(STEPS, {}).items() if int(name) <= step}
    write_samples(
        path, [sample if sample[STEPS] else {k: v for k, v in sample.items() if k != STEPS} for sample in samples]
    )
