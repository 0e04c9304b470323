"""Converts the settings of another trainer: every setting gets an outcome, and all faults are collected.

Input: the settings and the importer of their tool. Output: the lines of a recipe under today's names, the files that
stand beside it, and a reason for each setting, or each key inside one, that it does not hold. Deliberately not here:
what the settings of one tool mean (its own module), and the text of the recipe (`recipe_text`).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trl_sft.errors import Fault, RecipeError
from trl_sft.importers import recipe_parts, secret_settings, tables
from trl_sft.importers.settings import CompanionFile, OmittedSetting, Outcome, RecipeLine, Settings, join_sentences
from trl_sft.recipe import build, no_effect, renamed_keys
from trl_sft.recipe.yaml_reader import Key, Recipe, format_value

NO_VALUE = "It has no value."
DEFAULT_PLACE = "a default"  # the place of a line that comes from no setting
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_ENVIRONMENT_VARIABLE = re.compile(r"\$\{[A-Z_][A-Z0-9_]*\}")  # as the reader of recipes knows it
_EVALUATION_SETS = (("data", "eval"), ("data", "eval_fraction"))

# faults beside which no other one matters
_REFUSALS = (tables.OTHER_OBJECTIVE, "import.other_release")

_WRONG_TYPE = (AttributeError, IndexError, KeyError, TypeError, ValueError)

Step = Callable[[Settings], Iterator[Outcome]]


class Importer(NamedTuple):
    """How the settings of one tool are read."""

    title: str
    table: str  # the table of `tables` that names the releases
    steps: Sequence[Step]  # each yields the outcomes of some settings; a fault in one does not stop the others
    list_names: Callable[[], Collection[str]]  # every setting that is known
    marks: Collection[str] = ()  # settings that only a file of this tool has
    flags: bool = False  # the settings are words of a command line, not a file


class Conversion(NamedTuple):
    """What becomes of all settings."""

    lines: list[RecipeLine]
    omitted: list[OmittedSetting]
    files: list[CompanionFile]
    faults: list[Fault]

    @property
    def differences(self) -> list[OmittedSetting]:
        """The omitted settings without which something else is trained."""
        return [item for item in self.omitted if item.affects]


def convert_all(importer: Importer, settings: Settings) -> Conversion:
    """Return what becomes of every setting, with all faults.

    A setting from which nothing came is an omitted one: it has no value, it has no effect, or it is unknown.

    Raises:
        RecipeError: The settings train something else than text with supervised fine-tuning.
    """
    table = tables.load_table(importer.table)
    if refusals := table.find_refusals(settings):
        raise RecipeError(refusals)
    faults = [] if importer.flags else table.find_wrong_types(settings)  # argparse knows the types of flags
    wrong = {name for name in settings.values if any(fault.where == settings.where(name) for fault in faults)}
    readable = settings._replace(values={name: value for name, value in settings.values.items() if name not in wrong})
    outcomes: list[Outcome] = []
    for step in importer.steps:
        try:
            outcomes.extend(step(readable))  # those before an error stay
        except RecipeError as error:
            faults += [fault for fault in error.faults if fault not in faults]
        except _WRONG_TYPE:  # after a fault of a value with a wrong type, the steps that read it too cannot
            if not any(fault.code == "import.wrong_type" for fault in faults):
                raise
    refusals = [fault for fault in faults if fault.code in _REFUSALS]
    if refusals:
        raise RecipeError(refusals)
    if wrong:  # a missing setting may be one whose value has a wrong type
        faults = [fault for fault in faults if fault.code not in ("import.no_model", "import.no_rows")]
    files = [outcome for outcome in outcomes if isinstance(outcome, CompanionFile)]
    faults += list(_find_unwritable_files(settings, outcomes))
    omitted = [outcome for outcome in outcomes if isinstance(outcome, OmittedSetting)]
    lines, omitted_lines = _settle_lines(outcome for outcome in outcomes if isinstance(outcome, RecipeLine))
    omitted += omitted_lines
    names_with_outcome = {name for line in lines for name in line.names} | {item.name for item in omitted}
    omitted += [
        _explain_unused(importer, settings, name)
        for name in settings.values
        if name not in names_with_outcome and name not in wrong
    ]
    omitted = [_explain_secret(settings, item) for item in omitted]
    return Conversion(lines, list(dict.fromkeys(omitted)), files, faults)


def _find_unwritable_files(settings: Settings, outcomes: Iterable[Outcome]) -> Iterator[Fault]:
    """Yield a fault for each file beside the recipe whose text UTF-8 does not have."""
    names = {str(line.value): line.names[0] for line in outcomes if isinstance(line, RecipeLine) and line.names}
    for file in outcomes:
        if isinstance(file, CompanionFile) and _HALF_CHARACTER.search(file.text):
            problem = "the text holds half a character (a lone surrogate)"
            where = settings.where(names[file.name])
            yield Fault(where, problem, "Write the whole character.", code="import.invalid_template")


def _explain_secret(settings: Settings, item: OmittedSetting) -> OmittedSetting:
    """Return an omitted setting, with what to do if its value is a secret."""
    name = str(item.path[-1] if item.path else item.name)
    if not secret_settings.is_secret(name, settings.get_inner(item.name, item.path)):
        return item
    return item._replace(reason=join_sentences(item.reason, secret_settings.explain_secret(name)))


def _omit_secrets(lines: Iterable[RecipeLine]) -> tuple[list[RecipeLine], list[OmittedSetting]]:
    """Return the lines without secrets, and the settings that hold one."""
    remaining: list[RecipeLine] = []
    omitted: list[OmittedSetting] = []
    for line in lines:
        name, value = str(line.key[1]), secret_settings.strip_secrets(line.value)
        if secret_settings.is_secret(name, line.value):
            omitted += [OmittedSetting(setting, secret_settings.explain_secret(name)) for setting in line.names]
            continue
        if value != line.value:
            reason = "A part of the value is a secret, which the recipe does not have. Log in at its service."
            affects = "rows" if line.key[0] == "data" else "unknown"
            omitted += [OmittedSetting(setting, reason, affects) for setting in line.names[:1]]
        remaining.append(line._replace(value=value))
    return remaining, omitted


def _settle_lines(lines: Iterable[RecipeLine]) -> tuple[list[RecipeLine], list[OmittedSetting]]:
    """Return one line for each key under today's names, and the settings of lines that are not written."""
    omitted: list[OmittedSetting] = []
    current: list[RecipeLine] = []
    for line in lines:
        replaced = _translate_line(line)
        if isinstance(replaced, OmittedSetting):
            omitted += [replaced._replace(name=name) for name in line.names]
        else:
            current.append(replaced)
    merged = _merge_lines(current)
    remaining, without_effect = _omit_lines_without_effect(merged)
    remaining, secrets = _omit_secrets(remaining)
    return remaining, omitted + without_effect + secrets


def _translate_line(line: RecipeLine) -> RecipeLine | OmittedSetting:
    """Return a line under the name and value that a recipe has today; or why it is not written."""
    section, name = str(line.key[0]), str(line.key[1])
    rule = renamed_keys.renamed_in(section).get(name)
    if section == "train" and name in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        line = line._replace(key=("train", recipe_parts.get_current_name(name)))
    elif rule is not None:
        if any(line.value == value and type(line.value) is type(value) for value in rule.no_op):
            return OmittedSetting(name, f"The value {format_value(line.value)} means the same as its absence.")
        if not rule.new:
            return OmittedSetting(name, f"Upstream has removed it. {rule.fix}", "unknown")
        with contextlib.suppress(KeyError, TypeError):  # a value that the recipe's own check refuses
            value = rule.translate_value(line.value)
            outer, _, inner = rule.new.partition(".")
            if rule.below is None or (isinstance(value, int | float) and 0 <= value < rule.below):
                line = line._replace(key=(section, outer), value={inner: value} if inner else value)
    replaced = recipe_parts.translate_value(line)
    return OmittedSetting(name, replaced) if isinstance(replaced, str) else replaced


def _merge_lines(lines: Iterable[RecipeLine]) -> list[RecipeLine]:
    """Return one line for each key: the first one, or the first from a setting over a default."""
    merged: dict[Key, RecipeLine] = {}
    for line in lines:
        first = merged.get(line.key)
        if first is None:
            merged[line.key] = line
            continue
        better = line if line.names and not first.names else first
        if isinstance(line.value, dict) and isinstance(first.value, dict):  # two old names of keys of one mapping
            better = better._replace(value={**line.value, **first.value} if better is first else line.value)
        merged[line.key] = better._replace(names=first.names + line.names, note=join_sentences(better.note))
    return list(merged.values())


def _omit_lines_without_effect(lines: list[RecipeLine]) -> tuple[list[RecipeLine], list[OmittedSetting]]:
    """Return the lines without those of `train:` that have no effect; their settings are omitted with the reason."""
    train = {str(line.key[1]): line.value for line in lines if line.key[0] == "train"}
    reasons: dict[Any, str] = {}
    if not any(line.key in _EVALUATION_SETS for line in lines):
        evaluation_keys = (*no_effect.EVALUATION_KEYS, "eval_strategy", "eval_steps", "eval_on_start")
        reasons = dict.fromkeys(evaluation_keys, "It has no effect without an evaluation set.")
    for rule in no_effect.TRAIN:
        with contextlib.suppress(TypeError):  # a value of another type, which the recipe's own check refuses
            if rule.when(train):
                cause = no_effect.describe_cause(rule.cause, train)
                reasons |= dict.fromkeys(rule.keys, f"It has no effect {cause}.")
    remaining: list[RecipeLine] = []
    omitted: list[OmittedSetting] = []
    for line in lines:
        reason = reasons.get(line.key[1]) if line.key[0] == "train" and line.value is not None else None
        if reason:
            omitted += [OmittedSetting(name, reason) for name in line.names]
        else:
            remaining.append(line)
    return remaining, omitted


def _explain_unused(importer: Importer, settings: Settings, name: str) -> OmittedSetting:
    """Return the omitted setting for one that no line came from."""
    if not settings.has(name):
        return OmittedSetting(name, NO_VALUE)
    if name not in importer.list_names():
        return OmittedSetting(name, tables.explain_unknown(name, set(importer.list_names())), "unknown")
    return OmittedSetting(name, "It has no effect together with the other settings.")


def check_recipe(settings: Settings, lines: Iterable[RecipeLine], path: Path) -> list[Fault]:
    """Return the faults of the recipe, each at the place of the setting that its line came from."""
    values: dict[str, Any] = {}
    places: dict[Key, str] = {(): path.name}
    faults: list[Fault] = []
    for line in lines:
        section, name = str(line.key[0]), line.key[1]
        values.setdefault(section, {})[name] = line.value
        places[line.key] = settings.where(line.names[0]) if line.names else DEFAULT_PLACE
        if variable := _ENVIRONMENT_VARIABLE.search(format_value(line.value)):
            problem = f"{variable[0]}: a recipe does not read environment variables"
            where = f"{places[line.key]} {section}.{name}"
            fault = Fault(where, problem, "Write the value itself.", code="recipe.environment_variable")
            faults.append(fault)
    try:
        build.build_run(Recipe(path.absolute(), "", values, places, frozenset(), ()))
    except RecipeError as error:
        return [*faults, *error.faults]
    return faults
