"""Makes a recipe of another trainer's settings: nothing is dropped unsaid, every change of meaning stands at its line.

In: a file or flags of OpenRLHF, TRL, alignment-handbook, axolotl or LLaMA-Factory. Out: the text of a recipe,
checked as any recipe is. What the names of each project mean stands in the modules `from_*`.
"""

from __future__ import annotations

import contextlib
import re
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trl_sft import console, run_folder
from trl_sft.errors import EXIT_DONE, EXIT_USER_ERROR, Fault, RecipeError
from trl_sft.importers import axolotl, llamafactory, llamafactory_rows, openrlhf, openrlhf_flags, settings, trl
from trl_sft.importers.settings import Given, Item, Left, RecipeLine
from trl_sft.recipe import build, no_effect, paths, renamed_keys, sections
from trl_sft.recipe.upstream import types
from trl_sft.recipe.yaml_reader import Key, Recipe, describe_value, format_value

_WIDTH = 120
_BARE = re.compile(r"(\.{0,2}/)?[A-Za-z_][\w./@+-]*")
_HELD_OUT = (("data", "eval"), ("data", "eval_fraction"))
_WRONG_KIND = (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError)  # of a mapping where a text is due
_TAKEN = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")  # by YAML 1.1 or 1.2


class Tool(NamedTuple):
    """Another trainer."""

    title: str  # the versions whose names and defaults are known
    lines: Callable[[Given], Iterator[Item]]
    names: Callable[[], Collection[str]]  # all that it knows
    flags: bool = False  # its settings are words of a command line, no file


TOOLS = {
    "openrlhf": Tool("OpenRLHF's train_sft, 0.8.9 and 0.11.0", openrlhf.lines, openrlhf_flags.names, flags=True),
    "trl": Tool("TRL's sft script", trl.lines, trl.names),
    "alignment-handbook": Tool("alignment-handbook's sft script", trl.lines, trl.names),
    "axolotl": Tool("axolotl 0.19.0", axolotl.lines, axolotl.names),
    "llamafactory": Tool("LLaMA-Factory 0.9.5", llamafactory.lines, llamafactory.names),
}


def read(tool: str, words: Sequence[str], dataset_info: Path | None = None) -> Given:
    """Return the settings that the words hold or name. Raises RecipeError."""
    if dataset_info is not None and tool != "llamafactory":
        raise RecipeError(Fault("--dataset-info", f"a file of LLaMA-Factory's beside {tool}", "leave it out"))
    if TOOLS[tool].flags:
        return openrlhf_flags.read(words)
    if len(words) != 1:
        found = f"{len(words)} words after {tool}"
        raise RecipeError(Fault("import", found, f"import {tool} FILE [-o RECIPE]"))
    given = settings.read(Path(words[0]))
    if tool != "llamafactory":
        return given
    info = dataset_info or llamafactory_rows.beside(given, Path(words[0]).parent)
    return llamafactory_rows.with_datasets(given, info)


def write(tool: str, given: Given, output: Path | None) -> int:
    """Print the recipe, or write it to `output`, where nothing stands yet; return the exit code. Raises RecipeError."""
    if output is not None and output.exists():
        raise RecipeError(Fault(str(output), "exists already; it stays as it is", "-o ANOTHER.yaml"))
    items = complete(TOOLS[tool], given)
    path = output or Path("recipe.yaml")
    lines = [_placed(item, path) for item in items if isinstance(item, RecipeLine)]
    lefts = [item for item in items if isinstance(item, Left)]
    written = text(TOOLS[tool].title, given, lines, lefts)
    for item in lefts:
        if item.aloud:
            print(f"trl_sft: {given.where(item.name)}: {item.why}", file=sys.stderr)
    if output is None:
        print(written, end="")
    else:
        run_folder.write_text(output, written)
    told = f"{len(lines)} lines, {len(lefts)} settings left out (the end of the recipe says why)"
    print(f"trl_sft: {told}", file=sys.stderr)
    faults = check(given, lines, path)
    if faults:
        console.faults(faults)
        if output is not None:
            console.say(f"{output} is written all the same: mend it there, or the settings and write it anew")
        return EXIT_USER_ERROR
    if output is not None:
        console.say(f"Next: {console.python()} -m trl_sft check {output}")
    return EXIT_DONE


def complete(tool: Tool, given: Given) -> list[Item]:
    """Return what became of every setting: those of which nothing came are told too. Raises RecipeError."""
    try:
        items = _busy(_once(tool.lines(given)))
    except _WRONG_KIND:
        name = _culprit(tool, given)
        if not name:
            raise
        raise settings.refuse(
            given, name, describe_value(given.get(name)), "a value of the kind that is taken there"
        ) from None
    used = {name for item in items for name in (item.names if isinstance(item, RecipeLine) else (item.name,))}
    for name in given.values:
        if name in used:
            continue
        if name in tool.names():
            said = "says nothing" if given.get(name) is None else "changes nothing beside the other settings"
            items.append(Left(name, said))
        else:
            near = types.suggest(name, tool.names())
            items.append(Left(name, "no name that is known here" + (f"; nearest: {near}" if near else ""), aloud=True))
    return items


def _once(items: Iterable[Item]) -> list[Item]:
    """Return the items with one line for each key: a setting that was written goes before a default."""
    lines: dict[Key, RecipeLine] = {}
    others: list[Item] = []
    for item in items:
        if isinstance(item, Left):
            others.append(item)
        elif item.key not in lines:
            lines[item.key] = item
        else:
            both = lines[item.key].names + item.names
            kept = item if item.names and not lines[item.key].names else lines[item.key]
            lines[item.key] = kept._replace(names=both)
    return [*lines.values(), *others]


def _busy(items: list[Item]) -> list[Item]:
    """Return the items without the lines that change nothing beside others: these are left out, and it is said."""
    train = {_today(line.key): line.value for line in items if isinstance(line, RecipeLine) and line.key[0] == "train"}
    held_out = any(isinstance(item, RecipeLine) and item.key in _HELD_OUT for item in items)
    why = {} if held_out else dict.fromkeys(no_effect.EVALUATING, "no rows are held out")
    for rule in no_effect.TRAIN:
        with contextlib.suppress(TypeError):  # a value of another kind, which the recipe's own check tells
            if rule.when(train):
                cause = f"{rule.cause}: {train[rule.cause]}" if rule.cause in train else f"without {rule.cause}"
                why |= dict.fromkeys(rule.keys, f"it changes nothing, {cause}")
    kept: list[Item] = []
    for item in items:
        if isinstance(item, Left) or item.key[0] != "train" or _today(item.key) not in why or item.value is None:
            kept.append(item)
        else:
            kept += [Left(name, why[_today(item.key)]) for name in item.names]
    return kept


def _today(key: Key) -> str:
    """Return a key of `train:` as the installed version calls it."""
    name = str(key[1])
    old = renamed_keys.renamed_in("train").get(name)
    return old.new if old and old.new else name


def _culprit(tool: Tool, given: Given) -> str:
    """Return the setting whose value is of another kind than the tool takes: without it there is no error."""
    refused = ""
    for name in given.values:
        try:
            list(tool.lines(given._replace(values={n: v for n, v in given.values.items() if n != name})))
        except _WRONG_KIND:
            continue
        except RecipeError:  # what every recipe needs, and maybe what is wrong
            refused = name
            continue
        return name
    return refused


def check(given: Given, lines: Iterable[RecipeLine], path: Path) -> list[Fault]:
    """Return the faults of the recipe, each at the place of the setting that it came from."""
    values: dict[str, Any] = {}
    places: dict[Key, str] = {(): path.name}
    for line in lines:
        section, name = str(line.key[0]), line.key[1]
        values.setdefault(section, {})[name] = line.value
        places[line.key] = given.where(line.names[0]) if line.names else "a default"
    try:
        build.build_run(Recipe(path.absolute(), "", values, places, frozenset(), ()))
    except RecipeError as error:
        return error.faults
    return []


def text(title: str, given: Given, lines: Sequence[RecipeLine], lefts: Sequence[Left]) -> str:
    """Return the recipe as text."""
    out = [f"# From {title}. A comment says what a setting changed of its meaning, or why it is not here."]
    for section in sections.OWNERS:
        mine = [line for line in lines if line.key[0] == section]
        if mine:
            out.append(f"{section}:")
        for line in mine:
            out += _written(line)
    if lefts:
        out.append("# Left out:")
    for item in lefts:
        value = given.get(item.name)
        said = item.name if value is None else settings.shown(item.name, value)
        out += textwrap.wrap(_plain(f"{said}: {item.why}"), _WIDTH - 6, initial_indent="# - ", subsequent_indent="#   ")
    return "\n".join(out) + "\n"


def _written(line: RecipeLine) -> Iterator[str]:
    """Yield a line of the recipe with its comment beside it, or above where it is long."""
    short = f"  {line.key[1]}: {_yaml(line.value)}"
    note = _plain(line.note)
    if note and len(f"{short}  # {note}") <= _WIDTH:
        yield f"{short}  # {note}"
        return
    yield from textwrap.wrap(note, _WIDTH - 4, initial_indent="  # ", subsequent_indent="  # ")
    if len(short) <= _WIDTH or not isinstance(line.value, dict | list):
        yield short
        return
    yield f"  {line.key[1]}:"
    for item in line.value if isinstance(line.value, list) else [line.value]:
        first = "    - " if isinstance(line.value, list) else "    "
        pairs = [f"{_yaml(k)}: {_yaml(v)}" for k, v in item.items()] if isinstance(item, dict) else [_yaml(item)]
        for pair in pairs:
            yield first + pair
            first = " " * len(first)


def _yaml(value: Any) -> str:
    """Return a value on one line, words without quotes where no reader takes them for something else."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_yaml(k)}: {_yaml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_yaml(v) for v in value) + "]"
    return (
        value
        if isinstance(value, str) and _BARE.fullmatch(value) and value.lower() not in _TAKEN
        else format_value(value)
    )


def _plain(note: str) -> str:
    """Return a comment on one line."""
    return re.sub(r"\s+", " ", note).strip()


def _placed(line: RecipeLine, path: Path) -> RecipeLine:
    """Return a line whose paths, which were relative to the current folder, are as the recipe would name them."""
    if line.key == ("model", "name_or_path") or line.key in (("launch", "config"), ("tokenizer", "chat_template")):
        return line._replace(value=_seen(line.value, path))
    if line.key in (("data", "train"), ("data", "eval")):
        many = line.value if isinstance(line.value, list) else [line.value]
        placed = [s | {"path": _seen(s["path"], path)} if isinstance(s, dict) else _seen(s, path) for s in many]
        return line._replace(value=placed if isinstance(line.value, list) else placed[0])
    return line


def _seen(value: Any, path: Path) -> Any:
    return paths.relative_to_file(path, value) if isinstance(value, str) else value
