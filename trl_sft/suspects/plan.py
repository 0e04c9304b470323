"""Which rows each rerun trains: a pool of rows, and for each seed the same order with one group of rows left out.

Inputs: the rows with their kinds, the groups of suspects. Outputs: the order of the rows of each rerun. The rerun
without random rows is that without suspects with each random row replaced by a suspect: both have the same length, the
same order and the same batches, but for these rows. Random rows are drawn anew for each seed from rows that no signal
suspects: of the same kind, and among the nearest in length. Not here: training (`reruns`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trl_sft.suspects import signals

ALL_ROWS = ""  # in the name of an arm: no group
_NEAREST = 8  # rows of the same kind, of which one is drawn
_MOST_SUSPECTED = 0.4  # of a pool


class Arm(NamedTuple):
    """One rerun."""

    group: str  # ALL_ROWS = every row of the pool is trained
    leaves_out_suspects: bool  # else random rows, or none
    seed: int
    places: np.ndarray  # of the rows in their order
    steps: int


@dataclass(frozen=True)
class Pool:
    """The rows from which every rerun takes its own.

    Attributes:
        places: of all its rows.
        groups: places of the suspects of each group in the pool.
        kinds: task or source of every row of the run, by place.
        lengths: tokens of every row of the run, by place.

    """

    places: np.ndarray
    groups: Mapping[str, np.ndarray]
    kinds: Sequence[str]
    lengths: np.ndarray


def make_pool(
    groups: Mapping[str, Sequence[int]], kinds: Sequence[str], lengths: np.ndarray, *, size: int, seed: int
) -> Pool:
    """Return a pool with the suspects and a sample of the other rows.

    Args:
        groups: places of the suspects of each group.
        kinds: of every row.
        lengths: tokens of every row.
        size: the most rows; suspects are sampled where they are more than two fifths of it.
        seed: of the samples.

    """
    random = np.random.default_rng(seed)
    suspects = np.array(sorted({place for places in groups.values() for place in places}), np.int64)
    others = np.setdiff1d(np.arange(len(kinds)), suspects)
    size = min(size, len(kinds))
    most = max(1, int(_MOST_SUSPECTED * size))
    if len(suspects) > most:
        suspects = np.sort(random.choice(suspects, most, replace=False))
    others = np.sort(random.choice(others, min(size - len(suspects), len(others)), replace=False))
    members = {name: np.intersect1d(places, suspects) for name, places in groups.items()}
    members = {name: places for name, places in members.items() if len(places) >= signals.LEAST_SUSPECTS}
    return Pool(np.union1d(suspects, others), members, kinds, lengths)


def list_arms(pool: Pool, *, seeds: Sequence[int], steps: int) -> list[Arm]:
    """Return all reruns, pair by pair.

    Args:
        pool: the rows.
        seeds: one of each pair.
        steps: of each rerun.

    """
    arms = []
    suspects = {int(place) for places in pool.groups.values() for place in places}
    for seed in seeds:
        random = np.random.default_rng(seed)
        order = random.permutation(pool.places)
        arms.append(Arm(ALL_ROWS, False, seed, order, steps))
        for name, members in pool.groups.items():
            others = _draw_others(pool, members, suspects, random=random)
            without_suspects = order[~np.isin(order, members)]
            partner = dict(zip(others.tolist(), random.permutation(members).tolist(), strict=True))
            without_others = np.array([partner.get(place, place) for place in without_suspects.tolist()])
            arms.append(Arm(name, True, seed, without_suspects, steps))
            arms.append(Arm(name, False, seed, without_others, steps))
    return arms


def _draw_others(
    pool: Pool, members: np.ndarray, suspects: Collection[int], *, random: np.random.Generator
) -> np.ndarray:
    """Return one row for each member of a group: no suspect, of its kind and of about its length where there is one."""
    free = [int(place) for place in random.permutation(pool.places) if int(place) not in suspects]
    by_kind: dict[str, list[int]] = {}
    for place in free:
        by_kind.setdefault(pool.kinds[place], []).append(place)
    drawn: list[int] = []
    used: set[int] = set()
    missing = 0
    for member in random.permutation(members).tolist():
        candidates = [place for place in by_kind.get(pool.kinds[member], ()) if place not in used]
        if not candidates:
            missing += 1
            continue
        nearest = sorted(candidates, key=lambda place: abs(int(pool.lengths[place] - pool.lengths[member])))
        chosen = nearest[int(random.integers(min(_NEAREST, len(nearest))))]
        drawn.append(chosen)
        used.add(chosen)
    rest = [place for place in free if place not in used]
    return np.array(drawn + rest[:missing], np.int64)
