"""What became of every row and token: counted from the tokens themselves, per source and task.

In: rows with their order, and the tokens that a pass made of them. Out: `ledger.json`, `rejects.jsonl`, lines
for the screen; or a refusal, where too little is left to train. Nothing is lost without standing here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset
from trl import SFTConfig, pack_dataset

from trl_sft.console import format_rows
from trl_sft.data.formats import TASK
from trl_sft.data.pipeline import Split
from trl_sft.data.rows import MAX_UNTRAINED, UNTRAINED, RunRows
from trl_sft.errors import DataError, Fault
from trl_sft.recipe.checked import Run
from trl_sft.tokenization.cache import Tokens

_QUANTILES = {"min": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
_PACKED_AT_ONCE = 1000  # rows, datasets' batch
_LOSS_ON = {
    "completion": "the completions",
    "assistant": "every assistant turn",
    "last_turn": "the last assistant turn",
    "all": "all of them",
}


class Counts(NamedTuple):
    """One number of each kept row, in the order of training: (rows,) each."""

    source: np.ndarray  # which part
    number: np.ndarray  # of the formatted row
    total: np.ndarray  # tokens before a cut
    target: np.ndarray  # tokens with loss before a cut
    trained: np.ndarray  # tokens with loss
    kept: np.ndarray  # tokens
    ended: np.ndarray  # whether the last answer's end is there


def count(split: Split, made: Tokens, packs: Dataset | None, batch: int, max_length: int | None) -> dict[str, Any]:
    """Return the ledger of one split. `packs` are None where rows are not packed, `batch` is of one device."""
    counts = _counts(split, made)
    everything = np.ones(len(counts.number), dtype=bool)
    weights = [part.weight for part in split.sources]
    planned = [w / sum(w or 0 for w in weights) if w else None for w in weights]
    sources = []
    rejected = _rejected(split, made)
    parts = split.source_indices[split.order]
    for number, part in enumerate(split.sources):
        entry: dict[str, Any] = {"name": part.name} | _entry(counts, counts.source == number)
        rows = split.order[parts == number]
        entry["rows"] |= {"in": len(rows) + rejected[number][1], "repeats": len(rows) - len(np.unique(rows))}
        entry["rows"]["rejected"] = rejected[number][0]
        of = {"planned": planned[number], "rows": _share(entry["rows"]["kept"], len(counts.number))}
        entry["share"] = of | {"tokens": _share(entry["tokens"]["kept"], int(counts.kept.sum()))}
        sources.append(entry)
    out = _entry(counts, everything)
    out["rows"] |= {name: sum(s["rows"][name] for s in sources) for name in ("in", "repeats")}
    out["rows"]["rejected"] = dict(sum((Counter(s["rows"]["rejected"]) for s in sources), Counter()))
    out["lengths"] = {name: int(np.quantile(counts.total, q)) for name, q in _QUANTILES.items() if len(everything)}
    out["padding"] = {"without_packing": _padding(counts.kept, batch), "packed": None, "packs": None}
    if packs is not None:
        room = len(packs) * (max_length or 0)
        out["padding"] |= {"packs": len(packs), "packed": _share(room - int(counts.kept.sum()), room)}
    elif max_length is not None and len(counts.kept):
        out["padding"]["packed"] = _if_packed(made, max_length)
    return out | {"sources": sources, "tasks": _tasks(split, counts)}


def rejects(split: Split, made: Tokens, part: str) -> Iterator[dict[str, Any]]:
    """Yield every row that was left out: part, source, row (from 1), reason, and how it begins."""
    for reason, numbers in split.removed_rows.items():
        for number in numbers.tolist():
            yield _named(split, part, number) | {"reason": reason}
    for row in made.rejected:
        yield _named(split, part, row["number"]) | {name: row[name] for name in ("reason", "tokens", "begins")}


def check(run: Run, split: Split, made: Tokens, part: str) -> None:
    """Refuse rows of which too many, or all, have no trained token. Raises DataError."""
    bare = [row for row in made.rejected if row["reason"].startswith(UNTRAINED)]
    limit = float(run.data.get("max_untrained", MAX_UNTRAINED))
    cut = any("max_length" in row["reason"] for row in made.rejected)
    where = run.recipe.where(("train", "max_length") if cut and "max_length" in run.train else ("data", part))
    if not len(made.rows):
        first = made.rejected[0]
        found = f"no row to {part} keeps a trained token: {split.row_name(first['number'])}: {first['reason']}"
        write = "a larger train.max_length, or shorter prompts" if cut else "rows with an answer that is trained"
        raise DataError(Fault(where, found, write))
    if len(bare) > limit * len(split.order) and "untrained_rows" not in run.options.get("allow", []):
        found = (
            f"{len(bare):,} of {len(split.order):,} rows to {part} have {bare[0]['reason']}, over {limit:.0%}; "
            f"the first is {split.row_name(bare[0]['number'])}, "
            f"{bare[0]['tokens']:,} tokens, {bare[0]['begins'][:40]!r}"
        )
        write = "a larger train.max_length, " if cut else ""
        raise DataError(Fault(where, found, f"{write}data.max_untrained, or run.allow: [untrained_rows]"))


def lines(
    run: Run, rows: RunRows, ledger: Mapping[str, Any], args: SFTConfig, whole: bool = True
) -> Iterator[tuple[str, str]]:
    """Yield what the screen shows of a ledger: name and value. Shares are said of `whole` sources alone."""
    of = ledger["train"]
    count, tokens = of["rows"], of["tokens"]
    out = ", ".join(f"{number:,} {reason}" for reason, number in count["rejected"].items())
    yield "rows", f"{count['kept']:,} to train" + (f"; left out: {out}" if out else "")
    for name, held in ledger["eval"].items():
        spare = ", ".join(f"{number:,} {reason}" for reason, number in held["rows"]["rejected"].items())
        title = "" if name == "eval" else f"{name}: "
        yield "held out", f"{title}{format_rows(held['rows']['kept'])}" + (f"; left out: {spare}" if spare else "")
    yield "tokens", f"{tokens['kept']:,}, of which {tokens['trained']:,} carry loss ({_LOSS_ON[rows.loss_on]})"
    if count["cut"]:
        default = "" if "max_length" in run.train else ", which is TRL's default and not in the recipe"
        ends = f"; {of['without_end']:,} answers lose their end" if of["without_end"] else ""
        off, loss = tokens["total"] - tokens["kept"], tokens["target"] - tokens["trained"]
        lost = f"{off:,} tokens cut off, {loss:,} of them with loss{ends}"
        yield "cut", f"{format_rows(count['cut'])} at max_length {args.max_length}{default}: {lost}"
    lengths = of["lengths"]
    yield "lengths", f"median {lengths['median']:,} tokens, 99% up to {lengths['p99']:,}, longest {lengths['max']:,}"
    yield "padding", _padded(of["padding"], args)
    if whole and len(of["sources"]) > 1:
        for source in of["sources"]:
            share = source["share"]
            asked = f" (asked: {share['planned']:.1%})" if share["planned"] is not None else ""
            more = f", {source['rows']['repeats']:,} of them repeated" if source["rows"]["repeats"] else ""
            told = f"{format_rows(source['rows']['kept'])}{more}: {share['rows']:.1%} of the rows{asked}"
            yield "share", f"{source['name']}: {told}, {share['tokens']:.1%} of the tokens"


def _padded(padding: Mapping[str, Any], args: SFTConfig) -> str:
    without = f"{padding['without_packing']:.0%} of a batch of {args.per_device_train_batch_size}"
    if padding["packed"] is None:
        return without
    if padding["packs"] is None:
        return f"{without}; packs of {args.max_length} tokens (train.packing) would leave {padding['packed']:.1%} empty"
    return f"{without} unpacked; {padding['packs']:,} packs of {args.max_length} leave {padding['packed']:.1%} empty"


def _counts(split: Split, made: Tokens) -> Counts:
    table = made.rows.data
    values = {name: table[name].to_numpy() for name in ("number", "total", "target", "trained", "ended")}
    lengths = pc.list_value_length(table["input_ids"]).to_numpy()
    return Counts(split.source_indices[values["number"]], kept=lengths, **values)


def _entry(counts: Counts, mask: np.ndarray) -> dict[str, Any]:
    total, kept = counts.total[mask], counts.kept[mask]
    tokens = {"total": total, "kept": kept, "target": counts.target[mask], "trained": counts.trained[mask]}
    return {
        "rows": {"kept": int(mask.sum()), "cut": int((kept < total).sum())},
        "tokens": {name: int(values.sum()) for name, values in tokens.items()},
        "without_end": int((~counts.ended[mask]).sum()),
    }


def _rejected(split: Split, made: Tokens) -> list[tuple[dict[str, int], int]]:
    """Return for each part how many rows were left out, by reason, and how many of them before the mixing."""
    left = [(reason, numbers) for reason, numbers in split.removed_rows.items()]
    late = [(row["reason"], np.array([row["number"]])) for row in made.rejected]
    found = [Counter[str]() for _ in split.sources]
    early = [0] * len(split.sources)
    for reason, numbers in (*left, *late):
        for part, number in enumerate(
            np.bincount(split.source_indices[numbers], minlength=len(split.sources)).tolist()
        ):
            found[part] += Counter({reason: number})
            early[part] += number if reason in split.removed_rows else 0
    return [(dict(counts), number) for counts, number in zip(found, early, strict=True)]


def _tasks(split: Split, counts: Counts) -> dict[str, Any]:
    """Return the same counts by the rows' label, where they have one."""
    if TASK not in split.rows.column_names:
        return {}
    labels = np.array([label or "" for label in split.rows.data[TASK].to_pylist()], dtype=object)[counts.number]
    return {name: _entry(counts, labels == name) for name in sorted(set(labels.tolist()) - {""})}


def _if_packed(made: Tokens, max_length: int) -> float:
    """Return which share of packs the first rows would leave empty: as many as TRL packs at once."""
    rows = made.rows.select(range(min(len(made.rows), _PACKED_AT_ONCE))).select_columns(["input_ids"])
    packs = pack_dataset(Dataset(rows.with_format("arrow")[:]), max_length, "bfd")
    room = len(packs) * max_length
    return _share(room - sum(map(sum, packs["seq_lengths"])), room)


def _padding(lengths: np.ndarray, batch: int) -> float:
    """Return the share of padding in batches of rows drawn by lot."""
    if not len(lengths):
        return 0.0
    drawn = np.random.default_rng(0).permutation(lengths)
    whole = np.pad(drawn, (0, -len(drawn) % batch)).reshape(-1, batch)
    room = int((whole.max(axis=1) * (whole > 0).sum(axis=1)).sum())
    return _share(room - int(lengths.sum()), room)


def _share(part: int, whole: int) -> float:
    return round(part / whole, 6) if whole else 0.0


def _named(split: Split, part: str, number: int) -> dict[str, Any]:
    source = split.sources[split.source_indices[number]]
    return {"part": part, "source": source.name, "row": int(split.row_numbers[number]) + 1}
