"""The tokens of a split on disk, so that the same rows are tokenized once.

Inputs: a split of formatted rows, an `Encoder`. Outputs: `EncodedRows` whose dataset is memory-mapped from the cache.
Rows are written batch by batch, and an entry of the cache is whole or absent. The key holds all that decides what the
tokens are, and the code of `data` and `tokenization`. Not here: how rows become tokens (`encode`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import tokenizers
import transformers
import trl
from datasets import Dataset
from trl import pack_dataset

from trl_sft import run_folder
from trl_sft.data import bad_rows, code_digest
from trl_sft.data.bad_rows import BadRow, Kinds
from trl_sft.data.code_digest import digest_code
from trl_sft.data.formats import CHAT
from trl_sft.data.pipeline import Split
from trl_sft.tokenization import chat_template, row_groups
from trl_sft.tokenization.encode import SCHEMA, EncodedRows, encode_split
from trl_sft.tokenization.encoder import Encoder
from trl_sft.tokenization.row_groups import RowGroups

_ROWS, _REJECTS, _KEY = "rows.arrow", "rejects.jsonl", "key.json"
_CHECKED = "checked"  # exists where the loss mask of every row was checked when the rows were tokenized
# Changed code must not read tokens that older code wrote.
CODE = digest_code(Path(code_digest.__file__).parent, Path(__file__).parent)


def read_or_encode(
    split: Split, encoder: Encoder, recipe: Path, *, title: str, most_bad_rows: int, check_all: bool = False
) -> EncodedRows:
    """Return the tokens of a split, from the cache where it has them.

    Args:
        split: formatted rows.
        encoder: made of the settings of the run.
        recipe: the file of the recipe, to say what changed since its last run.
        title: the words beside the progress bar; with `recipe` it names the split.
        most_bad_rows: the most rows that cannot be trained that are listed among the rejected ones; all are counted.
        check_all: whether the loss mask of every row is checked, also of rows in the cache.

    """
    parts = _digest_parts(split, encoder)
    key = _digest(json.dumps(parts, sort_keys=True))
    root = Path(datasets.config.HF_DATASETS_CACHE) / "trl_sft"
    folder, last = root / key, root / f"last-{_digest(f'{recipe} {title}')[:16]}.json"
    checked_rows: Kinds | None = None
    if (folder / _KEY).is_file():
        source = f"read from {folder}"
        if check_all and not (folder / _CHECKED).is_file():  # the entry stays as it is: a run may be reading it
            batches = encode_split(split, encoder, title=title, check_all=True)
            _, checked_rows = _collect(split, (entry for batch in batches for entry in batch.rejected), 0)
            source += ", every row checked again"
    else:
        source = f"tokenized now ({_explain_miss(last, parts)})"
        _write(split, encoder, folder, parts=parts, title=title, check_all=check_all)
    with contextlib.suppress(FileNotFoundError):  # another process of this recipe put the same note in place
        run_folder.write_text(last, json.dumps(parts))
    # datasets gives rows of a file a random fingerprint, so later steps would never find their results in its cache
    rows = Dataset(Dataset.from_file(str(folder / _ROWS)).data, fingerprint=key)
    with (folder / _REJECTS).open(encoding="utf-8") as file:
        rejected, kinds = _collect(split, map(json.loads, file), most_bad_rows)
    return EncodedRows(rows, rejected, key, source, kinds if checked_rows is None else checked_rows, parts)


def encode_in_memory(split: Split, encoder: Encoder, *, title: str, check_all: bool = False) -> EncodedRows:
    """Return the tokens of a few rows without the cache. The arguments are those of `read_or_encode`."""
    batches = list(encode_split(split, encoder, title=title, check_all=check_all))
    entries = (entry for batch in batches for entry in batch.rejected)
    rejected, kinds = _collect(split, entries, len(split.order))
    rows = Dataset(pa.concat_tables([SCHEMA.empty_table(), *(batch.rows.data.table for batch in batches)]))
    return EncodedRows(rows, rejected, bad_rows=kinds, parts=_digest_parts(split, encoder))


def _collect(split: Split, entries: Iterable[dict[str, Any]], most_bad_rows: int) -> tuple[list[dict[str, Any]], Kinds]:
    """Return the rejected rows of a split, and the kinds of those that cannot be trained.

    With weights a row may occur several times; among the kinds it counts once.
    """
    rejected: list[dict[str, Any]] = []
    kinds: Kinds = {}
    seen = np.zeros(len(split.rows), dtype=bool)
    for entry in entries:
        if "bad_row" not in entry:
            rejected.append(entry)
            continue
        number = entry["row"]
        if not seen[number]:
            seen[number] = True
            bad_row = BadRow(*entry["bad_row"])
            bad_rows.add(kinds, bad_row, number=number, place=split.row_name(number))
        if bad_rows.count(kinds) <= most_bad_rows:
            rejected.append(entry)
    return rejected, kinds


def pack(
    encoded: EncodedRows, max_length: int, strategy: str, *, seed: int | None, groups: RowGroups | None = None
) -> Dataset:
    """Return packs of rows, made by TRL's own `pack_dataset`.

    Args:
        encoded: the rows.
        max_length: tokens of a pack.
        strategy: `packing_strategy` of `SFTConfig`.
        seed: rows are shuffled with it before packing and packs after it, as `train.shuffle_dataset` does; None = no.
        groups: of the rows of the split; None = the packs have none.

    Returns:
        input_ids and labels, each (max_length,) at most; seq_lengths where the rows of a pack are kept apart; the
        columns of `row_groups` where there are groups.

    """
    rows = encoded.rows.select_columns(["input_ids", "labels"])
    parts = [encoded.key, max_length, strategy, seed, trl.__version__]
    if groups is not None:
        numbers = row_groups.number_rows(groups, encoded)
        rows = row_groups.add_to_tokens(rows, numbers, key=encoded.key)
        parts.append(row_groups.digest_numbers(numbers))
    rows = rows if seed is None else rows.shuffle(seed=seed)
    key = _digest(json.dumps(parts))
    packs = pack_dataset(rows, max_length, strategy, {"desc": "Packing", "new_fingerprint": key[:16]})
    packs = packs if groups is None else row_groups.merge_runs(packs, key=key)
    return packs if seed is None else packs.shuffle(seed=seed)


def _write(
    split: Split, encoder: Encoder, folder: Path, *, parts: Mapping[str, str], title: str, check_all: bool
) -> None:
    """Tokenize a split and write the tokens to `folder`, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
    try:
        with (
            pa.ipc.new_stream(str(unfinished / _ROWS), SCHEMA) as rows,
            (unfinished / _REJECTS).open("w", encoding="utf-8") as rejects,
        ):
            for batch in encode_split(split, encoder, title=title, check_all=check_all):
                rows.write_table(batch.rows.data.table)
                rejects.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in batch.rejected)
        if check_all:
            (unfinished / _CHECKED).touch()
        (unfinished / _KEY).write_text(json.dumps(parts), encoding="utf-8")
        with contextlib.suppress(OSError):  # another process was first: it wrote the same
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _digest_parts(split: Split, encoder: Encoder) -> dict[str, str]:
    """Return all that decides what the tokens are: the name of each part, and its digest."""
    tokenizer = encoder.tokenizer
    if encoder.backend is not None:
        vocabulary = encoder.backend.to_str()
    else:
        arguments = sorted(map(str, tokenizer.init_kwargs.items()))
        vocabulary = repr([sorted(tokenizer.get_vocab().items()), arguments, type(tokenizer)])
    template: list[str] = []
    if encoder.settings.row_type == CHAT:  # what it renders is a part too: a template may write today's date
        rendered = chat_template.render_trials(tokenizer, encoder.template_kwargs)
        template = [chat_template.read_template(tokenizer), rendered]
    parts = {
        "rows": split.fingerprint,
        "order of the rows": hashlib.sha256(split.order.tobytes()).hexdigest(),
        "chat template": json.dumps([template, encoder.template_kwargs], sort_keys=True, default=str),
        "tokenizer": vocabulary + repr(sorted(tokenizer.special_tokens_map.items())),
        "settings": repr(encoder.settings),
        "version": repr([datasets.__version__, tokenizers.__version__, transformers.__version__]),
        "code": CODE,
    }
    return {name: _digest(value) for name, value in parts.items()}


def _explain_miss(last: Path, parts: Mapping[str, str]) -> str:
    """Return why the cache has no tokens; `last` has the parts of this recipe's previous run."""
    try:
        before = json.loads(last.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "first run of this recipe"
    changed = [name for name, digest in parts.items() if before.get(name) != digest]
    return f"changed: {', '.join(changed)}" if changed else "the cache was deleted"


def _digest(text: str) -> str:
    """Return the first 32 hexadecimal digits of a text's sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]
