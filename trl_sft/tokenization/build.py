"""The datasets that SFTTrainer gets: rows as tokens, truncated or packed, with their ledger.

Inputs: `RunRows`, the tokenizer, the live SFTConfig. Outputs: `TokenizedRows`. This is the one place that does what
these keys of SFTConfig say: max_length, truncation_mode, packing, packing_strategy, eval_packing, shuffle_dataset.
SFTTrainer is told to change nothing (`skip_prepare_dataset`). Not here: how a row becomes tokens (`encode`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from datasets import Dataset, IterableDataset
from trl import SFTConfig

from trl_sft.data import bad_rows
from trl_sft.data.pipeline import Split
from trl_sft.data.rows import RunRows
from trl_sft.errors import Fault, RecipeError
from trl_sft.model import patches
from trl_sft.recipe.checked import Run
from trl_sft.tokenization import cache, ledger, row_groups, stream, thinking
from trl_sft.tokenization.encode import EncodedRows
from trl_sft.tokenization.encoder import Encoder, EncodingSettings, build_encoder
from trl_sft.tokenization.row_groups import Grouping, RowGroups
from trl_sft.tokenization.tokenizer import ChatTokenizer

# packing strategies that truncate nothing: the rest of a long row goes into the next pack
_WITHOUT_TRUNCATION = ("bfd_split", "wrapped")


class TokenizedRows(NamedTuple):
    """The datasets that SFTTrainer gets, and what happened to the rows.

    Attributes:
        train: `input_ids` and `labels`, (tokens,) each; packs have `seq_lengths` too.
        eval: the evaluation set; several by name; None = there is none.
        ledger: the object of `ledger.json`.
        rejects: the lines of `rejects.jsonl`.
        encoder: encodes the rows to train; `encode.encode_prompt` needs it.
        notes: lines for the screen, name and value.
        encoded: train and the evaluation sets by name: the formatted rows and their tokens; of a stream its first rows.
        stream_counts: counts of the rows that were read from the streams so far; None = nothing is streamed.
        parts: digest of each part that decides what the tokens of the training rows are, by its name.
        groups: of the rows, by which losses are logged.

    """

    train: Dataset | IterableDataset
    eval: Dataset | dict[str, Dataset] | None
    ledger: dict[str, Any]
    rejects: list[dict[str, Any]]
    encoder: Encoder
    notes: tuple[tuple[str, str], ...]
    encoded: Mapping[str, tuple[Split, EncodedRows]]
    stream_counts: stream.StreamCounts | None = None
    parts: Mapping[str, str] = {}
    groups: Grouping = Grouping({})


def tokenize(
    run: Run, chat: ChatTokenizer, rows: RunRows, *, args: SFTConfig, check_all: bool = False
) -> TokenizedRows:
    """Return the tokens of all rows, from the cache where it has them.

    Args:
        run: the checked recipe.
        chat: the tokenizer of the run.
        rows: the formatted rows of the run.
        args: the settings of the trainer.
        check_all: whether the loss mask of every row is checked, also of rows in the cache.

    Raises:
        DataError: rows cannot be formatted or rendered, too many rows have no loss tokens, or a row is too long and
            `data.overlong` is error.
        RecipeError: settings contradict each other.

    """
    encoder = make_encoder(run, chat, rows, args=args)
    encoded_parts = _encode_parts(run, chat, rows, args=args, encoder=encoder, check_all=check_all)
    ledger.check_bad_rows(run, rows, encoded_parts)
    datasets: dict[str, Dataset] = {}
    counts: dict[str, Any] = {}
    rejects: list[dict[str, Any]] = []
    grouping = row_groups.find_groups(rows)
    # without the losses of tokens, which TRL's fused head returns, nothing would read the groups
    groups = grouping.parts if patches.has_fused_head() else {}
    for part, (split, encoded) in encoded_parts.items():
        ledger.check(run, split, encoded, encoder=encoder, part=part)
        is_packed = _is_packed(args, part)
        datasets[part] = _make_dataset(encoded, groups.get(part), args=args, is_packed=is_packed)
        packs = datasets[part] if is_packed else None
        batch_size = args.per_device_train_batch_size if part == "train" else args.per_device_eval_batch_size
        counts[part] = ledger.count(split, encoded, packs, batch_size=batch_size, max_length=args.max_length)
        rejects += ledger.list_rejected(split, encoded, part)
    train = datasets.pop("train")
    evaluation = datasets.get("eval") if set(datasets) == {"eval"} else datasets or None
    run_ledger = {"train": counts.pop("train"), "eval": counts}
    left_out = [kind for _, encoded in encoded_parts.values() for kind in (encoded.bad_rows or {}).values()]
    notes = (
        *(
            ("rows", bad_rows.describe_left_out(kind.bad_row.kind, kind.num_rows, place=kind.place))
            for kind in left_out
        ),
        *ledger.describe(run, rows, run_ledger, args=args, whole=not rows.streaming),
        *thinking.describe(encoder.thoughts, run_ledger["train"]["answers"]),
        *(("cache", f"{part}: {encoded.source}") for part, (_, encoded) in encoded_parts.items() if encoded.source),
    )
    stream_counts = None
    if rows.streaming:
        notes = (("stream", "read during training; the counts are those of the first rows of each source"), *notes)
        train, stream_counts = stream.build_stream(
            run, rows, encoder, args=args, rejects=rejects, is_grouped="train" in groups
        )
        run_ledger["train"] = stream.count_stream(stream_counts)
    parts = encoded_parts["train"][1].parts
    return TokenizedRows(
        train, evaluation, run_ledger, rejects, encoder, notes, encoded_parts, stream_counts, parts, grouping
    )


def _make_dataset(encoded: EncodedRows, groups: RowGroups | None, *, args: SFTConfig, is_packed: bool) -> Dataset:
    """Return rows, or packs of them, as the trainer gets them."""
    seed = args.seed if args.shuffle_dataset else None
    if is_packed:
        return cache.pack(encoded, args.max_length, args.packing_strategy, seed=seed, groups=groups)
    rows = encoded.rows.select_columns(["input_ids", "labels"])
    if groups is not None:
        rows = row_groups.add_to_rows(rows, row_groups.number_rows(groups, encoded), key=encoded.key)
    return rows if seed is None else rows.shuffle(seed=seed)


def _encode_parts(
    run: Run, chat: ChatTokenizer, rows: RunRows, *, args: SFTConfig, encoder: Encoder, check_all: bool
) -> dict[str, tuple[Split, EncodedRows]]:
    """Return the rows to train and the evaluation sets, by name, each with its tokens."""
    encoded_parts: dict[str, tuple[Split, EncodedRows]] = {}
    for part, split in (("train", rows.train), *rows.eval.items()):
        settings = _make_settings(run, chat, rows, args=args, packing=_is_packed(args, part))
        part_encoder = dataclasses.replace(encoder, settings=settings)
        title = f"Tokenizing {part}"
        if rows.streaming and part == "train":
            encoded = cache.encode_in_memory(split, part_encoder, title=title, check_all=check_all)
        else:
            # more rows than the limit stop the run; then they are counted and not listed
            most = int(bad_rows.get_limit(run) * len(split.order)) + 1 if bad_rows.drops_bad_rows(run) else 0
            encoded = cache.read_or_encode(
                split, part_encoder, run.recipe.path, title=title, most_bad_rows=most, check_all=check_all
            )
        encoded_parts[part] = split, encoded
    return encoded_parts


def _is_packed(args: SFTConfig, part: str) -> bool:
    """Tell whether the rows of a part of the run are packed."""
    return bool(args.packing if part == "train" or args.eval_packing is None else args.eval_packing)


def make_encoder(run: Run, chat: ChatTokenizer, rows: RunRows, *, args: SFTConfig) -> Encoder:
    """Return the encoder of the rows to train. Raises RecipeError for settings that contradict each other."""
    _check_packing(run, args)
    _check_truncation(run, args)
    sources = [source for split in (rows.train, *rows.eval.values()) for source in split.sources]
    may_have_escaped = any(source.has_escaped_tokens for source in sources)
    may_have_escaped |= rows.streaming and chat.features.escape_special_tokens
    return build_encoder(
        _make_settings(run, chat, rows, args=args, packing=args.packing),
        chat.tokenizer,
        run.chat_template_kwargs,
        escaped=chat.features.special_tokens if may_have_escaped else (),
    )


def _make_settings(run: Run, chat: ChatTokenizer, rows: RunRows, *, args: SFTConfig, packing: bool) -> EncodingSettings:
    """Return how rows become tokens, packed or not."""
    allowed = run.options.get("allow", [])
    return EncodingSettings(
        row_type=rows.row_type,
        loss_on=rows.loss_on,
        eos_token=str(chat.tokenizer.eos_token),
        max_length=None if packing and args.packing_strategy in _WITHOUT_TRUNCATION else args.max_length,
        overlong=run.data.get("overlong", "truncate"),
        keep_end=args.truncation_mode == "keep_end",
        allow_prompt_mismatch="prompt_mismatch" in allowed,
        allow_template_markers="template_markers" in allowed,
        skip_empty_thoughts=rows.skips_empty_thoughts,
    )


def _check_packing(run: Run, args: SFTConfig) -> None:
    """Refuse packing in which rows see each other, unless the recipe accepts it. Raises RecipeError."""
    if args.packing and args.packing_strategy == "wrapped" and "leaking_packing" not in run.options.get("allow", []):
        problem = "packing_strategy: wrapped, in which each row of a pack attends to the rows before it"
        fix = "Set bfd or bfd_split, which keep rows apart, or accept it with run.allow: [leaking_packing]."
        raise RecipeError(
            Fault(run.recipe.where(("train", "packing_strategy")), problem, fix, code="recipe.leaking_packing")
        )


def _check_truncation(run: Run, args: SFTConfig) -> None:
    """Refuse settings of truncation that have no effect. Raises RecipeError."""
    reason = ""
    if args.max_length is None:
        reason = "max_length: null"
    elif args.packing and args.packing_strategy in _WITHOUT_TRUNCATION and args.eval_packing is not False:
        reason = f"packing_strategy: {args.packing_strategy}"
    values = {
        ("data", "overlong"): run.data.get("overlong"),
        ("train", "truncation_mode"): run.train.get("truncation_mode"),
    }
    for key, value in values.items():
        if value and reason:
            problem = f"{key[1]}: {value}, but no row is truncated with {reason}"
            raise RecipeError(Fault(run.recipe.where(key), problem, f"Remove {key[1]}.", code="recipe.no_effect"))
    if args.packing and run.train.get("truncation_mode") == "keep_end":
        problem = "truncation_mode: keep_end, but TRL packs the beginning of a row"
        fix = "Set truncation_mode: keep_start, or set packing: false."
        raise RecipeError(
            Fault(run.recipe.where(("train", "truncation_mode")), problem, fix, code="recipe.contradiction")
        )
