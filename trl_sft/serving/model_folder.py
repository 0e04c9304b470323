"""What the folder of a model holds: a run, an adapter on its base, or a whole model; and which checkpoint is meant.

Inputs: a folder and a step. Outputs: a `ModelFolder`, before torch is imported, or a fault that says what is missing.
Not here: loading weights (`model_loading`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_sft import console, run_folder, user_paths
from trl_sft.errors import Fault, RecipeError
from trl_sft.model import base_digest

_CONFIG = "config.json"
_TOKENIZER = "tokenizer_config.json"
INFERENCE = "inference"  # the key of run.json that `training.inference_record` writes


@dataclass(frozen=True)
class ModelFolder:
    """Where a model, its tokenizer and its settings are."""

    folder: Path  # that the user names
    weights: Path  # the folder itself, or one of its checkpoints
    is_adapter: bool
    base: str  # the base model: a folder or a hub id; "" = unknown
    inference: dict[str, Any]  # how the run renders prompts and decodes answers; {} = the folder is no run's
    template_date: str | None  # the day that the template writes; None = none
    step: int | None  # of the checkpoint; None = the weights at the end

    @property
    def title(self) -> str:
        """The model as the screen names it."""
        kind = "adapter" if self.is_adapter else "model"
        at_step = f" at step {self.step:,}" if self.step is not None else ""
        return f"{kind} of {run_folder.shorten_path(self.folder.absolute())}{at_step}"

    def find_first(self, name: str) -> Path | None:
        """Return the first folder that has a file: weights, the folder itself, the base; None = none has it."""
        folders = [self.weights, self.folder, *([Path(self.base)] if self.base else [])]
        return next((folder for folder in folders if (folder / name).is_file()), None)

    @property
    def tokenizer_source(self) -> str:
        """The folder or hub id that has the tokenizer."""
        return str(self.find_first(_TOKENIZER) or self.find_first("tokenizer.json") or self.base or self.folder)


def find_model(folder: Path, step: int | None = None) -> ModelFolder:
    """Return what a folder holds.

    Args:
        folder: Of a run, an adapter or a model.
        step: Of a checkpoint; None = the weights at the end.

    Raises:
        RecipeError: There is no such folder or checkpoint, it holds no model, or its run is not finished.

    """
    user_paths.check("", folder, user_paths.FOLDER)
    if not folder.is_dir():
        fix = "Name the folder of a run; `python -m trl_sft runs` lists those below `runs/`."
        raise RecipeError(Fault(str(folder), "there is no such folder", fix, code="chat.no_model"))
    record = run_folder.read_json(folder / run_folder.RUN)
    weights = folder if step is None else _find_checkpoint(folder, step)
    if step is None and record and record.get("outcome") != run_folder.DONE:
        raise RecipeError(_explain_unfinished(folder, record))
    adapter = run_folder.read_json(weights / run_folder.ADAPTER_CONFIG)
    has_weights = any(any(weights.glob(pattern)) for pattern in run_folder.WEIGHTS)
    if not has_weights or not (adapter or (weights / _CONFIG).is_file()):
        fix = "Name the folder of a finished run, of an adapter, or of a model that `save_pretrained` wrote."
        problem = f"the folder holds no model: it has no {_CONFIG} or {run_folder.ADAPTER_CONFIG} with weights"
        raise RecipeError(Fault(str(weights), problem, fix, code="chat.no_model"))
    inference = record.get(INFERENCE)
    inference = inference if isinstance(inference, dict) else {}
    base = str(adapter.get("base_model_name_or_path") or inference.get("base") or "")
    day = record.get("template_date")
    return ModelFolder(folder, weights, bool(adapter), base, inference, str(day) if day else None, step)


def check_base(source: ModelFolder) -> None:
    """Refuse a base model that is gone, or that is another one than the run was trained on. Raises RecipeError."""
    where, base = str(source.folder), source.base
    if not base:
        problem = "the folder does not name the model that it was trained from"
        fix = "Leave out `--against base`, or name the folder of a run."
        raise RecipeError(Fault(where, problem, fix, code="model.missing_base"))
    if Path(base).is_absolute() and not Path(base).is_dir():
        problem = f"the base model {base} does not exist"
        fix = "Put the base model at that path, or train on a base model that stays."
        raise RecipeError(Fault(where, problem, fix, code="model.missing_base"))
    expected = source.inference.get("base_digest")
    if not expected or base != source.inference.get("base"):
        return
    keywords = source.inference.get("model", {})
    found = base_digest.compute_digest(base, keywords.get("revision"), keywords.get("cache_dir"))
    if found is not None and found != expected:
        problem = f"the base model {base} is not the one that this run was trained on: its files have changed"
        fix = "Put back the base model of the run, or run the recipe again."
        raise RecipeError(Fault(where, problem, fix, code="model.other_base"))


def _find_checkpoint(folder: Path, step: int) -> Path:
    """Return the checkpoint of a step. Raises RecipeError that names those which exist."""
    checkpoints = {run_folder.get_step(path): path for path in run_folder.list_checkpoints(folder)}
    if step in checkpoints:
        return checkpoints[step]
    if not checkpoints:
        fix = "Leave out `--at`, or set `train.save_steps` in the recipe before the next run."
        raise RecipeError(Fault("--at", f"{folder} has no checkpoints", fix, code="chat.no_checkpoint"))
    names = console.format_names([str(number) for number in checkpoints])
    problem = f"{folder} has no checkpoint of step {step:,}; it has those of the steps {names}"
    fix = f"Write `--at {min(checkpoints, key=lambda number: abs(number - step))}`."
    raise RecipeError(Fault("--at", problem, fix, code="chat.no_checkpoint"))


def _explain_unfinished(folder: Path, record: dict[str, Any]) -> Fault:
    """Return the fault of a run that is not finished; its checkpoints can be asked."""
    outcome = str(record.get("outcome") or "unknown")
    if outcome == run_folder.RUNNING and not run_folder.is_locked(folder):
        outcome = "interrupted"
    lines = outcome.splitlines() or ["unknown"]
    steps = [str(run_folder.get_step(path)) for path in run_folder.list_checkpoints(folder)]
    fix = "Run the recipe again to finish the run."
    if steps:
        fix = f"Write `--at {steps[-1]}` for its newest checkpoint, or run the recipe again to finish the run."
    return Fault(str(folder), f"the run is not finished ({lines[0]})", fix, code="chat.unfinished_run")
