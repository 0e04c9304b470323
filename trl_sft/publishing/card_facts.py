"""What a model card tells, read from the files of a run.

Inputs: a run folder, or the contents of its files before they are written. Outputs: `CardFacts`. Deliberately not here:
the text (`model_card`). Needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trl_sft import redaction, run_folder

_HUB_ID = re.compile(r"[\w.-]{1,96}(?:/[\w.-]{1,96})?")  # huggingface_hub.utils.validate_repo_id
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?)\n---[ \t]*(?:\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class CardFacts:
    """The contents of the files of one run, as far as a model card tells them."""

    name: str  # of the run folder
    run: Mapping[str, Any]  # run.json
    ledger: Mapping[str, Any] = field(default_factory=dict)  # ledger.json
    evaluation: Mapping[str, Any] = field(default_factory=dict)  # eval.json; empty = nothing was generated
    recipe: str = ""  # recipe.yaml, without secrets
    is_adapter: bool = False
    export: Mapping[str, Any] = field(default_factory=dict)  # export.json
    export_files: tuple[str, ...] = ()  # what a push of an export holds, by path; () = the run itself is described

    @property
    def trained_adapter(self) -> bool:
        """Whether an adapter was trained, which an export may have merged."""
        return self.is_adapter or any(str(key).partition(".")[0] == "lora" for key in self.recipe_values)

    @property
    def base(self) -> str:
        """The base model: a hub id, or the absolute path of a folder; "" = it is not recorded."""
        inference = self.run.get("inference")
        base = inference.get("base") if isinstance(inference, Mapping) else None
        return str(base or self.recipe_values.get("model.name_or_path") or "")

    @property
    def architecture(self) -> str:
        """The class of the model; "" = it is not recorded."""
        inference = self.run.get("inference")
        return str(inference.get("architecture") or "") if isinstance(inference, Mapping) else ""

    @property
    def base_id(self) -> str:
        """The hub id of the base model; "" = a folder of the machine that trained."""
        return self.base if is_hub_id(self.base) else ""

    @property
    def recipe_values(self) -> Mapping[str, Any]:
        """The values of the recipe by dotted name, as run.json has them."""
        values = self.run.get("recipe")
        return values if isinstance(values, Mapping) else {}

    @property
    def changed_fields(self) -> Mapping[str, Any]:
        """Fields of the base model's configuration that `model.config` set and an adapter does not hold."""
        fields = self.recipe_values.get("model.config") if self.is_adapter else None
        return fields if isinstance(fields, Mapping) else {}

    def list_dataset_ids(self, *keys: str) -> list[str]:
        """Return the hub ids of the data sets that keys such as `data.train` name, without repetition, in order."""
        values = [self.recipe_values.get(key) for key in keys]
        sources = [source for value in values for source in (value if isinstance(value, list) else [value])]
        paths = [source.get("path") if isinstance(source, Mapping) else source for source in sources]
        return list(dict.fromkeys(path for path in paths if isinstance(path, str) and is_hub_id(path)))


def read_facts(folder: Path) -> CardFacts:
    """Return what the files of a finished run tell; what an older version did not write is left out.

    Args:
        folder: A run folder.

    """
    recipe = folder / run_folder.RECIPE
    return CardFacts(
        name=folder.resolve().name,
        run=run_folder.read_json(folder / run_folder.RUN),
        ledger=run_folder.read_json(folder / run_folder.LEDGER),
        evaluation=run_folder.read_json(folder / run_folder.EVAL),
        recipe=redaction.redact_shapes(recipe.read_text(encoding="utf-8")) if recipe.is_file() else "",
        is_adapter=(folder / run_folder.ADAPTER_CONFIG).is_file(),
    )


def is_hub_id(name: str) -> bool:
    """Tell whether a recorded name is an id of the hub: paths are recorded as absolute ones."""
    return bool(_HUB_ID.fullmatch(name)) and not name.startswith((".", "-")) and not name.endswith((".", "-"))


def read_front_matter(text: str) -> dict[str, Any]:
    """Return the mapping at the beginning of a card; empty if there is none that can be read."""
    match = _FRONT_MATTER.match(text.lstrip("\ufeff"))
    try:
        values = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}
