"""Where answers are among tokens: after the tokens of a header, up to those that close a turn.

In: what a template writes around answers, tokens of many rows at once. Out: spans of tokens; None where they
are not certain, and the slower way by offsets has to find them. Tokenizing without offsets takes a fifth less
time. Only for templates whose header begins with a special token and whose turns end in one: in a chat these
tokens stand nowhere else, since special strings in rows are refused or plain text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from trl_sft.tokenization.loss_mask import Span, Template


class Marks(NamedTuple):
    """What stands around an answer, as tokens."""

    header: tuple[int, ...]
    closing: tuple[int, ...]  # of an answer that another turn follows
    final: tuple[int, ...]  # of the last answer


def marks(shape: Template, backend: Tokenizer) -> Marks | None:
    """Return the tokens around answers; None where a header or an end does not begin with a special token."""
    parts = (shape.header, shape.closing, shape.final)
    if not all(parts) or not all(part.startswith(shape.specials) for part in parts):
        return None
    return Marks(*(tuple(backend.encode(part, add_special_tokens=False).ids) for part in parts))


def spans(
    around: Marks | None, answers: Sequence[Sequence[bool] | None], whole: np.ndarray, bounds: Sequence[int]
) -> list[list[Span] | None]:
    """Return the spans of the answers that carry loss, for each row from its first token; None = not certain.

    `answers`: for each row which of its answers carry loss, or None. `whole`: the tokens of all rows, one
    after another, `bounds`: where each row begins, and the end.
    """
    if around is None:
        return [None] * len(answers)
    found = _places(whole, around.header) + len(around.header)
    closings = [_places(whole, end) for end in (around.closing, around.final)]
    first = np.searchsorted(found, bounds)
    out: list[list[Span] | None] = []
    for n, learned in enumerate(answers):
        starts = found[first[n] : first[n + 1]].tolist()
        out.append(None)
        if learned is None or len(starts) != len(learned):
            continue
        ends = []
        for number, start in enumerate(starts, 1):
            final = number == len(starts)
            places = closings[final]
            at = np.searchsorted(places, start)
            end = int(places[at]) + len(around[1 + final]) if at < len(places) else bounds[-1] + 1
            ends.append(end)
        if all(a < b for a, b in zip(ends, [*starts[1:], bounds[n + 1] + 1], strict=True)):
            here = bounds[n]
            out[n] = [(s - here, e - here) for s, e, is_in in zip(starts, ends, learned, strict=True) if is_in]
    return out


def _places(whole: np.ndarray, part: Sequence[int]) -> np.ndarray:
    """Return where a part begins in an array."""
    size = len(whole) - len(part) + 1
    if size <= 0:
        return np.zeros(0, dtype=np.int64)
    same = whole[:size] == part[0]
    for n, token in enumerate(part[1:], 1):
        same &= whole[n : n + size] == token
    return np.flatnonzero(same)
