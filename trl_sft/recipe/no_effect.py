"""Finds keys that have no effect because of another key: upstream takes them and does nothing with them.

Inputs: the checked sections of a recipe.
Outputs: a fault where the file sets both keys; a note if only the other key came from the command line, because
an experiment with `train.max_steps=10` is not a mistake.
Not here: keys that upstream refuses. Each rule was read in the source of transformers 5.23 and TRL 1.16; the defaults
are upstream's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from trl_sft.errors import Edit, Fault
from trl_sft.recipe.yaml_reader import Key, Recipe, format_value

Condition = Callable[[Mapping[str, Any]], bool]  # of the values of a section


class NoEffectRule(NamedTuple):
    """Keys that have no effect, because of one other key of the same section."""

    keys: tuple[str, ...]
    cause: str
    when: Condition
    fix: str


class NoEffect(NamedTuple):
    """A key of a recipe that has no effect."""

    key: Key
    causes: tuple[Key, ...]
    problem: str
    fix: str


def _has_value(name: str, *values: Any, default: Any = None) -> Condition:
    """Return the condition that a key has one of these values; `default` is upstream's."""

    def condition(section: Mapping[str, Any]) -> bool:
        return section.get(name, default) in values

    return condition


def _no_packing(train: Mapping[str, Any]) -> bool:
    return not train.get("packing") and not train.get("eval_packing")


def _packing_without_padding(train: Mapping[str, Any]) -> bool:
    """TRL ignores `padding_free: false` with every packing strategy but wrapped, and does not say so."""
    is_packed = bool(train.get("packing")) and train.get("packing_strategy") != "wrapped"
    return is_packed and train.get("padding_free") is False


_REMOVE, _REMOVE_ONE = "Remove it.", "Remove one of the two."
_SET_EVALUATION = "Set `data.eval`, or `data.eval_fraction: 0.05`."
_HUB = ("hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision")
_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
_WITHOUT_ADAM = ("adafactor", "sgd", "adagrad", "rmsprop")  # transformers.trainer_optimizer passes these no betas
_NO_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")  # transformers.optimization.get_scheduler
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
TRAIN = (
    NoEffectRule(("num_train_epochs",), "max_steps", lambda train: (train.get("max_steps") or -1) > 0, _REMOVE_ONE),
    NoEffectRule(
        ("eval_steps",),
        "eval_strategy",
        _has_value("eval_strategy", "no", "epoch", default="no"),
        "Set `eval_strategy: steps`, or remove `eval_steps`.",
    ),
    NoEffectRule(
        ("save_steps",),
        "save_strategy",
        _has_value("save_strategy", "no", "epoch", "best"),
        "Set `save_strategy: steps`, or remove `save_steps`.",
    ),
    NoEffectRule(("save_total_limit",), "save_strategy", _has_value("save_strategy", "no"), _REMOVE),
    NoEffectRule(
        ("logging_steps",),
        "logging_strategy",
        _has_value("logging_strategy", "no", "epoch"),
        "Set `logging_strategy: steps`, or remove `logging_steps`.",
    ),
    NoEffectRule(
        ("warmup_steps",),
        "lr_scheduler_type",
        _has_value("lr_scheduler_type", *_NO_WARMUP),
        "Set a scheduler with warmup, for example `constant_with_warmup`, or remove `warmup_steps`.",
    ),
    NoEffectRule(
        _ADAM,
        "optim",
        _has_value("optim", *_WITHOUT_ADAM),
        "Set an Adam optimizer, or use the optimizer's own `optim_args`.",
    ),
    NoEffectRule(
        _HUB,
        "push_to_hub",
        _has_value("push_to_hub", False, default=False),
        "Set `push_to_hub: true`, or remove the key.",
    ),
    NoEffectRule(("packing_strategy",), "packing", _no_packing, "Set `packing: true`, or remove `packing_strategy`."),
    NoEffectRule(
        ("padding_free",), "packing", _packing_without_padding, "Set `packing: false`, or remove `padding_free`."
    ),
    NoEffectRule(
        ("gradient_checkpointing_kwargs",),
        "gradient_checkpointing",
        _has_value("gradient_checkpointing", False),
        _REMOVE,
    ),
    NoEffectRule(
        ("activation_checkpointing_kwargs",),
        "activation_checkpointing",
        _has_value("activation_checkpointing", False),
        _REMOVE,
    ),
)
_4BIT = ("bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage")
QUANTIZATION = (
    NoEffectRule(_4BIT, "load_in_8bit", _has_value("load_in_8bit", True), _REMOVE),
    NoEffectRule(
        ("llm_int8_threshold", "llm_int8_has_fp16_weight"), "load_in_4bit", _has_value("load_in_4bit", True), _REMOVE
    ),
)
GENERATION = (
    NoEffectRule(
        _SAMPLING, "do_sample", _has_value("do_sample", False, None), "Set `do_sample: true`, or remove the key."
    ),
    NoEffectRule(
        ("length_penalty", "early_stopping"),
        "num_beams",
        _has_value("num_beams", 1, None),
        "Set `num_beams` above 1, or remove the key.",
    ),
)
EVALUATION_KEYS = ("per_device_eval_batch_size", "eval_accumulation_steps", "eval_delay", "eval_packing")


def check(
    recipe: Recipe, values: Mapping[str, dict[str, Any]], *, has_evaluation_set: bool, notes: list[str]
) -> Iterator[Fault]:
    """Yield a fault for each key without effect; where an override is the cause, add a line to `notes` instead."""
    for key, causes, problem, fix in find(values, has_evaluation_set=has_evaluation_set):
        if key not in recipe.overridden and recipe.overridden.intersection(causes):
            notes.append(f"{recipe.where(key)}: {problem}.")
        else:
            edits = _remove(recipe, key, causes=causes, fix=fix)
            yield recipe.fault(key, problem, fix, code="recipe.no_effect", edits=edits)


def _remove(recipe: Recipe, key: Key, *, causes: tuple[Key, ...], fix: str) -> tuple[Edit, ...]:
    """Return the edit that removes a key, where the recipe itself sets the key that makes it useless.

    Where that key is left out, or where both may be meant, a person has to decide.
    """
    is_written = any(cause in recipe.places and recipe.places[cause] != recipe.places.get(()) for cause in causes)
    return (Edit("remove", key),) if fix == _REMOVE or (is_written and fix != _REMOVE_ONE) else ()


def find(values: Mapping[str, dict[str, Any]], *, has_evaluation_set: bool) -> Iterator[NoEffect]:
    """Yield every key without effect."""
    generation = values["evaluate"].get("generation")
    tables: tuple[tuple[Key, dict[str, Any], tuple[NoEffectRule, ...]], ...] = (
        (("train",), values["train"], TRAIN),
        (("quantization",), values["quantization"], QUANTIZATION),
        (("evaluate", "generation"), generation if isinstance(generation, dict) else {}, GENERATION),
    )
    for section, section_values, rules in tables:
        for rule in rules:
            for name in rule.keys:
                if section_values.get(name) is not None and rule.when(section_values):
                    problem = f"`{name}` has no effect {describe_cause(rule.cause, section_values)}"
                    yield NoEffect((*section, name), ((*section, rule.cause),), problem, rule.fix)
    if not has_evaluation_set:
        yield from _find_evaluation_keys(values["train"])


def describe_cause(cause: str, values: Mapping[str, Any]) -> str:
    """Return the end of a sentence on a key without effect: "with `packing: true`", or "without `packing`"."""
    return f"with `{cause}: {format_value(values[cause])}`" if cause in values else f"without `{cause}`"


def _find_evaluation_keys(train: Mapping[str, Any]) -> Iterator[NoEffect]:
    """Yield the keys of the evaluation loop, for a recipe without an evaluation set."""
    causes: tuple[Key, ...] = (("data", "eval"), ("data", "eval_fraction"))
    for name in EVALUATION_KEYS:
        if train.get(name) is not None:
            problem = f"`{name}` has no effect without an evaluation set"
            yield NoEffect(("train", name), causes, problem, _SET_EVALUATION)
