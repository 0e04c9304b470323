"""What SFTTrainer needs to load the model: the id, keywords, LoRA; an adapter to go on with.

In: a `Run`. Out: `Found`, before any weight is read, and later the keyword arguments of SFTTrainer.
Foreign errors of the hub become ours here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import errors, hf_hub_download
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from trl_sft import hub
from trl_sft.errors import Fault, RecipeError, first_line
from trl_sft.recipe import Key
from trl_sft.run import Run, Setting


class Found(NamedTuple):
    """A model that exists: its configuration could be read."""

    name: str  # the base model: a folder, or a hub id
    adapter: str  # the adapter that training goes on with; "" = none
    config: PretrainedConfig


def find(run: Run) -> Found:
    """Return the model of a run without its weights. Raises RecipeError."""
    key = ("model", "name_or_path")
    name, adapter = run.base.name, ""
    if run.base.files and (run.base.files[0] / "adapter_config.json").is_file():
        adapter = name
        saved = json.loads((run.base.files[0] / "adapter_config.json").read_text(encoding="utf-8"))
        name = str(saved.get("base_model_name_or_path") or "")
        if not name or (Path(name).is_absolute() and not Path(name).is_dir()):
            found = f"{run.base.name}: an adapter whose base model {name or '(unnamed)'} is not there"
            raise RecipeError(Fault(run.recipe.where(key), found, "the base at that path, or another adapter"))
    keywords = {k: v for k, v in run.model.items() if k in ("cache_dir", "revision", "token")}
    if not run.base.files and Path(name).exists():
        found = f"{name}: a folder of the current folder, but a path in a recipe is relative to the recipe"
        raise RecipeError(Fault(run.recipe.where(key), found, f"its path from there, or {Path(name).absolute()}"))
    try:
        if not Path(name).is_dir():
            local = bool(run.model.get("local_files_only")) or not hub.ask("model", name, keywords)
            hf_hub_download(name, "config.json", local_files_only=local, **keywords)
        config = AutoConfig.from_pretrained(
            name, trust_remote_code=bool(run.model.get("trust_remote_code")), **keywords
        )
    except Exception as error:
        raise RecipeError(Fault(run.recipe.where(key), *_explained(name, error))) from None
    if not config.architectures:
        found = f"{name}: its config.json names no architectures"
        raise RecipeError(Fault(run.recipe.where(key), found, "a model that save_pretrained wrote"))
    return Found(name, adapter, config)


def lora(run: Run) -> Any:
    """Return the peft.LoraConfig of a run; None for all weights. Raises RecipeError."""
    if run.lora is None:
        return None
    from peft import LoraConfig

    try:
        return LoraConfig(**{str(key[-1]): setting.value for key, setting in settings(run).items()} | run.lora)
    except (TypeError, ValueError) as error:
        raise RecipeError(Fault(run.recipe.where(("lora",)), first_line(error), "values that peft takes")) from None


def settings(run: Run) -> dict[Key, Setting]:
    """Return what we set for the adapter where the recipe is silent."""
    if run.lora is None or "task_type" in run.lora:
        return {}
    # TRL's own command line sets the same, trl.trainer.utils.get_peft_config
    why = "without it AutoPeftModelForCausalLM cannot load the adapter"
    return {("lora", "task_type"): Setting("CAUSAL_LM", why)}


def arguments(run: Run, found: Found) -> dict[str, Any]:
    """Return the keyword arguments of SFTTrainer that bring the model.

    The id goes to SFTTrainer, so that TRL keeps its own loading; only an adapter that training goes on
    with is loaded here, as a trainable PeftModel.
    """
    if not found.adapter:
        return {"model": found.name, "peft_config": lora(run)}
    from peft import PeftModel

    keywords = {"dtype": "float32"} | run.model  # TRL's default, trl.trainer.utils.create_model_from_path
    base = AutoModelForCausalLM.from_pretrained(found.name, **keywords)
    return {"model": PeftModel.from_pretrained(base, found.adapter, is_trainable=True)}


def _explained(name: str, error: Exception) -> tuple[str, str]:
    """Return what stood there and what to write, for an error of the hub or of transformers."""
    told = None if Path(name).is_dir() else hub.explain(name, error)
    if told is None and isinstance(error, errors.EntryNotFoundError):
        told = f"{name}: has no config.json", "a model that transformers loads"
    found = f"{name}: its configuration cannot be read: {first_line(error)}"
    return told or (found, "a model that this transformers knows")
