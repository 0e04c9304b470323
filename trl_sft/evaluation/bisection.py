"""Finds between which two points of an ordered list a test turns, with a logarithmic number of trials.

Inputs: the points in order, and a test of one point that passes or fails. Outputs: the neighbours between which it
turns. Where the test turns several times one of the turns is found. Not here: what the points are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Turn(NamedTuple):
    """Two neighbours between which a test turns."""

    before: int  # the last point as the first end
    after: int  # the first point as the other end


def find_turn(points: Sequence[int], is_like_first: Callable[[int], bool]) -> Turn:
    """Return two neighbours of which the first is like the first point, and the second is not.

    Args:
        points: in order, at least two; the first is like the first, and the last is not.
        is_like_first: whether a point is like the first one; called for at most log2 of the points between the ends.

    Example:
        >>> find_turn([0, 10, 20, 30, 40], lambda step: step < 25)
        Turn(before=20, after=30)

    """
    low, high = 0, len(points) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if is_like_first(points[middle]):
            low = middle
        else:
            high = middle
    return Turn(points[low], points[high])
