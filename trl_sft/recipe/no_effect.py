"""Keys that another key makes idle: upstream takes them and does nothing with them.

In: the sections of a recipe whose keys were found known and well typed. Out: faults where the file says both; a
note where the other key alone came from the command line, since trying `train.max_steps=10` is no mistake. Each rule
was read in upstream's source, transformers 5.23 and TRL 1.16; defaults are upstream's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from trl_sft.errors import Fault
from trl_sft.recipe.yaml_reader import Key, Recipe, format_value


class Idle(NamedTuple):
    """When keys change nothing, because of which other, and what would make them count."""

    keys: tuple[str, ...]
    cause: str  # a key of the same section
    when: Callable[[Mapping[str, Any]], bool]  # of the section's values
    fix: str


def _is(name: str, *values: Any, unset: Any = None) -> Callable[[Mapping[str, Any]], bool]:
    """Return whether a key has one of these values; `unset` is what upstream takes where it is not written."""
    return lambda section: section.get(name, unset) in values


_HUB = ("hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision")
_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
_WITHOUT_ADAM = ("adafactor", "sgd", "adagrad", "rmsprop")  # transformers.trainer_optimizer hands these no betas
_NO_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")  # transformers.optimization.get_scheduler
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
TRAIN = (
    Idle(("num_train_epochs",), "max_steps", lambda t: (t.get("max_steps") or -1) > 0, "one of the two"),
    Idle(
        ("eval_steps",),
        "eval_strategy",
        _is("eval_strategy", "no", "epoch", unset="no"),
        "eval_strategy: steps, or leave it out",
    ),
    Idle(("save_steps",), "save_strategy", _is("save_strategy", "no", "epoch", "best"), "save_strategy: steps"),
    Idle(("save_total_limit",), "save_strategy", _is("save_strategy", "no"), "leave it out"),
    Idle(("logging_steps",), "logging_strategy", _is("logging_strategy", "no", "epoch"), "logging_strategy: steps"),
    Idle(("warmup_steps",), "lr_scheduler_type", _is("lr_scheduler_type", *_NO_WARMUP), "constant_with_warmup, say"),
    Idle(_ADAM, "optim", _is("optim", *_WITHOUT_ADAM), "an optimizer that is Adam's, or optim_args"),
    Idle(_HUB, "push_to_hub", _is("push_to_hub", False, unset=False), "push_to_hub: true, or leave it out"),
    Idle(
        ("packing_strategy",),
        "packing",
        lambda t: not t.get("packing") and not t.get("eval_packing"),
        "packing: true, or leave it out",
    ),
    Idle(
        ("padding_free",),  # TRL sets it aside without a word
        "packing",
        lambda t: t.get("packing", False) and t.get("padding_free") is False and t.get("packing_strategy") != "wrapped",
        "leave it out, or packing: false",
    ),
    Idle(
        ("gradient_checkpointing_kwargs",),
        "gradient_checkpointing",
        _is("gradient_checkpointing", False),
        "leave it out",
    ),
    Idle(
        ("activation_checkpointing_kwargs",),
        "activation_checkpointing",
        _is("activation_checkpointing", False),
        "leave it out",
    ),
)
_4BIT = ("bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage")
QUANTIZATION = (  # BitsAndBytesConfig takes them and drops them
    Idle(_4BIT, "load_in_8bit", _is("load_in_8bit", True), "leave it out"),
    Idle(("llm_int8_threshold", "llm_int8_has_fp16_weight"), "load_in_4bit", _is("load_in_4bit", True), "leave it out"),
)
EVALUATING = ("per_device_eval_batch_size", "eval_accumulation_steps", "eval_delay", "eval_packing")
GENERATION = (
    Idle(_SAMPLING, "do_sample", _is("do_sample", False, None), "do_sample: true, or leave it out"),
    Idle(("length_penalty", "early_stopping"), "num_beams", _is("num_beams", 1, None), "num_beams above 1"),
)


def check(recipe: Recipe, sections: Mapping[str, Any], held_out: bool, notes: list[str]) -> Iterator[Fault]:
    """Yield a fault for each idle key; where an override made it idle a line goes to `notes` instead."""
    for key, causes, found, write in _idle(sections, held_out):
        if key not in recipe.overridden and recipe.overridden.intersection(causes):
            notes.append(f"{recipe.where(key)}: {found}")
        else:
            yield Fault(recipe.where(key), found, write)


def _idle(sections: Mapping[str, Any], held_out: bool) -> Iterator[tuple[Key, tuple[Key, ...], str, str]]:
    """Yield idle keys: which, by which others, what is found, what to write."""
    generation = sections["evaluate"].get("generation")
    head: Key
    for head, values, rules in (
        (("train",), sections["train"], TRAIN),
        (("quantization",), sections["quantization"], QUANTIZATION),
        (("evaluate", "generation"), generation if isinstance(generation, dict) else {}, GENERATION),
    ):
        for rule in rules:
            said = (
                f"with {rule.cause}: {format_value(values[rule.cause])}"
                if rule.cause in values
                else f"without {rule.cause}"
            )
            for name in rule.keys:
                if values.get(name) is not None and rule.when(values):
                    yield (*head, name), ((*head, rule.cause),), f"{name} changes nothing {said}", rule.fix
    for name in EVALUATING if not held_out else ():
        if sections["train"].get(name) is not None:
            found, write = f"{name} changes nothing: no rows are held out", "data.eval, or data.eval_fraction: 0.05"
            yield ("train", name), (("data", "eval"), ("data", "eval_fraction")), found, write
