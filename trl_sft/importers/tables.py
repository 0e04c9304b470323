"""Tables of what the settings of another trainer become, as YAML files beside this module, one for each tool.

Input: the name of a table. Output: a `Table`, and what it says of a user's settings. Deliberately not here: the
meaning of settings that depend on one another, which is code in the module of the tool.

The parts of a file (a setting stands in one of them, once; an unknown part or field is an error):

    tool         what the tool is called in a comment
    releases     the releases whose source was read
    read_on      the day on which it was read
    sources      the files that were read
    settings     {setting: section.key} or {setting: the fields of `Entry`}
    train        settings that are keys of `train:` under the same name
    rules        {type: settings that the module of the tool reads}
    omitted      {reason, a sentence without its period: settings that need no line in a recipe}
    unsupported  {what a setting affects, a key of `AFFECTS`: settings that trl_sft does not have}
    refused      {reason, a sentence without its period: settings with which a file cannot be imported}
    harmless     {setting: the values that mean the same as its absence}; false, 0 and empty ones always do
    nested       {name of a mapping inside a setting: rules, omitted, unsupported, refused and harmless of its keys}
    vocabulary   {name of a mapping: {word of the tool: word of the recipe}}
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trl_sft.errors import Fault, RecipeError
from trl_sft.importers.settings import AFFECTS, OmittedSetting, Outcome, RecipeLine, Settings, join_sentences
from trl_sft.recipe.upstream import types
from trl_sft.recipe.yaml_reader import describe_value

UNSUPPORTED = "trl_sft does not support this setting. Check that your run does not need it."
OFF = "It is off, or it has its default."
UNKNOWN = "trl_sft does not know this setting."
REFUSED_FIX = "Import a file for supervised fine-tuning on text."
OTHER_OBJECTIVE = "import.other_objective"  # the code of the fault
# libyaml's loader reads a table in 3 ms, the one in Python in 16 ms
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TYPES: dict[str, tuple[type, ...]] = {
    "switch": (bool,),
    "int": (int,),
    "float": (int, float),
    "text": (str,),
    "list": (list,),
    "mapping": (dict,),
}
_TYPE_NAMES = {
    "switch": "true or false",
    "int": "a whole number",
    "float": "a number",
    "text": "text",
    "list": "a list",
    "mapping": "a mapping",
}


@dataclass(frozen=True)
class Entry:
    """What one setting becomes."""

    key: str = ""  # `section.key` of the recipe; "" = the module of the tool reads the setting
    default: Any = None  # the tool's value where the setting is absent; None = it has none that matters
    note: str = ""  # sentences for the comment at the line: what differs between the tool and trl_sft
    group: str = ""  # the line is written only where the module asks for this group, "lora" for instance
    reason: str = ""  # sentences on why the recipe has no line for it
    affects: str = ""  # what of the training differs without it, a key of `AFFECTS`; "" = nothing
    refused: bool = False  # a file in which it is on cannot be imported
    harmless: tuple[Any, ...] = ()  # values that mean the same as its absence
    type: str = ""  # the types of its value with `|` between them; "" = the recipe's own check knows it
    flag: str = ""  # the second name of a command line's flag
    nargs: int | str | None = None  # of a flag, as argparse takes it

    def is_off(self, value: Any) -> bool:
        """Return whether a value means the same as the absence of the setting."""
        return not value or any(value == other and type(value) is type(other) for other in self.harmless)

    def has_type(self, value: Any) -> bool:
        """Return whether the tool takes a value of this type."""
        if not self.type or value is None:
            return True
        for name in self.type.split("|"):
            if isinstance(value, _TYPES[name]) and (name == "switch" or not isinstance(value, bool)):
                return True
        return False

    def describe_type(self) -> str:
        """Return the types as words: `true or false, or text`."""
        return ", or ".join(_TYPE_NAMES[name] for name in self.type.split("|"))


@dataclass(frozen=True)
class Table:
    """Everything that the table of one tool says."""

    tool: str
    releases: str
    read_on: datetime.date
    sources: str
    entries: Mapping[str, Entry]  # by setting
    nested: Mapping[str, Mapping[str, Entry]] = field(default_factory=dict)  # by the name of a mapping, then by key
    vocabulary: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)

    @property
    def default_note(self) -> str:
        """The comment at a line that the user did not write."""
        return f"This is {self.tool}'s default."

    def get_value(self, settings: Settings, name: str) -> Any:
        """Return the value of a setting, or the tool's default."""
        return settings.get(name, self.entries[name].default)

    def list_group(self, name: str) -> list[tuple[str, Entry]]:
        """Return the settings of one group."""
        return [(setting, entry) for setting, entry in self.entries.items() if entry.group == name]

    def make_line(self, settings: Settings, key: str, name: str, *, value: Any = None, note: str = "") -> RecipeLine:
        """Return the line of the recipe for one setting or for its default.

        Args:
            settings: The user's settings.
            key: `section.key` of the recipe.
            name: The setting.
            value: The value to write; None = the setting's own, or the tool's default.
            note: Sentences for the comment.
        """
        names = (name,) if settings.has(name) else ()
        value = self.get_value(settings, name) if value is None else value
        note = join_sentences(note, "" if names else self.default_note)
        return RecipeLine(tuple(key.split(".")), value, names, note)

    def make_lines(self, settings: Settings, group: str = "") -> Iterator[RecipeLine]:
        """Yield the lines of one group, or of no group: for settings with a value, and for the tool's defaults."""
        for name, entry in self.list_group(group):
            if entry.key and (settings.has(name) or entry.default is not None):
                yield self.make_line(settings, entry.key, name, note=entry.note)

    def make_outcomes(self, settings: Settings) -> Iterator[Outcome]:
        """Yield the lines that belong to no group, and the settings that need no line."""
        yield from self.make_lines(settings)
        for name, entry in self.entries.items():
            if entry.reason and settings.has(name) and not entry.refused:
                yield _omit(name, entry, settings.get(name))

    def find_refusals(self, settings: Settings) -> list[Fault]:
        """Return a fault for each setting with which the file cannot be imported."""
        return [
            _refuse(settings, entry, name)
            for name, entry in self.entries.items()
            if entry.refused and not entry.is_off(settings.get(name))
        ]

    def find_wrong_types(self, settings: Settings) -> list[Fault]:
        """Return a fault for each setting whose value has a type that the tool does not take."""
        return _find_wrong_types(settings, self.entries, settings.values)

    def audit(
        self, part: str, settings: Settings, name: str, *, path: tuple[str | int, ...] = ()
    ) -> Iterator[OmittedSetting]:
        """Yield what becomes of each key of a mapping inside a setting, except of the keys that the module reads.

        Args:
            part: The name of the mapping in `nested`.
            settings: The user's settings.
            name: The setting.
            path: Leads from its value to the mapping.

        Raises:
            RecipeError: A key makes an import impossible, or its value has a wrong type.
        """
        entries = self.nested[part]
        values = settings.get_inner(name, path)
        faults = _find_wrong_types(settings, entries, values, place=(name, *path))
        for key, value in values.items():
            entry = entries.get(key)
            inner = (*path, key)
            if value is None:
                continue
            if entry is None:
                yield OmittedSetting(name, explain_unknown(key, entries), "unknown", inner)
            elif entry.refused and not entry.is_off(value):
                faults.append(_refuse(settings, entry, name, path=inner))
            elif entry.reason:
                yield _omit(name, entry, value, path=inner)
        if faults:
            raise RecipeError(faults)


def explain_unknown(name: Any, known: Mapping[str, Entry] | set[str]) -> str:
    """Return the reason for a setting that is not known, with the name that is nearest to it."""
    near = types.suggest(str(name), list(known))
    return f"{UNKNOWN} {f'Did you mean `{near}`?' if near else 'Check its name.'}"


def _omit(name: str, entry: Entry, value: Any, *, path: tuple[str | int, ...] = ()) -> OmittedSetting:
    """Return the omitted setting for an entry with a reason."""
    if entry.affects and entry.is_off(value):
        return OmittedSetting(name, OFF, "", path)
    return OmittedSetting(name, entry.reason, entry.affects, path)


def _refuse(settings: Settings, entry: Entry, name: str, *, path: tuple[str | int, ...] = ()) -> Fault:
    """Return the fault of a setting with which a file cannot be imported."""
    problem = f"the value is {describe_value(settings.get_inner(name, path))}. {entry.reason}"
    return Fault(settings.where(name, *path), problem.rstrip("."), REFUSED_FIX, code=OTHER_OBJECTIVE)


def _find_wrong_types(
    settings: Settings, entries: Mapping[str, Entry], values: Mapping[str, Any], *, place: tuple[str | int, ...] = ()
) -> list[Fault]:
    """Return a fault for each of the values whose type is wrong; `place` leads to them."""
    faults = []
    for name, value in values.items():
        entry = entries.get(name)
        if entry is not None and not entry.has_type(value):
            fix = f"Write {entry.describe_type()}."
            where = settings.where(*place, name)
            faults.append(Fault(where, f"the value is {describe_value(value)}", fix, code="import.wrong_type"))
    return faults


def get_path(name: str) -> Path:
    """Return the file of a table."""
    return Path(__file__).with_name(f"{name}.yaml")


@functools.cache
def load_table(name: str) -> Table:
    """Return a table.

    Args:
        name: A YAML file beside this module, without its ending.

    Raises:
        TypeError: The file has a part or a field that does not exist, or lacks one that must be there.
        ValueError: A setting stands in two places.
    """
    parts = yaml.load(get_path(name).read_text(encoding="utf-8"), Loader=_Loader)
    entries = _read_entries(name, parts)
    nested = {part: _read_entries(f"{name}.yaml, {part}", dict(rows)) for part, rows in parts.pop("nested", {}).items()}
    return Table(entries=entries, nested=nested, **parts)


def _read_entries(name: str, parts: dict[str, Any]) -> dict[str, Entry]:
    """Take the parts of a file, or of one of its nested mappings, that hold settings, and return their entries."""
    rows = [
        (setting, Entry(**row) if isinstance(row, dict) else Entry(key=row))
        for setting, row in parts.pop("settings", {}).items()
    ]
    rows += [(setting, Entry(key=f"train.{setting}")) for setting in parts.pop("train", ())]
    harmless = parts.pop("harmless", {})
    for kind, settings in parts.pop("rules", {}).items():
        rows += [(setting, Entry(type="" if kind == "any" else kind)) for setting in settings]
    for affects, settings in parts.pop("unsupported", {}).items():
        if affects not in AFFECTS:
            raise ValueError(f"{name}.yaml: {affects} is no key of AFFECTS")
        rows += [
            (setting, Entry(reason=UNSUPPORTED, affects=affects, harmless=tuple(harmless.pop(setting, ()))))
            for setting in settings
        ]
    for reason, settings in parts.pop("omitted", {}).items():
        rows += [(setting, Entry(reason=f"{reason}.")) for setting in settings]
    for reason, settings in parts.pop("refused", {}).items():
        rows += [
            (setting, Entry(reason=f"{reason}.", refused=True, harmless=tuple(harmless.pop(setting, ()))))
            for setting in settings
        ]
    if harmless:
        raise ValueError(f"{name}.yaml: harmless values of settings that are neither unsupported nor refused")
    entries = dict(rows)
    if len(entries) < len(rows):
        duplicates = sorted(setting for number, (setting, _) in enumerate(rows) if setting in dict(rows[:number]))
        raise ValueError(f"{name}.yaml: settings in two places: {', '.join(duplicates)}")
    return entries
