"""The rows of a set are chosen: each cell up to its quota, the best first; and tables say what that did.

Inputs: rows that passed the gates, quotas, axes. Outputs: the chosen rows in their order, the rows that were left over,
contingency tables, effective numbers of cells, and each shortfall by name. No row is ever taken twice. Not here: the
quotas themselves (`plan`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from trl_sft.building import plan, spec_keys
from trl_sft.building import spec as building_spec
from trl_sft.building.candidates import CandidateRow
from trl_sft.building.plan import Cell
from trl_sft.building.spec import Spec

LOW_SCORE, OVER_QUOTA = "score below balance.min_score", "over the quota of its cell"


class CellTable(NamedTuple):
    """How many rows each cell has."""

    axes: tuple[str, ...]
    counts: Mapping[Cell, int]

    @property
    def effective_cells(self) -> float:
        """The number of equally full cells with the same entropy (exponential of Shannon's): 1 = all in one cell."""
        total = sum(self.counts.values())
        if not total:
            return 0.0
        return math.exp(-sum(count / total * math.log(count / total) for count in self.counts.values() if count))

    def describe(self) -> dict[str, Any]:
        """Return the table as build.json has it."""
        cells = [
            {**dict(zip(self.axes, cell, strict=True)), "rows": count} for cell, count in sorted(self.counts.items())
        ]
        return {"axes": list(self.axes), "effective_cells": round(self.effective_cells, 3), "cells": cells}


class CellShortfall(NamedTuple):
    """A cell with fewer rows than planned."""

    cell: Mapping[str, str]
    planned: int
    rows: int


class BalanceResult(NamedTuple):
    """The chosen rows, and what the choice did."""

    rows: list[CandidateRow]
    left_over: list[tuple[CandidateRow, str]]  # with the reason
    before: CellTable
    after: CellTable
    shortfalls: list[CellShortfall]


def choose_rows(rows: Sequence[CandidateRow], spec: Spec, quotas: Mapping[Cell, int]) -> BalanceResult:
    """Return the rows of the set.

    Within a cell the rows with the best scores are taken; without a judge, and among equal scores, those that were
    planned first. First each cell gets the rows of its floor (`balance.min_rows`), then those of its quota. Cells with
    too few rows stay short and are named.

    Args:
        rows: that passed the gates.
        spec: the checked spec.
        quotas: how many rows each cell of all axes is planned to have.

    """
    axes = building_spec.choose_balance_axes(spec)
    least = spec.get(spec_keys.BALANCE, "min_score")
    left_over = [(row, LOW_SCORE) for row in rows if least is not None and (row.score or 0) < least]
    low = {row.id for row, _ in left_over}
    usable = [row for row in rows if row.id not in low]
    limits = _choose_limits(usable, spec, quotas, axes=axes)
    by_quality = sorted(usable, key=lambda row: (-(row.score or 0.0), row.id))
    taken: Counter[Cell] = Counter()
    chosen: set[str] = set()
    floors = dict.fromkeys(limits, spec.get(spec_keys.BALANCE, "min_rows") or 0)
    for most in (floors, limits):
        for row in by_quality:
            cell = find_cell(row, axes)
            has_room = taken[cell] < most.get(cell, 0) and len(chosen) < spec.get(spec_keys.PLAN, "rows")
            if has_room and row.id not in chosen:
                taken[cell] += 1
                chosen.add(row.id)
    left_over += [(row, OVER_QUOTA) for row in usable if row.id not in chosen]
    kept = [row for row in rows if row.id in chosen]
    shortfalls = _list_shortfalls(spec, taken, limits, axes=axes)
    return BalanceResult(kept, left_over, count_cells(rows, axes), count_cells(kept, axes), shortfalls)


def count_cells(rows: Sequence[CandidateRow], axes: Sequence[str]) -> CellTable:
    """Return how many rows each cell has."""
    return CellTable(tuple(axes), Counter(find_cell(row, axes) for row in rows))


def find_cell(row: CandidateRow, axes: Sequence[str]) -> Cell:
    """Return the values of a row on some axes; the topic counts as an axis."""
    return tuple(
        str(row.provenance.get("topic", "")) if axis == spec_keys.TOPIC else row.cell.get(axis, "") for axis in axes
    )


def _choose_limits(
    rows: Sequence[CandidateRow], spec: Spec, quotas: Mapping[Cell, int], *, axes: Sequence[str]
) -> dict[Cell, int]:
    """Return the most rows of each cell of the balanced axes."""
    cells = [find_cell(row, axes) for row in rows]
    if spec.get(spec_keys.BALANCE, "target") == "equal" or spec_keys.TOPIC in axes:
        names = sorted({*cells, *_list_planned(spec, quotas, axes)})
        shares = plan.apportion(spec.get(spec_keys.PLAN, "rows"), [1.0] * len(names)) if names else []
        return dict(zip(names, shares, strict=True))
    return _list_planned(spec, quotas, axes)


def _list_planned(spec: Spec, quotas: Mapping[Cell, int], axes: Sequence[str]) -> dict[Cell, int]:
    """Return the quotas summed over the axes that are not balanced; {} with the topic, which no quota knows."""
    if spec_keys.TOPIC in axes:
        return {}
    places = [list(spec.axes).index(axis) for axis in axes]
    planned: Counter[Cell] = Counter()
    for cell, count in quotas.items():
        planned[tuple(cell[place] for place in places)] += count
    return dict(planned)


def _list_shortfalls(
    spec: Spec, taken: Mapping[Cell, int], limits: Mapping[Cell, int], *, axes: Sequence[str]
) -> list[CellShortfall]:
    """Return the cells with fewer rows than planned, or than the floor of the spec."""
    floor = spec.get(spec_keys.BALANCE, "min_rows")
    shortfalls = []
    for cell, limit in sorted(limits.items()):
        planned = limit if floor is None else max(limit, floor)
        if taken.get(cell, 0) < planned:
            shortfalls.append(CellShortfall(dict(zip(axes, cell, strict=True)), planned, taken.get(cell, 0)))
    return shortfalls
