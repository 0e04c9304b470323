"""Encoded rows are split into segments of text where the loss or the kind of the token changes.

Inputs: encoded rows and the tokenizer. Outputs: rows as `row_segments` has them. Not here: how rows become
tokens (`encode`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from trl_sft.data.pipeline import Split
from trl_sft.tokenization import special_tokens
from trl_sft.tokenization.encode import IGNORED, EncodedRows
from trl_sft.tokenization.row_segments import Segment, SegmentedRow


def select_first_rows(
    split: Split, tokens: EncodedRows, tokenizer: PreTrainedTokenizerBase, *, num_rows: int
) -> Iterator[SegmentedRow]:
    """Yield the first rows of each source, split into segments.

    Args:
        split: the formatted rows.
        tokens: the same rows, encoded.
        tokenizer: that encoded them.
        num_rows: rows of each source.
    """
    special_ids = {*tokenizer.convert_tokens_to_ids(list(special_tokens.list_strings(tokenizer)))}
    numbers = np.asarray(tokens.rows.data["row"].to_numpy())
    source_indices = split.source_indices[numbers]
    for source in range(len(split.sources)):
        for index in np.flatnonzero(source_indices == source)[:num_rows].tolist():
            row = tokens.rows[index]
            yield SegmentedRow(
                name=split.row_name(int(numbers[index])),
                segments=list(
                    _split_into_segments(tokenizer, row["input_ids"], row["labels"], special_ids=special_ids)
                ),
                num_tokens=row["tokens_before_truncation"],
                num_loss_tokens=row["loss_tokens"],
                num_truncated=row["tokens_before_truncation"] - len(row["input_ids"]),
                is_beginning=row["is_beginning"],
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
