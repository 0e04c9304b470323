"""The checked recipe, as data: the keyword arguments of each owner, and the package's own settings.

Inputs and outputs: none; `build.build_run` makes these objects, everything else reads them.
Not here: any work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from trl_sft.recipe.paths import FunctionLocation, Location
from trl_sft.recipe.yaml_reader import Key, Recipe


class Setting(NamedTuple):
    """One value that this package sets, and the reason."""

    value: Any
    reason: str


@dataclass(frozen=True)
class Source:
    """One entry of `data.train` or `data.eval`.

    Attributes:
        key: Where the recipe has it: `("data", "train", 0)`.
        location: The files, the folder or the hub id.
        builder: Builder of `datasets.load_dataset`: json, csv, ...; "" = the folder or the hub id itself.
        format: Name of a row format, or the user's function as written; "" = recognise it from the columns.
        wording: Name of a wording, or a template for each field; "" = chat where the tokenizer has a template.
        load_kwargs: Further keyword arguments of `datasets.load_dataset`.
        rename: Column of the file -> column that the format expects.
        task: Task of all its rows; "" = a column says it, or there is none.
        weight: Share of the rows of an epoch, relative to the other sources; None = by number of rows.
        max_rows: Number of rows to sample with the run's seed; None = all.
        function: The user's function that `format` names.

    """

    key: Key
    location: Location
    builder: str
    format: str
    wording: str | dict[str, str]
    load_kwargs: dict[str, Any]
    rename: dict[str, str]
    task: str
    weight: float | None
    max_rows: int | None
    function: FunctionLocation | None

    @property
    def name(self) -> str:
        """The name of the source in messages."""
        files = self.location.files
        if not files:
            return self.location.name
        return files[0].name + (f" and {len(files) - 1} more" if len(files) > 1 else "")


@dataclass(frozen=True)
class Run:
    """A checked recipe.

    The mappings hold keyword arguments of the section's owner (see `sections.OWNERS`), without our own keys
    that stand in a field of their own here.

    Attributes:
        recipe: The recipe as written.
        output_dir: The run folder, absolute.
        model_location: `model.name_or_path`.
        chat_template: `tokenizer.chat_template`: a .jinja file, or another tokenizer; None = the tokenizer's own.
        sources: The entries of `data.train` and `data.eval`, under "train" and "eval".
        chat_template_kwargs: `tokenizer.chat_template_kwargs`.
        quantization: None = no such section.
        lora: None = no such section.
        data: Our own keys of `data:`, without the sources.
        evaluate: None = `evaluate: false`.
        launch: `config` is a mapping, or an absolute path.
        options: The section `run:`.
        notes: Lines for the user: keys that were translated, and keys that have no effect.
        implied: Values that follow from another key (`run.early_stopping`), each with the reason.

    """

    recipe: Recipe
    output_dir: Path
    model_location: Location
    chat_template: Location | None
    sources: dict[str, tuple[Source, ...]]
    model: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    data: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    evaluate: dict[str, Any] | None = field(default_factory=dict)
    launch: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    implied: dict[Key, Setting] = field(default_factory=dict)

    def section(self, name: str) -> dict[str, Any] | None:
        """Return the keyword arguments of a section by its name in the recipe: `train`, `run`; None = off."""
        values: dict[str, Any] | None = getattr(self, "options" if name == "run" else name)
        return values
