"""The JSON Schema of a recipe for the installed versions, for editors: draft 2020-12.

Inputs: the installed sources. Outputs: a mapping that JSON can write. It is built from the same fields by which a
recipe is checked, so that both give the same verdict on keys and types. Not here: what a schema cannot express, which
is paths, rows, and most rules on several keys at once (`recipe.rules`).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

from trl_sft.recipe import renamed_keys, rules
from trl_sft.recipe import sections as recipe_sections
from trl_sft.recipe.renamed_keys import RenamedKey
from trl_sft.recipe.upstream import fields as upstream_fields
from trl_sft.recipe.upstream import keys, nested, packages
from trl_sft.recipe.upstream import source as upstream_source
from trl_sft.recipe.upstream import types as upstream_types
from trl_sft.recipe.upstream.fields import Field, WordList

Schema = dict[str, Any]
DRAFT = "https://json-schema.org/draft/2020-12/schema"
_TYPES = {"int": "integer", "float": "number", "bool": "boolean", "str": "string", "None": "null"}
_TYPES |= {"dict": "object", "list": "array"}


def build() -> Schema:
    """Return the schema of a recipe for the installed versions of upstream."""
    versions = ", ".join(
        f"{package} {packages.get_version(package)}" for package in packages.PACKAGES if package != "torch"
    )
    sections = {name: _build_section(name) for name in recipe_sections.OWNERS}
    sections["evaluate"] = {"anyOf": [sections["evaluate"], {"const": False}]}
    planned = {name: _refuse("not supported by this version.") for name in recipe_sections.NOT_YET.get("", ())}
    return {
        "$schema": DRAFT,
        "title": "A recipe of trl_sft",
        "description": f"For {versions}.",
        **build_mapping(sections | planned, []),
        "required": ["model", "data"],
        "$defs": {"source": _build_source()},
    }


def build_mapping(properties: Schema, conditions: list[Schema]) -> Schema:
    """Return the schema of a mapping with these keys and no others."""
    return {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        **({"allOf": conditions} if conditions else {}),
    }


def _build_section(name: str) -> Schema:
    """Return the schema of a section; an optional one may also be null, which means the same as leaving it out."""
    properties = _build_properties(name, keys.get_fields(name))
    conditions = [{"not": {"type": "object", "required": pair}} for pair in _list_exclusive_pairs(name)]
    if name == "train":
        conditions += _build_scheduler_conditions()
        for key, least in rules.MINIMUMS.items():
            properties[key] |= {"minimum": least}
        for key in rules.POSITIVE:
            properties[key] |= {"exclusiveMinimum": 0}
    elif name == "data":
        source: Schema = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/source"}]}
        several = {"type": "array", "items": source}
        properties["train"] |= {"anyOf": [*source["anyOf"], several | {"minItems": 1}]}
        properties["eval"] |= {"anyOf": [*source["anyOf"], several, {"type": "null"}]}
    schema = build_mapping(properties, conditions)
    required = {"model": ["name_or_path"], "data": ["train"]}.get(name)
    return schema | ({"required": required} if required else {"type": ["object", "null"]})


def _build_source() -> Schema:
    """Return the schema of one source: the keys of all kinds of files, since only the path decides the kind."""
    fields: dict[str, Field] = {}
    for builder in sorted(set(recipe_sections.BUILDERS.values())):
        fields = keys.get_source_fields(builder) | fields
    conditions = [{"not": {"type": "object", "required": pair}} for pair in _list_exclusive_pairs(keys.SOURCE)]
    return build_mapping(_build_properties(keys.SOURCE, fields), conditions) | {"required": ["path"]}


def _build_properties(section: str, fields: dict[str, Field]) -> Schema:
    """Return the schemas of a mapping's keys, with the old and the refused ones."""
    properties = {name: _build_key(section, name, field) for name, field in fields.items()}
    for (where, name), old_values in renamed_keys.RENAMED_VALUES.items():
        if where != section:
            continue
        old_choices = [
            word for word, old in old_values.items() if old.new and not upstream_types.accepts(fields[name], word)
        ]
        description = properties[name].pop("description", "")
        properties[name] = {"description": description, "anyOf": [properties[name], {"enum": old_choices}]}
    for name, old in renamed_keys.renamed_in(section).items():
        properties[name] = _build_old_name(section, old, properties)
    for name, fix in recipe_sections.REFUSED.get(section, {}).items():
        properties[name] = _refuse(fix)
    for name in recipe_sections.NOT_YET.get(section, ()):
        properties[name] = _refuse("not supported by this version.")
    return properties


def _build_key(section: str, name: str, field: Field) -> Schema:
    """Return the schema of one key: type, choices, default, and help."""
    help_text = keys.get_help(section, name)
    schema: Schema = {"description": help_text} if help_text else {}
    schema |= build_type(field, _build_nested(section, name))
    try:
        default = ast.literal_eval(field.default)
    except (ValueError, SyntaxError):
        return schema
    is_plain = isinstance(default, str | bool | int | float | None)
    if is_plain and default not in (float("inf"), float("-inf")):
        schema["default"] = default
    return schema


def _build_nested(section: str, name: str) -> Schema | None:
    """Return the schema of the mapping under a key.

    None if nobody declares its keys, or another key decides which it has (`_build_scheduler_conditions`).
    """
    nested_fields = nested.get_nested_fields(section, name, {}) if section not in ("data", keys.SOURCE) else None
    if nested_fields is None or (section, name) in (("train", "lr_scheduler_kwargs"), ("train", "optim_args")):
        return None
    mapping = f"{section}.{name}"
    if mapping == keys.GENERATION:
        return build_mapping(_build_properties(mapping, nested_fields.fields), [])
    properties: Schema = {}
    for key, field in nested_fields.fields.items():
        help_text = keys.get_help(mapping, key)
        if nested_fields.definition:
            help_text = upstream_fields.read_help(nested_fields.definition, key)
        description = {"description": help_text} if help_text else {}
        properties[key] = description | build_type(field, _build_nested(mapping, key))
    return build_mapping(properties, [])


def build_type(field: Field, mapping: Schema | None) -> Schema:
    """Return the schema of a field's type.

    Args:
        field: Type and choices.
        mapping: The schema of the mapping that the field can be; None = any mapping.

    """
    choices = upstream_types.list_choices(field)
    listing = field.choices if isinstance(field.choices, WordList) else None
    options: list[Schema] = list(_build_choices(choices, listing or WordList(()))) if choices else []
    for node in upstream_types.split_union(field.type):
        option = _build_single_type(node, field.module, mapping)
        if choices and option and option.get("type") == "string":
            continue  # any text is not accepted: one of the choices is
        if listing and choices and option and option.get("type") == "array":
            option = {"type": "array", "items": {"enum": list(choices)}}
        is_repeated_choice = bool(choices) and option is not None and set(option) == {"enum"}
        if option is not None and option not in options and not is_repeated_choice:
            options.append(option)
    if nested.TEXT_FORMS.get(field.name) == "a mapping":  # written as a text it is JSON
        options = [option | {"pattern": r"^\{"} if option == {"type": "string"} else option for option in options]
    return _combine(options, is_declared=field.type is not None)


def _combine(options: list[Schema], *, is_declared: bool) -> Schema:
    """Return the schema that accepts each of some schemas; with none: nothing for a declared type, else anything."""
    if not options:
        return {"not": {}} if is_declared else {}
    if all(set(option) == {"type"} for option in options):
        types = [option["type"] for option in options]
        return {"type": types[0] if len(types) == 1 else types}
    return options[0] if len(options) == 1 else {"anyOf": options}


def _build_choices(choices: tuple[str, ...], listing: WordList) -> Iterator[Schema]:
    """Yield the schemas of a text that has to be one of some words."""
    literals = [choice for choice in choices if "[" not in choice]
    alternatives = "|".join(re.escape(word) for word in literals)
    if listing.accepts_several:
        yield {"type": "string", "pattern": f"^ *({alternatives})?( +({alternatives}))* *$"}
        return
    upper_case = [word.upper() for word in literals] if listing.ignores_case else []
    yield {"enum": [*literals, *upper_case]}
    for choice in choices:
        if choice not in literals:  # a family: 'pissa_niter_[number of iters]'
            yield {"type": "string", "pattern": f"^{re.escape(choice.partition('[')[0])}."}
    if listing.pattern:
        yield {"type": "string", "pattern": f"^{listing.pattern}$"}


def _build_single_type(node: ast.expr, module: str, mapping: Schema | None) -> Schema | None:
    """Return the schema of a type that is not a union; None if YAML cannot write it."""
    if isinstance(node, ast.Constant):
        return {"type": "null"} if node.value is None else None
    name = upstream_types.get_type_name(node.value if isinstance(node, ast.Subscript) else node)
    if name in upstream_types.MAPPING_TYPES:
        return mapping or _build_object(node, module)
    if name in upstream_types.LIST_TYPES:
        return _build_array(node, module)
    if isinstance(node, ast.Subscript):
        literals = [item.value for item in upstream_types.get_type_arguments(node) if isinstance(item, ast.Constant)]
        return {"enum": literals} if name == "Literal" else None
    if name == "Any":
        return {}
    if name in _TYPES:
        return {"type": _TYPES[name]}
    choices = upstream_source.read_listed_words(module, name) if module and name else ()
    return {"enum": list(choices)} if choices else None


def _build_object(node: ast.expr, module: str) -> Schema:
    """Return the schema of a mapping with any keys; its values have the type that the annotation declares."""
    arguments = upstream_types.get_type_arguments(node) if isinstance(node, ast.Subscript) else []
    values = build_type(Field("", arguments[-1], "", module), None) if arguments else {}
    return {"type": "object", **({"additionalProperties": values} if values else {})}


def _build_array(node: ast.expr, module: str) -> Schema:
    """Return the schema of a list; a tuple of fixed length has a schema for each item."""
    if not isinstance(node, ast.Subscript):
        return {"type": "array"}
    items = [build_type(Field("", item, "", module), None) for item in upstream_types.get_type_arguments(node)]
    if upstream_types.has_fixed_length(node):
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    return {"type": "array", **({"items": items[0]} if items[0] else {})}


def _build_scheduler_conditions() -> Iterator[Schema]:
    """Yield for each `lr_scheduler_type` which keys `lr_scheduler_kwargs` then has."""
    scheduler = keys.get_fields("train")["lr_scheduler_type"]
    for name in upstream_types.list_choices(scheduler):
        nested_fields = nested.get_nested_fields("train", "lr_scheduler_kwargs", {"lr_scheduler_type": name})
        if nested_fields is None:
            continue
        properties = {key: build_type(field, None) for key, field in nested_fields.fields.items()}
        required = [key for key, field in nested_fields.fields.items() if not field.default]
        mapping: Schema = {"properties": properties, "additionalProperties": False}
        condition: Schema = {"properties": {"lr_scheduler_type": {"const": name}}}
        consequence: Schema = {"properties": {"lr_scheduler_kwargs": mapping}}
        if name != ast.literal_eval(scheduler.default):  # the default applies without the key too
            condition["required"] = ["lr_scheduler_type"]
        if required:
            mapping["required"] = required
            consequence["required"] = ["lr_scheduler_kwargs"]
        yield {"if": condition, "then": consequence}


def _build_old_name(section: str, old: RenamedKey, properties: Schema) -> Schema:
    """Return the schema of an old name: the values that are read under its current name, or ignored."""
    name, _, nested_name = old.new.partition(".")
    description = f"Old name of {old.new}." if old.new else f"Removed by upstream: {old.fix or 'ignored.'}"
    schema: Schema = {"deprecated": True, "description": description}
    if not old.new or old.values:
        accepted_values = [*old.values, *old.no_op]
        accepted: Schema = {"enum": accepted_values} if accepted_values else {"not": {}}
        return schema | accepted
    current = properties[name]
    if nested_name:
        current = _build_nested(section, name)["properties"][nested_name]  # type: ignore[index]
    limits = {"minimum": 0, "exclusiveMaximum": old.below} if old.below is not None else {}
    same = {key: value for key, value in current.items() if key not in ("description", "default")} | limits
    return schema | ({"anyOf": [same, {"enum": list(old.no_op)}]} if old.no_op else same)


def _list_exclusive_pairs(section: str) -> list[list[str]]:
    """Return pairs of an old and the current name of a key; a recipe cannot have both."""
    return [[name, old.new] for name, old in renamed_keys.renamed_in(section).items() if old.new and "." not in old.new]


def _refuse(reason: str) -> Schema:
    """Return the schema that accepts nothing, and tells why."""
    return {"not": {}, "description": f"Refused: {reason}"}
