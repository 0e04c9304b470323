"""Explanations of what ends a run early: out of memory, a second signal, a damaged checkpoint, a late refusal.

In: the exception and the run's record. Out: an exception whose message says where, why, what is saved and what to
do; the same text in run.json. An error in this package keeps its traceback.
"""

from __future__ import annotations

import contextlib
import pickle
import re
import shlex
from collections.abc import Iterator
from typing import Any

import torch
from trl import SFTConfig

from trl_sft import console, disk, errors, ranks, redaction, run_folder
from trl_sft.errors import Fault, LaunchError, NotAsAsked, RecipeError, RunStopped, UserError
from trl_sft.recipe.checked import Run
from trl_sft.training import refusals
from trl_sft.training.memory import fit
from trl_sft.training.record import RunRecord

_KILLED_WORKER = re.compile(r"DataLoader worker .* (is killed by signal|exited unexpectedly)|abruptly died")
# what gloo and NCCL say where another process is gone
_LOST_PROCESS = re.compile(
    r"[Cc]onnection (closed by peer|reset by peer|refused)|NCCL.*(remote|peer)|[Ss]ocket [Tt]imeout"
)
_OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "MPS backend out of memory")


@contextlib.contextmanager
def explained(run: Run, record: RunRecord) -> Iterator[None]:
    """Record in run.json what ends the block early, and raise it with an explanation if there is one."""
    try:
        yield
    except BaseException as error:
        explanation = _explain(error, run, record)
        outcome = str(explanation) if explanation else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):  # of a full disk, or of a folder that is gone
            record.close({"outcome": outcome})
        if explanation is None or explanation is error:
            raise
        raise explanation from error


def resume_command(run: Run) -> str:
    """Return the command that resumes a run: its own, with `run.resume: auto`; without secrets."""
    words = [word for word in run.recipe.arguments if not word.startswith("run.resume=")]
    differs = run.options.get("resume", "auto") != "auto" or len(words) < len(run.recipe.arguments)
    words += ["run.resume=auto"] if differs else []
    return redaction.redact(f"{console.get_python_command()} -m trl_sft {shlex.join(words)}")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means out of memory, on a GPU or on a CPU."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(words in str(error) for words in _OUT_OF_MEMORY)


def suggest_less_memory(args: SFTConfig) -> dict[str, Any]:
    """Return keys of `train:` that take less memory: the same steps in smaller batches, where that is possible."""
    size, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if size > 1:
        divisor = next(n for n in range(2, size + 1) if size % n == 0)
        return {
            "per_device_train_batch_size": size // divisor,
            "gradient_accumulation_steps": accumulation * divisor,
        }
    if not args.gradient_checkpointing:
        return {"gradient_checkpointing": True}
    return {"max_length": args.max_length // 2} if args.max_length else {"max_length": 1024}


def _explain(error: BaseException, run: Run, record: RunRecord) -> Exception | None:
    """Return the explanation of what ended the run; None for an error in this package."""
    if isinstance(error, NotAsAsked):
        return None
    if isinstance(error, RunStopped) or (isinstance(error, UserError) and not record.has_begun):
        return error
    machine_error = _explain_machine(error, run, record)
    if machine_error is not None:
        return machine_error
    last = next(reversed(run_folder.list_checkpoints(run.output_dir)), None)
    saved = f"the last checkpoint is {last}" if last else "no checkpoint was saved yet"
    step = record.trainer.state.global_step if record.trainer and record.has_begun else 0
    at = f"at step {step}; {saved}"
    if isinstance(error, UserError):  # streamed rows are read during training
        stopped = Fault(
            "the run",
            f"stopped {at}",
            "Correct the fault, then run the same command. The run resumes.",
            code="run.stopped",
        )
        return type(error)([*error.faults, stopped])
    if isinstance(error, errors.Interrupted) and record.has_begun:
        return RunStopped(
            f"stopped at once {at}", errors.EXIT_SIGNAL + (error.args[0] if error.args else 2), code="run.interrupted"
        )
    if is_out_of_memory(error):
        lines = _explain_memory(run, record, at, has_checkpoint=bool(last))
        return RunStopped("\n".join(lines), errors.EXIT_OUT_OF_MEMORY, code="run.out_of_memory")
    # checkpoints are read as plain data; the random states come last, when training has begun
    unpickled = isinstance(error, pickle.UnpicklingError)
    if isinstance(error, Exception) and (unpickled or not record.has_begun):
        unreadable = isinstance(error, OSError | RuntimeError | EOFError) or type(error).__name__ == "SafetensorError"
        if record.checkpoint is not None and (unpickled or unreadable):
            problem = f"{record.checkpoint}: the run cannot resume from this checkpoint: {errors.first_line(error)}"
            fix = f"Move {record.checkpoint.name} to another place, then run the same command: the run resumes from the"
            fix += " checkpoint before it."
            return RecipeError(
                Fault(run.recipe.where(("run", "resume")), problem, fix, code="resume.unreadable_checkpoint")
            )
        refusal = refusals.as_fault(run, error)
        return None if refusal is error else refusal
    return None


def _explain_machine(error: BaseException, run: Run, record: RunRecord) -> LaunchError | None:
    """Return the explanation of a disk that refuses, a run folder that is gone or a data worker that was killed."""
    command = resume_command(run)
    fault = disk.explain(error, [run.output_dir], command=command)
    text = str(error)
    if fault is None and record.has_begun and isinstance(error, OSError) and not run.output_dir.is_dir():
        problem = "the run folder was removed while the run used it, with its checkpoints"
        fix = f"Leave the folder in place, and start again: {command}"
        fault = Fault(str(run.output_dir), problem, fix, code="run.folder_removed")
    if fault is None and isinstance(error, RuntimeError) and _KILLED_WORKER.search(text):
        problem = f"a process that prepares batches was killed: {errors.first_line(error)}"
        fix = f"Often memory ran out: set train.dataloader_num_workers: 0, or free memory. Then run: {command}"
        fault = Fault(run.recipe.where(("train", "dataloader_num_workers")), problem, fix, code="machine.killed_worker")
    if fault is None and ranks.count() > 1 and isinstance(error, RuntimeError) and _LOST_PROCESS.search(text):
        last = next(reversed(run_folder.list_checkpoints(run.output_dir)), None)
        saved = f"the last checkpoint is {last}" if last else "no checkpoint was saved yet"
        problem = f"another process of the run is gone: {errors.first_line(error)}; {saved}"
        fault = Fault("the processes", problem, f"Run it again, it resumes: {command}", code="launch.lost_process")
    return LaunchError(fault) if fault else None


def _explain_memory(run: Run, record: RunRecord, at: str, *, has_checkpoint: bool) -> Iterator[str]:
    """Yield where memory ran out, with which batch, and what to set."""
    if record.trainer is None:
        yield "out of memory while the weights were loaded"
        yield f"What to try: {fit.suggest_smaller(run)}"
        return
    args = record.trainer.args
    yield f"out of memory {'' if record.in_training else 'in the evaluation '}{at}"
    if record.largest_batch:
        yield f"The largest training batch so far: {' x '.join(f'{n:,}' for n in record.largest_batch)} tokens"
    if not record.in_training and args.per_device_eval_batch_size > 1:
        yield f"What to try: train.per_device_eval_batch_size: {args.per_device_eval_batch_size // 2}"
        return
    smaller = suggest_less_memory(args)
    if "global_batch_size" in run.options:  # gradient_accumulation_steps is then computed from it
        smaller.pop("gradient_accumulation_steps", None)
    settings = [f"train.{n}: {_yaml(value)} (now {_yaml(getattr(args, n))})" for n, value in smaller.items()]
    yield f"What to try: {', '.join(settings)}; or {fit.suggest_smaller(run)}"
    if has_checkpoint and "per_device_train_batch_size" in smaller:  # the same steps, so the checkpoint fits
        allowed = ["changed_recipe", *run.options.get("allow", [])]
        words = [f"train.{name}={value}" for name, value in smaller.items()] + [f"run.allow=[{', '.join(allowed)}]"]
        yield f"To resume with them: {resume_command(run)} {shlex.join(words)}"


def _yaml(value: Any) -> str:
    return str(value).lower()
