"""What is exported: the weights of a run, and the settings that its answers need.

Inputs: the folder of a run or of a model, maybe a step. Outputs: an `ExportSource`, or a refusal. Needs no torch before
its tokenizer is loaded. Deliberately not here: writing (`exporter`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trl_sft import run_folder
from trl_sft.data.formats import CHAT
from trl_sft.errors import Fault, RecipeError
from trl_sft.serving import model_folder, trained_adapter
from trl_sft.serving.model_folder import ModelFolder
from trl_sft.serving.trained_adapter import TrainedAdapter

_GENERATION = "generation_config.json"
_TEXTS = 50  # rows and answers of the run whose tokens are compared


@dataclass(frozen=True)
class ExportSource:
    """A model that is exported.

    Attributes:
        model: the folder, as `chat` reads it.
        adapter: the adapter that is merged; None = the folder holds all weights.

    """

    model: ModelFolder
    adapter: TrainedAdapter | None

    @property
    def name(self) -> str:
        """The name of the model in files: that of the run folder, without spaces and signs."""
        step = f"-step-{self.model.step}" if self.model.step is not None else ""
        return re.sub(r"[^\w.-]+", "-", self.model.folder.resolve().name).strip("-.") + step

    @property
    def weights(self) -> Path:
        """The folder of the weights, or of the adapter."""
        return self.adapter.folder if self.adapter is not None else self.model.weights

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the run. Raises TemplateError."""
        from trl_sft.serving import model_loading  # noqa: PLC0415 (imports torch)

        return model_loading.load_tokenizer(self.model, trusts_code=False)

    @cached_property
    def renderer(self) -> Any:
        """What renders the prompts of the run. Raises TemplateError."""
        from trl_sft.serving import prompts  # noqa: PLC0415 (imports torch)

        return prompts.build_renderer(self.model, self.tokenizer)

    def list_stop_ids(self) -> list[int]:
        """Return the ids of the tokens that end an answer; the one that ends a turn comes first."""
        from trl_sft.tokenization import turn_markers  # noqa: PLC0415 (imports torch)

        ids = []
        kwargs = self.model.inference.get("chat_template_kwargs", {})
        if self.renderer.row_type == CHAT:
            token = turn_markers.find_stop_token(self.tokenizer, kwargs)
            ids += [self.tokenizer.convert_tokens_to_ids(token)] if token else []
        folder = self.model.find_first(_GENERATION)
        recorded = run_folder.read_json(folder / _GENERATION).get("eos_token_id") if folder is not None else None
        ids += recorded if isinstance(recorded, list) else [recorded]
        ids.append(self.tokenizer.eos_token_id)
        return [number for number in dict.fromkeys(ids) if isinstance(number, int)]

    def adds_bos(self) -> bool:
        """Tell whether llama.cpp and Ollama put the BOS token before a prompt: the tokenizer does, and prompts have it.

        A prompt that begins with it by the template alone (SmolLM2, whose BOS token opens each turn) keeps it as text.
        """
        bos = self.tokenizer.bos_token_id
        if bos is None or self.tokenizer("Hello")["input_ids"][:1] != [bos]:
            return False
        return bool(self.renderer.render("Hello").ids[:1] == [bos])

    def collect_prompts(self) -> list[list[dict[str, str]]]:
        """Return the held-out prompts of the run as messages of texts; those with tools or images are left out."""
        prompts = []
        for line in run_folder.read_first_lines(self.model.folder / run_folder.SAMPLES, _TEXTS):
            prompt = line.get("prompt")
            if isinstance(prompt, list) and prompt and all(_is_text_turn(turn) for turn in prompt):
                prompts.append([{"role": turn["role"], "content": turn["content"]} for turn in prompt])
        return prompts

    def render_prompt(self, text: str) -> str:
        """Return the prompt of one user's turn, as the run renders it. Raises an error of the template's own code."""
        if self.renderer.row_type != CHAT:
            return str(self.tokenizer.decode(self.renderer.render(text).ids))
        kwargs = self.model.inference.get("chat_template_kwargs", {})
        chat = [{"role": "user", "content": text}]
        return str(self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **kwargs))

    def collect_rows(self) -> list[str]:
        """Return the first rows of the run, as training renders them."""
        rows = run_folder.read_first_lines(self.model.folder / run_folder.ROWS, _TEXTS)
        texts = ("".join(str(segment[0]) for segment in row.get("segments") or ()) for row in rows)
        return [text for text in dict.fromkeys(texts) if text]

    def collect_contents(self) -> list[str]:
        """Return what stands in the turns of the held-out prompts of the run, and its answers."""
        texts = []
        for line in run_folder.read_first_lines(self.model.folder / run_folder.SAMPLES, _TEXTS):
            prompt = line.get("prompt")
            turns = prompt if isinstance(prompt, list) else [{"content": prompt}]
            contents = [turn.get("content") for turn in turns if isinstance(turn, dict)]
            texts += [text for text in (*contents, line.get("after")) if isinstance(text, str) and text]
        return list(dict.fromkeys(texts))


def find_source(folder: Path, step: int | None) -> ExportSource:
    """Return what a folder holds.

    Args:
        folder: Of a run or of a model.
        step: Of a checkpoint; None = the weights at the end.

    Raises:
        RecipeError: There is no model, the run is not finished, or its base model is gone or another one.

    """
    model = model_folder.find_model(folder, step)
    if model.is_adapter:
        return ExportSource(model, trained_adapter.find_adapter(folder, "" if step is None else str(step)))
    config = run_folder.read_json(model.weights / "config.json")
    if "quantization_config" in config:
        problem = "the weights are saved quantized, and other formats are written from weights that are not"
        fix = "Export a run or a model whose weights are not quantized."
        raise RecipeError(Fault(str(model.weights), problem, fix, code="export.unsupported_architecture"))
    if "auto_map" in config:
        problem = "the model comes with its own Python code, which this command does not run"
        fix = "Use the tools of the model's author."
        raise RecipeError(Fault(str(model.weights), problem, fix, code="export.unsupported_architecture"))
    return ExportSource(model, None)


def _is_text_turn(turn: Any) -> bool:
    """Tell whether a turn has a role of a chat and a text, and nothing else."""
    if not isinstance(turn, dict) or set(turn) != {"role", "content"} or not isinstance(turn["content"], str):
        return False
    return turn["role"] in ("system", "user", "assistant")
