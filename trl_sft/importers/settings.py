"""What settings of another trainer become: lines of a recipe, or words on why there is no such line.

In: the settings of a file or of a command line, by name, with the place of each. Out: `Line`s and `Left`s,
each with the names that it came from, so that `convert` can tell which names nothing came of. What each
project's names mean stands in a module of its own (`from_trl`, `from_openrlhf`, ...).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trl_sft.errors import Fault, RecipeError
from trl_sft.recipe import renamed_keys, sections, yaml_reader
from trl_sft.recipe.upstream import fields
from trl_sft.recipe.yaml_reader import Key

# YAML 1.1, which other trainers read, has more words for these two
_WORDS = {**dict.fromkeys(["yes", "on"], True), **dict.fromkeys(["no", "off"], False)}
_SECRET = re.compile(r"key|token$|_wandb$|secret|password", re.IGNORECASE)


class Given(NamedTuple):
    """Settings of another trainer as they were written."""

    values: dict[str, Any]
    where: Callable[[str], str]  # name -> `config.yaml:12 sequence_len`, or `--max_len`

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of a name; one that is null counts as not written."""
        value = self.values.get(name)
        return default if value is None else value


class RecipeLine(NamedTuple):
    """One line of a recipe."""

    key: Key  # ("train", "max_length")
    value: Any
    names: tuple[str, ...] = ()  # the settings that it came from; none = a default of the other trainer
    note: str = ""  # what its meaning changed, or whose default it is


class Left(NamedTuple):
    """A setting that is no line of the recipe."""

    name: str
    why: str
    aloud: bool = False  # said on the screen too: what is trained may differ


Item = RecipeLine | Left


def read(path: Path) -> Given:
    """Read a YAML or JSON file of settings. Raises RecipeError."""
    read = yaml_reader.read_recipe(path)
    values = {
        name: _WORDS.get(value.lower(), value) if _switch(name, value) else value for name, value in read.values.items()
    }
    return Given(values, lambda name: read.where((name,)))


def _switch(name: str, value: Any) -> bool:
    """Tell whether a text may be a yes or no of YAML 1.1; `save_strategy: no` is a word."""
    return isinstance(value, str) and not name.endswith("strategy")


def renamed(given: Given, table: Mapping[str, str], notes: Mapping[str, str]) -> Iterator[RecipeLine]:
    """Yield the settings that a table of names (old: `section.key`) carries over as they are."""
    for name, target in table.items():
        if given.get(name) is not None:
            yield RecipeLine(tuple(target.split(".")), given.values[name], (name,), notes.get(name, ""))


def left(given: Given, table: Mapping[str, str]) -> Iterator[Left]:
    """Yield the settings for which a table says why they have no equivalent."""
    yield from (Left(name, why) for name, why in table.items() if given.get(name) is not None)


def shown(name: str, value: Any) -> str:
    """Return a setting as a comment may show it; secrets and long values not."""
    if isinstance(value, str) and _SECRET.search(name):
        return f"{name}: ..."
    text = yaml_reader.format_value(value)
    return f"{name}: {text if len(text) <= 60 else text[:57] + '...'}"


def source(path: str, **keys: Any) -> Any:
    """Return one entry of `data.train`: the path alone, or with the keys that are not empty."""
    kept = {name: value for name, value in keys.items() if value not in (None, "", {}, [])}
    return {"path": path} | kept if kept else path


def train_names() -> set[str]:
    """Return the keys of `train:`, with the older names that mean the same under a newer one."""
    names = set(fields.read_fields(sections.OWNERS["train"][1]))
    return names | {
        old for old, now in renamed_keys.RENAMED_KEYS["train"].items() if now.new in names and not now.values
    }


def today(name: str) -> str:
    """Return a key of `train:` under its newer name, where the installed version has that."""
    new = renamed_keys.RENAMED_KEYS["train"][name].new
    return new if new in fields.read_fields(sections.OWNERS["train"][1]) else name


def located(path: str, files: Any, notes: list[str]) -> str:
    """Return the path of a data set that is written as a folder or a kind of file, with `data_files` beside it."""
    one = files if isinstance(files, str) else files[0] if isinstance(files, list) and len(files) == 1 else None
    if files is None:
        return path
    if one is None or not (Path(path).is_dir() or path in ("json", "csv", "parquet", "arrow", "text")):
        notes.append(f"data_files of {path}: write each of them as a path of its own")
        return path
    return str(Path(path, one)) if Path(path).is_dir() else one


def several(sources: list[Any]) -> Any:
    """Return `data.train` of so many sources."""
    return sources[0] if len(sources) == 1 else sources


def engine_of(config: Any) -> str:
    """Return the engine that a DeepSpeed configuration, a mapping or a JSON file, is for; "" where it does not say."""
    try:
        read = config if isinstance(config, dict) else json.loads(Path(config).read_text(encoding="utf-8"))
        stage = (read.get("zero_optimization") or {}).get("stage", 0)
    except (OSError, ValueError, AttributeError, TypeError):
        return ""
    return {0: "ddp", 1: "zero1", 2: "zero2", 3: "zero3"}.get(stage, "")


def refuse(given: Given, name: str, found: str, write: str) -> RecipeError:
    """Return the error of a setting that cannot be carried over, nor left out."""
    return RecipeError(Fault(given.where(name), found, write))
