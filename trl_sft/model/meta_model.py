"""The model of a run on torch's meta device: shapes without values.

In: a `Run` and its model's configuration. Out: the model as TRL would load it, and whether its class keeps weights in
float32. Deliberately absent: adapters that training continues, because peft loads them together with their weights.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from trl_sft.model import load, patches
from trl_sft.model.load import ModelSource
from trl_sft.recipe.checked import Run


def build_trainer_arguments(
    run: Run, source: ModelSource, *, new_tokens: Sequence[int], vocab_size: int
) -> dict[str, Any]:
    """Return the keyword arguments of `load.build_trainer_arguments` for a model without adapter, on the meta device.

    The model gets a device map with two devices, so that the Trainer does not move the weights.
    """
    peft_config = load.make_lora_config(run)
    if peft_config is not None and isinstance(peft_config.init_lora_weights, str):
        peft_config.init_lora_weights = True  # PiSSA and similar methods need the values of the weights
    with torch.device("meta"):
        model = _build(run, source)
        if new_tokens:
            load.add_embedding_rows(model, vocab_size, new_tokens)
    if new_tokens and peft_config is not None:
        load.train_new_rows(run, model, peft_config, new_tokens=list(new_tokens))
    model.hf_device_map = {"": "cpu", "lm_head": "meta"}
    return {"model": model, "peft_config": peft_config}


def build(run: Run, source: ModelSource) -> PreTrainedModel:
    """Return the model of a run, without an adapter, on the meta device."""
    with torch.device("meta"):
        return _build(run, source)


def _build(run: Run, source: ModelSource, **keywords: Any) -> PreTrainedModel:
    """Build the model of the class that TRL loads: the configuration names it; it may be multimodal."""
    if "attn_implementation" in run.model:
        keywords = {"attn_implementation": run.model["attn_implementation"]} | keywords
    config = copy.deepcopy(source.config)
    model_class = getattr(transformers, config.architectures[0], None)
    if model_class is not None:
        return patches.build_from_config(model_class, config, **keywords)
    if "trust_remote_code" in run.model:
        keywords["trust_remote_code"] = run.model["trust_remote_code"]
    return AutoModelForCausalLM.from_config(config, **keywords)


def keeps_float32(run: Run, source: ModelSource, dtype: str) -> bool:
    """Tell whether the model's class keeps some weights in float32 although it is loaded in `dtype`."""
    with torch.device("meta"):
        model = _build(run, source, dtype=getattr(torch, dtype))
    return any(parameter.dtype == torch.float32 for parameter in model.parameters())
