"""What happened to every row and token, counted from the tokens themselves, by source and task.

Inputs: a split of formatted rows, and its tokens. Outputs: the objects of `ledger.json` and `rejects.jsonl`, and lines
for the screen; or a refusal, where too few rows have loss tokens. Every row is counted here, whether it is trained or
not. Not here: rows of a stream, which are counted as they are read (`stream`).
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
from trl_sft.data import bad_rows
from trl_sft.data.bad_rows import BadRow
from trl_sft.data.formats import TASK, TEXT
from trl_sft.data.pipeline import Split
from trl_sft.data.rows import RunRows
from trl_sft.errors import DataError, Fault, TemplateError
from trl_sft.recipe.checked import Run
from trl_sft.tokenization import prompt_tokens, thinking
from trl_sft.tokenization.encode import NO_LOSS_TOKENS, EncodedRows, render_row
from trl_sft.tokenization.encoder import Encoder

MOST_TRUNCATED = (
    0.5  # share of the rows to train that may lose the end of each answer; above it the model hardly learns to stop
)
ALLOW_TRUNCATED = "truncated_answers"  # the word of `run.allow` that accepts more
_QUANTILES = {"min": 0.0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
_PACKED_SAMPLE = 1000  # rows that are packed to estimate the padding of packs; `datasets` maps as many at once
_LOSS_ON = {
    "completion": "on completions",
    "assistant": "on every assistant turn",
    "last_turn": "on the last assistant turn",
    "all": "on all tokens",
}


class RowCounts(NamedTuple):
    """Numbers of each kept row, in the order of training: (rows,) each."""

    source: np.ndarray  # which of the split's sources
    row: np.ndarray  # number of the formatted row
    tokens: np.ndarray
    tokens_before_truncation: np.ndarray
    is_beginning: np.ndarray  # whether only the beginning of a long row was tokenized
    loss_tokens: np.ndarray
    loss_tokens_before_truncation: np.ndarray
    has_end_token: np.ndarray  # whether the end of the last answer is there
    prompt_mismatch: np.ndarray  # whether inference makes other tokens of a prompt
    with_thought: np.ndarray  # answers that begin so
    with_empty_thought: np.ndarray
    after_empty_thought: np.ndarray
    without_thought: np.ndarray


def count(
    split: Split, encoded: EncodedRows, packs: Dataset | None, *, batch_size: int, max_length: int | None
) -> dict[str, Any]:
    """Return what happened to the rows of a split, as `ledger.json` has it.

    Args:
        split: the formatted rows.
        encoded: their tokens.
        packs: the packs of these rows; None = they are not packed.
        batch_size: rows of a batch on one device.
        max_length: tokens of a pack, and the most tokens of a row; None = no limit.

    """
    counts = _count_each_row(split, encoded)
    rejected = _count_rejected(split, encoded)
    sources = [_count_source(split, counts, rejected[number], number=number) for number in range(len(split.sources))]
    total = _sum_counts(counts, np.ones(len(counts.row), dtype=bool))
    total["rows"]["input"] = sum(source["rows"]["input"] for source in sources)
    total["rows"]["repeated"] = sum(source["rows"]["repeated"] for source in sources)
    total["rows"]["rejected"] = dict(sum(rejected, Counter()))
    total["tokens_per_row"] = {}
    if len(counts.row):
        lengths = counts.tokens_before_truncation
        total["tokens_per_row"] = {name: int(np.quantile(lengths, share)) for name, share in _QUANTILES.items()}
    with_packing = None
    if packs is not None:
        positions = len(packs) * (max_length or 0)
        with_packing = _share(positions - int(counts.tokens.sum()), positions)
    elif max_length is not None and len(counts.row):
        with_packing = _estimate_padding_of_packs(encoded, max_length)
    without_packing = _count_padding(counts.tokens, batch_size)
    total["padding"] = {"without_packing": without_packing, "with_packing": with_packing}
    total["packs"] = None if packs is None else len(packs)
    total["sources"] = sources
    total["tasks"] = _count_tasks(split, counts)
    return total


def list_rejected(split: Split, encoded: EncodedRows, part: str) -> Iterator[dict[str, Any]]:
    """Yield the lines of `rejects.jsonl`: part, source, row (from 1), reason; for long rows tokens and begins.

    A row that cannot be trained also has the code of its problem.
    """
    for reason, numbers in split.removed_rows.items():
        kind = split.bad_rows.get(reason)
        details: dict[str, Any] = {"reason": reason} if kind is None else {"reason": reason, "code": kind.bad_row.code}
        for number in numbers.tolist():
            yield _locate_row(split, part, number) | details
    for reject in encoded.rejected:
        if "bad_row" in reject:
            details = {"reason": reject["reason"], "code": BadRow(*reject["bad_row"]).code}
        else:
            details = {name: reject[name] for name in ("reason", "tokens", "begins")}
            if reject.get("is_beginning"):
                details["tokenized_in_part"] = True
        yield _locate_row(split, part, reject["row"]) | details


def check_bad_rows(run: Run, rows: RunRows, encoded_parts: Mapping[str, tuple[Split, EncodedRows]]) -> None:
    """Refuse rows that cannot be formatted or rendered, and columns that nothing reads, of all parts at once.

    Args:
        run: the checked recipe.
        rows: the formatted rows.
        encoded_parts: train and the evaluation sets, by name: the formatted rows and their tokens.

    Raises:
        DataError: the faults of all sources and rows.

    """
    splits = [rows.train, *rows.eval.values()]
    sources = {source.source.key: source for split in splits for source in split.sources}  # one may be in two splits
    faults = [fault for source in sources.values() for fault in source.faults]
    for part, (split, encoded) in encoded_parts.items():
        kinds = bad_rows.join([split.bad_rows, encoded.bad_rows or {}])
        total = len(np.unique(split.order)) + bad_rows.count(split.bad_rows)
        faults += bad_rows.list_faults(run, kinds, part=part, total=total)
    if faults:
        raise DataError(faults)


def check(run: Run, split: Split, encoded: EncodedRows, *, encoder: Encoder, part: str) -> None:
    """Refuse a split of which too many rows have no loss tokens, or other prompt tokens at inference.

    Args:
        run: the checked recipe.
        split: the formatted rows.
        encoded: their tokens.
        encoder: encoded them.
        part: the name of the split.

    Raises:
        DataError: too many, or all, rows have no loss tokens, or too many answers lose their end.
        TemplateError: too many rows have other prompt tokens at inference.

    """
    _check_untrained(run, split, encoded, part=part)
    if part == "train" and encoder.settings.row_type != TEXT:  # the end of a text is no answer's end
        _check_answer_ends(run, split, encoded, max_length=encoder.settings.max_length)
    flags = encoded.rows.data["prompt_mismatch"].to_numpy()
    if prompt_tokens.accepts(run, rows=len(flags), mismatches=int(flags.sum())):
        return
    number = int(encoded.rows.data["row"].to_numpy()[np.flatnonzero(flags)[0]])
    row = render_row(split, encoder, number)
    summary = f"{int(flags.sum()):,} of {len(flags):,} rows of {part} have"
    fault = prompt_tokens.build_fault(
        encoder.prompts,
        run.recipe.where(("data", part)),
        text=row.text,
        prompt_ends=row.list_prompt_ends(),
        counts=f"{split.row_name(number)}: {summary}",
    )
    raise TemplateError(fault)


def _check_answer_ends(run: Run, split: Split, encoded: EncodedRows, *, max_length: int | None) -> None:
    """Refuse rows to train of which most lose the end of each answer to truncation. Raises DataError."""
    without_end = np.flatnonzero(~encoded.rows.data["has_answer_end"].to_numpy())
    if len(without_end) <= MOST_TRUNCATED * len(encoded.rows) or ALLOW_TRUNCATED in run.options.get("allow", []):
        return
    default = "" if "max_length" in run.train else " (TRL's default)"
    name = split.row_name(int(encoded.rows.data["row"].to_numpy()[without_end[0]]))
    longest = int(encoded.rows.data["tokens_before_truncation"].to_numpy().max())
    is_known = not encoded.rows.data["is_beginning"].to_numpy().any()
    problem = (
        f"{len(without_end):,} of {format_rows(len(encoded.rows))} to train lose the end of each answer at max_length "
        f"{max_length}{default}, so the model hardly learns to stop; the first is {name}"
    )
    raise DataError(
        Fault(
            run.recipe.where(("train", "max_length")),
            problem,
            advise_longer(longest if is_known else None),
            code="data.truncated_answers",
        )
    )


def advise_longer(longest: int | None) -> str:
    """Return what to do about answers that lose their end. `longest`: the tokens of the longest row; None = unknown."""
    known = "" if longest is None else f" (the longest row has {longest:,} tokens)"
    return (
        f"Set a larger train.max_length{known}, or set data.overlong to drop or truncate_and_end. Or accept it with "
        f"run.allow: [{ALLOW_TRUNCATED}]."
    )


def _check_untrained(run: Run, split: Split, encoded: EncodedRows, *, part: str) -> None:
    """Refuse a split of which too many, or all, rows have no loss tokens. Raises DataError."""
    untrained = [reject for reject in encoded.rejected if reject["reason"].startswith(NO_LOSS_TOKENS)]
    limit = bad_rows.get_limit(run)
    is_truncated = any("max_length" in reject["reason"] for reject in encoded.rejected)
    key = ("train", "max_length") if is_truncated and "max_length" in run.train else ("data", part)
    where = run.recipe.where(key)
    if not len(encoded.rows):
        first = encoded.rejected[0]
        problem = f"no row of {part} has loss tokens; the first is {split.row_name(first['row'])}: {first['reason']}"
        fix = "Set a larger train.max_length, or shorten the prompts." if is_truncated else "Add rows with an answer."
        raise DataError(Fault(where, problem, fix, code="data.no_loss_tokens"))
    num_bad = bad_rows.count(split.bad_rows) + sum("bad_row" in reject for reject in encoded.rejected)
    if untrained and len(untrained) + num_bad > limit * (len(split.order) + bad_rows.count(split.bad_rows)):
        first = untrained[0]
        problem = (
            f"{len(untrained):,} of {len(split.order):,} rows of {part} have {first['reason']}, more than {limit:.0%}; "
            f"the first is {split.row_name(first['row'])}, {first['tokens']:,} tokens, {first['begins'][:40]!r}"
        )
        if num_bad:
            problem += f"; {num_bad:,} more {'row' if num_bad == 1 else 'rows'} cannot be trained"
        longer = "Set a larger train.max_length. Or: " if is_truncated else ""
        fix = f"{longer}Set data.max_untrained, or accept it with run.allow: [untrained_rows]."
        raise DataError(Fault(where, problem, fix, code="data.untrained_rows"))


def describe(
    run: Run, rows: RunRows, ledger: Mapping[str, Any], *, args: SFTConfig, whole: bool = True
) -> Iterator[tuple[str, str]]:
    """Yield what the screen shows of a ledger: name and value.

    Args:
        run: the checked recipe.
        rows: the formatted rows of the run.
        ledger: has `train`, and `eval` with one ledger for each evaluation set.
        args: the settings of the trainer.
        whole: whether all rows were counted; only then are the shares of sources shown.

    """
    train = ledger["train"]
    tokens = train["tokens"]
    yield "rows", f"{train['rows']['kept']:,} to train{_describe_rejected(train)}"
    for name, split in ledger["eval"].items():
        title = "" if name == "eval" else f"{name}: "
        yield "eval", f"{title}{format_rows(split['rows']['kept'])}{_describe_rejected(split)}"
    yield "tokens", f"{tokens['kept']:,}, {tokens['loss']:,} of them loss tokens ({_LOSS_ON[rows.loss_on]})"
    if train["rows"]["truncated"]:
        yield "truncated", _describe_truncation(run, train, args)
    if train["rows"]["tokenized_in_part"]:
        yield "long", _describe_beginnings(train["rows"]["tokenized_in_part"])
    for name, split in (("train", train), *ledger["eval"].items()):
        if split["prompt_mismatch"]:
            number = f"{split['prompt_mismatch']:,} of {split['rows']['kept']:,} rows of {name}"
            yield "prompts", f"{number} have other prompt tokens at inference than in training"
    lengths = train["tokens_per_row"]
    longest = "longest at least" if train["rows"]["tokenized_in_part"] else "longest"
    yield "lengths", f"median {lengths['median']:,} tokens, 99% up to {lengths['p99']:,}, {longest} {lengths['max']:,}"
    yield "padding", _describe_padding(train, args)
    if whole and len(train["sources"]) > 1:
        for source in train["sources"]:
            share, repeated = source["share"], source["rows"]["repeated"]
            requested = f" (requested: {share['requested']:.1%})" if share["requested"] is not None else ""
            repeats = f", {repeated:,} of them repeated" if repeated else ""
            number = format_rows(source["rows"]["kept"])
            shares = f"{share['rows']:.1%} of the rows{requested}, {share['tokens']:.1%} of the tokens"
            yield "share", f"{source['name']}: {number}{repeats}: {shares}"


def _describe_rejected(counts: Mapping[str, Any]) -> str:
    """Return how many rows are rejected for each reason, as the end of a sentence; "" = none."""
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in counts["rows"]["rejected"].items())
    return f"; rejected: {reasons}" if reasons else ""


def _describe_truncation(run: Run, counts: Mapping[str, Any], args: SFTConfig) -> str:
    """Return how many rows and tokens are truncated, in words."""
    tokens, without_end = counts["tokens"], counts["missing_end_token"]
    default = "" if "max_length" in run.train else " (TRL's default: the recipe does not set it)"
    least = "at least " if counts["rows"]["tokenized_in_part"] else ""
    removed = tokens["before_truncation"] - tokens["kept"]
    loss = tokens["loss_before_truncation"] - tokens["loss"]
    ends = f"; {without_end:,} answers without their end token" if without_end else ""
    number = f"{format_rows(counts['rows']['truncated'])} at max_length {args.max_length}{default}"
    return f"{number}: {least}{removed:,} tokens, {loss:,} of them loss tokens{ends}"


def _describe_beginnings(number: int) -> str:
    """Return the line on rows of which only the beginning was tokenized."""
    rows = f"{format_rows(number)} {'is' if number == 1 else 'are'} far longer than max_length"
    return (
        f"{rows}: only the beginning was tokenized, which gives the same tokens; the counts of the rest are not known"
    )


def _describe_padding(counts: Mapping[str, Any], args: SFTConfig) -> str:
    """Return the share of padding without and with packing, in words."""
    without, packed = counts["padding"]["without_packing"], counts["padding"]["with_packing"]
    batch = f"{without:.0%} of a batch of {args.per_device_train_batch_size}"
    if packed is None:
        return batch
    if counts["packs"] is None:
        return f"{batch}; {packed:.1%} with train.packing in packs of {args.max_length} tokens"
    return f"{packed:.1%} in {counts['packs']:,} packs of {args.max_length} tokens; {batch} without packing"


def _count_each_row(split: Split, encoded: EncodedRows) -> RowCounts:
    """Return the numbers of each kept row."""
    table = encoded.rows.data
    columns = set(RowCounts._fields) - {"source", "tokens"}
    values = {name: table[name].to_numpy() for name in columns}
    tokens = pc.list_value_length(table["input_ids"]).to_numpy()
    return RowCounts(source=split.source_indices[values["row"]], tokens=tokens, **values)


def _sum_counts(counts: RowCounts, selected: np.ndarray) -> dict[str, Any]:
    """Return the sums over the selected rows; `selected`: (rows,) of bool."""
    tokens, before = counts.tokens[selected], counts.tokens_before_truncation[selected]
    return {
        "rows": {
            "kept": int(selected.sum()),
            "truncated": int((tokens < before).sum()),
            "tokenized_in_part": int(counts.is_beginning[selected].sum()),
        },
        "tokens": {
            "kept": int(tokens.sum()),
            "loss": int(counts.loss_tokens[selected].sum()),
            "before_truncation": int(before.sum()),
            "loss_before_truncation": int(counts.loss_tokens_before_truncation[selected].sum()),
        },
        "missing_end_token": int((~counts.has_end_token[selected]).sum()),
        "prompt_mismatch": int(counts.prompt_mismatch[selected].sum()),
        "answers": {name: int(getattr(counts, name)[selected].sum()) for name in thinking.BEGINNINGS},
    }


def _count_source(split: Split, counts: RowCounts, rejected: Counter[str], *, number: int) -> dict[str, Any]:
    """Return what happened to the rows of one source of a split."""
    source = split.sources[number]
    entry = {"name": source.name} | _sum_counts(counts, counts.source == number)
    epoch = split.order[split.source_indices[split.order] == number]
    # rows removed before the sources were mixed
    removed = sum(int((split.source_indices[numbers] == number).sum()) for numbers in split.removed_rows.values())
    entry["rows"]["input"] = len(epoch) + removed
    entry["rows"]["repeated"] = len(epoch) - len(np.unique(epoch))
    entry["rows"]["rejected"] = dict(rejected)
    weights = sum(other.weight or 0 for other in split.sources)
    entry["share"] = {
        "requested": source.weight / weights if source.weight else None,
        "rows": _share(entry["rows"]["kept"], len(counts.row)),
        "tokens": _share(entry["tokens"]["kept"], int(counts.tokens.sum())),
    }
    return entry


def _count_rejected(split: Split, encoded: EncodedRows) -> list[Counter[str]]:
    """Return for each source how many rows are rejected, by reason: removed from the epoch, or by their tokens."""
    rejected = [Counter[str]() for _ in split.sources]
    for reason, numbers in split.removed_rows.items():
        for number in split.source_indices[numbers].tolist():
            rejected[number][reason] += 1
    for reject in encoded.rejected:
        rejected[split.source_indices[reject["row"]]][reject["reason"]] += 1
    return rejected


def _count_tasks(split: Split, counts: RowCounts) -> dict[str, Any]:
    """Return the sums by the rows' label, where they have one."""
    if TASK not in split.rows.column_names:
        return {}
    labels = np.array([label or "" for label in split.rows.data[TASK].to_pylist()], dtype=object)[counts.row]
    return {name: _sum_counts(counts, labels == name) for name in sorted(set(labels.tolist()) - {""})}


def _estimate_padding_of_packs(encoded: EncodedRows, max_length: int) -> float:
    """Return the share of padding in packs of the first rows."""
    rows = encoded.rows.select(range(min(len(encoded.rows), _PACKED_SAMPLE))).select_columns(["input_ids"])
    packs = pack_dataset(Dataset(rows.with_format("arrow")[:]), max_length, "bfd")
    positions = len(packs) * max_length
    return _share(positions - sum(map(sum, packs["seq_lengths"])), positions)


def _count_padding(lengths: np.ndarray, batch_size: int) -> float:
    """Return the share of padding in batches of randomly ordered rows."""
    if not len(lengths):
        return 0.0
    shuffled = np.random.default_rng(0).permutation(lengths)
    batch_size = min(batch_size, len(lengths))
    batches = np.pad(shuffled, (0, -len(shuffled) % batch_size)).reshape(-1, batch_size)
    positions = int((batches.max(axis=1) * (batches > 0).sum(axis=1)).sum())
    return _share(positions - int(lengths.sum()), positions)


def _share(part: int, whole: int) -> float:
    """Return a part as a share of the whole, to six digits; 0 of nothing."""
    return round(part / whole, 6) if whole else 0.0


def _locate_row(split: Split, part: str, number: int) -> dict[str, Any]:
    """Return where a row stands: the part of the run, its source and its number there from 1, file and line."""
    source = split.sources[split.source_indices[number]]
    row = int(split.row_numbers[number])
    return {"part": part, "source": source.name, "row": row + 1, **source.places.locate_row(row)}
