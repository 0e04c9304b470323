"""Streamed sources: read, formatted and tokenized while the run trains; no row is stored.

Inputs: a `Run` whose sources have `streaming: true`, and their first rows, already formatted and checked. Outputs: a
`datasets.IterableDataset` of the same tokens that `cache` would write, and counts of the rows that were read. Not here:
how a row becomes tokens (`render`, `encode`).
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Features, IterableDataset, List, Value, concatenate_datasets, interleave_datasets
from trl import SFTConfig, pack_dataset

from trl_sft.data import bad_rows, load, mix, pipeline, unread_keys
from trl_sft.data.bad_rows import BadRow
from trl_sft.data.formats import TEXT
from trl_sft.data.pipeline import FormattedSource
from trl_sft.data.rows import LEAKED, RunRows
from trl_sft.data.source_rows import RowPlaces
from trl_sft.errors import DataError, Fault, TemplateError
from trl_sft.recipe.checked import Run
from trl_sft.tokenization import encode, ledger, prompt_tokens, render, row_groups, thinking
from trl_sft.tokenization.encode import EncodedRows
from trl_sft.tokenization.encoder import Encoder
from trl_sft.tokenization.render import RenderedRow

_BATCH_ROWS = 1000
_FEATURES = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})
_REJECTED = "rejected: "  # begins the count of each reason
_BAD_ROWS = "bad_rows"  # the count of rows that cannot be trained; rows that a function drops are not among them
_NO_ANSWER_END = "no_answer_end"  # the count of rows that lose the end of each answer
# A run that resumes reads the rows that are trained already once more, to pass over them, so the counts are those of
# the whole run; with `ignore_data_skip` it reads none of them.
_NOTE = (
    "rows as the last process of the run read them, from the beginning of the stream, with rows read ahead and those "
    "that a resumed run skips; with ignore_data_skip only those since the run resumed; without those that workers of "
    "the data loader read"
)
_MAX_LISTED = 100_000  # rows of a source that `rejects.jsonl` lists

# source -> what was read of it so far: rows, kept, truncated, tokens, loss_tokens, missing_end_token,
# prompt_mismatch, answers by their beginning (`thinking.BEGINNINGS`), and for each reason "rejected: REASON"
StreamCounts = dict[str, Counter[str]]

# datasets reads several streams in threads; transformers keeps the markers of a template in one object for all
_RENDERING = threading.Lock()


def build_stream(
    run: Run, rows: RunRows, encoder: Encoder, *, args: SFTConfig, rejects: list[dict[str, Any]], is_grouped: bool
) -> tuple[IterableDataset, StreamCounts]:
    """Return the tokens of all sources as a stream, mixed by weight and packed as the recipe says.

    With weights rows are drawn by them with the run's seed until every source has ended once, so the shares are
    approximate. Without weights one source follows the other.

    Args:
        run: the checked recipe.
        rows: the first rows of each source, formatted.
        encoder: encodes the rows.
        args: the settings of the trainer.
        rejects: the lines of `rejects.jsonl`; rows that cannot be trained are added as they are read.
        is_grouped: whether rows carry the number of their source.

    Returns:
        The stream, which has no end, and the counts, which grow while it is read.

    """
    counts: StreamCounts = {}
    eval_keys: set[int] = set()
    if run.data.get("drop_leaked") is not False:
        eval_keys = {int(key) for split in rows.eval.values() for key in mix.dataset_keys(split.rows)}
    sources = rows.train.sources
    streams = [
        _stream_source(run, formatted, encoder=encoder, counts=counts, rejects=rejects, eval_keys=eval_keys)
        for formatted in sources
    ]
    if is_grouped:
        streams = [
            row_groups.add_to_stream(stream, number, is_packed=args.packing) for number, stream in enumerate(streams)
        ]
    weights = [source.weight for source in sources if source.weight is not None]
    if weights and len(streams) > 1:
        shares = [weight / sum(weights) for weight in weights]
        stream = interleave_datasets(streams, shares, seed=mix.run_seed(run), stopping_strategy="all_exhausted")
    else:
        stream = concatenate_datasets(streams) if len(streams) > 1 else streams[0]
    if args.packing:
        stream = pack_dataset(stream, args.max_length, args.packing_strategy)
    return stream.repeat(None), counts  # without an end: a resumed run skips what it has read, in later epochs too


def count_stream(counts: StreamCounts) -> dict[str, Any]:
    """Return the counts of a stream as `ledger.json` has them; rows that other processes read are not among them."""
    return {
        "streaming": True,
        "note": _NOTE,
        "sources": [
            {
                "name": name,
                "rows": {
                    "input": source["rows"],
                    "kept": source["kept"],
                    "truncated": source["truncated"],
                    "rejected": {
                        reason.removeprefix(_REJECTED): number
                        for reason, number in source.items()
                        if reason.startswith(_REJECTED)
                    },
                },
                "tokens": {"kept": source["tokens"], "loss": source["loss_tokens"]},
                "missing_end_token": source["missing_end_token"],
                "prompt_mismatch": source["prompt_mismatch"],
                "answers": {beginning: source[beginning] for beginning in thinking.BEGINNINGS},
            }
            for name, source in counts.items()
        ],
    }


def _stream_source(
    run: Run,
    formatted: FormattedSource,
    *,
    encoder: Encoder,
    counts: StreamCounts,
    rejects: list[dict[str, Any]],
    eval_keys: Collection[int],
) -> IterableDataset:
    """Return the tokens of one source without rows that cannot be trained or whose key is among `eval_keys`."""
    listed = {reject["row"] for reject in rejects if reject["part"] == "train" and reject["source"] == formatted.name}

    def leave_out(entries: Mapping[int, BadRow], start: int, places: RowPlaces) -> None:
        """Count rows that cannot be trained, and list each once. Raises DataError if they stop the run.

        `start`: the number of the first row of the batch, whose rows stand at `places`.
        """
        _check_bad_rows(run, entries, lambda number: places.name_row(number - start))
        for number, bad_row in entries.items():
            counts[formatted.name].update({"rows": 1, f"{_REJECTED}{bad_row.kind}": 1, _BAD_ROWS: bool(bad_row.code)})
            if number + 1 not in listed and len(listed) < _MAX_LISTED:
                listed.add(number + 1)
                rejects.append(_describe_reject(formatted.name, number, bad_row, places=places, start=start))

    def read_rows() -> Iterator[dict[str, Any]]:
        source_counts = counts.setdefault(formatted.name, Counter())
        for start, formatted_rows, places in _read_batches(run, formatted):
            _check_unread(run, formatted_rows[pipeline.UNREAD], places)
            bad_rows_here = _find_bad_rows(formatted_rows[pipeline.BAD_ROW])
            leave_out({start + index: bad_row for index, bad_row in bad_rows_here.items()}, start, places)
            keys = mix.batch_keys(formatted_rows) if eval_keys else []
            removed = {index for index, key in enumerate(keys) if key in eval_keys} - set(bad_rows_here)
            if removed:
                source_counts.update({"rows": len(removed), f"{_REJECTED}{LEAKED}": len(removed)})
            removed |= set(bad_rows_here)
            kept = [index for index in range(len(next(iter(formatted_rows.values())))) if index not in removed]
            batch = {column: [values[index] for index in kept] for column, values in formatted_rows.items()}
            numbers = [start + index for index in kept]
            check = (np.random.default_rng(start).random(len(numbers)) < encode.CHECKED_SHARE).tolist()
            with _RENDERING:
                texts = list(render.render_rows(encoder, batch, numbers=numbers, check=check))
            for texts_at_once in encode.split_into_batches(encoder, texts):
                encodings = encode.tokenize(encoder, texts_at_once)
                encoded = encode.label_rows(encoder, texts_at_once, encodings)
                refused = {
                    reject["row"]: BadRow(*reject["bad_row"]) for reject in encoded.rejected if "bad_row" in reject
                }
                leave_out(refused, start, places)
                source_counts.update(_count_batch(encoded))
                _check_counts(run, formatted.name, source_counts)
                if encoder.settings.row_type != TEXT:
                    _check_answer_ends(run, formatted.name, source_counts)
                _check_prompts(run, encoder, texts_at_once, encoded=encoded, counts=source_counts, name=formatted.name)
                yield from encoded.rows.data.table.select(["input_ids", "labels"]).to_pylist()

    return IterableDataset.from_generator(read_rows, features=_FEATURES)


def _read_batches(run: Run, formatted: FormattedSource) -> Iterator[tuple[int, Mapping[str, Any], RowPlaces]]:
    """Yield batches of formatted rows by column, with the number of the first row in the source, and their places."""
    start, limit = 0, formatted.source.max_rows
    for source_rows in load.stream_source(run.recipe, formatted.source):
        rows = source_rows.rows
        if limit is not None:
            rows = rows.select(range(min(len(rows), limit - start)))
        if not len(rows):
            return
        batch = pipeline.format_batch(rows[:], source_format=formatted.source_format, column_types=rows.features)
        if "tools" in batch:
            batch["tools"] = [json.loads(value) if value else None for value in batch["tools"]]
        yield start, batch, source_rows.places
        start += len(rows)


def _check_unread(run: Run, column: Sequence[str], places: RowPlaces) -> None:
    """Refuse a batch in which a column that nothing reads carries a meaning, unless accepted. Raises DataError."""
    if unread_keys.is_accepted(run):
        return
    for number, names in enumerate(column):
        if names:
            problem = f"the row has {names}, which bears on the loss or on what the model gets, and nothing reads it"
            fix = f"Rename it so that the format reads it, or accept with run.allow: [{unread_keys.ALLOW}]."
            raise DataError(Fault(places.name_row(number), problem, fix, code="data.unused_meaning"))


def _find_bad_rows(column: Sequence[str | None]) -> dict[int, BadRow]:
    """Return the rows of a batch that are not trained, by their position."""
    return {index: bad_rows.read_json(text) for index, text in enumerate(column) if text is not None}


def _check_bad_rows(run: Run, entries: Mapping[int, BadRow], row_name: Callable[[int], str]) -> None:
    """Stop the run for rows that cannot be trained, unless the recipe drops them. Raises DataError."""
    kinds: bad_rows.Kinds = {}
    for number, bad_row in entries.items():
        if bad_row.code and not (bad_row.can_be_dropped and bad_rows.drops_bad_rows(run)):
            bad_rows.add(kinds, bad_row, number=number, place=row_name(number))
    if kinds:
        raise DataError(list(bad_rows.list_kinds(kinds, hint=bad_rows.HINT)))


def _describe_reject(name: str, number: int, bad_row: BadRow, *, places: RowPlaces, start: int) -> dict[str, Any]:
    """Return the line of `rejects.jsonl` of a row that is left out. `start`: the number of the first of `places`."""
    place = {"part": "train", "source": name, "row": number + 1, **places.locate_row(number - start)}
    return place | {"reason": bad_row.kind} | ({"code": bad_row.code} if bad_row.code else {})


def _count_batch(encoded: EncodedRows) -> Counter[str]:
    """Return the counts of one batch, without rows that cannot be trained."""
    rejected = [reject for reject in encoded.rejected if "bad_row" not in reject]
    columns = {name: encoded.rows.data[name].to_numpy() for name in encode.SCHEMA.names if name not in _FEATURES}
    lengths = [len(ids) for ids in encoded.rows.data["input_ids"].to_pylist()]
    counts = Counter(
        rows=len(encoded.rows) + len(rejected),
        kept=len(encoded.rows),
        tokens=sum(lengths),
        loss_tokens=int(columns["loss_tokens"].sum()),
        truncated=int((np.array(lengths, dtype=np.int64) < columns["tokens_before_truncation"]).sum()),
        missing_end_token=int((~columns["has_end_token"]).sum()),
        no_answer_end=int((~columns["has_answer_end"]).sum()),
        prompt_mismatch=int(columns["prompt_mismatch"].sum()),
        **{name: int(columns[name].sum()) for name in thinking.BEGINNINGS},
    )
    counts.update(f"{_REJECTED}{reject['reason']}" for reject in rejected)
    return counts


def _check_counts(run: Run, name: str, counts: Counter[str]) -> None:
    """Refuse a stream of which too many rows are left out or have no loss tokens. Raises DataError.

    The shares are compared once enough rows were read.
    """
    prefix = f"{_REJECTED}{encode.NO_LOSS_TOKENS}"
    untrained = sum(number for reason, number in counts.items() if reason.startswith(prefix))
    limit = bad_rows.get_limit(run) * counts["rows"]
    if counts["rows"] < _BATCH_ROWS or untrained + counts[_BAD_ROWS] <= limit:
        return
    problem = f"{untrained:,} of the first {counts['rows']:,} rows of {name} have no loss tokens"
    if counts[_BAD_ROWS]:
        problem += f", and {counts[_BAD_ROWS]:,} cannot be trained"
    fix = "Set a larger train.max_length or data.max_untrained, or accept it with run.allow: [untrained_rows]."
    raise DataError(Fault(run.recipe.where(("data", "train")), problem, fix, code="data.untrained_rows"))


def _check_prompts(
    run: Run,
    encoder: Encoder,
    rows: Sequence[RenderedRow],
    *,
    encoded: EncodedRows,
    counts: Counter[str],
    name: str,
) -> None:
    """Refuse a stream of which too many rows have other prompt tokens at inference, once enough rows were read.

    Raises TemplateError.
    """
    total, mismatches = counts["kept"], counts["prompt_mismatch"]
    if total < _BATCH_ROWS or prompt_tokens.accepts(run, rows=total, mismatches=mismatches):
        return
    different = set(encoded.rows.data["row"].filter(encoded.rows.data["prompt_mismatch"]).to_pylist())
    row = next((row for row in rows if row.number in different), None)
    if row is not None:
        summary = f"{mismatches:,} of the first {total:,} rows, one of them {name} row {row.number + 1}, have"
        where = run.recipe.where(("data", "train"))
        raise TemplateError(
            prompt_tokens.build_fault(
                encoder.prompts, where, text=row.text, prompt_ends=row.list_prompt_ends(), counts=summary
            )
        )


def _check_answer_ends(run: Run, name: str, counts: Counter[str]) -> None:
    """Refuse a stream of which most answers lose their end to truncation, once enough rows were read."""
    is_accepted = ledger.ALLOW_TRUNCATED in run.options.get("allow", []) or counts["rows"] < _BATCH_ROWS
    if is_accepted or counts[_NO_ANSWER_END] <= ledger.MOST_TRUNCATED * counts["kept"]:
        return
    number = counts[_NO_ANSWER_END]
    problem = (
        f"{number:,} of the first {counts['kept']:,} rows of {name} lose the end of each answer at max_length, so the "
        "model hardly learns to stop"
    )
    where = run.recipe.where(("train", "max_length"))
    raise DataError(Fault(where, problem, ledger.advise_longer(None), code="data.truncated_answers"))
