"""Writes the formats of an export into one folder, which appears once all of them are there and proved.

Inputs: an `ExportSource` and settings. Outputs: a folder for each format, and export.json. All that can be refused is
refused when an `Exporter` is made, before anything is written. Deliberately not here: the formats themselves
(`gguf_export`, `ollama_export`, `vllm_export`, `whole_model`), merging (`serving.merge`), the proof (`serving.proof`),
the screen (`cli.export`).
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trl_sft import __version__, file_digests, run_folder
from trl_sft.console import format_bytes
from trl_sft.errors import Fault, RecipeError
from trl_sft.serving import base_tensors, merge, merge_proof, proof
from trl_sft.serving.export import gguf_transformers, portable_template, vllm_export, whole_model
from trl_sft.serving.export.export_source import ExportSource
from trl_sft.serving.proof import GGUF, MERGED, OLLAMA, VLLM, ExportedModel

FORMATS = (MERGED, GGUF, OLLAMA, VLLM)  # in the order of writing: each can use what is before it
RECORD = "export.json"
MERGING, PROVING = "merge", "proof"  # parts of the work beside the formats
_PACKAGES = ("torch", "transformers", "peft", "gguf", "xllamacpp")
_HEADER_BYTES = 2**24  # of files beside the weights, and of headers
_TEMPLATE_FILE = "chat_template.jinja"


@dataclass(frozen=True)
class ExportSettings:
    """What an export writes.

    Attributes:
        formats: of `FORMATS`; OLLAMA brings GGUF.
        gguf_type: of the weights in a GGUF file.
        dtype: of merged weights; None = that of the base's files, or of the run's.
        base: which weights a QLoRA adapter is merged into.

    """

    formats: tuple[str, ...]
    gguf_type: str = "f16"
    dtype: str | None = None
    base: str = merge.ORIGINAL


class Exporter:
    """One export: what is planned, written, proved and recorded."""

    def __init__(self, source: ExportSource, settings: ExportSettings) -> None:
        """Plan the export.

        Args:
            source: What is exported.
            settings: How.

        Raises:
            UserError: A format cannot be written for this model.

        """
        if OLLAMA in settings.formats and GGUF not in settings.formats:
            settings = replace(settings, formats=tuple(name for name in FORMATS if name in (*settings.formats, GGUF)))
        self.source, self.settings = source, settings
        self.vllm = vllm_export.VllmExport(source) if VLLM in settings.formats else None
        self._merger: merge.Merger | None = None
        if source.adapter is not None and (self._writes_whole or set(settings.formats) != {VLLM}):
            self._merger = merge.Merger(source.adapter, dtype=settings.dtype, base=settings.base)
            self._model = self._merger.model
        elif source.adapter is not None:
            self._model = base_tensors.load_on_meta(source.adapter.base, source.adapter.fields)
        else:
            whole_model.list_weights(source.weights)
            self._model = base_tensors.load_on_meta(source.weights)
        self._template = self._build_template()
        self.gguf: Any = None
        self.ollama: Any = None
        if GGUF in settings.formats:
            from trl_sft.serving.export import gguf_export, ollama_export  # noqa: PLC0415 (need an optional package)

            self.gguf = gguf_export.GgufExport(source, self._model, settings.gguf_type)
            if OLLAMA in settings.formats:
                self.ollama = ollama_export.OllamaExport(
                    source, gguf=f"../{GGUF}/{self.gguf.file_name}", context_length=self.gguf.context_length
                )

    @property
    def _writes_whole(self) -> bool:
        """Whether the whole model is a part of the export."""
        return MERGED in self.settings.formats or (self.vllm is not None and self.vllm.kind == vllm_export.WHOLE)

    @property
    def _whole_name(self) -> str:
        """The name of the folder of the whole model."""
        return VLLM if self._writes_whole and MERGED not in self.settings.formats else MERGED

    def count_bytes(self) -> dict[str, int]:
        """Return the bytes that each format will take, and under "while" those that are removed at the end."""
        sizes: dict[str, int] = {}
        whole = self._count_whole()
        if self._writes_whole:
            sizes[self._whole_name] = whole
        if self.gguf is not None:
            sizes[GGUF] = int(self.gguf.planned.size)
        if self.vllm is not None and self.vllm.kind == vllm_export.ADAPTER:
            sizes[VLLM] = self.vllm.count_adapter_bytes()
        if self._merger is not None and not self._writes_whole:
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
        """Write all formats, prove them, and write export.json.

        Args:
            folder: An empty folder.
            show: Gets the name of each part that is done, and its entry of the record.

        Returns:
            The content of export.json.

        Raises:
            UserError: A weight cannot be written, or an exported model is not the trained one.

        """
        record = self._describe()
        weights = self.source.weights
        if self._merger is not None:
            weights = folder / self._whole_name
            record["merge"] = self._merge(weights)
            show(MERGING, record["merge"])
        elif self._writes_whole:
            (folder / self._whole_name).mkdir()
            whole_model.copy(self.source.weights, folder / self._whole_name, self.settings.dtype)
        if self._writes_whole and self._template is not None:
            run_folder.write_text(folder / self._whole_name / _TEMPLATE_FILE, self._template)
        for name in self.settings.formats:
            began = time.monotonic()
            entry = self._write_format(name, folder, weights)
            entry["files"] = _describe_files(folder / entry["path"].partition("/")[0])
            entry["bytes"] = sum(file["bytes"] for file in entry["files"].values())
            entry["seconds"] = round(time.monotonic() - began, 3)
            record["formats"][name] = entry
            show(name, entry)
        lines, record[PROVING] = self._prove(folder, weights, record["formats"])
        if self._merger is not None and not self._writes_whole:
            shutil.rmtree(weights)
        run_folder.write_text(folder / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        show(PROVING, record[PROVING] | {"lines": lines})
        return record

    def _write_format(self, name: str, folder: Path, weights: Path) -> dict[str, Any]:
        """Write a format, unless it is a folder that is there already; return its entry without files."""
        if name == GGUF:
            read = None if self._merger is None else self._merger.measure_merged
            entry: dict[str, Any] = self.gguf.write(weights, folder / GGUF, read)
            return entry
        if name == OLLAMA:
            modelfile: dict[str, Any] = self.ollama.write(folder / OLLAMA)
            return modelfile
        if name == VLLM and self.vllm is not None and self.vllm.kind == vllm_export.ADAPTER:
            self.vllm.write_adapter(folder / VLLM)
            if self._template is not None:
                run_folder.write_text(folder / VLLM / _TEMPLATE_FILE, self._template)
            return self.vllm.describe(VLLM, str(self._model.dtype).removeprefix("torch."))
        dtype = run_folder.read_json(folder / self._whole_name / "config.json").get("dtype")
        if name == VLLM and self.vllm is not None:
            return self.vllm.describe(self._whole_name, dtype)
        return {"path": MERGED, "type": dtype}

    def _prove(
        self, folder: Path, weights: Path, formats: dict[str, dict[str, Any]]
    ) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        """Read every format back and compare it with the trained model; return lines and the proof for export.json.

        Raises:
            RecipeError: An exported model is not the trained one.

        """
        began = time.monotonic()
        exports = []
        for name, entry in formats.items():
            if name in (GGUF, OLLAMA):
                file, render = folder / formats[GGUF]["path"], self.ollama.render if name == OLLAMA else None
                unread = gguf_transformers.find_unread(file, self.gguf.planned.config)
                exports.append(ExportedModel(name, file, formats[GGUF]["type"], render, unread=unread))
            else:
                exports.append(ExportedModel(name, folder / entry["path"], _name_type(entry["type"])))
        merged = None
        if self._merger is not None:
            merged = ExportedModel(MERGED, weights, _name_type(self._merger.dtype))
        reference = proof.measure(self.source.model, is_quantized_base=self.settings.base == merge.DEQUANTIZED)
        result = proof.prove(exports, reference, merged=merged)
        if not result.passed:
            raise RecipeError(result.faults)
        seconds = round(time.monotonic() - began, 3)
        return result.list_lines(), result.describe() | {"seconds": seconds}

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
            MERGING: None,
            "formats": {},
        }

    def _build_template(self) -> str | None:
        """Return the chat template that replaces the tokenizer's; None = that one renders as the run does."""
        if not portable_template.is_needed(self.source.model, self.source.renderer):
            return None
        return portable_template.build(self.source.model, self.source.renderer)

    def _merge(self, folder: Path) -> dict[str, Any]:
        """Merge the adapter into a folder; return the content of merge.json, and the seconds."""
        assert self._merger is not None
        assert self.source.adapter is not None
        began = time.monotonic()
        folder.mkdir()
        merged = self._merger.write(folder)
        result = merge_proof.prove(self._merger, folder)
        record = merge.write_record(merged, self.source.adapter, base=self.settings.base, proof=result)
        return record | {"seconds": round(time.monotonic() - began, 3)}

    def _count_whole(self) -> int:
        """Return the bytes of the whole model in safetensors; 0 = none is written."""
        if self._merger is not None:
            return self._merger.count_bytes()
        return whole_model.count_bytes(self.source.weights, self.settings.dtype) if self._writes_whole else 0


def _name_type(kind: Any) -> str:
    """Return the name of a type of numbers: "float32", "q8_0"."""
    return str(kind).removeprefix("torch.")


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
