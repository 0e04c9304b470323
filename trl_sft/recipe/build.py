"""Turns a recipe into a run: every key known, typed and placed, or refused with all other faults.

In: a `Recipe`. Out: a `Run`, whose dicts are keyword arguments of the owners. Deliberately absent:
names and types of the owners' keys (`owners` reads them from the installed sources) and whatever
needs torch, a tokenizer or rows.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from trl_sft import run_folder
from trl_sft.errors import Fault, RecipeError
from trl_sft.recipe import mapping, named, paths, renamed_keys, rules
from trl_sft.recipe import sections as recipe_sections
from trl_sft.recipe.checked import Run, Source
from trl_sft.recipe.upstream import keys, nested
from trl_sft.recipe.yaml_reader import Key, Recipe, describe_value, format_value

_MAIN = {"model": "name_or_path", "data": "train"}  # section -> the key that its value is, where it is a word


def build_run(recipe: Recipe) -> Run:
    """Check a recipe against the installed owners. Raises RecipeError with all faults."""
    faults: list[Fault] = []
    notes: list[str] = []
    strange = [name for name in recipe.values if name not in recipe_sections.OWNERS]
    faults += [mapping.unknown(recipe, (name,), recipe_sections.OWNERS, "") for name in strange]
    sections: dict[str, dict[str, Any]] = {}
    for name in recipe_sections.OWNERS:
        value = recipe.values.get(name)
        if name == "evaluate" and value is False:  # the one section that can be off
            value = None
        if value is not None and not isinstance(value, dict):
            meant = {_MAIN[name]: value} if name in _MAIN and isinstance(value, str) else None
            write = f"{name}: {format_value(meant)}" if meant else "keys under it, indented"
            faults.append(Fault(recipe.where((name,)), f"the section is {describe_value(value)}", write))
            value = meant  # what follows reads mappings
            recipe = dataclasses.replace(recipe, values=recipe.values | {name: meant})
        given = renamed_keys.translate(recipe, (name,), value if isinstance(value, dict) else {}, faults, notes)
        if name == "evaluate" and isinstance(asked := given.get("generation"), dict):
            given["generation"] = renamed_keys.translate(recipe, ("evaluate", "generation"), asked, faults, notes)
        sections[name] = mapping.check(recipe, (name,), given, faults)
    parts = {part: sections["data"].get(part) for part in ("train", "eval")}
    sources = {part: _sources(recipe, part, value, faults, notes) for part, value in parts.items()}
    base = named.base(recipe, sections["model"].pop("name_or_path", None), faults)
    template = named.template(recipe, sections["tokenizer"].pop("chat_template", None), faults)
    template_kwargs = sections["tokenizer"].pop("chat_template_kwargs", {})
    adapter = base is not None and bool(base.files) and paths.is_adapter(base.files[0])
    faults += rules.check(recipe, sections, sources, adapter, notes)
    for name in nested.find_missing_arguments(sections["train"]):
        found = f"lr_scheduler_type: {sections['train']['lr_scheduler_type']} needs {name}"
        faults.append(
            Fault(recipe.where(("train", "lr_scheduler_type")), found, f"lr_scheduler_kwargs: {{{name}: ...}}")
        )
    faults += rules.loss_on(recipe, sections["data"], sections["train"])
    if faults or base is None:
        raise RecipeError(sorted(faults, key=_line))
    out = sections["train"].pop("output_dir", None)
    folder = paths.make_absolute(out, Path.cwd()) if out else run_folder.default_folder(recipe.path)
    if (resume := sections["run"].get("resume", "auto")) not in ("auto", "never"):
        sections["run"]["resume"] = str(paths.make_absolute(resume, recipe.folder(("run", "resume"))))
    sections["data"] = {name: value for name, value in sections["data"].items() if name not in sources}
    absent: dict[str, Any] = {n: None for n in ("quantization", "lora") if recipe.values.get(n) is None}
    absent |= {"evaluate": None} if recipe.values.get("evaluate") is False else {}
    rest = sections | absent
    rest["options"] = rest.pop("run")
    return Run(
        recipe, folder, base, template, sources, chat_template_kwargs=template_kwargs, notes=tuple(notes), **rest
    )


def _line(fault: Fault) -> int:
    """Return the line of the recipe that a fault stands in; overrides and what is missing come last."""
    number = fault.where.partition(" ")[0].rpartition(":")[2]
    return int(number) if number.isdigit() else sys.maxsize


def _sources(recipe: Recipe, part: str, value: Any, faults: list[Fault], notes: list[str]) -> tuple[Source, ...]:
    """Return `data.train` or `data.eval`, written as a path, a mapping or a list of either."""
    if value is None:
        return ()
    found: list[Source] = []
    for i, item in enumerate(value if isinstance(value, list) else [value]):
        key: Key = ("data", part, i) if isinstance(value, list) else ("data", part)
        path = item.get("path") if isinstance(item, dict) else item
        if not isinstance(path, str):
            faults.append(
                Fault(recipe.where(key), f"a source that is {describe_value(item)}", "{path: FILE, FOLDER or HUB ID}")
            )
            continue
        at: Key = (*key, "path") if isinstance(item, dict) else key
        place = paths.resolve_location(path, recipe.folder(at), tuple(recipe_sections.BUILDERS))
        if isinstance(place, paths.LocationProblem):
            faults.append(Fault(recipe.where(at), f"{path}: {place.problem}", place.fix))
            continue
        file = place.files[0] if place.files and place.files[0].is_file() else None
        builder = (
            next(
                (
                    recipe_sections.BUILDERS[s.lower()]
                    for s in reversed(file.suffixes)
                    if s.lower() in recipe_sections.BUILDERS
                ),
                "",
            )
            if file
            else ""
        )
        if file and not builder:
            faults.append(
                Fault(recipe.where(at), f"{path}: of no known kind", f"a file of {', '.join(recipe_sections.BUILDERS)}")
            )
        given = renamed_keys.translate(recipe, key, item if isinstance(item, dict) else {"path": path}, faults, notes)
        right = mapping.check(recipe, key, given, faults, keys.get_source_fields(builder))
        if file and ".tsv" in file.name.lower():
            right.setdefault("sep", "\t")
        ours = {name: right.pop(name, None) for name in recipe_sections.OWN_KEYS["data.*"]}
        said: dict[str, Any] = {name: ours[name] or "" for name in ("format", "wording", "task")}
        code = named.function(recipe, (*key, "format"), said["format"], faults)
        said |= {"rename": ours["rename"] or {}, "weight": ours["weight"], "max_rows": ours["max_rows"]}
        found.append(Source(key, place, builder, load_kwargs=right, function=code, **said))
    return tuple(found)
