"""The Modelfile of an export for Ollama.

Inputs: an `ExportSource` and its GGUF file. Outputs: a Modelfile whose template renders what the chat template of the
run renders, and which decodes as the run does. Deliberately not here: the template (`ollama_template`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from trl_sft.errors import Fault, TemplateError
from trl_sft.serving.export import go_template, ollama_template
from trl_sft.serving.export.export_source import ExportSource

FILE = "Modelfile"
_MOST_CONTEXT = 8192  # tokens that Ollama keeps memory for; its own number is 4,096 whatever the model has
# keys of GenerationConfig, by Ollama's names
_SAMPLING = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
_SAMPLING |= {"repeat_penalty": "repetition_penalty"}


class OllamaExport:
    """A Modelfile that is planned."""

    def __init__(self, source: ExportSource, *, gguf: str, context_length: int) -> None:
        """Find the template, and compare it.

        Args:
            source: What is exported.
            gguf: The GGUF file, as the Modelfile names it.
            context_length: Tokens that llama.cpp computes as the model does.

        Raises:
            TemplateError: Ollama cannot render what the run renders.

        """
        where = str(source.weights)
        tokenizer = source.tokenizer
        samples = source.collect_prompts()
        bos = str(tokenizer.bos_token) if source.adds_bos() else ""
        kwargs = source.model.inference.get("chat_template_kwargs", {})
        self.template = ollama_template.build(source.renderer, kwargs, samples, bos=bos, where=where)
        system = _find_system(samples)
        lines = [f"FROM {gguf}", f'TEMPLATE """{self.template.text}"""']
        if system:
            if '"""' in system or not all(map(go_template.is_printable, system)):
                problem = "the system prompt of the rows has characters that Ollama drops from a Modelfile"
                fix = "Leave out `ollama`, or train with a system prompt of printable characters."
                raise TemplateError(Fault(where, problem, fix, code="export.unsupported_template"))
            lines.append(f'SYSTEM """{system}"""')
        stops = tokenizer.convert_ids_to_tokens(source.list_stop_ids())
        lines += [f'PARAMETER stop "{token}"' for token in stops]
        lines.append(f"PARAMETER num_ctx {min(context_length, _MOST_CONTEXT)}")
        lines += [f"PARAMETER {name} {value}" for name, value in _list_decoding(source).items()]
        self.text = "\n".join(lines) + "\n"
        self.system = system

    def write(self, folder: Path) -> dict[str, Any]:
        """Write the Modelfile into a folder, which is made; return its entry of export.json."""
        folder.mkdir()
        (folder / FILE).write_text(self.text, encoding="utf-8", newline="\n")
        return {
            "path": f"{folder.name}/{FILE}",
            "type": "Modelfile",
            "system": self.system or None,
            "template": self.template.describe(),
        }

    def render(self, messages: list[dict[str, Any]]) -> str:
        """Return the prompt that Ollama makes of a chat."""
        return go_template.render(self.template.text, messages)


def name_model(source_name: str) -> str:
    """Return a name that `ollama create` takes: small letters, digits, `-`, `_` and `.`."""
    return re.sub(r"[^a-z0-9_.-]+", "-", source_name.lower()).strip("-._") or "model"


def _find_system(samples: list[list[dict[str, str]]]) -> str:
    """Return the system prompt that all prompts of the run begin with; "" = there is none."""
    systems = {prompt[0]["content"] if prompt[0]["role"] == "system" else "" for prompt in samples}
    return systems.pop() if len(systems) == 1 else ""


def _list_decoding(source: ExportSource) -> dict[str, Any]:
    """Return how Ollama samples so that it answers as the run does: greedily, unless `evaluate.generation` differs."""
    generation = source.model.inference.get("generation", {})
    if not generation.get("do_sample"):
        return {"temperature": 0, "repeat_penalty": generation.get("repetition_penalty", 1)}
    values = {name: generation.get(key) for name, key in _SAMPLING.items()}
    return {"repeat_penalty": 1} | {name: value for name, value in values.items() if value is not None}
