"""Which files of a folder go to the hub, under which path, and in which form.

Inputs: a run folder, a checkpoint in it, or a folder that `merge` or `export` wrote. Outputs: files by their path in
the repository. Rows of the user, optimizer states and pickles stay here unless they are asked for; local paths and
secrets are taken out of the records. Deliberately not here: the model card (`model_card`), and the upload (`upload`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath
from typing import Any

from trl_sft import redaction, run_folder
from trl_sft.errors import Fault, RecipeError
from trl_sft.recipe import yaml_reader

Files = dict[str, Path | bytes]  # path in the repository -> the file, or what is pushed in its place

RECORDS = (run_folder.RECIPE, run_folder.RUN, run_folder.LEDGER, run_folder.EVAL, run_folder.LOG)
WITH_ROWS = (run_folder.ROWS, run_folder.SAMPLES, run_folder.REJECTS, run_folder.REPORT)  # they hold rows of the user
MERGE_RECORD, EXPORT_RECORD = "merge.json", "export.json"
_NOT_OF_THE_MODEL = ("training_args.bin", "trainer_state.json", "trl_sft.json", run_folder.CARD)
_STATE = re.compile(r"(?:optimizer|scheduler|scaler|rng_state|global_step|random_states|pytorch_model_fsdp).*")
_WEIGHTS = re.compile(
    r"(?:.*/)?(?:model|adapter_model|pytorch_model)[\w.-]*\.(?:safetensors|bin|index\.json)|[^/]*\.gguf"
)
_FORMATS = ("merged", "gguf", "ollama")  # the folders of an export whose files stand side by side on the hub
_VLLM = "vllm"  # an adapter, or the whole model once more: beside a merged model it stays in its folder
_ROW_TEXTS = ("first_difference", "first_differences")  # of a proof: they may hold prompts and answers of rows
_MODELFILE_SOURCE = re.compile(r"^(FROM\s+)(?:\S*/)?([^/\s]+\.gguf)\s*$", re.MULTILINE)


def select_run(folder: Path, *, with_rows: bool = False) -> Files:
    """Return the files of a finished run: the model or adapter, its tokenizer, and the records of the run.

    Args:
        folder: The run folder.
        with_rows: Whether the files that hold rows of the user go too.

    Raises:
        RecipeError: The folder holds no model.

    """
    listed = run_folder.read_json(folder / run_folder.RUN).get("files")
    names = [str(name) for name in listed] if isinstance(listed, list) else _list_names(folder)
    names = [name for name in names if run_folder.is_plain_name(name) and _is_of_model(name)]
    files: Files = {name: folder / name for name in names if (folder / name).is_file()}
    if not find_weights(files):
        problem = "the folder holds no weights of a model"
        raise RecipeError(Fault(str(folder), problem, "Name the folder of a finished run.", code="hub.no_model"))
    for name in (*RECORDS, *(WITH_ROWS if with_rows else ())):
        if (folder / name).is_file():
            files[name] = clean_file(folder / name)
    return files


def select_checkpoint_model(checkpoint: Path) -> Files:
    """Return the files of a checkpoint that make a model: weights, configuration, tokenizer; no states."""
    return {name: checkpoint / name for name in _list_names(checkpoint) if _is_of_model(name)}


def select_checkpoint(checkpoint: Path, path_in_repo: str) -> Files:
    """Return every file of a checkpoint, with the states that training resumes from, below a path."""
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    return {f"{path_in_repo}/{path.relative_to(checkpoint).as_posix()}": path for path in paths}


def select_export(folder: Path) -> Files:
    """Return the files that `merge` or `export` wrote: the formats of an export stand side by side.

    Args:
        folder: Of the merged model, or of the export.

    Raises:
        RecipeError: The folder holds no model.

    """
    files: Files = {}
    side_by_side = _FORMATS if (folder / _FORMATS[0]).is_dir() else (*_FORMATS, _VLLM)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        parts = path.relative_to(folder).parts
        if any(part.startswith((".", "_")) for part in parts) or parts[-1] in (run_folder.CARD, "training_args.bin"):
            continue
        place = "/".join(parts[1:] if parts[0] in side_by_side and len(parts) > 1 else parts)
        if place not in files:  # a format may hold the files of another one again
            files[place] = clean_file(path)
    if not find_weights(files):
        problem = "the folder holds no weights of a model"
        raise RecipeError(Fault(str(folder), problem, "Name a folder that `export` wrote.", code="hub.no_model"))
    return files


def find_weights(paths: Iterable[str]) -> list[str]:
    """Return the paths that are weights of a model at the top of a repository."""
    return [path for path in paths if "/" not in path and _WEIGHTS.fullmatch(path)]


def find_stale_weights(pushed: Files, existing: Iterable[str]) -> list[str]:
    """Return the weights that the repository has and the push does not replace: they would be loaded beside the new.

    GGUF files stay, and a push of GGUF files alone replaces nothing: each is loaded by its name.

    Args:
        pushed: What is pushed.
        existing: The paths in the repository.

    """
    if all(path.endswith(".gguf") for path in find_weights(pushed)):
        return []
    existing = list(existing)
    weights = [path for path in find_weights(existing) if not path.endswith(".gguf")]
    settings = [path for path in existing if path == run_folder.ADAPTER_CONFIG]  # it makes loaders read an adapter
    return sorted(path for path in [*weights, *settings] if path not in pushed)


def clean_file(path: Path) -> Path | bytes:
    """Return a file as it is pushed: records and recipes without secrets and local paths, all others as they are."""
    if path.name in (run_folder.RUN, run_folder.LEDGER, run_folder.EVAL, MERGE_RECORD, EXPORT_RECORD):
        return clean_json(path.read_text(encoding="utf-8")).encode()
    if path.name == run_folder.RECIPE:
        return redaction.redact_shapes(yaml_reader.mask_secrets(path.read_text(encoding="utf-8"))).encode()
    if path.name == "Modelfile":
        return _MODELFILE_SOURCE.sub(r"\1./\2", path.read_text(encoding="utf-8")).encode()
    return path


def clean_json(text: str) -> str:
    """Return a JSON text whose absolute paths are reduced to the names of their files, and without secrets.

    A text that is no JSON is returned without secrets.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return redaction.redact_shapes(text)
    cleaned = json.dumps(_strip_paths(value), indent=2, ensure_ascii=False) + "\n"
    return redaction.redact_json(cleaned)


def _strip_paths(value: Any) -> Any:
    """Return a value of JSON without texts of rows, in which each text that is an absolute path is its last name."""
    if isinstance(value, dict):
        return {_strip_path(name): _strip_paths(inner) for name, inner in value.items() if name not in _ROW_TEXTS}
    if isinstance(value, list):
        return [_strip_paths(item) for item in value]
    return _strip_path(value) if isinstance(value, str) else value


def _strip_path(text: str) -> str:
    """Return the last name of an absolute path; any other text as it is."""
    if "\n" in text or not (text.startswith("/") or re.match(r"[A-Za-z]:[\\/]", text)):
        return text
    return PureWindowsPath(text).name or text


def _list_names(folder: Path) -> list[str]:
    """Return the names of the files of a folder."""
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def _is_of_model(name: str) -> bool:
    """Tell whether a file of a run folder or a checkpoint belongs to the model."""
    is_record = name in (*RECORDS, *WITH_ROWS, *_NOT_OF_THE_MODEL, run_folder.RESOLVED)
    return not is_record and not name.startswith((".", "_")) and not _STATE.fullmatch(name)
