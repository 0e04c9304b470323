"""Names, reads and writes, atomically, every file of a run folder; decides whose folder it is.

In: a folder and what the run asks. Out: a `Claim` (fresh, go on, or refused). Deliberately absent:
what the files mean (`record` writes them), torch.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

RECIPE, RESOLVED, RUN, LOG, CARD = "recipe.yaml", "resolved.yaml", "run.json", "log.jsonl", "README.md"
CHECKPOINT = "checkpoint-"
_STATE = "trainer_state.json"
_WEIGHTS = ("model*.safetensors", "adapter_model.safetensors", "pytorch_model*.bin", "adapter_model.bin")
RUNNING, DONE = "running", "done"


class Claim(NamedTuple):
    """What a run may do with its folder."""

    refused: str = ""  # why not; "" = it may
    write: str = ""  # what to write instead
    checkpoint: Path | None = None  # go on from here
    stale: bool = False  # an earlier run's files go when training starts
    key: tuple[str, str] = ("train", "output_dir")  # of the recipe, where the refusal stands


def default(recipe: Path) -> Path:
    """Return the folder of a recipe without `output_dir`; a resolved one of a run writes `<run>-again`."""
    if recipe.name == RESOLVED and (recipe.parent / RUN).is_file():
        return recipe.parent.with_name(recipe.parent.name + "-again")
    return Path.cwd() / "runs" / recipe.stem


def claim(folder: Path, fingerprint: str, options: dict[str, Any]) -> Claim:
    """Decide what a run with this fingerprint may do in `folder`; nothing is written or removed.

    `options` are the recipe's `run:` keys: resume, overwrite, allow.
    """
    blocked = _not_writable(folder)
    if blocked:
        return Claim(*blocked)
    earlier = read_json(folder / RUN)
    if folder.is_dir() and any(folder.iterdir()) and not earlier:
        return Claim(f"{folder}: holds files that are no run of trl_sft", "a new or an empty folder")
    resume = str(options.get("resume", "auto"))
    if resume not in ("auto", "never"):
        checkpoint = Path(resume).expanduser().absolute()
        if checkpoint in checkpoints(checkpoint.parent):
            return Claim(checkpoint=checkpoint)
        write = "auto, never, or a checkpoint-N folder with its weights"
        return Claim(f"{resume}: no complete checkpoint", write, key=("run", "resume"))
    last = next(reversed(checkpoints(folder)), None)
    finished = earlier.get("outcome") == DONE
    same = earlier.get("fingerprint") == fingerprint or "changed_recipe" in options.get("allow", [])
    if options.get("overwrite") and (finished or not same or resume == "never"):
        return Claim(stale=True)
    if finished:
        return Claim(
            f"{folder}: holds a finished run", "another train.output_dir, or run.overwrite: true to replace it"
        )
    if last is None:  # nothing trained would be lost
        return Claim(stale=bool(earlier))
    if resume == "never":
        write = "auto to go on, or run.overwrite: true to start anew"
        return Claim(f"never, but {folder.name} holds an unfinished run, at {last.name}", write, key=("run", "resume"))
    if not same:
        write = "another train.output_dir; run.allow: [changed_recipe] to go on; or run.overwrite: true to start anew"
        return Claim(f"{folder}: holds an unfinished run of another recipe, at {last.name}", write)
    return Claim(checkpoint=last)


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a folder by step; one whose writing was cut off is left out."""
    found = [p for p in folder.glob(CHECKPOINT + "*") if p.name.removeprefix(CHECKPOINT).isdigit()]
    whole = [p for p in found if read_json(p / _STATE) and any(any(p.glob(w)) for w in _WEIGHTS)]
    return sorted(whole, key=lambda p: int(p.name.removeprefix(CHECKPOINT)))


def leave(folder: Path) -> None:
    """Take a folder away again that was made for a run which did not begin; one that holds anything stays."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def clear(folder: Path) -> None:
    """Remove what an earlier run wrote, so that none of it passes for the new one's; other files stay."""
    # the Trainer writes training_args.bin
    ours = {RECIPE, RESOLVED, RUN, LOG, CARD, "training_args.bin", *read_json(folder / RUN).get("files", [])}
    for path in folder.iterdir():
        if path.name in ours or path.name.startswith(CHECKPOINT):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def write(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def append(path: Path, entry: dict[str, Any]) -> None:
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
    parent = next(p for p in (folder, *folder.parents) if p.exists())
    if not parent.is_dir():
        return f"{parent} is a file", "a folder"
    try:
        with tempfile.TemporaryFile(dir=parent):
            return None
    except OSError as error:
        return f"{parent} cannot be written to: {error.strerror or error}", "a folder that you may write to"
