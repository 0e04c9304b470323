"""The digest of a model's configuration and of a sample of its weights, to tell one base model from another.

Inputs: a folder or a hub id. Outputs: a hexadecimal digest, or None where the files are not on this machine. Not here:
what follows when two digests differ (`serving.model_folder`).
"""

from __future__ import annotations

import json
from pathlib import Path

import xxhash
from huggingface_hub import try_to_load_from_cache

from trl_sft import run_folder

_CONFIG = "config.json"
_SAMPLES, _SAMPLE_BYTES = 16, 65_536  # parts of each weight file that are read
_VOLATILE = ("transformers_version", "_name_or_path")  # written anew by each program that saves a model


def compute_digest(name: str, revision: str | None = None, cache_dir: str | None = None) -> str | None:
    """Return the digest of a model's configuration and of a sample of its weights; None = it is not on this machine.

    Args:
        name: A folder, or a hub id whose files are in the cache.
        revision: Of the hub.
        cache_dir: Of the hub's files; None = the usual one.

    """
    folder = _find_folder(name, revision=revision, cache_dir=cache_dir)
    if folder is None:
        return None
    config = {key: value for key, value in run_folder.read_json(folder / _CONFIG).items() if key not in _VOLATILE}
    digest = xxhash.xxh3_128(json.dumps(config, sort_keys=True).encode())
    for path in sorted({path for pattern in run_folder.WEIGHTS for path in folder.glob(pattern)}):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for number in range(_SAMPLES):
                file.seek(number * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _find_folder(name: str, *, revision: str | None, cache_dir: str | None) -> Path | None:
    """Return the folder that has a model's files; None = there is none on this machine."""
    if Path(name).is_dir():
        return Path(name)
    try:
        config = try_to_load_from_cache(name, _CONFIG, revision=revision, cache_dir=cache_dir)
    except ValueError:  # no name that the hub could have
        return None
    return Path(config).parent if isinstance(config, str) else None
