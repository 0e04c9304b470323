"""Copies a whole model into a folder that plain transformers and vLLM load, in another dtype on request.

Inputs: a folder with all weights, a dtype. Outputs: weights, configuration and tokenizer. Memory holds one of the
model's files, and only where the dtype changes. Deliberately not here: merging (`serving.merge`).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from trl_sft import run_folder
from trl_sft.errors import Fault, RecipeError
from trl_sft.row_progress import RowProgress
from trl_sft.serving import base_folder

GENERATION = "generation_config.json"
_INDEX = "model.safetensors.index.json"
# beside the weights: what transformers reads for a model and its tokenizer
_SETTINGS = (
    *("config.json", GENERATION, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "tokenizer.model"),
    *("additional_chat_templates", "LICENSE", "LICENSE.txt"),
)


def list_weights(folder: Path) -> list[Path]:
    """Return the files of the weights. Raises RecipeError if they are not whole, or in another format."""
    files = base_folder.list_weight_files(folder)
    if files and all(path.is_file() for path in files):
        return files
    problem = "the folder has no whole set of weights in safetensors"
    fix = "Save the model with save_pretrained, or restore its files from a copy."
    raise RecipeError(Fault(str(folder), problem, fix, code="export.damaged_model"))


def count_bytes(folder: Path, dtype: str | None) -> int:
    """Return the bytes that the weights take in a dtype; None = as they are."""
    total = 0
    for path in list_weights(folder):
        if dtype is None:
            total += path.stat().st_size
            continue
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                size = 1
                for length in file.get_slice(name).get_shape():
                    size *= length
                total += size * getattr(torch, dtype).itemsize
    return total


def copy(source: Path, target: Path, dtype: str | None) -> None:
    """Copy a model.

    Args:
        source: Its folder.
        target: An empty folder.
        dtype: Of the copied weights; None = as they are.

    Raises:
        RecipeError: A value has no place in the dtype.

    """
    files = list_weights(source)
    for name in _SETTINGS:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        elif (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    total = 0
    with RowProgress("Copying", len(files), unit="files") as progress:
        for path in files:
            if dtype is None:
                shutil.copyfile(path, target / path.name)
            else:
                total += _convert(path, target / path.name, dtype)
            progress.update(1)
    if (source / _INDEX).is_file() and source / "model.safetensors" not in files:
        index = json.loads((source / _INDEX).read_text(encoding="utf-8"))
        if dtype is not None:
            index["metadata"] = {"total_size": total}
        run_folder.write_text(target / _INDEX, json.dumps(index, indent=2) + "\n")
    if dtype is not None:
        config = run_folder.read_json(target / "config.json")
        config.pop("torch_dtype", None)
        run_folder.write_text(target / "config.json", json.dumps(config | {"dtype": dtype}, indent=2) + "\n")


def _convert(source: Path, target: Path, dtype: str) -> int:
    """Write a file of weights in another dtype; return the bytes of its weights. Raises RecipeError."""
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(source, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            before = file.get_tensor(name)
            tensors[name] = before.to(getattr(torch, dtype)) if before.is_floating_point() else before
            if before.is_floating_point() and not bool(tensors[name].isfinite().all()):
                problem = f"{name} has values that {dtype} cannot hold, or that are not finite"
                fix = "Write `--dtype bfloat16` or `--dtype float32`."
                raise RecipeError(Fault(str(source), problem, fix, code="export.not_finite"))
    save_file(tensors, target, metadata={"format": "pt"})
    return sum(tensor.nbytes for tensor in tensors.values())
