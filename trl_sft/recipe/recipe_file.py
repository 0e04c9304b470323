"""The text of a recipe file, or why the file is no recipe.

Inputs: a path as the user wrote it. Outputs: the text. Not here: which paths are refused before a file is opened
(`user_paths`), and what the text means (`yaml_reader`).
"""

from __future__ import annotations

import shlex
from pathlib import Path

from trl_sft import user_paths
from trl_sft.errors import Fault, RecipeError, first_line

_MAX_CHARACTERS = 2**20  # of a recipe
# endings of files that are no recipes, with what to do
_OTHER_FILES = {
    **dict.fromkeys(
        (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".md"),
        ("a file of rows", "Run `python -m trl_sft init MODEL {file}`, which writes a recipe for these rows."),
    ),
    ".toml": (
        "TOML",
        "Write it as YAML: `[train]` becomes `train:`, and `max_steps = 3` becomes `max_steps: 3` below it, indented.",
    ),
    ".py": ("Python", "Write the path of a recipe, a YAML file."),
    ".ipynb": ("a notebook", "Write the path of a recipe, a YAML file."),
}


def read_text(path: Path) -> str:
    """Return the text of a recipe file. Raises RecipeError if it cannot be read, or is too long for a recipe."""
    user_paths.check("", path, user_paths.FILE)
    if path.suffix.lower() in _OTHER_FILES and path.is_file():
        kind, fix = _OTHER_FILES[path.suffix.lower()]
        problem, fix = f"this is {kind}, not a recipe", fix.format(file=shlex.quote(str(path)))
        raise RecipeError(Fault(str(path), problem, fix, code="recipe.other_file"))
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MAX_CHARACTERS + 1)
    except FileNotFoundError:
        names = ", ".join(sorted(file.name for file in path.parent.glob("*.yaml"))[:5]) or "none"
        fix = f"Write the path of a recipe (*.yaml files there: {names}), or a command that `--help` lists."
        raise RecipeError(Fault(str(path), "there is no such file", fix, code="recipe.not_found")) from None
    except (OSError, UnicodeDecodeError) as error:
        problem = f"the file cannot be read: {first_line(error)}"
        raise RecipeError(Fault(str(path), problem, "Name a text file in UTF-8.", code="recipe.unreadable")) from None
    if len(text) > _MAX_CHARACTERS:
        problem = f"the file has more than {_MAX_CHARACTERS:,} characters, too many for a recipe"
        raise RecipeError(Fault(str(path), problem, "Write the path of a recipe.", code="recipe.too_long"))
    return text
