"""The JSON Schema of a spec of `build`, for editors: draft 2020-12.

Inputs: the keys of a spec. Outputs: a mapping that JSON can write. It is built from the fields by which a spec is
checked. Not here: what a schema cannot express, which is files, names of axes in other keys, `.nan`, and rules on
several keys.
"""

from __future__ import annotations

from typing import Any

from trl_sft.building import spec as building_spec
from trl_sft.building import spec_keys
from trl_sft.building.spec_keys import SpecKey
from trl_sft.cli.schema import json_schema
from trl_sft.cli.schema.json_schema import Schema
from trl_sft.recipe.upstream import types

# `\w` means ASCII alone in the patterns of editors
_AXIS_NAME = r"^[A-Za-z_\u0080-\uffff][0-9A-Za-z_\u0080-\uffff]*$"


def build() -> Schema:
    """Return the schema of a spec."""
    sections = {name: _build_section(name) for name in spec_keys.SECTIONS}
    return {
        "$schema": json_schema.DRAFT,
        "title": "A spec of trl_sft build",
        **json_schema.build_mapping(sections, []),
        "required": list(spec_keys.REQUIRED),
    }


def _build_section(name: str) -> Schema:
    """Return the schema of a section; an optional one may also be null."""
    description = {"description": spec_keys.HELP[name]}
    if name == spec_keys.AXES:
        names = {"pattern": _AXIS_NAME, "not": {"enum": sorted(building_spec.RESERVED_AXES)}}
        return description | {"type": ["object", "null"], "propertyNames": names, "additionalProperties": _build_axis()}
    fields = building_spec.declare_section(name).fields
    properties = {}
    for key, declared in spec_keys.SECTIONS[name].items():
        properties[key] = (
            {"description": declared.help} | json_schema.build_type(fields[key], None) | _build_range(declared)
        )
        if isinstance(declared.default, str | bool | int | float):
            properties[key]["default"] = declared.default
    if name == spec_keys.TEMPLATES:
        properties["families"] |= _build_families()
    required = [key for key, declared in spec_keys.SECTIONS[name].items() if declared.is_required]
    schema: Schema = description | json_schema.build_mapping(properties, [])
    schema |= {"required": required} if required else {}
    return schema if name in spec_keys.REQUIRED else schema | {"type": ["object", "null"]}


def _build_axis() -> Schema:
    """Return the schema of the values of one axis: a list, or a mapping to shares."""
    fields = {name: types.make_field(name, declared.type) for name, declared in spec_keys.AXIS_VALUE.items()}
    value = json_schema.build_mapping({name: json_schema.build_type(field, None) for name, field in fields.items()}, [])
    share = {"type": "number", "minimum": 0}
    mapping = {"type": "object", "minProperties": 1, "additionalProperties": {"anyOf": [share, value]}}
    return {"anyOf": [{"type": "array", "minItems": 1, "uniqueItems": True}, mapping]}


def _build_families() -> Schema:
    """Return the schema of the families of templates: a list of names, or a mapping from each to its share."""
    names = {"enum": list(spec_keys.FAMILIES)}
    items = {"type": "array", "minItems": 1, "uniqueItems": True, "items": names}
    shares = {"type": "object", "minProperties": 1, "propertyNames": names}
    shares["additionalProperties"] = {"type": "number", "minimum": 0}
    return {"anyOf": [items, shares]}


def _build_range(declared: SpecKey) -> dict[str, Any]:
    """Return the range of a number."""
    if declared.least is None:
        return {}
    least = {"exclusiveMinimum" if declared.is_above else "minimum": declared.least}
    return least | ({"maximum": declared.most} if declared.most is not None else {})
