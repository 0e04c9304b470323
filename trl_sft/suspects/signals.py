"""Which rows are suspects: those that stand out from held-out rows of their kind by a cheap signal.

Inputs: the values of a signal for training rows and for held-out rows, each with its kind (task, or else source).
Outputs: the places of suspects, the strongest first. A threshold comes from the held-out rows: these are correct as far
as anyone knows, and were not trained. A signal only suggests: its order is no measurement. Not here: how values
are measured (`token_rows`, `gradient_agreement`), and conflicts of answers (`building.audit.answer_conflicts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LOSS, GRADIENT, CONFLICT = "loss", "gradient", "conflict"
SIGNALS = (LOSS, GRADIENT, CONFLICT)
QUANTILE = 0.95  # of the held-out rows of a kind
FACTOR = 1.5  # own: a suspect is so much farther from their median than the quantile is
LEAST_HELD_OUT = 20  # of a kind, so that it has a quantile of its own; else all kinds together
MOST_SHARE = 0.2  # of the training rows that can be suspects by one signal
LEAST_SUSPECTS = 5  # of a group that is measured: fewer are a statement about single rows


class Suspect(NamedTuple):
    """A row that stands out by one signal."""

    place: int  # of the row among the training rows
    value: float  # of the signal
    bound: float  # that the held-out rows of its kind set


def choose_suspects(
    values: np.ndarray,
    kinds: Sequence[str],
    held_out: np.ndarray,
    *,
    held_out_kinds: Sequence[str],
    least_bound: float = float("-inf"),
) -> list[Suspect]:
    """Return the rows beyond the bound of held-out rows of their kind, the farthest first.

    Args:
        values: (rows,) of training rows; a higher value is more suspicious.
        kinds: of the training rows.
        held_out: (rows,) of held-out rows that judge nothing.
        held_out_kinds: of these.
        least_bound: no bound is lower than this value, below which no row is suspicious.

    """
    own, known = np.array(kinds), np.array(held_out_kinds)
    distances, bounds = np.zeros(len(values)), np.zeros(len(values))
    for kind in set(kinds):
        members = known == kind
        reference = held_out[members] if members.sum() >= LEAST_HELD_OUT else held_out
        quantile, middle = (float(value) for value in np.quantile(reference, (QUANTILE, 0.5)))
        bound = max(middle + FACTOR * (quantile - middle), least_bound)
        bounds[own == kind] = bound
        distances[own == kind] = (values[own == kind] - bound) / ((bound - middle) or 1.0)
    order = np.argsort(-distances, kind="stable")
    suspects = [
        Suspect(int(place), float(values[place]), float(bounds[place])) for place in order if distances[place] > 0
    ]
    return suspects[: int(MOST_SHARE * len(values))]
