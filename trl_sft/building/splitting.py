"""The rows of a set are split into train and eval, each family and task in the same share; relatives stay together.

Inputs: rows, a share, a seed. Outputs: the names of the parts, by the id of the row. Rows from the same seed row, and
rows with the same instruction, are relatives. Not here: children of rows, which get the part of their parent
(`augmentation`).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

from trl_sft.building import plan, spec_keys
from trl_sft.building.candidates import CandidateRow

TRAIN, EVAL = "train", "eval"


def split_rows(rows: Sequence[CandidateRow], *, eval_fraction: float, seed: int) -> dict[str, str]:
    """Return the part of each row, by its id.

    Args:
        rows: of the set.
        eval_fraction: the share of the rows that is held out; 0 = none. Groups of relatives are never divided, so the
            share is met as nearly as they permit.
        seed: chooses the rows.

    """
    groups: dict[str, list[CandidateRow]] = defaultdict(list)
    for row in rows:
        groups[_name_group(row)].append(row)
    strata: dict[tuple[str, str], list[list[CandidateRow]]] = defaultdict(list)
    for group in groups.values():
        cell = group[0].cell
        strata[cell.get(spec_keys.FAMILY, ""), cell.get("task", "")].append(group)
    parts = dict.fromkeys((row.id for row in rows), TRAIN)
    wanted = round(len(rows) * eval_fraction)
    sizes = [sum(map(len, strata[name])) for name in sorted(strata)]
    quotas = plan.apportion(wanted, sizes) if wanted else [0] * len(sizes)
    for name, quota in zip(sorted(strata), quotas, strict=True):
        chance = random.Random(plan.derive_seed(seed, "split", *name))
        members = sorted(strata[name], key=lambda group: group[0].id)
        chance.shuffle(members)
        taken = 0
        for group in members:
            if taken + len(group) <= quota:
                parts |= dict.fromkeys((row.id for row in group), EVAL)
                taken += len(group)
    return parts


def _name_group(row: CandidateRow) -> str:
    """Return what relatives have in common: the seed row, else the instruction."""
    return str(row.provenance.get("seed_row") or "") or " ".join(row.instruction.lower().split())
