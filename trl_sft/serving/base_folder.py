"""The folder of a base model and the files of its weights.

Inputs: a folder or a hub id. Outputs: paths. Deliberately not here: whether it is the base model of a run
(`model.base_digest`, `trained_adapter`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from trl_sft import run_folder

_HUB_KEYS = ("cache_dir", "revision")
_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


def find_folder(name: str, keywords: dict[str, Any]) -> Path:
    """Return the folder of a model: the folder itself, or that of a hub id; files that the cache lacks are downloaded.

    Args:
        name: A folder or a hub id.
        keywords: Those of `from_pretrained`; `cache_dir` and `revision` are used.

    Raises:
        OSError: The hub cannot be reached or refuses it.

    """
    if Path(name).is_dir():
        return Path(name)
    used = {key: keywords[key] for key in _HUB_KEYS if keywords.get(key) is not None}
    return Path(snapshot_download(name, allow_patterns=_FILES, **used))


def list_weight_files(folder: Path) -> list[Path]:
    """Return the safetensors of a model's folder that transformers reads, without those of an adapter."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    files = run_folder.read_json(folder / "model.safetensors.index.json").get("weight_map")
    names = set(files.values()) if isinstance(files, dict) else set()
    return [folder / name for name in sorted(names) if run_folder.is_plain_name(name)]
