"""Rows pass the gates in order; each gate is counted, and rejected rows are kept with their reason.

Inputs: candidate rows, gates (`check(row) -> Rejection | None`), a judge or none. Outputs: the rows that passed, with
the score of the judge; `RejectedRow`s; counts. Not here: what a gate looks at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from trl_sft.building import rubric_judge, spec_keys, written_requests
from trl_sft.building.candidates import CandidateRow, Rejection
from trl_sft.building.gates.gate import Gate
from trl_sft.building.generation import GENERATION, Caller, WrittenRow
from trl_sft.building.spec import Spec
from trl_sft.building.templates import LanguageTexts

JUDGE = "judge"


class RejectedRow(NamedTuple):
    """A row that is no part of the set."""

    row: CandidateRow
    rejection: Rejection


@dataclass
class GateCount:
    """What a gate did."""

    checked: int = 0
    rejected: int = 0


@dataclass
class Screening:
    """Holds the gates and what they rejected.

    Attributes:
        spec: The checked spec.
        gates: In the order in which rows pass them.
        judge: Calls the judge; None = the spec has none.
        texts: What prompts say of the axes.
        counts: Gate -> how many rows it saw and rejected.
        rejected: In the order in which they were rejected.

    """

    spec: Spec
    gates: Sequence[Gate]
    judge: Caller | None
    texts: LanguageTexts
    counts: dict[str, GateCount] = field(default_factory=dict)
    rejected: list[RejectedRow] = field(default_factory=list)

    def reject(self, row: CandidateRow, rejection: Rejection) -> None:
        """Count a rejection, and keep the row."""
        count = self.counts.setdefault(rejection.gate, GateCount())
        count.rejected += 1
        self.rejected.append(RejectedRow(row, rejection))

    def take_whole(self, written: Sequence[WrittenRow]) -> list[CandidateRow]:
        """Return the rows that are whole; the others are rejected, and both are counted."""
        for gate in (GENERATION, written_requests.GATE):
            count = self.counts.setdefault(gate, GateCount())
            count.checked += len(written)
            written_before = written
            written = [row for row in written if row.rejection is None or row.rejection.gate != gate]
            for row in written_before:
                if row.rejection is not None and row.rejection.gate == gate:
                    self.reject(row.row, row.rejection)
        return [row.row for row in written]

    def screen(self, rows: Sequence[CandidateRow], *, without: Collection[str] = ()) -> list[CandidateRow]:
        """Return the rows that pass all gates, in their order; `without`: names of gates that are left out."""
        gates = [gate for gate in self.gates if gate.name not in without]
        passed = []
        for row in rows:
            rejection = self._check(row, gates)
            if rejection is None:
                passed.append(row)
            else:
                self.reject(row, rejection)
        return self._judge(passed) if self.judge is not None else passed

    def describe(self) -> list[dict[str, Any]]:
        """Return the counts as build.json has them."""
        return [{"gate": name, **dataclasses.asdict(count)} for name, count in self.counts.items()]

    def _check(self, row: CandidateRow, gates: Sequence[Gate]) -> Rejection | None:
        """Return the first rejection of a row."""
        for gate in gates:
            self.counts.setdefault(gate.name, GateCount()).checked += 1
            if (rejection := gate.check(row)) is not None:
                return rejection
        return None

    def _judge(self, rows: Sequence[CandidateRow]) -> list[CandidateRow]:
        """Return the rows whose lowest score is high enough, with their mean score."""
        assert self.judge is not None
        least = self.spec.get(spec_keys.JUDGE, "min_score")
        passed = []
        results = rubric_judge.judge_rows(rows, self.spec, self.judge, texts=self.texts)
        for row, result in zip(rows, results, strict=True):
            if not result.scores and self.judge.stop:
                continue  # not judged for want of budget: no verdict on the row
            self.counts.setdefault(JUDGE, GateCount()).checked += 1
            if not result.scores:
                self.reject(row, Rejection(JUDGE, f"the row has no judgement: {result.problem}"))
                continue
            name, lowest = result.lowest
            provenance = {**row.provenance, "scores": dict(result.scores)}
            scored = dataclasses.replace(row, score=result.mean, provenance=provenance)
            if lowest < least:
                self.reject(scored, Rejection(JUDGE, f"{name} has {lowest} of 5, and {least:g} is the least"))
                continue
            passed.append(scored)
        return passed
