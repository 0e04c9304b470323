"""The keys of a mapping that stands under a key: `lr_scheduler_kwargs`, `accelerator_config`, `loftq_config`.

In: a section, a key and what stands beside it. Out: the fields that the mapping can hold, read where
upstream hands the mapping to. Deliberately absent: mappings whose keys nobody declares.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from trl_sft.recipe import sections
from trl_sft.recipe.upstream import fields as upstream_fields
from trl_sft.recipe.upstream import keys, source
from trl_sft.recipe.upstream.fields import Field, WordList
from trl_sft.recipe.upstream.keys import GENERATION

_TRAINER, _SFT = "transformers.trainer", "trl.trainer.sft_trainer"
_SCHEDULERS, _OPTIMIZERS = "transformers.optimization", "transformers.trainer_optimizer"


# Mappings that upstream takes as a text too, but not as the name of a file: how they are written.
TEXT_FORMS = {
    "optim_args": "name=value, name=value",
    **dict.fromkeys(
        ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"), "a mapping"
    ),
}


class NestedFields(NamedTuple):
    """The keys of a mapping that stands under a key."""

    owner: str  # whose they are, for a message
    fields: dict[str, Field]
    definition: str = ""  # where their help stands


def get_nested_fields(section: str, name: str, beside: Mapping[str, Any]) -> NestedFields | None:
    """Return the keys of the mapping under a key of a section (`evaluate.generation`, `train.accelerator_config`).

    `beside`: the section's values, for keys that depend on another; None where nobody declares any.
    """
    if section == "lora":
        field = keys.get_fields("lora").get(name)
        found = next(iter(keys.find_dataclasses(field)), None) if field else None
        return (
            NestedFields(f"peft.{found.partition(':')[2]}", upstream_fields.read_fields(found), found)
            if found
            else None
        )
    make = _NESTED.get((section, name))
    return make(beside) if make else None


def parse_text(name: str, value: object) -> object:
    """Return the mapping that upstream reads from a text: JSON, or `optim_args: "rank=8, scale=2"`; else the value."""
    if not isinstance(value, str):
        return value
    if name == "optim_args":
        pairs = [pair.split("=") for pair in value.replace(" ", "").split(",")]
        return {pair[0]: pair[1] for pair in pairs} if all(len(pair) == 2 for pair in pairs) else value
    try:
        return json.loads(value) if value.startswith("{") else value
    except ValueError:
        return value


def _checkpointing(_: Mapping[str, Any]) -> NestedFields:
    """Return torch's keywords of `checkpoint`, and what the Trainer and TRL take off before it is called."""
    call = "torch.utils.checkpoint:checkpoint"
    theirs = upstream_fields.read_arguments(call) | upstream_fields.read_popped_keywords(call)
    theirs = {n: f for n, f in theirs.items() if n != "function" and not (f.type and "Call" in ast.unparse(f.type))}
    listed = WordList(("torch.utils.checkpoint:_allowed_determinism_checks_to_fns",))
    theirs["determinism_check"] = theirs["determinism_check"]._replace(choices=listed)
    for name, default in re.findall(r'gc_kwargs\.pop\("(\w+)", (\w+)\)', source.read_text(_TRAINER)):
        value = ast.parse(default, mode="eval").body
        theirs[name] = Field(name, ast.Name(type(ast.literal_eval(value)).__name__), default)
    asked = r'(?:gradient|activation)_checkpointing_kwargs(?: or \{\}\))?\.get\("(\w+)"'
    for name in re.findall(asked, source.read_text(_SFT)):
        theirs.setdefault(name, Field(name, None, ""))
    return NestedFields("torch.utils.checkpoint.checkpoint", theirs, call)


def _scheduler(beside: Mapping[str, Any]) -> NestedFields | None:
    """Return the arguments of the scheduler that `lr_scheduler_type` names, less those that the Trainer gives."""
    kind = beside.get("lr_scheduler_type") or ast.literal_eval(keys.get_fields("train")["lr_scheduler_type"].default)
    function = source.look_up_name(_SCHEDULERS, "TYPE_TO_SCHEDULER_FUNCTION", str(kind))
    if not function:
        return None
    given = ("optimizer", "num_warmup_steps", "num_training_steps")
    definition = f"{_SCHEDULERS}:{function}"
    found = upstream_fields.read_arguments(definition)
    label = f"transformers.{function}, lr_scheduler_type: {kind}"
    if handed := _handed_on(function):  # `return ReduceLROnPlateau(optimizer, **kwargs)`
        definition = f"{source.find_defining_module(_SCHEDULERS, handed)}:{handed}.__init__"
        found = upstream_fields.read_arguments(definition)
        label = f"{handed}, lr_scheduler_type: {kind}"
    if _takes_none(str(kind)):
        found, label = {}, f"lr_scheduler_type: {kind}"
    return NestedFields(label, {name: field for name, field in found.items() if name not in given}, definition)


def find_missing_arguments(beside: Mapping[str, Any]) -> list[str]:
    """Return the arguments that the scheduler of `lr_scheduler_type` has to be given and is not."""
    found = _scheduler(beside) if beside.get("lr_scheduler_type") else None
    given = parse_text("lr_scheduler_kwargs", beside.get("lr_scheduler_kwargs")) or {}
    if found is None or not isinstance(given, dict):
        return []
    return [name for name, field in found.fields.items() if not field.default and name not in given]


def _handed_on(function: str) -> str:
    """Return the class to which a scheduler's function hands its own keywords; "" where it names them."""
    node = source.find_function(_SCHEDULERS, function)
    for call in ast.walk(node) if node else ():
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and any(k.arg is None for k in call.keywords):
            return call.func.id
    return ""


def _takes_none(kind: str) -> bool:
    """Tell whether `get_scheduler` calls a scheduler without the keywords of `lr_scheduler_kwargs`."""
    node = source.find_function(_SCHEDULERS, "get_scheduler")
    for branch in ast.walk(node) if node else ():
        if isinstance(branch, ast.If) and isinstance(branch.test, ast.Compare):
            words = source.read_words(branch.test.comparators[0], _SCHEDULERS)
            call = branch.body[-1].value if isinstance(branch.body[-1], ast.Return) else None
            if kind in words and isinstance(call, ast.Call):
                return all(keyword.arg is not None for keyword in call.keywords)
    return False


def _accelerator(_: Mapping[str, Any]) -> NestedFields:
    config = "transformers.trainer_pt_utils:AcceleratorConfig"
    return NestedFields("transformers AcceleratorConfig", upstream_fields.read_fields(config), config)


def _accumulation(_: Mapping[str, Any]) -> NestedFields:
    plugin = "accelerate.utils.dataclasses:GradientAccumulationPlugin"
    return NestedFields("accelerate GradientAccumulationPlugin", upstream_fields.read_fields(plugin), plugin)


def _watermarking(_: Mapping[str, Any]) -> NestedFields:
    config = "transformers.generation.configuration_utils:WatermarkingConfig.__init__"
    found = keys.add_words(f"{GENERATION}.watermarking_config", upstream_fields.read_arguments(config))
    return NestedFields("transformers.WatermarkingConfig", found, config)


def _optimizer(beside: Mapping[str, Any]) -> NestedFields | None:
    """Return what the optimizer reads of `optim_args`; None where it hands on all."""
    default = source.read_listed_words("transformers.training_args", "TrainingArguments.default_optim")
    optim = str(beside.get("optim") or default[0])
    handler = source.look_up_name(_OPTIMIZERS, "_OPTIMIZER_HANDLERS", optim)
    node = source.find_function(_OPTIMIZERS, handler) if handler else None
    if node is None:
        return None
    written = ast.unparse(node)
    if re.search(r"(= |\(|\*\*)ctx\.optim_args(?![.\w\[])", written):
        return None
    names = re.findall(r"optim_args(?:\.get\(|\.pop\(|\[)'(\w+)'|'(\w+)' in ctx\.optim_args", written)
    found = [word for pair in names for word in pair if word]
    for item in ast.walk(node):
        if isinstance(item, ast.For) and f"{ast.unparse(item.target)} in ctx.optim_args" in ast.unparse(item):
            found += source.read_words(item.iter, _OPTIMIZERS)
    return NestedFields(f"optim: {optim}", {name: Field(name, None, "") for name in found})


_NESTED: dict[tuple[str, str], Callable[[Mapping[str, Any]], NestedFields | None]] = {
    ("evaluate", "generation"): lambda _: NestedFields(sections.GENERATION[0], keys.get_fields(GENERATION)),
    (GENERATION, "watermarking_config"): _watermarking,
    ("train", "accelerator_config"): _accelerator,
    ("train.accelerator_config", "gradient_accumulation_kwargs"): _accumulation,
    ("train", "gradient_checkpointing_kwargs"): _checkpointing,
    ("train", "activation_checkpointing_kwargs"): _checkpointing,
    ("train", "lr_scheduler_kwargs"): _scheduler,
    ("train", "optim_args"): _optimizer,
}
