"""Writes the formats of an export into one folder, which appears once all of them are there and proved.

Inputs: an `ExportSource` and settings. Outputs: a folder for each format, and export.json. All that can be refused is
refused when an `Exporter` is made, before anything is written. Deliberately not here: the formats themselves
(`gguf_file`, `whole_model`), merging (`serving.merge`), the screen (`cli.export`).
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_sft import __version__, file_digests, run_folder
from trl_sft.console import format_bytes
from trl_sft.errors import Fault, RecipeError
from trl_sft.serving import base_tensors, merge, merge_proof
from trl_sft.serving.export import whole_model
from trl_sft.serving.export.export_source import ExportSource

MERGED, GGUF = "merged", "gguf"
FORMATS = (MERGED, GGUF)
RECORD = "export.json"
_PACKAGES = ("torch", "transformers", "peft", "gguf", "xllamacpp")
_HEADER_BYTES = 2**24  # of files beside the weights, and of headers


@dataclass(frozen=True)
class ExportSettings:
    """What an export writes.

    Attributes:
        formats: of `FORMATS`.
        gguf_type: of the weights in a GGUF file.
        dtype: of merged weights; None = that of the base's files, or of the run's.
        base: which weights a QLoRA adapter is merged into.

    """

    formats: tuple[str, ...]
    gguf_type: str = "f16"
    dtype: str | None = None
    base: str = merge.ORIGINAL


class Exporter:
    """One export: what is planned, written and recorded."""

    def __init__(self, source: ExportSource, settings: ExportSettings) -> None:
        """Plan the export.

        Args:
            source: What is exported.
            settings: How.

        Raises:
            UserError: A format cannot be written for this model.

        """
        self.source, self.settings = source, settings
        self.merger: merge.Merger | None = None
        if source.adapter is not None:
            self.merger = merge.Merger(source.adapter, dtype=settings.dtype, base=settings.base)
            self._model = self.merger.model
        else:
            whole_model.list_weights(source.weights)
            self._model = base_tensors.load_on_meta(source.weights)
        self.gguf: Any = None
        if GGUF in settings.formats:
            from trl_sft.serving.export import gguf_export  # noqa: PLC0415 (needs an optional package)

            self.gguf = gguf_export.GgufExport(source, self._model, settings.gguf_type)

    def count_bytes(self) -> dict[str, int]:
        """Return the bytes that each format will take, and under "while" those that are removed at the end."""
        sizes: dict[str, int] = {}
        whole = self._count_whole()
        for name in self.settings.formats:
            sizes[name] = whole if name == MERGED else int(self.gguf.planned.size)
        if self.merger is not None and MERGED not in self.settings.formats:
            sizes["while"] = whole
        return sizes

    def check_disk(self, folder: Path) -> None:
        """Refuse an output folder whose disk cannot hold the export. Raises RecipeError."""
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
        free, needed = shutil.disk_usage(existing).free, int(sum(self.count_bytes().values()) * 1.01) + _HEADER_BYTES
        if free < needed:
            problem = f"the export needs {format_bytes(needed)}, and {format_bytes(free)} are free"
            fix = "Free space there, name a folder on another disk, or write fewer formats in `--to`."
            raise RecipeError(Fault(str(folder), problem, fix, code="export.disk_too_small"))

    def write(self, folder: Path, show: Callable[[str, dict[str, Any]], None]) -> dict[str, Any]:
        """Write all formats and export.json.

        Args:
            folder: An empty folder.
            show: Gets the name of each part that is done, and its entry of the record.

        Returns:
            The content of export.json.

        Raises:
            RecipeError: A weight cannot be written, or the merged model is not the trained one.

        """
        record = self._describe()
        weights = self.source.weights
        if self.merger is not None:
            weights = folder / MERGED
            record["merge"] = self._merge(weights)
            show("merge", record["merge"])
        for name in self.settings.formats:
            began = time.monotonic()
            entry = self._write_merged(folder) if name == MERGED else self.gguf.write(weights, folder / GGUF)
            entry["files"] = _describe_files(folder / name)
            entry["bytes"] = sum(file["bytes"] for file in entry["files"].values())
            entry["seconds"] = round(time.monotonic() - began, 3)
            record["formats"][name] = entry
            show(name, entry)
        if MERGED not in self.settings.formats and self.merger is not None:
            shutil.rmtree(folder / MERGED)
        run_folder.write_text(folder / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        return record

    def _describe(self) -> dict[str, Any]:
        """Return the part of export.json that is known before anything is written."""
        source, adapter = self.source, self.source.adapter
        inference = source.model.inference
        return {
            "trl_sft": __version__,
            "versions": {name: version for name in _PACKAGES if (version := _read_version(name))},
            "run": str(source.model.folder.resolve()),
            "step": source.model.step,
            "weights": str(source.weights),
            "base": {
                "name": adapter.name if adapter else source.model.base or None,
                "digest": adapter.digest if adapter else inference.get("base_digest"),
                "compared_with_run": bool(adapter and adapter.is_known_base),
            },
            "architecture": (self._model.config.architectures or [None])[0],
            "merge": None,
            "formats": {},
        }

    def _merge(self, folder: Path) -> dict[str, Any]:
        """Merge the adapter into a folder; return the content of merge.json, and the seconds."""
        assert self.merger is not None
        assert self.source.adapter is not None
        began = time.monotonic()
        folder.mkdir()
        merged = self.merger.write(folder)
        proof = merge_proof.prove(self.merger, folder)
        record = merge.write_record(merged, self.source.adapter, base=self.settings.base, proof=proof)
        return record | {"seconds": round(time.monotonic() - began, 3)}

    def _write_merged(self, folder: Path) -> dict[str, Any]:
        """Write the whole model, which is there already if an adapter was merged; return its entry."""
        if self.merger is None:
            (folder / MERGED).mkdir()
            whole_model.copy(self.source.weights, folder / MERGED, self.settings.dtype)
        dtype = run_folder.read_json(folder / MERGED / "config.json").get("dtype")
        return {"path": MERGED, "type": dtype}

    def _count_whole(self) -> int:
        """Return the bytes of the whole model in safetensors."""
        if self.merger is not None:
            return self.merger.count_bytes()
        return whole_model.count_bytes(self.source.weights, self.settings.dtype)


def _describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and sha256 of each file of a folder, by its name there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_digests.hash_file(path)}
        for path in files
    }


def _read_version(package: str) -> str:
    """Return the version of an installed package; "" = it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
