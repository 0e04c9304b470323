"""One pass over formatted rows, written to disk as it goes; the same pass is not made twice.

In: formatted rows and an `Encoder`. Out: `Tokens`, a memory-mapped dataset with what was counted of each
row, and the rows that were left out. Memory does not grow with the rows: a batch is rendered while another
thread tokenizes the one before. What is written is whole or absent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import tokenizers
import transformers
import trl
from datasets import Dataset
from tqdm.auto import tqdm
from trl import pack_dataset

from trl_sft import run_folder
from trl_sft.console import shows_progress
from trl_sft.data import code_digest
from trl_sft.data.code_digest import digest_code, get_fingerprint, set_fingerprint
from trl_sft.data.formats import CHAT
from trl_sft.tokenization import chat_template, encode, render
from trl_sft.tokenization.encode import EncodedBatch, Encoder

_BATCH = 1000  # rows read at once
_CHECKED = 1000  # rows of which every one is checked by a second way
SAMPLE, _SEED = 0.01, 0  # of the rest
_ROWS, _REJECTS, _KEY = "rows.arrow", "rejects.jsonl", "key.json"
# Code that changed must not meet tokens that the old one made.
CODE = digest_code(Path(code_digest.__file__).parent, Path(__file__).parent)
_LISTS = {"input_ids": pa.list_(pa.int32()), "labels": pa.list_(pa.int32())}
_COUNTS = {"number": pa.int64(), "total": pa.int32(), "target": pa.int32(), "trained": pa.int32(), "ended": pa.bool_()}
_SCHEMA = pa.schema(_LISTS | _COUNTS)


class Tokens(NamedTuple):
    """What a pass made of rows."""

    rows: Dataset  # input_ids, labels: (tokens,) each; number, total, target, trained, ended: one each
    rejected: list[dict[str, Any]]  # number, reason, tokens, begins
    said: str  # whether it was read from the cache, and why not
    key: str


class Work(NamedTuple):
    """Rows to be made tokens."""

    forms: Dataset
    order: np.ndarray  # int64: which rows, in which order; one may come several times
    name: Callable[[int], str]  # of a formatted row, for messages
    title: str  # for the progress bar
    thorough: bool = False  # whether every row is checked by a second way, though the tokens may be in the cache


def made(work: Work, encoder: Encoder, recipe: Path) -> Tokens:
    """Return the tokens of rows, read where the same pass was made before. Raises DataError, TemplateError."""
    parts = _parts(work, encoder)
    key = _digest(json.dumps(parts, sort_keys=True))
    root = Path(datasets.config.HF_DATASETS_CACHE) / "trl_sft"
    folder = root / key
    found = (folder / _KEY).is_file()
    why = "" if found else _why(root, recipe, work.title, parts)
    if found and work.thorough:  # what is there stays: a run may read it now
        for _ in batches(work, encoder):
            pass
    elif not found:
        _write(work, encoder, folder, parts)
    _remember(root, recipe, work.title, parts)
    rows = Dataset.from_file(str(folder / _ROWS))
    set_fingerprint(rows, key)
    with (folder / _REJECTS).open(encoding="utf-8") as file:
        rejected = [json.loads(line) for line in file]
    again = ", every row checked anew" if work.thorough else ""
    said = f"read from {folder}{again}" if found else f"made now ({why})"
    return Tokens(rows, rejected, said, key)


def in_memory(work: Work, encoder: Encoder) -> Tokens:
    """Return the tokens of a few rows, without writing anything."""
    made = list(batches(work, encoder))
    rows = Dataset(pa.Table.from_batches(map(_arrow, made), _SCHEMA))
    rejected = [row for batch in made for row in batch.rejected]
    return Tokens(rows, rejected, "not cached", get_fingerprint(rows))


def packed(made: Tokens, max_length: int, strategy: str, seed: int | None) -> Dataset:
    """Return packs of rows by TRL's own `pack_dataset`: input_ids, labels, seq_lengths where documents are kept apart.

    `seed`: shuffle with it before and after, as `train.shuffle_dataset` asks; None = keep the order.
    """
    rows = made.rows.select_columns(["input_ids", "labels"])
    rows = rows if seed is None else rows.shuffle(seed=seed)
    key = _digest(json.dumps([made.key, max_length, strategy, seed, trl.__version__]))
    packs = pack_dataset(rows, max_length, strategy, {"desc": "Packing", "new_fingerprint": key[:16]})
    return packs if seed is None else packs.shuffle(seed=seed)


def columns(table: pa.Table) -> dict[str, list[Any]]:
    """Return a batch of formatted rows as Python's values; messages are JSON in Arrow."""
    out = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if name in ("prompt", "completion") and pa.types.is_list(column.type):
            values = json.loads("[" + ",".join(column.flatten().to_pylist()) + "]")
            ends = np.cumsum(column.value_lengths().to_numpy(zero_copy_only=False)).tolist()
            out[name] = [values[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
        elif name == "tools":
            out[name] = [json.loads(value) if value else None for value in column.to_pylist()]
        else:
            out[name] = column.to_pylist()
    return out


def batches(work: Work, encoder: Encoder) -> Iterator[EncodedBatch]:
    """Yield rows as tokens; one batch is tokenized while the next is rendered."""
    rows = work.forms.with_format("arrow")
    every = np.random.default_rng(_SEED).random(len(work.order)) < (1 if work.thorough else SAMPLE)
    every[:_CHECKED] = True
    wanted = [name for name in ("prompt", "completion", "text", "tools", "untrained") if name in rows.column_names]
    rows = rows.select_columns(wanted)

    def given() -> Iterator[list[encode.Row]]:
        for start in range(0, len(work.order), _BATCH):
            numbers = work.order[start : start + _BATCH]
            straight = numbers[-1] - numbers[0] == len(numbers) - 1 and bool((np.diff(numbers) == 1).all())
            table = rows[int(numbers[0]) : int(numbers[-1]) + 1] if straight else rows[numbers]
            batch, check = columns(table), every[start : start + _BATCH].tolist()
            yield from encode.pieces(render.rendered(encoder, batch, numbers.tolist(), check, work.name))

    with (
        ThreadPoolExecutor(1) as pool,
        tqdm(total=len(work.order), desc=work.title, unit=" rows", disable=not shows_progress(), leave=False) as bar,
    ):

        def done(piece: list[encode.Row], coming: Future[Any]) -> EncodedBatch:
            bar.update(len(piece))
            return encode.labelled(encoder, piece, coming.result(), work.name)

        waiting: tuple[list[encode.Row], Future[Any]] | None = None
        for piece in given():
            coming = pool.submit(encode.encoded, encoder, piece)
            if waiting is not None:
                yield done(*waiting)
            waiting = piece, coming
        if waiting is not None:
            yield done(*waiting)


def _write(work: Work, encoder: Encoder, folder: Path, parts: Mapping[str, str]) -> None:
    """Make the pass and write it to `folder`, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
    try:
        with (
            pa.ipc.new_stream(str(part / _ROWS), _SCHEMA) as rows,
            (part / _REJECTS).open("w", encoding="utf-8") as rejects,
        ):
            for batch in batches(work, encoder):
                rows.write_batch(_arrow(batch))
                rejects.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in batch.rejected)
        (part / _KEY).write_text(json.dumps(parts), encoding="utf-8")
        with contextlib.suppress(OSError):  # another process was first: what it wrote is the same
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _arrow(batch: EncodedBatch) -> pa.RecordBatch:
    lists = [_flat(values) for values in (batch.input_ids, batch.labels)]
    counts = [pa.array(values, kind) for values, kind in zip(batch[2:7], _COUNTS.values(), strict=True)]
    return pa.record_batch([*lists, *counts], schema=_SCHEMA)


def _flat(values: Sequence[np.ndarray]) -> pa.ListArray:
    """Return arrays as one list column: (rows, tokens)."""
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    flat = np.concatenate(values) if values else np.zeros(0, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def _parts(work: Work, encoder: Encoder) -> dict[str, str]:
    """Return all that decides what the tokens are, each part by name and digest."""
    tokenizer, plan = encoder.tokenizer, encoder.plan
    slow = repr(
        [sorted(tokenizer.get_vocab().items()), sorted(map(str, tokenizer.init_kwargs.items())), type(tokenizer)]
    )
    learned = encoder.backend.to_str() if encoder.backend is not None else slow
    # what it writes counts too: a template may ask for the day
    template = (
        [chat_template.text(tokenizer), chat_template.everything(tokenizer, encoder.keywords)]
        if plan.form == CHAT
        else []
    )
    given = {
        "rows": get_fingerprint(work.forms),
        "order of the rows": hashlib.sha256(work.order.tobytes()).hexdigest(),
        "chat template": json.dumps([template, encoder.keywords], sort_keys=True, default=str),
        "tokenizer": learned + repr(sorted(tokenizer.special_tokens_map.items())),
        "settings": repr(plan),
        "version": repr([datasets.__version__, tokenizers.__version__, transformers.__version__]),
        "code": CODE,
    }
    return {name: _digest(value) for name, value in given.items()}


def _why(root: Path, recipe: Path, title: str, parts: Mapping[str, str]) -> str:
    """Return why a pass is not in the cache."""
    try:
        before = json.loads(_memory(root, recipe, title).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "the first time for this recipe"
    changed = [name for name, digest in parts.items() if before.get(name) != digest]
    return f"changed: {', '.join(changed)}" if changed else "the cache was emptied"


def _remember(root: Path, recipe: Path, title: str, parts: Mapping[str, str]) -> None:
    run_folder.write_text(_memory(root, recipe, title), json.dumps(dict(parts)))


def _memory(root: Path, recipe: Path, title: str) -> Path:
    """Return the file that holds what this recipe's last pass was made of."""
    return root / f"last-{_digest(f'{recipe} {title}')[:16]}.json"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
