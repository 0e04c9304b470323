"""The plan of a set: which cell, topic and template each row gets, from the seed alone.

Inputs: a checked spec. Outputs: one `Slot` for each row to write, and the quota of each cell. Shares of an axis are met
to the row; pairs of axes and whole cells as nearly as whole rows permit. Not here: calls of the generator
(`generation`).
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from trl_sft.building import spec_keys
from trl_sft.building.seeds import SeedRow
from trl_sft.building.spec import AxisValue, Spec
from trl_sft.building.templates import RowTemplate

Cell = tuple[str, ...]  # a value of each axis, in the order of the axes


class Slot(NamedTuple):
    """A row that is to be written."""

    number: int  # from 0
    cell: Mapping[str, str]  # axis -> value
    template: RowTemplate
    topic: str  # "" = the template needs none
    seed_row: SeedRow | None  # None = the template needs none
    variation: int  # how often cell and topic have occurred before, plus 1


def derive_seed(*parts: object) -> int:
    """Return a seed of 31 bits that depends on all of its parts and on nothing else."""
    text = "\0".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:4], "big") >> 1


def apportion(total: int, shares: Sequence[float]) -> list[int]:
    """Return whole numbers with this total, as near to the shares as possible: by largest remainders."""
    whole = sum(shares)
    exact = [total * share / whole for share in shares]
    counts = [math.floor(value) for value in exact]
    order = sorted(range(len(shares)), key=lambda index: (counts[index] - exact[index], index))
    for index in order[: total - sum(counts)]:
        counts[index] += 1
    return counts


def plan_slots(spec: Spec) -> list[Slot]:
    """Return the rows that are to be written, `plan.surplus` for each row of the set."""
    rows = spec.get(spec_keys.PLAN, "rows")
    total = math.ceil(rows * spec.get(spec_keys.PLAN, "surplus") - 1e-9)
    chance = random.Random(derive_seed(spec.seed, "plan"))
    cells = choose_cells(spec.axes, total, seed=spec.seed)
    chance.shuffle(cells)
    topics = _shuffle_topics(spec, chance)
    seed_rows = itertools.cycle(chance.sample(spec.seed_rows, len(spec.seed_rows)))
    by_family: dict[str, list[RowTemplate]] = defaultdict(list)
    for template in spec.templates:
        by_family[template.family].append(template)
    variations: Counter[tuple[object, ...]] = Counter()
    slots = []
    for number, values in enumerate(cells):
        cell = dict(zip(spec.axes, values, strict=True))
        template = chance.choice(by_family[cell[spec_keys.FAMILY]])
        topic, seed_row = "", None
        if template.needs == "seed":
            seed_row = next(seed_rows)
        else:
            topic = next(topics[cell.get("domain", "")])
        subject = (values, topic, seed_row.id if seed_row else "")
        variations[subject] += 1
        slots.append(Slot(number, cell, template, topic, seed_row, variations[subject]))
    return slots


def count_quotas(spec: Spec) -> dict[Cell, int]:
    """Return how many rows of the set each cell is planned to have."""
    return dict(Counter(choose_cells(spec.axes, spec.get(spec_keys.PLAN, "rows"), seed=spec.seed)))


def choose_cells(axes: Mapping[str, Sequence[AxisValue]], total: int, *, seed: int) -> list[Cell]:
    """Return the cell of each row.

    Each step takes the cell that is furthest behind its share, alone, in its pairs of axes and in its axes. A value
    whose rows are used up is not taken again, so that every axis meets its shares to the row.

    Args:
        axes: axis -> its values with their shares.
        total: the number of rows.
        seed: decides between cells that are equally far behind.

    Returns:
        (total,) cells.

    """
    values = list(axes.values())
    grid = list(itertools.product(*(range(len(items)) for items in values)))
    left = [np.array(apportion(total, [item.share for item in items])) for items in values]
    shares = [np.array([item.share for item in items]) / sum(item.share for item in items) for items in values]
    columns = np.array(grid).T  # (axes, cells): the number of the value
    groups: list[tuple[int, ...]] = [(index,) for index in range(len(values))]
    groups += itertools.combinations(range(len(values)), 2)
    groups += [tuple(range(len(values)))]
    labels, expected, counts = [], [], []
    for group in dict.fromkeys(groups):
        sizes = [len(values[index]) for index in group]
        labels.append(np.ravel_multi_index([columns[index] for index in group], sizes))
        joint = shares[group[0]]
        for index in group[1:]:
            joint = np.multiply.outer(joint, shares[index])
        expected.append(joint.reshape(-1))
        counts.append(np.zeros(joint.size))
    tie_break = np.random.default_rng(derive_seed(seed, "cells")).random(len(grid)) * 1e-6
    chosen = []
    for step in range(1, total + 1):
        is_open = np.all([remaining[columns[index]] > 0 for index, remaining in enumerate(left)], axis=0)
        behind = tie_break.copy()
        for label, share, count in zip(labels, expected, counts, strict=True):
            behind += (step * share - count)[label]
        best = int(np.argmax(np.where(is_open, behind, -np.inf)))
        for label, count in zip(labels, counts, strict=True):
            count[label[best]] += 1
        for index, remaining in enumerate(left):
            remaining[columns[index][best]] -= 1
        chosen.append(tuple(values[index][number].name for index, number in enumerate(grid[best])))
    return chosen


def _shuffle_topics(spec: Spec, chance: random.Random) -> dict[str, Iterator[str]]:
    """Return for each domain its topics without end: in a random order, each once before one comes again."""
    domains = [value.name for value in spec.axes.get("domain", ())] or [""]
    topics: dict[str, Iterator[str]] = {}
    for domain in domains:
        names = [topic for topic, of in spec.topics if of in ("", domain)]
        chance.shuffle(names)
        topics[domain] = itertools.cycle(names)
    return topics
