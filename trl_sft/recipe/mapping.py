"""One mapping of a recipe against the keys that it can hold: known and typed, or a fault each.

In: the mapping, where it stands, and the fields of its owner. Out: the keys that are right; faults with
the nearest name, the type or the choices. Mappings under a key are checked in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl_sft.errors import Fault
from trl_sft.recipe import sections
from trl_sft.recipe.upstream import keys, nested, types
from trl_sft.recipe.upstream.fields import Field
from trl_sft.recipe.yaml_reader import Key, Recipe, describe_value

_OWNERS = sections.OWNERS | {keys.GENERATION: sections.GENERATION, keys.SOURCE: sections.LOAD_DATASET}


def check(
    recipe: Recipe, key: Key, given: Mapping[Any, Any], faults: list[Fault], fields: dict[str, Field] | None = None
) -> dict[str, Any]:
    """Return the keys of a section or source that are right; note the others as faults.

    `fields`: those of a source, which depend on the kind of its file.
    """
    name = keys.SOURCE if key[0] == "data" and len(key) > 1 else ".".join(map(str, key))
    theirs = fields if fields is not None else keys.get_fields(name) if given else {}
    return _check(recipe, (key, name), given, nested.NestedFields(_OWNERS[name][0], theirs), faults)


def unknown(recipe: Recipe, key: Key, fields: Mapping[str, object], name: str, owner: str = "") -> Fault:
    """Return the fault of a key that is not known, with the nearest name or the section that owns it.

    `name`: the section, `data.*`, or the keys above; "" at the top of a recipe. `owner`: whose keys they are.
    """
    word = str(key[-1])
    above = str(key[0]) if name in (*sections.OWNERS, keys.SOURCE) else name
    theirs = f"`{above}:` ({owner})" if name else "the top of a recipe"
    if word in sections.NOT_YET.get(name, ()):
        return Fault(recipe.where(key), f"{word} is not built in this version", "leave it out")
    found = f"{theirs} has no key {word}"
    if near := types.suggest(word, fields):
        return Fault(recipe.where(key), found, near)
    owning = (
        [s for s in sections.OWNERS if s != key[0] and word in keys.get_fields(s)] if name in (*_OWNERS, "") else []
    )
    if owning:
        return Fault(recipe.where(key), found, f"it under `{owning[0]}:`")
    few = f"one of {', '.join(sorted(fields))}" if fields else "leave it out"
    return Fault(recipe.where(key), found, few if len(fields) < 20 else f"a key of {owner}")


def _check(
    recipe: Recipe, at: tuple[Key, str], given: Mapping[Any, Any], theirs: nested.NestedFields, faults: list[Fault]
) -> dict[str, Any]:
    """Return the keys of the mapping at a key that are right; `at` holds it beside its name without numbers."""
    (key, name), right = at, dict[str, Any]()
    refused = sections.REFUSED.get(name, {})
    for word, value in given.items():
        here = (*key, word)
        field = theirs.fields.get(word)
        if word in refused:
            faults.append(Fault(recipe.where(here), f"{word} does not belong here", refused[word]))
        elif word in sections.NOT_YET.get(name, ()) or field is None:
            usable = {n: f for n, f in theirs.fields.items() if n not in refused}
            faults.append(unknown(recipe, here, usable, name, theirs.owner))
        elif value is None and here in recipe.overridden and not types.accepts(field, None):
            continue  # `key=null` on the command line takes the key out
        elif not types.accepts(field, value):
            faults.append(_wrong(recipe, here, value, field))
        elif _inside(recipe, (here, name), given, faults):
            right[word] = value
    return right


def _wrong(recipe: Recipe, key: Key, value: Any, field: Field) -> Fault:
    """Return the fault of a value that its owner does not take, with the word that is nearest to it."""
    near = types.suggest(value, types.list_choices(field)) if isinstance(value, str) else ""
    write = f"{near} ({types.describe(field)})" if near else types.describe(field)
    return Fault(recipe.where(key), describe_value(value), write)


def _inside(recipe: Recipe, at: tuple[Key, str], beside: Mapping[Any, Any], faults: list[Fault]) -> bool:
    """Tell whether what the mapping under a key holds is right; true where nobody declares its keys."""
    key, name = at
    word, value = str(key[-1]), beside[key[-1]]
    if value is None or not (theirs := nested.get_nested_fields(name, word, beside)):
        return True
    read = nested.parse_text(word, value)
    if not isinstance(read, dict):
        if isinstance(value, str) and word in nested.TEXT_FORMS:
            faults.append(Fault(recipe.where(key), describe_value(value), nested.TEXT_FORMS[word]))
        return isinstance(value, str)
    before = len(faults)
    if not theirs.fields and read:
        faults.append(Fault(recipe.where(key), f"{theirs.owner} reads nothing of it", "leave it out"))
        return False
    _check(recipe, (key, f"{name}.{word}"), read, theirs, faults)
    return len(faults) == before
