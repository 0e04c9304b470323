"""Which step of an export is at fault: template, merge, conversion or quantization.

Inputs: what the readers say of an exported model, and of the merged folder that it was made from. Outputs: an
`ExportVerdict`. Not here: reading (`folder_reader`, `llama_reader`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trl_sft.errors import Fault
from trl_sft.serving.proof import prompt_agreement, tolerances, weight_check
from trl_sft.serving.proof.answer_comparison import AnswerSummary
from trl_sft.serving.proof.exported_model import ExportedModel
from trl_sft.serving.proof.folder_reader import LLAMA_CPP, TRANSFORMERS, ReaderOutput
from trl_sft.serving.proof.result import CONVERSION, MERGE, QUANTIZATION, TEMPLATE, ExportVerdict, ReaderVerdict
from trl_sft.serving.proof.trained_reference import TrainedReference

_NEAR_BASE = 0.1  # share of the divergence between base and trained model; rounding explains less
_REPORT = "Serve the run itself with `chat` or `serve`, and report this with the versions in run.json."


def judge(
    exported: ExportedModel,
    outputs: Sequence[ReaderOutput],
    reference: TrainedReference,
    *,
    merged: ExportedModel | None,
    read_merged: Callable[[], ReaderOutput | None],
) -> ExportVerdict:
    """Return the verdict on an exported model.

    Args:
        exported: what was written.
        outputs: what the readers made of it.
        reference: the trained model.
        merged: the merged folder beside a GGUF file; None = there is none.
        read_merged: returns what transformers makes of that folder; called only if the weights differ.

    """
    readers = [_judge_reader(exported, output, reference) for output in outputs]
    for reader in readers:
        if reader.agreement.problem:
            problem = f"{reader.output.reader}: {reader.agreement.problem}"
            return _fail(exported, readers, step=TEMPLATE, problem=problem)
    for reader in readers:
        if not reader.is_within:
            step, problem = _explain_weights(exported, readers, reference, merged=merged, read_merged=read_merged)
            return _fail(exported, readers, step=step, problem=problem)
    for reader in readers:
        if problem := _explain_loss(reader, reference):
            return _fail(exported, readers, step=QUANTIZATION, problem=problem)
    return ExportVerdict(exported, readers, "", None)


def judge_unreadable(exported: ExportedModel, fault: Fault) -> ExportVerdict:
    """Return the verdict on an exported model that a reader cannot load; `fault`: of that reader."""
    if fault.code == "proof.wrong_template":
        return ExportVerdict(exported, [], TEMPLATE, fault)
    return ExportVerdict(exported, [], CONVERSION if exported.is_gguf else MERGE, fault)


def _judge_reader(exported: ExportedModel, output: ReaderOutput, reference: TrainedReference) -> ReaderVerdict:
    """Return the verdict of one reader."""
    tolerance = tolerances.find(exported.number_type, is_llama_cpp=output.reader == LLAMA_CPP)
    summary = output.summary
    is_within = summary.mean_kl <= tolerance.mean_kl and summary.worst_kl <= tolerance.worst_kl
    agreement = prompt_agreement.compare(reference, output)
    return ReaderVerdict(output, agreement, tolerance, is_within and summary.worst_gap <= tolerance.gap)


def _explain_weights(
    exported: ExportedModel,
    readers: Sequence[ReaderVerdict],
    reference: TrainedReference,
    *,
    merged: ExportedModel | None,
    read_merged: Callable[[], ReaderOutput | None],
) -> tuple[str, str]:
    """Return the step at fault and the problem, of weights that are not the trained ones."""
    failed = next(reader for reader in readers if not reader.is_within)
    distance = _describe_distance(failed)
    if any(_is_base(reader.output.summary, reference) for reader in readers if not reader.is_within):
        return MERGE, f"the weights are those of the base model: what was trained is not in them ({distance})"
    if not exported.is_gguf:
        return MERGE, f"the weights are not the trained ones: {distance}"
    output = read_merged()
    if merged is not None and output is not None and not _judge_reader(merged, output, reference).is_within:
        return MERGE, f"the merged weights, from which the file was made, are not the trained ones already: {distance}"
    by_transformers = next((reader for reader in readers if reader.output.reader == TRANSFORMERS), None)
    if by_transformers is not None and by_transformers.is_within:
        return CONVERSION, f"llama.cpp computes otherwise than transformers from the same file: {distance}"
    difference = ""
    if merged is not None and not exported.unread:
        difference = weight_check.find_difference(exported, merged)
    if difference:
        return CONVERSION, f"the file does not hold the merged model: {difference} ({distance})"
    if exported.number_type.lower() in ("f32", "f16", "bf16") or merged is None:
        return CONVERSION, f"the file does not hold the trained model: {distance}"
    return QUANTIZATION, f"numbers of the type {exported.number_type} are too coarse for this model: {distance}"


def _is_base(summary: AnswerSummary, reference: TrainedReference) -> bool:
    """Tell whether an export is much nearer to the base model than the trained model is."""
    change = sum(answer.measure_change() for answer in reference.answers)
    return change > 0 and sum(comparison.from_base for comparison in summary.comparisons) <= _NEAR_BASE * change


def _explain_loss(reader: ReaderVerdict, reference: TrainedReference) -> str:
    """Return that an export has lost what was trained, though its numbers are as exact as they can be; "" = not."""
    base = reference.base
    if base is None or base.mean_kl < tolerances.SMALLEST_CHANGE:
        return ""
    if reader.output.summary.mean_kl <= tolerances.MOST_OF_CHANGE * base.mean_kl:
        return ""
    return (
        f"the export has lost what was trained: its KL to the trained model is {reader.output.summary.mean_kl:.2g}, "
        f"and that of the base model {base.mean_kl:.2g}"
    )


def _describe_distance(reader: ReaderVerdict) -> str:
    """Return how far an export is from the trained model, and the tolerance."""
    summary, tolerance = reader.output.summary, reader.tolerance
    text = f"read by {reader.output.reader}, KL mean {summary.mean_kl:.2g} and worst {summary.worst_kl:.2g}, "
    text += f"tolerance {tolerance.mean_kl:g} and {tolerance.worst_kl:g}"
    if summary.equal < len(summary.comparisons):
        number, first = next((n, c) for n, c in enumerate(summary.comparisons) if c.position is not None)
        text += f"; {summary.equal} of {len(summary.comparisons)} answers are equal, "
        text += f"that to prompt {number} differs from token {first.position}"
    return text


def _fail(exported: ExportedModel, readers: list[ReaderVerdict], *, step: str, problem: str) -> ExportVerdict:
    """Return a verdict with its fault."""
    fix = _REPORT
    if step == QUANTIZATION:
        fix = "Write a type of more bits, for example `--gguf-type f16`."
    elif step == MERGE and exported.number_type in ("float16", "bfloat16"):
        fix = f"Write `--dtype float32`; if that fails too: {_REPORT[0].lower()}{_REPORT[1:]}"
    problem = f"the {step} of the export is at fault: {problem}"
    code = {
        TEMPLATE: "proof.wrong_template",
        MERGE: "proof.wrong_merge",
        CONVERSION: "proof.wrong_conversion",
        QUANTIZATION: "proof.lost_in_quantization",
    }[step]
    return ExportVerdict(exported, readers, step, Fault(exported.title, problem, fix, code=code))
