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
    rules        settings that the module of the tool reads
    omitted      {reason, a sentence without its period: settings that need no line in a recipe}
    unsupported  settings that change what is trained, and that trl_sft does not have
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

from trl_sft.importers.settings import OmittedSetting, Outcome, RecipeLine, Settings, join_sentences

UNSUPPORTED = "trl_sft does not support this setting. Check that your run does not need it."
# libyaml's loader reads a table in 3 ms, the one in Python in 16 ms
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Entry:
    """What one setting becomes."""

    key: str = ""  # `section.key` of the recipe; "" = the module of the tool reads the setting
    default: Any = None  # the tool's value where the setting is absent; None = it has none that matters
    note: str = ""  # sentences for the comment at the line: what differs between the tool and trl_sft
    group: str = ""  # the line is written only where the module asks for this group, "lora" for instance
    reason: str = ""  # sentences on why the recipe has no line for it
    warn: bool = (
        False  # what is trained may differ without it; a setting that is off (false, 0, empty) needs no warning
    )
    flag: str = ""  # the second name of a command line's flag
    type: str = "str"  # of a flag: str, int, float, or switch, which takes no value
    nargs: int | str | None = None  # of a flag, as argparse takes it


@dataclass(frozen=True)
class Table:
    """Everything that the table of one tool says."""

    tool: str
    releases: str
    read_on: datetime.date
    sources: str
    entries: Mapping[str, Entry]  # by setting
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
            if entry.reason and (settings.get(name) if entry.warn else settings.has(name)):
                yield OmittedSetting(name, entry.reason, entry.warn)


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
    rows = [
        (setting, Entry(**row) if isinstance(row, dict) else Entry(key=row))
        for setting, row in parts.pop("settings").items()
    ]
    rows += [(setting, Entry(key=f"train.{setting}")) for setting in parts.pop("train", ())]
    rows += [(setting, Entry()) for setting in parts.pop("rules", ())]
    rows += [(setting, Entry(reason=UNSUPPORTED, warn=True)) for setting in parts.pop("unsupported", ())]
    for reason, settings in parts.pop("omitted", {}).items():
        rows += [(setting, Entry(reason=f"{reason}.")) for setting in settings]
    entries = dict(rows)
    if len(entries) < len(rows):
        duplicates = sorted(setting for number, (setting, _) in enumerate(rows) if setting in dict(rows[:number]))
        raise ValueError(f"{name}.yaml: settings in two places: {', '.join(duplicates)}")
    return Table(entries=entries, **parts)
