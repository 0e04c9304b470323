"""The checked recipe, as data: for each owner its keyword arguments, and what is ours.

`schema.build` is the only maker. No work is done here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from trl_sft.recipe.paths import Code, Place
from trl_sft.recipe.yaml_reader import Key, Recipe


class Setting(NamedTuple):
    """One value that we set, and why."""

    value: Any
    reason: str


@dataclass(frozen=True)
class Source:
    """One entry of `data.train` or `data.eval`."""

    key: Key
    place: Place
    builder: str  # of `datasets.load_dataset`; "" = the folder or the hub id itself
    format: str  # "" = recognise it from the columns
    wording: str | dict[str, str]  # "" = chat where the tokenizer has a template
    load: dict[str, Any]  # further keywords of `datasets.load_dataset`
    rename: dict[str, str]  # column of the file -> name that formatting knows
    task: str  # of all its rows; "" = a column says it, or nothing
    weight: float | None  # its share of an epoch's rows, beside those of the others; None = by size
    max_rows: int | None  # so many of its rows, drawn with the run's seed; None = all
    code: Code | None  # the user's function that `format` names

    @property
    def name(self) -> str:
        """How messages call the source."""
        files = self.place.files
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        return files[0].name + more if files else self.place.name


@dataclass(frozen=True)
class Run:
    """A checked recipe."""

    recipe: Recipe
    output_dir: Path
    base: Place  # model.name_or_path
    template: Place | None  # tokenizer.chat_template: a .jinja file, or another tokenizer; None = the tokenizer's own
    sources: dict[str, tuple[Source, ...]]  # "train", "eval"
    model: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # tokenizer.chat_template_kwargs
    quantization: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    data: dict[str, Any] = field(default_factory=dict)  # our own keys, less the sources
    train: dict[str, Any] = field(default_factory=dict)  # keywords of trl.SFTConfig
    evaluate: dict[str, Any] | None = field(default_factory=dict)  # metrics, max_rows, generation; None = off
    launch: dict[str, Any] = field(default_factory=dict)  # engine, config (a mapping, or an absolute path), torchrun's
    run: dict[str, Any] = field(default_factory=dict)  # resume, overwrite, allow, max_hours
    notes: tuple[str, ...] = ()  # what was translated, a line each
