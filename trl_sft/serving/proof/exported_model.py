"""An exported model, as the proof reads it.

Inputs: what an export wrote. Outputs: an `ExportedModel`. Needs no torch. Not here: writing (`serving.export`), reading
(`folder_reader`, `llama_reader`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# formats of an export
MERGED, VLLM, GGUF, OLLAMA = "merged", "vllm", "gguf", "ollama"


@dataclass(frozen=True)
class ExportedModel:
    """One model that an export wrote.

    Attributes:
        format: MERGED, VLLM, GGUF or OLLAMA.
        path: the folder that transformers and vLLM load, or the GGUF file.
        number_type: of the weights: "float32", "bfloat16", "float16", or of a GGUF file "f32", "bf16", "f16", "q8_0".
        render: how the runtime renders messages with its own template; None = by the chat template in `path`.
        template_kwargs: what the command of the export hands to the chat template.
        unread: what transformers' own reader of GGUF files leaves out of this one, so that llama.cpp alone proves it;
            "" = nothing.

    """

    format: str
    path: Path
    number_type: str
    render: Callable[[list[dict[str, Any]]], str] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    unread: str = ""

    @property
    def is_gguf(self) -> bool:
        """Whether the weights are in a GGUF file."""
        return self.path.suffix == ".gguf"

    @property
    def title(self) -> str:
        """The model as the screen names it."""
        return f"{self.format} {self.number_type}"
