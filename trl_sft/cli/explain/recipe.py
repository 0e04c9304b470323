"""Every value of a run, and who set it: the recipe, an override, trl_sft, or the owner's default.

Inputs: a checked recipe (`Run`). Outputs: lines of text. Not here: values that only the machine, the tokenizer or the
rows decide; the lines say that they are set when the run starts.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from trl_sft import json_output
from trl_sft.recipe import resolved, sections
from trl_sft.recipe.checked import Run
from trl_sft.recipe.upstream import keys
from trl_sft.recipe.upstream.fields import Field
from trl_sft.recipe.yaml_reader import Key, format_value

_OPTIONAL_SECTIONS = ("quantization", "lora", "launch")  # without a line where the recipe leaves them out
_SOURCE_LISTS = ("train", "eval")  # of `data:`; what they hold has no default
_DEFAULT_FACTORIES = {"dict": "{}", "list": "[]", "set": "[]"}


def explain_recipe(run: Run) -> list[str]:
    """Return a line for each value of a run, by section."""
    lines = [f"{run.recipe.path.name} as it would run. * = not the owner's default; ? = set when the run starts."]
    lines += [f"  {note}" for note in run.notes]
    set_values = list(iterate_set_values(run))
    json_output.add_values(values=[_describe(value) for value in set_values], notes=list(run.notes))
    for section in sections.OWNERS:
        in_section = {str(value.key[-1]): value for value in set_values if value.key[0] == section}
        is_off = section == "evaluate" and run.evaluate is None
        if is_off or (section in _OPTIONAL_SECTIONS and not in_section):
            continue
        lines += _explain_section(section, in_section)
    return lines


def _describe(value: resolved.ResolvedValue) -> dict[str, Any]:
    """Return a value of a run and who set it, as JSON has them; a secret is not shown."""
    shown = format_set_value(str(value.key[-1]), value) if value.key[-1] in resolved.SECRET_KEYS else value.value
    return {"key": list(value.key), "value": shown, "set_by": value.set_by}


def _explain_section(section: str, set_values: dict[str, resolved.ResolvedValue]) -> Iterator[str]:
    """Yield the lines of one section: values that are set, values that trl_sft sets, defaults, own keys."""
    yield from ("", f"{section}:  # {sections.OWNERS[section][0]}")
    fields = _get_fields_with_default(section)
    for name, value in set_values.items():
        is_default = name in fields and format_default(fields[name]) == format_value(value.value)
        yield f"{' ' if is_default else '*'} {name}: {format_set_value(name, value)}  # {value.set_by}"
    settled = {name: reason for (where, name), reason in sections.OWN_DEFAULTS.items() if where == section}
    yield from (f"? {name}: {reason}" for name, reason in settled.items() if name not in set_values)
    others = {*set_values, *settled}
    yield from (f"  {name}: {format_default(field)}" for name, field in fields.items() if name not in others)
    for name in sections.OWN_KEYS[section]:
        if name not in others and name not in _SOURCE_LISTS:
            yield f"  {name}: unset  # {sections.OWN_HELP[section][name]}"


def iterate_set_values(run: Run) -> Iterator[resolved.ResolvedValue]:
    """Yield every value that the recipe or an override sets, also those that `resolved.yaml` leaves out."""
    yield from (value for value in resolved.iterate_values(run, run.implied) if value.key[0] != "run")
    places = run.recipe.places
    folder: Key = ("train", "output_dir")
    set_by = places.get(folder, "trl_sft: runs/ and the name of the recipe")
    yield resolved.ResolvedValue(folder, str(run.output_dir), set_by)
    for name, value in run.options.items():
        yield resolved.ResolvedValue(("run", name), value, places[("run", name)])


def format_set_value(name: str, value: resolved.ResolvedValue) -> str:
    """Return a value as YAML writes it; a secret is not shown."""
    return "(a secret)" if name in resolved.SECRET_KEYS else format_value(value.value)


def format_default(field: Field) -> str:
    """Return a default as YAML writes it, or as its owner's source does where only the owner can compute it."""
    if not field.default:
        return "unset"
    try:
        value = ast.literal_eval(field.default)
    except (ValueError, SyntaxError):
        return _DEFAULT_FACTORIES.get(field.default, f"{field.default} (computed by its owner)")
    return format_value(list(value) if isinstance(value, tuple | set) else value)


def _get_fields_with_default(section: str) -> dict[str, Field]:
    """Return the keys of a section whose defaults apply; keys that a recipe cannot set are not among them."""
    _, definition = sections.OWNERS[section]
    if not definition:  # the owner declares no defaults
        return {}
    without_default = {*sections.REFUSED.get(section, ()), *sections.OWN_KEYS[section]}
    return {name: field for name, field in keys.get_fields(section).items() if name not in without_default}
