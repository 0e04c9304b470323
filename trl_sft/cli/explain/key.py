"""Explains one key: its owner, type, default and help; its value in a recipe; what became of an old name.

Inputs: a key as a user types it, and a recipe if one is named. Outputs: lines of text; the help is read from the
installed sources of the key's owner, and no heavy package is imported. Not here: values that only the machine, the
tokenizer or the rows decide.
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from trl_sft import json_output
from trl_sft.cli.explain.recipe import format_default, format_set_value, iterate_set_values
from trl_sft.errors import Fault, RecipeError
from trl_sft.recipe import build, misplaced_keys, renamed_keys, sections
from trl_sft.recipe.checked import Run
from trl_sft.recipe.upstream import fields as upstream_fields
from trl_sft.recipe.upstream import keys, nested, packages, types
from trl_sft.recipe.upstream.fields import Field
from trl_sft.recipe.yaml_reader import format_value
from trl_sft.suggestions import STRICT, nearest_name

_WIDTH = 100
_ALL_SECTIONS = (*sections.OWNERS, keys.GENERATION, keys.SOURCE)
_VERSIONED = ("trl", "transformers", "peft", "datasets")  # owners whose version is shown
# keys of `train:` that decide which nested keys exist
_DECIDING = ("lr_scheduler_type", "optim")


class KeySource(NamedTuple):
    """One key that a word can mean."""

    section: str  # `train`, `data.*`, `evaluate.generation`, or the name of a mapping: `train.lr_scheduler_kwargs`
    name: str
    field: Field | None  # None: an old name, or one that a recipe cannot set
    owner: str
    definition: str = ""  # where the help of a nested key stands

    @property
    def key(self) -> str:
        """The key as a recipe writes it."""
        return f"{self.section.replace(keys.SOURCE, 'data.train')}.{self.name}"


def is_recipe(word: str) -> bool:
    """Tell whether a word names a recipe, not a key."""
    is_file = os.path.exists(word) and not os.path.isdir(word)  # noqa: PTH110, PTH112 (pathlib raises on a long name)
    return is_file or word.endswith((".yaml", ".yml"))


def explain_key(word: str, recipe: Sequence[str] = ()) -> list[str]:
    """Return the explanation of a key, of a section, or the keys that a word can mean.

    Args:
        word: `train.packing`, `packing`, `train`, or an old name.
        recipe: A recipe and overrides; empty = show no value.

    Returns:
        Lines of text.

    Raises:
        RecipeError: There is no such key, or the recipe has faults.

    """
    run = build.load_run(recipe[0], recipe[1:]) if recipe else None
    if word in sections.OWNERS:
        return list(_explain_section(word))
    sources = _find_keys(word, run)
    if not sources:
        raise RecipeError(
            Fault(f"explain {word}", f"no section has a key `{word}`", _suggest_key(word), code="recipe.unknown_key")
        )
    json_output.add_values(keys=[_describe(source) for source in sources])
    if len(sources) > 1:
        lines = [f"{word} is a key of several sections. Name one of them:"]
        return lines + [f"  {source.key:40} {source.owner}" for source in sources]
    return list(_explain(sources[0], run))


def _describe(source: KeySource) -> dict[str, Any]:
    """Return what a key takes, as JSON has it; null for an old name and for a key that a recipe cannot set."""
    field = source.field
    return {
        "key": source.key,
        "owner": source.owner,
        "accepts": types.describe(field) if field else None,
        "default": format_default(field) if field else None,
    }


def _find_keys(word: str, run: Run | None) -> list[KeySource]:
    """Return the keys that a word means: one for `train.packing`, those of all sections for `packing`."""
    parts = [part for part in word.split(".") if not part.isdecimal() and part != "*"]
    if not parts or not all(parts):
        return []
    *path, name = parts
    if not path:
        return [source for section in _ALL_SECTIONS for source in _find_in_section(section, name)]
    if path[0] == "data" and (len(parts) == 3 or parts[1] not in keys.get_fields("data")):
        return _find_in_section(keys.SOURCE, name)
    section = ".".join(path)
    if section in _ALL_SECTIONS:
        return _find_in_section(section, name)
    return _find_nested(section, name, run)


def _find_in_section(section: str, name: str) -> list[KeySource]:
    """Return the key of a section: a current one, one of a kind of data file, an old or a refused one."""
    special_owners = {keys.GENERATION: sections.GENERATION[0], keys.SOURCE: sections.LOAD_DATASET[0]}
    owner = special_owners.get(section) or sections.OWNERS[section][0]
    fields = keys.get_fields(section)
    if name in fields:
        is_own = name in sections.OWN_KEYS.get(section, ())
        return [KeySource(section, name, fields[name], "trl_sft" if is_own else owner)]
    if section == keys.SOURCE:
        for builder in sorted(set(sections.BUILDERS.values())):
            fields = keys.get_source_fields(builder)
            if name in fields:
                return [KeySource(section, name, fields[name], f"datasets, for files of {builder}")]
    tables = (renamed_keys.renamed_in(section), sections.REFUSED.get(section, ()), sections.NOT_YET.get(section, ()))
    return [KeySource(section, name, None, owner)] if any(name in table for table in tables) else []


def _find_nested(mapping: str, name: str, run: Run | None) -> list[KeySource]:
    """Return the key of a mapping that stands under a key: `train.lr_scheduler_kwargs`, `num_cycles`."""
    section, _, key = mapping.rpartition(".")
    if section not in sections.OWNERS and section != keys.GENERATION and not _find_keys(mapping, run):
        return []
    for siblings in _list_siblings(section, run):
        fields = nested.get_nested_fields(section, key, siblings) if key else None
        if fields and name in fields.fields:
            return [KeySource(mapping, name, fields.fields[name], fields.owner_name, fields.definition)]
    return []


def _list_siblings(section: str, run: Run | None) -> Iterator[Mapping[str, Any]]:
    """Yield the other keys of a section on which nested keys depend: a run's own; without a run every choice."""
    own = run.section(section) if run is not None and section in sections.OWNERS else {}
    yield own if isinstance(own, dict) else {}
    if section == "train" and run is None:
        for key in _DECIDING:
            yield from ({key: choice} for choice in types.list_choices(keys.get_fields(section)[key]))


def _explain(source: KeySource, run: Run | None) -> Iterator[str]:
    """Yield the explanation of one key."""
    section, name, field, owner, definition = source
    package = owner.partition(".")[0]
    has_version = package in _VERSIONED and " " not in owner
    version = f" {packages.get_version(package)}" if has_version else ""
    yield f"{source.key}   ({owner}{version})"
    if name in sections.NOT_YET.get(section, ()):
        yield "  not supported by this version"
        return
    if field is None and name in renamed_keys.renamed_in(section):
        yield from _explain_old_name(source)
        return
    if refusal := sections.REFUSED.get(section, {}).get(name):
        yield f"  refused in a recipe: {refusal}"
    if field is None:
        return
    yield from _wrap(types.describe(field), "  accepts  ")
    if field.default:
        yield f"  default  {format_default(field)}"
    if reason := sections.OWN_DEFAULTS.get((section, name)):
        yield from _wrap(f"sets this key if the recipe does not: {reason}", "  trl_sft  ")
    if run is not None:
        yield from _explain_value(source, run)
    help_text = upstream_fields.read_help(definition, name) if definition else keys.get_help(section, name)
    yield ""
    yield from _wrap_paragraphs(help_text or "Upstream documents no help for this key.")
    yield from _list_nested_keys(section, name)


def _list_nested_keys(section: str, name: str) -> Iterator[str]:
    """Yield the keys of the mapping that a key takes."""
    fields = nested.get_nested_fields(section, name, {}) if section in (*sections.OWNERS, keys.GENERATION) else None
    if fields and fields.fields:
        refused = sections.REFUSED.get(f"{section}.{name}", ())
        names = ", ".join(key for key in fields.fields if key not in refused)
        yield ""
        yield from textwrap.wrap(
            f"Its keys ({fields.owner_name}): {names}", _WIDTH, initial_indent="  ", subsequent_indent="  "
        )


def _explain_old_name(source: KeySource) -> Iterator[str]:
    """Yield what became of an old name, and the explanation of the current one."""
    old = renamed_keys.renamed_in(source.section)[source.name]
    yield "  an old name" if old.new else f"  an old name: {old.reason}"
    if old.new:
        yield f"  read as  {source.section}.{old.new}"
        values = [f"{format_value(value)} as {format_value(current)}" for value, current in old.values.items()]
        if values:
            yield f"  values   {', '.join(values)}"
    elif old.no_op:
        ignored = ", ".join(format_value(value) for value in old.no_op)
        yield f"  ignored  if it is {ignored}: this means the same as leaving the key out"
    if old.fix:
        yield f"  else     {old.fix}" if old.new or old.no_op else f"  instead  {old.fix}"
    if old.new:
        for current in _find_in_section(source.section, old.new.partition(".")[0]):
            yield ""
            yield from _explain(current, None)


def _explain_value(source: KeySource, run: Run) -> Iterator[str]:
    """Yield the value that a recipe gives to a key, and who set it."""
    if source.section == keys.SOURCE:
        yield from _explain_source_values(source.name, run)
        return
    path = [*source.section.split("."), source.name]
    for set_value in iterate_set_values(run):
        depth = len(set_value.key)
        if list(set_value.key) != path[:depth]:
            continue
        value: Any = set_value.value
        for part in path[depth:]:
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None or depth == len(path):
            text = format_set_value(source.name, set_value._replace(value=value))
            yield f"  value    {text}   {set_value.set_by}"
            return
    yield "  value    not set in the recipe"


def _explain_source_values(name: str, run: Run) -> Iterator[str]:
    """Yield the value that each source of a recipe gives to a key."""
    for sources in run.sources.values():
        for source in sources:
            own = {key: getattr(source, key, None) for key in sections.OWN_KEYS[keys.SOURCE] if key != "path"}
            value = (source.load_kwargs | own).get(name)
            if value:
                yield f"  value    {format_value(value)}   {run.recipe.where((*source.key, name))}"


def _explain_section(name: str) -> Iterator[str]:
    """Yield the keys of a section, by owner."""
    owner = sections.OWNERS[name][0]
    yield f"{name}:   ({owner})"
    own = list(sections.OWN_KEYS[name])
    refused = sections.REFUSED.get(name, ())
    upstream = [key for key in keys.get_fields(name) if key not in own and key not in refused]
    for title, names in (("keys of trl_sft", own), (f"keys of {owner}", upstream)):
        if names:
            yield f"  {title}:"
            yield from textwrap.wrap(
                ", ".join(names), _WIDTH, initial_indent="    ", subsequent_indent="    ", break_long_words=False
            )
    if name == "data":
        yield f"  each source: {', '.join(sections.OWN_KEYS[keys.SOURCE])}, and the arguments of datasets.load_dataset"


def _wrap(text: str, label: str) -> list[str]:
    """Return a text in lines behind a label."""
    return textwrap.wrap(text, _WIDTH, initial_indent=label, subsequent_indent=" " * len(label))


def _wrap_paragraphs(text: str) -> Iterator[str]:
    """Yield a text in lines; the items of a list stay apart."""
    for block in re.split(r"\n\s*\n|\n(?=\s*- )", text):
        is_item = block.lstrip().startswith("- ")
        first, rest = ("    ", "      ") if is_item else ("  ", "  ")
        paragraph = " ".join(block.split())
        yield from textwrap.wrap(
            paragraph, _WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False
        )


def _suggest_key(word: str) -> str:
    """Return the key that a word most likely means, as a fix; else how to list keys."""
    section, _, last = word.rpartition(".")
    suggestion = misplaced_keys.suggest((section, last) if section in sections.OWNERS else (last,))
    if suggestion.keys:
        return misplaced_keys.ask_for([".".join(map(str, key)) for key in suggestion.keys])
    full_names: dict[str, str] = {}
    for section in reversed(_ALL_SECTIONS):
        for name in (*keys.get_fields(section), *renamed_keys.renamed_in(section)):
            full_names[name] = KeySource(section, name, None, "").key
    full_names |= {section: section for section in sections.OWNERS}
    name = nearest_name(word.rpartition(".")[2], full_names, cutoff=STRICT)
    if name:
        return f"Did you mean `{full_names[name]}`?"
    return f"Run `explain SECTION` to list the keys of a section: {', '.join(sections.OWNERS)}."
