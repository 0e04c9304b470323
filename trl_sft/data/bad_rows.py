"""Rows that cannot be trained: the problem of each, its kind, and what the run does about them.

Inputs: refusals of single rows, by formatting and by tokenization. Outputs: kinds of problems with the number of rows
and the first of them; then faults (`data.on_bad_row: stop`), or lines for the screen (`drop`). Deliberately not here:
what makes a row bad (`formats`, `messages`, and `render` of `trl_sft.tokenization`).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from trl_sft.console import format_rows
from trl_sft.errors import DataError, Edit, Fault
from trl_sft.recipe.checked import Run

MAX_UNTRAINED = 0.05  # share of the rows that need not be trained, unless data.max_untrained says otherwise
MAX_KINDS = 500  # kinds that are kept apart; messages of a function of the user may differ in every row
HINT = " Or set `data.on_bad_row: drop`, which leaves such rows out."  # follows a fix
_MAX_SHOWN = 20  # kinds that are listed one by one
_OTHER = "another problem"  # the kind of a problem beyond `MAX_KINDS`
# what differs from row to row in a problem: the number of a turn, quoted texts, and numbers
_TURN = re.compile(r" \(turn \d+\)")
_QUOTED = re.compile(r"""(?<!\w)(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")(?!\w)""")
_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?(?![\w.])")


class BadRow(NamedTuple):
    """Why one row cannot be trained.

    Attributes:
        problem: what is wrong, with the value as it stands.
        fix: what to do, as an instruction.
        kind: the problem without what differs from row to row; rows of one kind are counted together.
        code: the code of the fault; "" = a function of the user dropped the row, which is no fault.
        can_be_dropped: whether `data.on_bad_row: drop` may leave the row out.
        edits: changes of the recipe with which the row is trained.

    """

    problem: str
    fix: str
    kind: str
    code: str
    can_be_dropped: bool = True
    edits: tuple[Edit, ...] = ()

    def to_json(self) -> str:
        """Return the row as a text of JSON, for a column of a dataset."""
        return json.dumps(self, ensure_ascii=False)


class BadRowKind(NamedTuple):
    """All rows of one kind of problem in one part of the run.

    Attributes:
        first: the number of the first row among the formatted rows.
        place: the name of that row in messages.
        bad_row: its problem and fix.
        num_rows: the number of rows.

    """

    first: int
    place: str
    bad_row: BadRow
    num_rows: int


Kinds = dict[str, BadRowKind]  # kind -> its rows


def describe_problem(problem: str, fix: str, *, code: str) -> BadRow:
    """Return a problem of a row with its kind: without quoted texts, numbers and the number of the turn."""
    kind = _QUOTED.sub("...", _TURN.sub("", problem))
    return BadRow(problem, fix, _NUMBER.sub("...", kind), code)


def read_json(text: str) -> BadRow:
    """Return the row that `BadRow.to_json` wrote."""
    return BadRow(*json.loads(text))


def add(kinds: Kinds, bad_row: BadRow, *, number: int, place: str) -> str:
    """Count one row, and return the name of its kind.

    Args:
        kinds: the kinds so far; they are changed.
        bad_row: the problem of the row.
        number: the number of the row among the formatted rows.
        place: the name of the row in messages.

    """
    name = bad_row.kind if bad_row.kind in kinds or len(kinds) < MAX_KINDS else _OTHER
    known = kinds.get(name)
    if known is None:
        kinds[name] = BadRowKind(number, place, bad_row, 1)
    elif number < known.first:
        kinds[name] = BadRowKind(number, place, bad_row, known.num_rows + 1)
    else:
        kinds[name] = known._replace(num_rows=known.num_rows + 1)
    return name


def join(parts: Iterable[Mapping[str, BadRowKind]], starts: Iterable[int] | None = None) -> Kinds:
    """Return the kinds of several parts together.

    Args:
        parts: the kinds of each part.
        starts: the number that the first formatted row of each part gets; None = rows keep their numbers.

    """
    joined: Kinds = {}
    for kinds, start in zip(parts, starts or itertools.repeat(0), strict=False):
        for name, kind in kinds.items():
            known = joined.get(name)
            moved = kind._replace(first=kind.first + start)
            if known is not None:
                first = min(known, moved, key=lambda either: either.first)
                moved = first._replace(num_rows=known.num_rows + kind.num_rows)
            joined[name] = moved
    return joined


def count(kinds: Mapping[str, BadRowKind]) -> int:
    """Return the number of rows of all kinds."""
    return sum(kind.num_rows for kind in kinds.values())


def drops_bad_rows(run: Run) -> bool:
    """Tell whether rows that cannot be trained are left out; otherwise they stop the run."""
    return run.data.get("on_bad_row") == "drop"


def get_limit(run: Run) -> float:
    """Return the share of the rows that need not be trained: `data.max_untrained`; 1 where the recipe accepts any."""
    if "untrained_rows" in run.options.get("allow", []):
        return 1.0
    return float(run.data.get("max_untrained", MAX_UNTRAINED))


def check(run: Run, kinds: Mapping[str, BadRowKind], *, part: str, total: int) -> None:
    """Stop the run for the bad rows of one part: for any of them, or with `drop` above the share of `max_untrained`.

    Args:
        run: the checked recipe.
        kinds: the bad rows of the part.
        part: train, or the name of an evaluation set.
        total: the number of rows of the part, the bad ones among them.

    Raises:
        DataError: one fault for each kind.

    """
    faults = list_faults(run, kinds, part=part, total=total)
    if faults:
        raise DataError(faults)


def list_faults(run: Run, kinds: Mapping[str, BadRowKind], *, part: str, total: int) -> list[Fault]:
    """Return the faults that `check` raises; [] = the run goes on without the bad rows. The arguments are its own."""
    number = count(kinds)
    if not kinds:
        return []
    limit = get_limit(run)
    if drops_bad_rows(run):
        always_stop = {name: kind for name, kind in kinds.items() if not kind.bad_row.can_be_dropped}
        if always_stop:
            return list(list_kinds(always_stop))
        if number <= limit * total:
            return []
        problem = (
            f"{number:,} of {total:,} rows of {part} cannot be trained ({number / total:.1%}), "
            f"more than data.max_untrained: {limit:g}"
        )
        share = _round_up(number / total)
        fix = "Correct the rows." if number == total else f"Correct the rows, or set data.max_untrained: {share}."
        summary = Fault(run.recipe.where(("data", "on_bad_row")), problem, fix, code="data.too_many_bad_rows")
        return [summary, *list_kinds(kinds)]
    hint = ""
    if number < total and all(kind.bad_row.can_be_dropped for kind in kinds.values()):
        hint = HINT
        if number > limit * total:
            share = _round_up(number / total)
            hint = f" Or set `data.on_bad_row: drop` and `data.max_untrained: {share}`, which leaves such rows out."
    return list(list_kinds(kinds, hint=hint))


def describe_left_out(reason: str, number: int, *, place: str) -> str:
    """Return a line on rows that are left out: how many, why, and which is the first."""
    return f"{format_rows(number)} {'is' if number == 1 else 'are'} left out: {reason}; the first is {place}"


def list_kinds(kinds: Mapping[str, BadRowKind], *, hint: str = "") -> Iterator[Fault]:
    """Yield one fault for each kind, those of the first rows first. `hint`: follows the fix of each."""
    listed: Sequence[BadRowKind] = sorted(kinds.values(), key=lambda kind: kind.first)
    for kind in listed[:_MAX_SHOWN]:
        same = f" (the first of {kind.num_rows:,} such rows)" if kind.num_rows > 1 else ""
        bad_row = kind.bad_row
        yield Fault(
            kind.place, f"{bad_row.problem}{same}", f"{bad_row.fix}{hint}", code=bad_row.code, edits=bad_row.edits
        )
    if hidden := listed[_MAX_SHOWN:]:
        number = sum(kind.num_rows for kind in hidden)
        problem = f"{len(hidden):,} more kinds of problems, in {format_rows(number)}"
        fix = "Correct the rows above first, and check again."
        yield Fault(hidden[0].place, problem, fix, code="data.more_faulty_rows")


def _round_up(share: float) -> float:
    """Return a share with two digits that is not below it."""
    return min(1.0, round(share + 0.005, 2))
