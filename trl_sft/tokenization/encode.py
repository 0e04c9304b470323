"""Texts with spans become tokens and labels: tokenized with offsets, masked by characters, cut.

In: rows as texts (`rendered`). Out: `Made`, arrays of `input_ids` and `labels` with what was counted of each
row, and the rows that were left out. Deliberately absent: files and caches (`prepared`), packing
(`trl.pack_dataset`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from trl_sft.data.formats import CHAT
from trl_sft.data.messages import MARK
from trl_sft.errors import DataError, Fault, TemplateError
from trl_sft.tokenization import loss_mask, marking
from trl_sft.tokenization.loss_mask import Span

IGNORED = -100  # the label of a token without loss, torch.nn.CrossEntropyLoss's ignore_index
_CHARACTERS = 2_000_000  # of text that are tokenized at once: what offsets take grows with it


class Plan(NamedTuple):
    """What becomes of rows."""

    form: str  # CHAT, PAIRS or TEXT
    loss_on: str  # completion, assistant, last_turn, all
    eos: str  # what ends a text
    max_length: int | None  # in tokens; None = nothing is cut here
    overlong: str = "truncate"  # truncate, drop, truncate_and_end, error
    keep_end: bool = False  # which side of an overlong row stays
    mismatch: bool = False  # run.allow: [prompt_mismatch]
    other_markers: bool = False  # run.allow: [template_markers]


class Encoder(NamedTuple):
    """A tokenizer set up for one pass over the rows."""

    plan: Plan
    tokenizer: PreTrainedTokenizerBase
    keywords: dict[str, Any]  # that the chat template gets
    shape: loss_mask.Template | None  # None = no chats
    backend: Tokenizer | None  # None = a slow tokenizer
    as_text: dict[int, list[int]]  # id of an escaped special string -> the tokens of its characters
    marks: marking.Marks | None  # what stands around an answer as tokens; None = masks need offsets
    doubts: list[str]  # where the quick way to find a mask was wrong: it is not taken again


class Row(NamedTuple):
    """A row as text."""

    number: int  # among the formatted rows
    text: str
    spans: list[Span] | None  # that carry loss; None = all of it
    answers: list[bool] | None = None  # what stands around each answer is certain: which of them carry loss


class EncodedBatch(NamedTuple):
    """A batch of rows as tokens: one entry for each row that is kept, and the rows that are left out."""

    input_ids: list[np.ndarray]  # int32, each (tokens,)
    labels: list[np.ndarray]  # int32, each (tokens,)
    number: list[int]  # of the formatted row
    total: list[int]  # tokens before a cut
    target: list[int]  # tokens with loss before a cut
    trained: list[int]  # tokens with loss
    ended: list[bool]  # whether the last answer's end is there
    rejected: list[dict[str, Any]]  # rows left out: number, reason, tokens, begins


def encoder(
    plan: Plan, tokenizer: PreTrainedTokenizerBase, keywords: dict[str, Any], escaped: Sequence[str] = ()
) -> Encoder:
    """Return what encodes rows; `escaped` are special strings that are plain text where a row holds them."""
    shape = loss_mask.template(tokenizer, keywords, plan.mismatch) if plan.form == CHAT else None
    backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
    as_text: dict[int, list[int]] = {}
    if backend is not None:
        backend = Tokenizer.from_str(backend.to_str()) if escaped else backend
        backend.no_truncation()
        backend.no_padding()
    if escaped and backend is not None:
        as_text = _learn_escaped(backend, escaped)
    marks = marking.marks(shape, backend) if shape is not None and backend is not None else None
    return Encoder(plan, tokenizer, keywords, shape, backend, as_text, marks, [])


def prompt(made: Encoder, given: Any, tools: Any = None) -> list[int]:
    """Return the tokens of a prompt (a text, or messages) as generation gets them: (tokens,)."""
    if made.shape is not None:
        given = made.shape.render(given, tools, True)
    row = Row(0, given, [])
    encoding = encoded(made, [row])[0]
    ids = np.array(encoding if isinstance(encoding, list) else encoding.ids, dtype=np.int32)
    plain = _unescaped(made.as_text, ids, ids) if made.as_text else None
    return list(map(int, ids if plain is None else plain[0]))


def pieces(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Yield rows in lists that are tokenized at once, by how much text they hold."""
    held: list[Row] = []
    size = 0
    for row in rows:
        if held and size + len(row.text) > _CHARACTERS:
            yield held
            held, size = [], 0
        held.append(row)
        size += len(row.text)
    if held:
        yield held


def encoded(made: Encoder, rows: Sequence[Row]) -> list[Any]:
    """Return the tokens of texts, with offsets where a mask needs them. Other threads go on meanwhile."""
    special = made.plan.form != CHAT  # a template writes its own first token
    if made.backend is None:
        return [list(made.tokenizer(row.text, add_special_tokens=special)["input_ids"]) for row in rows]
    out: list[Any] = [None] * len(rows)
    bare = [n for n, row in enumerate(rows) if row.spans is None or (made.marks and row.answers is not None)]
    exact = sorted(set(range(len(rows))) - set(bare))
    for numbers, encode in ((bare, made.backend.encode_batch_fast), (exact, made.backend.encode_batch)):
        if numbers:
            encodings = encode([rows[n].text for n in numbers], add_special_tokens=special)
            for n, encoding in zip(numbers, encodings, strict=True):
                out[n] = encoding
    return out


def labelled(made: Encoder, rows: Sequence[Row], found: Sequence[Any], name: Callable[[int], str]) -> EncodedBatch:
    """Return tokens with labels, cut; rows without a trained token, or too long, left out. Raises DataError."""
    out = EncodedBatch([], [], [], [], [], [], [], [])
    bos, eos = made.tokenizer.bos_token_id, made.tokenizer.convert_tokens_to_ids(made.plan.eos)
    lists = [encoding if isinstance(encoding, list) else encoding.ids for encoding in found]
    bounds = np.cumsum([0, *map(len, lists)]).tolist()
    whole = np.fromiter(itertools.chain.from_iterable(lists), dtype=np.int32, count=bounds[-1])
    marks = np.full(bounds[-1], IGNORED, dtype=np.int32)
    known = marking.spans(made.marks, [row.answers for row in rows], whole, bounds)
    for n, row in enumerate(rows):
        ids, labels = whole[bounds[n] : bounds[n + 1]], marks[bounds[n] : bounds[n + 1]]
        places = known[n]
        if places is None:
            places = _places(made, row, found[n], len(ids))
        for start, end in places:
            labels[start:end] = ids[start:end]
        if bos is not None and len(ids) > 1 and ids[0] == bos == ids[1]:
            told = f"begins with {made.tokenizer.bos_token} twice: the text has one, and the tokenizer adds one"
            raise TemplateError(Fault(name(row.number), told, "rows without it, or tokenizer.add_bos_token: false"))
        if made.plan.form != CHAT and len(ids) > 1 and ids[-1] == eos == ids[-2]:
            told = f"ends with {made.plan.eos} twice: the text has one, and the tokenizer adds one"
            raise TemplateError(Fault(name(row.number), told, "tokenizer.add_eos_token: false"))
        target = sum(end - start for start, end in places)
        if made.as_text and (kept := _unescaped(made.as_text, ids, labels)) is not None:
            ids, labels = kept
            target = int((labels != IGNORED).sum())
            places = [(0, int(np.flatnonzero(labels != IGNORED)[-1]) + 1)] if target else []
        limit = made.plan.max_length
        if target and (limit is None or len(ids) <= limit):
            _add(out, (ids, labels), (row.number, len(ids), target, target, True))
        else:
            _cut(made.plan, out, row, (ids, labels), (places[-1][1] if places else 0, eos, target), name)
    return out


def _add(out: EncodedBatch, tokens: tuple[np.ndarray, np.ndarray], counts: tuple[int, int, int, int, bool]) -> None:
    out.input_ids.append(tokens[0])
    out.labels.append(tokens[1])
    out.number.append(counts[0])
    out.total.append(counts[1])
    out.target.append(counts[2])
    out.trained.append(counts[3])
    out.ended.append(counts[4])


def _cut(
    plan: Plan,
    out: EncodedBatch,
    row: Row,
    tokens: tuple[np.ndarray, np.ndarray],
    ends: tuple[int, int, int],
    name: Callable[[int], str],
) -> None:
    """Cut a row that is too long as the plan says, or leave it out.

    `ends`: where its last answer ends, the end token, how many of its tokens carry loss.
    """
    (ids, labels), (last, eos, target) = tokens, ends
    total, limit = len(ids), plan.max_length
    ended, reason = True, ""
    if limit is not None and total > limit:
        if plan.overlong == "error":
            found = f"{total:,} tokens, more than max_length {limit:,}"
            raise DataError(Fault(name(row.number), found, "a larger train.max_length, or data.overlong: truncate"))
        if plan.overlong == "drop":
            reason = f"longer than max_length {limit}"
        kept = slice(-limit, None) if plan.keep_end else slice(None, limit)
        ids, labels = ids[kept], labels[kept]
        ended = plan.keep_end or last <= limit
        if plan.overlong == "truncate_and_end" and not ended and labels[-1] != IGNORED:  # cut within an answer
            # OpenRLHF's: the last token that fits gives way to the end, which is learned
            ids, labels = ids.copy(), labels.copy()
            ids[-1] = labels[-1] = eos
            ended = True
    trained = int((labels != IGNORED).sum())
    if not trained and not reason:
        reason = f"no trained token within max_length {limit}" if target else "no trained token"
    if reason:
        begins = row.text[:80].replace(MARK, "")
        out.rejected.append({"number": row.number, "reason": reason, "tokens": total, "begins": begins})
    else:
        _add(out, (ids, labels), (row.number, total, target, trained, ended))


def _places(made: Encoder, row: Row, encoding: Any, size: int) -> list[Span]:
    """Return the spans of a row in tokens."""
    if row.spans is None:
        return [(0, size)]
    if made.marks and row.answers is not None and made.backend is not None:  # it was tokenized without offsets
        encoding = made.backend.encode(row.text, add_special_tokens=False)
    return [_tokens(made, row.text, encoding, span, size) for span in row.spans]


def _tokens(made: Encoder, text: str, encoding: Any, span: Span, size: int) -> Span:
    """Return the tokens that hold any character of a span, up to the last one where the span ends the text."""
    start, end = span
    if isinstance(encoding, list):  # a slow tokenizer knows no offsets: as TRL, by the common beginning
        special = made.plan.form != CHAT
        ids = [made.tokenizer(text[:at], add_special_tokens=special)["input_ids"] for at in span]
        first = loss_mask.alike(ids[0], encoding)
        return first, size if end == len(text) else loss_mask.alike(ids[1], encoding)
    first = next((t for at in range(start, len(text)) if (t := encoding.char_to_token(at)) is not None), size)
    last = next((t for at in range(end, len(text)) if (t := encoding.char_to_token(at)) is not None), size)
    if last < size and encoding.token_to_chars(last)[0] < end:
        last += 1
    return first, last


def _learn_escaped(backend: Tokenizer, specials: Sequence[str]) -> dict[int, list[int]]:
    """Make each escaped special string one token of its own in `backend`; return the tokens that it stands for."""
    newline = backend.encode("\n", add_special_tokens=False).ids
    backend.encode_special_tokens = True
    # after a newline, since some tokenizers put a space before what begins a text
    plain = [backend.encode("\n" + string, add_special_tokens=False).ids for string in specials]
    backend.encode_special_tokens = False
    marked = [MARK + string for string in specials]
    backend.add_special_tokens([AddedToken(string, special=True, normalized=False) for string in marked])
    bare = [ids[len(newline) :] if ids[: len(newline)] == newline else ids for ids in plain]
    return {number: ids for string, ids in zip(marked, bare, strict=True) if (number := backend.token_to_id(string))}


def _unescaped(
    as_text: Mapping[int, list[int]], ids: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return tokens and labels with each escaped special string as the tokens of its characters; None = it has none."""
    if not np.isin(ids, list(as_text)).any():
        return None
    out: list[int] = []
    trained: list[int] = []
    for token, label in zip(ids.tolist(), labels.tolist(), strict=True):
        plain = as_text.get(token, [token])
        out += plain
        trained += plain if label != IGNORED else [IGNORED] * len(plain)
    return np.array(out, dtype=np.int32), np.array(trained, dtype=np.int32)
