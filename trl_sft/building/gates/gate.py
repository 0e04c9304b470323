"""What a gate is, and the gates of a set in their order.

In: the limits of a set: tokens, languages, evaluation prompts. Out: gates. Not here: what each gate looks at (the
modules beside this one).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from trl_sft.building.candidates import CandidateRow, Rejection
from trl_sft.building.gates import (
    artefacts,
    completeness,
    duplicates,
    emptiness,
    form,
    language,
    language_names,
    leakage,
    length,
    novelty,
    personal_data,
)


class Gate(Protocol):
    """What looks at a row."""

    @property
    def name(self) -> str:
        """The name of the gate in rejections and counts."""

    def check(self, row: CandidateRow) -> Rejection | None:
        """Return why a row is rejected; None = it passes."""


def make_gates(
    *,
    count_tokens: Callable[[str], int] | None = None,
    max_tokens: int | None = None,
    evaluation_prompts: Sequence[str] = (),
    checks_novelty: bool = True,
) -> list[Gate]:
    """Return the gates of a set that is built, in their order: cheap ones first, those that compare rows last.

    A row passes through each gate once; the gates that compare rows remember those that passed.

    Args:
        count_tokens: returns the number of the student's tokens in a text; None = words and characters are counted.
        max_tokens: the most tokens of a row; None = no limit.
        evaluation_prompts: instructions of evaluation sets; rows that hold one are rejected.
        checks_novelty: whether an instruction too similar to an earlier one is rejected (ROUGE-L above 0.7).

    """
    gates: list[Gate] = [form.FormGate(), emptiness.EmptinessGate()]
    if max_tokens is not None:
        gates.append(length.LengthGate(max_tokens, count_tokens or length.count_words))
    gates += [
        completeness.CompletenessGate(),
        artefacts.ArtefactGate(),
        language.LanguageGate(identify=language_names.find_identifier()),
        personal_data.PersonalDataGate(),
    ]
    if evaluation_prompts:
        gates.append(leakage.LeakageGate(evaluation_prompts))
    gates.append(duplicates.DuplicateGate())
    if checks_novelty:
        gates.append(novelty.NoveltyGate())
    return gates
