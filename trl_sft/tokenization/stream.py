"""Sources that are streamed: read, formatted and made tokens while training goes on, nothing kept.

In: a `Run` whose sources say `streaming: true`, and their first rows, already formatted and checked. Out: a
`datasets.IterableDataset` of the same tokens that the pass on disk would make, and counts of what came by.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets, interleave_datasets
from trl import SFTConfig, pack_dataset

from trl_sft.data import load, mix, pipeline
from trl_sft.data.pipeline import FormattedSource
from trl_sft.data.rows import LEAKED, MAX_UNTRAINED, UNTRAINED, RunRows
from trl_sft.errors import DataError, Fault
from trl_sft.recipe.checked import Run, Source
from trl_sft.tokenization import cache, encode, render
from trl_sft.tokenization.encode import Encoder

_BATCH = 1000
_FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})

Seen = dict[str, Counter[str]]  # source -> what came by so far: rows, rejected, cut, tokens, trained

# datasets draws from several streams in threads, and a template's markers are kept in the template that all share
_RENDERING = threading.Lock()


def made(run: Run, rows: RunRows, encoder: Encoder, args: SFTConfig) -> tuple[IterableDataset, Seen]:
    """Return the tokens of all sources as a stream, mixed by weight and packed as the recipe says.

    With weights rows are drawn by them with the run's seed until every source came to its end once, so the
    shares are approximate; without, one source follows the other.
    """
    seen: Seen = {}
    parts = zip(run.sources["train"], rows.train.sources, strict=True)
    held = (
        [mix.dataset_keys(split.rows) for split in rows.eval.values()]
        if run.data.get("drop_leaked") is not False
        else []
    )
    known = {int(key) for keys in held for key in keys}
    streams = [_stream(run, (source, part), encoder, seen, known) for source, part in parts]
    weights = [part.weight for part in rows.train.sources if part.weight is not None]
    if weights and len(streams) > 1:
        shares = [weight / sum(weights) for weight in weights]
        whole = interleave_datasets(streams, shares, seed=mix.run_seed(run), stopping_strategy="all_exhausted")
    else:
        whole = concatenate_datasets(streams) if len(streams) > 1 else streams[0]
    if args.packing:
        whole = pack_dataset(whole, args.max_length, args.packing_strategy)
    return whole.repeat(None), seen  # without an end: a run that goes on passes over what it has seen, epochs too


def ledger(seen: Mapping[str, Counter[str]]) -> dict[str, Any]:
    """Return what came by, as `ledger.json` has it; rows that other processes read are not in it."""
    counted = "rows as they were read, with those read ahead and those that a run which goes on passes over"
    return {
        "streamed": True,
        "counted": counted,
        "sources": [{"name": name} | dict(counts) for name, counts in seen.items()],
    }


def _stream(
    run: Run, of: tuple[Source, FormattedSource], encoder: Encoder, seen: Seen, known: set[int]
) -> IterableDataset:
    """Return the tokens of one source; `known` are the keys of held-out rows, which are dropped."""
    source, part = of

    def name(number: int) -> str:
        return f"{part.name} row {number + 1}"

    def rows() -> Iterator[dict[str, Any]]:
        counts = seen.setdefault(part.name, Counter())
        for start, read in _forms(run, source, part):
            keys = mix.batch_keys(read) if known else []
            leaked = {n for n, key in enumerate(keys) if key in known}
            counts.update({"rows": len(leaked), f"rejected: {LEAKED}": len(leaked)} if leaked else {})
            kept = [n for n in range(len(next(iter(read.values())))) if n not in leaked]
            batch = {column: [values[n] for n in kept] for column, values in read.items()}
            numbers = [start + n for n in kept]
            check = (np.random.default_rng(start).random(len(numbers)) < cache.SAMPLE).tolist()
            with _RENDERING:
                texts = list(render.rendered(encoder, batch, numbers, check, name))
            for piece in encode.pieces(iter(texts)):
                out = encode.labelled(encoder, piece, encode.encoded(encoder, piece), name)
                counts.update(_counted(out))
                _check(run, part.name, counts)
                for ids, labels in zip(out.input_ids, out.labels, strict=True):
                    yield {"input_ids": ids.tolist(), "labels": labels.tolist()}

    return IterableDataset.from_generator(rows, features=_FEATURES)


def _forms(run: Run, source: Source, part: FormattedSource) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """Yield formatted rows by column, with the number of the first in the source."""
    start, left = 0, source.max_rows
    for table in _tables(run, source):
        rows = Dataset(table if left is None else table.slice(0, left))
        if not len(rows):
            return
        batch = pipeline.format_batch(
            rows[:],
            list(range(start, start + len(rows))),
            source_format=part.source_format,
            column_types=rows.features,
        )
        if "tools" in batch:
            batch["tools"] = [json.loads(value) if value else None for value in batch["tools"]]
        yield start, batch
        start += len(rows)
        left = None if left is None else left - len(rows)


def _tables(run: Run, source: Source) -> Iterator[pa.Table]:
    """Yield the rows of a source as datasets reads them. Foreign errors become DataError here."""
    tables = load.stream_source(run.recipe, source).with_format("arrow").iter(_BATCH)
    while True:
        try:
            yield next(tables)
        except StopIteration:
            return
        except DataError:
            raise
        except Exception as error:
            raise load.explain_unreadable(run.recipe, source, error) from None


def _check(run: Run, name: str, counts: Counter[str]) -> None:
    """Refuse a stream of which too many rows have no trained token, once enough were read. Raises DataError."""
    bare = sum(number for reason, number in counts.items() if reason.startswith(f"rejected: {UNTRAINED}"))
    limit = float(run.data.get("max_untrained", MAX_UNTRAINED))
    if counts["rows"] < _BATCH or bare <= limit * counts["rows"] or "untrained_rows" in run.options.get("allow", []):
        return
    found = f"{bare:,} of the {counts['rows']:,} rows of {name} that were read have no trained token"
    write = "a larger train.max_length, data.max_untrained, or run.allow: [untrained_rows]"
    raise DataError(Fault(run.recipe.where(("data", "train")), found, write))


def _counted(out: encode.EncodedBatch) -> Counter[str]:
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
