"""Settings of another trainer, and what each of them becomes: a line of a recipe, or a reason for its absence.

Input: a YAML or JSON file of settings. Output: `Settings`. The module of a tool converts them to `RecipeLine`s and
`OmittedSetting`s. Each of these names its settings, so that `writer` finds the settings without a result.
Deliberately not here: what a setting means.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from trl_sft.errors import Fault, RecipeError
from trl_sft.recipe import yaml_reader
from trl_sft.recipe.yaml_reader import Key

# YAML 1.1, which the other trainers read, has more words for true and false than YAML 1.2
_YAML_1_1 = {"yes": True, "on": True, "no": False, "off": False}
_SECRET = re.compile(r"key|token$|_wandb$|secret|password", re.IGNORECASE)
_LONGEST_VALUE = 60  # characters of a value in a comment


class Settings(NamedTuple):
    """Settings of another trainer as the user wrote them."""

    values: dict[str, Any]
    where: Callable[[str], str]  # name -> its place: `config.yaml:12 sequence_len`, or `--max_len`

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

    def make_error(self, name: str, problem: str, fix: str, *, code: str) -> RecipeError:
        """Return the error of a setting that can neither become a line nor be omitted."""
        return RecipeError(Fault(self.where(name), problem, fix, code=code))


class RecipeLine(NamedTuple):
    """One line of a recipe."""

    key: Key  # ("train", "max_length")
    value: Any
    names: tuple[str, ...] = ()  # the settings that it came from; none = a default of the other trainer
    note: str = ""  # sentences for the comment


class OmittedSetting(NamedTuple):
    """A setting that is no line of the recipe."""

    name: str
    reason: str  # sentences
    warn: bool = False  # what is trained may differ: the screen shows it too


Outcome = RecipeLine | OmittedSetting


def read_file(path: Path) -> Settings:
    """Read a YAML or JSON file of settings.

    Raises:
        RecipeError: The file cannot be read.
    """
    file = yaml_reader.read_recipe(path)
    values = {name: _read_switch(name, value) for name, value in file.values.items()}
    return Settings(values, lambda name: file.where((name,)))


def _read_switch(name: str, value: Any) -> Any:
    """Return true or false for a word of YAML 1.1, except where "no" is a word: `save_strategy: no`."""
    if not isinstance(value, str) or name.endswith("strategy"):
        return value
    return _YAML_1_1.get(value.lower(), value)


def join_sentences(*notes: str) -> str:
    """Return the notes that are not empty, each once, as one text."""
    return " ".join(dict.fromkeys(note for note in notes if note))


def format_setting(name: str, value: Any) -> str:
    """Return a setting as a comment shows it: long values are shortened, secrets are hidden."""
    if isinstance(value, str) and _SECRET.search(name):
        return f"{name}: ..."
    text = yaml_reader.format_value(value)
    return f"{name}: {text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + '...'}"
