"""The end of a run: evaluate the trained model, save it, show the last screen.

In: the trained trainer. Out: a `Result`, the model or adapter with its tokenizer and model card, `eval.json`,
`samples.jsonl`, the verdict. Early ends are `failures`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from trl import SFTTrainer

from trl_sft import console, errors, ranks, run_folder
from trl_sft.errors import RunStopped
from trl_sft.evaluation import answer_counts, before_after, completions
from trl_sft.evaluation.completions import Completions
from trl_sft.evaluation.metrics import METRICS
from trl_sft.model import load
from trl_sft.publishing import model_card
from trl_sft.recipe import paths
from trl_sft.recipe.checked import Run
from trl_sft.training import live, manifest, row_losses, summary, verdict
from trl_sft.training.early_stopping import EarlyStop
from trl_sft.training.record import RunRecord
from trl_sft.training.stages import TrainingInputs


class Result(NamedTuple):
    """What a finished run returns."""

    output_dir: Path
    steps: int
    metrics: dict[str, float]  # of the last evaluation, as the Trainer names them; empty without held-out rows
    pushed: dict[str, Any] | None = None  # the commit on the hub, as run.json has it; None = nothing was pushed


def measure_completions(run: Run, inputs: TrainingInputs, trainer: SFTTrainer) -> Completions | None:
    """Complete training rows and held-out rows from their first half; None where the run generates nothing."""
    held_out = next((encoded.rows for name, (_, encoded) in inputs.datasets.encoded.items() if name != "train"), None)
    if run.evaluate is None or held_out is None or inputs.rows.streaming:
        return None
    return completions.compare_completions(trainer, inputs.datasets.encoded["train"][1].rows, held_out)


def save(
    run: Run, inputs: TrainingInputs, trainer: SFTTrainer, *, record: RunRecord, prompts: before_after.PromptSet
) -> Result:
    """Evaluate the trained model, save it, show the last screen. Raises RunStopped if weights are not finite."""
    if ranks.is_any(not live.has_finite_weights(trainer.model)):
        message = f"the training failed: weights not finite after step {trainer.state.global_step}; nothing is saved"
        raise RunStopped(message, errors.EXIT_TRAINING_FAILED, code="run.not_finite")
    metrics = _evaluate(trainer, prompts)
    measure_losses = _build_row_losses(inputs, trainer, record)
    answers = record.answer_metric.latest_answers if record.answer_metric else None
    comparison = before_after.compare(
        run, trainer, prompts, metrics=metrics, measure_losses=measure_losses, answers=answers
    )
    if comparison:
        metrics = metrics | {f"eval_{name}": comparison.summary["after"][name] for name in METRICS if prompts.prompts}
    files_before = _list_versions(run.output_dir) if ranks.is_first() else set()  # only the first process writes
    trainer.save_model()
    if not ranks.is_first():
        return Result(run.output_dir, trainer.state.global_step, metrics)
    # peft saves no generation config, and that of the base model may stop on another token than the tuned model
    trainer.model.generation_config.save_pretrained(run.output_dir)
    files = sorted(name for name, _ in _list_versions(run.output_dir) - files_before)
    is_adapter = paths.is_adapter(run.output_dir)
    differs = is_adapter and load.differs_from_base(run, inputs.model, trainer.model)
    best = manifest.describe_best(trainer.args, trainer.state)
    best_line = [f"Best: {model_card.write_best(best)}"] if best else []
    stop = record.stopping.describe(trainer.args, trainer.state) if record.stopping else None
    best_line += [str(stop)] if stop else []
    eval_rows = sum(len(split.order) for split in inputs.rows.eval.values())
    evidence = _collect_evidence(trainer, metrics, comparison, prompts=prompts, best=best, stop=stop)
    outcome = verdict.judge(replace(evidence, eval_rows=eval_rows))
    steps = trainer.state.global_step
    entries = {"outcome": run_folder.DONE, "verdict": outcome.as_json(), "steps": steps, "metrics": metrics}
    entries |= {"files": files, "differs_from_base": differs} | ({"best": best} if best else {})
    entries |= {"stopped_early": stop.as_json()} if stop else {}
    entries["summary"] = [*filter(None, [f"{outcome.headline}. {outcome.text}", outcome.advice]), *best_line]
    record.write_card(entries)
    for name in files:  # run.json says only then that the run is done
        run_folder.flush(run.output_dir / name)
    record.close(entries)
    screen = summary.LastScreen(
        seconds=record.seconds(),
        verdict=outcome.list_lines(),
        first_metrics=before_after.read_metrics(trainer.state.log_history, 0, prompts.loss_tokens),
        metrics=metrics,
        trained=[
            *(record.verification.last_screen() if record.verification else []),
            *(record.progress.describe_time() if record.progress else []),
            *_describe_parts(record),
            *(record.answer_metric.last_screen() if record.answer_metric else []),
            *filter(None, [record.monitor.describe_phases(trainer.state.log_history) if record.monitor else ""]),
            *best_line,
        ],
        answers=list(before_after.last_screen(comparison)) if comparison else [],
        architecture=inputs.model.config.architectures[0],
    )
    for line in summary.after(run, trainer.state, screen):
        console.say(line)
    return Result(run.output_dir, steps, metrics)


def _describe_parts(record: RunRecord) -> list[str]:
    """Return the shares of the parts of a step, for the last screen with -v."""
    parts = record.throughput.clock.describe_parts() if record.throughput and console.is_verbose() else ""
    return [f"Time of the steps: {parts}"] if parts else []


def _build_row_losses(
    inputs: TrainingInputs, trainer: SFTTrainer, record: RunRecord
) -> Callable[[Sequence[int]], Mapping[int, float]]:
    """Return the function that measures the loss of held-out rows, each by itself."""
    assert record.verification is not None  # it was there before step 1
    return functools.partial(row_losses.measure_losses, trainer, inputs.datasets, verification=record.verification)


def _collect_evidence(
    trainer: SFTTrainer,
    metrics: Mapping[str, float],
    comparison: before_after.Comparison | None,
    *,
    prompts: before_after.PromptSet,
    best: Mapping[str, Any] | None,
    stop: EarlyStop | None,
) -> verdict.Evidence:
    """Return what the verdict on the saved weights rests on, as far as the trainer knows it."""
    state = trainer.state
    return verdict.Evidence(
        eval_losses=before_after.list_eval_losses(state.log_history, prompts.loss_tokens),
        train_losses=tuple((entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry),
        final_loss=metrics.get("eval_loss"),
        saved_step=best["step"] if best else state.global_step,
        steps=state.global_step,
        answers=answer_counts.count_answers(comparison.samples) if comparison else None,
        peak_rate=live.read_peak_rate(trainer.optimizer),
        stopped_early=stop is not None,
        stopping_metric=stop.metric if stop else verdict.EVAL_LOSS,
    )


def _list_versions(folder: Path) -> set[tuple[str, tuple[int, int]]]:
    """Return the files of a folder with what changes when one is written again: name, and time with file number.

    A process that was killed while it saved may have left files of the same names.
    """
    paths = [path for path in folder.iterdir() if path.is_file()]
    return {(path.name, (path.stat().st_mtime_ns, path.stat().st_ino)) for path in paths}


def _evaluate(trainer: SFTTrainer, prompts: before_after.PromptSet) -> dict[str, float]:
    """Return the metrics of the model as it will be saved; evaluate only where the last step did not."""
    if trainer.eval_dataset is None:
        return {}
    logged = before_after.read_metrics(trainer.state.log_history, trainer.state.global_step, prompts.loss_tokens)
    if logged and not trainer.args.load_best_model_at_end:
        return logged
    trainer.evaluate()  # it appends the metrics to log_history
    return before_after.read_metrics(trainer.state.log_history, trainer.state.global_step, prompts.loss_tokens)
