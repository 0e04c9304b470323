"""The run folder: names and atomic writes of its files, and the decision whether a run may use a folder.

Inputs: a folder; the fingerprint of a run, the hashes of its data files and its options.
Outputs: files; a `FolderDecision`: start, continue from a checkpoint, or a problem.
Not here: what the files mean (`training.manifest` writes them). Needs no torch.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

LOCK = ".lock"
RECIPE, RESOLVED, RUN, LOG, CARD = "recipe.yaml", "resolved.yaml", "run.json", "log.jsonl", "README.md"
SAMPLES, EVAL = "samples.jsonl", "eval.json"
LEDGER, REJECTS = "ledger.json", "rejects.jsonl"
EARLIER_RUN = "_earlier_run"  # holds the run that a new one replaces; a push to the hub leaves out names with _
REMOVED_RUN = "_removed_run"  # what an interrupted removal of it leaves
CHECKPOINT = "checkpoint-"  # plus the number of the step
RUNNING, DONE = "running", "done"  # `outcome` in run.json
_TRAINER_STATE = "trainer_state.json"
_TRAINING_ARGS = "training_args.bin"
# the files of a run beside the model; run.json names those of the model
OWN_FILES = (RECIPE, RESOLVED, LOG, CARD, SAMPLES, EVAL, LEDGER, REJECTS, _TRAINING_ARGS)
_WEIGHTS = ("model*.safetensors", "adapter_model.safetensors", "pytorch_model*.bin", "adapter_model.bin")
_CHANGES = {  # word of `run.allow` -> what differs from the run in the folder
    "changed_recipe": "of another recipe",
    "changed_data": "of other rows in the same files",
}


class FolderDecision(NamedTuple):
    """Whether a run may use its folder, and how: start, or continue from a checkpoint."""

    problem: str = ""  # why it may not use the folder; "" = it may
    fix: str = ""  # what to do instead
    checkpoint: Path | None = None  # continue from here
    replaces_earlier: bool = False  # the files of an earlier run are removed when training starts
    key: tuple[str, str] = ("train", "output_dir")  # the key of the recipe that the problem is about
    code: str = ""  # the kind of problem, one of `fault_codes.yaml`


def default_folder(recipe: Path) -> Path:
    """Return the run folder of a recipe without `train.output_dir`: `runs/NAME`.

    For the `resolved.yaml` in a run folder it is `RUN-again` beside that folder: the repeated run replaces nothing.
    """
    if recipe.name == RESOLVED and (recipe.parent / RUN).is_file():
        return recipe.parent.with_name(recipe.parent.name + "-again")
    return Path.cwd() / "runs" / recipe.stem


def decide(
    folder: Path, *, fingerprint: str, hash_data: Callable[[], dict[str, str]], options: dict[str, Any]
) -> FolderDecision:
    """Decide what a run may do with its folder. Nothing is written or removed.

    Args:
        folder: The run folder, which need not exist.
        fingerprint: The fingerprint of the recipe.
        hash_data: Returns the hashes of the data files; called only if it holds an unfinished run of this recipe.
        options: The keys of `run:`: `resume` (a path is absolute), `overwrite`, `allow`.

    Returns:
        The decision. It has a problem if the run would destroy trained weights, or continue another run.
    """
    blocked = _check_writable(folder)
    if blocked:
        return blocked
    earlier = read_json(folder / RUN)
    if not earlier and folder.is_dir() and any(not _is_left_over(path) for path in folder.iterdir()):
        return FolderDecision(
            f"{folder} holds files that are not a run of trl_sft",
            "Name a new or an empty folder.",
            code="run.foreign_folder",
        )
    resume = str(options.get("resume", "auto"))
    is_finished = earlier.get("outcome") == DONE
    if resume not in ("auto", "never"):
        checkpoint = Path(resume)
        change = _find_change(checkpoint.parent, fingerprint=fingerprint, hash_data=hash_data, options=options)
        return _decide_from_checkpoint(checkpoint, folder, is_finished=is_finished, change=change)
    if not earlier and (folder / EARLIER_RUN / RUN).is_file() and not options.get("overwrite"):
        problem = f"{folder / EARLIER_RUN} holds a run that a new one was to replace, and the new one was not finished"
        fix = "Set `run.overwrite: true` to start the new one again, or move that folder to keep its run."
        return FolderDecision(problem, fix, code="run.finished")
    last = next(reversed(list_checkpoints(folder)), None)
    change = _find_change(folder, fingerprint=fingerprint, hash_data=hash_data, options=options) if last else None
    if options.get("overwrite") and (is_finished or change or resume == "never"):
        return FolderDecision(replaces_earlier=True)
    if is_finished:
        fix = "Name another `train.output_dir`, or set `run.overwrite: true` to replace the run."
        return FolderDecision(f"{folder} holds a finished run", fix, code="run.finished")
    if last is None:  # nothing trained would be lost
        return FolderDecision(replaces_earlier=bool(earlier))
    if resume == "never":
        problem = f"`resume` is never, but {folder.name} holds an unfinished run, at {last.name}"
        fix = "Set `run.resume: auto` to continue, or `run.overwrite: true` to start again."
        return FolderDecision(problem, fix, key=("run", "resume"), code="resume.unfinished_run")
    if change:
        fix = f"Name another `train.output_dir`, set `run.allow: [{change}]` to continue, or `run.overwrite: true`"
        fix += " to start again."
        return FolderDecision(
            f"{folder} holds an unfinished run {_CHANGES[change]}, at {last.name}", fix, code="resume.changed"
        )
    return _decide_to_continue(last)


def _find_change(
    folder: Path, *, fingerprint: str, hash_data: Callable[[], dict[str, str]], options: dict[str, Any]
) -> str | None:
    """Return the word of `run.allow` for a difference from the run in a folder; None = no difference, or allowed."""
    earlier, allowed = read_json(folder / RUN), options.get("allow", [])
    if earlier.get("fingerprint") != fingerprint:
        return None if "changed_recipe" in allowed else "changed_recipe"
    return None if "changed_data" in allowed or earlier.get("data") == hash_data() else "changed_data"


def _decide_from_checkpoint(checkpoint: Path, folder: Path, *, is_finished: bool, change: str | None) -> FolderDecision:
    """Decide on `run.resume: PATH`."""
    key = ("run", "resume")
    if checkpoint not in list_checkpoints(checkpoint.parent):
        fix = "Set `run.resume` to auto, to never, or to a checkpoint-N folder that holds the weights."
        return FolderDecision(f"{checkpoint} is not a complete checkpoint", fix, key=key, code="resume.no_checkpoint")
    if is_finished or (checkpoint.parent == folder and checkpoint != list_checkpoints(folder)[-1]):
        problem = f"{folder} holds training steps after {checkpoint.name}, which would be lost"
        return FolderDecision(problem, "Name another `train.output_dir`.", code="resume.later_steps")
    if change:
        return FolderDecision(
            f"{checkpoint} is {_CHANGES[change]}",
            f"Set `run.allow: [{change}]` to continue.",
            key=key,
            code="resume.changed",
        )
    return _decide_to_continue(checkpoint)


def _decide_to_continue(checkpoint: Path) -> FolderDecision:
    """Decide on a checkpoint of the same run: without the state of the optimizer, training cannot continue."""
    if any(checkpoint.glob("optimizer*")):
        return FolderDecision(checkpoint=checkpoint)
    problem = f"{checkpoint} holds weights only (save_only_model), so training cannot continue"
    fix = "Start a new run from these weights: set `model.name_or_path` to that folder, and another `train.output_dir`."
    return FolderDecision(problem, fix, code="resume.weights_only")


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a folder by step, without those whose writing was interrupted."""
    complete = [
        path
        for path in folder.glob(CHECKPOINT + "*")
        if is_checkpoint(path)
        and read_json(path / _TRAINER_STATE)
        and any(any(path.glob(pattern)) for pattern in _WEIGHTS)
    ]
    return sorted(complete, key=lambda path: int(path.name.removeprefix(CHECKPOINT)))


def is_checkpoint(path: Path) -> bool:
    """Tell whether a path has the name of a checkpoint's folder."""
    return path.name.startswith(CHECKPOINT) and path.name.removeprefix(CHECKPOINT).isdecimal()


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[bool]:
    """Lock a folder for this process inside the block; yield False if another process has it locked.

    The operating system removes the lock when the process ends, also after a crash. Without fcntl (on Windows) nothing
    is locked.
    """
    try:
        import fcntl
    except ImportError:
        yield True
        return
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        try:
            yield True
        finally:
            (folder / LOCK).unlink(missing_ok=True)
            for path in new_folders:  # a run that did not start leaves no empty folder behind
                with contextlib.suppress(OSError):
                    path.rmdir()


def is_plain_name(name: str) -> bool:
    """Tell whether a name is that of a file in the folder itself, and leads to no other folder."""
    return name not in ("", ".", "..") and Path(name).name == name


def _is_left_over(path: Path) -> bool:
    """Tell whether a file is a lock, a half-written file of this package, or the folder with the earlier run."""
    own = {f".{name}.part" for name in (*OWN_FILES, RUN)}
    return path.name in (LOCK, EARLIER_RUN, REMOVED_RUN) or path.name in own


def write_text(path: Path, text: str) -> None:
    """Write a text file as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def append_json(path: Path, entry: dict[str, Any]) -> None:
    """Append one line to a JSONL file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON mapping; empty if the file is absent or incomplete."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _check_writable(folder: Path) -> FolderDecision | None:
    """Return a decision with the problem if a folder cannot be written to; None = it can be written to."""
    try:
        parent = next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
        if not parent.is_dir():
            kind = "a link to a file that does not exist" if parent.is_symlink() else "a file"
            return FolderDecision(
                f"{parent} is {kind}", "Set `train.output_dir` to a folder.", code="run.unwritable_output"
            )
        with tempfile.TemporaryFile(dir=parent):
            return None
    except OSError as error:
        problem = f"{folder} cannot be written to: {error.strerror or error}"
        return FolderDecision(
            problem, "Set `train.output_dir` to a folder that you may write to.", code="run.unwritable_output"
        )
