"""Sources that are streamed: read, formatted and made tokens while training goes on, nothing kept.

In: a `Run` whose sources say `streaming: true`, and their first rows, already formatted and checked. Out: a
`datasets.IterableDataset` of the same tokens that the pass on disk would make, and counts of what came by.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets, interleave_datasets
from trl import SFTConfig, pack_dataset

from trl_sft import conversion, prepared, rendered, sources, tokens
from trl_sft.data import Rows
from trl_sft.run import Run, Source
from trl_sft.source_rows import Part, seed
from trl_sft.tokens import Encoder

_BATCH = 1000
_FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})

Seen = dict[str, Counter[str]]  # source -> what came by so far: rows, rejected, cut, tokens, trained


def made(run: Run, rows: Rows, encoder: Encoder, args: SFTConfig) -> tuple[IterableDataset, Seen]:
    """Return the tokens of all sources as a stream, mixed by weight and packed as the recipe says.

    With weights rows are drawn by them with the run's seed until every source came to its end once, so the
    shares are approximate; without, one source follows the other.
    """
    seen: Seen = {}
    parts = zip(run.sources["train"], rows.train.parts, strict=True)
    streams = [_stream(run, source, part, encoder, seen) for source, part in parts]
    weights = [part.weight for part in rows.train.parts if part.weight is not None]
    if weights and len(streams) > 1:
        shares = [weight / sum(weights) for weight in weights]
        whole = interleave_datasets(streams, shares, seed=seed(run), stopping_strategy="all_exhausted")
    else:
        whole = concatenate_datasets(streams) if len(streams) > 1 else streams[0]
    if args.packing:
        whole = pack_dataset(whole, args.max_length, args.packing_strategy)
    return whole, seen


def ledger(seen: Mapping[str, Counter[str]]) -> dict[str, Any]:
    """Return what came by, as `ledger.json` has it; rows that several processes read are not in it."""
    return {"streamed": True, "sources": [{"name": name} | dict(counts) for name, counts in seen.items()]}


def _stream(run: Run, source: Source, part: Part, encoder: Encoder, seen: Seen) -> IterableDataset:
    def name(number: int) -> str:
        return f"{part.name} row {number + 1}"

    def rows() -> Iterator[dict[str, Any]]:
        counts = seen.setdefault(part.name, Counter())
        for start, batch in _forms(run, source, part):
            numbers = list(range(start, start + len(next(iter(batch.values())))))
            check = (np.random.default_rng(start).random(len(numbers)) < prepared.SAMPLE).tolist()
            texts = rendered.rendered(encoder, batch, numbers, check, name)
            for piece in tokens.pieces(texts):
                out = tokens.labelled(
                    encoder, piece, tokens.encoded(encoder, piece), lambda n: f"{part.name} row {n + 1}"
                )
                counts.update(_counted(out))
                for ids, labels in zip(out.input_ids, out.labels, strict=True):
                    yield {"input_ids": ids.tolist(), "labels": labels.tolist()}

    return IterableDataset.from_generator(rows, features=_FEATURES)


def _forms(run: Run, source: Source, part: Part) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """Yield formatted rows by column, with the number of the first in the source."""
    assert part.how is not None
    start, left = 0, source.max_rows
    for table in sources.stream(run.recipe, source, "train").with_format("arrow").iter(_BATCH):
        rows = Dataset(table if left is None else table.slice(0, left))
        if not len(rows):
            return
        batch = conversion.convert(rows[:], list(range(start, start + len(rows))), part.how, rows.features)
        if "tools" in batch:
            batch["tools"] = [json.loads(value) if value else None for value in batch["tools"]]
        yield start, batch
        start += len(rows)
        left = None if left is None else left - len(rows)


def _counted(out: tokens.Made) -> Counter[str]:
    counts = Counter(
        rows=len(out.number) + len(out.rejected),
        kept=len(out.number),
        tokens=sum(map(len, out.input_ids)),
        trained=sum(out.trained),
        cut=sum(len(ids) < total for ids, total in zip(out.input_ids, out.total, strict=True)),
        without_end=out.ended.count(False),
    )
    counts.update(f"rejected: {row['reason']}" for row in out.rejected)
    return counts
