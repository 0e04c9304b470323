"""Settings of another trainer, and what each of them becomes: a line, a file beside the recipe, or a reason.

Input: a YAML or JSON file of settings. Output: `Settings`. The module of a tool converts them to `RecipeLine`s and
`OmittedSetting`s. Each of these names its settings, so that `writer` finds the settings without a result.
Deliberately not here: what a setting means.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trl_sft import redaction
from trl_sft.errors import Fault, RecipeError
from trl_sft.importers import secret_settings
from trl_sft.recipe import yaml_reader
from trl_sft.recipe.yaml_reader import Key

# YAML 1.1, which the other trainers read, has more words for true and false than YAML 1.2
_YAML_1_1 = {"yes": True, "on": True, "no": False, "off": False}
_NUMBER_OF_YAML_1_1 = re.compile(r"[-+]?[0-9][0-9_]*")  # it also allows an underscore between digits
_MAX_DEPTH = 50  # levels of mappings and lists in a setting
_MAX_DIGITS = 400  # of a number; Python refuses to read several thousand

# What of the training a setting that is not in the recipe would change, in the order of the screen
AFFECTS = {
    "rows": "which rows are trained or evaluated, and how many there are in a step",
    "wording": "the text of a row",
    "mask": "which tokens carry loss",
    "objective": "what is minimized",
    "weights": "which weights are trained, and how they are updated",
    "unknown": "trl_sft does not know what it changes",
}


class Settings(NamedTuple):
    """Settings of another trainer as the user wrote them."""

    values: dict[str, Any]
    where: Callable[..., str]  # a name, and keys inside its value -> its place: `config.yaml:12 sequence_len`

    def has(self, name: str) -> bool:
        """Return whether a setting has a value; null counts as none."""
        return self.values.get(name) is not None

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of a setting, or the default where it has none."""
        value = self.values.get(name)
        return default if value is None else value

    def list_present(self, *names: str) -> tuple[str, ...]:
        """Return the settings among these that have a value."""
        return tuple(name for name in names if self.has(name))

    def list_enabled(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the settings among these whose value is neither false, zero nor empty."""
        return tuple(name for name in names if self.get(name))

    def get_inner(self, name: str, path: Sequence[str | int]) -> Any:
        """Return a value inside the value of a setting; None if there is none."""
        value: Any = self.values.get(name)
        for part in path:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    def make_error(
        self, name: str, problem: str, fix: str, *, code: str, path: Sequence[str | int] = ()
    ) -> RecipeError:
        """Return the error of a setting that can neither become a line nor be omitted; `path` leads into its value."""
        return RecipeError(Fault(self.where(name, *path), problem, fix, code=code))


class RecipeLine(NamedTuple):
    """One line of a recipe."""

    key: Key  # ("train", "max_length")
    value: Any
    names: tuple[str, ...] = ()  # the settings that it came from; none = a default of the other trainer
    note: str = ""  # sentences for the comment


class OmittedSetting(NamedTuple):
    """A setting, or a part of its meaning, that is no line of the recipe."""

    name: str
    reason: str  # sentences
    affects: str = ""  # a key of `AFFECTS`: what is trained differs without it; "" = nothing of it
    path: tuple[str | int, ...] = ()  # leads into the value of the setting: (0, "shards") of `datasets`

    @property
    def full_name(self) -> str:
        """The setting with the keys that lead into its value: `datasets.0.shards`."""
        return ".".join(map(str, (self.name, *self.path)))


class CompanionFile(NamedTuple):
    """A file that the recipe names and that stands beside it; `{stem}` in `name` is the name of the recipe."""

    name: str  # `{stem}.jinja`
    text: str


Outcome = RecipeLine | OmittedSetting | CompanionFile


def read_file(path: Path) -> Settings:
    """Read a YAML or JSON file of settings.

    Raises:
        RecipeError: The file cannot be read.
    """
    file, faults = yaml_reader.collect_faults(path)
    # a setting may name a variable that only the tool, or nobody, reads; a line of the recipe may not
    faults = [fault for fault in faults if fault.code != "recipe.environment_variable"]
    if faults:
        raise RecipeError(faults)
    keys = {str(key): key for key in file.values}  # a key may be a number, the name of a setting is a text

    def where(name: str, *path: str | int) -> str:
        return file.where((keys.get(name, name), *path))

    values: dict[str, Any] = {}
    for name, key in keys.items():
        try:
            check_depth(file.values[key])
            values[name] = _read_yaml_1_1(name, file.values[key])
        except OverflowError:
            problem = f"the values are nested more than {_MAX_DEPTH} levels deep"
            fault = Fault(where(name), problem, "Nest the values less deeply.", code="recipe.too_deep")
            raise RecipeError(fault) from None
    secret_settings.register_secrets(values)
    return Settings(values, where)


def check_depth(value: Any, depth: int = 0) -> None:
    """Raise OverflowError for values that are nested too deeply to be shown."""
    if depth > _MAX_DEPTH:
        raise OverflowError
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        check_depth(inner, depth + 1)


def _read_yaml_1_1(name: str, value: Any) -> Any:
    """Return true, false or a number for a word of YAML 1.1, except where "no" is a word: `save_strategy: no`."""
    if isinstance(value, dict):
        return {key: _read_yaml_1_1(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_read_yaml_1_1(name, inner) for inner in value]
    if not isinstance(value, str) or name.endswith("strategy"):
        return value
    if "_" in value and len(value) < _MAX_DIGITS and _NUMBER_OF_YAML_1_1.fullmatch(value):
        return int(value)
    return _YAML_1_1.get(value.lower(), value)


def join_sentences(*notes: str) -> str:
    """Return the notes that are not empty, each once, as one text."""
    return " ".join(dict.fromkeys(note for note in notes if note))


def format_setting(name: str, value: Any) -> str:
    """Return a setting as a comment shows it; secrets are left out."""
    if secret_settings.is_secret(name.rpartition(".")[2], value):
        return f"{name}: {redaction.REDACTED}"
    return f"{name}: {redaction.redact_shapes(yaml_reader.format_value(value))}"
