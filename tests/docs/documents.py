"""Reads the documents for their tests: files, code blocks, commands, recipes and links."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
# documents that are current; the change log and the log of measurements are history
GUIDES = [
    *(path for path in PAGES if path.name != "log.md"),
    *(
        ROOT / name
        for name in ("README.md", "README.zh.md", "CONTRIBUTING.md", "tests/README.md", "notebooks/README.md")
    ),
]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


class Block(NamedTuple):
    """One fenced block of a document."""

    path: Path
    line: int  # of its first line, from 1
    language: str  # "" where none is written
    text: str

    @property
    def place(self):
        """Return how a failing test names the block."""
        return f"{name_of(self.path)}:{self.line}"


def name_of(path):
    """Return the path of a document inside the repository."""
    return path.relative_to(ROOT).as_posix()


def blocks(language, paths=None):
    """Return the fenced blocks of a language, of all guides where `paths` is None."""
    matching_blocks = []
    for path in paths or GUIDES:
        text = path.read_text(encoding="utf-8")
        matches = (match for match in _BLOCK.finditer(text) if match[1] == language)
        matching_blocks += [
            Block(path, text[: match.start(2)].count("\n") + 1, language, match[2]) for match in matches
        ]
    return matching_blocks


def without_blocks(text):
    """Return a document without its fenced blocks."""
    return _BLOCK.sub("", text)


def command_lines():
    """Return (place, words) of every command of ours in shell blocks, in inline code and in the heads of recipes."""
    lines = [(block.place, line) for block in blocks("sh") for line in block.text.splitlines()]
    for path in GUIDES:
        inline = re.findall(r"`(python -m trl_sft[^`]*)`", without_blocks(path.read_text(encoding="utf-8")))
        lines += [(name_of(path), line) for line in inline]
    for path in RECIPES:
        lines += [
            (name_of(path), line) for line in re.findall(r"^# Command: (.*)$", path.read_text("utf-8"), re.MULTILINE)
        ]
    commands = []
    for place, line in lines:
        words = shlex.split(line, comments=True)
        while words and "=" in words[0]:  # a variable before the command
            words = words[1:]
        if words[1:3] == ["-m", "trl_sft"]:
            commands.append((place, words[3:]))
        elif words[:1] == ["trl_sft"]:
            commands.append((place, words[1:]))
    return commands


def make_targets():
    """Return (place, target) of every `make TARGET` in inline code and in shell blocks."""
    lines = [(block.place, line) for block in blocks("sh") for line in block.text.splitlines()]
    for path in GUIDES:
        text = without_blocks(path.read_text(encoding="utf-8"))
        lines += [(name_of(path), span) for span in re.findall(r"`(make [a-z]+)", text)]
    return [(place, line.split()[1]) for place, line in lines if line.startswith("make ")]


def links():
    """Return (document, target) of every link in all documents."""
    documents = [*GUIDES, ROOT / "docs" / "development" / "log.md", ROOT / "CHANGELOG.md"]
    return [
        (path, target)
        for path in documents
        for target in _LINK.findall(re.sub(r"`[^`\n]*`", "", without_blocks(path.read_text(encoding="utf-8"))))
    ]


def anchors(path):
    """Return the anchors of a document's headings, as the documentation and code hosts make them."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}
