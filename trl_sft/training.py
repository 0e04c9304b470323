"""The run, top to bottom: tokenizer, rows, settings, trainer, training, held-out loss, saving.

In: a `Run` of `schema.build`. Out: a `Result`, and a run folder. What cannot be honoured is refused
before the weights load.
"""

from __future__ import annotations

import json
import re
import shlex
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, set_seed
from trl import SFTConfig, SFTTrainer

from trl_sft import callbacks, chat, console, data, errors, machine, model, record, rundir, screens
from trl_sft.errors import DataError, Fault, MissingPackage, RecipeError, RunStopped
from trl_sft.run import Run


class Result(NamedTuple):
    """What a finished run gives back."""

    output_dir: Path
    steps: int
    metrics: dict[str, float]  # of the last evaluation, as the Trainer names them; empty without held-out rows


class Ready(NamedTuple):
    """All that a run needs before weights: checked."""

    claim: rundir.Claim
    found: model.Found
    tokenizer: PreTrainedTokenizerBase
    rows: data.Rows
    settings: dict[str, machine.Setting]
    args: SFTConfig


@console.quiet()
def prepare(run: Run) -> Ready:
    """Do all of a run that needs no weights: machine, folder, tokenizer, rows, settings. Raises UserError."""
    machine.check()
    claim = rundir.claim(run.output_dir, record.fingerprint(run), run.run)
    if claim.refused:
        raise RecipeError(Fault(run.recipe.where(claim.key), claim.refused, claim.write))
    for note in run.notes:
        console.say(note)
    settings = machine.settings(run.train)
    args = _config(run, {name: setting.value for name, setting in settings.items()})
    found = model.find(run)
    tokenizer = chat.load(run, [found.adapter, found.name] if found.adapter else [found.name])
    rows = data.load(run, bool(tokenizer.chat_template))
    chat.check_loss(run, tokenizer, rows.loss)
    for name, value in rows.loss.items():
        setattr(args, name, value)
    device = machine.describe(run.train | {n: s.value for n, s in settings.items()})
    screens.found(f"{found.adapter or found.name} ({found.config.architectures[0]})", device, rows.said)
    return Ready(claim, found, tokenizer, rows, settings, args)


@console.quiet()
def run(run: Run) -> Result:
    """Carry a run out. Raises UserError before training, RunStopped once it has begun."""
    began = time.monotonic()
    ready = prepare(run)
    trainer = _trainer(run, ready)
    progress, guard = _watchers(run, ready, trainer)
    book = _open(run, ready, trainer.args)
    try:
        with guard.listening():
            trainer.train(resume_from_checkpoint=str(ready.claim.checkpoint) if ready.claim.checkpoint else None)
            metrics = _held_out(trainer)
            trainer.save_model()
            rundir.write(run.output_dir / rundir.CARD, record.card(run, metrics))
    except BaseException as error:
        progress.close()
        stopped = _stopped(error, run, trainer)
        _close(run, book, {"outcome": str(stopped) if stopped else f"{type(error).__name__}: {error}"}, began)
        if stopped is None or stopped is error:
            raise
        raise stopped from error
    _close(run, book, {"outcome": rundir.DONE, "steps": trainer.state.global_step, "metrics": metrics}, began)
    held = ready.rows.eval if ready.rows.eval is not None else ready.rows.train
    seconds = console.span(time.monotonic() - began)
    row = held[0]
    prompt = row.get("prompt") or row.get("messages", [])[:1] or row.get("text", "")[:40]
    for line in screens.after(run, trainer.state, metrics, seconds, prompt):
        console.say(line)
    return Result(run.output_dir, trainer.state.global_step, metrics)


def _config(run: Run, settings: dict[str, Any]) -> SFTConfig:
    """Return the live SFTConfig; what it refuses becomes a RecipeError."""
    try:
        return SFTConfig(
            **{"output_dir": str(run.output_dir), "model_init_kwargs": run.model or None} | run.train | settings
        )
    except (ValueError, TypeError) as error:
        raise _refused(run, error) from error


def _trainer(run: Run, ready: Ready) -> SFTTrainer:
    """Load the weights and prepare the rows. Foreign refusals become RecipeError, lost rows DataError."""
    set_seed(ready.args.seed)  # for the adapter's first weights; TRL 1.16 does so itself, 1.8 does not
    loaded = model.arguments(run, ready.found)
    if not isinstance(loaded["model"], str):
        ready.args.model_init_kwargs = None  # they were used; TRL would warn that it ignores them
    rows = ready.rows
    try:
        trainer = SFTTrainer(
            args=ready.args,
            train_dataset=rows.train,
            eval_dataset=rows.eval,
            processing_class=ready.tokenizer,
            **loaded,
        )
    except (ValueError, ImportError, RuntimeError) as error:
        rundir.leave(run.output_dir)
        raise _refused(run, error) from error
    for part, prepared in (("train", trainer.train_dataset), ("eval", trainer.eval_dataset)):
        if prepared is not None and screens.count(prepared, None).trained == 0:
            rundir.leave(run.output_dir)
            found = f"no row to {part} keeps a trained token within max_length {ready.args.max_length}"
            where = run.recipe.where(("train", "max_length") if "max_length" in run.train else ("data", part))
            raise DataError(Fault(where, found, "a larger train.max_length, or shorter prompts"))
    return trainer


def _watchers(run: Run, ready: Ready, trainer: SFTTrainer) -> tuple[callbacks.Progress, callbacks.Guard]:
    """Put our progress in the place of upstream's."""
    tokens = screens.count(trainer.train_dataset, ready.args.max_length)

    def table(args: SFTConfig, state: Any, live: Any) -> list[tuple[str, str]]:
        return screens.before(args, state, live, tokens, ready.rows)

    progress = callbacks.Progress(run.output_dir, table)
    again = shlex.join(["python", "-m", "trl_sft", *run.recipe.words])
    guard = callbacks.Guard(run.run.get("max_hours"), again)
    for theirs in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(theirs)
    for ours in (progress, guard):
        trainer.add_callback(ours)
    return progress, guard


def _open(run: Run, ready: Ready, args: SFTConfig) -> dict[str, Any]:
    """Begin the run folder; an earlier run of ours that may be replaced goes only now."""
    if ready.claim.stale:
        rundir.clear(run.output_dir)
    book = record.beginning(run, args, machine.hardware())
    rundir.write(run.output_dir / rundir.RECIPE, record.without_secrets(run, run.recipe.text))
    rundir.write(run.output_dir / rundir.RESOLVED, record.resolved(run, ready.settings))
    _write(run, book)
    if ready.claim.checkpoint:
        console.say(f"resume    from {ready.claim.checkpoint}")
    return book


def _held_out(trainer: SFTTrainer) -> dict[str, float]:
    """Return the metrics of the model as it will be saved; evaluate only where the last step did not."""
    if trainer.eval_dataset is None:
        return {}
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    if logged and logged[-1]["step"] == trainer.state.global_step and not trainer.args.load_best_model_at_end:
        return {name: value for name, value in logged[-1].items() if name.startswith("eval_")}
    return dict(trainer.evaluate())


def _stopped(error: BaseException, run: Run, trainer: SFTTrainer) -> RunStopped | None:
    """Return what ends the run in our words: memory, a second signal; None for a fault of ours."""
    if isinstance(error, RunStopped):
        return error
    last = next(reversed(rundir.checkpoints(run.output_dir)), None)
    kept = f"the last checkpoint is {last}" if last else "no checkpoint was written yet"
    at = f"at step {trainer.state.global_step}; {kept}"
    if isinstance(error, KeyboardInterrupt):
        return RunStopped(f"stopped at once {at}", errors.EXIT_SIGNAL + 2)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        advice = "halve train.per_device_train_batch_size and double train.gradient_accumulation_steps"
        return RunStopped(f"out of memory {at}\nWhat to try: {advice}, or a smaller max_length", errors.EXIT_MEMORY)
    return None


def _refused(run: Run, error: Exception) -> Exception:
    """Return a refusal of upstream's in our words, at the key that it names; what is no refusal as it is."""
    text = " ".join(str(error).split())
    sections = {"train": run.train, "lora": run.lora or {}, "model": run.model}
    keys = [(section, name) for section, values in sections.items() for name in values]
    named = [key for key in keys if key[1] in text or key[1].replace("_", " ") in text.lower()]
    # a package that is missing is named by a value: report_to: comet_ml
    words = re.findall(r"[a-z]+", text.lower())
    named = named or [k for k in keys if str(sections[k[0]][k[1]]).partition("_")[0] in words]
    where = run.recipe.where(max(named, key=lambda key: len(str(key[1]))) if named else ("train",))
    if "install" in text and not isinstance(error, ValueError):
        return MissingPackage(Fault(where, text, "install what it asks for, in this Python"))
    if isinstance(error, ValueError | TypeError):
        return RecipeError(Fault(where, text, "values that go together; the line above is upstream's own"))
    return error


def _close(run: Run, book: dict[str, Any], outcome: dict[str, Any], began: float) -> None:
    files = sorted(path.name for path in run.output_dir.iterdir() if path.is_file())
    _write(run, book | outcome | {"seconds": round(time.monotonic() - began, 1), "files": files})


def _write(run: Run, book: dict[str, Any]) -> None:
    rundir.write(run.output_dir / rundir.RUN, json.dumps(book, indent=2, ensure_ascii=False) + "\n")
