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

from trl_sft import run_folder
from trl_sft.data.readers.data_file import DataFile


class SourceFiles(NamedTuple):
    """The files of one source that a builder of `datasets` would read."""

    builder: str  # json, csv, text, parquet, arrow
    splits: Mapping[str, Sequence[DataFile]]
    keywords: Mapping[str, Any]  # of the configuration of the builder
    has_declared_types: bool = False  # whether the card of the data set says which types its columns have


def list_config_keywords(config: Any) -> dict[str, Any]:
    """Return the arguments of a builder's own configuration that are not the default."""
    base = {field.name for field in dataclasses.fields(datasets.BuilderConfig)}
    fields = [field for field in dataclasses.fields(config) if field.name not in base]
    return {field.name: getattr(config, field.name) for field in fields if getattr(config, field.name) != field.default}


def note_files(name: str, keywords: Mapping[str, Any], files: SourceFiles) -> None:
    """Note the files of a data set for runs without a network; those that are downloaded by their path."""
    splits = {split: [(file.name, file.path) for file in entries] for split, entries in files.splits.items()}
    entry = {"builder": files.builder, "keywords": dict(files.keywords), "splits": splits}
    path = _note_path(name, keywords)
    path.parent.mkdir(parents=True, exist_ok=True)
    run_folder.write_text(path, json.dumps(entry, default=str))


def read_note(name: str, keywords: Mapping[str, Any]) -> SourceFiles | None:
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


def download(files: Sequence[DataFile]) -> list[DataFile]:
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
