"""A row as the model sees it: its tokens as text, in segments with or without loss, special or not.

Inputs: none. Outputs: the types that `preview`, the run folder and the report share. Not here: how a row is split
(`segmentation`), how segments are shown (`reports.row_markup`). Needs no torch.
"""

from __future__ import annotations

from typing import NamedTuple


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
    is_beginning: bool = False  # whether only the beginning of the row was tokenized: both numbers are those of it

    @property
    def title(self) -> str:
        """The name of the row and its counts."""
        return f"{self.name}: {self.num_tokens:,} tokens, {self.num_loss_tokens:,} with loss"

    @property
    def truncation(self) -> str:
        """The mark at the end of a truncated row; "" for a whole row."""
        least = "at least " if self.is_beginning else ""
        return f" ✂ {least}{self.num_truncated:,} tokens are truncated" if self.num_truncated else ""
