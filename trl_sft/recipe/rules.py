"""What no key shows alone: missing parts, values out of range, keys that need or exclude each other.

In: a recipe whose keys were found known and well typed. Out: faults. Only what upstream refuses late,
after the weights, or not at all; the rest is left to upstream's own checks.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from trl_sft.errors import Fault
from trl_sft.recipe import no_effect, paths
from trl_sft.recipe.yaml_reader import Key, Recipe, describe_value

# Upstream takes smaller values and fails during training, or trains nothing and says nothing.
AT_LEAST = {
    **dict.fromkeys(["per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"], 1),
    **dict.fromkeys(["max_length", "save_total_limit"], 1),
    **dict.fromkeys(["seed", "data_seed", "warmup_steps", "weight_decay", "neftune_noise_alpha"], 0),
}
ABOVE_0 = ("num_train_epochs", "save_steps", "eval_steps", "logging_steps")
# torch.distributed.run, determine_local_world_size and parse_min_max_nnodes: what else than a number it takes
_PROCESSES = {
    "nproc_per_node": (r"[1-9][0-9]*|auto|cpu|gpu|xpu", "a whole number, auto, cpu, gpu or xpu"),
    "nnodes": (r"[1-9][0-9]*(:[1-9][0-9]*)?", "a whole number, or the least and the most as in 1:4"),
}
# upstream finds these out while it generates, after the weights
_GENERATION = {"max_new_tokens": 1, "min_new_tokens": 0, "num_beams": 1, "top_k": 0, "top_p": 0, "temperature": 1e-9}
_NEEDS_EVAL = ("eval_on_start", "load_best_model_at_end")


def check(
    recipe: Recipe, sections: Mapping[str, Any], sources: Mapping[str, Any], adapter: bool, notes: list[str]
) -> Iterator[Fault]:
    """Yield every fault of the whole; `adapter`: the model is one, and training goes on with it."""
    yield from _data(recipe, sections["data"], sources)
    if recipe.values.get("quantization") is not None:
        yield from _quantization(recipe, sections["quantization"], adapter)
    yield from _ranges(recipe, sections)
    yield from _infinite(recipe, (), recipe.values)
    yield from _launch(recipe, sections["launch"])
    train = sections["train"]
    if sections["run"].get("global_batch_size") is not None and train.get("auto_find_batch_size"):
        found = "auto_find_batch_size changes the batch that run.global_batch_size fixes"
        yield Fault(recipe.where(("train", "auto_find_batch_size")), found, "one of the two")
    held_out = sections["data"].get("eval_fraction") is not None or sections["data"].get("eval") is not None
    yield from no_effect.check(recipe, sections, held_out, notes)
    if not held_out:
        asking = [name for name in _NEEDS_EVAL if train.get(name)]
        asking += ["eval_strategy"] if train.get("eval_strategy", "no") != "no" else []
        for name in asking:
            write = "data.eval, or data.eval_fraction: 0.05"
            yield Fault(recipe.where(("train", name)), f"{name} without held-out rows", write)
    if train.get("load_best_model_at_end") and train.get("save_strategy") == "no":
        found = "load_best_model_at_end without checkpoints"
        yield Fault(recipe.where(("train", "load_best_model_at_end")), found, "save_strategy: steps, or epoch")
    if train.get("packing") and train.get("max_length", 0) is None:
        found = "packing without a length to fill"
        yield Fault(recipe.where(("train", "max_length")), found, "a whole number of tokens")


def _data(recipe: Recipe, data: Mapping[str, Any], sources: Mapping[str, Any]) -> Iterator[Fault]:
    if not sources["train"] and not data.get("train"):
        yield Fault(recipe.where(("data", "train")), "no rows are named", "a file, a folder or a hub id")
    fraction, where = data.get("eval_fraction"), recipe.where(("data", "eval_fraction"))
    if fraction is not None and not 0 < fraction < 1:
        yield Fault(where, describe_value(fraction), "a number between 0 and 1")
    yield from _mixing(recipe, sources)
    share = data.get("max_untrained")
    if share is not None and not 0 <= share <= 1:
        yield Fault(recipe.where(("data", "max_untrained")), describe_value(share), "a share of the rows, from 0 to 1")
    if fraction is not None and data.get("eval") is not None:
        yield Fault(where, "held-out rows both from eval_fraction and from data.eval", "one of the two")


def _mixing(recipe: Recipe, sources: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield what is wrong with weights and numbers of rows."""
    streamed = [source for source in sources["train"] if source.load_kwargs.get("streaming")]
    if streamed:
        yield from _streaming(recipe, sources, len(streamed))
    for source in sources["eval"]:
        if source.load_kwargs.get("streaming"):
            found = "streaming of held-out rows, which are read whole"
            yield Fault(recipe.where((*source.key, "streaming")), found, "leave it out; max_rows takes fewer of them")
    weighed = [source for source in sources["train"] if source.weight is not None]
    for source in (*sources["train"], *sources["eval"]):
        if source.max_rows is not None and source.max_rows < 1:
            yield Fault(recipe.where((*source.key, "max_rows")), describe_value(source.max_rows), "at least 1")
        if source.weight is not None and not 0 < source.weight < math.inf:
            yield Fault(recipe.where((*source.key, "weight")), describe_value(source.weight), "more than 0")
    for source in sources["eval"]:
        if source.weight is not None:
            found = "weight of rows that are not trained"
            yield Fault(recipe.where((*source.key, "weight")), found, "leave it out; max_rows takes fewer of them")
    if weighed and len(weighed) < len(sources["train"]):
        bare = next(source for source in sources["train"] if source.weight is None)
        found = f"{bare.name} has no weight, other sources have one"
        yield Fault(recipe.where(bare.key), found, "weight: for every source, or for none")


def _streaming(recipe: Recipe, sources: Mapping[str, Any], number: int) -> Iterator[Fault]:
    """Yield what a stream cannot do: it has no length, and is not known before it was read."""
    first = next(source for source in sources["train"] if source.load_kwargs.get("streaming"))
    where = recipe.where((*first.key, "streaming"))
    train, data = recipe.values.get("train") or {}, recipe.values["data"]
    if number < len(sources["train"]):
        yield Fault(where, "some sources are streamed, others are not", "streaming: true for all, or for none")
    steps = train.get("max_steps", -1)
    if isinstance(steps, int) and steps < 1:
        yield Fault(where, "streaming without a number of steps: a stream has no length", "train.max_steps")
    if data.get("eval_fraction") is not None:
        found = "eval_fraction of a stream, whose length is not known"
        yield Fault(recipe.where(("data", "eval_fraction")), found, "data.eval: a file, or another split")
    if train.get("shuffle_dataset"):
        found = "shuffle_dataset: true, but a stream is read in its order"
        yield Fault(recipe.where(("train", "shuffle_dataset")), found, "leave it out")


def _quantization(recipe: Recipe, section: Mapping[str, Any], adapter: bool) -> Iterator[Fault]:
    """Yield what upstream says after the weights were loaded, or not at all."""
    bits = [name for name in ("load_in_8bit", "load_in_4bit") if section.get(name)]
    where = recipe.where(("quantization",))
    if len(bits) != 1:
        found = "both load_in_8bit and load_in_4bit" if bits else "a section that quantizes nothing"
        yield Fault(where, found, "load_in_8bit: true, or load_in_4bit: true")
    elif recipe.values.get("lora") is None and not adapter:
        found = f"{bits[0]} without LoRA: quantized weights cannot be trained"
        yield Fault(recipe.where(("quantization", bits[0])), found, "lora: {r: 16, target_modules: all-linear}")
    kind4 = section.get("bnb_4bit_quant_type")
    if kind4 is not None and kind4 not in ("fp4", "nf4"):
        yield Fault(recipe.where(("quantization", "bnb_4bit_quant_type")), describe_value(kind4), "nf4 or fp4")


def _infinite(recipe: Recipe, key: Key, value: Any) -> Iterator[Fault]:
    """Yield numbers that are none, wherever they stand."""
    if isinstance(value, float) and not math.isfinite(value):
        yield Fault(recipe.where(key), describe_value(value), "a finite number")
    for name, inside in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from _infinite(recipe, (*key, name), inside)


def _launch(recipe: Recipe, launch: dict[str, Any]) -> Iterator[Fault]:
    """Yield what no machine can launch; make the path in `config` an absolute one."""
    for name, (pattern, write) in _PROCESSES.items():
        if name in launch and not re.fullmatch(pattern, str(launch[name])):
            yield Fault(recipe.where(("launch", name)), describe_value(launch[name]), write)
    key: Key = ("launch", "config")
    config = launch.get("config")
    if config is not None and launch.get("engine", "auto") in ("auto", "ddp"):
        found = f"config beside engine: {launch.get('engine', 'auto')}, which reads none"
        yield Fault(recipe.where(key), found, "the engine that it is for: fsdp, zero1, zero2, zero3 or ray")
    if isinstance(config, str):
        place = paths.resolve_location(config, recipe.folder(key), (".json", ".yaml", ".yml"))
        if isinstance(place, paths.LocationProblem) or not place.files or not place.files[0].is_file():
            write = place.fix if isinstance(place, paths.LocationProblem) else "a file, or its keys as a mapping"
            yield Fault(recipe.where(key), f"{config}: no such file", write)
        else:
            launch["config"] = str(place.files[0])


def _ranges(recipe: Recipe, sections: Mapping[str, Any]) -> Iterator[Fault]:
    for name, value in sections["train"].items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            continue
        where = recipe.where(("train", name))
        if not value >= AT_LEAST.get(name, value):
            yield Fault(where, describe_value(value), f"at least {AT_LEAST[name]}")
        if name in ABOVE_0 and not value > 0:
            yield Fault(where, describe_value(value), "more than 0")
        if name == "max_steps" and value < 1 and value != -1:
            yield Fault(where, describe_value(value), "at least 1, or -1 to go by num_train_epochs")
    hours = sections["run"].get("max_hours")
    if hours is not None and not 0 < hours < math.inf:
        yield Fault(recipe.where(("run", "max_hours")), describe_value(hours), "more than 0")
    gib = sections["run"].get("logits_gib")
    if gib is not None and not 0 < gib < math.inf:
        yield Fault(recipe.where(("run", "logits_gib")), describe_value(gib), "more than 0")
    batch = sections["run"].get("global_batch_size")
    if batch is not None and batch < 1:
        yield Fault(recipe.where(("run", "global_batch_size")), describe_value(batch), "at least 1")
    rows = sections["evaluate"].get("max_rows")
    if rows is not None and rows < 1:
        yield Fault(recipe.where(("evaluate", "max_rows")), describe_value(rows), "at least 1; or evaluate: false")
    generation = sections["evaluate"].get("generation")
    for name, least in _GENERATION.items():
        value = generation.get(name) if isinstance(generation, dict) else None
        if isinstance(value, int | float) and not value >= least:
            yield Fault(recipe.where(("evaluate", "generation", name)), describe_value(value), f"at least {least}")
    r = sections["lora"].get("r")
    if r is not None and r < 1:
        yield Fault(recipe.where(("lora", "r")), describe_value(r), "at least 1")


def loss_on(recipe: Recipe, data: dict[str, Any], train: dict[str, Any]) -> Iterator[Fault]:
    """Bring SFTConfig's two keys for the loss into `data.loss_on`; yield what contradicts."""
    said = {("data", "loss_on"): data["loss_on"]} if "loss_on" in data else {}
    for name, meanings in (
        ("completion_only_loss", {True: "completion", False: "all"}),
        ("assistant_only_loss", {True: "assistant"}),
    ):
        value = train.pop(name, None)
        if value in meanings and isinstance(value, bool):
            said["train", name] = meanings[value]
        elif value is False:
            found = f"{name}: false does not say where the loss falls"
            yield Fault(recipe.where(("train", name)), found, "data.loss_on: completion, last_turn or all")
    if len(set(said.values())) > 1:
        found = ", but ".join(f"{'.'.join(key)} means loss_on: {value}" for key, value in said.items())
        yield Fault(recipe.where(list(said)[-1]), found, "data.loss_on alone")
    for value in said.values():
        data["loss_on"] = value
