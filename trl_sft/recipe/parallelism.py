"""Keys that divide a model, or the tokens of a row, among processes: which exclude each other, how many they need.

The keys are `train.parallelism_config` (accelerate: context and sequence parallelism) and `model.distributed_config`
(transformers: tensor, expert and pipeline parallelism, and FSDP2 at load time).

Inputs: the checked sections of a recipe. Outputs: faults of pairs that upstream refuses only after the weights are
loaded, or not at all; the number of processes. Not here: the names and types of the keys (`upstream.nested`), and the
processes themselves. Needs no torch. Read in accelerate 1.15, transformers 5.23 and TRL 1.16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from trl_sft.errors import Edit, Fault
from trl_sft.recipe.yaml_reader import Key, Recipe

ACCELERATE_NAME, TRANSFORMERS_NAME = "parallelism_config", "distributed_config"
ACCELERATE: Key = ("train", ACCELERATE_NAME)
TRANSFORMERS: Key = ("model", TRANSFORMERS_NAME)
_SIZES = {
    ACCELERATE: ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size"),
    TRANSFORMERS: ("dp_replicate_size", "fsdp_size", "tp_size", "pp_size"),
}
_FSDP, _ZERO = ("fsdp",), ("zero1", "zero2", "zero3")


def check(recipe: Recipe, values: Mapping[str, Mapping[str, Any]]) -> Iterator[Fault]:
    """Yield the faults of keys that exclude each other, or need another one.

    Args:
        recipe: The recipe, for the places of the faults.
        values: The checked keys of each section.

    """
    train, engine = values["train"], str(values["launch"].get("engine", "auto"))
    accelerate, transformers = train.get(ACCELERATE_NAME), values["model"].get(TRANSFORMERS_NAME)
    for key, mapping in ((ACCELERATE, accelerate), (TRANSFORMERS, transformers)):
        for name in _SIZES[key]:
            size = mapping.get(name) if isinstance(mapping, dict) else None
            if isinstance(size, int) and size < 1:
                fix = "Write a whole number of at least 1."
                yield recipe.fault((*key, name), f"the value is {size}", fix, code="recipe.out_of_range")
    if isinstance(accelerate, dict):
        yield from _check_accelerate(recipe, accelerate, train, engine=engine)
    if isinstance(transformers, dict):
        yield from _check_transformers(recipe, transformers, train, engine=engine)
        if values["model"].get("device_map") is not None:
            problem = "`distributed_config` places the weights on the processes' devices, and so does `device_map`"
            yield _refuse_pair(recipe, ("model", "device_map"), problem)
    if accelerate and transformers and _size(accelerate, "tp_size") > 1 and _size(transformers, "tp_size") > 1:
        problem = "`train.parallelism_config` and `model.distributed_config` both set a `tp_size` above 1"
        yield _refuse_pair(recipe, (*ACCELERATE, "tp_size"), problem)


def find_key(values: Mapping[str, Mapping[str, Any]]) -> Key | None:
    """Return the key that divides the training among processes; None = the recipe has none, or all sizes are 1."""
    for key in (ACCELERATE, TRANSFORMERS):
        mapping = values[str(key[0])].get(str(key[1]))
        if isinstance(mapping, dict) and count_processes(key, mapping) > 1:
            return key
    return None


def count_processes(key: Key, mapping: Mapping[str, Any]) -> int:
    """Return how many processes the sizes under a key need together."""
    return math.prod(_size(mapping, name) for name in _SIZES[key])


def describe_sizes(key: Key, mapping: Mapping[str, Any]) -> str:
    """Return the sizes above 1 as they are written: `tp_size: 2, fsdp_size: 4`."""
    return ", ".join(f"{name}: {mapping[name]}" for name in _SIZES[key] if _size(mapping, name) > 1)


def _check_accelerate(
    recipe: Recipe, mapping: Mapping[str, Any], train: Mapping[str, Any], *, engine: str
) -> Iterator[Fault]:
    """Yield the faults of `train.parallelism_config`."""
    context, sequence = _size(mapping, "cp_size"), _size(mapping, "sp_size")
    tensor, replicas = _size(mapping, "tp_size"), _size(mapping, "dp_replicate_size")
    if context > 1 and sequence > 1:
        problem = "context parallelism (`cp_size`) and sequence parallelism (`sp_size`) exclude each other"
        yield _refuse_pair(recipe, (*ACCELERATE, "sp_size"), problem)
    for name in ("packing", "eval_packing"):
        if context > 1 and train.get(name):
            problem = f"`{name}` needs a mask that keeps packed rows apart, and context parallelism drops it"
            yield _refuse_pair(recipe, ("train", name), problem)
    if context > 1 and engine not in ("auto", *_FSDP):
        problem = f"context parallelism (`cp_size: {context}`) shards the model with FSDP2, and the engine is {engine}"
        yield _needs_engine(recipe, (*ACCELERATE, "cp_size"), problem, engine="fsdp")
    if sequence > 1 and engine not in ("auto", *_ZERO):
        problem = f"sequence parallelism (`sp_size: {sequence}`) is DeepSpeed's, and the engine is {engine}"
        yield _needs_engine(recipe, (*ACCELERATE, "sp_size"), problem, engine="zero3")
    if sequence > 1 and (train.get("loss_type") == "dft" or (train.get("label_smoothing_factor") or 0) > 0):
        name = "loss_type" if train.get("loss_type") == "dft" else "label_smoothing_factor"
        problem = f"sequence parallelism takes the model's own loss, which `{name}` replaces"
        yield _refuse_pair(recipe, ("train", name), problem)
    if max(tensor, context) > 1 and replicas > 1 and _size(mapping, "dp_shard_size") == 1:
        problem = "tensor and context parallelism do not go with replicas that are not sharded (`dp_replicate_size`)"
        fix = "Set `dp_shard_size` above 1, or `dp_replicate_size: 1`."
        yield recipe.fault((*ACCELERATE, "dp_replicate_size"), problem, fix, code="recipe.contradiction")
    for name in ("tp", "cp", "sp"):
        handler = f"{name}_handler"
        key = (*ACCELERATE, handler)
        if mapping.get(handler) is not None and _size(mapping, f"{name}_size") == 1:
            problem = f"`{handler}` has no effect, since `{name}_size` is 1"
            yield recipe.fault(key, problem, "Remove it.", code="recipe.no_effect", edits=(Edit("remove", key),))


def _check_transformers(
    recipe: Recipe, mapping: Mapping[str, Any], train: Mapping[str, Any], *, engine: str
) -> Iterator[Fault]:
    """Yield the faults of `model.distributed_config`."""
    if count_processes(TRANSFORMERS, mapping) > 1:
        if train.get("save_strategy") != "no" and not train.get("save_only_model"):
            problem = "transformers cannot save the optimizer of a model that `distributed_config` divides"
            fix = "Set `train.save_only_model: true`, or `train.save_strategy: 'no'`. Such a run cannot be resumed."
            yield recipe.fault(TRANSFORMERS, problem, fix, code="recipe.needs_key")
        if engine not in ("auto", "ddp"):
            problem = f"`distributed_config` divides the weights at load time, and so would `launch.engine: {engine}`"
            yield _refuse_pair(recipe, ("launch", "engine"), problem)
    if mapping.get("enable_sequence_parallel"):
        key = (*TRANSFORMERS, "enable_sequence_parallel")
        problem = "`enable_sequence_parallel` has no effect: transformers only reserves the name"
        yield recipe.fault(key, problem, "Remove it.", code="recipe.no_effect", edits=(Edit("remove", key),))
    if max(_size(mapping, "fsdp_size"), _size(mapping, "dp_replicate_size")) > 1 and _size(mapping, "pp_size") > 1:
        problem = "FSDP (`fsdp_size`, `dp_replicate_size`) and pipeline parallelism (`pp_size`) exclude each other"
        yield _refuse_pair(recipe, (*TRANSFORMERS, "pp_size"), problem)
    experts, tensors = _size(mapping, "ep_size"), _size(mapping, "tp_size")
    if experts > 1 and (experts % tensors or (_size(mapping, "fsdp_size") * tensors) % experts):
        problem = f"`ep_size: {experts}` is no multiple of `tp_size`, or does not divide `fsdp_size` x `tp_size`"
        fix = "Write a multiple of `tp_size` that divides `fsdp_size` x `tp_size`."
        yield recipe.fault((*TRANSFORMERS, "ep_size"), problem, fix, code="recipe.out_of_range")


def _size(mapping: Mapping[str, Any], name: str) -> int:
    """Return a size; 1 where it is not set, or is no number."""
    value = mapping.get(name)
    return value if isinstance(value, int) and value > 0 else 1


def _refuse_pair(recipe: Recipe, key: Key, problem: str) -> Fault:
    return recipe.fault(key, problem, "Remove one of the two.", code="recipe.contradiction")


def _needs_engine(recipe: Recipe, key: Key, problem: str, *, engine: str) -> Fault:
    edits = (Edit("set", ("launch", "engine"), engine),)
    return recipe.fault(key, problem, f"Set `launch.engine: {engine}`.", code="recipe.needs_key", edits=edits)
