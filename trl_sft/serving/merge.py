"""Merges the adapter of a run into its base model, shard by shard.

Inputs: a `TrainedAdapter`, a dtype, an output folder. Outputs: a folder that plain transformers loads, with merge.json;
the folder appears in one step, after the proof. Memory holds one shard, and the largest tensor in float32. Deliberately
not here: the sum of a module (`adapter_layers`), the proof (`merge_proof`).
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedModel

from trl_sft import __version__, file_digests, run_folder
from trl_sft.console import format_bytes
from trl_sft.errors import Fault, RecipeError, first_line
from trl_sft.row_progress import RowProgress
from trl_sft.serving import adapter_layers, base_tensors, model_loading
from trl_sft.serving.trained_adapter import TrainedAdapter

DTYPES = ("bfloat16", "float16", "float32")
ORIGINAL, DEQUANTIZED = "original", "dequantized"  # the base that a QLoRA adapter is merged into
RECORD = "merge.json"
SHARD_BYTES = 2**30  # twice in memory while a file is written: safetensors makes a copy


@dataclass
class Differences:
    """Differences between two models, tensor by tensor, in float32."""

    tensors: int = 0  # compared
    changed: int = 0  # with a difference
    largest: float = 0.0
    total: float = 0.0
    values: int = 0
    squares: float = 0.0
    base_squares: float = 0.0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Count the difference of a tensor; rows that only one of them has are left out."""
        before, after = before[: after.shape[0]].float(), after[: before.shape[0]].float()
        base_norm = float(torch.linalg.vector_norm(before))
        difference = after - before
        norm, largest = (
            float(torch.linalg.vector_norm(difference)),
            float(torch.linalg.vector_norm(difference, torch.inf)),
        )
        self.tensors += 1
        self.changed += largest > 0
        self.largest = max(self.largest, largest)
        self.total += float(torch.linalg.vector_norm(difference, 1))
        self.values += difference.numel()
        self.squares += norm**2
        self.base_squares += base_norm**2

    def describe(self) -> dict[str, Any]:
        """Return the differences for merge.json: `relative` is that of the root mean squares."""
        return {
            "tensors": self.tensors,
            "changed_tensors": self.changed,
            "max": self.largest,
            "mean": self.total / max(self.values, 1),
            "relative": math.sqrt(self.squares / self.base_squares) if self.base_squares else 0.0,
        }


@dataclass
class MergedFolder:
    """A merged model on disk."""

    folder: Path
    dtype: str
    delta: Differences = field(default_factory=Differences)  # merged against base, before rounding
    quantization: Differences = field(default_factory=Differences)  # dequantized against original base
    unties: bool = False  # whether embedding and head were tied in the base and no longer are
    files: list[str] = field(default_factory=list)
    size: int = 0  # bytes of the weights


class Merger:
    """One merge: what is read, added and written."""

    def __init__(self, adapter: TrainedAdapter, *, dtype: str | None, base: str) -> None:
        """Read what both models are, without their values.

        Args:
            adapter: The adapter.
            dtype: In which the weights are written; None = that of the base's files.
            base: `ORIGINAL` or `DEQUANTIZED`.

        Raises:
            RecipeError: The adapter or the base model cannot be merged.
            TemplateError: The tokenizer is absent or damaged.

        """
        self.adapter = adapter
        self.base = base
        empty = base_tensors.load_on_meta(adapter.base, adapter.fields)
        self.tensors = base_tensors.BaseTensors(adapter.base, empty)
        self.dtype = getattr(torch, dtype) if dtype else empty.dtype
        self.tokenizer = model_loading.read_tokenizer(str(adapter.folder), adapter.folder)
        self.rows = _count_rows(adapter.folder, empty, len(self.tokenizer))
        self.model = adapter_layers.check_mergeable(adapter.base, adapter.folder, self.rows, fields=adapter.fields)
        if adapter.quantization is not None:
            self.tensors.set_quantization(adapter.base, adapter.quantization, adapter.dtype)
        self._layers = adapter_layers.AdapterLayers(adapter.base, adapter.folder, self.rows, fields=adapter.fields)
        self.shapes = dict(self.model.state_dict())
        self._module_of: dict[str, adapter_layers.AdaptedModule] = {}
        for adapted in self._layers.modules:
            names = [name for name in self.shapes if name.startswith(adapted.path + ".")]
            self._module_of |= dict.fromkeys(names, adapted)
        self.unties = False

    def count_bytes(self) -> int:
        """Return the bytes of the merged weights, with a second copy of tied ones, which may come apart."""
        return sum(self._count_tensor(name) for name in self.shapes)

    def write(self, folder: Path) -> MergedFolder:
        """Write weights, configuration, generation settings and tokenizer into a folder.

        Raises:
            RecipeError: The adapter changes nothing, or a value has no place in the dtype.

        """
        result = MergedFolder(folder, str(self.dtype).removeprefix("torch."))
        skipped = self._find_tied_copies(result)
        shards = self._plan_shards(skipped)
        weight_map: dict[str, str] = {}
        with RowProgress("Merging", sum(map(len, shards)), unit="tensors") as progress:
            for number, names in enumerate(shards, 1):
                file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
                shard: dict[str, torch.Tensor] = {}
                for name in names:
                    if name not in shard:
                        shard |= self._convert(self._merge_with(name, skipped, result))
                    progress.update(1)
                save_file(shard, folder / file, metadata={"format": "pt"})
                weight_map |= dict.fromkeys(shard, file)
                result.size += sum(tensor.nbytes for tensor in shard.values())
                result.files.append(file)
        if not result.delta.largest > 0:
            problem = "the adapter changes no weight of its base model: it is inert"
            fix = "Train it further, for example with a higher train.learning_rate, or use the base model itself."
            raise RecipeError(Fault(str(self.adapter.folder), problem, fix, code="merge.inert_adapter"))
        if len(shards) > 1:
            index = {"metadata": {"total_size": result.size}, "weight_map": weight_map}
            run_folder.write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
        self._write_settings(folder)
        return result

    def measure_merged(self, name: str) -> torch.Tensor:
        """Return one merged tensor in float32."""
        return self._merge_module(name)[name]

    def read_base(self, name: str) -> torch.Tensor:
        """Return a tensor of the base that is merged into, with the rows of the merged model, in a new tensor."""
        dequantizes = self.base == DEQUANTIZED and name in self.tensors.quantized
        tensor = self.tensors.read_dequantized(name) if dequantizes else self.tensors.read(name)
        missing = self.shapes[name].shape[0] - tensor.shape[0] if tensor.dim() else 0
        if not tensor.is_floating_point() or missing == 0:
            return tensor
        if missing < 0:
            return tensor[: self.shapes[name].shape[0]].clone()
        mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)  # as training sets the rows of new tokens
        return torch.cat([tensor, mean.expand(missing, *tensor.shape[1:])])

    def _read_for_merge(self, name: str) -> torch.Tensor:
        """Return a tensor that the adapter is added to, in float32: the base's, or the one in the adapter's file."""
        stored = self._layers.find_stored(self._get_stored_name(name))
        tensor = self.read_base(name) if stored is None else stored
        return tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else tensor.clone()

    def _get_stored_name(self, name: str) -> str:
        """Return the name that peft's wrapper gives a tensor of the base."""
        adapted = self._module_of.get(name)
        if adapted is None:
            return name
        end = name.removeprefix(adapted.path)
        inner = ".token_adapter.base_layer" if hasattr(adapted.module, "token_adapter") else ".base_layer"
        return adapted.path + inner + end

    def _merge_module(self, name: str) -> dict[str, torch.Tensor]:
        """Return the merged tensors of the module that a tensor belongs to, in float32; an unchanged one alone."""
        adapted = self._module_of.get(name)
        if adapted is None:
            return {name: self._read_for_merge(name)}
        names = [other for other, module in self._module_of.items() if module is adapted]
        return self._layers.merge(adapted, names, self._read_for_merge)

    def _merge_with(self, name: str, skipped: set[str], result: MergedFolder) -> dict[str, torch.Tensor]:
        """Merge the module of a tensor, and count its differences."""
        merged = {other: tensor for other, tensor in self._merge_module(name).items() if other not in skipped}
        for other, tensor in merged.items():
            if other in self.tensors.quantized:
                result.quantization.add(self.tensors.read(other), self.tensors.read_dequantized(other))
            if other in self._module_of or self._layers.find_stored(other) is not None:
                result.delta.add(self.read_base(other), tensor)
        return merged

    def _convert(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return tensors in the dtype that is written. Raises RecipeError if a value has no place in it."""
        converted = {}
        for name, tensor in tensors.items():
            is_number = tensor.is_floating_point()
            converted[name] = tensor.to(self.dtype).contiguous() if is_number else tensor.contiguous()
            if is_number and not bool(converted[name].isfinite().all()):
                is_finite = bool(tensor.isfinite().all())
                problem = f"{name} has values that {self.dtype} cannot hold" if is_finite else f"{name} is not finite"
                fix = "Write `--dtype bfloat16` or `--dtype float32`." if is_finite else "Train the adapter again."
                raise RecipeError(Fault(str(self.adapter.folder), problem, fix, code="merge.not_finite"))
        return converted

    def _find_tied_copies(self, result: MergedFolder) -> set[str]:
        """Return the names that need no copy: they are tied in the base, and the adapter changes all alike."""
        skipped: set[str] = set()
        for name, others in self.tensors.ties.items():
            if name in skipped:
                continue
            adapted = [other for other in (name, *others) if other in self._module_of]
            values = self.measure_merged(name) if adapted else None
            for other in others:
                if values is None or torch.equal(values, self.measure_merged(other)):
                    skipped.add(other)
                else:
                    result.unties = self.unties = True
        return skipped

    def _plan_shards(self, skipped: set[str]) -> list[list[str]]:
        """Return the names of each file's tensors; those of one module stay together."""
        shards: list[list[str]] = [[]]
        size, module = 0, None
        for name in (name for name in self.shapes if name not in skipped):
            adapted = self._module_of.get(name)
            added = self._count_tensor(name)
            if shards[-1] and size + added > SHARD_BYTES and (adapted is None or adapted is not module):
                shards.append([])
                size = 0
            shards[-1].append(name)
            size, module = size + added, adapted
        return shards

    def _count_tensor(self, name: str) -> int:
        """Return the bytes of a tensor as it is written."""
        tensor = self.shapes[name]
        size: int = self.dtype.itemsize if tensor.is_floating_point() else tensor.element_size()
        return int(tensor.numel()) * size

    def _write_settings(self, folder: Path) -> None:
        """Write configuration, generation settings and tokenizer, as trained."""
        config = self.model.config
        config.dtype = self.dtype
        if self.unties:
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        config.save_pretrained(folder)
        _read_generation_config(self.adapter, self.model, self.tokenizer).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def _count_rows(adapter: Path, model: PreTrainedModel, tokens: int) -> int:
    """Return the rows of the embedding that the adapter was trained on. Raises RecipeError if its file is damaged."""
    rows = int(model.get_input_embeddings().weight.shape[0])
    path = adapter / "adapter_model.safetensors"
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if any(part in name for part in ("embed_tokens", "lm_head", "wte", "embed_in")) and "lora" not in name:
                    shape = file.get_slice(name).get_shape()
                    if name.endswith("weight") and "token_adapter.trainable" not in name and len(shape) == 2:
                        return int(shape[0])
    except SafetensorError as error:
        fix = "Restore the file from a copy, or train again."
        fault = Fault(str(path), f"the file is damaged: {first_line(error)}", fix, code="merge.damaged_adapter")
        raise RecipeError(fault) from None
    return max(rows, tokens)


def _read_generation_config(adapter: TrainedAdapter, model: PreTrainedModel, tokenizer: Any) -> GenerationConfig:
    """Return the generation settings of the run; of a checkpoint without them those of the base, with its end token."""
    for folder in (adapter.folder, adapter.run):
        if (folder / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(folder)
    config = model.generation_config
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if tokenizer.eos_token_id not in stops:
        config.eos_token_id = [tokenizer.eos_token_id, *(stop for stop in stops if stop is not None)]
    return config


def check_disk(folder: Path, size: int) -> None:
    """Refuse an output folder whose disk cannot hold the merged model. Raises RecipeError."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    free, needed = shutil.disk_usage(existing).free, int(size * 1.01) + 2**24
    if free < needed:
        problem = f"the merged model needs {format_bytes(needed)}, and {format_bytes(free)} are free"
        fix = "Free space there, name a folder on another disk, or write `--dtype bfloat16`."
        raise RecipeError(Fault(str(folder), problem, fix, code="merge.disk_too_small"))


def write_record(merged: MergedFolder, adapter: TrainedAdapter, *, base: str, proof: dict[str, Any]) -> dict[str, Any]:
    """Write merge.json and return its content."""
    digest = file_digests.hash_file(adapter.folder / "adapter_model.safetensors")
    record = {
        "trl_sft": __version__,
        "run": str(adapter.run),
        "adapter": {"folder": str(adapter.folder), "sha256": digest},
        "base": {
            "name": adapter.name,
            "kind": base,
            "digest": adapter.digest,
            "compared_with_run": adapter.is_known_base,
        },
        "dtype": merged.dtype,
        "tied_weights_separated": merged.unties,
        "delta": merged.delta.describe(),
        "quantization": merged.quantization.describe() if merged.quantization.tensors else None,
        "proof": proof,
        "files": {name: file_digests.hash_file(merged.folder / name) for name in merged.files},
    }
    run_folder.write_text(merged.folder / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return record
