"""Turns a recipe into a run: every key known, typed and placed, or refused with all other faults.

In: a `Recipe`. Out: a `Run`, whose dicts are keyword arguments of the owners. Deliberately absent:
names and types of the owners' keys (`owners` reads them from the installed sources) and whatever
needs torch, a tokenizer or rows.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_sft import named, owners, paths, rules, rundir, surface
from trl_sft.errors import Fault, RecipeError
from trl_sft.owners import Field
from trl_sft.recipe import Key, Recipe, kind
from trl_sft.run import Run, Source

_BUILDERS = {
    **{".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv"},
    **{".parquet": "parquet", ".arrow": "arrow", ".txt": "text"},
}


def build(recipe: Recipe) -> Run:
    """Check a recipe against the installed owners. Raises RecipeError with all faults."""
    faults: list[Fault] = []
    notes: list[str] = []
    strange = [name for name in recipe.values if name not in surface.OWNERS]
    faults += [_unknown(recipe, (name,), surface.OWNERS, "") for name in strange]
    sections: dict[str, dict[str, Any]] = {}
    for name in surface.OWNERS:
        value = recipe.values.get(name)
        if name == "evaluate" and value is False:  # the one section that can be off
            value = None
        if value is not None and not isinstance(value, dict):
            faults.append(Fault(recipe.where((name,)), f"the section is {kind(value)}", "keys under it, indented"))
        keys = _renamed(recipe, name, dict(value) if isinstance(value, dict) else {}, faults, notes)
        sections[name] = _section(recipe, (name,), keys, keyword_fields(name), faults)
    sources = {part: _sources(recipe, part, sections["data"].get(part), faults) for part in ("train", "eval")}
    base = named.base(recipe, sections["model"].pop("name_or_path", None), faults)
    template = named.template(recipe, sections["tokenizer"].pop("chat_template", None), faults)
    template_kwargs = sections["tokenizer"].pop("chat_template_kwargs", {})
    generation = sections["evaluate"].get("generation") or {}
    key: Key = ("evaluate", "generation")
    _section(recipe, key, generation, owners.popped(surface.GENERATION[1]), faults)
    adapter = base is not None and bool(base.files) and (base.files[0] / "adapter_config.json").is_file()
    faults += rules.check(recipe, sections, sources, adapter, notes)
    faults += rules.loss_on(recipe, sections["data"], sections["train"])
    if faults or base is None:
        raise RecipeError(sorted(faults, key=_line))
    out = sections["train"].pop("output_dir", None)
    folder = paths.absolute(out, Path.cwd()) if out else rundir.default(recipe.path)
    if (resume := sections["run"].get("resume", "auto")) not in ("auto", "never"):
        sections["run"]["resume"] = str(paths.absolute(resume, recipe.folder(("run", "resume"))))
    sections["data"] = {name: value for name, value in sections["data"].items() if name not in sources}
    absent: dict[str, Any] = {n: None for n in ("quantization", "lora") if recipe.values.get(n) is None}
    absent |= {"evaluate": None} if recipe.values.get("evaluate") is False else {}
    given = sections | absent
    return Run(recipe, folder, base, template, sources, template_kwargs=template_kwargs, notes=tuple(notes), **given)


def keyword_fields(section: str) -> dict[str, Field]:
    """Return all keys of a section with their types: the owner's, and ours."""
    definition = surface.OWNERS[section][1]
    theirs = owners.fields(definition) if definition else {}
    ours = surface.KEYWORDS.get(section, {}) | surface.OWN_KEYS[section]
    return theirs | {name: owners.typed(name, annotation) for name, annotation in ours.items()}


def source_fields(builder: str) -> dict[str, Field]:
    """Return all keys of one source: ours, those of `datasets.load_dataset` and of its builder."""
    config = f"datasets.packaged_modules.{builder}.{builder}:{builder.capitalize()}Config"
    theirs = owners.fields(config) if builder else {}
    call = {n: f for n, f in owners.arguments(surface.LOAD_DATASET[1]).items() if n != "path"}
    return theirs | call | {n: owners.typed(n, a) for n, a in surface.OWN_KEYS["data.*"].items()}


def _line(fault: Fault) -> int:
    """Return the line of the recipe that a fault stands in; overrides and what is missing come last."""
    number = fault.where.partition(" ")[0].rpartition(":")[2]
    return int(number) if number.isdigit() else sys.maxsize


def _section(
    recipe: Recipe, key: Key, values: dict[Any, Any], fields: dict[str, Field], faults: list[Fault]
) -> dict[str, Any]:
    """Return the keys of one mapping that are right; note the others as faults."""
    right: dict[str, Any] = {}
    name = str(key[0]) if len(key) == 1 else "generation" if key[0] == "evaluate" else "data.*"
    refused = surface.REFUSED.get(name, {})
    for word, value in values.items():
        here = (*key, word)
        if word in refused:
            faults.append(Fault(recipe.where(here), f"{word} does not belong here", refused[word]))
        elif word in surface.NOT_YET.get(name, ()) or word not in fields:
            usable = {n: f for n, f in fields.items() if n not in refused}
            faults.append(_unknown(recipe, here, usable, name))
        elif value is None and here in recipe.overridden and not owners.accepts(fields[word], None):
            continue  # `key=null` on the command line takes the key out
        elif not owners.accepts(fields[word], value):
            faults.append(Fault(recipe.where(here), kind(value), owners.expected(fields[word])))
        else:
            right[word] = value
    return right


def _unknown(recipe: Recipe, key: Key, fields: Mapping[str, object], name: str) -> Fault:
    """Return the fault of a key that is not known, with the nearest name or the section that owns it."""
    word = str(key[-1])
    owners_too = {"generation": surface.GENERATION, "data.*": surface.LOAD_DATASET}
    owner = f"`{key[0]}:` ({(surface.OWNERS | owners_too)[name][0]})" if name else "the top of a recipe"
    if word in surface.NOT_YET.get(name, ()):
        return Fault(recipe.where(key), f"{word} is not built in this version", "leave it out")
    owning = [s for s in surface.OWNERS if s != key[0] and word in keyword_fields(s)]
    near = difflib.get_close_matches(word, list(fields), 1, 0.75)
    if owning and not near:
        return Fault(recipe.where(key), f"{owner} has no key {word}", f"it under `{owning[0]}:`")
    few = f"one of {', '.join(sorted(fields))}" if len(fields) < 20 else f"a key of {owner.partition('(')[2][:-1]}"
    write = near[0] if near else few
    return Fault(recipe.where(key), f"{owner} has no key {word}", write)


def _renamed(
    recipe: Recipe, section: str, values: dict[Any, Any], faults: list[Fault], notes: list[str]
) -> dict[Any, Any]:
    """Return the values under today's names; a line in `notes` for each that changed."""
    fields = keyword_fields(section)
    for old, (new, below) in surface.RENAMES.get(section, {}).items():
        if old not in values or old in fields:
            continue
        value, where = values.pop(old), recipe.where((section, old))
        if new in values:
            faults.append(Fault(where, f"{old} is today's {new}, which stands there too", "one of the two"))
        elif below is not None and not (isinstance(value, int | float) and 0 <= value < below):
            faults.append(Fault(where, kind(value), f"a number from 0 to below {below:g}, or {new}"))
        else:
            values[new] = value
            recipe.places.setdefault((section, new), recipe.places[(section, old)])
            notes.append(f"{where}: read as {new}: {value} (its name today)")
    return values


def _sources(recipe: Recipe, part: str, value: Any, faults: list[Fault]) -> tuple[Source, ...]:
    """Return `data.train` or `data.eval`, written as a path, a mapping or a list of either."""
    if value is None:
        return ()
    found: list[Source] = []
    for i, item in enumerate(value if isinstance(value, list) else [value]):
        key: Key = ("data", part, i) if isinstance(value, list) else ("data", part)
        path = item.get("path") if isinstance(item, dict) else item
        if not isinstance(path, str):
            faults.append(Fault(recipe.where(key), f"a source that is {kind(item)}", "{path: FILE, FOLDER or HUB ID}"))
            continue
        at: Key = (*key, "path") if isinstance(item, dict) else key
        place = paths.resolve(path, recipe.folder(at), tuple(_BUILDERS))
        if isinstance(place, paths.Absent):
            faults.append(Fault(recipe.where(at), f"{path}: {place.found}", place.write))
            continue
        file = place.files[0] if place.files and place.files[0].is_file() else None
        builder = (
            next((_BUILDERS[s.lower()] for s in reversed(file.suffixes) if s.lower() in _BUILDERS), "") if file else ""
        )
        if file and not builder:
            faults.append(Fault(recipe.where(at), f"{path}: of no known kind", f"a file of {', '.join(_BUILDERS)}"))
        keys = dict(item) if isinstance(item, dict) else {"path": path}
        right = _section(recipe, key, keys, source_fields(builder), faults)
        if file and ".tsv" in file.name.lower():
            right.setdefault("sep", "\t")
        ours = {name: right.pop(name, None) for name in surface.OWN_KEYS["data.*"]}
        said: dict[str, Any] = {name: ours[name] or "" for name in ("format", "wording", "task")}
        code = named.function(recipe, (*key, "format"), said["format"], faults)
        said |= {"rename": ours["rename"] or {}, "weight": ours["weight"], "max_rows": ours["max_rows"]}
        found.append(Source(key, place, builder, load=right, code=code, **said))
    return tuple(found)
