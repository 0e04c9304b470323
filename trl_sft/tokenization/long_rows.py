"""Rows that are far longer than `max_length`: cut before they are tokenized, or refused.

Inputs: rows as texts, an `Encoder`. Outputs: the same rows, of a long one only the beginning, where its first
`max_length` tokens are certain to be those of the whole text (`text_beginning`); a text that is longer than
`LONGEST_TEXT` and cannot be cut is a row that cannot be trained. So one row costs no gigabytes. Deliberately not here:
truncation (`encode`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from trl_sft.data.bad_rows import BadRow, describe_problem
from trl_sft.data.formats import CHAT
from trl_sft.tokenization.encoder import Encoder
from trl_sft.tokenization.render import RenderedRow
from trl_sft.tokenization.text_beginning import TextCutter

LONG_TEXT = 200_000  # characters; a text that is shorter is always tokenized as a whole, so that its tokens are counted
LONG_FACTOR = 64  # characters for each token of max_length: neither are texts shorter than this
# Characters of the longest text that is tokenized as a whole; tokenizing takes up to 500 bytes for each.
LONGEST_TEXT = 5_000_000


def shorten_rows(encoder: Encoder, rows: Iterable[RenderedRow]) -> Iterator[RenderedRow]:
    """Yield rows, of long ones the beginning that decides their first `max_length` tokens."""
    for row in rows:
        yield row if len(row.text) <= LONG_TEXT else _shorten_row(encoder, row)


def _shorten_row(encoder: Encoder, row: RenderedRow) -> RenderedRow:
    """Return the beginning of a long row; the row itself where it cannot be cut and is not too long."""
    settings = encoder.settings
    cut = None
    if settings.max_length is not None and not settings.keep_end and encoder.backend is not None:
        if len(row.text) <= LONG_FACTOR * settings.max_length:
            return row
        add_special_tokens = settings.row_type != CHAT
        cut = _make_cutter(encoder).find_cut(row.text, settings.max_length, add_special_tokens=add_special_tokens)
    if cut is None:
        return row if len(row.text) <= LONGEST_TEXT else RenderedRow(row.number, "", [], bad_row=_explain(encoder, row))
    spans = row.spans and [(start, min(end, cut)) for start, end in row.spans if start < cut]
    loses_answer = row.spans is None or spans != row.spans
    prompt_ends = row.prompt_ends and [end for end in row.prompt_ends if end < cut]
    if row.prompt_ends is None and row.spans is not None:
        prompt_ends = [start for start, _ in spans or []]
    return row._replace(
        text=row.text[:cut],
        spans=spans,
        answers=None,
        prompt_ends=prompt_ends,
        is_beginning=True,
        loses_answer=loses_answer,
    )


def _make_cutter(encoder: Encoder) -> TextCutter:
    """Return the cutter of an encoder, which reads the vocabulary once."""
    assert encoder.backend is not None
    if not encoder.cutters:
        encoder.cutters.append(TextCutter(encoder.backend))
    return encoder.cutters[0]


def _explain(encoder: Encoder, row: RenderedRow) -> BadRow:
    """Return the problem of a text that is too long to be tokenized."""
    settings = encoder.settings
    problem = f"the text has {len(row.text):,} characters, more than the {LONGEST_TEXT:,} that are tokenized at once"
    if settings.max_length is None:
        reason = "; no row is truncated here"
    elif settings.keep_end:
        reason = ", and truncation_mode: keep_end needs all of it"
    else:
        reason = f", and this tokenizer needs all of it to know its first {settings.max_length:,} tokens"
    fix = "Split the row into several, or remove it."
    return describe_problem(problem + reason, fix, code="data.long_text")
