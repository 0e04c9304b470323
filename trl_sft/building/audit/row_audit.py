"""An audit: every row passes the gates in order, and the first one that rejects it counts.

In: an `AuditSource`, and what the gates need. Out: an `SetAudit`: findings by row, counts, statistics. Gates that
only note something come last and remove nothing. Not here: files that are written (`cleaned_set`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from trl_sft.building.audit.audit_source import AuditSource, AuditStore
from trl_sft.building.audit.gate_names import NOTING, REMOVING
from trl_sft.building.audit.set_statistics import SetStatistics
from trl_sft.building.candidates import CandidateRow, Rejection
from trl_sft.building.gates import language_names
from trl_sft.building.gates.artefacts import ArtefactGate
from trl_sft.building.gates.completeness import CompletenessGate
from trl_sft.building.gates.conflicts import ConflictGate
from trl_sft.building.gates.duplicates import DuplicateGate
from trl_sft.building.gates.emptiness import EmptinessGate
from trl_sft.building.gates.form import FormGate
from trl_sft.building.gates.gate import Gate
from trl_sft.building.gates.language import LanguageGate
from trl_sft.building.gates.leakage import LeakageGate
from trl_sft.building.gates.length import LengthGate, count_words
from trl_sft.building.gates.names import NamesGate
from trl_sft.building.gates.novelty import NoveltyGate
from trl_sft.building.gates.personal_data import PersonalDataGate
from trl_sft.building.gates.row_text import join_texts, split_row
from trl_sft.row_progress import RowProgress

_SAMPLE = 500  # rows, by which a common wording is known
TokenCounter = Callable[[Sequence[str]], list[int]]


class RowFinding(NamedTuple):
    """A row with a fault, or something to know of it."""

    number: int  # of the row, from 0
    gate: str
    reason: str


@dataclass(frozen=True)
class AuditOptions:
    """What an audit is asked for.

    Attributes:
        language: the language that the rows must have, as a code; "" = that of each instruction.
        evaluation_prompts: instructions of evaluation sets.
        count_tokens: returns the tokens of texts; None = words are counted.
        max_tokens: the most tokens of a row; None = no limit.
        noted: gates that remove rows, and only note them here.
        find_names: returns the names of people in a text; None = they are not looked for.

    """

    language: str = ""
    evaluation_prompts: Sequence[str] = ()
    count_tokens: TokenCounter | None = None
    max_tokens: int | None = None
    noted: Collection[str] = ()
    find_names: Callable[[str], list[str]] | None = None


@dataclass
class SetAudit:
    """What an audit found.

    Attributes:
        rows: the number of rows.
        removed: findings for which a row is removed; at most one a row.
        notes: findings that remove nothing; several a row.
        statistics: the tables of the whole set.
        set_findings: sentences about the whole set, each with what to do.
        seconds: that the gates took.

    """

    rows: int
    removed: list[RowFinding] = field(default_factory=list)
    notes: list[RowFinding] = field(default_factory=list)
    statistics: dict[str, Any] = field(default_factory=dict)
    set_findings: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    def count_gates(self) -> list[dict[str, Any]]:
        """Return each gate with the number of its rows, the removing ones first, in their order."""
        removed, noted = (Counter(finding.gate for finding in found) for found in (self.removed, self.notes))
        gates = [{"gate": name, "rows": removed[name], "removes": True} for name in REMOVING if name not in noted]
        gates += [{"gate": name, "rows": noted[name], "removes": False} for name in (*REMOVING, *NOTING) if noted[name]]
        return gates


def audit(source: AuditSource, options: AuditOptions) -> SetAudit:
    """Let every row of a source pass the gates."""
    begin = time.monotonic()
    result = SetAudit(len(source))
    statistics = SetStatistics("tokens" if options.count_tokens else "words", language_names.find_identifier())
    gates = _make_gates(source, options)
    noting: list[Gate] = [NoveltyGate(AuditStore(source)), ConflictGate(AuditStore(source))]
    if options.find_names:
        noting.append(NamesGate(options.find_names))
    length_gate = None if options.max_tokens is None else LengthGate(options.max_tokens, count_words)
    with RowProgress("Auditing", len(source)) as progress:
        for batch in source.iterate():
            rows = [row for row, _ in batch]
            for (row, task), (length, answer_length) in zip(batch, _count_lengths(rows, options), strict=True):
                number = int(row.id)
                if number in source.unreadable:
                    problem, is_empty = source.unreadable[number]
                    result.removed.append(RowFinding(number, "empty" if is_empty else "form", problem))
                    continue
                statistics.add(row, task=task, length=length, answer_length=answer_length)
                rejection = length_gate.check_count(length) if length_gate else None
                _judge_row(row, rejection, gates, noting=noting, noted=options.noted, result=result)
            progress.update(len(batch))
    result.statistics, result.set_findings = statistics.describe(), list(statistics.list_findings())
    result.seconds = time.monotonic() - begin
    return result


def _make_gates(source: AuditSource, options: AuditOptions) -> list[Gate]:
    """Return the gates that remove rows, in their order."""
    gates: list[Gate] = [FormGate(), EmptinessGate(), CompletenessGate(), ArtefactGate()]
    gates += [LanguageGate(options.language, language_names.find_identifier()), PersonalDataGate()]
    if options.evaluation_prompts:
        gates.append(LeakageGate(options.evaluation_prompts, _sample_instructions(source)))
    return [*gates, DuplicateGate(AuditStore(source))]


def _sample_instructions(source: AuditSource) -> list[str]:
    """Return the instructions of rows at equal distances."""
    numbers = range(0, len(source), max(1, len(source) // _SAMPLE))
    return [source.read_row(number).instruction for number in numbers if number not in source.unreadable]


def _judge_row(
    row: CandidateRow,
    rejection: Rejection | None,
    gates: Sequence[Gate],
    *,
    noting: Sequence[Gate],
    noted: Collection[str],
    result: SetAudit,
) -> None:
    """Add the findings of a row; a gate whose rows are only noted lets the row go on."""
    number = int(row.id)
    found = [rejection] if rejection else []
    for gate in gates:
        if found and found[-1].gate not in noted:
            break
        if rejection := gate.check(row):
            found.append(rejection)
    if not found or found[-1].gate in noted:
        found += [rejection for gate in noting if (rejection := gate.check(row))]
    for rejection in found:
        is_noted = rejection.gate in noted or rejection.gate in NOTING
        (result.notes if is_noted else result.removed).append(RowFinding(number, rejection.gate, rejection.reason))


def _count_lengths(rows: Sequence[CandidateRow], options: AuditOptions) -> Iterator[tuple[int, int]]:
    """Yield of each row the length of all turns and that of the last answer, in tokens or in words."""
    if options.count_tokens:
        lengths = options.count_tokens([join_texts(row) for row in rows])
        yield from zip(lengths, options.count_tokens([row.answer for row in rows]), strict=True)
        return
    for row in rows:
        yield len(split_row(row)), count_words(row.answer)
