"""The commands that fit a finished run: chat, merge, export, serve, and the request that a server answers.

Inputs: the folder of a run, its kind and its architecture. Outputs: titles and words, for the last screen and the model
card. Deliberately not here: running them (`trl_sft.cli`).
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, NamedTuple

COMPLETIONS = "/v1/chat/completions"
DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000  # of `serve`
DEFAULT_PROMPT = "Hello"
# what `serving.export.gguf_architectures` writes; tests/serving/test_next_commands.py holds both equal
GGUF_ARCHITECTURES = (
    *("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM"),
    *("Gemma2ForCausalLM", "Gemma3ForCausalLM", "PhiForCausalLM", "Phi3ForCausalLM"),
)


class NextCommand(NamedTuple):
    """A command for a finished run."""

    title: str  # what it does
    words: tuple[str, ...]  # after `python -m trl_sft`, the folder among them


def list_next_commands(folder: str, *, is_adapter: bool, architecture: str) -> list[NextCommand]:
    """Return the commands that fit a run, in the order in which they are used.

    Args:
        folder: Of the run, as the reader names it.
        is_adapter: Whether the run trained an adapter.
        architecture: The class of the model; "" = unknown.

    """
    chat = NextCommand("talk to the model", ("chat", folder))
    merge = NextCommand("merge the adapter into its base model", ("merge", folder, "-o", f"{folder}-merged"))
    export = NextCommand("export it to vLLM", ("export", folder, "--to", "vllm"))
    if architecture in GGUF_ARCHITECTURES:
        export = NextCommand("export it to llama.cpp", ("export", folder, "--to", "gguf"))
    serve = NextCommand("serve it, and ask from another terminal", ("serve", folder))
    return [chat, *([merge] if is_adapter else []), export, serve]


def build_request(model: str, prompt: str = DEFAULT_PROMPT) -> dict[str, Any]:
    """Return the body of a request with one prompt. `model`: the name of the served model."""
    return {"model": model, "messages": [{"role": "user", "content": prompt}]}


def choose_model_name(folder: Path, step: int | None = None) -> str:
    """Return the name by which a folder is served. `step`: of a checkpoint; None = the weights at the end."""
    name = folder.resolve().name or "model"
    return name if step is None else f"{name}@{step}"


def format_curl(body: dict[str, Any], url: str = f"http://{DEFAULT_HOST}:{DEFAULT_PORT}") -> str:
    """Return the command line that sends a request. `url`: of the server."""
    data = shlex.quote(json.dumps(body, ensure_ascii=False))
    return f"curl {url}{COMPLETIONS} -H 'Content-Type: application/json' -d {data}"
