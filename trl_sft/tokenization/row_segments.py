"""A row as the model sees it: its tokens as text, split where the loss or the kind of the token changes.

Inputs: encoded rows and the tokenizer. Outputs: segments of text, each with or without loss, special or not; `preview`
and the report show them. Not here: how rows become tokens (`encode`), how segments are shown (`reports.row_markup`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from trl_sft.data.rows import RunRows
from trl_sft.tokenization import special_tokens
from trl_sft.tokenization.encode import IGNORED, EncodedRows


class Segment(NamedTuple):
    """Neighbouring tokens of a row that are alike: with or without loss, special or not."""

    text: str
    has_loss: bool
    is_special: bool


class SegmentedRow(NamedTuple):
    """One row as the model sees it."""

    name: str
    segments: list[Segment]
    num_tokens: int  # before truncation
    num_loss_tokens: int
    num_truncated: int

    @property
    def title(self) -> str:
        """The name of the row and its counts."""
        return f"{self.name}: {self.num_tokens:,} tokens, {self.num_loss_tokens:,} with loss"

    @property
    def truncation(self) -> str:
        """The mark at the end of a truncated row; "" for a whole row."""
        return f" ✂ {self.num_truncated:,} tokens are truncated" if self.num_truncated else ""


def select_first_rows(
    rows: RunRows, tokens: EncodedRows, tokenizer: PreTrainedTokenizerBase, *, num_rows: int
) -> Iterator[SegmentedRow]:
    """Yield the first rows of each source, split into segments.

    Args:
        rows: the rows of the run.
        tokens: the encoded training rows.
        tokenizer: that encoded them.
        num_rows: rows of each source.
    """
    special_ids = {*tokenizer.convert_tokens_to_ids(list(special_tokens.list_strings(tokenizer)))}
    numbers = np.asarray(tokens.rows.data["row"].to_numpy())
    source_indices = rows.train.source_indices[numbers]
    for source in range(len(rows.train.sources)):
        for index in np.flatnonzero(source_indices == source)[:num_rows].tolist():
            row = tokens.rows[index]
            yield SegmentedRow(
                name=rows.train.row_name(int(numbers[index])),
                segments=list(
                    _split_into_segments(tokenizer, row["input_ids"], row["labels"], special_ids=special_ids)
                ),
                num_tokens=row["tokens_before_truncation"],
                num_loss_tokens=row["loss_tokens"],
                num_truncated=row["tokens_before_truncation"] - len(row["input_ids"]),
            )


def _split_into_segments(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], labels: Sequence[int], *, special_ids: set[int]
) -> Iterator[Segment]:
    """Yield neighbouring tokens that are alike; each special token is a segment of its own."""
    kinds = [(label != IGNORED, token in special_ids) for token, label in zip(ids, labels, strict=True)]
    start = 0
    for end in range(1, len(ids) + 1):
        start_is_special = kinds[start][1]
        if end == len(ids) or kinds[end] != kinds[start] or start_is_special:
            has_loss, is_special = kinds[start]
            yield Segment(_decode(tokenizer, list(ids[start:end])), has_loss, is_special)
            start = end


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Return tokens as text, with the space that some tokenizers drop at the beginning of a text."""
    text = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    starts_with_space = str(tokenizer.convert_ids_to_tokens(ids[0])).startswith("▁")
    return f" {text}" if starts_with_space and not text.startswith(" ") else text
