"""What a key is, takes and became, and who set each value of a recipe.

In: a key or a recipe as typed. Out: lines of text. The owners' words are read from the installed sources
when they are shown; nothing heavy is imported. Deliberately absent: what only a machine, a tokenizer or
rows can settle; it is named as that.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trl_sft.errors import Fault, RecipeError
from trl_sft.recipe import build, renamed_keys, resolved, sections
from trl_sft.recipe import yaml_reader as reader
from trl_sft.recipe.checked import Run
from trl_sft.recipe.upstream import fields as upstream_fields
from trl_sft.recipe.upstream import keys, nested, packages, types
from trl_sft.recipe.upstream.fields import Field
from trl_sft.recipe.yaml_reader import format_value
from trl_sft.suggestions import STRICT, nearest_name

_SOURCES = ("train", "eval")  # of `data:`, which say themselves what they are
_WIDTH = 100
_EMPTY = {"dict": "{}", "list": "[]", "set": "[]"}  # default factories


class KeySource(NamedTuple):
    """One key that a word can mean."""

    section: str  # `train`, `data.*`, `evaluate.generation`, or a mapping's, `train.lr_scheduler_kwargs`
    name: str
    field: Field | None  # None: an old name
    owner: str
    definition: str = ""  # where the help of a mapping's key stands

    @property
    def key(self) -> str:
        """How a recipe writes it."""
        return f"{self.section.replace(keys.SOURCE, 'data.train')}.{self.name}"


def is_recipe(word: str) -> bool:
    """Tell whether a word names a recipe, not a key."""
    return word.endswith((".yaml", ".yml")) or Path(word).is_file()


def explain_key(word: str, recipe: Sequence[str] = ()) -> list[str]:
    """Return what is to be said of a key, with its value in a recipe where one is named with its overrides.

    Raises RecipeError where no key is called so, or the recipe cannot be read.
    """
    run = build.build_run(reader.read_recipe(recipe[0], recipe[1:])) if recipe else None
    if word in sections.OWNERS:
        return list(_section(word))
    found = _find(word, run)
    if not found:
        raise RecipeError(Fault(f"explain {word}", "no section has such a key", _near(word)))
    if len(found) > 1:
        lines = [f"{word} is a key of several sections; one of them:"]
        return lines + [f"  {one.key:40} {one.owner}" for one in found]
    said = _explained(found[0], run)
    return [resolved.remove_secrets(run, line) if run else line for line in said]  # an override's place shows it


def explain_recipe(run: Run) -> list[str]:
    """Return the whole of a run: what recipe and overrides set, with who, and the owners' defaults."""
    out = [f"{run.recipe.path.name}, as it would run. * = not the owner's default; ? = settled when it runs."]
    out += [f"  {note}" for note in run.notes]
    set_by = {line.key: line for line in _lines(run)}
    for section, (owner, _) in sections.OWNERS.items():
        given = {str(k[-1]): line for k, line in set_by.items() if k[0] == section}
        fields, off = _shown(section), section == "evaluate" and run.evaluate is None
        if off or (section in ("quantization", "lora", "launch") and not given):
            continue
        out += ["", f"{section}:  # {owner}"]
        for name, line in given.items():
            value = "(a secret)" if name in ("token", "hub_token") else format_value(line.value)
            at_default = name in fields and _default(fields[name]) == format_value(line.value)
            out.append(f"{' ' if at_default else '*'} {name}: {value}  # {line.set_by}")
        for name, said in ((n, s) for (where, n), s in sections.SETTLED.items() if where == section and n not in given):
            out.append(f"? {name}: {said}")
        rest = {n: f for n, f in fields.items() if n not in given and (section, n) not in sections.SETTLED}
        out += [f"  {name}: {_default(field)}" for name, field in rest.items()]
        own = [n for n in sections.OWN_KEYS[section] if n not in given and (section, n) not in sections.SETTLED]
        out += [f"  {name}: unset  # {sections.OWN_HELP[section][name]}" for name in own if name not in _SOURCES]
    return [resolved.remove_secrets(run, line) for line in out]


def _lines(run: Run) -> Iterator[resolved.ResolvedValue]:
    """Yield every value that was set: those of resolved.yaml, the folder, and what is this launch's alone."""
    yield from (line for line in resolved.iterate_values(run, {}) if line.key[0] != "run")
    places = run.recipe.places
    folder: reader.Key = ("train", "output_dir")
    yield resolved.ResolvedValue(
        folder, str(run.output_dir), places.get(folder, "trl_sft: runs/ and the recipe's name")
    )
    for name, value in run.options.items():
        yield resolved.ResolvedValue(("run", name), value, places[("run", name)])


def keys_with_defaults() -> tuple[str, ...]:
    """Return the sections whose owner declares a default for each key."""
    return tuple(name for name, (_, definition) in sections.OWNERS.items() if definition)


def _shown(section: str) -> dict[str, Field]:
    """Return the keys of a section whose defaults are in force: none of those that a recipe cannot hold."""
    if section not in keys_with_defaults():
        return {}
    apart = {*sections.REFUSED.get(section, ()), *sections.OWN_KEYS[section]}
    return {name: field for name, field in keys.get_fields(section).items() if name not in apart}


def _find(word: str, run: Run | None) -> list[KeySource]:
    """Return the keys that a word means: one for `train.packing`, those of all sections for `packing`."""
    parts = [part for part in word.split(".") if not part.isdecimal() and part != "*"]
    if not all(parts):
        return []
    if len(parts) < 2:
        return [found for section in _sections() for part in parts for found in _in(section, part)]
    if parts[0] == "data" and (len(parts) == 3 or parts[1] not in keys.get_fields("data")):
        return _in(keys.SOURCE, parts[-1])
    section = ".".join(parts[:-1])
    if section in _sections():
        return _in(section, parts[-1])
    above, _, name = section.rpartition(".")
    if above not in sections.OWNERS and above != keys.GENERATION and not _find(section, run):
        return []
    beside = run.section(above) if run is not None and above in sections.OWNERS else {}
    besides = [beside if isinstance(beside, dict) else {}]  # keys that depend on another: those of any of its values
    for other in ("lr_scheduler_type", "optim") if above == "train" and run is None else ():
        besides += [{other: word} for word in types.list_choices(keys.get_fields("train")[other])]
    for one in besides if name else ():
        theirs = nested.get_nested_fields(above, name, one)
        if theirs and (field := theirs.fields.get(parts[-1])):
            return [KeySource(section, parts[-1], field, theirs.owner, theirs.definition)]
    return []


def _sections() -> tuple[str, ...]:
    return (*sections.OWNERS, keys.GENERATION, keys.SOURCE)


def _in(section: str, name: str) -> list[KeySource]:
    """Return the key of a section, also of a kind of file, also an old one."""
    owner = {keys.GENERATION: sections.GENERATION[0], keys.SOURCE: sections.LOAD_DATASET[0]}
    label = owner.get(section) or sections.OWNERS[section][0]
    if name in keys.get_fields(section):
        label = "trl_sft" if name in sections.OWN_KEYS.get(section, ()) else label
        return [KeySource(section, name, keys.get_fields(section)[name], label)]
    for builder in sorted(set(sections.BUILDERS.values())) if section == keys.SOURCE else ():
        if name in keys.get_source_fields(builder):
            return [
                KeySource(section, name, keys.get_source_fields(builder)[name], f"datasets, for files of {builder}")
            ]
    gone = name in renamed_keys.renamed_in(section) or name in sections.REFUSED.get(section, ())
    return [KeySource(section, name, None, label)] if gone or name in sections.NOT_YET.get(section, ()) else []


def _explained(found: KeySource, run: Run | None) -> Iterator[str]:
    section, name, field, owner, definition = found
    package = owner.partition(".")[0]
    version = (
        f" {packages.get_version(package)}"
        if package in ("trl", "transformers", "peft", "datasets") and " " not in owner
        else ""
    )
    yield f"{found.key}   ({owner}{version})"
    if name in sections.NOT_YET.get(section, ()):
        yield "  not supported by this version"
        return
    if field is None and name in renamed_keys.renamed_in(section):
        yield from _old(found)
        return
    if (write := sections.REFUSED.get(section, {}).get(name)) is not None:
        yield f"  refused in a recipe: {write}"
    if field is None:
        return
    yield from textwrap.wrap(types.describe(field), _WIDTH, initial_indent="  takes    ", subsequent_indent=" " * 11)
    if field.default:
        yield f"  default  {_default(field)}"
    if said := sections.SETTLED.get((section, name)):
        yield f"  trl_sft  sets it where the recipe is silent: {said}"
    if run is not None:
        yield from _value(found, run)
    text = upstream_fields.read_help(definition, name) if definition else keys.get_help(section, name)
    yield ""
    yield from _paragraphs(text or "Its owner says nothing of it in the source.")
    theirs = nested.get_nested_fields(section, name, {}) if section in (*sections.OWNERS, keys.GENERATION) else None
    if theirs and theirs.fields:
        yield ""
        usable = [key for key in theirs.fields if key not in sections.REFUSED.get(f"{section}.{name}", ())]
        listed = f"Its keys ({theirs.owner}): {', '.join(usable)}"
        yield from textwrap.wrap(listed, _WIDTH, initial_indent="  ", subsequent_indent="  ")


def _old(found: KeySource) -> Iterator[str]:
    """Say what an old name became, and explain that."""
    old = renamed_keys.renamed_in(found.section)[found.name]
    yield "  an old name" if old.new else f"  an old name: {old.reason}"
    if old.new:
        yield f"  read as  {found.section}.{old.new}"
        listed = [f"{format_value(value)} as {format_value(today)}" for value, today in old.values.items()]
        if listed:
            yield f"  values   {', '.join(listed)}"
    elif old.no_op:
        values = ", ".join(format_value(value) for value in old.no_op)
        yield f"  ignored  where it is {values}: that is what happens without it"
    if old.fix:
        yield f"  else     {old.fix}" if old.new or old.no_op else f"  instead  {old.fix}"
    head = old.new.partition(".")[0]
    for one in _in(found.section, head) if head else ():
        yield ""
        yield from _explained(one, None)


def _value(found: KeySource, run: Run) -> Iterator[str]:
    """Say which value a recipe gives to a key, and who set it."""
    path = [part for part in f"{found.section}.{found.name}".split(".") if part != "*"]
    if found.section == keys.SOURCE:
        each = [source for part in run.sources.values() for source in part]
        for source in each:
            held = source.load_kwargs | {
                n: getattr(source, n, None) for n in sections.OWN_KEYS[keys.SOURCE] if n != "path"
            }
            if held.get(found.name):
                yield f"  here     {format_value(held[found.name])}   {run.recipe.where((*source.key, found.name))}"
        return
    for line in _lines(run):
        if list(line.key) == path[: len(line.key)]:
            value: Any = line.value
            for part in path[len(line.key) :]:
                value = value.get(part) if isinstance(value, dict) else None
            if value is not None or len(path) == len(line.key):
                shown = "(a secret)" if found.name in ("token", "hub_token") else format_value(value)
                yield f"  here     {shown}   {line.set_by}"
                return
    yield "  here     not in the recipe"


def _section(name: str) -> Iterator[str]:
    """Say whose keys a section takes, and which they are."""
    owner = sections.OWNERS[name][0]
    yield f"{name}:   ({owner})"
    ours = sections.OWN_KEYS[name]
    theirs = [key for key in keys.get_fields(name) if key not in ours and key not in sections.REFUSED.get(name, ())]
    for label, listed in (("keys of our own", list(ours)), (f"keys of {owner}", theirs)):
        if listed:
            yield f"  {label}:"
            indent = {"initial_indent": "    ", "subsequent_indent": "    "}
            yield from textwrap.wrap(", ".join(listed), _WIDTH, break_long_words=False, **indent)  # type: ignore[arg-type]
    if name == "data":
        yield f"  and of each source: {', '.join(sections.OWN_KEYS[keys.SOURCE])}, and what datasets.load_dataset takes"


def _default(field: Field) -> str:
    """Return a default as YAML writes it, else as its owner does."""
    if not field.default:
        return "unset"
    try:
        value = ast.literal_eval(field.default)
    except (ValueError, SyntaxError):
        return _EMPTY.get(field.default, f"{field.default} (its owner works it out)")
    return format_value(list(value) if isinstance(value, tuple | set) else value)


def _paragraphs(text: str) -> Iterator[str]:
    """Yield a text in lines; a list keeps its items apart."""
    for block in re.split(r"\n\s*\n|\n(?=\s*- )", text):
        item = block.lstrip().startswith("- ")
        first, rest = ("    ", "      ") if item else ("  ", "  ")
        words = " ".join(block.split())
        yield from textwrap.wrap(words, _WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False)


def _near(word: str) -> str:
    """Return the key that a word is nearest to, or where keys are listed."""
    name = word.rpartition(".")[2]
    known = {
        n: KeySource(s, n, None, "").key
        for s in reversed(_sections())
        for n in (*keys.get_fields(s), *renamed_keys.renamed_in(s))
    }
    known |= {section: section for section in sections.OWNERS}
    near = nearest_name(name, known, cutoff=STRICT)
    return known[near] if near else f"explain SECTION, one of {', '.join(sections.OWNERS)}, lists its keys"
