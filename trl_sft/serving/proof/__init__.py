"""The proof of an export: the trained model against what was written, read back by the programs that will serve it.

Inputs: the folder of a run, exported models. Outputs: a `ProofResult`. Importing this needs no torch: each function
imports what it needs when it is called. Not here: writing an export (`serving.export`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trl_sft.errors import Fault, MissingPackage
from trl_sft.model.needed_packages import is_installed
from trl_sft.serving.model_folder import ModelFolder
from trl_sft.serving.proof.exported_model import GGUF, MERGED, OLLAMA, VLLM, ExportedModel

if TYPE_CHECKING:
    from trl_sft.serving.proof.result import ProofResult
    from trl_sft.serving.proof.trained_reference import TrainedReference

__all__ = ["GGUF", "MERGED", "OLLAMA", "VLLM", "ExportedModel", "check_installed", "measure", "prove"]


def check_installed() -> None:
    """Refuse to write a GGUF file that nothing here could read back. Raises MissingPackage."""
    missing = [name for name in ("gguf", "xllamacpp") if not is_installed(name)]
    if missing:
        problem = f"not installed: {', '.join(missing)}, with which a GGUF file is written and proved"
        fix = "Run `pip install 'trl-sft[gguf]'` in this Python environment."
        raise MissingPackage(Fault("gguf", problem, fix, code="package.missing"))


def measure(source: ModelFolder, *, is_quantized_base: bool = False, trusts_code: bool = False) -> TrainedReference:
    """Let the trained model and its base answer the prompts of the run.

    Args:
        source: the folder of the run, or of a model.
        is_quantized_base: whether the adapter was merged into the dequantized weights of its training.
        trusts_code: whether Python code that a model brings may run.

    Raises:
        UserError: the model or its tokenizer cannot be loaded, or the memory does not hold it in float32.

    """
    from trl_sft.serving.proof import trained_reference  # noqa: PLC0415 (imports torch)

    return trained_reference.measure(source, is_quantized_base=is_quantized_base, trusts_code=trusts_code)


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
        reference: the trained model, as `measure` returns it.
        merged: the merged folder beside the GGUF files; None = there is none, or it is among `exports`.
        trusts_code: whether Python code that a model brings may run.

    Raises:
        MissingPackage: a reader is not installed.

    """
    from trl_sft.serving.proof import proving  # noqa: PLC0415 (imports torch)

    return proving.prove(exports, reference, merged=merged, trusts_code=trusts_code)
