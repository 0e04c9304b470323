"""Keys under a wrong name or in a wrong section: found, and read as what they surely mean.

Inputs: the recipe as written. Outputs: a fault for each such key, with the edit that solves it; and the recipe as it
would be after the edits, so that one wrong key hides no other fault. Not here: keys whose meaning is open (`key_check`
suggests names for them), and wrong values (`corrections`).
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from trl_sft.errors import Edit, Fault
from trl_sft.recipe import corrections, foreign_letters, renamed_keys, sections, suggested_keys, synonyms
from trl_sft.recipe.suggested_keys import SuggestedKeys
from trl_sft.recipe.upstream import keys
from trl_sft.recipe.yaml_reader import Key, Recipe

_PARTS = ("train", "eval")  # of `data:`
# "Use `model.trust_remote_code`.", "Use `quantization: {load_in_4bit: true}`."
_OTHER_KEY = re.compile(r"Use `(?P<key>[\w.]+)(?:: \{(?P<inner>\w+): true\})?`\.$")
# Values of refused keys that say what a run does anyway.
_HARMLESS: dict[str, tuple[tuple[str, Any], ...]] = {
    "lora": (("peft_type", "LORA"), ("inference_mode", False), ("auto_mapping", None)),
    "train": (("do_train", True), ("local_rank", -1), ("local_rank", 0), ("do_predict", False)),
}


def move(recipe: Recipe, faults: list[Fault]) -> Recipe:
    """Return the recipe with each key whose meaning is certain under its right name; append a fault for each."""
    values = copy.deepcopy(recipe.values)
    places = dict(recipe.places)
    for key, value in list(_iterate_unknown(recipe.values)):
        suggestion = suggest(key)
        if not suggestion.is_certain or not _fits(suggestion.keys[0], value):
            continue
        new = suggestion.keys[0]
        edits = plan(recipe, key, new)
        if edits and _put(values, new, value):
            _take_out(values, key)
            places[new] = places.get(key, recipe.path.name)
            faults.append(explain(recipe, key, suggestion, edits=edits))
    return dataclasses.replace(recipe, values=values, places=places)


def suggest(key: Key) -> SuggestedKeys:
    """Return the keys that an unknown key may mean; `key` is its whole path."""
    mapping = key[:-1]
    if not mapping:
        names = list(sections.OWNERS)
    else:
        section = _name_mapping(mapping)
        names = [name for name in keys.get_fields(section) if name not in sections.REFUSED.get(section, {})]
    return suggested_keys.suggest(str(key[-1]), mapping, names)


def explain(recipe: Recipe, key: Key, suggestion: SuggestedKeys, *, edits: tuple[Edit, ...] = ()) -> Fault:
    """Return the fault of an unknown key that has a suggestion."""
    word, mapping = str(key[-1]), key[:-1]
    problem = describe_unknown(key)
    first = suggestion.keys[0]
    if suggestion.is_certain and len(first) > 1 and _get(recipe.values, first) is not None:
        fix = f"Remove one of the two: the recipe sets `{'.'.join(map(str, first))}` too."
        return recipe.fault(key, problem, fix, code="recipe.old_and_new_key")
    if first[:-1] == mapping:
        names = [str(suggested[-1]) for suggested in suggestion.keys]
        code = "recipe.unknown_key" if mapping else "recipe.unknown_section"
        return recipe.fault(key, problem, ask_for(names), code=code, edits=edits)
    is_same_word = first[-1] == word
    code = "recipe.wrong_section" if is_same_word else "recipe.unknown_key"
    if is_same_word and len(first) == 2 and len(suggestion.keys) == 1:
        return recipe.fault(key, problem, f"Move it to the section `{first[0]}:`.", code=code, edits=edits)
    if is_same_word and first[:2] == ("data", "train"):
        fix = f"Write it in the source: `data.train: {{path: FILE, {word}: VALUE}}`."
        return recipe.fault(key, problem, fix, code=code, edits=edits)
    names = [".".join(map(str, suggested)) for suggested in suggestion.keys]
    return recipe.fault(key, problem, ask_for(names), code=code, edits=edits)


def describe_unknown(key: Key) -> str:
    """Return the problem of a key that a recipe does not have."""
    if len(key) == 1:
        return f"a recipe has no section `{key[0]}:`{foreign_letters.describe(str(key[0]))}"
    section = _name_mapping(key[:-1])
    owner = sections.OWNERS.get(section, sections.OWNERS[str(key[0])])[0]
    owner = {keys.SOURCE: sections.LOAD_DATASET[0], keys.GENERATION: sections.GENERATION[0]}.get(section, owner)
    shown = section if section == keys.GENERATION else key[0]
    return f"`{shown}:` ({owner}) has no key `{key[-1]}`{foreign_letters.describe(str(key[-1]))}"


def find_instruction(word: object) -> str:
    """Return what to do in place of a key that no section has; "" if nothing is known."""
    return synonyms.INSTRUCTIONS.get(str(word).lower().replace("_", "").replace("-", ""), "")


def ask_for(names: list[str]) -> str:
    """Return the instruction for names that may be meant."""
    return "Did you mean " + " or ".join(f"`{name}`" for name in names) + "?"


def plan(recipe: Recipe, key: Key, new: Key) -> tuple[Edit, ...]:
    """Return the edits that move a key; () if something stands at its new place, or if there is no such place."""
    value = _get(recipe.values, key)
    if _get(recipe.values, new) is not None:
        return ()
    if new[:2] == ("data", "train") and len(new) == 3 and key[:2] != ("data", "train"):  # a key of the source
        train = _get(recipe.values, ("data", "train"))
        if isinstance(train, str):
            return Edit("set", ("data", "train"), {"path": train, str(new[-1]): value}), Edit("remove", key)
        return (Edit("rename", key, new=new),) if isinstance(train, dict) else ()
    parent = _get(recipe.values, new[:-1])
    return (Edit("rename", key, new=new),) if parent is None or isinstance(parent, dict) else ()


def replace_refused(recipe: Recipe, key: Key, instruction: str) -> tuple[Edit, ...]:
    """Return the edits by which a recipe follows the instruction for a refused key; () if a person has to decide.

    Args:
        recipe: the recipe.
        key: the refused key, which the recipe sets.
        instruction: that of `sections.REFUSED`.

    """
    value = _get(recipe.values, key)
    if key[0] in _HARMLESS and (key[-1], value) in _HARMLESS[str(key[0])]:
        return (Edit("remove", key),)
    named = _OTHER_KEY.match(instruction)
    if named is None:
        return ()
    if named["inner"] and value is False:  # the same as leaving the key out
        return (Edit("remove", key),)
    new: Key = tuple(filter(None, (*named["key"].split("."), named["inner"])))
    if key[0] == "data" and len(key) > 2 and len(new) == 1:
        new = (*key[:-1], *new)
    return plan(recipe, key, new) if len(new) > 1 and _fits(new, value) else ()


def _name_mapping(mapping: Key) -> str:
    """Return the name under which `upstream.keys` has the fields of a mapping."""
    if mapping[0] == "data" and len(mapping) > 1:
        return keys.SOURCE
    return keys.GENERATION if mapping == ("evaluate", "generation") else str(mapping[0])


def _iterate_unknown(values: Mapping[str, Any]) -> Iterator[tuple[Key, Any]]:
    """Yield every key of the sections, of the sources and of `evaluate.generation` that is unknown, with its value."""
    yield from (((name,), value) for name, value in values.items() if name not in sections.OWNERS)
    for key, mapping in _iterate_mappings(values):
        section = _name_mapping(key)
        known = {*keys.get_fields(section), *renamed_keys.renamed_in(section), *sections.REFUSED.get(section, ())}
        known |= {*sections.NOT_YET.get(section, ())}
        if section == keys.SOURCE:
            known |= {name for builder in sections.BUILDERS.values() for name in keys.get_source_fields(builder)}
        yield from (((*key, name), value) for name, value in mapping.items() if name not in known)


def _iterate_mappings(values: Mapping[str, Any]) -> Iterator[tuple[Key, Mapping[Any, Any]]]:
    """Yield the mappings of a recipe whose keys are known by name."""
    for section in sections.OWNERS:
        mapping = values.get(section)
        if not isinstance(mapping, dict):
            continue
        yield (section,), mapping
        nested: list[tuple[Key, Any]] = []
        if section == "data":
            for part in _PARTS:
                source = mapping.get(part)
                nested.append(((section, part), source))
                if isinstance(source, list):
                    nested += [((section, part, number), entry) for number, entry in enumerate(source)]
        if section == "evaluate":
            nested.append(((section, "generation"), mapping.get("generation")))
        yield from ((key, inner) for key, inner in nested if isinstance(inner, dict))


def _fits(key: Key, value: Any) -> bool:
    """Tell whether a key takes a value, maybe after a correction that is certain."""
    if len(key) == 1:
        return value is None or isinstance(value, dict)
    if key[0] == "data" and len(key) == 2 and key[1] in _PARTS:  # these accept any type, but mean files
        return isinstance(value, str | list | dict)
    if key[0] == "data" and key[-1] == "format":
        return value in sections.FORMATS
    field = suggested_keys.get_field(key)
    if suggested_keys.takes(key, value):
        return True
    old = renamed_keys.renamed_in(str(key[0])).get(str(key[-1])) if len(key) == 2 else None
    if old is not None:
        return True
    return field is not None and corrections.correct(field, value) is not None


def _get(values: Any, key: Key) -> Any:
    """Return the value at a key; None if there is none."""
    for part in key:
        if isinstance(values, dict):
            values = values.get(part)
        else:
            values = values[part] if isinstance(values, list) and isinstance(part, int) and part < len(values) else None
    return values


def _put(values: dict[str, Any], key: Key, value: Any) -> bool:
    """Put a value at a key, and create the mappings around it; tell whether that was possible."""
    mapping: Any = values
    for number, part in enumerate(key[:-1]):
        inner = _get(mapping, (part,))
        if inner is None:
            inner = mapping[part] = {}
        elif isinstance(inner, str) and key[: number + 1] == ("data", "train"):
            inner = mapping[part] = {"path": inner}
        if not isinstance(inner, dict | list):
            return False
        mapping = inner
    if not isinstance(mapping, dict) or mapping.get(key[-1]) is not None:
        return False
    mapping[key[-1]] = value
    return True


def _take_out(values: dict[str, Any], key: Key) -> None:
    """Remove a key."""
    mapping: Any = _get(values, key[:-1])
    mapping.pop(key[-1], None)
