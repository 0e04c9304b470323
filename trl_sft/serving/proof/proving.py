"""The proof of an export: every exported model is read back and compared with the trained one.

Inputs: the reference and what was exported. Outputs: a `ProofResult`. A folder is read by transformers, a GGUF file by
transformers and llama.cpp. Not here: writing an export (`serving.export`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trl_sft.errors import Fault, RecipeError
from trl_sft.serving.proof import attribution, folder_reader, llama_reader
from trl_sft.serving.proof.exported_model import ExportedModel
from trl_sft.serving.proof.folder_reader import ReaderOutput
from trl_sft.serving.proof.result import ExportVerdict, ProofResult
from trl_sft.serving.proof.trained_reference import TrainedReference

_NO_CHANGE = 1e-12  # nats: the largest divergence of two computations of one model


def prove(
    exports: Sequence[ExportedModel],
    reference: TrainedReference,
    *,
    merged: ExportedModel | None = None,
    trusts_code: bool = False,
) -> ProofResult:
    """Read back every exported model, and compare it with the trained one.

    Args:
        exports: what was written.
        reference: the trained model, as `trained_reference.measure` returns it.
        merged: the folder that the GGUF files were made from; None = there is none, or it is among `exports`.
        trusts_code: whether Python code that a model brings may run.

    Raises:
        UserError: a reader cannot be used.

    """
    outputs: dict[str, list[ReaderOutput]] = {}
    verdicts: list[ExportVerdict] = []
    merged = merged or next((exported for exported in exports if not exported.is_gguf), None)
    read_merged = _build_merged_reader(merged, reference, outputs, trusts_code=trusts_code)
    for exported in exports:
        key = str(exported.path)
        try:
            outputs[key] = _read(exported, reference, outputs.get(key), trusts_code=trusts_code)
        except RecipeError as error:
            verdicts.append(attribution.judge_unreadable(exported, error.faults[0]))
            continue
        verdicts.append(attribution.judge(exported, outputs[key], reference, merged=merged, read_merged=read_merged))
    return ProofResult(reference, verdicts, _find_missing_change(reference))


def _read(
    exported: ExportedModel, reference: TrainedReference, known: list[ReaderOutput] | None, *, trusts_code: bool
) -> list[ReaderOutput]:
    """Return what each reader makes of an exported model; `known`: what it made of the same weights."""
    by_name = {output.reader: output for output in known or ()}
    outputs = []
    if not exported.unread:
        first = by_name.get(folder_reader.TRANSFORMERS)
        outputs.append(folder_reader.read(exported, reference, known=first, trusts_code=trusts_code))
    if exported.is_gguf:
        outputs.append(llama_reader.read(exported, reference, known=by_name.get(folder_reader.LLAMA_CPP)))
    return outputs


def _build_merged_reader(
    merged: ExportedModel | None,
    reference: TrainedReference,
    outputs: dict[str, list[ReaderOutput]],
    *,
    trusts_code: bool,
) -> Callable[[], ReaderOutput | None]:
    """Return a function that reads the merged folder, once."""

    def read() -> ReaderOutput | None:
        if merged is None:
            return None
        key = str(merged.path)
        if key not in outputs:
            outputs[key] = [folder_reader.read(merged, reference, trusts_code=trusts_code)]
        return outputs[key][0]

    return read


def _find_missing_change(reference: TrainedReference) -> Fault | None:
    """Return the fault of a trained model that answers as its base does; None = it differs, or there is no base."""
    if reference.base is None or reference.base.worst_kl > _NO_CHANGE:
        return None
    problem = "the trained model computes what its base model computes: the training has changed nothing"
    fix = "Train longer, or with a higher `train.learning_rate`."
    return Fault(str(reference.source.folder), problem, fix, code="proof.no_change")
