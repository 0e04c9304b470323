"""The model of a run with shapes and no numbers, on torch's meta device.

In: a `Run` and its model's configuration. Out: the model as TRL would load it, or what its class says of itself.
Deliberately absent: adapters that training goes on with, whose weights are read with them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from trl_sft.model import load
from trl_sft.model.load import ModelSource
from trl_sft.recipe.checked import Run


def arguments(run: Run, found: ModelSource, new: Sequence[int], rows: int) -> dict[str, Any]:
    """Return what `model.arguments` does for a model without adapter, whose weights have shapes and no numbers.

    A device map of two places keeps the Trainer from moving them.
    """
    peft_config = load.lora(run)
    if peft_config is not None and isinstance(peft_config.init_lora_weights, str):
        peft_config.init_lora_weights = True  # PiSSA and its like need the numbers
    with torch.device("meta"):
        base = _hollow(run, found)
        if new:
            load.grow(base, rows, new)
    if new and peft_config is not None:
        load.train_rows(run, base, peft_config, list(new))
    base.hf_device_map = {"": "cpu", "lm_head": "meta"}
    return {"model": base, "peft_config": peft_config}


def _hollow(run: Run, found: ModelSource, **more: Any) -> PreTrainedModel:
    """Make the class that TRL loads: the one that the configuration names, which may read pictures too."""
    keywords = {k: v for k, v in run.model.items() if k == "attn_implementation"} | more
    named = getattr(transformers, found.config.architectures[0], None)
    if named is None:
        keywords |= {k: v for k, v in run.model.items() if k == "trust_remote_code"}
        return AutoModelForCausalLM.from_config(copy.deepcopy(found.config), **keywords)
    return named._from_config(copy.deepcopy(found.config), **keywords)


def keeps_float32(run: Run, found: ModelSource, dtype: str) -> bool:
    """Tell whether the model's class makes some weights in float32 whatever it is loaded in."""
    with torch.device("meta"):
        made = _hollow(run, found, dtype=getattr(torch, dtype))
    return any(parameter.dtype == torch.float32 for parameter in made.parameters())
