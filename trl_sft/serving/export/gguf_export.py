"""The GGUF format of an export: what is refused before, and the file.

Inputs: an `ExportSource`, the whole model on the meta device. Outputs: one GGUF file and its entry of export.json. Not
here: tensors (`gguf_file`), tokens (`gguf_vocabulary`), rules that split a text (`pre_tokenizers`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trl_sft import __version__
from trl_sft.serving import base_tensors
from trl_sft.serving.export import gguf_file, gguf_vocabulary, portable_template, pre_tokenizers
from trl_sft.serving.export.export_source import ExportSource


class GgufExport:
    """A GGUF file that is planned."""

    def __init__(self, source: ExportSource, model: Any, file_type: str) -> None:
        """Plan the file.

        Args:
            source: What is exported.
            model: The whole model, on the meta device.
            file_type: Of its weights.

        Raises:
            UserError: llama.cpp cannot compute the model, split its texts or render its prompts.

        """
        self._source, self._type = source, file_type
        where = str(source.weights)
        self.planned = gguf_file.plan(source.weights, model, file_type, where=where)
        self._template = portable_template.build(source.model, source.renderer)
        vocabulary = gguf_vocabulary.build(
            source.tokenizer,
            int(model.get_input_embeddings().weight.shape[0]),
            source.list_stop_ids(),
            adds_bos=source.adds_bos(),
            where=where,
        )
        texts = pre_tokenizers.ComparedTexts(
            prompts=[*source.collect_rows(), *map(source.render_prompt, pre_tokenizers.PROBES)],
            plain=source.collect_contents(),
        )
        self._vocabulary, self._name, self._comparison = pre_tokenizers.choose(
            vocabulary, source.tokenizer, texts, name=source.name, where=where
        )

    @property
    def file_name(self) -> str:
        """The name of the file."""
        return f"{self._source.name}-{self._type}.gguf"

    @property
    def context_length(self) -> int:
        """How many tokens llama.cpp computes as the model does."""
        return int(self.planned.parameters["context_length"])

    def write(self, weights: Path, folder: Path, read: Callable[[str], torch.Tensor] | None = None) -> dict[str, Any]:
        """Write the file.

        Args:
            weights: The folder of the whole model, merged where it was an adapter.
            folder: Where the file goes; it is made.
            read: Returns a tensor of the model in more digits than the folder has; None = that of the folder.

        Returns:
            The entry of export.json, without files and proof.

        Raises:
            RecipeError: A weight cannot be written in the type.

        """
        folder.mkdir()
        model = base_tensors.load_on_meta(weights)
        self.planned = gguf_file.plan(weights, model, self._type, where=str(weights))  # merging can untie the head
        path = folder / self.file_name
        gguf_file.write(self.planned, self._vocabulary, path, metadata=self._describe_model(), read=read)
        return {
            "path": f"{folder.name}/{path.name}",
            "type": self._type,
            "architecture": self.planned.architecture.name,
            "context_length": self.context_length,
            "positions": int(self.planned.config.max_position_embeddings),
            "tensors": self.planned.count_types(),
            "tokenizer": {
                "kind": self._vocabulary.kind,
                **self._comparison.describe(),
                "adds_bos": self._vocabulary.adds_bos,
                "special_ids": self._vocabulary.special_ids,
            },
        }

    def _describe_model(self) -> dict[str, Any]:
        """Return the general metadata and the chat template."""
        values: dict[str, Any] = {
            "general.type": "model",
            "general.name": self._name,
            "trl_sft.version": __version__,
            "tokenizer.chat_template": self._template,
        }
        if base := self._source.model.base:
            values |= {"general.base_model.count": 1, "general.base_model.0.name": Path(base).name}
        return values
