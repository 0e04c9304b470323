"""The keys of a mapping that stands under a key: `lr_scheduler_kwargs`, `accelerator_config`, `loftq_config`.

Inputs: a section, a key, and the other values of the section. Outputs: the fields that the mapping can hold, read
where upstream hands the mapping to. Not here: mappings whose keys nobody declares.

Two places have no declaration at all and are read from upstream's code: the keys that an optimizer takes of
`optim_args`, and those that the Trainer takes of `gradient_checkpointing_kwargs` before torch. Code that is no
longer written as these readers expect raises UpstreamChanged.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from trl_sft.recipe import sections
from trl_sft.recipe.upstream import fields as upstream_fields
from trl_sft.recipe.upstream import keys, packages, source, types
from trl_sft.recipe.upstream.fields import Field, WordList
from trl_sft.recipe.upstream.keys import GENERATION

_TRAINER, _SFT_TRAINER = "transformers.trainer", "trl.trainer.sft_trainer"
_SCHEDULERS, _OPTIMIZERS = "transformers.optimization", "transformers.trainer_optimizer"
# the arguments of a scheduler that the Trainer passes
_TRAINER_ARGUMENTS = ("optimizer", "num_warmup_steps", "num_training_steps")

# `every_n_layers = gc_kwargs.pop("every_n_layers", 1)` in transformers.trainer
_TRAINER_POP = re.compile(r'gc_kwargs\.pop\("(\w+)", (\w+)\)')
# `(args.gradient_checkpointing_kwargs or {}).get("selective")` in trl.trainer.sft_trainer
_TRL_GET = re.compile(r'(?:gradient|activation)_checkpointing_kwargs(?: or \{\}\))?\.get\("(\w+)"')

# Mappings that upstream also takes as a text, but not as the name of a file: how a message writes them.
TEXT_FORMS = {
    "optim_args": "name=value, name=value",
    "lr_scheduler_kwargs": "a mapping",
    "gradient_checkpointing_kwargs": "a mapping",
    "activation_checkpointing_kwargs": "a mapping",
}


class NestedFields(NamedTuple):
    """The keys of a mapping that stands under a key."""

    owner_name: str  # whose keys they are, for a message
    fields: dict[str, Field]
    definition: str = ""  # where the help of the keys is read, `module:Class`; "" = there is none


def get_nested_fields(section: str, name: str, siblings: Mapping[str, Any]) -> NestedFields | None:
    """Return the keys of the mapping under a key of a section.

    Args:
        section: a section, or the path of a mapping in it (`evaluate.generation`, `train.accelerator_config`).
        name: the key of the mapping.
        siblings: the other values of the section: `optim` decides what `optim_args` can hold.

    Returns:
        The fields; None if nobody declares the keys, so that any are accepted.

    Raises:
        UpstreamChanged: the installed version is not written as this reader expects.

    """
    if section == "lora":
        return _get_lora_fields(name)
    read = _READERS.get((section, name))
    return read(siblings) if read else None


def parse_text(name: str, value: object) -> object:
    """Return the mapping that upstream reads from a text: JSON, or `optim_args: "rank=8, scale=2"`.

    A value that is no such text is returned as it is.
    """
    if not isinstance(value, str):
        return value
    if name == "optim_args":
        pairs = [pair.split("=") for pair in value.replace(" ", "").split(",")]
        return {pair[0]: pair[1] for pair in pairs} if all(len(pair) == 2 for pair in pairs) else value
    try:
        return json.loads(value) if value.startswith("{") else value
    except ValueError:
        return value


def find_missing_arguments(siblings: Mapping[str, Any]) -> list[str]:
    """Return the arguments that the scheduler of `lr_scheduler_type` needs and `lr_scheduler_kwargs` lacks.

    Args:
        siblings: the values of `train:`.

    """
    scheduler = _get_scheduler_fields(siblings) if siblings.get("lr_scheduler_type") else None
    arguments = parse_text("lr_scheduler_kwargs", siblings.get("lr_scheduler_kwargs")) or {}
    if scheduler is None or not isinstance(arguments, dict):
        return []
    return [name for name, field in scheduler.fields.items() if not field.default and name not in arguments]


def _get_lora_fields(name: str) -> NestedFields | None:
    """Return the keys of a mapping from which peft makes one of its classes."""
    field = keys.get_fields("lora").get(name)
    classes = keys.find_dataclasses(field) if field else []
    if not classes:
        return None
    class_name = classes[0].partition(":")[2]
    return NestedFields(f"peft.{class_name}", upstream_fields.read_fields(classes[0]), classes[0])


def _get_checkpointing_fields(_: Mapping[str, Any]) -> NestedFields:
    """Return torch's keywords of `checkpoint`, and those that the Trainer and TRL take before they call it."""
    owner = "torch.utils.checkpoint:checkpoint"
    arguments = upstream_fields.read_arguments(owner) | upstream_fields.read_popped_keywords(owner)
    del arguments["function"]
    # YAML cannot write a function (`context_fn`)
    fields = {name: field for name, field in arguments.items() if not _is_callable(field)}
    modes = WordList(("torch.utils.checkpoint:_allowed_determinism_checks_to_fns",))
    fields["determinism_check"] = fields["determinism_check"]._replace(choices=modes)
    of_trainer = _TRAINER_POP.findall(packages.read_text(_TRAINER))
    if not of_trainer:
        raise packages.changed_source(
            _TRAINER, "`gc_kwargs.pop` no longer takes keys of `gradient_checkpointing_kwargs`"
        )
    for name, default in of_trainer:
        fields[name] = Field(name, ast.Name(type(ast.literal_eval(default)).__name__), default)
    for name in _TRL_GET.findall(packages.read_text(_SFT_TRAINER)):  # TRL 1.8 takes none
        fields.setdefault(name, Field(name, None, ""))
    return NestedFields("torch.utils.checkpoint.checkpoint", fields, owner)


def _is_callable(field: Field) -> bool:
    """Tell whether a field takes a function."""
    return field.type is not None and "Call" in ast.unparse(field.type)


def _get_scheduler_fields(siblings: Mapping[str, Any]) -> NestedFields | None:
    """Return the arguments of the scheduler that `lr_scheduler_type` names, without those that the Trainer passes."""
    kind = _get_value_or_default("lr_scheduler_type", siblings)
    function = _look_up_function(_SCHEDULERS, "TYPE_TO_SCHEDULER_FUNCTION", "lr_scheduler_type", choice=kind)
    if not function:
        return None
    owner, label = f"{_SCHEDULERS}:{function}", f"transformers.{function}, lr_scheduler_type: {kind}"
    class_name = _find_wrapped_class(function)
    if class_name:
        module, class_name = source.resolve(_SCHEDULERS, class_name)
        owner, label = f"{module}:{class_name}.__init__", f"{class_name}, lr_scheduler_type: {kind}"
    if not _receives_keywords(kind):
        return NestedFields(f"lr_scheduler_type: {kind}", {}, owner)
    arguments = upstream_fields.read_arguments(owner)
    fields = {name: field for name, field in arguments.items() if name not in _TRAINER_ARGUMENTS}
    return NestedFields(label, fields, owner)


def _find_wrapped_class(function: str) -> str:
    """Return the class to which a scheduler's function passes its keywords; "" if it names them itself.

    transformers writes `return ReduceLROnPlateau(optimizer, **kwargs)`.
    """
    for call in ast.walk(source.get_function(_SCHEDULERS, function)):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and _unpacks_keywords(call):
            return call.func.id
    return ""


def _receives_keywords(kind: str) -> bool:
    """Tell whether `get_scheduler` calls the scheduler of a kind with `lr_scheduler_kwargs`.

    transformers writes `if name == SchedulerType.CONSTANT: return schedule_func(optimizer)`.
    """
    for branch in ast.walk(source.get_function(_SCHEDULERS, "get_scheduler")):
        if not isinstance(branch, ast.If) or not isinstance(branch.test, ast.Compare):
            continue
        result = branch.body[-1].value if isinstance(branch.body[-1], ast.Return) else None
        kinds = source.read_words(branch.test.comparators[0], _SCHEDULERS)
        if kind in kinds and isinstance(result, ast.Call):
            return _unpacks_keywords(result)
    return True


def _unpacks_keywords(call: ast.Call) -> bool:
    """Tell whether a call has an argument `**keywords`."""
    return any(keyword.arg is None for keyword in call.keywords)


def _get_accelerator_fields(_: Mapping[str, Any]) -> NestedFields:
    """Return the keys of `accelerator_config`."""
    owner = "transformers.trainer_pt_utils:AcceleratorConfig"
    return NestedFields("transformers AcceleratorConfig", upstream_fields.read_fields(owner), owner)


def _get_accumulation_fields(_: Mapping[str, Any]) -> NestedFields:
    """Return the keys of `accelerator_config.gradient_accumulation_kwargs`."""
    owner = "accelerate.utils.dataclasses:GradientAccumulationPlugin"
    return NestedFields("accelerate GradientAccumulationPlugin", upstream_fields.read_fields(owner), owner)


def _get_watermarking_fields(_: Mapping[str, Any]) -> NestedFields:
    """Return the keys of `evaluate.generation.watermarking_config`."""
    owner = "transformers.generation.configuration_utils:WatermarkingConfig.__init__"
    fields = keys.add_words(f"{GENERATION}.watermarking_config", upstream_fields.read_arguments(owner))
    return NestedFields("transformers.WatermarkingConfig", fields, owner)


def _get_parallelism_fields(_: Mapping[str, Any]) -> NestedFields:
    """Return the keys of `train.parallelism_config`; each handler is a mapping of its own."""
    owner = "accelerate.parallelism_config:ParallelismConfig"
    fields = upstream_fields.read_fields(owner)
    handlers = {name: types.make_field(name, "dict[str, Any] | None") for name in fields if name.endswith("_handler")}
    return NestedFields("accelerate.ParallelismConfig", fields | handlers, owner)


def _read_handler_fields(class_name: str) -> NestedFields:
    """Return the keys of a handler of `train.parallelism_config`."""
    owner = f"accelerate.utils.dataclasses:{class_name}"
    return NestedFields(f"accelerate {class_name}", upstream_fields.read_fields(owner), owner)


def _get_distributed_fields(_: Mapping[str, Any]) -> NestedFields:
    """Return the keys of `model.distributed_config`."""
    owner = "transformers.distributed.configuration_utils:DistributedConfig"
    return NestedFields("transformers DistributedConfig", upstream_fields.read_fields(owner), owner)


def _get_optimizer_fields(siblings: Mapping[str, Any]) -> NestedFields | None:
    """Return what the optimizer takes of `optim_args`; None if it passes on everything."""
    optim = _get_value_or_default("optim", siblings)
    handler = _look_up_function(_OPTIMIZERS, "_OPTIMIZER_HANDLERS", "optim", choice=optim)
    names = _read_optimizer_arguments(handler) if handler else None
    if names is None:
        return None
    return NestedFields(f"optim: {optim}", {name: Field(name, None, "") for name in names})


def _get_own_fields(section: str, name: str) -> NestedFields:
    """Return the keys of the mapping under one of our own keys."""
    declared = sections.OWN_NESTED_KEYS[section, name]
    fields = {key: types.make_field(key, kind)._replace(default=default) for key, (kind, default) in declared.items()}
    return NestedFields("trl_sft", fields)


def _get_value_or_default(name: str, siblings: Mapping[str, Any]) -> str:
    """Return the value of a key of `train:`, or its default if the recipe does not set it."""
    if value := siblings.get(name):
        return str(value)
    field = keys.get_fields("train")[name]
    try:
        return str(ast.literal_eval(field.default))
    except ValueError:
        raise packages.changed_source(field.module, f"the default of `{name}` is no longer a text") from None


def _look_up_function(module: str, constant: str, name: str, *, choice: str) -> str:
    """Look up a choice of a key of `train:` in a mapping of transformers from choices to functions.

    Returns:
        The function; "" if the key has no such choice, which is a fault of its own.

    Raises:
        UpstreamChanged: the key has the choice and the mapping has not.
    """
    function = source.look_up_name(module, constant, choice)
    if not function and choice in types.list_choices(keys.get_fields("train")[name]):
        raise packages.changed_source(module, f"`{constant}` has no function for {choice}")
    return function


def _read_optimizer_arguments(handler: str) -> list[str] | None:
    """Return the keys that a function of transformers takes of `ctx.optim_args`; None if it passes on everything.

    Raises UpstreamChanged if the function uses `optim_args` in a way that this reader does not know.
    """
    function = source.get_function(_OPTIMIZERS, handler)
    parents = {child: node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
    loops = [node for node in ast.walk(function) if isinstance(node, ast.For)]
    names: list[str] = []
    for node, parent in parents.items():
        if not isinstance(node, ast.Attribute) or node.attr != "optim_args":
            continue
        if isinstance(parent, ast.Assign | ast.Call | ast.keyword | ast.Dict):
            return None  # `kwargs = ctx.optim_args`, `optimizer(**ctx.optim_args)`
        if isinstance(parent, ast.If | ast.BoolOp | ast.UnaryOp):
            continue  # `if ctx.optim_args:`
        key = _find_key(parent, parents)
        words = list(source.read_words(key, _OPTIMIZERS, function))
        if isinstance(key, ast.Name):  # `for key in ("momentum", "dampening"):`
            for loop in loops:
                if ast.unparse(loop.target) == key.id:
                    words += source.read_words(loop.iter, _OPTIMIZERS, function)
        if not words:
            raise packages.changed_source(
                _OPTIMIZERS, f"`{handler}` uses `{ast.unparse(parent)}`, which trl_sft cannot read"
            )
        names += words
    return list(dict.fromkeys(names))


def _find_key(use: ast.AST, parents: Mapping[ast.AST, ast.AST]) -> ast.expr | None:
    """Return the key that an expression reads from a mapping; None if it reads no key.

    Args:
        use: the expression directly around the mapping: `mapping[key]`, `key in mapping`, `mapping.get`.
        parents: each node of the function -> the node around it.

    """
    if isinstance(use, ast.Subscript):
        return use.slice
    if isinstance(use, ast.Compare) and isinstance(use.ops[0], ast.In):
        return use.left
    call = parents.get(use)
    if isinstance(use, ast.Attribute) and use.attr in ("get", "pop") and isinstance(call, ast.Call):
        return call.args[0]
    return None


_READERS: dict[tuple[str, str], Callable[[Mapping[str, Any]], NestedFields | None]] = {
    ("evaluate", "generation"): lambda _: NestedFields(sections.GENERATION[0], keys.get_fields(GENERATION)),
    (GENERATION, "watermarking_config"): _get_watermarking_fields,
    ("model", "distributed_config"): _get_distributed_fields,
    ("train", "accelerator_config"): _get_accelerator_fields,
    ("train", "parallelism_config"): _get_parallelism_fields,
    ("train.parallelism_config", "tp_handler"): lambda _: _read_handler_fields("TorchTensorParallelConfig"),
    ("train.parallelism_config", "cp_handler"): lambda _: _read_handler_fields("TorchContextParallelConfig"),
    ("train.parallelism_config", "sp_handler"): lambda _: _read_handler_fields("DeepSpeedSequenceParallelConfig"),
    ("train.accelerator_config", "gradient_accumulation_kwargs"): _get_accumulation_fields,
    ("train", "gradient_checkpointing_kwargs"): _get_checkpointing_fields,
    ("train", "activation_checkpointing_kwargs"): _get_checkpointing_fields,
    ("train", "lr_scheduler_kwargs"): _get_scheduler_fields,
    ("train", "optim_args"): _get_optimizer_fields,
    ("run", "early_stopping"): lambda _: _get_own_fields("run", "early_stopping"),
}
