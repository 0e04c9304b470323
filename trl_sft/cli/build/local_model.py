"""The generator as a model on this machine: a folder, a hub id, or an embedded model.

Inputs: a spec whose generator has no endpoint. Outputs: a caller with the loaded model. Not here: how it answers
(`building.local_caller`).
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from trl_sft import console
from trl_sft.building import spec_keys
from trl_sft.building.call_budget import CallBudget
from trl_sft.building.local_caller import LocalCaller
from trl_sft.building.spec import Spec
from trl_sft.errors import RecipeError, first_line
from trl_sft.evaluation.call_log import CallLog
from trl_sft.model import base_digest
from trl_sft.recipe import paths
from trl_sft.recipe.paths import LocationProblem
from trl_sft.serving import model_loading


def load(spec: Spec, log: CallLog, budget: CallBudget) -> LocalCaller:
    """Return the caller of the local model.

    Raises:
        UserError: there is no such model, it cannot be loaded, or it has no chat template.

    """
    key = (spec_keys.GENERATOR, "model")
    name = spec.get(*key)
    location = paths.resolve_location(name, spec.recipe.folder(key))
    if isinstance(location, LocationProblem):
        fix = f"{location.fix} For a model behind a server set `generator.endpoint`."
        raise RecipeError(spec.recipe.fault(key, f"{name}: {location.problem}", fix, code=location.code))
    source = str(location.files[0]) if location.files else location.name
    console.say(f"loading   {name}")
    tokenizer = model_loading.read_tokenizer(source, Path(name))
    if not tokenizer.chat_template:
        fix = "Name a model that was trained for chats, or set `generator.endpoint`."
        problem = f"{name} has no chat template, so it cannot be asked"
        raise RecipeError(spec.recipe.fault(key, problem, fix, code="build.no_chat_template"))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    except (OSError, ValueError) as error:
        fix = "Name the folder or the hub id of a whole model."
        raise RecipeError(
            spec.recipe.fault(key, f"{name}: {first_line(error)}", fix, code="chat.unreadable_model")
        ) from None
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    model.eval()
    digest = base_digest.compute_digest(source) or source
    return LocalCaller(model, tokenizer, name, f"local {digest}", log, budget)
