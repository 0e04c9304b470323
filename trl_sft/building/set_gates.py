"""The gates of a build: those of `building.gates`, and two that only a build has: refusals, and known final answers.

Inputs: a checked spec, and how tokens of the student are counted. Outputs: gates in the order in which rows pass them.
Those that compare rows come last, so that a faulty row never stands for a later one that is clean. Not here: what the
other gates look at.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from trl_sft.building import spec_keys
from trl_sft.building.candidates import CandidateRow, Rejection
from trl_sft.building.gates import gate as building_gates
from trl_sft.building.gates.duplicates import DuplicateGate
from trl_sft.building.gates.gate import Gate
from trl_sft.building.gates.novelty import NoveltyGate
from trl_sft.building.gates.row_text import list_answers
from trl_sft.building.spec import Spec
from trl_sft.building.templates import RowTemplate
from trl_sft.evaluation import refusals
from trl_sft.evaluation.checks import number_match, text_match
from trl_sft.evaluation.checks.answer import CheckedAnswer

_BEGINNING = 2  # sentences
_SENTENCES = re.compile(r"(?<=[.!?。！？])\s*(?=\S)|\n+")
_QUOTATION = re.compile(
    r"\"[^\"]*\"|“[^”]*”|「[^」]*」|`[^`]*`|(?<!\w)'[^'\n]*'(?!\w)|\b(?:for example|like this|such as|e\.g\.)[:,].*",
    re.IGNORECASE,
)
# a letter, or a line of a dialogue
_OTHER_SPEAKER = re.compile(
    r"(?:Dear|Hello|Hi|Hey|Subject:|Re:|To:|Good (?:morning|evening)|亲爱的|尊敬的|主题：|您好)\b[^.!?\n]{0,60}"
    r"(?:,|:|\n|，|：|！)|\*{0,2}[A-Z][\w .-]{0,20}:|[\u4e00-\u9fff]{1,6}："
)
_FINAL_MARK = "####"
_FINAL_LINE = re.compile(r"^[ \t*>]*#### *[*$]*[^\s#*$]|\\boxed\{[^}]", re.MULTILINE)  # many models box it all the same
COMPARING = (DuplicateGate.name, NoveltyGate.name)  # gates that compare a row with those that passed


class FinalAnswerGate:
    """Rejects rows whose final answer is not the known one, and solutions without the final line that was asked for."""

    name = "final_answer"

    def __init__(self, templates: Sequence[RowTemplate] = ()) -> None:
        """Find the templates whose answers end with a line `#### ANSWER`."""
        marked = [template for template in templates if any(_FINAL_MARK in turn.system for turn in template.turns)]
        self._marked = frozenset(f"{template.family}/{template.name}" for template in marked)

    def check(self, row: CandidateRow) -> Rejection | None:
        """Compare the final answers as numbers; as texts where the known one has no number."""
        if row.provenance.get("template") in self._marked and not _FINAL_LINE.search(row.answer):
            return Rejection(self.name, f"the solution has no final answer: no line begins with {_FINAL_MARK}")
        if not row.key:
            return None
        checked = CheckedAnswer(row.answer, row.key)
        if number_match.find_final_number(row.key) is not None:
            is_right = number_match.check_number(checked)
        else:
            is_right = text_match.check_contains(checked)
        if is_right:
            return None
        return Rejection(self.name, f"the final answer is not the known one, {row.key.strip()[-60:]!r}")


class RefusalGate:
    """Rejects rows with an answer that refuses: the requests of a build are harmless by its topics."""

    name = "refusal"

    def check(self, row: CandidateRow) -> Rejection | None:
        """Read the first sentences of each answer; a letter, a dialogue and what the text quotes are no refusal."""
        for text in list_answers(row):
            beginning = _read_beginning(text)
            if refusals.is_refusal(beginning):
                return Rejection(self.name, f"an answer begins as a refusal: {beginning[:60]!r}")
        return None


def _read_beginning(answer: str) -> str:
    """Return the first two sentences of an answer without quotations; "" = it begins as a letter or a story does."""
    text = answer.strip()
    if _OTHER_SPEAKER.match(text):
        return ""
    parts = _SENTENCES.split(_QUOTATION.sub(" ", text), maxsplit=_BEGINNING)
    return " ".join(parts[:_BEGINNING]).strip()


def make_gates(spec: Spec, *, count_tokens: Callable[[str], int] | None) -> list[Gate]:
    """Return the gates of a build.

    Args:
        spec: The checked spec.
        count_tokens: Returns the number of the student's tokens in a text; None = words are counted.

    """
    section = spec.sections[spec_keys.GATES]
    gates = building_gates.make_gates(
        count_tokens=count_tokens,
        max_tokens=section["max_tokens"],
        evaluation_prompts=spec.evaluation_prompts,
        checks_novelty=section["novelty"],
    )
    own: list[Gate] = [FinalAnswerGate(spec.templates)]
    if section["reject_refusals"]:
        own.insert(0, RefusalGate())
    return [
        *(gate for gate in gates if gate.name not in COMPARING),
        *own,
        *(gate for gate in gates if gate.name in COMPARING),
    ]
