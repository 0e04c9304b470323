"""Writes the recipe for another trainer's settings: every setting is a line of it, or a comment says why it is not.

Input: a file or flags of OpenRLHF, TRL, alignment-handbook, axolotl or LLaMA-Factory. Output: the text of a recipe,
checked as any recipe is. Deliberately not here: what the settings of a tool mean, which stands in its own module.
"""

from __future__ import annotations

import contextlib
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trl_sft import console, json_output, run_folder
from trl_sft.errors import EXIT_DONE, EXIT_USER_ERROR, Fault, RecipeError
from trl_sft.importers import axolotl, llamafactory, openrlhf, tables, trl
from trl_sft.importers.settings import OmittedSetting, Outcome, RecipeLine, Settings, format_setting, read_file
from trl_sft.recipe import build, no_effect, paths, renamed_keys, sections
from trl_sft.recipe.upstream import types
from trl_sft.recipe.yaml_reader import Key, Recipe, describe_value, format_value

_WIDTH = 120
_PLAIN_WORD = re.compile(r"(\.{0,2}/)?[A-Za-z_][\w./@+-]*")
_YAML_WORDS = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")  # of YAML 1.1 or 1.2
_EVALUATION_SETS = (("data", "eval"), ("data", "eval_fraction"))
_WRONG_TYPE = (
    AttributeError,
    KeyError,
    TypeError,
    ValueError,
    ZeroDivisionError,
)  # what a value of a wrong type raises


class Importer(NamedTuple):
    """How the settings of one tool are read."""

    title: str
    table: str  # the table of `tables` that names the releases
    convert: Callable[[Settings], Iterator[Outcome]]
    list_names: Callable[[], Collection[str]]  # every setting that is known
    flags: bool = False  # the settings are words of a command line, not a file


TOOLS = {
    "openrlhf": Importer("OpenRLHF's train_sft", "openrlhf", openrlhf.convert, openrlhf.list_names, flags=True),
    "trl": Importer("TRL's sft script", "trl", trl.convert, trl.list_names),
    "alignment-handbook": Importer("alignment-handbook's sft script", "trl", trl.convert, trl.list_names),
    "axolotl": Importer("axolotl", "axolotl", axolotl.convert, axolotl.list_names),
    "llamafactory": Importer("LLaMA-Factory", "llamafactory", llamafactory.convert, llamafactory.list_names),
}


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
    """Print the recipe for a tool's settings, or write it to a file.

    Args:
        tool: A key of `TOOLS`.
        settings: What `read` returned.
        output: A file that does not exist yet; None = print the recipe.

    Returns:
        The exit code: 0, or 2 if the recipe has faults, which are shown. The recipe is written all the same.

    Raises:
        RecipeError: No recipe can be made, or the file exists.
    """
    if output is not None and output.exists():
        fix = "Write `-o ANOTHER.yaml`, or delete the file."
        raise RecipeError(Fault(str(output), "the file exists and is not overwritten", fix, code="run.file_exists"))
    outcomes = convert_all(TOOLS[tool], settings)
    path = output or Path("recipe.yaml")
    lines = [_relocate_line(item, path) for item in outcomes if isinstance(item, RecipeLine)]
    omitted = [item for item in outcomes if isinstance(item, OmittedSetting)]
    text = render(TOOLS[tool], settings, lines, omitted=omitted)
    omissions = [{"setting": item.name, "reason": item.reason, "warn": item.warn} for item in omitted]
    json_output.add_values(output=output, recipe=text, omitted=omissions)
    for item in omitted:
        if item.warn:
            console.say_error(f"trl_sft: {settings.where(item.name)}: {item.reason}")
    if output is None:
        print(text, end="")
    else:
        run_folder.write_text(output, text)
    count = f"{len(lines)} lines. Settings that are not in it: {len(omitted)}"
    console.say_error(f"trl_sft: The recipe has {count}. The comment at its end tells why.")
    faults = check_recipe(settings, lines, path)
    if faults:
        console.print_faults(faults)
        if output is not None:
            console.say(
                f"wrote {output}, which has these problems. Fix the recipe, or fix the settings and import them again."
            )
        return EXIT_USER_ERROR
    if output is not None:
        console.say(f"Next: {console.get_python_command()} -m trl_sft check {output}")
    return EXIT_DONE


def convert_all(importer: Importer, settings: Settings) -> list[Outcome]:
    """Return what becomes of every setting.

    A setting from which nothing came is an omitted one: it has no value, it has no effect, or it is unknown.

    Raises:
        RecipeError: A value has a type that the tool does not take, or no recipe can be made of it.
    """
    try:
        outcomes = _omit_lines_without_effect(_merge_lines(importer.convert(settings)))
    except _WRONG_TYPE:
        name = _find_wrong_type(importer, settings)
        if not name:
            raise
        problem = f"the value is {describe_value(settings.get(name))}"
        raise settings.make_error(
            name, problem, "Write a value of the type that the tool takes.", code="import.wrong_type"
        ) from None
    names_with_outcome: set[str] = set()
    for outcome in outcomes:
        names_with_outcome.update(outcome.names if isinstance(outcome, RecipeLine) else [outcome.name])
    outcomes += [
        _explain_unused(importer, settings, name) for name in settings.values if name not in names_with_outcome
    ]
    return outcomes


def _explain_unused(importer: Importer, settings: Settings, name: str) -> OmittedSetting:
    """Return the omitted setting for one that no line came from."""
    if name not in importer.list_names():
        near = types.suggest(name, importer.list_names())
        fix = f"Did you mean `{near}`?" if near else "Check its name."
        return OmittedSetting(name, f"trl_sft does not know this setting. {fix}", warn=True)
    if not settings.has(name):
        return OmittedSetting(name, "It has no value.")
    return OmittedSetting(name, "It has no effect together with the other settings.")


def _merge_lines(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Return the outcomes with one line for each key: the first one, or the first from a setting over a default."""
    lines: dict[Key, RecipeLine] = {}
    omitted: list[Outcome] = []
    for outcome in outcomes:
        if isinstance(outcome, OmittedSetting):
            omitted.append(outcome)
            continue
        first = lines.get(outcome.key)
        if first is None:
            lines[outcome.key] = outcome
        else:
            better = outcome if outcome.names and not first.names else first
            lines[outcome.key] = better._replace(names=first.names + outcome.names)
    return [*lines.values(), *omitted]


def _omit_lines_without_effect(outcomes: list[Outcome]) -> list[Outcome]:
    """Return the outcomes without lines of `train:` that have no effect; their settings are omitted with the reason."""
    lines = [outcome for outcome in outcomes if isinstance(outcome, RecipeLine)]
    train = {_get_current_name(line.key): line.value for line in lines if line.key[0] == "train"}
    reasons: dict[str, str] = {}
    if not any(line.key in _EVALUATION_SETS for line in lines):
        reasons = dict.fromkeys(no_effect.EVALUATION_KEYS, "It has no effect without an evaluation set.")
    for rule in no_effect.TRAIN:
        with contextlib.suppress(TypeError):  # a value of another type, which the recipe's own check refuses
            if rule.when(train):
                cause = no_effect.describe_cause(rule.cause, train)
                reasons |= dict.fromkeys(rule.keys, f"It has no effect {cause}.")
    remaining: list[Outcome] = []
    for outcome in outcomes:
        if isinstance(outcome, OmittedSetting) or outcome.key[0] != "train" or outcome.value is None:
            remaining.append(outcome)
        elif reason := reasons.get(_get_current_name(outcome.key)):
            remaining += [OmittedSetting(name, reason) for name in outcome.names]
        else:
            remaining.append(outcome)
    return remaining


def _get_current_name(key: Key) -> str:
    """Return a key of `train:` under the name that the installed version has."""
    name = str(key[1])
    old = renamed_keys.renamed_in("train").get(name)
    return old.new if old and old.new else name


def _find_wrong_type(importer: Importer, settings: Settings) -> str:
    """Return the setting whose value has a wrong type: without it there is no error; "" = it is not one setting."""
    required = ""
    for name in settings.values:
        others = {other: value for other, value in settings.values.items() if other != name}
        try:
            list(importer.convert(settings._replace(values=others)))
        except _WRONG_TYPE:
            continue
        except RecipeError:  # every recipe needs this setting, and it may have the wrong type too
            required = name
            continue
        return name
    return required


def check_recipe(settings: Settings, lines: Iterable[RecipeLine], path: Path) -> list[Fault]:
    """Return the faults of the recipe, each at the place of the setting that its line came from."""
    values: dict[str, Any] = {}
    places: dict[Key, str] = {(): path.name}
    for line in lines:
        section, name = str(line.key[0]), line.key[1]
        values.setdefault(section, {})[name] = line.value
        places[line.key] = settings.where(line.names[0]) if line.names else "a default"
    try:
        build.build_run(Recipe(path.absolute(), "", values, places, frozenset(), ()))
    except RecipeError as error:
        return error.faults
    return []


def render(
    importer: Importer, settings: Settings, lines: Sequence[RecipeLine], *, omitted: Sequence[OmittedSetting]
) -> str:
    """Return the recipe as text, with a comment for each setting that is not in it."""
    text = [f"# Imported from {importer.title} (settings of {tables.load_table(importer.table).releases})."]
    text.append("# A comment says what differs between the two, or why a setting is not in the recipe.")
    for section in sections.OWNERS:
        section_lines = [line for line in lines if line.key[0] == section]
        if section_lines:
            text.append(f"{section}:")
        for line in section_lines:
            text += _render_line(line)
    if omitted:
        text.append("# These settings are not in the recipe:")
    for item in omitted:
        value = settings.get(item.name)
        setting = item.name if value is None else format_setting(item.name, value)
        comment = _join_lines(f"{setting} ({item.reason})")
        text += textwrap.wrap(comment, _WIDTH - 6, initial_indent="# - ", subsequent_indent="#   ")
    return "\n".join(text) + "\n"


def _render_line(line: RecipeLine) -> Iterator[str]:
    """Yield a line of the recipe with its comment beside it, or above it where both are too long for one line."""
    text = f"  {line.key[1]}: {_format_yaml(line.value)}"
    note = _join_lines(line.note)
    if note and len(f"{text}  # {note}") <= _WIDTH:
        yield f"{text}  # {note}"
        return
    yield from textwrap.wrap(note, _WIDTH - 4, initial_indent="  # ", subsequent_indent="  # ")
    if len(text) <= _WIDTH or not isinstance(line.value, dict | list):
        yield text
        return
    yield f"  {line.key[1]}:"
    is_list = isinstance(line.value, list)
    for item in line.value if is_list else [line.value]:
        pairs = (
            [f"{_format_yaml(k)}: {_format_yaml(v)}" for k, v in item.items()]
            if isinstance(item, dict)
            else [_format_yaml(item)]
        )
        for number, pair in enumerate(pairs):
            indent = "    "
            if is_list:
                indent += "- " if number == 0 else "  "
            yield f"{indent}{pair}"


def _format_yaml(value: Any) -> str:
    """Return a value on one line; a word that no reader takes for another type has no quotes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_format_yaml(k)}: {_format_yaml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_format_yaml(v) for v in value) + "]"
    if isinstance(value, str) and _PLAIN_WORD.fullmatch(value) and value.lower() not in _YAML_WORDS:
        return value
    return format_value(value)


def _join_lines(text: str) -> str:
    """Return a comment on one line."""
    return re.sub(r"\s+", " ", text).strip()


def _relocate_line(line: RecipeLine, recipe: Path) -> RecipeLine:
    """Return a line whose paths are relative to the recipe's folder in place of the current one."""
    if line.key in (("model", "name_or_path"), ("launch", "config"), ("tokenizer", "chat_template")):
        return line._replace(value=_relocate_path(line.value, recipe))
    if line.key not in (("data", "train"), ("data", "eval")):
        return line
    if isinstance(line.value, list):
        return line._replace(value=[_relocate_source(source, recipe) for source in line.value])
    return line._replace(value=_relocate_source(line.value, recipe))


def _relocate_source(source: Any, recipe: Path) -> Any:
    """Return a source of rows whose path is relative to the recipe's folder."""
    if isinstance(source, dict):
        return source | {"path": _relocate_path(source["path"], recipe)}
    return _relocate_path(source, recipe)


def _relocate_path(value: Any, recipe: Path) -> Any:
    """Return a path relative to the recipe's folder; a value that is no text stays as it is."""
    return paths.relative_to_file(recipe, value) if isinstance(value, str) else value
