"""Reads the settings of another trainer and writes the recipe for them, with the files that it names.

Input: a file or flags of OpenRLHF, TRL, alignment-handbook, axolotl or LLaMA-Factory. Output: the text of a recipe,
checked as any recipe is, and what differs from the settings on the screen. Deliberately not here: what the settings
of a tool mean (its own module), and how they are put together (`conversion`).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_sft import console, json_output, run_folder, user_paths
from trl_sft.errors import EXIT_DONE, EXIT_MEANING_DIFFERS, EXIT_USER_ERROR, Fault, RecipeError
from trl_sft.importers import axolotl, llamafactory, llamafactory_rows, openrlhf, recipe_text, tables, trl
from trl_sft.importers.conversion import DEFAULT_PLACE, Conversion, Importer, check_recipe, convert_all
from trl_sft.importers.settings import RecipeLine, Settings, read_file
from trl_sft.recipe import paths

TOOLS = {
    "openrlhf": Importer("OpenRLHF's train_sft", "openrlhf", openrlhf.STEPS, openrlhf.list_names, flags=True),
    "trl": Importer("TRL's sft script", "trl", trl.STEPS, trl.list_names, trl.MARKS),
    "alignment-handbook": Importer(
        "alignment-handbook's sft script", "trl", trl.STEPS, trl.list_names, trl.HANDBOOK_MARKS
    ),
    "axolotl": Importer("axolotl", "axolotl", axolotl.STEPS, axolotl.list_names, axolotl.MARKS),
    "llamafactory": Importer(
        "LLaMA-Factory", "llamafactory", llamafactory.STEPS, llamafactory.list_names, llamafactory.MARKS
    ),
}


def guess_tool(file: Path) -> str:
    """Return the tool whose settings a file holds, by settings that only that tool has.

    Raises:
        RecipeError: The file cannot be read, or it fits several tools or none.
    """
    values = read_file(file).values
    scores = {tool: len(set(importer.marks) & set(values)) for tool, importer in TOOLS.items()}
    best = max(scores.values())
    tools = [tool for tool, score in scores.items() if score == best]
    if best and len(tools) == 1:
        return tools[0]
    names = tools if best else [tool for tool, importer in TOOLS.items() if not importer.flags]
    problem = f"the settings may be for {' or '.join(names)}" if best else "the settings are for none of the tools"
    fix = f"Name the tool: `import {names[0]} {file}`. The tools are {', '.join(TOOLS)}."
    raise RecipeError(Fault(str(file), problem, fix, code="import.unknown_tool"))


def read(tool: str, words: Sequence[str], dataset_info: Path | None = None) -> Settings:
    """Read the settings of a tool.

    Args:
        tool: A key of `TOOLS`.
        words: The path of its file of settings, or the flags of its command.
        dataset_info: LLaMA-Factory's dataset_info.json; None = where LLaMA-Factory looks for it.

    Raises:
        RecipeError: The settings cannot be read.
    """
    if dataset_info is not None and tool != "llamafactory":
        problem = f"{tool} has no such file, only LLaMA-Factory has"
        raise RecipeError(Fault("--dataset-info", problem, "Remove this option.", code="import.bad_arguments"))
    if TOOLS[tool].flags:
        return openrlhf.read(words)
    if len(words) != 1:
        problem = f"{len(words)} words after {tool} in place of one file"
        raise RecipeError(
            Fault("import", problem, f"Write `import {tool} FILE [-o RECIPE]`.", code="import.bad_arguments")
        )
    file = Path(words[0])
    values = read_file(file)
    return llamafactory.add_dataset_info(values, dataset_info, file.parent) if tool == "llamafactory" else values


def write(tool: str, settings: Settings, output: Path | None) -> int:
    """Print the recipe for a tool's settings, or write it to a file, with the files that it names.

    Args:
        tool: A key of `TOOLS`.
        settings: What `read` returned.
        output: A file that does not exist yet; None = print the recipe.

    Returns:
        The exit code: 0; 5 if the recipe trains something else than the settings, which the screen then says; or 2
        if the recipe has faults, which are shown. In all three cases it is written.

    Raises:
        RecipeError: No recipe can be made of the settings, or a file exists. All faults are among them.
    """
    path = output or Path("recipe.yaml")
    user_paths.check("--output", path, user_paths.FILE, is_output=True)
    stem = _get_stem(path)
    conversion = convert_all(TOOLS[tool], settings)
    companions = {path.with_name(recipe_text.name_file(file, stem)): file.text for file in conversion.files}
    for file in (path, *companions) if output is not None else ():
        if file.exists():
            fix = "Write `-o ANOTHER.yaml`, or delete the file."
            problem = "the file exists and is not overwritten"
            raise RecipeError(Fault(str(file), problem, fix, code="run.file_exists"))
    importer = TOOLS[tool]
    title = f"{importer.title} (settings of {tables.load_table(importer.table).releases})"
    lines = [_relocate_line(line, path, stem) for line in conversion.lines]
    if conversion.faults:
        known = (
            conversion.files if not any(fault.code == "import.invalid_template" for fault in conversion.faults) else []
        )
        raise RecipeError(_check(settings, conversion._replace(files=known), lines, path=path))
    faults = _check(settings, conversion, lines, path=path)
    text = recipe_text.render(title, settings, lines, omitted=conversion.omitted)
    json_output.add_values(
        output=output,
        recipe=text,
        files=[{"name": recipe_text.name_file(file, stem), "text": file.text} for file in conversion.files],
        omitted=[
            {"setting": item.full_name, "reason": item.reason, "affects": item.affects, "warn": bool(item.affects)}
            for item in conversion.omitted
        ],
    )
    if output is None:
        console.say((text + recipe_text.render_files(conversion.files, stem)).removesuffix("\n"))
    else:
        run_folder.write_text(output, text)
        for file, content in companions.items():
            run_folder.write_text(file, content)
    return _report(settings, conversion, faults, output=output, companions=list(companions))


def _check(settings: Settings, conversion: Conversion, lines: list[RecipeLine], *, path: Path) -> list[Fault]:
    """Return the faults of the settings and of the recipe; the files beside it may not exist yet."""
    with tempfile.TemporaryDirectory() as folder:
        checked = []
        for line in lines:
            value = line.value
            for file in conversion.files:
                copy = Path(folder, Path(file.name.replace("{stem}", "companion")).name)
                copy.write_text(file.text, encoding="utf-8")
                name = recipe_text.name_file(file, _get_stem(path))
                value = _replace_text(value, name, str(copy))
            checked.append(line._replace(value=value))
        recipe_faults = check_recipe(settings, checked, path)
    known = {fault.where for fault in conversion.faults}
    known |= {path.name, DEFAULT_PLACE} if known else set()  # lines may be missing
    return [*conversion.faults, *(fault for fault in recipe_faults if not fault.where.startswith(tuple(known)))]


def _report(
    settings: Settings, conversion: Conversion, faults: list[Fault], *, output: Path | None, companions: list[Path]
) -> int:
    """Say on the screen what was written, what differs and what is wrong; return the exit code."""
    differences = conversion.differences
    if differences:
        console.say_error("trl_sft: THE RECIPE DOES NOT TRAIN THE SAME AS THE SETTINGS:")
        for line in recipe_text.describe_differences(settings, differences):
            console.say_error(line)
    counts = f"{_count_settings(settings)} values became {len(conversion.lines)} lines"
    console.say_error(f"trl_sft: {counts}. Not in the recipe: {len(conversion.omitted)}. Its last comments tell why.")
    for file in companions if output is not None else ():
        console.say(f"wrote {file}, which the recipe names")
    if faults:
        console.print_faults(faults)
        if output is not None:
            console.say(
                f"wrote {output}, which has these problems. Fix the recipe, or fix the settings and import them again."
            )
        return EXIT_USER_ERROR
    if output is not None:
        console.say(f"Next: {console.get_python_command()} -m trl_sft check {output}")
    return EXIT_MEANING_DIFFERS if differences else EXIT_DONE


def _count_settings(settings: Settings) -> int:
    """Return the number of values that the user wrote into the file or the command."""
    added = (llamafactory_rows.INFO, llamafactory_rows.FOLDER)  # what is read beside a file of LLaMA-Factory
    return _count_values({name: value for name, value in settings.values.items() if name not in added})


def _count_values(settings: Any) -> int:
    """Return the number of values in settings, also inside mappings and lists."""
    items = settings.values() if isinstance(settings, dict) else settings if isinstance(settings, list) else None
    return 1 if not items else sum(_count_values(item) for item in items)


def _get_stem(recipe: Path) -> str:
    """Return the name for files beside a recipe: its own, as a name of a Python module."""
    stem = re.sub(r"\W", "_", recipe.stem)
    return f"_{stem}" if stem[0].isdigit() else stem


def _replace_text(value: Any, old: str, new: str) -> Any:
    """Return a value in which a text stands in place of another one, at any depth."""
    if isinstance(value, dict):
        return {key: _replace_text(inner, old, new) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replace_text(inner, old, new) for inner in value]
    return value.replace(old, new) if isinstance(value, str) else value


def _relocate_line(line: RecipeLine, recipe: Path, stem: str) -> RecipeLine:
    """Return a line whose paths are relative to the recipe's folder in place of the current one."""
    if line.key in (("model", "name_or_path"), ("launch", "config"), ("tokenizer", "chat_template")):
        return line._replace(value=_relocate_path(line.value, recipe, stem))
    if line.key not in (("data", "train"), ("data", "eval")):
        return line
    if isinstance(line.value, list):
        return line._replace(value=[_relocate_source(source, recipe, stem) for source in line.value])
    return line._replace(value=_relocate_source(line.value, recipe, stem))


def _relocate_source(source: Any, recipe: Path, stem: str) -> Any:
    """Return a source of rows whose path is relative to the recipe's folder."""
    if isinstance(source, dict):
        relocated = source | {"path": _relocate_path(source["path"], recipe, stem)}
        if "format" in source:
            relocated["format"] = source["format"].replace("{stem}", stem)
        return relocated
    return _relocate_path(source, recipe, stem)


def _relocate_path(value: Any, recipe: Path, stem: str) -> Any:
    """Return a path relative to the recipe's folder; a value that is no text stays as it is."""
    if not isinstance(value, str):
        return value
    if value.startswith("{stem}"):
        return value.replace("{stem}", stem)
    return paths.relative_to_file(recipe, value)
