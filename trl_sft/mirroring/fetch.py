"""A run that begins: its mirror can be written to, and where the run folder has no newer checkpoint, it is fetched.

Inputs: a checked recipe with `run.mirror`. Outputs: an open storage; in the run folder the newest whole checkpoint of
the mirror, with what an exact resume needs. Files get their names in the run folder once they are verified.
Not here: whether the run may resume from the checkpoint (`recipe.folder_decision` decides as for any other).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trl_sft import checkpoints, console, row_progress, run_folder
from trl_sft.errors import Fault, LaunchError, RecipeError
from trl_sft.mirroring import access, snapshot, storage, uploader
from trl_sft.mirroring.snapshot import Snapshot
from trl_sft.mirroring.storage import DamagedCopy, Storage
from trl_sft.recipe import folder_decision, resolved, resume_keys
from trl_sft.recipe.checked import Run
from trl_sft.recipe.folder_decision import CHANGED_RECIPE

KEY = ("run", "mirror")
_MIB = 2**20
_MAX_CHANGES = 3  # of keys, in a message


def begin(run: Run) -> None:
    """Try the mirror out, and fetch its newest checkpoint where the run folder has none that is as new.

    Args:
        run: The checked recipe, with `run.mirror`.

    Raises:
        LaunchError: The mirror cannot be used, or nothing of it is whole.
        RecipeError: It holds another run, or a finished one.

    """
    target = check(run)
    where = run.recipe.where(KEY)
    try:
        copies = _choose(run, target)
        if copies:
            _fetch(run, target, copies)
    except (LaunchError, RecipeError):
        raise
    except Exception as error:  # of any storage library
        if isinstance(error, OSError) and error.filename and str(run.output_dir) in str(error.filename):
            raise
        raise LaunchError(access.explain(error, target.url, where)) from error


def check(run: Run) -> Storage:
    """Open the mirror of a run, and write, read and remove a small file there. Raises LaunchError."""
    return access.open_storage(str(run.options[KEY[1]]), run.recipe.where(KEY))


def _choose(run: Run, target: Storage) -> list[Snapshot]:
    """Return the checkpoints at the mirror that may be fetched, the newest first; none = the run folder counts.

    Raises RecipeError where the mirror holds another run, or a finished one, and nothing allows to replace it.
    """
    if run_folder.read_json(run.output_dir / run_folder.RUN).get("outcome") == run_folder.DONE:
        return []  # whether it may be replaced is decided as without a mirror
    names = snapshot.list_snapshots(target)
    local = checkpoints.choose(run.output_dir, read_contents=False).newest
    local_step = run_folder.get_step(local) if local else -1
    overwrites = bool(run.options.get("overwrite"))
    newer = [name for name in names if name != snapshot.FINISHED and snapshot.get_step(name) > local_step]
    if not names or (local is not None and not newer):
        return []
    resume = run.options.get("resume", "auto")
    if snapshot.FINISHED in names or resume != "auto":
        if overwrites:
            return []
        holds = "a finished run" if snapshot.FINISHED in names else f"{newer[-1]}, and `run.resume` is {resume}"
        raise RecipeError(_refuse(run, f"{target.url} holds {holds}", "Name another `run.mirror`"))
    copies = list(_read_copies(target, newer))
    if not copies:
        return _explain_damage(run, target, local)
    record = snapshot.read_checkpoint_record(target, copies[0]) or {}
    is_same = record.get("fingerprint") == resolved.compute_fingerprint(run)
    if is_same or CHANGED_RECIPE in run.options.get("allow", []):
        return copies
    if overwrites or local is not None:
        return []
    fix = f"Name another `run.mirror`, set `run.allow: [{CHANGED_RECIPE}]` to continue"
    changes = resume_keys.compare(record.get(folder_decision.VALUES, {}), folder_decision.list_values(run))
    words = f" ({'; '.join(map(str, changes[:_MAX_CHANGES]))})" if changes else ""
    raise RecipeError(_refuse(run, f"{target.url} holds {copies[0].name} of another recipe{words}", fix))


def _read_copies(target: Storage, names: Sequence[str]) -> Iterator[Snapshot]:
    """Yield the copies whose manifest and record are undamaged, the newest first; the others are named."""
    for name in reversed(names):
        copy = snapshot.read_snapshot(target, name)
        if copy is None:
            _pass_over(name, f"{snapshot.MANIFEST} of it is damaged")
        elif snapshot.read_checkpoint_record(target, copy) is None:
            _pass_over(name, f"{checkpoints.RECORD} has other bytes than when it was uploaded")
        else:
            yield copy


def _pass_over(name: str, damage: str) -> None:
    """Say that a copy is not used."""
    console.say(f"mirror    {name} is passed over: {damage}")


def _explain_damage(run: Run, target: Storage, local: Path | None) -> list[Snapshot]:
    """Return nothing to fetch where the run folder has a checkpoint. Raises LaunchError where it has none."""
    if local is not None or run.options.get("overwrite"):
        return []
    fault = _refuse(run, f"no checkpoint at {target.url} is whole", "Name another `run.mirror`")
    raise LaunchError(fault._replace(code="mirror.damaged"))


def _refuse(run: Run, problem: str, fix: str) -> Fault:
    """Return the fault of a mirror that holds another run."""
    text = f"{fix}, or set `run.overwrite: true` to replace what is there."
    return Fault(run.recipe.where(KEY), problem, text, code="mirror.other_run")


def _fetch(run: Run, target: Storage, copies: Sequence[Snapshot]) -> None:
    """Fetch the first copy that is whole, and the best checkpoint that it names. Raises LaunchError."""
    folder = run.output_dir
    stage = folder / run_folder.MIRROR_STAGE
    with run_folder.lock(folder) as is_ours:
        if not is_ours:
            return  # the run is refused as one whose folder is in use
        shutil.rmtree(stage, ignore_errors=True)
        try:
            name = next((copy.name for copy in copies if _download(target, copy, stage)), "")
            if not name:
                local = checkpoints.choose(folder, read_contents=False).newest
                _explain_damage(run, target, local)
                return
            best = _find_best(stage / name)
            if best and best != name and not (folder / best).is_dir():
                copy = snapshot.read_snapshot(target, best)
                if copy is None or not _download(target, copy, stage):
                    console.say(f"note      the best checkpoint, {best}, is not at the mirror")
                    best = ""
            _move_into_place(stage, folder, name, best=best)
        finally:
            uploader.remove_stage(folder)
    console.say(f"mirror    {name} was fetched from {target.url}")


def _download(target: Storage, copy: Snapshot, stage: Path) -> bool:
    """Download a copy; False = a file of it is damaged or absent, which is said."""
    total = sum(digest.size for digest in copy.files.values())
    received = 0
    try:
        with row_progress.RowProgress(f"Fetching {copy.name}", max(total // _MIB, 1), unit="MiB") as progress:

            def count(size: int) -> None:
                nonlocal received
                received += size
                progress.update(received // _MIB - progress.done)

            snapshot.download_snapshot(target, copy, stage / copy.name, count=count)
        damage = checkpoints.find_damage(stage / copy.name)  # a manifest may have lost a file
    except (DamagedCopy, FileNotFoundError) as error:
        damage = storage.describe(error)
    if damage:
        _pass_over(copy.name, damage)
        shutil.rmtree(stage / copy.name, ignore_errors=True)
    return not damage


def _find_best(checkpoint: Path) -> str:
    """Return the name of the checkpoint with the best metric, as another one knows it; "" = none."""
    state: dict[str, Any] = run_folder.read_json(checkpoint / "trainer_state.json")
    name = Path(str(state.get("best_model_checkpoint") or "")).name
    return name if name and run_folder.is_checkpoint(Path(name)) else ""


def _move_into_place(stage: Path, folder: Path, name: str, *, best: str) -> None:
    """Give the fetched files their names in the run folder: records first, the newest checkpoint last.

    A process that is killed meanwhile leaves an unfinished run without this checkpoint, which is then fetched again.
    """
    records = stage / name / snapshot.RUN_FILES
    for path in sorted(records.iterdir(), key=lambda path: path.name != run_folder.RUN) if records.is_dir() else ():
        path.replace(folder / path.name)
    for copy in filter(None, (best if best != name else "", name)):
        if not (stage / copy).is_dir():
            continue
        shutil.rmtree(stage / copy / snapshot.RUN_FILES, ignore_errors=True)
        shutil.rmtree(folder / copy, ignore_errors=True)
        (stage / copy).rename(folder / copy)
        for path in (folder / copy).rglob("*"):
            run_folder.flush(path)
    run_folder.flush(folder)
