"""Turns a recipe into a run: checks every key, its value and its place, and reports all faults together.

Inputs: a `Recipe`, the file as written.
Outputs: a `Run`, whose mappings are keyword arguments of the owners; or a `RecipeError` with every fault.
Not here: the names and types of the owners' keys (`upstream` reads them from the installed sources), and whatever
needs torch, a tokenizer or rows.
"""

from __future__ import annotations

import dataclasses
import itertools
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_sft import run_folder, user_paths
from trl_sft.errors import Edit, Fault, Place, RecipeError
from trl_sft.recipe import (
    corrections,
    early_stopping,
    foreign_letters,
    key_check,
    misplaced_keys,
    other_tools,
    parallelism,
    path_keys,
    paths,
    renamed_keys,
    rules,
    sections,
    yaml_reader,
)
from trl_sft.recipe.checked import Run, Setting, Source
from trl_sft.recipe.paths import FunctionLocation, Location, LocationProblem
from trl_sft.recipe.upstream import keys, nested
from trl_sft.recipe.yaml_reader import Key, Recipe, describe_value, format_value
from trl_sft.suggestions import LOOSE, is_misspelling, nearest_name

# section -> the key that a plain text in the place of the section stands for
_MAIN_KEYS = {"model": "name_or_path", "data": "train"}
_SAVE_SHEET = "Save its sheet as CSV (UTF-8), and name that file."
_UNPACK = "Unpack the archive, and name the files in it."
_OTHER_FILES = {  # suffix of a file that a recipe does not read -> what to do with it
    **dict.fromkeys((".xlsx", ".xls", ".ods"), _SAVE_SHEET),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), _UNPACK),
}
_PARTS = ("train", "eval")  # of `data:`
# Sources of a list at most: each is read, formatted, described on the screen and counted in the ledger by itself
MAX_SOURCES = 1000
# Sources without a file for which a similar name is searched: more faults are not printed
_MAX_SUGGESTIONS = 50
_MAX_FILES_OF_FOLDER = 2000  # of a folder that is a source, by which its builder is chosen


def load_run(path: str | Path, overrides: Sequence[str] = (), *, text: str | None = None) -> Run:
    """Read a recipe, and check it against the installed packages.

    Args:
        path: The YAML file.
        overrides: Texts of the form `section.key=value`.
        text: The text in place of that of the file.

    Returns:
        The checked run. Nothing is loaded.

    Raises:
        RecipeError: With every fault of the text and of its values.

    """
    return build_run(*yaml_reader.collect_faults(path, overrides, text=text))


def build_run(recipe: Recipe, faults: Sequence[Fault] = ()) -> Run:
    """Check a recipe against the installed packages.

    Args:
        recipe: The recipe as written, with its overrides.
        faults: The faults of its text. Further faults in the same lines are left out: they follow from these.

    Returns:
        The checked run. Nothing is loaded.

    Raises:
        RecipeError: With every fault of the recipe, in the order of its lines.

    """
    if tool := other_tools.recognise(recipe.values):
        raise RecipeError(_explain_other_tool(recipe, tool))
    faults_of_text, faults = list(faults), []
    notes: list[str] = []
    recipe = misplaced_keys.move(recipe, faults)
    recipe = _require_mappings(recipe, faults)
    values = {name: _check_section(recipe, name, faults=faults, notes=notes) for name in sections.OWNERS}
    sources = {
        part: _build_sources(recipe, part, values["data"].get(part), faults=faults, notes=notes) for part in _PARTS
    }
    model = _resolve_model(recipe, values["model"].pop("name_or_path", None), faults)
    chat_template = _resolve_chat_template(recipe, values["tokenizer"].pop("chat_template", None), faults)
    chat_template_kwargs = values["tokenizer"].pop("chat_template_kwargs", {})
    is_adapter = model is not None and bool(model.files) and paths.is_adapter(model.files[0])
    faults += path_keys.check(recipe, values, [source for part in _PARTS for source in sources[part]])
    implied = _apply_early_stopping(recipe, values, faults)
    implied |= parallelism.choose_settings(values["train"]) if parallelism.ACCELERATE_NAME in values["train"] else {}
    with_implied = values | {"train": early_stopping.add_settings(values["train"], implied)}
    faults += rules.check(recipe, with_implied, sources, is_adapter=is_adapter, notes=notes)
    faults += _find_missing_scheduler_arguments(recipe, values["train"])
    faults += rules.move_loss_keys(recipe, values["data"], values["train"])
    lines = {fault.where.partition(" ")[0] for fault in faults_of_text}
    faults = [*faults_of_text, *(fault for fault in faults if fault.where.partition(" ")[0] not in lines)]
    if faults or model is None:
        raise RecipeError(sorted(faults, key=_line_number))
    written = {name: recipe.values.get(name) for name in ("quantization", "lora", "evaluate")}
    return Run(
        recipe,
        _output_dir(recipe, values["train"].pop("output_dir", None)),
        model,
        chat_template,
        sources,
        model=values["model"],
        tokenizer=values["tokenizer"],
        chat_template_kwargs=chat_template_kwargs,
        quantization=values["quantization"] if written["quantization"] is not None else None,
        lora=values["lora"] if written["lora"] is not None else None,
        data={name: value for name, value in values["data"].items() if name not in _PARTS},
        train=values["train"],
        evaluate=values["evaluate"] if written["evaluate"] is not False else None,
        launch=values["launch"],
        options=_resolve_options(recipe, values["run"]),
        notes=tuple(notes),
        implied=implied,
    )


def _apply_early_stopping(recipe: Recipe, values: dict[str, dict[str, Any]], faults: list[Fault]) -> dict[Key, Setting]:
    """Return the keys of `train:` that `run.early_stopping` sets; append the faults of those that contradict it."""
    has_evaluation_set = rules.has_evaluation_set(values["data"])
    faults += early_stopping.check(recipe, values["run"], values["train"], has_evaluation_set=has_evaluation_set)
    # without an evaluation set each of them would be a fault
    return early_stopping.choose_settings(values["run"], values["train"]) if has_evaluation_set else {}


def _explain_other_tool(recipe: Recipe, tool: str) -> Fault:
    """Return the fault of a file of another trainer."""
    names = ", ".join(list(recipe.values)[:3])
    file = shlex.quote(recipe.arguments[0]) if recipe.arguments else recipe.path.name
    fix = f"Run `python -m trl_sft import {tool} {file} -o NEW.yaml`, which converts it to a recipe."
    problem = f"this is no recipe, but a file of settings for {tool} ({names}, ...)"
    return recipe.fault((), problem, fix, code="recipe.other_tool")


def _line_number(fault: Fault) -> int:
    """Return the line of the recipe in which a fault is; overrides and missing keys come last."""
    number = fault.where.partition(" ")[0].rpartition(":")[2]
    return int(number) if number.isdigit() else sys.maxsize


def _require_mappings(recipe: Recipe, faults: list[Fault]) -> Recipe:
    """Return the recipe with a mapping or null as each section; append a fault for every other value."""
    values = dict(recipe.values)
    faults += [key_check.unknown_section(recipe, name) for name in recipe.values if name not in sections.OWNERS]
    for name in sections.OWNERS:
        value = values.get(name)
        is_off = name == "evaluate" and value is False  # the one section that can be switched off
        if value is None or isinstance(value, dict) or is_off:
            continue
        problem = f"the section is {describe_value(value)}, not a mapping"
        if name in _MAIN_KEYS and isinstance(value, str):
            values[name] = {_MAIN_KEYS[name]: value}
            fix = f"Write `{name}: {format_value(values[name])}`."
            edit = Edit("set", (name,), values[name])
            faults.append(recipe.fault((name,), problem, fix, code="recipe.not_a_mapping", edits=(edit,)))
            continue
        correction = corrections.correct_section(name, value)
        values[name] = correction.value if correction else None
        fix = correction.fix if correction else f"Write the keys of `{name}:` below it, indented."
        edits = (Edit("set", (name,), correction.value),) if correction else ()
        faults.append(recipe.fault((name,), problem, fix, code="recipe.not_a_mapping", edits=edits))
    return dataclasses.replace(recipe, values=values)


def _check_section(recipe: Recipe, name: str, *, faults: list[Fault], notes: list[str]) -> dict[str, Any]:
    """Return the keys of a section, under their current names, that are known and well typed."""
    values = renamed_keys.translate(recipe, (name,), recipe.values.get(name) or {}, faults=faults, notes=notes)
    generation = values.get("generation")
    if name == "evaluate" and isinstance(generation, dict):
        key = ("evaluate", "generation")
        values["generation"] = renamed_keys.translate(recipe, key, generation, faults=faults, notes=notes)
    checked = key_check.check_section(recipe, name, values, faults=faults)
    faults[:] = [_add_edits(recipe, fault) for fault in faults]
    return checked


def _add_edits(recipe: Recipe, fault: Fault) -> Fault:
    """Return the fault of a removed key with the edits that follow its instruction, where it names another key."""
    if fault.code != "recipe.removed_key" or fault.edits or not isinstance(fault.where, Place):
        return fault
    return fault._replace(edits=misplaced_keys.replace_refused(recipe, fault.where.key, fault.fix))


def _build_sources(
    recipe: Recipe, part: str, value: Any, *, faults: list[Fault], notes: list[str]
) -> tuple[Source, ...]:
    """Return the sources of `data.train` or `data.eval`, written as a path, a mapping or a list of either."""
    if value is None:
        return ()
    if isinstance(value, list):
        entries: list[tuple[Key, Any]] = [(("data", part, number), entry) for number, entry in enumerate(value)]
    else:
        entries = [(("data", part), value)]
    if len(entries) > MAX_SOURCES:
        problem = f"the list has {len(entries):,} sources, and a recipe has at most {MAX_SOURCES:,}"
        fix = "Write files that are read alike as one source: a folder, or a pattern as in `path: rows/*.jsonl`."
        faults.append(recipe.fault(("data", part), problem, fix, code="recipe.too_many_sources"))
        return ()
    sources = [_build_source(recipe, key, entry, faults=faults, notes=notes) for key, entry in entries]
    return tuple(source for source in sources if source is not None)


def _build_source(recipe: Recipe, key: Key, entry: Any, *, faults: list[Fault], notes: list[str]) -> Source | None:
    """Return one source; None if its path is missing or does not exist."""
    values = entry if isinstance(entry, dict) else {"path": entry}
    path = values.get("path")
    if not isinstance(path, str):
        problem = f"the source is {describe_value(entry)}, which has no path"
        faults.append(
            recipe.fault(key, problem, "Write `{path: FILE}`: a file, a folder or a hub id.", code="recipe.no_path")
        )
        return None
    path_key: Key = (*key, "path") if isinstance(entry, dict) else key
    location = paths.resolve_location(
        path, recipe.folder(path_key), tuple(sections.BUILDERS), suggests=len(faults) < _MAX_SUGGESTIONS
    )
    if isinstance(location, LocationProblem):
        edits = (Edit("set", path_key, location.meant),) if location.meant else ()
        problem = f"{user_paths.shorten(path)}: {location.problem}"
        faults.append(recipe.fault(path_key, problem, location.fix, code=location.code, edits=edits))
        return None
    file = location.files[0] if location.files and location.files[0].is_file() else None
    builder = _find_builder(file) if file else ""
    if file and not builder:
        fix = _OTHER_FILES.get(file.suffix.lower(), f"Use a file that ends in one of {', '.join(sections.BUILDERS)}.")
        faults.append(
            recipe.fault(
                path_key,
                f"{user_paths.shorten(path)}: files of this type cannot be read",
                fix,
                code="data.unknown_file_type",
            )
        )
    values = renamed_keys.translate(recipe, key, values, faults=faults, notes=notes)
    folder = location.files[0] if location.files and location.files[0].is_dir() else None
    if folder and not folder.name:
        problem = f"{path} is the root of the file system"
        fix = "Name the folder that holds the rows."
        faults.append(recipe.fault(path_key, problem, fix, code="path.root_folder"))
        return None
    builder_of_keys = _find_folder_builder(folder) if folder else builder
    values = key_check.check_source(recipe, key, values, builder=builder_of_keys, faults=faults)
    if file and ".tsv" in file.name.lower():
        values.setdefault("sep", "\t")
    if file and ".md" in map(str.lower, file.suffixes) and builder == "text":  # a line of Markdown is no whole text
        values.setdefault("sample_by", "document")
    own = {name: values.pop(name, None) for name in sections.OWN_KEYS[keys.SOURCE]}
    return Source(
        key=key,
        location=location,
        builder=builder,
        format=own["format"] or "",
        wording=own["wording"] or "",
        load_kwargs=values,
        rename=own["rename"] or {},
        task=own["task"] or "",
        weight=own["weight"],
        max_rows=own["max_rows"],
        function=_resolve_format_function(recipe, (*key, "format"), own["format"] or "", faults=faults),
    )


def _find_builder(file: Path) -> str:
    """Return the builder of `datasets` that reads a file, by its last known suffix; "" = none does."""
    for suffix in reversed(file.suffixes):  # `rows.jsonl.gz`
        if suffix.lower() in sections.BUILDERS:
            return sections.BUILDERS[suffix.lower()]
    return ""


def _find_folder_builder(folder: Path) -> str:
    """Return the builder that reads most files of a folder, tables before texts; "" = it holds none, or a saved set."""
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return ""
    files = itertools.islice(folder.rglob("*"), _MAX_FILES_OF_FOLDER)
    counts = Counter(builder for file in files if (builder := _find_builder(file)) and file.name != "README.md")
    tables = [builder for builder, _ in counts.most_common() if builder != "text"]
    return next(iter(tables or counts), "")


def _resolve_format_function(recipe: Recipe, key: Key, value: str, *, faults: list[Fault]) -> FunctionLocation | None:
    """Return the user's function that `format` names; None if it names a row format, or is wrong."""
    if value in sections.FORMATS or not value:
        return None
    if ":" in value:
        location = paths.resolve_function(value, recipe.folder(key))
        if isinstance(location, FunctionLocation):
            return location
        faults.append(
            recipe.fault(key, f"{user_paths.shorten(value)}: {location.problem}", location.fix, code=location.code)
        )
        return None
    fix = f"Use one of {', '.join(sections.FORMATS)}, or your own function as FILE.py:FUNCTION."
    edits: tuple[Edit, ...] = ()
    if nearest := nearest_name(value, sections.FORMATS, cutoff=LOOSE):
        fix = f"Did you mean `{nearest}`?"
        edits = (Edit("set", key, nearest),) if is_misspelling(value, nearest, sections.FORMATS) else ()
    faults.append(
        recipe.fault(
            key,
            f"there is no format `{value}`{foreign_letters.describe(value)}",
            fix,
            code="data.unknown_format_name",
            edits=edits,
        )
    )
    return None


def _resolve_model(recipe: Recipe, value: str | None, faults: list[Fault]) -> Location | None:
    """Return the location of the model; a folder has to hold a model or an adapter."""
    key: Key = ("model", "name_or_path")
    if value is None:
        if "name_or_path" not in (recipe.values.get("model") or {}):
            fix = "Set `model.name_or_path` to a folder, a hub id or trl_sft:tiny."
            faults.append(recipe.fault(key, "the recipe names no model", fix, code="recipe.no_model"))
        return None
    location = paths.resolve_location(value, recipe.folder(key))
    if isinstance(location, LocationProblem):
        edits = (Edit("set", key, location.meant),) if location.meant else ()
        problem = f"{user_paths.shorten(value)}: {location.problem}"
        faults.append(recipe.fault(key, problem, location.fix, code=location.code, edits=edits))
        return None
    if not location.files:
        return location
    path = location.files[0]
    faults += _find_special_files(recipe, key, path)
    if not (path / "config.json").is_file() and not paths.is_adapter(path):
        problem = f"{value} is {'a folder without config.json' if path.is_dir() else 'a file'}"
        faults.append(
            recipe.fault(key, problem, "Name a folder that `save_pretrained` wrote.", code="model.invalid_folder")
        )
    if paths.is_adapter(path) and recipe.values.get("lora") is not None:
        problem = f"{value} is already an adapter, and its training continues; `lora:` would add a second adapter"
        faults.append(
            recipe.fault(
                ("lora",),
                problem,
                "Remove `lora:`, or set `model.name_or_path` to the adapter's base model.",
                code="recipe.contradiction",
            )
        )
    return location


def _find_special_files(recipe: Recipe, key: Key, folder: Path) -> list[Fault]:
    """Return a fault for each file of a model that is a pipe or a device: reading it may never end."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    problems = [(file.name, user_paths.find_problem(file, user_paths.FILE_OR_FOLDER)) for file in files]
    return [
        recipe.fault(key, f"{name}: {found.problem}", found.fix, code=found.code)
        for name, found in problems
        if found and found.code == "path.special_file"
    ]


def _resolve_chat_template(recipe: Recipe, value: str | None, faults: list[Fault]) -> Location | None:
    """Return the location of the chat template; None = the tokenizer's own."""
    if value is None:
        return None
    key: Key = ("tokenizer", "chat_template")
    location = paths.resolve_template(value, recipe.folder(key))
    if isinstance(location, LocationProblem):
        edits = (Edit("set", key, location.meant),) if location.meant else ()
        problem = f"{user_paths.shorten(value)}: {location.problem}"
        faults.append(recipe.fault(key, problem, location.fix, code=location.code, edits=edits))
        return None
    return location


def _find_missing_scheduler_arguments(recipe: Recipe, train: dict[str, Any]) -> list[Fault]:
    """Return a fault for each argument without a default that the learning rate scheduler does not get."""
    key = ("train", "lr_scheduler_type")
    return [
        recipe.fault(
            key,
            f"the scheduler {train['lr_scheduler_type']} needs the argument `{name}`",
            f"Add `lr_scheduler_kwargs: {{{name}: VALUE}}`.",
            code="recipe.needs_key",
        )
        for name in nested.find_missing_arguments(train)
    ]


def _output_dir(recipe: Recipe, value: str | None) -> Path:
    """Return the run folder; a path in the recipe is relative to the current folder, as it is for TRL."""
    return paths.make_absolute(value, Path.cwd()) if value else run_folder.default_folder(recipe.path)


def _resolve_options(recipe: Recipe, options: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of `run:`, with an absolute path of a checkpoint."""
    resume = options.get("resume", "auto")
    if resume in ("auto", "never"):
        return options
    return options | {"resume": str(paths.make_absolute(resume, recipe.folder(("run", "resume"))))}
