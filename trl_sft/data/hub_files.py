"""The files of a data set of the hub: found by `datasets`, downloaded to its cache, and found again without a network.

Inputs: the id of a data set and the arguments of its builder. Outputs: the files of each split, with the builder that
reads them. What was found is noted beside the cache of `datasets`, so that an offline run reads the same files.
Deliberately not here: reading, and data sets whose files have types of their own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from datasets import load_dataset_builder

from trl_sft import run_folder
from trl_sft.console import format_names
from trl_sft.data.readers.data_file import DataFile
from trl_sft.data.readers.record_store import BUILDERS
from trl_sft.recipe import hub
from trl_sft.recipe.checked import Source

TYPED_BUILDERS = ("parquet", "arrow")  # whose files have types of their own
# arguments of `load_dataset` that its builder does not take
LOADING_KEYWORDS = ("split", "streaming", "num_proc", "keep_in_memory", "verification_mode", "save_infos")


class SplitError(ValueError):
    """A source that has no split of a name."""

    def __init__(self, name: str, splits: Sequence[str]) -> None:
        """Store the name that is looked for, and the splits that there are."""
        self.name, self.splits = name, splits
        known = f"the only split is {splits[0]}" if len(splits) == 1 else f"the splits are {format_names(splits)}"
        super().__init__(f"there is no split {name}; {known}")


class SourceFiles(NamedTuple):
    """The files of one source that a builder of `datasets` would read."""

    builder: str  # json, csv, text, parquet, arrow
    splits: Mapping[str, Sequence[DataFile]]
    keywords: Mapping[str, Any]  # of the configuration of the builder
    has_declared_types: bool = False  # whether the card of the data set says which types its columns have
    chosen_by_datasets: bool = False  # whether `datasets` reads the source as a whole, in a way of its own
    unread: tuple[str, ...] = ()  # the files in a folder that are not read: they belong to no split

    def list_names(self) -> dict[str, tuple[str, ...]]:
        """Return the names of the files of each split."""
        return {name: tuple(file.name for file in files) for name, files in self.splits.items()}


def select_builder_keywords(source: Source) -> dict[str, Any]:
    """Return the arguments of a source that `load_dataset_builder` takes."""
    return {name: value for name, value in source.load_kwargs.items() if name not in LOADING_KEYWORDS}


def get_split(files: SourceFiles, name: str) -> Sequence[DataFile]:
    """Return the files of a split. Raises ValueError if there is none."""
    if name not in files.splits:
        raise SplitError(name, tuple(files.splits))
    return files.splits[name]


def find_files(source: Source) -> SourceFiles:
    """Return the files of a data set of the hub; without a network those that an earlier run read."""
    name, keywords = source.location.name, select_builder_keywords(source)
    is_reached = hub.check_id("dataset", name, source.load_kwargs)
    if not is_reached and (noted := _read_note(name, keywords)):
        return noted
    builder = load_dataset_builder(name, **keywords)
    builder_name = type(builder).__module__.rpartition(".")[2]
    if builder_name not in (*BUILDERS, *TYPED_BUILDERS):
        return SourceFiles(builder_name, {}, {}, chosen_by_datasets=True)
    download_config = datasets.DownloadConfig(token=source.load_kwargs.get("token"))
    splits = {
        str(split): [DataFile(f"{name}/{Path(file).name}", file, download_config) for file in files]
        for split, files in (builder.config.data_files or {}).items()
    }
    has_declared_types = builder_name in TYPED_BUILDERS and builder.info.features is not None
    config_keywords = list_config_keywords(builder.config)
    return SourceFiles(builder_name, splits, config_keywords, has_declared_types=has_declared_types)


def download_splits(source: Source, files: SourceFiles, splits: Sequence[str]) -> SourceFiles:
    """Return the files of a source with those of some splits on this machine, and note where they are."""
    wanted = {name: get_split(files, name) for name in splits}
    if all(file.download_config is None for entries in wanted.values() for file in entries):
        return files
    local = {name: _download(entries) for name, entries in wanted.items()}
    files = files._replace(splits={**files.splits, **local})
    _note_files(source.location.name, select_builder_keywords(source), files)
    return files


def list_config_keywords(config: Any) -> dict[str, Any]:
    """Return the arguments of a builder's own configuration that are not the default."""
    base = {field.name for field in dataclasses.fields(datasets.BuilderConfig)}
    fields = [field for field in dataclasses.fields(config) if field.name not in base]
    return {field.name: getattr(config, field.name) for field in fields if getattr(config, field.name) != field.default}


def _note_files(name: str, keywords: Mapping[str, Any], files: SourceFiles) -> None:
    """Note the files of a data set for runs without a network; those that are downloaded by their path."""
    splits = {split: [(file.name, file.path) for file in entries] for split, entries in files.splits.items()}
    entry = {"builder": files.builder, "keywords": dict(files.keywords), "splits": splits}
    path = _note_path(name, keywords)
    path.parent.mkdir(parents=True, exist_ok=True)
    run_folder.write_text(path, json.dumps(entry, default=str))


def _read_note(name: str, keywords: Mapping[str, Any]) -> SourceFiles | None:
    """Return the files of a data set that an earlier run noted; None = there is no note.

    A split of which files are not on this machine is left out.
    """
    try:
        entry = json.loads(_note_path(name, keywords).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    splits = {
        split: [DataFile(file_name, path) for file_name, path in files]
        for split, files in entry["splits"].items()
        if all(Path(path).is_file() for _, path in files)
    }
    return SourceFiles(entry["builder"], splits, entry["keywords"]) if splits else None


def _download(files: Sequence[DataFile]) -> list[DataFile]:
    """Return files on this machine; those of the hub are downloaded to its cache."""
    return [
        file._replace(
            path=str(datasets.DownloadManager(download_config=file.download_config).download(file.path)),
            download_config=None,
        )
        if file.download_config is not None
        else file
        for file in files
    ]


def _note_path(name: str, keywords: Mapping[str, Any]) -> Path:
    """Return the file that notes the files of a data set."""
    shown = {key: str(value) for key, value in keywords.items() if key != "token"}
    digest = hashlib.sha256(json.dumps([name, sorted(shown.items())]).encode()).hexdigest()[:32]
    return Path(datasets.config.HF_DATASETS_CACHE) / "trl_sft_hub" / f"{digest}.json"
