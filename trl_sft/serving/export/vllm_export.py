"""The folder of an export for vLLM: the adapter where vLLM takes it, else the whole model.

Inputs: an `ExportSource`. Outputs: a folder, its entry of export.json and the command that serves it. What vLLM
refuses, or leaves out without a word, is found in the adapter's configuration and in the names of its tensors; the
rules are those of vLLM's `lora/peft_helper.py`, `lora/lora_model.py` and `config/lora.py` (versions 0.9 to 0.12).
Deliberately not here: merging.
"""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open

from trl_sft import run_folder
from trl_sft.serving.export import whole_model
from trl_sft.serving.export.export_source import ExportSource

ADAPTER, WHOLE = "adapter", "whole model"
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of `--max-lora-rank`
# keys of the adapter that vLLM refuses or does not read, with the value at which they change nothing
_PLAIN: dict[str, Any] = {
    "use_dora": False,
    "modules_to_save": None,
    "bias": "none",
    "lora_bias": False,
    "rank_pattern": {},
}
_PLAIN |= {"alpha_pattern": {}, "trainable_token_indices": None, "target_parameters": None, "layers_pattern": None}
_PLAIN |= {"fan_in_fan_out": False, "alora_invocation_tokens": None, "layer_replication": None, "use_qalora": False}
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out")
_WEIGHTS = "adapter_model.safetensors"


def list_refused(adapter: Path) -> list[str]:
    """Return what vLLM refuses or leaves out of an adapter: settings and tensors; none = it takes the adapter."""
    config = run_folder.read_json(adapter / run_folder.ADAPTER_CONFIG)
    refused = [
        f"`{name}: {config[name]}`"
        for name, plain in _PLAIN.items()
        if config.get(name) is not None and config[name] != plain and config[name] != []
    ]
    if int(config.get("r", 0)) > _RANKS[-1]:
        refused.append(f"`r: {config['r']}` (at most {_RANKS[-1]})")
    with safe_open(adapter / _WEIGHTS, "pt") as file:
        names = list(file.keys())
    others = [name for name in names if not name.endswith((".lora_A.weight", ".lora_B.weight")) or _is_embedding(name)]
    if others:
        more = f" and {len(others) - 1:,} more tensors" if len(others) > 1 else ""
        refused.append(f"{others[0].removeprefix('base_model.model.')}{more}")
    return refused


def _is_embedding(name: str) -> bool:
    """Tell whether a tensor adapts the embedding or the head, which vLLM takes in few models."""
    return any(f".{part}." in name for part in _EMBEDDINGS)


class VllmExport:
    """A folder for vLLM that is planned."""

    def __init__(self, source: ExportSource) -> None:
        """Decide whether the adapter or the whole model is written."""
        self._source = source
        self.refused = list_refused(source.weights) if source.adapter is not None else []
        if source.adapter is not None and source.adapter.fields:  # vLLM takes the base with its own configuration
            names = ", ".join(source.adapter.fields)
            self.refused.append(f"`model.config` with {names}, since the base model's folder has another configuration")
        self.kind = ADAPTER if source.adapter is not None and not self.refused else WHOLE

    def count_adapter_bytes(self) -> int:
        """Return the bytes of the adapter."""
        return (self._source.weights / _WEIGHTS).stat().st_size

    def write_adapter(self, folder: Path) -> None:
        """Copy the adapter, its tokenizer and its generation settings into a folder, which is made."""
        folder.mkdir()
        for name in (run_folder.ADAPTER_CONFIG, _WEIGHTS):
            shutil.copyfile(self._source.weights / name, folder / name)
        self._source.tokenizer.save_pretrained(folder)
        settings = self._source.model.find_first(whole_model.GENERATION)
        if settings is not None:
            shutil.copyfile(settings / whole_model.GENERATION, folder / whole_model.GENERATION)

    def describe(self, path: str, dtype: str | None) -> dict[str, Any]:
        """Return the entry of export.json.

        Args:
            path: Of the folder, below that of the export.
            dtype: Of its weights.

        """
        entry: dict[str, Any] = {"path": path, "type": dtype, "kind": self.kind, "refused_by_vllm": self.refused}
        if self.kind == ADAPTER:
            config = run_folder.read_json(self._source.weights / run_folder.ADAPTER_CONFIG)
            entry["revision"] = self._source.model.inference.get("model", {}).get("revision")
            entry["max_lora_rank"] = next(rank for rank in _RANKS if rank >= int(config["r"]))
        return entry


def write_command(entry: dict[str, Any], folder: Path, *, name: str, base: str | None) -> str:
    """Return the command that serves a folder.

    Args:
        entry: Of export.json.
        folder: Where it is now.
        name: By which clients ask for the adapter.
        base: The base model of an adapter.

    """
    where = shlex.quote(str(folder))
    if entry["kind"] == WHOLE:
        return f"vllm serve {where}"
    rank = f" --max-lora-rank {entry['max_lora_rank']}"
    modules = f" --enable-lora --lora-modules {shlex.quote(f'{name}={folder}')}{rank}"
    revision = f" --revision {shlex.quote(str(entry['revision']))}" if entry.get("revision") else ""
    return f"vllm serve {shlex.quote(str(base))}{revision}{modules} --tokenizer {where} --generation-config {where}"
