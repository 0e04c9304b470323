"""Digests of the prepared tokens, so that a run resumes only with the tokens that it began with.

Inputs: `TokenizedRows`. Outputs: a mapping for run.json and for the record of a checkpoint, and the differences of two.
The tokens themselves are compared, so nothing that changed them is missed, and a change that leaves them alone is none.
Not here: what a run does about a difference (`training.resume`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from datasets import Dataset

from trl_sft.tokenization import row_groups
from trl_sft.tokenization.build import TokenizedRows

_BATCH_ROWS = 1000
_TRAIN, _EVAL, _PARTS, _FILES = "train", "eval", "parts", "files"
# parts of the cache's key that are not known for a stream, whose rows are read later
_NOT_OF_STREAMS = ("rows", "order of the rows")
# parts that always differ after an update, so they explain other tokens only where no other part does
_VERSIONS = ("version", "code")


def compute(datasets: TokenizedRows, files: Mapping[str, str]) -> dict[str, Any]:
    """Return the digests of the prepared tokens in the order of the datasets.

    Args:
        datasets: what SFTTrainer gets.
        files: sha256 of each file that the rows depend on, by path.

    Returns:
        `train` and `eval` (by name): digests of ids and labels; `parts`: of what the tokens were made of; `files`.
        For a stream, whose rows are not known yet, `train` is a digest of its parts and files.

    """
    parts = dict(datasets.parts)
    if isinstance(datasets.train, Dataset):
        train = digest_dataset(datasets.train)
    else:
        parts = {name: digest for name, digest in parts.items() if name not in _NOT_OF_STREAMS}
        decisive = {name: digest for name, digest in parts.items() if name not in _VERSIONS}
        train = xxhash.xxh3_128_hexdigest(json.dumps([decisive, sorted(files.items())], sort_keys=True).encode())
    evaluation = datasets.eval or {}
    sets = {"eval": evaluation} if isinstance(evaluation, Dataset) else evaluation
    digests = {name: digest_dataset(dataset) for name, dataset in sets.items()}
    return {_TRAIN: train, _EVAL: digests, _PARTS: parts, _FILES: dict(files)}


def digest_dataset(dataset: Dataset) -> str:
    """Return a digest of the tokens of a dataset in the order of its rows: all columns but those of `row_groups`."""
    digest = xxhash.xxh3_128()
    for table in dataset.with_format("arrow").iter(_BATCH_ROWS):
        for name in sorted(set(table.column_names) - set(row_groups.COLUMNS)):
            digest.update(name.encode())
            column = table[name].combine_chunks()
            while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
                digest.update(pc.list_value_length(column).cast(pa.int64()).to_numpy(zero_copy_only=False).tobytes())
                column = pc.list_flatten(column)
            digest.update(column.cast(pa.int64()).to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def describe_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return which rows have other tokens than those of `before`, and what changed them as far as it is known.

    Args:
        before: what `compute` returned when the run began.
        now: what it returns now.

    Returns:
        "the training rows (changed: chat template)"; "" = all tokens are the same.

    """
    names = ["the training rows"] if before.get(_TRAIN) != now[_TRAIN] else []
    earlier, current = before.get(_EVAL, {}), now[_EVAL]
    changed_sets = [name for name in dict.fromkeys((*earlier, *current)) if earlier.get(name) != current.get(name)]
    names += ["the evaluation set" if name == "eval" else f"the evaluation set {name}" for name in changed_sets]
    if not names:
        return ""
    earlier_files, files = before.get(_FILES, {}), now[_FILES]
    changed = [path for path in dict.fromkeys((*earlier_files, *files)) if earlier_files.get(path) != files.get(path)]
    earlier_parts, parts = before.get(_PARTS, {}), now[_PARTS]
    differing = [name for name in parts if earlier_parts.get(name) != parts[name]]
    reasons = [f"the file {path}" for path in changed]
    reasons += [_NAMES.get(name, name) for name in differing if name not in _VERSIONS]
    reasons = reasons or [_NAMES[name] for name in differing]
    return f"{' and '.join(names)} (changed: {', '.join(reasons) or 'how the rows are read or packed'})"


_NAMES = {
    "rows": "the rows",
    "order of the rows": "their order",
    "chat template": "the chat template or what it renders",
    "tokenizer": "the tokenizer",
    "settings": "the settings of the tokens",
    "version": "the installed packages",
    "code": "the code of trl_sft",
}
