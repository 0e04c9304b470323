"""Formatted rows become tokens and labels, in one pass.

Inputs: a split of formatted rows, an `Encoder`. Outputs: `EncodedRows`, batch by batch: `input_ids` and `labels`,
truncated as the settings say, with counts of each row, and the rows that are rejected. A row is rendered (`render`),
tokenized, labelled and truncated here; memory does not grow with the number of rows. Not here: files and caches
(`cache`), packing (`trl.pack_dataset`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset

from trl_sft.data.bad_rows import BadRow, Kinds, describe_problem
from trl_sft.data.formats import CHAT
from trl_sft.data.formatted_columns import read_columns
from trl_sft.data.messages import MARK
from trl_sft.data.pipeline import Split
from trl_sft.row_progress import RowProgress
from trl_sft.tokenization import loss_mask, prompt_tokens, template_limits, thinking
from trl_sft.tokenization.encoder import Encoder, EncodingSettings
from trl_sft.tokenization.long_rows import shorten_rows
from trl_sft.tokenization.loss_mask import Span
from trl_sft.tokenization.prompt_tokens import TokenizedText
from trl_sft.tokenization.render import RenderedRow, render_rows

IGNORED = -100  # the label of a token without loss, torch.nn.CrossEntropyLoss's ignore_index
NO_LOSS_TOKENS = "no loss tokens"  # the reason for rejecting a row without loss tokens begins with it
CHECKED_SHARE = 0.01  # share of the rows after the first _CHECKED_ROWS whose loss mask is checked
_CHECKED_ROWS = 1000  # the loss mask of each of the first rows is checked
_SEED = 0  # seed of the sample of rows whose loss mask is checked
_BATCH_ROWS = 1000  # rows that are read at once
_BATCH_CHARACTERS = 2_000_000  # text that is tokenized at once: the memory of offsets grows with it
_REJECT_CHARACTERS = 80  # rejects.jsonl shows so much of a rejected row

SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "row": pa.int64(),  # the number of the formatted row
        "tokens_before_truncation": pa.int32(),
        "loss_tokens_before_truncation": pa.int32(),
        # whether only the beginning of a long row was tokenized: both numbers before truncation are those of it alone
        "is_beginning": pa.bool_(),
        "loss_tokens": pa.int32(),
        "has_end_token": pa.bool_(),  # whether the end of the last answer is there
        "has_answer_end": pa.bool_(),  # whether the end of any answer is there
        "prompt_mismatch": pa.bool_(),  # whether inference makes other tokens of a prompt of this row
        # how many of the answers with loss begin so, under a template for thoughts
        **dict.fromkeys(thinking.BEGINNINGS, pa.int32()),
    }
)


class EncodedRows(NamedTuple):
    """Rows as tokens: a batch of them, or all rows of a split.

    Attributes:
        rows: the columns of `SCHEMA`; `input_ids` and `labels` are (tokens,) each.
        rejected: the rows that are left out: row, reason, tokens, begins (their first characters); of a row that
            cannot be trained also `bad_row`, the parts of a `BadRow`.
        key: their key in the cache; "" = they are not cached.
        source: whether they were read from the cache, and why not; "" = they are not cached.
        bad_rows: the kinds of rows that cannot be trained; None where the rows are one batch.
        parts: digest of each part that decides what the tokens are, by its name; empty = of a batch.

    """

    rows: Dataset
    rejected: list[dict[str, Any]]
    key: str = ""
    source: str = ""
    bad_rows: Kinds | None = None
    parts: Mapping[str, str] = {}


def encode_split(split: Split, encoder: Encoder, *, title: str, check_all: bool = False) -> Iterator[EncodedRows]:
    """Yield the rows of a split as tokens, in the order of training; one batch is tokenized while the next is rendered.

    Args:
        split: formatted rows.
        encoder: made of the settings of the run.
        title: the words beside the progress bar.
        check_all: whether the loss mask of every row is checked, in place of a sample.

    """
    batches = _render_split(split, encoder, check_all)
    with ThreadPoolExecutor(1) as pool, RowProgress(title, len(split.order)) as bar:
        waiting: tuple[list[RenderedRow], Future[list[Any]]] | None = None
        for batch in batches:
            encodings = pool.submit(tokenize, encoder, batch)
            if waiting is not None:
                yield label_rows(encoder, waiting[0], waiting[1].result())
                bar.update(len(waiting[0]))
            waiting = batch, encodings
        if waiting is not None:
            yield label_rows(encoder, waiting[0], waiting[1].result())
            bar.update(len(waiting[0]))


def encode_prompt(encoder: Encoder, prompt: Any, tools: Any = None) -> list[int]:
    """Return the tokens of a prompt (a text, or messages) as generation gets them: (tokens,)."""
    text = prompt
    if encoder.template is not None:
        try:
            text = encoder.template.render(prompt, tools, True)
        except template_limits.RenderTimeout:
            raise template_limits.build_fault(prompt) from None
    encoding = tokenize(encoder, [RenderedRow(0, text, [])])[0]
    ids = np.array(_ids(encoding), dtype=np.int32)
    return [int(token) for token in _unescape(encoder, ids, ids)[0]]


def render_row(split: Split, encoder: Encoder, number: int) -> RenderedRow:
    """Return a formatted row of a split as text. `number`: which of its rows."""
    table = split.rows.with_format("arrow").select_columns(_list_columns(split))[number : number + 1]
    return next(shorten_rows(encoder, render_rows(encoder, read_columns(table), numbers=[number], check=[False])))


def split_into_batches(encoder: Encoder, rows: Iterable[RenderedRow]) -> Iterator[list[RenderedRow]]:
    """Yield rows in lists that are tokenized at once; the amount of text bounds them, and long rows are cut."""
    batch: list[RenderedRow] = []
    size = 0
    for row in shorten_rows(encoder, rows):
        if batch and size + len(row.text) > _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += len(row.text)
    if batch:
        yield batch


def tokenize(encoder: Encoder, rows: Sequence[RenderedRow]) -> list[Any]:
    """Return the encoding of each text, with offsets where its loss mask needs them; other threads run meanwhile.

    Returns:
        For each row a `tokenizers.Encoding`, or the ids where the tokenizer is slow.

    """
    add_special_tokens = encoder.settings.row_type != CHAT  # a template writes its own first token
    if encoder.backend is None:
        tokenizer = encoder.tokenizer
        return [list(tokenizer(row.text, add_special_tokens=add_special_tokens)["input_ids"]) for row in rows]
    without_offsets = [
        number
        for number, row in enumerate(rows)
        if (row.spans is None and not row.prompt_ends) or (encoder.marks and row.answers is not None)
    ]
    with_offsets = sorted(set(range(len(rows))) - set(without_offsets))
    encodings: list[Any] = [None] * len(rows)
    for numbers, encode_batch in (
        (without_offsets, encoder.backend.encode_batch_fast),
        (with_offsets, encoder.backend.encode_batch),
    ):
        texts = [rows[number].text for number in numbers]
        if texts:
            encoded = encode_batch(texts, add_special_tokens=add_special_tokens)
            for number, encoding in zip(numbers, encoded, strict=True):
                encodings[number] = encoding
    return encodings


def label_rows(encoder: Encoder, rows: Sequence[RenderedRow], encodings: Sequence[Any]) -> EncodedRows:
    """Return rows as tokens with labels, truncated; rows without a loss token, or too long, are rejected.

    Args:
        encoder: says how rows are truncated.
        rows: a batch of rows as texts.
        encodings: the encoding of each, by `tokenize`.

    """
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    rejected: list[dict[str, Any]] = []
    all_ids, all_labels, bounds, spans_of_rows, mismatches = _label_batch(encoder, rows, encodings)
    settings = encoder.settings
    eos_id = encoder.tokenizer.convert_tokens_to_ids(settings.eos_token)
    for number, row in enumerate(rows):
        here = slice(bounds[number], bounds[number + 1])
        ids, labels = all_ids[here], all_labels[here]
        if bad_row := row.bad_row or _find_doubled_token(encoder, ids, eos_id):
            rejected.append(_reject(row, bad_row.kind, tokens=len(ids), bad_row=bad_row))
            continue
        spans = spans_of_rows[number]
        loss_tokens, answer_end = sum(end - start for start, end in spans), spans[-1][1] if spans else 0
        if encoder.escaped_tokens and np.isin(ids, list(encoder.escaped_tokens)).any():
            ids, labels = _unescape(encoder, ids, labels)
            with_loss = np.flatnonzero(labels != IGNORED)
            loss_tokens, answer_end = len(with_loss), int(with_loss[-1]) + 1 if len(with_loss) else 0
        length, loss_tokens_before, has_end, reason = len(ids), loss_tokens, True, ""
        if row.loses_answer:
            answer_end = length + 1
        if settings.max_length is not None and length > settings.max_length:
            kind = f"longer than max_length {settings.max_length}"
            if settings.overlong == "error":
                rejected.append(_reject(row, kind, tokens=length, bad_row=_describe_long_row(row, length, kind)))
                continue
            reason = kind if settings.overlong == "drop" else ""
            ids, labels, has_end = _truncate(settings, ids, labels, answer_end=answer_end, eos_id=eos_id)
            loss_tokens = int((labels != IGNORED).sum())
        if not loss_tokens and not reason:
            has_loss = loss_tokens_before or row.loses_answer
            within = f" within max_length {settings.max_length}" if has_loss else ""
            reason = f"{NO_LOSS_TOKENS}{within}"
        if reason:
            rejected.append(_reject(row, reason, tokens=length))
            continue
        has_answer_end = has_end or _has_answer_end(ids, labels, eos_id)
        counts = (row.number, length, loss_tokens_before, row.is_beginning, loss_tokens)
        beginnings = (row.beginnings.count(beginning) for beginning in thinking.BEGINNINGS)
        values = (ids, labels, *counts, has_end, has_answer_end, mismatches[number], *beginnings)
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return EncodedRows(_to_dataset(columns), rejected)


def _has_answer_end(ids: np.ndarray, labels: np.ndarray, eos_id: int) -> bool:
    """Tell whether a row without the end of its last answer has that of an earlier one: tokens without loss follow it.

    Where all tokens carry loss, the end token itself shows it.
    """
    has_loss = labels != IGNORED
    if has_loss.all():
        return bool((ids == eos_id).any())
    return bool((has_loss[:-1] & ~has_loss[1:]).any())


def _reject(row: RenderedRow, reason: str, *, tokens: int, bad_row: BadRow | None = None) -> dict[str, Any]:
    """Return the entry of a row that is left out."""
    begins = row.text[:_REJECT_CHARACTERS].replace(MARK, "")
    entry = {"row": row.number, "reason": reason, "tokens": tokens, "begins": begins}
    if row.is_beginning:
        entry["is_beginning"] = True
    return entry if bad_row is None else entry | {"bad_row": list(bad_row)}


def _render_split(split: Split, encoder: Encoder, check_all: bool) -> Iterator[list[RenderedRow]]:
    """Yield the rows of a split as texts, in batches that are tokenized at once."""
    share = 1 if check_all else CHECKED_SHARE
    check = np.random.default_rng(_SEED).random(len(split.order)) < share
    check[:_CHECKED_ROWS] = True
    rows = split.rows.with_format("arrow").select_columns(_list_columns(split))
    for start in range(0, len(split.order), _BATCH_ROWS):
        numbers = split.order[start : start + _BATCH_ROWS]
        in_sequence = numbers[-1] - numbers[0] == len(numbers) - 1 and bool((np.diff(numbers) == 1).all())
        table = rows[int(numbers[0]) : int(numbers[-1]) + 1] if in_sequence else rows[numbers]
        yield from split_into_batches(
            encoder,
            render_rows(
                encoder,
                read_columns(table),
                numbers=numbers.tolist(),
                check=check[start : start + _BATCH_ROWS].tolist(),
            ),
        )


def _list_columns(split: Split) -> list[str]:
    """Return the columns of formatted rows that rendering needs."""
    return [name for name in ("prompt", "completion", "text", "tools", "untrained") if name in split.rows.column_names]


def _label_batch(
    encoder: Encoder, rows: Sequence[RenderedRow], encodings: Sequence[Any]
) -> tuple[np.ndarray, np.ndarray, list[int], list[list[Span]], list[bool]]:
    """Return ids and labels of all rows one after another, and for each row what its tokens are.

    Returns:
        ids and labels, (tokens,) each; where each row begins in them; for each row the spans of tokens with loss, and
        whether inference makes other tokens of one of its prompts.

    """
    ids_of_rows = [_ids(encoding) for encoding in encodings]
    bounds = np.cumsum([0, *map(len, ids_of_rows)]).tolist()
    ids = np.fromiter(chain.from_iterable(ids_of_rows), dtype=np.int32, count=bounds[-1])
    labels = np.full(bounds[-1], IGNORED, dtype=np.int32)
    known: list[list[Span] | None] = [None] * len(rows)
    if encoder.marks is not None:
        known = loss_mask.find_token_spans(encoder.marks, ids, bounds, with_loss=[row.answers for row in rows])
    spans_of_rows, mismatches = [], [row.has_other_prompt for row in rows]
    for number, row in enumerate(rows):
        # where tokens alone show the answers, those of the generation prompt stand before each
        spans, begin = known[number], bounds[number]
        if spans is None:
            encoding = _add_offsets(encoder, row, encodings[number])
            tokens = TokenizedText(row.text, encoding, ids[begin : bounds[number + 1]])
            spans = _to_token_spans(encoder, row, tokens)
            mismatches[number] |= any(
                prompt_tokens.differs(encoder.prompts, tokens, end) for end in row.list_prompt_ends()
            )
        for start, end in spans:
            labels[begin + start : begin + end] = ids[begin + start : begin + end]
        spans_of_rows.append(spans)
    return ids, labels, bounds, spans_of_rows, mismatches


def _ids(encoding: Any) -> list[int]:
    """Return the ids of an encoding by `tokenize`."""
    ids: list[int] = encoding if isinstance(encoding, list) else encoding.ids
    return ids


def _find_doubled_token(encoder: Encoder, ids: np.ndarray, eos_id: int) -> BadRow | None:
    """Return the problem of a row whose first or last token the tokenizer adds a second time; None = there is none."""
    settings = encoder.settings
    if len(ids) < 2:
        return None
    bos_id, is_chat = encoder.tokenizer.bos_token_id, settings.row_type == CHAT
    if bos_id is not None and ids[0] == bos_id == ids[1]:
        problem = f"begins with {encoder.tokenizer.bos_token} twice: the text has one, and the tokenizer adds one"
        fix = "Remove it from the rows, or set tokenizer.add_bos_token: false."
        return describe_problem(problem, fix, code="template.doubled_token")
    if not is_chat and ids[-1] == eos_id == ids[-2]:
        problem = f"ends with {settings.eos_token} twice: the text has one, and the tokenizer adds one"
        return describe_problem(problem, "Set tokenizer.add_eos_token: false.", code="template.doubled_token")
    return None


def _describe_long_row(row: RenderedRow, num_tokens: int, kind: str) -> BadRow:
    """Return the problem of a row that is too long, under `overlong: error`."""
    fix = "Set a larger train.max_length, or set data.overlong: truncate."
    number = f"at least {num_tokens:,}" if row.is_beginning else f"{num_tokens:,}"
    return BadRow(f"{number} tokens: {kind}", fix, kind, code="data.too_long", can_be_dropped=False)


def _truncate(
    settings: EncodingSettings, ids: np.ndarray, labels: np.ndarray, *, answer_end: int, eos_id: int
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return ids and labels of at most `max_length` tokens, and whether the end of the last answer is there.

    `answer_end`: where the last answer with loss ends, before truncation.
    """
    assert settings.max_length is not None
    if settings.keep_end:
        return ids[-settings.max_length :], labels[-settings.max_length :], True
    ids, labels = ids[: settings.max_length], labels[: settings.max_length]
    if answer_end <= settings.max_length:
        return ids, labels, True
    if settings.overlong != "truncate_and_end" or labels[-1] == IGNORED:  # or the last token is in no answer
        return ids, labels, False
    # as OpenRLHF does: the end token replaces the last token that fits, and is learned
    ids, labels = ids.copy(), labels.copy()
    ids[-1] = labels[-1] = eos_id
    return ids, labels, True


def _add_offsets(encoder: Encoder, row: RenderedRow, encoding: Any) -> Any:
    """Return the encoding of a row with offsets, where it was tokenized without them."""
    if encoder.marks and row.answers is not None and encoder.backend is not None:
        return encoder.backend.encode(row.text, add_special_tokens=False)
    return encoding


def _to_token_spans(encoder: Encoder, row: RenderedRow, tokens: TokenizedText) -> list[Span]:
    """Return the spans of a row in tokens, from its spans of characters."""
    if row.spans is None:
        return [(0, len(tokens.ids))]
    if encoder.backend is None:
        return [_align_slow_tokens(encoder, row.text, ids=tokens.encoding, span=span) for span in row.spans]
    return [_align_tokens(encoder, tokens, span) for span in row.spans]


def _align_tokens(encoder: Encoder, row: TokenizedText, span: Span) -> Span:
    """Return the tokens that hold any character of a span, up to the last token where the span ends the text."""
    first, last = (prompt_tokens.find_first_token(encoder.prompts, row, position) for position in span)
    if last < len(row.ids) and row.encoding.token_to_chars(last)[0] < span[1]:
        last += 1
    return first, last


def _align_slow_tokens(encoder: Encoder, text: str, *, ids: Sequence[int], span: Span) -> Span:
    """Return the tokens of a span for a slow tokenizer, which has no offsets: by the common beginning, as TRL does."""
    add_special_tokens = encoder.settings.row_type != CHAT
    before, until = (
        encoder.tokenizer(text[:position], add_special_tokens=add_special_tokens)["input_ids"] for position in span
    )
    first = loss_mask.common_prefix_length(before, ids)
    return first, len(ids) if span[1] == len(text) else loss_mask.common_prefix_length(until, ids)


def _unescape(encoder: Encoder, ids: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and labels with each escaped special token as the tokens of its characters."""
    plain_ids: list[int] = []
    plain_labels: list[int] = []
    for token, label in zip(ids.tolist(), labels.tolist(), strict=True):
        characters = encoder.escaped_tokens.get(token, [token])
        plain_ids += characters
        plain_labels += characters if label != IGNORED else [IGNORED] * len(characters)
    return np.array(plain_ids, dtype=np.int32), np.array(plain_labels, dtype=np.int32)


def _to_dataset(columns: dict[str, list[Any]]) -> Dataset:
    """Return the columns of a batch as a dataset in memory."""
    arrays = [
        _to_list_array(values) if pa.types.is_list(kind) else pa.array(values, kind)
        for values, kind in zip(columns.values(), SCHEMA.types, strict=True)
    ]
    return Dataset(pa.table(arrays, schema=SCHEMA), fingerprint="batch")


def _to_list_array(values: Sequence[np.ndarray]) -> pa.ListArray:
    """Return arrays as one column of lists: (rows, tokens)."""
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    flat = np.concatenate(values) if values else np.zeros(0, dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))
