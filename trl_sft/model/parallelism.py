"""Upstream's objects for `train.parallelism_config`, and whether as many processes train as the recipe divides.

In: a checked recipe, the number of processes. Out: keyword arguments of SFTConfig, or a fault before the weights load.
`check_model` compares the sizes with the heads and layers of the model. Deliberately absent: pairs of keys that exclude
each other (`recipe.parallelism`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import dataclasses as accelerate_classes
from transformers import PretrainedConfig

from trl_sft.errors import Fault, LaunchError, RecipeError, first_line
from trl_sft.recipe import parallelism
from trl_sft.recipe.checked import Run

_HANDLERS = {
    "tp_handler": "TorchTensorParallelConfig",
    "cp_handler": "TorchContextParallelConfig",
    "sp_handler": "DeepSpeedSequenceParallelConfig",
}


def check_model(run: Run, config: PretrainedConfig) -> None:
    """Refuse a model whose heads or layers cannot be divided as the recipe says.

    Upstream refuses it only after the weights are loaded: accelerate 1.15 (`_attach_context_parallel_hooks`,
    `_refuse_recurrent_layers_under_sequence_parallelism`), DeepSpeed 0.19 (`UlyssesSPAttentionHF`), transformers.

    Args:
        run: the checked recipe.
        config: of the model.

    Raises:
        RecipeError: with a fault for each size that does not fit.

    """
    text = config.get_text_config()
    faults = [*_check_heads(run, text), *_check_layers(run, text)]
    if faults:
        raise RecipeError(faults)


def _check_heads(run: Run, text: PretrainedConfig) -> Iterator[Fault]:
    """Yield the faults of sizes that do not divide the heads of attention."""
    heads = int(getattr(text, "num_attention_heads", 0) or 0)
    key_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    sizes: dict[str, Any] = {key: run.train.get(parallelism.ACCELERATE_NAME) or {} for key in ("sp_size",)}
    sizes["tp_size"] = run.model.get(parallelism.TRANSFORMERS_NAME) or {}
    for name, mapping in sizes.items():
        size = mapping.get(name) or 1
        # DeepSpeed repeats the heads of keys and values where there are more processes
        repeats = name == "sp_size" and size % key_heads == 0 if key_heads else False
        if size == 1 or not heads or (heads % size == 0 and (key_heads % size == 0 or repeats)):
            continue
        key = (*(parallelism.ACCELERATE if name == "sp_size" else parallelism.TRANSFORMERS), name)
        kinds = f"{heads} attention heads and {key_heads} of keys and values"
        problem = f"`{name}: {size}` does not divide the heads of the model, which has {kinds}"
        possible = [number for number in range(2, heads + 1) if heads % number == 0 and key_heads % number == 0]
        fix = f"Use {' or '.join(map(str, possible)) or 1}."
        yield run.recipe.fault(key, problem, fix, code="recipe.out_of_range")


def _check_layers(run: Run, text: PretrainedConfig) -> Iterator[Fault]:
    """Yield the faults of layers that attend otherwise than the division of rows can."""
    mapping = run.train.get(parallelism.ACCELERATE_NAME) or {}
    kinds = set(getattr(text, "layer_types", None) or ())
    if not kinds and getattr(text, "sliding_window", None):
        kinds = {"sliding_attention"}
    refused = {
        "cp_size": (sorted(kinds - {"full_attention"}), "context parallelism attends to the whole row in every layer"),
        "sp_size": (sorted(kind for kind in kinds if "linear_attention" in kind), "these layers carry a state along"),
    }
    for name, (layers, reason) in refused.items():
        if (mapping.get(name) or 1) > 1 and layers:
            problem = f"the model has layers of {', '.join(layers)}, and {reason}"
            fix = f"Use a model with full attention alone, or remove `{name}`."
            yield run.recipe.fault((*parallelism.ACCELERATE, name), problem, fix, code="recipe.contradiction")


def build_arguments(run: Run, processes: int | None) -> dict[str, Any]:
    """Return `parallelism_config` as SFTConfig takes it; empty where the recipe has none.

    Args:
        run: the checked recipe.
        processes: how many processes train; None = not known.

    Raises:
        RecipeError: accelerate refuses a value.
        LaunchError: another number of processes trains than the recipe divides the training among.

    """
    key = parallelism.find_key({"train": run.train, "model": run.model})
    if key is not None and processes is not None:
        mapping = (run.train if key == parallelism.ACCELERATE else run.model)[str(key[1])]
        needed = parallelism.count_processes(key, mapping)
        if processes != needed:
            sizes = parallelism.describe_sizes(key, mapping)
            problem = f"{sizes} need {needed} processes, and {processes} {'trains' if processes == 1 else 'train'}"
            fix = f"Start {needed} processes (`launch.nproc_per_node: {needed}`), or change the sizes."
            raise LaunchError(Fault(run.recipe.where(key), problem, fix, code="machine.process_count"))
    if parallelism.ACCELERATE_NAME not in run.train:
        return {}
    values = dict(run.train[parallelism.ACCELERATE_NAME] or {})
    if (values.get("sp_size") or 1) > 1:  # DeepSpeed compares it with the model's, which accelerate 1.15 leaves out
        attention = {"sp_attn_implementation": str(run.model.get("attn_implementation") or "sdpa")}
        values["sp_handler"] = attention | (values.get("sp_handler") or {})
    try:
        for name, class_name in _HANDLERS.items():
            if isinstance(values.get(name), dict):
                values[name] = getattr(accelerate_classes, class_name)(**values[name])
        return {parallelism.ACCELERATE_NAME: ParallelismConfig(**values)}
    except (TypeError, ValueError, ImportError, OSError) as error:
        fix = "Write values that accelerate's ParallelismConfig takes."
        where = run.recipe.where(parallelism.ACCELERATE)
        raise RecipeError(Fault(where, first_line(error), fix, code="recipe.refused_by_library")) from None
