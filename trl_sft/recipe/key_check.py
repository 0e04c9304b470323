"""Checks the keys and the types of one mapping of a recipe.

Inputs: a section or a source, and the fields that its owner declares.
Outputs: the keys that are known and well typed; a fault for every other key, with the nearest name, the type or the
choices. Mappings under a key (`lr_scheduler_kwargs`) are checked in the same way.
Not here: ranges of values, and keys that depend on each other (`rules`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl_sft.errors import Edit, Fault
from trl_sft.recipe import corrections, decimal_commas, foreign_letters, misplaced_keys, sections
from trl_sft.recipe.upstream import keys, nested, types
from trl_sft.recipe.upstream.fields import Field
from trl_sft.recipe.upstream.nested import NestedFields
from trl_sft.recipe.yaml_reader import Key, Recipe, describe_value
from trl_sft.suggestions import is_misspelling

_OWNERS = sections.OWNERS | {keys.GENERATION: sections.GENERATION, keys.SOURCE: sections.LOAD_DATASET}
_MAX_LISTED = 20  # a message lists the names of a mapping that has fewer; else it says how to list them


def check_section(recipe: Recipe, name: str, values: Mapping[Any, Any], *, faults: list[Fault]) -> dict[str, Any]:
    """Return the keys of a section that are known and well typed; append a fault for each of the others."""
    fields = keys.get_fields(name) if values else {}
    owner = NestedFields(_OWNERS[name][0], fields)
    return _check_mapping(recipe, (name,), values, name=name, owner=owner, faults=faults)


def check_source(
    recipe: Recipe, key: Key, values: Mapping[Any, Any], *, builder: str, faults: list[Fault]
) -> dict[str, Any]:
    """Return the keys of one source that are known and well typed; append a fault for each of the others.

    Args:
        recipe: The recipe, for the places of the faults.
        key: Where the source stands, `("data", "train", 0)`.
        values: The keys of the source.
        builder: The builder of `datasets`, whose arguments are keys too; "" = none.
        faults: Collects what is wrong.

    Returns:
        A new mapping.

    """
    owner = NestedFields(_OWNERS[keys.SOURCE][0], keys.get_source_fields(builder))
    return _check_mapping(recipe, key, values, name=keys.SOURCE, owner=owner, faults=faults)


def check_mapping(
    recipe: Recipe, key: Key, values: Mapping[Any, Any], *, owner: NestedFields, faults: list[Fault]
) -> dict[str, Any]:
    """Return the keys of a mapping of another file than a recipe that are known and well typed.

    Args:
        recipe: The file, read as a recipe is.
        key: Where the mapping stands; its first part is no section of a recipe.
        values: The mapping.
        owner: Whose keys they are, and the keys.
        faults: Collects what is wrong.

    """
    return _check_mapping(recipe, key, values, name=".".join(map(str, key)) or "the file", owner=owner, faults=faults)


def unknown_section(recipe: Recipe, name: str) -> Fault:
    """Return the fault of a section that does not exist."""
    problem = misplaced_keys.describe_unknown((name,))
    if instruction := misplaced_keys.find_instruction(name):
        return recipe.fault((name,), problem, instruction, code="recipe.unknown_key")
    suggestion = misplaced_keys.suggest((name,))
    if suggestion.keys:
        return misplaced_keys.explain(recipe, (name,), suggestion)
    fix = f"Use one of {', '.join(sorted(sections.OWNERS))}."
    return recipe.fault((name,), problem, fix, code="recipe.unknown_section")


def _check_mapping(
    recipe: Recipe, key: Key, values: Mapping[Any, Any], *, name: str, owner: NestedFields, faults: list[Fault]
) -> dict[str, Any]:
    """Check one mapping; `name` is its key without numbers of list items: `data.*`, `train.lr_scheduler_kwargs`."""
    checked: dict[str, Any] = {}
    refused = sections.REFUSED.get(name, {})
    for word, value in values.items():
        here = (*key, word)
        field = owner.fields.get(word)
        if word in refused:
            problem, edits = f"`{word}` cannot be set here", misplaced_keys.replace_refused(recipe, here, refused[word])
            faults.append(recipe.fault(here, problem, refused[word], code="recipe.refused_key", edits=edits))
        elif word in sections.NOT_YET.get(name, ()):
            faults.append(
                recipe.fault(
                    here, f"`{word}` is not supported by this version", "Remove it.", code="recipe.unsupported_key"
                )
            )
        elif field is None:
            faults.append(_unknown_key(recipe, here, name=name, owner=owner))
        elif value is None and here in recipe.overridden and not types.accepts(field, None):
            continue  # `key=null` on the command line removes the key
        elif not types.accepts(field, value):
            faults.append(_wrong_value(recipe, here, value=value, field=field))
            correction = corrections.correct(field, value)
            if correction is not None:  # so that other faults of the corrected recipe are found too
                checked[word] = correction.value
        elif _check_nested(recipe, here, values, name=name, faults=faults):
            checked[word] = value
    return checked


def _unknown_key(recipe: Recipe, key: Key, *, name: str, owner: NestedFields) -> Fault:
    """Return the fault of a key that its section does not have."""
    if number := decimal_commas.find_number(recipe, key):
        return decimal_commas.explain(recipe, (*key[:-1], number), rest=key)
    word = str(key[-1])
    section = str(key[0]) if name in (*sections.OWNERS, keys.SOURCE) else name
    problem = f"`{section}:` ({owner.owner_name}) has no key `{word}`{foreign_letters.describe(word)}"
    usable = [field for field in owner.fields if field not in sections.REFUSED.get(name, {})]
    if name in _OWNERS:
        if instruction := misplaced_keys.find_instruction(word):
            return recipe.fault(key, problem, instruction, code="recipe.unknown_key")
        suggestion = misplaced_keys.suggest(key)
        if suggestion.keys:
            return misplaced_keys.explain(recipe, key, suggestion)
    elif nearest := types.suggest(word, usable):
        new = (*key[:-1], nearest)
        is_certain = is_misspelling(word, nearest, usable)
        edits = misplaced_keys.plan(recipe, key, new) if is_certain else ()
        names = nearest.split(" or ")
        return recipe.fault(key, problem, misplaced_keys.ask_for(names), code="recipe.unknown_key", edits=edits)
    if not usable:
        return recipe.fault(key, problem, "Remove it.", code="recipe.unknown_key")
    if len(usable) < _MAX_LISTED:
        return recipe.fault(key, problem, f"Use one of {', '.join(sorted(usable))}.", code="recipe.unknown_key")
    if name in _OWNERS:
        listing = keys.GENERATION if name == keys.GENERATION else key[0]
        return recipe.fault(
            key,
            problem,
            f"Correct or remove it. `python -m trl_sft explain {listing}` lists the keys.",
            code="recipe.unknown_key",
        )
    return recipe.fault(key, problem, f"Use a key of {owner.owner_name}.", code="recipe.unknown_key")


def _wrong_value(recipe: Recipe, key: Key, *, value: Any, field: Field) -> Fault:
    """Return the fault of a value that the owner of its key does not accept, with what it surely or likely means."""
    expected = types.describe(field)
    correction = corrections.correct(field, value)
    problem, code = f"the value is {describe_value(value)}", "recipe.wrong_type"
    if correction is not None:
        fix = correction.fix if correction.is_same_word else f"{correction.fix} Write {expected}."
        return recipe.fault(key, problem, fix, code=code, edits=(Edit("set", key, correction.value),))
    nearest = types.suggest(value, types.list_choices(field)) if isinstance(value, str) else ""
    fix = f"Write {expected}."
    if nearest:
        fix = f"{misplaced_keys.ask_for(nearest.split(' or '))} {fix}"
    elif expected.isidentifier() and expected[0].isupper():  # a class of Python
        return recipe.fault(key, problem, f"Remove it: YAML cannot write {expected}.", code=code)
    return recipe.fault(key, problem, fix, code=code)


def _check_nested(recipe: Recipe, key: Key, siblings: Mapping[Any, Any], *, name: str, faults: list[Fault]) -> bool:
    """Check the keys of a mapping under a key; return whether the value is accepted.

    A value that is no mapping, and a mapping whose keys no owner declares, are accepted. `siblings` is the mapping
    that holds the key: its other keys may decide which nested keys exist.
    """
    word = str(key[-1])
    value = siblings[key[-1]]
    if value is None:
        return True
    owner = nested.get_nested_fields(name, word, siblings)
    if not owner:
        return True
    values = nested.parse_text(word, value)
    if not isinstance(values, dict):
        if isinstance(value, str) and word in nested.TEXT_FORMS:
            fix = f"Write {nested.TEXT_FORMS[word]}."
            faults.append(recipe.fault(key, f"the value is {describe_value(value)}", fix, code="recipe.wrong_type"))
        return isinstance(value, str | bool)
    if not owner.fields and values:
        faults.append(
            recipe.fault(key, f"{owner.owner_name} reads no key of this mapping", "Remove it.", code="recipe.no_keys")
        )
        return False
    before = len(faults)
    _check_mapping(recipe, key, values, name=f"{name}.{word}", owner=owner, faults=faults)
    return len(faults) == before
