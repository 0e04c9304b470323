"""The result of a proof: for each exported model what was compared, and which step is at fault.

Inputs: the outputs of the readers, judged. Outputs: a mapping for export.json, lines for the screen, faults. Not here:
the judgement (`attribution`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trl_sft.errors import Fault
from trl_sft.serving.proof.exported_model import ExportedModel
from trl_sft.serving.proof.folder_reader import ReaderOutput
from trl_sft.serving.proof.prompt_agreement import PromptAgreement
from trl_sft.serving.proof.run_prompts import HELD_OUT, OWN, TRAINING
from trl_sft.serving.proof.tolerances import Tolerance
from trl_sft.serving.proof.trained_reference import TrainedReference

# the steps of an export that can be at fault
TEMPLATE, MERGE, CONVERSION, QUANTIZATION = "template", "merge", "conversion", "quantization"


@dataclass(frozen=True)
class ReaderVerdict:
    """What one reader says of one exported model."""

    output: ReaderOutput
    agreement: PromptAgreement
    tolerance: Tolerance
    is_within: bool  # whether the answers are as near as the tolerance demands

    def describe(self) -> dict[str, Any]:
        """Return the verdict for JSON."""
        return {
            "reader": self.output.reader,
            "version": self.output.version,
            "judges_prompts": self.output.is_runtime,
            "prompts": self.agreement.describe(),
            **self.output.summary.describe(),
            "tolerance": self.tolerance._asdict(),
            "within_tolerance": self.is_within,
        }


@dataclass(frozen=True)
class ExportVerdict:
    """What all readers say of one exported model, and which step is at fault."""

    exported: ExportedModel
    readers: list[ReaderVerdict]
    step: str  # TEMPLATE, MERGE, CONVERSION or QUANTIZATION; "" = it is proved
    fault: Fault | None

    def describe(self) -> dict[str, Any]:
        """Return the verdict for JSON."""
        return {
            "format": self.exported.format,
            "file": self.exported.path.name,
            "type": self.exported.number_type,
            "passed": self.fault is None,
            "not_read_by_transformers": self.exported.unread or None,
            "step_at_fault": self.step or None,
            "problem": self.fault.problem if self.fault else None,
            "readers": [reader.describe() for reader in self.readers],
        }


@dataclass(frozen=True)
class ProofResult:
    """The proof of an export."""

    reference: TrainedReference
    verdicts: list[ExportVerdict]
    change_fault: Fault | None  # the trained model answers as its base does

    @property
    def passed(self) -> bool:
        """Whether every exported model is proved."""
        return not self.faults

    @property
    def faults(self) -> list[Fault]:
        """What is wrong, one fault for each exported model that is not proved."""
        faults = [verdict.fault for verdict in self.verdicts if verdict.fault is not None]
        return [self.change_fault, *faults] if self.change_fault else faults

    def describe(self) -> dict[str, Any]:
        """Return the proof for export.json."""
        prompts, base = self.reference.prompts, self.reference.base
        return {
            "passed": self.passed,
            "reference": self.reference.kind,
            "prompts": {kind: prompts.count(kind) for kind in (HELD_OUT, TRAINING, OWN)},
            "answers": len(self.reference.answers),
            "answer_tokens": self.reference.answer_tokens,
            "positions": sum(len(answer.tokens) for answer in self.reference.answers),
            "notes": self.reference.notes,
            "base": None if base is None else {"mean_kl": base.mean_kl, "worst_kl": base.worst_kl},
            "exports": [verdict.describe() for verdict in self.verdicts],
        }

    def list_lines(self) -> list[tuple[str, str]]:
        """Return the lines of the screen, name and value."""
        prompts = self.reference.prompts
        own = f", {prompts.count(OWN)} fixed" if prompts.count(OWN) else ""
        text = f"{prompts.count(HELD_OUT)} held-out prompts, {prompts.count(TRAINING)} of training rows{own}; "
        text += f"greedy answers of at most {self.reference.answer_tokens} tokens"
        lines = [("proof", text), *(("", note) for note in self.reference.notes)]
        if self.reference.base is not None:
            kl = self.reference.base.mean_kl
            lines.append(("", f"training changed the next-token distribution by KL {kl:.2g} (mean, base model)"))
        for verdict in self.verdicts:
            lines += _list_lines(verdict)
        return lines


def _list_lines(verdict: ExportVerdict) -> list[tuple[str, str]]:
    """Return the lines on one exported model."""
    lines = []
    for reader in verdict.readers:
        summary, agreement = reader.output.summary, reader.agreement
        text = f"{verdict.exported.title} by {reader.output.reader}: "
        if agreement.compared:
            judged = "" if reader.output.is_runtime else " (its own tokenizer, not judged)"
            text += f"prompts equal {agreement.equal}/{agreement.compared}{judged}, "
        text += f"answers equal {summary.equal}/{len(summary.comparisons)}, "
        text += f"KL mean {summary.mean_kl:.2g}, worst {summary.worst_kl:.2g} (tolerance {reader.tolerance.mean_kl:g}, "
        lines.append(("", f"{text}{reader.tolerance.worst_kl:g})"))
    if verdict.exported.unread:
        lines.append(("", f"{verdict.exported.title} is not read by transformers: {verdict.exported.unread}"))
    if verdict.fault is not None:
        lines.append(("", f"{verdict.exported.title} is not proved: the {verdict.step} is at fault"))
    return lines
