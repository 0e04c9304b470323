"""Names, reads and writes, atomically, every file of a run folder; decides whose folder it is.

In: a folder and what the run asks. Out: a `Claim` (fresh, go on, or refused). Deliberately absent:
what the files mean (`record` writes them), torch.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

LOCK = ".lock"
RECIPE, RESOLVED, RUN, LOG, CARD = "recipe.yaml", "resolved.yaml", "run.json", "log.jsonl", "README.md"
SAMPLES, EVAL = "samples.jsonl", "eval.json"
LEDGER, REJECTS = "ledger.json", "rejects.jsonl"
CHECKPOINT = "checkpoint-"
_STATE = "trainer_state.json"
_WEIGHTS = ("model*.safetensors", "adapter_model.safetensors", "pytorch_model*.bin", "adapter_model.bin")
RUNNING, DONE = "running", "done"


class Claim(NamedTuple):
    """What a run may do with its folder."""

    problem: str = ""  # why not; "" = it may
    fix: str = ""  # what to do instead
    checkpoint: Path | None = None  # go on from here
    replaces_earlier: bool = False  # an earlier run's files go when training starts
    key: tuple[str, str] = ("train", "output_dir")  # of the recipe, where the refusal stands


def default_folder(recipe: Path) -> Path:
    """Return the folder of a recipe without `output_dir`; a resolved one of a run writes `<run>-again`."""
    if recipe.name == RESOLVED and (recipe.parent / RUN).is_file():
        return recipe.parent.with_name(recipe.parent.name + "-again")
    return Path.cwd() / "runs" / recipe.stem


def claim(folder: Path, fingerprint: str, data: Callable[[], dict[str, str]], options: dict[str, Any]) -> Claim:
    """Decide what a run may do in `folder`; nothing is written or removed.

    `fingerprint` is the recipe's, `data()` the digests of its files (only computed where an unfinished run
    is to go on), `options` the recipe's `run:` keys: resume (a path is absolute), overwrite, allow.
    """
    blocked = _not_writable(folder)
    if blocked:
        return Claim(*blocked)
    earlier = read_json(folder / RUN)
    if folder.is_dir() and any(p.name != LOCK for p in folder.iterdir()) and not earlier:
        return Claim(f"{folder}: holds files that are no run of trl_sft", "a new or an empty folder")
    resume = str(options.get("resume", "auto"))
    finished = earlier.get("outcome") == DONE
    last = next(reversed(list_checkpoints(folder)), None)
    if resume not in ("auto", "never"):
        return _from_checkpoint(
            Path(resume), folder, finished, _changed(Path(resume).parent, fingerprint, data, options)
        )
    changed = _changed(folder, fingerprint, data, options) if last else None
    if options.get("overwrite") and (finished or changed or resume == "never"):
        return Claim(replaces_earlier=True)
    if finished:
        return Claim(
            f"{folder}: holds a finished run", "another train.output_dir, or run.overwrite: true to replace it"
        )
    if last is None:  # nothing trained would be lost
        return Claim(replaces_earlier=bool(earlier))
    if resume == "never":
        write = "auto to go on, or run.overwrite: true to start anew"
        return Claim(f"never, but {folder.name} holds an unfinished run, at {last.name}", write, key=("run", "resume"))
    if changed:
        write = f"another train.output_dir; run.allow: [{changed}] to go on; or run.overwrite: true to start anew"
        return Claim(f"{folder}: holds an unfinished run, at {last.name}, with {_CHANGES[changed]}", write)
    return _resumable(last)


_CHANGES = {"changed_recipe": "another recipe", "changed_data": "other rows in the same files"}


def _changed(folder: Path, fingerprint: str, data: Callable[[], dict[str, str]], options: dict[str, Any]) -> str | None:
    """Return what differs from the run in `folder` and is not allowed: a key of _CHANGES."""
    earlier, allowed = read_json(folder / RUN), options.get("allow", [])
    if earlier.get("fingerprint") != fingerprint:
        return None if "changed_recipe" in allowed else "changed_recipe"
    return None if "changed_data" in allowed or earlier.get("data") == data() else "changed_data"


def _from_checkpoint(checkpoint: Path, folder: Path, finished: bool, changed: str | None) -> Claim:
    """Decide on `run.resume: PATH`."""
    key = ("run", "resume")
    if checkpoint not in list_checkpoints(checkpoint.parent):
        write = "auto, never, or a checkpoint-N folder with its weights"
        return Claim(f"{checkpoint}: no complete checkpoint", write, key=key)
    if finished or (checkpoint.parent == folder and checkpoint != list_checkpoints(folder)[-1]):
        return Claim(f"{folder}: holds steps after {checkpoint.name}", "another train.output_dir")
    if changed:
        return Claim(f"{checkpoint}: is of {_CHANGES[changed]}", f"run.allow: [{changed}]", key=key)
    return _resumable(checkpoint)


def _resumable(checkpoint: Path) -> Claim:
    if any(checkpoint.glob("optimizer*")):
        return Claim(checkpoint=checkpoint)
    found = f"{checkpoint}: holds weights alone (save_only_model), so the optimizer would start anew"
    return Claim(found, "model.name_or_path: that folder, and another train.output_dir")


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a folder by step; one whose writing was cut off is left out."""
    found = [path for path in folder.glob(CHECKPOINT + "*") if _is_checkpoint(path)]
    whole = [p for p in found if read_json(p / _STATE) and any(any(p.glob(w)) for w in _WEIGHTS)]
    return sorted(whole, key=lambda p: int(p.name.removeprefix(CHECKPOINT)))


def _is_checkpoint(path: Path) -> bool:
    return path.name.startswith(CHECKPOINT) and path.name.removeprefix(CHECKPOINT).isdecimal()


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[bool]:
    """Keep a folder for this process inside the block; false where another process holds it.

    The system lets go when the process ends, however it ends. Without fcntl (Windows) nothing is held.
    """
    try:
        import fcntl
    except ImportError:
        yield True
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
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
            for path in made:  # of a run that did not begin; a folder that holds anything stays
                with contextlib.suppress(OSError):
                    path.rmdir()


def remove_earlier_files(folder: Path) -> None:
    """Remove what an earlier run wrote, so that none of it passes for the new one's; other files stay."""
    for path in [p for p in folder.iterdir() if _is_checkpoint(p)]:
        shutil.rmtree(path)
    # the Trainer writes training_args.bin
    for name in (
        RECIPE,
        RESOLVED,
        LOG,
        CARD,
        SAMPLES,
        EVAL,
        LEDGER,
        REJECTS,
        "training_args.bin",
        *read_json(folder / RUN).get("files", []),
    ):
        (folder / name).unlink(missing_ok=True)
    (folder / RUN).unlink(missing_ok=True)  # last, so that a torn removal can be taken up again


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def append_json(path: Path, entry: dict[str, Any]) -> None:
    """Add one line to a JSONL file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON mapping; empty where the file is absent or cut off."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _not_writable(folder: Path) -> tuple[str, str] | None:
    try:
        parent = next(p for p in (folder, *folder.parents) if p.exists() or p.is_symlink())
        if not parent.is_dir():
            return f"{parent} is {'a link to nothing' if parent.is_symlink() else 'a file'}", "a folder"
        with tempfile.TemporaryFile(dir=parent):
            return None
    except OSError as error:
        return f"{folder} cannot be written to: {error.strerror or error}", "a folder that you may write to"
