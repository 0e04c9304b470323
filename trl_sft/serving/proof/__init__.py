"""The proof of an export: the trained model against what was written, read back by the programs that will serve it."""

from trl_sft.serving.proof.exported_model import GGUF, MERGED, OLLAMA, VLLM, ExportedModel
from trl_sft.serving.proof.llama_reader import check_installed
from trl_sft.serving.proof.proving import prove
from trl_sft.serving.proof.result import ProofResult
from trl_sft.serving.proof.trained_reference import TrainedReference, measure

__all__ = [
    "GGUF",
    "MERGED",
    "OLLAMA",
    "VLLM",
    "ExportedModel",
    "ProofResult",
    "TrainedReference",
    "check_installed",
    "measure",
    "prove",
]
