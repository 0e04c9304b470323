"""Fields of the model's configuration that a recipe sets: `model.config`.

In: a checked recipe and the configuration that the model came with. Out: the configuration with these fields, as
`from_pretrained` makes it from the same keywords; or a fault for each field that its class does not have, does not take
or cannot compute with. Deliberately absent: whether the weights have the shapes of the configuration (`weights`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RopeParameters

from trl_sft.errors import Edit, Fault, RecipeError, first_line
from trl_sft.recipe.checked import Run
from trl_sft.recipe.upstream import types
from trl_sft.recipe.yaml_reader import Key, describe_value, format_value

_NAME = "config"
KEY: Key = ("model", _NAME)
ROPE = "rope_parameters"
_DEFAULT_ROPE = "default"
# fields that another key of the recipe sets, or that say which class the model has
_ELSEWHERE = {
    "dtype": "Use `model.dtype`.",
    "torch_dtype": "Use `model.dtype`.",
    "quantization_config": "Use the section `quantization:`.",
    "attn_implementation": "Use `model.attn_implementation`.",
    "_attn_implementation": "Use `model.attn_implementation`.",
    "experts_implementation": "Use `model.experts_implementation`.",
    "distributed_config": "Use `model.distributed_config`.",
    "rope_scaling": f"Use `{ROPE}`, with `rope_type` and `rope_theta` in it.",
    **dict.fromkeys(("model_type", "architectures", "auto_map"), "Remove it: the class of the model follows from it."),
    "transformers_version": "Remove it: transformers sets it.",
}


def apply(run: Run, config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration of a model with the fields of `model.config`.

    Args:
        run: The checked recipe.
        config: As the model came with it; it stays as it is.

    Raises:
        RecipeError: With a fault for each field that cannot be set.

    """
    fields: dict[str, Any] = run.model[_NAME] or {}
    faults = [fault for name in fields for fault in _check_name(run, config, name)]
    if not faults:
        faults = [fault for name, value in fields.items() if name == ROPE for fault in _check_rope(run, config, value)]
    changed = config
    # the rotary embedding last: its class compares it with the other fields
    for name, value in sorted(fields.items(), key=lambda field: field[0] == ROPE) if not faults else ():
        try:
            changed = type(config).from_dict(changed.to_dict(), **{name: value})
        except Exception as error:  # of the checks that the class declares
            problem = f"{type(config).__name__} does not take {describe_value(value)}: {_find_reason(error)}"
            fix = f"Write a value of the type of {format_value(getattr(config, name, None))}, which the model has."
            faults.append(_make_fault(run, (name,), problem, fix=fix))
    if not faults:
        faults = list(_check_whole(run, changed, fields))
    if faults:
        raise RecipeError(faults)
    return changed


def _check_name(run: Run, config: PretrainedConfig, name: str) -> Iterator[Fault]:
    """Yield the fault of a field that the class does not have, or that another key sets."""
    if name in _ELSEWHERE:
        key = (*KEY, name)
        yield run.recipe.fault(key, f"`{name}` cannot be set here", _ELSEWHERE[name], code="recipe.refused_key")
        return
    declared = [field.name for field in dataclasses.fields(config)] if dataclasses.is_dataclass(config) else []
    names = [known for known in dict.fromkeys((*declared, *config.to_dict())) if known not in _ELSEWHERE]
    if name in names or hasattr(config, name):
        return
    nearest = types.suggest(name, names)
    edits = (Edit("rename", (*KEY, name), new=(*KEY, nearest)),) if nearest in names else ()
    problem = f"{type(config).__name__} has no field `{name}`"
    fix = f"Did you mean `{nearest}`?" if nearest else f"Use a field of {type(config).__name__}."
    yield run.recipe.fault((*KEY, name), problem, fix, code="recipe.unknown_key", edits=edits)


def _check_rope(run: Run, config: PretrainedConfig, value: Any) -> Iterator[Fault]:
    """Yield what the rotary embedding could not compute with: an unknown type, a missing or unknown number."""
    present: dict[str, Any] = getattr(config, ROPE, None) or {}
    if not isinstance(value, dict):
        fix = f"Write a mapping, such as `{format_value(present or {'rope_type': 'yarn', 'factor': 4.0})}`."
        yield _make_fault(run, (ROPE,), f"the value is {describe_value(value)}", fix=fix)
        return
    is_by_layer = bool(present) and all(isinstance(inner, dict) for inner in present.values())
    parts = value.items() if is_by_layer else [("", value)]
    for layer, part in parts:
        place = (ROPE, layer) if layer else (ROPE,)
        before = present.get(layer) if is_by_layer else present
        if layer and before is None:
            yield _make_fault(run, place, f"the model has no layers `{layer}`", fix=f"Use one of {', '.join(present)}.")
        elif not isinstance(part, dict):
            kinds = ", ".join(present)
            fix = f"Write a mapping for each of {kinds}, since the layers of this model differ."
            yield _make_fault(run, place, f"the value is {describe_value(part)}", fix=fix)
        else:
            yield from _check_rope_part(run, place, part, before=before or {})


def _check_rope_part(
    run: Run, place: tuple[str, ...], part: Mapping[str, Any], *, before: Mapping[str, Any]
) -> Iterator[Fault]:
    """Yield the faults of the numbers of one rotary embedding."""
    kind = part.get("rope_type")
    kinds = [_DEFAULT_ROPE, *(name for name in ROPE_INIT_FUNCTIONS if name != _DEFAULT_ROPE)]
    if kind not in kinds:
        nearest = types.suggest(str(kind), kinds)
        fix = f"Did you mean `{nearest}`?" if nearest else f"Use one of {', '.join(kinds)}."
        edits = (Edit("set", (*KEY, *place, "rope_type"), nearest),) if nearest in kinds else ()
        problem = f"there is no `rope_type` {describe_value(kind)}" if kind else "the mapping has no `rope_type`"
        yield _make_fault(run, (*place, "rope_type") if kind else place, problem, fix=fix, edits=edits)
    if part.get("rope_theta") is None:
        theta = before.get("rope_theta")
        fix = f"Add `rope_theta: {theta}`, which the model has." if theta else "Add `rope_theta`."
        edits = (Edit("set", (*KEY, *place, "rope_theta"), theta),) if theta else ()
        problem = "the mapping has no `rope_theta`, and it replaces that of the model"
        yield _make_fault(run, place, problem, fix=fix, edits=edits)
    known = {*RopeParameters.__annotations__, *before}
    for name, number in part.items():
        if name not in known:
            nearest = types.suggest(name, sorted(known))
            fix = f"Did you mean `{nearest}`?" if nearest else f"Use one of {', '.join(sorted(known))}."
            yield _make_fault(run, (*place, name), f"a rotary embedding has no `{name}`", fix=fix)
        elif isinstance(number, str) and name != "rope_type":
            yield _make_fault(run, (*place, name), f"the value is {describe_value(number)}", fix="Write a number.")


def _check_whole(run: Run, config: PretrainedConfig, fields: Mapping[str, Any]) -> Iterator[Fault]:
    """Yield what the class refuses of the configuration as a whole, and what its rotary embedding cannot compute."""
    parameters = getattr(config, ROPE, None)
    kind = parameters.get("rope_type") if isinstance(parameters, dict) else None
    if ROPE in fields and kind in ROPE_INIT_FUNCTIONS:
        try:
            ROPE_INIT_FUNCTIONS[kind](config, "cpu")
        except KeyError as error:
            name = str(error.args[0])
            yield _make_fault(run, (ROPE,), f"`rope_type: {kind}` needs `{name}`", fix=f"Add `{name}`.")
            return
        except Exception as error:
            problem = f"`rope_type: {kind}` cannot be computed: {first_line(error)}"
            yield _make_fault(run, (ROPE,), problem, fix="Correct its numbers.")
            return
    validate = getattr(config, "validate", None)
    try:
        if validate is not None:
            validate()
    except Exception as error:
        yield _make_fault(run, (), _find_reason(error), fix="Correct the fields that the message names.")


def _make_fault(run: Run, place: tuple[str, ...], problem: str, *, fix: str, edits: tuple[Edit, ...] = ()) -> Fault:
    return run.recipe.fault((*KEY, *place), problem, fix, code="model.config_field", edits=edits)


def _find_reason(error: BaseException) -> str:
    """Return the innermost reason of a refusal: the strict classes of transformers put theirs into another one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(".")
