"""Checks a recipe as a whole: missing parts, values out of range, keys that need or exclude each other.

Inputs: a recipe whose keys are known and well typed.
Outputs: faults. They are only for what upstream refuses late (after the weights are loaded) or not at all.
Not here: keys without effect (`no_effect`), and everything that upstream's own checks refuse early.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trl_sft import user_paths
from trl_sft.errors import Edit, Fault
from trl_sft.recipe import checkpoint_rules, hub_names, no_effect, parallelism, paths
from trl_sft.recipe.checked import Source
from trl_sft.recipe.yaml_reader import Key, Recipe, describe_value

Sections = Mapping[str, dict[str, Any]]  # section -> its checked keys
Sources = Mapping[str, tuple[Source, ...]]  # "train", "eval"

# Keys of SFTConfig: upstream takes smaller values and fails during training, or trains nothing without an error.
MINIMUMS = {
    **dict.fromkeys(["per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"], 1),
    **dict.fromkeys(["max_length", "save_total_limit", "pad_to_multiple_of", "eval_accumulation_steps"], 1),
    **dict.fromkeys(["seed", "data_seed", "warmup_steps", "weight_decay", "neftune_noise_alpha"], 0),
}
# Keys of SFTConfig: with larger values upstream allocates memory, or starts processes, for as many as there may be.
_MAXIMUMS = {
    **dict.fromkeys(["seed", "data_seed"], 2**32 - 1),  # numpy.random.seed
    **dict.fromkeys(["max_length", "pad_to_multiple_of"], 2**24),  # the search tree of `packing` has 2 entries a token
    **dict.fromkeys(["per_device_train_batch_size", "per_device_eval_batch_size"], 2**20),
    **dict.fromkeys(["dataloader_num_workers", "dataset_num_proc"], 2**10),
}
_MAX_COUNT = 2**31 - 1  # of rows, tokens, steps and processes: torch, numpy and Arrow count some of them in 32 bits
_COUNTING_SECTIONS = ("train", "lora", "run", "evaluate")  # their whole numbers are such counts
POSITIVE = ("num_train_epochs", "save_steps", "eval_steps", "logging_steps")
# torch.distributed.run, determine_local_world_size and parse_min_max_nnodes: what they take besides a number
_PROCESS_PATTERNS = {
    "nproc_per_node": (r"[1-9][0-9]*|auto|cpu|gpu|xpu", "Write a whole number above 0, auto, cpu, gpu or xpu."),
    "nnodes": (r"[1-9][0-9]*(:[1-9][0-9]*)?", "Write a whole number, or a minimum and a maximum: 1:4."),
}
# keys of GenerationConfig: upstream refuses smaller values while it generates, after the weights are loaded
_GENERATION_MINIMUMS = {
    "max_new_tokens": 1,
    "min_new_tokens": 0,
    "num_beams": 1,
    "top_k": 0,
    "top_p": 0,
    "temperature": 1e-9,
}
_NEEDS_EVALUATION = ("eval_on_start", "load_best_model_at_end")
_SET_EVALUATION = "Set `data.eval`, or `data.eval_fraction: 0.05`."
WITHOUT_EMPTY_THOUGHTS = "without_empty_thoughts"  # word of `data.loss_on`
_REMOVE_ONE = "Remove one of the two."


def check(recipe: Recipe, values: Sections, sources: Sources, *, is_adapter: bool, notes: list[str]) -> Iterator[Fault]:
    """Yield the faults of a recipe as a whole.

    Args:
        recipe: The recipe, for the places of the faults.
        values: The checked keys of each section. The path in `launch.config` is made absolute.
        sources: The sources of `data:`.
        is_adapter: Whether `model.name_or_path` is an adapter, whose training continues.
        notes: Collects lines on keys that an override leaves without effect.

    Yields:
        Faults in no particular order.

    """
    train = values["train"]
    is_evaluated = has_evaluation_set(values["data"])
    yield from _check_data(recipe, values["data"], sources)
    if recipe.values.get("quantization") is not None:
        yield from _check_quantization(recipe, values["quantization"], is_adapter)
    yield from _check_ranges(recipe, values)
    for section in _COUNTING_SECTIONS:
        yield from _check_maximums(recipe, (section,), values[section])
    yield from _find_infinite(recipe, (), recipe.values)
    yield from _check_launch(recipe, values["launch"])
    if train.get("auto_find_batch_size") or train.get("packing"):
        yield from _check_batches(recipe, values)
    if train.get("parallelism_config") or values["model"].get("distributed_config"):
        yield from parallelism.check(recipe, values)
    yield from no_effect.check(recipe, values, has_evaluation_set=is_evaluated, notes=notes)
    if not is_evaluated:
        yield from _check_needs_evaluation(recipe, train)
    if train.get("load_best_model_at_end") or values["run"].get("mirror") is not None:
        yield from checkpoint_rules.check(recipe, values)
    if train.get("push_to_hub"):
        yield from _check_repository_name(recipe, train)


def _check_batches(recipe: Recipe, values: Sections) -> Iterator[Fault]:
    """Yield faults of the size of batches and of the length of packs."""
    train = values["train"]
    if values["run"].get("global_batch_size") is not None and train.get("auto_find_batch_size"):
        problem = "`auto_find_batch_size` would change the batch size that `run.global_batch_size` fixes"
        yield recipe.fault(("train", "auto_find_batch_size"), problem, _REMOVE_ONE, code="recipe.contradiction")
    if train.get("packing") and train.get("max_length", 0) is None:
        problem = "packing needs a length to fill, but `max_length` is null"
        yield recipe.fault(("train", "max_length"), problem, "Write a whole number of tokens.", code="recipe.needs_key")


def has_evaluation_set(data: Mapping[str, Any]) -> bool:
    """Tell whether the section `data:` names an evaluation set."""
    return data.get("eval_fraction") is not None or data.get("eval") is not None


def _check_repository_name(recipe: Recipe, train: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield the fault of a name that the hub would refuse after the weights are loaded."""
    key: Key = ("train", "hub_model_id")
    folder_key: Key = ("train", "output_dir") if train.get("output_dir") else ("train", "push_to_hub")
    name = train.get("hub_model_id")
    if name is None:
        folder = str(train.get("output_dir") or recipe.path.stem)
        fault = hub_names.check_folder(recipe.where(folder_key), folder, key=key)
    else:
        fault = hub_names.check(recipe.where(key), str(name), key=key)
    if fault is not None:
        yield fault


def _check_needs_evaluation(recipe: Recipe, train: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield faults of keys that need an evaluation set, where there is none."""
    names = [name for name in _NEEDS_EVALUATION if train.get(name)]
    if train.get("eval_strategy", "no") != "no":
        names.append("eval_strategy")
    for name in names:
        problem = f"`{name}` needs an evaluation set, but the recipe has none"
        yield recipe.fault(("train", name), problem, _SET_EVALUATION, code="recipe.needs_evaluation_set")


def _check_data(recipe: Recipe, data: Mapping[str, Any], sources: Sources) -> Iterator[Fault]:
    """Yield faults of the keys of `data:` and of the sources."""
    if not sources["train"] and not data.get("train"):
        fix = "Set `data.train` to a file, a folder or a hub id."
        yield recipe.fault(("data", "train"), "the recipe names no training data", fix, code="recipe.no_training_data")
    fraction = data.get("eval_fraction")
    if fraction is not None and not 0 < fraction < 1:
        fault = _out_of_range(recipe, ("data", "eval_fraction"), fraction, expected="a number between 0 and 1")
        # a share of 0 says that there is no evaluation set
        yield (
            fault
            if fraction
            else fault._replace(
                fix=f"{fault.fix} Or remove the key: without it there is no evaluation set.",
                edits=(Edit("remove", ("data", "eval_fraction")),),
            )
        )
    yield from _check_sources(recipe, sources)
    if any(_is_streamed(source) for source in sources["train"]):
        yield from _check_streaming(recipe, sources)
    share = data.get("max_untrained")
    if share is not None and not 0 <= share <= 1:
        yield _out_of_range(recipe, ("data", "max_untrained"), share, expected="a share of the rows, from 0 to 1")
    if fraction is not None and data.get("eval") is not None:
        problem = "both `data.eval_fraction` and `data.eval` define the evaluation set"
        yield recipe.fault(("data", "eval_fraction"), problem, _REMOVE_ONE, code="recipe.contradiction")


def _out_of_range(recipe: Recipe, key: Key, value: object, *, expected: str) -> Fault:
    return recipe.fault(key, f"the value is {describe_value(value)}", f"Write {expected}.", code="recipe.out_of_range")


def _is_streamed(source: Source) -> bool:
    return bool(source.load_kwargs.get("streaming"))


def _check_sources(recipe: Recipe, sources: Sources) -> Iterator[Fault]:
    """Yield faults of weights, numbers of rows, and streamed evaluation sets."""
    for source in sources["eval"]:
        if _is_streamed(source):
            problem = "an evaluation set cannot be streamed, because it is read as a whole"
            fix = "Remove `streaming`. `max_rows` reads fewer rows."
            yield recipe.fault((*source.key, "streaming"), problem, fix, code="recipe.streaming")
    for source in (*sources["train"], *sources["eval"]):
        if source.max_rows is not None and source.max_rows < 1:
            yield _out_of_range(
                recipe, (*source.key, "max_rows"), source.max_rows, expected="a whole number of at least 1"
            )
        if source.weight is not None and not 0 < source.weight < math.inf:
            yield _out_of_range(recipe, (*source.key, "weight"), source.weight, expected="a number above 0")
    for source in sources["eval"]:
        if source.weight is not None:
            problem = "`weight` has no meaning in an evaluation set"
            key, fix = (*source.key, "weight"), "Remove it. `max_rows` reads fewer rows."
            yield recipe.fault(key, problem, fix, code="recipe.no_effect", edits=(Edit("remove", key),))
    without_weight = [source for source in sources["train"] if source.weight is None]
    if without_weight and len(without_weight) < len(sources["train"]):
        problem = f"{without_weight[0].name} has no `weight`, but another source has one"
        yield recipe.fault(
            without_weight[0].key, problem, "Set `weight` for every source, or for none.", code="recipe.missing_weight"
        )


def _check_streaming(recipe: Recipe, sources: Sources) -> Iterator[Fault]:
    """Yield what a stream cannot do: its length and its rows are unknown before it is read."""
    streamed = [source for source in sources["train"] if _is_streamed(source)]
    key: Key = (*streamed[0].key, "streaming")
    train, data = recipe.values.get("train") or {}, recipe.values["data"]
    if len(streamed) < len(sources["train"]):
        problem = "some sources are streamed, others are not"
        yield recipe.fault(key, problem, "Set `streaming: true` for all sources, or for none.", code="recipe.streaming")
    steps = train.get("max_steps", -1)
    if isinstance(steps, int) and steps < 1:
        problem = "streaming needs a number of steps, because a stream has no known length"
        yield recipe.fault(key, problem, "Set `train.max_steps`.", code="recipe.streaming")
    if data.get("eval_fraction") is not None:
        problem = "a stream has no known length, so no share of it can be the evaluation set"
        fix = "Set `data.eval` to a file or another split instead."
        yield recipe.fault(("data", "eval_fraction"), problem, fix, code="recipe.streaming")
    if train.get("shuffle_dataset"):
        problem = "a stream is read in its own order, so `shuffle_dataset` has no effect"
        key = ("train", "shuffle_dataset")
        yield recipe.fault(key, problem, "Remove it.", code="recipe.no_effect", edits=(Edit("remove", key),))


def _check_quantization(recipe: Recipe, section: Mapping[str, Any], is_adapter: bool) -> Iterator[Fault]:
    """Yield what upstream refuses after the weights are loaded, or not at all."""
    methods = [name for name in ("load_in_8bit", "load_in_4bit") if section.get(name)]
    if len(methods) != 1:
        problem = "`load_in_8bit` and `load_in_4bit` are both true" if methods else "the section quantizes nothing"
        fix = "Set exactly one of `load_in_8bit` and `load_in_4bit` to true."
        yield recipe.fault(("quantization",), problem, fix, code="recipe.quantization_bits")
    elif recipe.values.get("lora") is None and not is_adapter:
        problem = "quantized weights cannot be trained without LoRA"
        yield recipe.fault(
            ("quantization", methods[0]),
            problem,
            "Add `lora: {r: 16, target_modules: all-linear}`.",
            code="recipe.needs_key",
        )
    quant_type = section.get("bnb_4bit_quant_type")
    if quant_type is not None and quant_type not in ("fp4", "nf4"):
        yield _out_of_range(recipe, ("quantization", "bnb_4bit_quant_type"), quant_type, expected="nf4 or fp4")


def _find_infinite(recipe: Recipe, key: Key, value: Any) -> Iterator[Fault]:
    """Yield a fault for each infinite number and NaN, at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        yield _out_of_range(recipe, key, value, expected="a finite number")
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _find_infinite(recipe, (*key, name), inner)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _find_infinite(recipe, (*key, number), inner)


def _check_launch(recipe: Recipe, launch: dict[str, Any]) -> Iterator[Fault]:
    """Yield what no machine can launch; make the path in `launch.config` absolute."""
    for name, (pattern, fix) in _PROCESS_PATTERNS.items():
        if name in launch and not re.fullmatch(pattern, str(launch[name])):
            yield recipe.fault(
                ("launch", name), f"the value is {describe_value(launch[name])}", fix, code="recipe.out_of_range"
            )
    key: Key = ("launch", "config")
    config = launch.get("config")
    engine = launch.get("engine", "auto")
    if config is not None and engine in ("auto", "ddp"):
        problem = f"`config` has no effect with `engine: {engine}`"
        fix = "Set `engine` to the one that the file is for: fsdp, zero1, zero2, zero3 or ray."
        yield recipe.fault(key, problem, fix, code="recipe.no_effect")
    if isinstance(config, str):
        location = paths.resolve_location(config, recipe.folder(key), (".json", ".yaml", ".yml"))
        if isinstance(location, paths.LocationProblem):
            problem = location.problem if location.code.startswith("path.") else "there is no such file"
            yield recipe.fault(key, f"{user_paths.shorten(config)}: {problem}", location.fix, code=location.code)
        elif not location.files or not location.files[0].is_file():
            fix = "Name a file, or write its keys here as a mapping."
            yield recipe.fault(key, f"{config}: there is no such file", fix, code="recipe.missing_file")
        else:
            launch["config"] = str(location.files[0])


def _check_maximums(recipe: Recipe, key: Key, values: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield counts that are beyond what upstream can count, also those of mappings under a key."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _check_maximums(recipe, (*key, name), value)
            continue
        maximum = _MAXIMUMS.get(name, _MAX_COUNT)
        is_count = isinstance(value, int) or (name in POSITIVE and isinstance(value, float) and math.isfinite(value))
        if is_count and abs(value) > maximum:
            instead = ", or null to truncate no row" if name == "max_length" else ""
            yield _out_of_range(recipe, (*key, name), value, expected=f"at most {maximum:,}{instead}")


def _check_ranges(recipe: Recipe, values: Sections) -> Iterator[Fault]:
    """Yield numbers that are out of range."""
    for name, value in values["train"].items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            continue
        key: Key = ("train", name)
        if name in MINIMUMS and value < MINIMUMS[name]:
            yield _out_of_range(recipe, key, value, expected=f"at least {MINIMUMS[name]}")
        if name in POSITIVE and value <= 0:
            yield _out_of_range(recipe, key, value, expected="a number above 0")
        if name == "max_steps" and value < 1 and value != -1:
            yield _out_of_range(recipe, key, value, expected="at least 1, or -1 to train for `num_train_epochs`")
    for name in ("max_hours", "logits_gib", "price_per_hour"):
        number = values["run"].get(name)
        if number is not None and not 0 < number < math.inf:
            yield _out_of_range(recipe, ("run", name), number, expected="a number above 0")
    batch_size = values["run"].get("global_batch_size")
    if batch_size is not None and batch_size < 1:
        yield _out_of_range(recipe, ("run", "global_batch_size"), batch_size, expected="at least 1")
    max_rows = values["evaluate"].get("max_rows")
    if max_rows is not None and max_rows < 1:
        yield _out_of_range(recipe, ("evaluate", "max_rows"), max_rows, expected="at least 1, or `evaluate: false`")
    generation = values["evaluate"].get("generation")
    for name, minimum in _GENERATION_MINIMUMS.items():
        value = generation.get(name) if isinstance(generation, dict) else None
        if isinstance(value, int | float) and not value >= minimum:
            yield _out_of_range(recipe, ("evaluate", "generation", name), value, expected=f"at least {minimum}")
    rank = values["lora"].get("r")
    if rank is not None and rank < 1:
        yield _out_of_range(recipe, ("lora", "r"), rank, expected="at least 1")


def split_loss_on(value: str | Sequence[str] | None) -> tuple[str, bool]:
    """Return the word of `data.loss_on` that names the tokens, and whether it leaves out empty thoughts.

    "" = it has no such word; several words are joined by a space.
    """
    words = [value] if isinstance(value, str) else list(value or [])
    named = [word for word in dict.fromkeys(words) if word != WITHOUT_EMPTY_THOUGHTS]
    return " ".join(named), WITHOUT_EMPTY_THOUGHTS in words


def move_loss_keys(recipe: Recipe, data: dict[str, Any], train: dict[str, Any]) -> Iterator[Fault]:
    """Move SFTConfig's two keys for the loss mask from `train` into `data["loss_on"]`; yield contradictions."""
    meanings: dict[Key, str] = {}
    skips = False
    if "loss_on" in data:
        word, skips = split_loss_on(data["loss_on"])
        if " " in word:
            problem = f"`loss_on` names {word.replace(' ', ' and ')}"
            yield recipe.fault(("data", "loss_on"), problem, "Keep one of them.", code="recipe.contradiction")
        elif word:
            meanings["data", "loss_on"] = word
    for name, words in (
        ("completion_only_loss", {True: "completion", False: "all"}),
        ("assistant_only_loss", {True: "assistant"}),
    ):
        value = train.pop(name, None)
        if value in words and isinstance(value, bool):
            meanings["train", name] = words[value]
        elif value is False:
            problem = f"`{name}: false` does not say which tokens carry loss"
            yield recipe.fault(
                ("train", name),
                problem,
                "Set `data.loss_on` to completion, last_turn or all.",
                code="recipe.unclear_loss",
            )
    if len(set(meanings.values())) > 1:
        problem = ", but ".join(f"`{'.'.join(map(str, key))}` means `{word}`" for key, word in meanings.items())
        yield recipe.fault(list(meanings)[-1], problem, "Keep only `data.loss_on`.", code="recipe.contradiction")
    for word in meanings.values():
        data["loss_on"] = [word, WITHOUT_EMPTY_THOUGHTS] if skips else word
