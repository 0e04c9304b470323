"""Whether a run may use its folder, and how: it starts, resumes from a checkpoint, or is refused.

Inputs: a checked `Run`, and the files in its folder. Outputs: a `FolderDecision`. Nothing is written.
Not here: whether the prepared tokens are those of the checkpoint, which is known only later (`training.resume`).
"""

from __future__ import annotations

import datetime
import errno
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from trl_sft import checkpoints, disk, redaction, run_folder
from trl_sft.checkpoints import Choice
from trl_sft.errors import Edit, Fault, RecipeError
from trl_sft.recipe import engine_resume, resolved, resume_keys
from trl_sft.recipe.checked import Run
from trl_sft.recipe.resume_keys import KeyChange
from trl_sft.recipe.yaml_reader import Key

CHANGED_RECIPE, CHANGED_DATA = "changed_recipe", "changed_data"  # words of `run.allow`
TEMPLATE_DATE = "template_date"  # in run.json and in the record of a checkpoint
VALUES = "recipe"  # the same: value of each dotted key
_MAX_CHANGES = 3  # of a list in a message


class FolderDecision(NamedTuple):
    """Whether a run may use its folder, and how: start, or continue from a checkpoint."""

    problem: str = ""  # why it may not use the folder; "" = it may
    fix: str = ""  # what to do instead
    checkpoint: Path | None = None  # continue from here
    replaces_earlier: bool = False  # the files of an earlier run are removed when training starts
    key: tuple[str, str] = ("train", "output_dir")  # the key of the recipe that the problem is about
    code: str = ""  # the kind of problem, one of `fault_codes.yaml`
    changes: tuple[KeyChange, ...] = ()  # keys that differ from the run that `checkpoint` is of
    passed_over: Choice | None = None  # checkpoints that are damaged or unfinished


def check_folder(run: Run, *, read_contents: bool = False) -> FolderDecision:
    """Decide whether the run may use its folder, from the files that are in it; nothing is written.

    Args:
        run: The checked recipe.
        read_contents: Whether the files of a checkpoint are compared with their hashes; else their sizes alone.

    Raises:
        RecipeError: The folder holds something else, or a run that may not be replaced or resumed.

    """
    decision = _decide(run, read_contents=read_contents)
    if decision.problem:
        problem = decision.problem + _describe_set_aside(run.output_dir, decision.problem)
        raise RecipeError(Fault(run.recipe.where(decision.key), problem, decision.fix, code=decision.code))
    if decision.checkpoint and (fault := engine_resume.check(run, decision.checkpoint)):
        raise RecipeError(fault)
    refused = [change for change in decision.changes if _refuses(change)]
    if refused and decision.checkpoint:
        raise RecipeError([_explain_refusal(run, change, decision.checkpoint) for change in refused])
    return decision


def list_values(run: Run) -> dict[str, Any]:
    """Return the value of each key that changes the trained weights, by dotted key, as JSON has it; no secrets."""
    values = {".".join(map(str, key)): value for key, value in resolved.list_fingerprint_values(run)}
    plain: dict[str, Any] = redaction.redact_values(json.loads(json.dumps(values, default=str)))
    return plain


def find_template_date(run: Run) -> datetime.date | None:
    """Return the day that a chat template writes if this run goes on with, or repeats, an earlier one; None = today."""
    resume = str(run.options.get("resume", "auto"))
    places = [run.output_dir / run_folder.RUN] if resume == "auto" else []
    if resume not in ("auto", "never"):
        places = [Path(resume) / checkpoints.RECORD, Path(resume).parent / run_folder.RUN]
    if run.recipe.path.name == run_folder.RESOLVED:
        places.append(run.recipe.path.parent / run_folder.RUN)
    for place in places:
        record = run_folder.read_json(place)
        is_replaced = place.parent == run.output_dir and record.get("outcome") == run_folder.DONE
        if record.get(TEMPLATE_DATE) and not is_replaced:
            return datetime.date.fromisoformat(record[TEMPLATE_DATE])
    return None


def _decide(run: Run, *, read_contents: bool) -> FolderDecision:
    """Return what a run may do with its folder.

    The decision has a problem if the run would destroy trained weights, or continue another run.
    """
    folder, options = run.output_dir, run.options
    blocked = _check_writable(folder)
    if blocked:
        return blocked
    earlier = run_folder.read_json(folder / run_folder.RUN)
    if not earlier and folder.is_dir() and any(not run_folder.is_left_over(path) for path in folder.iterdir()):
        return FolderDecision(
            f"{folder} holds files that are not a run of trl_sft",
            "Name a new or an empty folder.",
            code="run.foreign_folder",
        )
    resume = str(options.get("resume", "auto"))
    is_finished = earlier.get("outcome") == run_folder.DONE
    choice = Choice(None, (), ()) if is_finished else checkpoints.choose(folder, read_contents=read_contents)
    if resume not in ("auto", "never"):
        return _decide_from_path(run, Path(resume), is_finished=is_finished, newest=choice.newest)
    aside = folder / run_folder.EARLIER_RUN
    nothing_trained = not is_finished and choice.newest is None
    if nothing_trained and (aside / run_folder.RUN).is_file() and not options.get("overwrite"):
        problem = f"{aside} holds a run that a new one was to replace, and the new one was not finished"
        fix = "Set `run.overwrite: true` to start the new one again, or move that folder to keep its run."
        return FolderDecision(problem, fix, code="run.finished")
    last = choice.newest
    is_unknown = last is not None and _is_unknown(last)
    changes = tuple(_find_changes(run, last)) if last and not is_unknown else ()
    blocked_by_recipe = bool(changes) and CHANGED_RECIPE not in options.get("allow", [])
    cannot_resume = blocked_by_recipe or is_unknown or (last is None and bool(choice.damaged))
    if options.get("overwrite") and (is_finished or cannot_resume or resume == "never"):
        return FolderDecision(replaces_earlier=True)
    if is_finished:
        fix = "Name another `train.output_dir`, or set `run.overwrite: true` to replace the run."
        return FolderDecision(f"{folder} holds a finished run", fix, code="run.finished")
    if last is None:
        return _decide_without_checkpoint(folder, choice, has_run=bool(earlier))
    if resume == "never":
        problem = f"`resume` is never, but {folder.name} holds an unfinished run, at {last.name}"
        fix = "Set `run.resume: auto` to continue, or `run.overwrite: true` to start again."
        return FolderDecision(problem, fix, key=("run", "resume"), code="resume.unfinished_run")
    if is_unknown:
        return _refuse_unknown(last, ("train", "output_dir"))
    if blocked_by_recipe:
        problem = f"{folder} holds an unfinished run of another recipe, at {last.name}{_list_changes(changes)}"
        fix = f"Name another `train.output_dir`, {_how_to_continue(changes)}, or set `run.overwrite: true` to start"
        return FolderDecision(problem, f"{fix} again.", code="resume.changed")
    return FolderDecision(checkpoint=last, changes=changes, passed_over=choice)


def _decide_from_path(run: Run, checkpoint: Path, *, is_finished: bool, newest: Path | None) -> FolderDecision:
    """Decide on `run.resume: PATH`; `newest` is the newest whole checkpoint of the run folder."""
    key, folder = ("run", "resume"), run.output_dir
    if not run_folder.is_checkpoint(checkpoint) or not checkpoint.is_dir():
        fix = "Set `run.resume` to auto, to never, or to a checkpoint-N folder that holds the weights."
        return FolderDecision(f"{checkpoint} is not a complete checkpoint", fix, key=key, code="resume.no_checkpoint")
    if checkpoints.is_weights_only(checkpoint):
        return _refuse_weights_only(checkpoint)
    if damage := checkpoints.find_damage(checkpoint):
        problem = f"{checkpoint} is not a complete checkpoint: {damage}"
        fix = "Set `run.resume: auto`, which takes the newest complete checkpoint."
        return FolderDecision(problem, fix, key=key, code="resume.no_checkpoint")
    if _is_unknown(checkpoint):
        return _refuse_unknown(checkpoint, key)
    if is_finished or (checkpoint.parent == folder and newest not in (None, checkpoint)):
        problem = f"{folder} holds training steps after {checkpoint.name}, which would be lost"
        return FolderDecision(problem, "Name another `train.output_dir`.", code="resume.later_steps")
    changes = tuple(_find_changes(run, checkpoint))
    if changes and CHANGED_RECIPE not in run.options.get("allow", []):
        problem = f"{checkpoint} is of another recipe{_list_changes(changes)}"
        how = _how_to_continue(changes)
        return FolderDecision(problem, f"{how[0].upper()}{how[1:]}.", key=key, code="resume.changed")
    choice = checkpoints.choose(folder) if checkpoint.parent == folder else None
    return FolderDecision(checkpoint=checkpoint, changes=changes, passed_over=choice)


def _decide_without_checkpoint(folder: Path, choice: Choice, *, has_run: bool) -> FolderDecision:
    """Decide on a folder without a whole checkpoint: nothing starts anew where there were trained weights."""
    if not choice.damaged:  # nothing trained would be lost
        return FolderDecision(replaces_earlier=has_run)
    path, damage = choice.damaged[0]
    if checkpoints.is_weights_only(path):
        return _refuse_weights_only(path)
    problem = f"no checkpoint in {folder} is complete; the newest is {path.name}: {damage}"
    fix = "Set `run.overwrite: true` to start again, or name another `train.output_dir`."
    return FolderDecision(problem, fix, code="resume.unreadable_checkpoint")


def _refuse_weights_only(checkpoint: Path) -> FolderDecision:
    """Return the refusal of a checkpoint without the state of the optimizer."""
    problem = f"{checkpoint} holds weights only (save_only_model), so training cannot continue"
    fix = "Start a new run from these weights: set `model.name_or_path` to that folder, and another `train.output_dir`."
    return FolderDecision(problem, fix, code="resume.weights_only")


def _is_unknown(checkpoint: Path) -> bool:
    """Tell whether nothing says which recipe a checkpoint is of: another program wrote it."""
    return not checkpoints.read_record(checkpoint).get("fingerprint")


def _refuse_unknown(checkpoint: Path, key: tuple[str, str]) -> FolderDecision:
    """Return the refusal of a checkpoint of another program."""
    problem = f"{checkpoint} has no {checkpoints.RECORD}, so its recipe and its tokens are not known"
    fix = f"Start a new run from its weights: set `model.name_or_path` to {checkpoint}, and another `train.output_dir`."
    return FolderDecision(problem, fix, key=key, code="resume.unknown_checkpoint")


def _find_changes(run: Run, checkpoint: Path) -> list[KeyChange]:
    """Return the keys that differ from the run that a checkpoint is of."""
    record = checkpoints.read_record(checkpoint)
    if record.get("fingerprint") == resolved.compute_fingerprint(run):
        return []
    changes = resume_keys.compare(record.get(VALUES, {}), list_values(run))
    return changes or [KeyChange("run", "another version of trl_sft", "this one", resume_keys.REFUSED)]


def _describe_set_aside(folder: Path, problem: str) -> str:
    """Return where the run is that an unfinished one was to replace; "" = there is none, or the problem names it."""
    aside = folder / run_folder.EARLIER_RUN
    if str(aside) in problem or not (aside / run_folder.RUN).is_file():
        return ""
    return f"; the run that it was to replace is in {aside}"


def _refuses(change: KeyChange) -> bool:
    return change.effect in (resume_keys.REFUSED, resume_keys.KEPT_BY_CHECKPOINT)


def _explain_refusal(run: Run, change: KeyChange, checkpoint: Path) -> Fault:
    """Return the fault of a key that may not change on resume."""
    key: Key = tuple(change.key.split("."))
    reason = "a run cannot change this key when it resumes"
    if change.effect == resume_keys.KEPT_BY_CHECKPOINT:
        reason = "the optimizer of the checkpoint continues with its own value"
    before = "Remove the key" if change.before is None else f"Set the key back to {change.before}"
    edit = Edit("remove", key) if change.before is None else Edit("set", key, change.before)
    fix = f"{before}; or start a new run from the weights: set `model.name_or_path` to {checkpoint}, and another"
    fix += " `train.output_dir`."
    return Fault(run.recipe.where(key), f"{change}; {reason}", fix, code="resume.refused_key", edits=(edit,))


def _list_changes(changes: tuple[KeyChange, ...]) -> str:
    more = f", and {len(changes) - _MAX_CHANGES} more" if len(changes) > _MAX_CHANGES else ""
    return f" ({'; '.join(map(str, changes[:_MAX_CHANGES]))}{more})"


def _how_to_continue(changes: tuple[KeyChange, ...]) -> str:
    """Return the instruction that lets a run continue although the recipe changed."""
    refused = [change for change in changes if _refuses(change)]
    if refused:
        words = [f"remove `{c.key}`" if c.before is None else f"set `{c.key}` back to {c.before}" for c in refused]
        return f"{', '.join(words)} to continue"
    return f"set `run.allow: [{CHANGED_RECIPE}]` to continue"


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
        if error.errno not in (errno.EACCES, errno.EPERM) and (fault := disk.explain(error, [folder])):
            return FolderDecision(f"{folder} cannot be written to: {fault.problem}", fault.fix, code=fault.code)
        problem = f"{folder} cannot be written to: {error.strerror or error}"
        return FolderDecision(
            problem,
            "Correct its permissions, or set `train.output_dir` to another folder. Then run the same command again.",
            code="run.unwritable_output",
        )
