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
from typing import Any, NamedTuple

from trl_sft.errors import Edit, Fault
from trl_sft.recipe.checked import Setting
from trl_sft.recipe.yaml_reader import Key, Recipe

_MULTIPLE = "pad_to_multiple_of"
ACCELERATE_NAME, TRANSFORMERS_NAME = "parallelism_config", "distributed_config"
ACCELERATE: Key = ("train", ACCELERATE_NAME)
TRANSFORMERS: Key = ("model", TRANSFORMERS_NAME)
_SIZES = {
    ACCELERATE: ("dp_replicate_size", "dp_shard_size", "tp_size", "cp_size", "sp_size"),
    TRANSFORMERS: ("dp_replicate_size", "fsdp_size", "tp_size", "pp_size"),
}
_FSDP, _ZERO = ("fsdp",), ("zero1", "zero2", "zero3")
NAMES = {"fsdp": "fsdp", "tensor": "tensor parallelism"}  # what `find_engine_at_load` returns -> the words for it


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
        yield from _check_rows(recipe, accelerate, values)
        if _size(accelerate, "tp_size") > 1 and not transformers and values["model"].get("tp_plan") is None:
            tensor = _size(accelerate, "tp_size")
            problem = f"`tp_size: {tensor}` alone divides no weight: transformers divides them as it loads the model"
            fix = f"Set `model.distributed_config: {{tp_size: {tensor}}}`."
            edits = (Edit("set", (*TRANSFORMERS, "tp_size"), tensor),)
            yield recipe.fault((*ACCELERATE, "tp_size"), problem, fix, code="recipe.needs_key", edits=edits)
    if isinstance(transformers, dict):
        yield from _check_transformers(recipe, transformers, train, engine=engine)
        if values["model"].get("device_map") is not None:
            problem = "`distributed_config` places the weights on the processes' devices, and so does `device_map`"
            yield _refuse_pair(recipe, ("model", "device_map"), problem)
    if isinstance(accelerate, dict) and isinstance(transformers, dict) and not _takes_rest(transformers):
        tensor, loaded = _size(accelerate, "tp_size"), _size(transformers, "tp_size")
        if tensor > 1 and tensor != loaded:
            problem = (
                f"`train.parallelism_config.tp_size` is {tensor}, and that of `model.distributed_config` is {loaded}"
            )
            yield _refuse_pair(recipe, (*ACCELERATE, "tp_size"), problem)


class Division(NamedTuple):
    """Among how many processes a run divides what is no row; 1 = it does not."""

    sequence: int = 1  # the tokens of a row (`cp_size`, `sp_size`)
    tensor: int = 1  # each layer (`tp_size`)
    pipeline: int = 1  # the layers (`pp_size`)
    replicas: int = 1  # copies of the divided weights (`dp_replicate_size`)

    def count_row_groups(self, processes: int) -> int:
        """Return how many groups of processes train rows of their own: those of one group share each row."""
        return max(1, processes // (self.sequence * self.tensor * self.pipeline))


def read_division(train: Mapping[str, Any], model: Mapping[str, Any], processes: int) -> Division:
    """Return how the keys of a recipe divide the training.

    Args:
        train: The keys of `train:`.
        model: The keys of `model:`.
        processes: How many train together: a `tp_plan` without `tp_size` takes all that no other size takes.

    """
    accelerate = train.get(ACCELERATE_NAME)
    transformers = model.get(TRANSFORMERS_NAME)
    own = accelerate if isinstance(accelerate, dict) else {}
    loaded = transformers if isinstance(transformers, dict) else {}
    return Division(
        sequence=_size(own, "cp_size") * _size(own, "sp_size"),
        tensor=max(_size(own, "tp_size"), _count_tensor(loaded, processes)),
        pipeline=_size(loaded, "pp_size"),
        replicas=max(_size(own, "dp_replicate_size"), _size(loaded, "dp_replicate_size")),
    )


def choose_settings(train: Mapping[str, Any]) -> dict[Key, Setting]:
    """Return the multiple that the length of rows needs where processes share them; empty where the recipe has one.

    Args:
        train: The keys of `train:`.

    """
    mapping = train.get(ACCELERATE_NAME)
    if not isinstance(mapping, dict) or train.get(_MULTIPLE) is not None:
        return {}
    name, size, parts = _count_parts(mapping)
    if size == 1:
        return {}
    reason = f"parallelism_config.{name} {size} divides each row into {parts}"
    return {("train", "pad_to_multiple_of"): Setting(parts, reason)}


def find_engine(train: Mapping[str, Any]) -> str | None:
    """Return the engine that `train.parallelism_config` runs under; None = it divides no row."""
    mapping = train.get(ACCELERATE_NAME)
    if not isinstance(mapping, dict):
        return None
    if _size(mapping, "cp_size") > 1:
        return "fsdp"
    return "zero3" if _size(mapping, "sp_size") > 1 else None


def find_engine_at_load(model: Mapping[str, Any]) -> str | None:
    """Return what `model.distributed_config` divides the weights with: `fsdp`, `tensor`; None = it divides nothing."""
    mapping = model.get(TRANSFORMERS_NAME)
    if not isinstance(mapping, dict) or (count_processes(TRANSFORMERS, mapping) == 1 and not _takes_rest(mapping)):
        return None
    return "fsdp" if max(_size(mapping, "fsdp_size"), _size(mapping, "dp_replicate_size")) > 1 else "tensor"


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
    for name in ("packing", "eval_packing", "padding_free"):
        if context > 1 and train.get(name):
            problem = f"`{name}` needs a mask that keeps the rows of a batch apart, and context parallelism drops it"
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


def _check_rows(recipe: Recipe, mapping: Mapping[str, Any], values: Mapping[str, Mapping[str, Any]]) -> Iterator[Fault]:
    """Yield the faults of rows and attention that a division of rows cannot take."""
    context, sequence = _size(mapping, "cp_size"), _size(mapping, "sp_size")
    if max(context, sequence) == 1 or min(context, sequence) > 1:
        return
    name, size, parts = _count_parts(mapping)
    multiple = values["train"].get(_MULTIPLE)
    if isinstance(multiple, int) and multiple % parts:
        problem = f"the value is {multiple}, and `{name}: {size}` needs rows whose length is a multiple of {parts}"
        key: Key = ("train", _MULTIPLE)
        fix = f"Write a multiple of {parts}, or remove the key, which then is {parts}."
        yield recipe.fault(key, problem, fix, code="recipe.contradiction", edits=(Edit("set", key, parts),))
    attention = values["model"].get("attn_implementation")
    handler = mapping.get("sp_handler")
    expected = "sdpa" if context > 1 else (handler if isinstance(handler, dict) else {}).get("sp_attn_implementation")
    if expected is not None and (attention or "sdpa") != expected:
        key = ("model", "attn_implementation")
        needs = "context parallelism" if context > 1 else "`sp_handler`"
        problem = f"{needs} needs the attention {expected}, and the model has {attention or 'sdpa, the default'}"
        place = key if attention is not None else (*ACCELERATE, "sp_handler")
        edits = (Edit("set", key, expected),)
        yield recipe.fault(
            place, problem, f"Set `model.attn_implementation: {expected}`.", code="recipe.needs_key", edits=edits
        )


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
    if recipe.values.get("lora") is not None and (_size(mapping, "tp_size") > 1 or _takes_rest(mapping)):
        problem = "`lora` adds whole layers to divided ones, which transformers 5.23 and peft 0.21 cannot compute"
        yield _refuse_pair(recipe, TRANSFORMERS, problem)
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


def _count_parts(mapping: Mapping[str, Any]) -> tuple[str, int, int]:
    """Return the key that divides each row, its value, and into how many equal parts.

    torch gives each process of context parallelism a part of the beginning of a row and one of its end (2.8 to 2.13,
    `_HeadTailLoadBalancer`); DeepSpeed gives each one part (0.18 to 0.19, `UlyssesSPDataLoaderAdapter`).
    """
    context, sequence = _size(mapping, "cp_size"), _size(mapping, "sp_size")
    return ("cp_size", context, 2 * context) if context > 1 else ("sp_size", sequence, sequence)


def _count_tensor(mapping: Mapping[str, Any], processes: int) -> int:
    """Return among how many processes `model.distributed_config` divides each layer."""
    if _takes_rest(mapping):
        return max(1, processes // count_processes(TRANSFORMERS, mapping))
    return _size(mapping, "tp_size")


def _takes_rest(mapping: Mapping[str, Any]) -> bool:
    """Tell whether the size of tensor parallelism is that of all processes which no other size takes."""
    return mapping.get("tp_plan") is not None and mapping.get("tp_size") is None


def _size(mapping: Mapping[str, Any], name: str) -> int:
    """Return a size; 1 where it is not set, or is no number."""
    value = mapping.get(name)
    return value if isinstance(value, int) and value > 0 else 1


def _refuse_pair(recipe: Recipe, key: Key, problem: str) -> Fault:
    return recipe.fault(key, problem, "Remove one of the two.", code="recipe.contradiction")


def _needs_engine(recipe: Recipe, key: Key, problem: str, *, engine: str) -> Fault:
    edits = (Edit("set", ("launch", "engine"), engine),)
    return recipe.fault(key, problem, f"Set `launch.engine: {engine}`.", code="recipe.needs_key", edits=edits)
