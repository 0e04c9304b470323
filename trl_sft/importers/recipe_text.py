"""Writes a recipe as text: what differs from the settings first, then its lines, then what is not in it.

Input: the lines and the omitted settings of a conversion. Output: YAML with comments, and the block of differences
for the screen. Deliberately not here: which setting becomes what (`conversion`).
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from trl_sft.console import escape_control_characters
from trl_sft.importers.settings import (
    AFFECTS,
    CompanionFile,
    OmittedSetting,
    RecipeLine,
    Settings,
    format_setting,
)
from trl_sft.recipe import sections
from trl_sft.recipe.yaml_reader import format_value

_WIDTH = 120
_PLAIN_WORD = re.compile(r"(\.{0,2}/)?[A-Za-z_][\w./@+-]*")
# what a YAML file cannot hold, and what would change how a terminal shows a text; inside quotation marks only
_NOT_PRINTABLE = re.compile("[\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff\ud800-\udfff]")
_YAML_WORDS = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")  # of YAML 1.1 or 1.2


class _Entry(NamedTuple):
    """Omitted settings that share a name (apart from numbers), a value and a reason."""

    label: str  # `datasets.*.shards: 20`
    reason: str
    affects: str
    number: int
    where: str  # the place of the first one


def _group(settings: Settings, omitted: Iterable[OmittedSetting]) -> list[_Entry]:
    """Return one entry for omitted settings that differ only in the number of their data set."""
    groups: dict[tuple[str, str, str], list[OmittedSetting]] = {}
    for item in omitted:
        pattern = ".".join("*" if isinstance(part, int) else str(part) for part in (item.name, *item.path))
        label = _format_item(settings, item, pattern)
        groups.setdefault((label, item.reason, item.affects), []).append(item)
    entries = []
    for (pattern, reason, affects), items in groups.items():
        label = pattern if len(items) > 1 else _format_item(settings, items[0], items[0].full_name)
        where = settings.where(items[0].name, *items[0].path)
        entries.append(_Entry(label, reason, affects, len(items), where))
    return entries


def _format_item(settings: Settings, item: OmittedSetting, name: str) -> str:
    """Return a setting with its value; its name alone where it has none."""
    value = settings.get_inner(item.name, item.path)
    return name if value is None else format_setting(name, value)


def describe_differences(settings: Settings, differences: Sequence[OmittedSetting]) -> Iterator[str]:
    """Yield the lines of the screen that say what the recipe does not train as the settings do."""
    for affects in AFFECTS:
        for entry in _group(settings, [item for item in differences if item.affects == affects]):
            count = f" ({entry.number} times)" if entry.number > 1 else ""
            place = entry.where.split(" ")[0]
            place = "" if place.startswith("--") or place in entry.label else f"{place} "
            yield from _wrap(f"{place}{entry.label}{count}", f"  {affects:<10} ")
            yield from _wrap(entry.reason, " " * 13 + "-> ")


def _wrap(text: str, indent: str) -> list[str]:
    """Return a text as lines of at most 120 characters, all indented as far as the first."""
    return textwrap.wrap(
        _join_lines(text),
        _WIDTH,
        initial_indent=indent,
        subsequent_indent=" " * len(indent),
        break_long_words=False,
        break_on_hyphens=False,
    )


def render(
    title: str,
    settings: Settings,
    lines: Sequence[RecipeLine],
    *,
    omitted: Sequence[OmittedSetting],
) -> str:
    """Return the recipe as text, with a comment for each setting that is not in it.

    Args:
        title: The tool and the releases that were read.
        settings: The user's settings.
        lines: The lines of the recipe.
        omitted: Settings that are no line.
    """
    text = [f"# Imported from {title}."]
    differences = [item for item in omitted if item.affects]
    if differences:
        text.append("# THE RECIPE DOES NOT TRAIN THE SAME AS THE SETTINGS:")
    for affects in AFFECTS:
        for entry in _group(settings, [item for item in differences if item.affects == affects]):
            text += _comment(f"{affects}: {_describe(entry)}")
    text.append("# A comment says what differs between the two, or why a setting is not in the recipe.")
    for section in sections.OWNERS:
        section_lines = [line for line in lines if line.key[0] == section]
        if section_lines:
            text.append(f"{section}:")
        for line in section_lines:
            text += _render_line(line)
    quiet = _group(settings, [item for item in omitted if not item.affects])
    if quiet:
        text.append("# These settings are not in the recipe, which trains the same without them:")
    by_reason: dict[str, list[_Entry]] = {}
    for entry in quiet:
        by_reason.setdefault(entry.reason, []).append(entry)
    for reason, entries in by_reason.items():
        labels = ", ".join(f"{entry.label}{_describe_count(entry)}" for entry in entries)
        text += _comment(f"{labels} ({reason})")
    return "\n".join(text) + "\n"


def render_files(files: Iterable[CompanionFile], stem: str) -> str:
    """Return the files beside a recipe as comments, for a recipe that is printed."""
    text: list[str] = []
    for file in files:
        text.append(f"# Write these lines, without the sign and the space before them, to {name_file(file, stem)}:")
        text += [f"# {line}" for line in file.text.splitlines()]
    return "".join(f"{line}\n" for line in text)


def name_file(file: CompanionFile, stem: str) -> str:
    """Return the name of a file beside the recipe."""
    return file.name.replace("{stem}", stem)


def _describe(entry: _Entry) -> str:
    """Return an entry on one line."""
    return f"{entry.label}{_describe_count(entry)} ({entry.reason})"


def _describe_count(entry: _Entry) -> str:
    """Return how many settings an entry stands for; "" = one."""
    return f" in {entry.number} places" if entry.number > 1 else ""


def _comment(text: str) -> list[str]:
    """Return the lines of one item of a list in a comment."""
    return textwrap.wrap(
        _join_lines(text),
        _WIDTH - 6,
        initial_indent="# - ",
        subsequent_indent="#   ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _render_line(line: RecipeLine) -> Iterator[str]:
    """Yield a line of the recipe with its comment beside it, or above it where both are too long for one line."""
    name = _format_yaml(line.key[1])
    text = f"  {name}: {_format_yaml(line.value)}"
    note = _join_lines(line.note)
    if note and len(f"{text}  # {note}") <= _WIDTH:
        yield f"{text}  # {note}"
        return
    yield from textwrap.wrap(note, _WIDTH - 4, initial_indent="  # ", subsequent_indent="  # ")
    if len(text) <= _WIDTH or not isinstance(line.value, dict | list):
        yield text
        return
    yield f"  {name}:"
    is_list = isinstance(line.value, list)
    for item in line.value if is_list else [line.value]:
        pairs = [_format_yaml(item)]
        if isinstance(item, dict):
            pairs = [f"{_format_yaml(k)}: {_format_yaml(v)}" for k, v in item.items()]
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
    return _NOT_PRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", format_value(value))


def _join_lines(text: str) -> str:
    """Return a comment on one line, with its control characters as codes."""
    return escape_control_characters(re.sub(r"\s+", " ", text).strip())
