"""How a run begins its folder and ends: saved, stopped, refused late, or by a fault of ours.

In: what happened. Out: a `Result` or an error in our words, and in every case a run.json that says so.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import re
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from trl import SFTConfig, SFTTrainer

from trl_sft import console, errors, run_folder
from trl_sft.errors import Fault, MissingPackage, NotAsAsked, RecipeError, RunStopped, UserError
from trl_sft.evaluation import before_after
from trl_sft.evaluation.metrics import METRICS
from trl_sft.model import load
from trl_sft.model.load import ModelSource
from trl_sft.recipe import paths, resolved
from trl_sft.recipe.checked import Run, Setting
from trl_sft.recipe.yaml_reader import Key
from trl_sft.tokenization import stream
from trl_sft.tokenization.build import TokenizedRows
from trl_sft.training import manifest, summary
from trl_sft.training.memory import fit
from trl_sft.training.verify import Watch


class Result(NamedTuple):
    """What a finished run gives back."""

    output_dir: Path
    steps: int
    metrics: dict[str, float]  # of the last evaluation, as the Trainer names them; empty without held-out rows


class Book:
    """run.json while the run goes on: nothing is written before `begin`, so a refused run changes no folder."""

    def __init__(self) -> None:
        """Note the time; the trainer follows when it stands."""
        self.trainer: SFTTrainer | None = None
        self.made: TokenizedRows | None = None
        self.watch: Watch | None = None
        self.checkpoint: Path | None = None  # that the run goes on from
        self.largest: tuple[int, ...] = ()  # batch so far: rows, tokens
        self.training = True  # whether the last batch was one to train, not to evaluate
        self._entries: dict[str, Any] = {}
        self._began = time.monotonic()

    @property
    def begun(self) -> bool:
        """Whether the run folder is this run's."""
        return bool(self._entries)

    def begin(self, run: Run, claim: run_folder.Claim, settings: dict[Key, Setting], made: TokenizedRows) -> None:
        """Take the folder: an earlier run of ours that may be replaced goes only now."""
        if claim.replaces_earlier:
            run_folder.remove_earlier_files(run.output_dir)
        assert self.trainer is not None
        ran = {"ran": self.watch.ran} if self.watch else {}
        self._entries = manifest.beginning(run, settings, self.trainer.args) | ran
        self._write(run, {})
        run_folder.write_text(run.output_dir / run_folder.RECIPE, resolved.remove_secrets(run, run.recipe.text))
        run_folder.write_text(run.output_dir / run_folder.RESOLVED, resolved.format_recipe(run, settings))
        self.made = made
        self.trainer.model.register_forward_pre_hook(self._see, with_kwargs=True)
        _ledger(run, made)
        left = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made.rejects)
        run_folder.write_text(run.output_dir / run_folder.REJECTS, left)
        if claim.checkpoint:
            console.say(f"resume    from {claim.checkpoint}")

    def close(self, run: Run, outcome: dict[str, Any]) -> None:
        """Write down how the run ended."""
        if self.begun:
            self._write(run, outcome | {"seconds": round(self.seconds(), 1)})

    def seconds(self) -> float:
        """Return the wall time since the run was made ready."""
        return time.monotonic() - self._began

    def _see(self, model: torch.nn.Module, _: Any, given: dict[str, Any]) -> None:
        """Note the shape of a batch, should it be the one that memory does not hold."""
        shape, self.training = tuple(given["input_ids"].shape), model.training
        if self.training and math.prod(shape) > math.prod(self.largest or (0,)):
            self.largest = shape

    def _write(self, run: Run, more: dict[str, Any]) -> None:
        self._entries |= more
        if more and self.made is not None and self.made.seen is not None:  # what a stream gave is known by now
            self.made.ledger["train"] = stream.ledger(self.made.seen)
            _ledger(run, self.made)
        text = json.dumps(self._entries, indent=2, ensure_ascii=False) + "\n"
        run_folder.write_text(run.output_dir / run_folder.RUN, resolved.remove_secrets(run, text))


def _ledger(run: Run, made: TokenizedRows) -> None:
    run_folder.write_text(
        run.output_dir / run_folder.LEDGER, json.dumps(made.ledger, indent=2, ensure_ascii=False) + "\n"
    )


def guarded(run: Run, carry_out: Callable[[Book], Result]) -> Result:
    """Carry a run out; whatever ends it early is written down and told in our words."""
    book = Book()
    try:
        return carry_out(book)
    except BaseException as error:
        told = _in_our_words(error, run, book)
        book.close(run, {"outcome": str(told) if told else f"{type(error).__name__}: {error}"})
        if told is None or told is error:
            raise
        raise told from error


def saved(run: Run, found: ModelSource, trainer: SFTTrainer, book: Book, asked: before_after.Asked) -> Result:
    """Evaluate the model as it is, save it, show the last screen."""
    if not all(torch.isfinite(p).all() for p in trainer.model.parameters() if p.requires_grad):
        message = f"the training failed: weights not finite after step {trainer.state.global_step}; nothing is saved"
        raise RunStopped(message, errors.EXIT_TRAINING_FAILED)
    metrics = _held_out(trainer, asked)
    outcome = before_after.after(run, trainer, asked, metrics)
    if outcome:
        metrics = metrics | {f"eval_{name}": outcome.summary["after"][name] for name in METRICS if asked.prompts}
    before = {path.name for path in run.output_dir.iterdir()}
    trainer.save_model()
    # an adapter's folder has none of its own, and the base's may stop on another token than the tuned model
    trainer.model.generation_config.save_pretrained(run.output_dir)
    files = sorted({path.name for path in run.output_dir.iterdir()} - before)
    adapter = paths.is_adapter(run.output_dir)
    apart = adapter and load.differs_from_base(run, found, trainer.model)
    run_folder.write_text(run.output_dir / run_folder.CARD, manifest.card(run, found.name, adapter, metrics, apart))
    steps = trainer.state.global_step
    book.close(run, {"outcome": run_folder.DONE, "steps": steps, "metrics": metrics, "files": files})
    code = manifest.usage(summary.shown(run.output_dir), apart)
    ask = summary.asking(code, asked.example)
    told = before_after.lines(outcome, console.width()) if outcome else ()
    first = before_after.at(trainer.state.log_history, 0, asked.weights)
    span = console.span(book.seconds())
    lines = summary.after(run, trainer.state, (first, metrics), span, [*told], ask)
    lines[2:2] = book.watch.told() if book.watch else []  # below how long it took
    for line in lines:
        console.say(line)
    return Result(run.output_dir, steps, metrics)


def again(run: Run) -> str:
    """Return the command that goes on with a run that was stopped: its own, with `run.resume: auto`."""
    words = [word for word in run.recipe.arguments if not word.startswith("run.resume=")]
    asked = run.options.get("resume", "auto") != "auto" or len(words) < len(run.recipe.arguments)
    command = f"{console.python()} -m trl_sft {shlex.join([*words, *(['run.resume=auto'] if asked else [])])}"
    return resolved.remove_secrets(run, command)  # a terminal's text is kept too, by whoever runs it


def refused(run: Run, error: Exception) -> Exception:
    """Return a refusal of upstream's in our words, at the key that it names; what is no refusal as it is."""
    text = " ".join(str(error).split()) or type(error).__name__
    key = _named(run, text)
    if "install" in text and not isinstance(error, ValueError | OSError):
        return MissingPackage(
            Fault(run.recipe.where(key or ("train",)), text, "install what it asks for, in this Python")
        )
    if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
        where = run.recipe.where(("model", "name_or_path"))
        told = "; pickles are not read but with model.use_safetensors: false" if "safetensors" in text else ""
        return RecipeError(Fault(where, f"{run.model_location.name}: {text}", f"a model whose weights are whole{told}"))
    if _raised_by_us(error):
        return error
    return RecipeError(Fault(run.recipe.where(key or ("train",)), text, "another value; that is upstream's message"))


def _named(run: Run, text: str) -> Key | None:
    """Return the key of the recipe that a message of upstream's speaks of; None where it speaks of none."""
    sections = {"train": run.train, "lora": run.lora or {}, "model": run.model}
    values = {(section, name): value for section, of in sections.items() for name, value in of.items()}
    named = [k for k in values if re.search(rf"\b({k[1]}|{k[1].replace('_', ' ')})\b", text, re.IGNORECASE)]
    if not named:  # a package that is missing is named by a value: report_to: comet_ml
        letters = re.sub(r"[^a-z0-9]", "", text.lower())
        plain = {k: re.sub(r"[^a-z0-9]", "", str(value).lower()) for k, value in values.items()}
        named = [k for k, value in plain.items() if len(value) > 4 and value in letters]
    if named:
        return max(named, key=lambda k: len(k[1]))
    absent = [field.name for field in dataclasses.fields(SFTConfig) if re.search(rf"\b{field.name}\b", text)]
    if absent := [name for name in absent if "_" in name]:  # a word with it is no plain English
        return "train", max(absent, key=len)
    # torch calls them otherwise: "Invalid beta parameter at index 0: 2.0", "num_workers option should be non-negative"
    words = set(re.findall(r"[a-z]{3,}", text.lower()))
    numbers = {float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", text)}
    shared = {
        k: len(words & set(re.findall(r"[a-z]{3,}", k[1]))) + (type(value) in (int, float) and value in numbers)
        for k, value in values.items()
    }
    best = max(shared, key=lambda k: shared[k], default=None)
    return best if best and shared[best] > 1 else None


def _raised_by_us(error: BaseException) -> bool:
    """Tell whether the line that raised is ours: then it is a fault of ours, whatever the recipe says."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and Path(__file__).parents[1] in Path(last.tb_frame.f_code.co_filename).parents


def out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory is out, on a GPU or on a CPU."""
    words = ("can't allocate memory", "CUDA error: out of memory", "MPS backend out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def lighter(args: SFTConfig) -> dict[str, Any]:
    """Return the settings of `train:` that take less memory: the same steps in smaller batches, if that can be."""
    size, times = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if size > 1:
        by = next(n for n in range(2, size + 1) if size % n == 0)
        return {"per_device_train_batch_size": size // by, "gradient_accumulation_steps": times * by}
    if not args.gradient_checkpointing:
        return {"gradient_checkpointing": True}
    return {"max_length": args.max_length // 2} if args.max_length else {"max_length": 1024}


def _short_of_memory(run: Run, book: Book, at: str, kept: bool) -> Iterator[str]:
    """Yield what to tell of a run that memory did not hold: where, with which batch, what to write."""
    if book.trainer is None:
        yield f"out of memory while the weights were loaded\nWhat to try: {fit.advice(run)}"
        return
    args = book.trainer.args
    yield f"out of memory {'' if book.training else 'in the evaluation '}{at}"
    if book.largest:
        yield f"The largest batch to train so far: {' x '.join(f'{n:,}' for n in book.largest)} tokens"
    if not book.training and args.per_device_eval_batch_size > 1:
        yield f"What to try: train.per_device_eval_batch_size: {args.per_device_eval_batch_size // 2}"
        return
    less = lighter(args)
    if "global_batch_size" in run.options:  # the accumulation follows from it
        less.pop("gradient_accumulation_steps", None)
    written = ", ".join(
        f"train.{name}: {str(value).lower()} (now {str(getattr(args, name)).lower()})" for name, value in less.items()
    )
    yield f"What to try: {written}; or {fit.advice(run)}"
    if kept and "per_device_train_batch_size" in less:  # the same steps, so the checkpoint is of the same training
        allowed = ["changed_recipe", *run.options.get("allow", [])]
        words = [f"train.{name}={value}" for name, value in less.items()] + [f"run.allow=[{', '.join(allowed)}]"]
        yield f"To go on so: {again(run)} {shlex.join(words)}"


def _in_our_words(error: BaseException, run: Run, book: Book) -> Exception | None:
    """Return what ended the run in our words: memory, a second signal, a refusal; None for a fault of ours."""
    if isinstance(error, NotAsAsked):
        return None
    if isinstance(error, RunStopped) or (isinstance(error, UserError) and not book.begun):
        return error
    last = next(reversed(run_folder.list_checkpoints(run.output_dir)), None)
    kept = f"the last checkpoint is {last}" if last else "no checkpoint was written yet"
    step = book.trainer.state.global_step if book.trainer and book.begun else 0
    at = f"at step {step}; {kept}"
    if isinstance(error, UserError):  # rows that are streamed are read while it trains
        return type(error)(
            [*error.faults, Fault("the run", f"stopped {at}", "the same command goes on, once that is mended")]
        )
    if isinstance(error, errors.Interrupted) and book.begun:
        return RunStopped(f"stopped at once {at}", errors.EXIT_SIGNAL + (error.args[0] if error.args else 2))
    if out_of_memory(error):
        return RunStopped("\n".join(_short_of_memory(run, book, at, bool(last))), errors.EXIT_OUT_OF_MEMORY)
    # states are read as data alone; the last of them, of the random numbers, when training begins
    pickled = isinstance(error, pickle.UnpicklingError)
    if isinstance(error, Exception) and (pickled or not book.begun):
        unreadable = isinstance(error, OSError | RuntimeError | EOFError) or type(error).__name__ == "SafetensorError"
        if book.checkpoint is not None and (pickled or unreadable):
            found = f"{book.checkpoint}: cannot be gone on from: {errors.first_line(error)}"
            return RecipeError(Fault(run.recipe.where(("run", "resume")), found, "the path of an earlier checkpoint"))
        late = refused(run, error)
        return None if late is error else late
    return None


def _held_out(trainer: SFTTrainer, asked: before_after.Asked) -> dict[str, float]:
    """Return the metrics of the model as it will be saved; evaluate only where the last step did not."""
    if trainer.eval_dataset is None:
        return {}
    logged = before_after.at(trainer.state.log_history, trainer.state.global_step, asked.weights)
    if logged and not trainer.args.load_best_model_at_end:
        return logged
    trainer.evaluate()  # which logs it
    return before_after.at(trainer.state.log_history, trainer.state.global_step, asked.weights)
