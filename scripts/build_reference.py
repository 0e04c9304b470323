"""Fill the generated parts of the documentation: keys, renamed keys, help screens, the table of modules.

In: `docs/`, and the installed packages. Out: a copy of `docs/` in another folder (build/docs-source), in which every
`<!-- generated: NAME -->` ... `<!-- end -->` is replaced by the text that this script generates. The copy is not
committed: the keys are those of the installed versions. Deliberately not here: HTML; `make docs` runs zensical on the
copy.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from trl_sft import cli, errors, fault_codes
from trl_sft.building import spec as building_spec
from trl_sft.building import spec_keys
from trl_sft.recipe import renamed_keys, sections
from trl_sft.recipe.upstream import keys, packages, types
from trl_sft.recipe.yaml_reader import format_value

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "trl_sft"
PART = re.compile(r"<!-- generated: (\w+) -->\n.*?<!-- end -->\n", re.DOTALL)
_SENTENCE = re.compile(r"(?s)(.+?(?<!e\.g)(?<!i\.e)[.:])(?:\s|$)")
_LONG = 300  # characters of an upstream help text that a table still shows


def key_sections() -> tuple[str, ...]:
    """Return every group of keys in the order of a recipe; `data.*` are the keys of one source."""
    names = list(sections.OWNERS)
    names.insert(names.index("data") + 1, keys.SOURCE)
    names.insert(names.index("evaluate") + 1, keys.GENERATION)
    return tuple(names)


def build_keys() -> str:
    """Return all keys of a recipe as tables, one for the own keys and one for the owner's keys of each section."""
    versions = ", ".join(
        f"{name} {packages.get_version(name)}" for name in ("trl", "transformers", "peft", "datasets", "torch")
    )
    lines = [f"Versions: {versions}.", ""]
    for section in key_sections():
        lines += _section(section)
    return "\n".join(lines)


def _section(section: str) -> Iterator[str]:
    """Yield the heading and the tables of one section."""
    owner = {keys.SOURCE: sections.LOAD_DATASET[0], keys.GENERATION: sections.GENERATION[0]}.get(section)
    owner = owner or sections.OWNERS[section][0]
    title = {keys.SOURCE: "One source of data.train or data.eval"}.get(section, section)
    yield from (f"### {title}", "")
    own = sections.OWN_KEYS.get(section, {})
    refused = sections.REFUSED.get(section, {})
    fields = keys.get_fields(section)
    if own:
        yield from ("Keys of trl_sft:", "", "| key | takes | |", "|---|---|---|")
        yield from (_row(section, name, with_default=False) for name in own)
        yield ""
    upstream = [name for name in fields if name not in own and name not in refused]
    if upstream:
        yield from (f"Keys of `{owner}`:", "", "| key | takes | default | |", "|---|---|---|---|")
        yield from (_row(section, name, with_default=True) for name in upstream)
        yield ""
    if refused:
        yield from ("Refused in a recipe:", "", "| key | what to do |", "|---|---|")
        yield from (f"| `{name}` | {_cell(instead)} |" for name, instead in refused.items())
        yield ""


def _row(section: str, name: str, *, with_default: bool) -> str:
    """Return one line of a table of keys."""
    field = keys.get_fields(section)[name]
    cells = [f"`{name}`", _cell(_words_as_code(types.describe(field)))]
    if with_default:
        cells.append(f"`{_cell(field.default)}`" if field.default else "")
    cells.append(_cell(_shortened(keys.get_help(section, name))))
    return "| " + " | ".join(cells) + " |"


def _words_as_code(text: str) -> str:
    """Return what a key takes, the words among which one chooses written as code."""
    return re.sub(r"(?<=one of )(.+?)(?=, or |$)", lambda words: f"`{'`, `'.join(words[1].split(', '))}`", text)


def _shortened(text: str) -> str:
    """Return the first sentence of a long help text, the whole of a short one."""
    text = " ".join(re.sub(r"\[`~?([\w.]+)`\]", r"`\1`", text).split())
    if len(text) <= _LONG:
        return text
    first = _SENTENCE.match(text)
    return first[1] if first else text[:_LONG] + " ..."


def _cell(text: str) -> str:
    """Return a text that a table and Markdown leave as it is."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    plain = [part if part.startswith("`") else re.sub(r"([<>*\[\]])", r"\\\1", part) for part in parts]
    return "".join(plain).replace("|", r"\|")


def build_renamed() -> str:
    """Return every renamed or removed key, by section, with what a recipe that has it does."""
    lines: list[str] = []
    for section, table in renamed_keys.RENAMED_KEYS.items():
        lines += [f"## {section}", "", "| old name | what happens |", "|---|---|"]
        lines += [f"| `{name}` | {_cell(_describe_old_name(section, name))} |" for name in table]
        values = [(name, olds) for (of, name), olds in renamed_keys.RENAMED_VALUES.items() if of == section]
        for name, olds in values:
            lines += [f"| `{name}: {word}` | {_cell(_describe_renamed_key(old))} |" for word, old in olds.items()]
        lines.append("")
    return "\n".join(lines)


def _describe_old_name(section: str, name: str) -> str:
    """Return in words how an old name is read with the installed versions."""
    if name in keys.get_fields(section):
        return "a name of the installed version: used as it is"
    return _describe_renamed_key(renamed_keys.RENAMED_KEYS[section][name])


def _describe_renamed_key(old: renamed_keys.RenamedKey) -> str:
    """Return in words how an old name or value is read."""
    parts = []
    if old.new and old.values:
        parts += [
            f"`{format_value(value)}` is read as `{old.new}: {format_value(today)}`"
            for value, today in old.values.items()
        ]
    elif old.new:
        parts.append(f"read as `{old.new}`")
    if old.no_op:
        values = ", ".join(f"`{format_value(value)}`" for value in old.no_op)
        parts.append(f"ignored where it is {values}, which is what happens without it")
    if old.fix:
        parts.append(f"{'otherwise ' if parts else ''}refused. {old.fix}")
    return "; ".join(parts)


def build_help() -> str:
    """Return the help screen of every command."""
    lines: list[str] = []
    for command in ("", *sorted(cli.COMMANDS)):
        screen = io.StringIO()
        with contextlib.redirect_stdout(screen), contextlib.suppress(SystemExit):
            cli.main([*([command] if command else []), "--help"])
        lines += [f"### trl_sft{f' {command}' if command else ''}", "", "```", screen.getvalue().rstrip(), "```", ""]
    return "\n".join(lines)


def modules() -> dict[str, list[Path]]:
    """Return every module of the package by its folder, the lowest folders' own modules first."""
    folders: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py"), key=lambda path: (path.parent.relative_to(PACKAGE).parts, path.name)):
        folders.setdefault(path.parent.relative_to(ROOT).as_posix(), []).append(path)
    return folders


def build_modules() -> str:
    """Return a table of all modules with the first sentence of each docstring."""
    lines: list[str] = []
    for folder, paths in modules().items():
        lines += [f"#### {folder}", "", "| module | |", "|---|---|"]
        lines += [f"| `{path.relative_to(ROOT).as_posix()}` | {_cell(purpose(path))} |" for path in paths]
        lines.append("")
    return "\n".join(lines)


def purpose(path: Path) -> str:
    """Return the first paragraph of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def build_fault_codes() -> str:
    """Return every code of a fault with its meaning, its cause and what to do, in a table for each area."""
    codes = fault_codes.read_codes()
    lines: list[str] = []
    for area in dict.fromkeys(code.partition(".")[0] for code in codes):
        lines += ["", f"### {area}", "", "| code | meaning | cause | what to do |", "|---|---|---|---|"]
        for code, kind in codes.items():
            if code.startswith(f"{area}."):
                exit_code = f" Exit code {kind.exit_code}." if kind.exit_code != errors.EXIT_USER_ERROR else ""
                cells = map(_cell, (kind.meaning + exit_code, kind.cause, kind.fix))
                lines.append(f"| `{code}` | {' | '.join(cells)} |")
    return "\n".join([f"{len(codes)} codes.", *lines, ""])


def build_spec_keys() -> str:
    """Return all keys of a spec of `build`, in a table for each section."""
    lines: list[str] = []
    for section, declared in spec_keys.SECTIONS.items():
        required = " Required." if section in spec_keys.REQUIRED else ""
        lines += [f"### {section}", "", f"{spec_keys.HELP[section]}{required}", ""]
        if not declared:
            continue
        lines += ["| key | takes | default | |", "|---|---|---|---|"]
        fields = building_spec.declare_section(section).fields
        for name, key in declared.items():
            default = "required" if key.is_required else "" if key.default is None else f"`{format_value(key.default)}`"
            takes = _words_as_code(types.describe(fields[name])) + key.describe_range()
            lines.append(f"| `{name}` | {_cell(takes)} | {default} | {_cell(key.help)} |")
        lines.append("")
    return "\n".join(lines)


PARTS: dict[str, Callable[[], str]] = {
    "spec_keys": build_spec_keys,
    "fault_codes": build_fault_codes,
    "keys": build_keys,
    "renamed": build_renamed,
    "help": build_help,
    "modules": build_modules,
}


def fill_page(text: str) -> str:
    """Return a page in which each generated part is replaced by its current text."""
    return PART.sub(lambda part: PARTS[part[1]]() + "\n", text)


def write(source: Path, target: Path) -> None:
    """Write a copy of the pages in `source` to `target`, whose earlier contents are removed."""
    shutil.rmtree(target, ignore_errors=True)
    for path in sorted(source.rglob("*.md")):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(fill_page(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write(ROOT / "docs", Path(sys.argv[1]))
