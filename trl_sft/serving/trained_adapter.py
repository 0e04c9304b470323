"""The adapter of a run, with the base model that it was trained on.

Inputs: a run folder, and maybe a checkpoint. Outputs: a `TrainedAdapter`; refusals for a folder that holds no run, a
run that is not finished, a run of all weights, a base model that is gone or another than trained on. Needs no torch.
Deliberately not here: what is done with the adapter (`merge`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trl_sft import checkpoints, run_folder, user_paths
from trl_sft.errors import Fault, RecipeError, first_line
from trl_sft.model import base_digest
from trl_sft.serving import base_folder

_CHECKPOINT_OPTION = "--at"


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter and its base model."""

    run: Path  # the run folder
    folder: Path  # of the adapter: the run folder, or a checkpoint in it
    name: str  # the base model, as the adapter names it: a folder or a hub id
    base: Path  # the folder of the base model
    quantization: dict[str, Any] | None  # of the base model in training; None = not quantized
    dtype: str | None  # `model.dtype` of the recipe
    fields: dict[str, Any]  # `model.config` of the recipe: what the base model's configuration had in training
    digest: str | None  # of the base model
    is_known_base: bool  # whether run.json has a digest to compare with

    @property
    def label(self) -> str:
        """The adapter's folder, as a screen shows it."""
        return run_folder.shorten_path(self.folder)


def find_adapter(run: Path, checkpoint: str = "") -> TrainedAdapter:
    """Return the adapter of a run.

    Args:
        run: The run folder.
        checkpoint: Step or name of a checkpoint, `50` or `checkpoint-50`; "" = the weights at the end of the run.

    Raises:
        RecipeError: There is no such adapter, or its base model is gone or is another one.

    """
    user_paths.check("", run, user_paths.FOLDER)
    record = _read_record(run)
    run = run.resolve()
    folder = _find_checkpoint(run, checkpoint) if checkpoint else run
    if not checkpoint and record.get("outcome") != run_folder.DONE:
        _refuse_unfinished(run, str(record.get("outcome", "")))
    config = run_folder.read_json(folder / run_folder.ADAPTER_CONFIG)
    if not (folder / run_folder.ADAPTER_CONFIG).is_file():
        problem = "the run trained all weights: there is no adapter to merge"
        fix = f"Use {run_folder.shorten_path(folder)} itself: it holds the whole model, which transformers loads."
        raise RecipeError(Fault(str(folder), problem, fix, code="merge.nothing_to_merge"))
    name = config.get("base_model_name_or_path")
    if not (folder / "adapter_model.safetensors").is_file() or not isinstance(name, str) or not name:
        problem = "the adapter is not whole: adapter_model.safetensors or the name of its base model is missing"
        raise RecipeError(Fault(str(folder), problem, "Restore the files from a copy, or train again.", code=_DAMAGED))
    resolved = _read_resolved(run)
    model = resolved.get("model") or {}
    base = _find_base(folder, name, model)
    digest = base_digest.compute_digest(str(base))
    inference = record.get("inference")
    expected = inference.get("base_digest") if isinstance(inference, dict) and inference.get("base") == name else None
    if expected and expected != digest:
        problem = (
            f"the base model {name} is another one than the adapter was trained on: its config.json or weights differ"
        )
        fix = "Put the model that was trained on there again, or train the adapter on this one."
        raise RecipeError(Fault(str(folder), problem, fix, code="merge.other_base"))
    return TrainedAdapter(
        run=run,
        folder=folder,
        name=name,
        base=base,
        quantization=resolved.get("quantization"),
        dtype=model.get("dtype"),
        fields=model.get("config") or {},
        digest=digest,
        is_known_base=expected is not None,
    )


_DAMAGED = "merge.damaged_adapter"


def _read_record(run: Path) -> dict[str, Any]:
    """Return run.json. Raises RecipeError if the folder holds no run."""
    record = run_folder.read_json(run / run_folder.RUN)
    if record:
        return record
    problem = f"the folder holds no run: it has no readable {run_folder.RUN}"
    fix = "Name the folder of a run; `python -m trl_sft runs` lists those below `runs/`."
    if run_folder.is_checkpoint(run.absolute()) and (run.absolute().parent / run_folder.RUN).is_file():
        problem = "this is a checkpoint, and not the folder of a run"
        fix = f"Write `{run.absolute().parent} {_CHECKPOINT_OPTION} {run_folder.get_step(run.absolute())}`."
    if not run.is_dir():
        problem = "there is no such folder"
    raise RecipeError(Fault(str(run), problem, fix, code="merge.no_run"))


def _find_checkpoint(run: Path, checkpoint: str) -> Path:
    """Return the folder of a checkpoint. Raises RecipeError if it is absent or damaged."""
    name = Path(checkpoint).name
    folder = run / (name if name.startswith(run_folder.CHECKPOINT) else run_folder.CHECKPOINT + name)
    complete = run_folder.list_checkpoints(run)
    if folder not in complete:
        names = ", ".join(str(run_folder.get_step(path)) for path in complete)
        problem = f"{run}: has no whole checkpoint {checkpoint}"
        fix = f"Write one of {names}." if names else f"Leave out {_CHECKPOINT_OPTION}: the run has no checkpoints."
        raise RecipeError(Fault(_CHECKPOINT_OPTION, problem, fix, code="merge.no_checkpoint"))
    damage = checkpoints.find_damage(folder) if (folder / checkpoints.RECORD).is_file() else ""
    if damage:
        fix = "Name another checkpoint."
        raise RecipeError(Fault(str(folder), f"the checkpoint is damaged: {damage}", fix, code=_DAMAGED))
    return folder


def _refuse_unfinished(run: Path, outcome: str) -> None:
    """Refuse a run that is not finished, with the checkpoints that can be merged. Raises RecipeError."""
    state = next(iter(outcome.splitlines()), "")
    is_running = outcome == run_folder.RUNNING and run_folder.is_locked(run)
    ended = "it still runs" if is_running else "it was interrupted" if outcome == run_folder.RUNNING else state
    steps = [str(run_folder.get_step(path)) for path in run_folder.list_checkpoints(run)]
    fix = "Run its recipe again: it continues from its checkpoint."
    if steps:
        fix = f"Let it finish, or name a checkpoint: `{_CHECKPOINT_OPTION} {steps[-1]}` (there are {', '.join(steps)})."
    raise RecipeError(Fault(str(run), f"the run is not finished: {ended}", fix, code="merge.unfinished_run"))


def _read_resolved(run: Path) -> dict[str, Any]:
    """Return resolved.yaml as a mapping; empty if it is absent or damaged."""
    try:
        values = yaml.safe_load((run / run_folder.RESOLVED).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _find_base(folder: Path, name: str, model: dict[str, Any]) -> Path:
    """Return the folder of the base model. Raises RecipeError if it is gone, or cannot be merged into."""
    where = str(folder / run_folder.ADAPTER_CONFIG)
    try:
        base = base_folder.find_folder(name, model)
    except Exception as error:  # the cache, the hub and the network have many kinds
        problem = f"the base model {name} is gone, or cannot be read: {first_line(error)}"
        fix = "Put the base model where it was, or correct `base_model_name_or_path` in this file."
        raise RecipeError(Fault(where, problem, fix, code="merge.missing_base")) from None
    config = run_folder.read_json(base / "config.json")
    if not config or not all(path.is_file() for path in base_folder.list_weight_files(base) or [base / "no weights"]):
        problem = f"the base model {name} is not whole: config.json or files of safetensors are missing"
        fix = "Copy or download the base model again."
        raise RecipeError(Fault(where, problem, fix, code="merge.missing_base"))
    if "quantization_config" in config:
        problem = f"the base model {name} was saved quantized, and an adapter cannot be added to such weights"
        fix = "Set `base_model_name_or_path` in this file to the same model that is not quantized."
        raise RecipeError(Fault(where, problem, fix, code="merge.unsupported"))
    if "auto_map" in config:
        problem = f"the base model {name} comes with its own Python code, which this command does not run"
        raise RecipeError(Fault(where, problem, "Merge it with peft's merge_and_unload.", code="merge.unsupported"))
    return base
