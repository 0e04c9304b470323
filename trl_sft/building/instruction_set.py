"""The build, top to bottom: plan, write, screen, balance, split, augment.

Inputs: a checked spec, the callers of the models, the gates. Outputs: a `BuiltSet`, all rows in memory. The same spec
and the same answers give the same set. Not here: files (`output`), the client of a server, and lines for the user.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from trl_sft.building import augmentation, balance, generation, plan, spec_keys, splitting, templates
from trl_sft.building.balance import BalanceResult, CellTable
from trl_sft.building.candidates import CandidateRow
from trl_sft.building.gates.gate import Gate
from trl_sft.building.generation import Caller
from trl_sft.building.plan import Slot
from trl_sft.building.screening import Screening
from trl_sft.building.spec import Spec
from trl_sft.building.splitting import EVAL, TRAIN


class BuiltSet(NamedTuple):
    """The finished set."""

    parts: dict[str, list[CandidateRow]]  # train and eval, parents before their children
    balance: BalanceResult
    final: CellTable  # of all rows with their children
    screening: Screening
    written: int  # rows that the generator was asked for, attempts counted
    planned_children: dict[str, int]  # method -> children that were to be made
    children: dict[str, int]  # method -> children in the set
    stop: str  # why the build stopped early: calls, money or errors; "" = it is whole


def build(
    spec: Spec, generator: Caller, judge: Caller | None, *, gates: Sequence[Gate], report: Callable[[str, str], None]
) -> BuiltSet:
    """Build a set.

    Args:
        spec: The checked spec.
        generator: Calls the model that writes.
        judge: Calls the model that scores; None = the spec has none.
        gates: In the order in which rows pass them.
        report: Gets a name and a line for the user after each stage.

    """
    available, texts = templates.read_augmentations(spec.language)
    screening = Screening(spec, gates, judge, texts)
    slots = plan.plan_slots(spec)
    quotas = plan.count_quotas(spec)
    report("plan", f"{len(slots):,} rows to write in {len(quotas):,} cells")
    accepted, written = _write_accepted(spec, slots, generator, screening=screening)
    report("rows", f"{len(accepted):,} of {len(slots):,} rows passed the gates; {written:,} were written")
    chosen = balance.choose_rows(accepted, spec, quotas)
    report("balance", f"{len(chosen.rows):,} rows taken, {len(chosen.left_over):,} left over")
    names = splitting.split_rows(chosen.rows, eval_fraction=spec.get(spec_keys.OUTPUT, "eval_fraction"), seed=spec.seed)
    parts = {part: [row for row in chosen.rows if names[row.id] == part] for part in (TRAIN, EVAL)}
    planned_children, children = _augment(spec, parts, generator, screening=screening, available=available)
    if planned_children:
        report(
            "children", f"{sum(children.values()):,} of {sum(planned_children.values()):,} rows made from others passed"
        )
    rows = [row for part in parts.values() for row in part]
    final = balance.count_cells(rows, chosen.after.axes)
    stop = generator.stop or (judge.stop if judge is not None else "")
    return BuiltSet(parts, chosen, final, screening, written, planned_children, children, stop)


def _write_accepted(
    spec: Spec, slots: Sequence[Slot], generator: Caller, *, screening: Screening
) -> tuple[list[CandidateRow], int]:
    """Return the rows that pass the gates, in the order of their slots, and how many were written."""
    accepted: dict[int, CandidateRow] = {}
    written = 0
    for attempt in range(spec.get(spec_keys.PLAN, "attempts")):
        missing = [slot for slot in slots if slot.number not in accepted]
        for block in generation.write_rows(missing, spec, generator, attempt=attempt, texts=screening.texts):
            written += len(block)
            accepted |= {int(row.id): row for row in screening.screen(screening.take_whole(block))}
            if screening.judge is not None and screening.judge.stop:
                break
        if generator.stop or (screening.judge is not None and screening.judge.stop):
            break
    return [accepted[number] for number in sorted(accepted)], written


def _augment(
    spec: Spec,
    parts: dict[str, list[CandidateRow]],
    generator: Caller,
    *,
    screening: Screening,
    available: dict[str, templates.AugmentationTemplate],
) -> tuple[dict[str, int], dict[str, int]]:
    """Add children to the parts of the set; return how many were planned and made by each method."""
    planned_counts: dict[str, int] = {}
    counts: dict[str, int] = {}
    if spec_keys.AUGMENTATION not in spec.sections or generator.stop:
        return planned_counts, counts
    for part in (TRAIN, EVAL) if spec.get(spec_keys.AUGMENTATION, "held_out") else (TRAIN,):
        planned = augmentation.plan_children(parts[part], spec, available)
        for child in planned:
            planned_counts[child.template.name] = planned_counts.get(child.template.name, 0) + 1
        children = augmentation.make_children(planned, spec, generator, screening=screening)
        for row in children:
            method = str(row.provenance["template"]).partition("/")[2]
            counts[method] = counts.get(method, 0) + 1
        parts[part] += children
    return planned_counts, counts
