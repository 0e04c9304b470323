"""The JSON Schema of a recipe for the installed versions, for editors: draft 2020-12.

In: nothing but the installed sources. Out: a mapping that JSON can write. It is made of the same fields by
which a recipe is checked, so that both give the same verdict on keys and types. Deliberately absent: what
a schema cannot tell: paths, rows, and most rules on several keys at once (`rules`).
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
    """Return the schema of a recipe."""
    found = ", ".join(
        f"{package} {packages.get_version(package)}" for package in packages.PACKAGES if package != "torch"
    )
    sections = {name: _section(name) for name in recipe_sections.OWNERS}
    sections["evaluate"] = {"anyOf": [sections["evaluate"], {"const": False}]}
    planned = {name: _refused("not supported by this version.") for name in recipe_sections.NOT_YET.get("", ())}
    return {
        "$schema": DRAFT,
        "title": "A recipe of trl_sft",
        "description": f"For {found}.",
        **_mapping(sections | planned, []),
        "required": ["model", "data"],
        "$defs": {"source": _source()},
    }


def _mapping(properties: Schema, conditions: list[Schema]) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        **({"allOf": conditions} if conditions else {}),
    }


def _section(name: str) -> Schema:
    """Return the schema of a section; one that is empty or null is one that is left out."""
    properties = _properties(name, keys.get_fields(name))
    conditions = [{"not": {"type": "object", "required": pair}} for pair in _pairs(name)]
    if name == "train":
        conditions += _schedulers()
        for key, least in rules.MINIMUMS.items():
            properties[key] |= {"minimum": least}
        for key in rules.POSITIVE:
            properties[key] |= {"exclusiveMinimum": 0}
    elif name == "data":
        source: Schema = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/source"}]}
        several = {"type": "array", "items": source}
        properties["train"] |= {"anyOf": [*source["anyOf"], several | {"minItems": 1}]}
        properties["eval"] |= {"anyOf": [*source["anyOf"], several, {"type": "null"}]}
    found = _mapping(properties, conditions)
    needed = {"model": ["name_or_path"], "data": ["train"]}.get(name)
    return found | ({"required": needed} if needed else {"type": ["object", "null"]})


def _source() -> Schema:
    """Return the schema of one source: the keys of every kind of file, which only the path tells apart."""
    fields: dict[str, Field] = {}
    for builder in sorted(set(recipe_sections.BUILDERS.values())):
        fields = keys.get_source_fields(builder) | fields
    conditions = [{"not": {"type": "object", "required": pair}} for pair in _pairs(keys.SOURCE)]
    return _mapping(_properties(keys.SOURCE, fields), conditions) | {"required": ["path"]}


def _properties(section: str, fields: dict[str, Field]) -> Schema:
    """Return the schemas of a mapping's keys, with the old and the refused ones."""
    found = {name: _key(section, name, field) for name, field in fields.items()}
    for (where, name), olds in renamed_keys.RENAMED_VALUES.items():
        if where == section:  # values that are read as today's
            words = [word for word, old in olds.items() if old.new and not upstream_types.accepts(fields[name], word)]
            found[name] = {"description": found[name].pop("description", ""), "anyOf": [found[name], {"enum": words}]}
    found |= {name: _old(section, old, found) for name, old in renamed_keys.renamed_in(section).items()}
    found |= {name: _refused(text) for name, text in recipe_sections.REFUSED.get(section, {}).items()}
    return found | {
        name: _refused("not supported by this version.") for name in recipe_sections.NOT_YET.get(section, ())
    }


def _key(section: str, name: str, field: Field) -> Schema:
    """Return the schema of one key: type, choices, default, and what it is for."""
    said = keys.get_help(section, name)
    found: Schema = {"description": said} if said else {}
    found |= _of_type(field, _inside(section, name))
    try:
        default = ast.literal_eval(field.default)
    except (ValueError, SyntaxError):
        return found
    plain = isinstance(default, str | bool | int | float | None)
    return found | ({"default": default} if plain and default not in (float("inf"), float("-inf")) else {})


def _inside(section: str, name: str) -> Schema | None:
    """Return the schema of the mapping under a key; None where nobody declares its keys, or another settles them."""
    theirs = nested.get_nested_fields(section, name, {}) if section not in ("data", keys.SOURCE) else None
    if theirs is None or (section, name) in (("train", "lr_scheduler_kwargs"), ("train", "optim_args")):
        return None
    inner = f"{section}.{name}"
    if inner == keys.GENERATION:
        return _mapping(_properties(inner, theirs.fields), [])
    named = {key: _of_type(field, _inside(inner, key)) for key, field in theirs.fields.items()}
    said = {key: upstream_fields.read_help(theirs.definition, key) for key in named}
    return _mapping({key: ({"description": said[key]} if said[key] else {}) | named[key] for key in named}, [])


def _of_type(field: Field, inside: Schema | None) -> Schema:
    """Return the schema of a field's type; `inside` is that of the mapping that it can be."""
    listed = upstream_types.list_choices(field)
    found: list[Schema] = []
    if listed:
        found += _words(listed, field.choices if isinstance(field.choices, WordList) else WordList(()))
    for part in upstream_types.split_union(field.type):
        one = _part(part, field.module, inside)
        if listed and one and "type" in one and one["type"] == "string":
            continue
        if listed and isinstance(field.choices, WordList) and one and one.get("type") == "array":
            one = {"type": "array", "items": {"enum": list(listed)}}
        if one is not None and one not in found and not (listed and set(one) == {"enum"}):
            found.append(one)
    text = nested.TEXT_FORMS.get(field.name) == "a mapping"  # as a text it is JSON
    found = [one | {"pattern": r"^\{"} if text and one == {"type": "string"} else one for one in found]
    if not found:
        return {} if field.type is None else {"not": {}}
    if all(set(one) == {"type"} for one in found):
        types = [one["type"] for one in found]
        return {"type": types[0] if len(types) == 1 else types}
    return found[0] if len(found) == 1 else {"anyOf": found}


def _words(listed: tuple[str, ...], listing: WordList) -> Iterator[Schema]:
    """Yield the schemas of a text that has to be one of some words."""
    plain = [word for word in listed if "[" not in word]
    either = "|".join(re.escape(word) for word in plain)
    if listing.several:
        yield {"type": "string", "pattern": f"^ *({either})?( +({either}))* *$"}
        return
    yield {"enum": [*plain, *([word.upper() for word in plain] if listing.lower else [])]}
    for word in listed:
        if word not in plain:  # a family: 'pissa_niter_[number of iters]'
            yield {"type": "string", "pattern": f"^{re.escape(word.partition('[')[0])}."}
    if listing.pattern:
        yield {"type": "string", "pattern": f"^{listing.pattern}$"}


def _part(node: ast.expr, module: str, inside: Schema | None) -> Schema | None:
    """Return the schema of a type that is no union; None where YAML cannot write it."""
    if isinstance(node, ast.Constant):
        return {"type": "null"} if node.value is None else None
    name = (
        upstream_types.get_type_name(node.value)
        if isinstance(node, ast.Subscript)
        else upstream_types.get_type_name(node)
    )
    if name in upstream_types.MAPPING_TYPES:
        return inside or _object(node, module)
    if name in upstream_types.LIST_TYPES:
        return _array(node, module)
    if isinstance(node, ast.Subscript):
        literals = [item.value for item in upstream_types.get_type_arguments(node) if isinstance(item, ast.Constant)]
        return {"enum": literals} if name == "Literal" else None
    if name == "Any":
        return {}
    words = () if name in _TYPES else upstream_source.read_listed_words(module, name) if module and name else ()
    return {"type": _TYPES[name]} if name in _TYPES else {"enum": list(words)} if words else None


def _object(node: ast.expr, module: str) -> Schema:
    inner = upstream_types.get_type_arguments(node) if isinstance(node, ast.Subscript) else []
    held = _of_type(Field("", inner[-1], "", module), None) if inner else {}
    return {"type": "object", **({"additionalProperties": held} if held else {})}


def _array(node: ast.expr, module: str) -> Schema:
    if not isinstance(node, ast.Subscript):
        return {"type": "array"}
    items = [_of_type(Field("", item, "", module), None) for item in upstream_types.get_type_arguments(node)]
    if upstream_types.has_fixed_length(node):
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    return {"type": "array", **({"items": items[0]} if items[0] else {})}


def _schedulers() -> Iterator[Schema]:
    """Yield the keys of `lr_scheduler_kwargs` for each `lr_scheduler_type`."""
    kinds = keys.get_fields("train")["lr_scheduler_type"]
    for kind in upstream_types.list_choices(kinds):
        theirs = nested.get_nested_fields("train", "lr_scheduler_kwargs", {"lr_scheduler_type": kind})
        if theirs is None:
            continue
        named = {name: _of_type(field, None) for name, field in theirs.fields.items()}
        needed = [name for name, field in theirs.fields.items() if not field.default]
        inner = {"properties": named, "additionalProperties": False} | ({"required": needed} if needed else {})
        said = {"properties": {"lr_scheduler_type": {"const": kind}}}
        given = {"required": ["lr_scheduler_type"]} if kind != ast.literal_eval(kinds.default) else {}
        must = {"required": ["lr_scheduler_kwargs"]} if needed else {}
        yield {"if": said | given, "then": {"properties": {"lr_scheduler_kwargs": inner}} | must}


def _old(section: str, old: RenamedKey, found: Schema) -> Schema:
    """Return the schema of an old name: the values that are read as today's."""
    head, _, inner = old.new.partition(".")
    told = f"Old name of {old.new}." if old.new else f"Old: {old.fix or 'ignored.'}"
    here: Schema = {"deprecated": True, "description": told}
    if not old.new or old.values:
        taken = [*old.values, *old.no_op]
        never: Schema = {"not": {}}
        return here | ({"enum": taken} if taken else never)
    target = found[head] if not inner else _inside(section, head)["properties"][inner]  # type: ignore[index]
    limits = {"minimum": 0, "exclusiveMaximum": old.below} if old.below is not None else {}
    same = {key: value for key, value in target.items() if key not in ("description", "default")} | limits
    return here | ({"anyOf": [same, {"enum": list(old.no_op)}]} if old.no_op else same)


def _pairs(section: str) -> list[list[str]]:
    """Return the pairs of an old name and today's, which cannot both stand."""
    return [[name, old.new] for name, old in renamed_keys.renamed_in(section).items() if old.new and "." not in old.new]


def _refused(text: str) -> Schema:
    return {"not": {}, "description": f"Refused: {text}"}
