"""Plain transformers reads an exported model: a folder, or a GGUF file that it dequantizes.

Inputs: an `ExportedModel` and the reference. Outputs: a `ReaderOutput`. Prompts are rendered by the export's own
tokenizer and chat template, as `vllm serve` and `transformers serve` do. Not here: llama.cpp (`llama_reader`).
"""

from __future__ import annotations

import dataclasses
import gc
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from peft import AutoPeftModelForCausalLM
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from trl_sft import run_folder
from trl_sft.errors import Fault, RecipeError, first_line
from trl_sft.serving.proof.answer_comparison import AnswerSummary
from trl_sft.serving.proof.exported_model import ExportedModel
from trl_sft.serving.proof.run_prompts import ProofPrompt
from trl_sft.serving.proof.trained_reference import TrainedReference, compare_model, pinned_date

TRANSFORMERS, LLAMA_CPP = "transformers", "llama.cpp"


@dataclass(frozen=True)
class ReaderOutput:
    """What a reader made of an exported model.

    Attributes:
        reader: TRANSFORMERS or LLAMA_CPP.
        version: of the reader's package.
        ids: the tokens of each prompt, as the runtime renders it; None = the reader has no tokenizer of its own.
        problems: why a prompt could not be rendered, by its number.
        stop_tokens: what ends an answer.
        summary: the answers.
        is_runtime: whether programs that serve the export render prompts as this reader does; not so for transformers
            and a GGUF file, whose tokenizer it only approximates.
        continued: how many answers go on after the token that ends the trained model's answer.

    """

    reader: str
    version: str
    ids: list[list[int]] | None
    problems: dict[int, str]
    stop_tokens: set[int]
    summary: AnswerSummary
    is_runtime: bool = True
    continued: int = 0


def read(
    exported: ExportedModel,
    reference: TrainedReference,
    *,
    known: ReaderOutput | None = None,
    trusts_code: bool = False,
) -> ReaderOutput:
    """Load an exported model with plain transformers, and compare it with the reference.

    Args:
        exported: what was written.
        reference: the trained model.
        known: of the same weights with another template, whose answers are taken; None = the model answers.
        trusts_code: whether Python code that a model brings may run.

    Raises:
        RecipeError: transformers cannot load it.

    """
    ids, problems, stops = _render(exported, reference, trusts_code=trusts_code)
    if known is not None:
        return dataclasses.replace(known, ids=ids, problems=problems)
    model = _load(exported, trusts_code=trusts_code)
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    stops |= {int(stop) for stop in (eos if isinstance(eos, list) else [eos]) if stop is not None}
    comparisons = compare_model(model, reference.answers, title=f"Exported {exported.title}")
    del model
    gc.collect()
    return ReaderOutput(
        reader=TRANSFORMERS,
        version=transformers.__version__,
        ids=ids,
        problems=problems,
        stop_tokens=stops,
        summary=AnswerSummary(comparisons),
        is_runtime=not exported.is_gguf,
    )


def find_place(exported: ExportedModel) -> tuple[str, dict[str, Any]]:
    """Return what `from_pretrained` gets for an exported model: the folder and keywords."""
    if exported.is_gguf:
        return str(exported.path.parent), {"gguf_file": exported.path.name}
    return str(exported.path), {}


def describe_weights(exported: ExportedModel) -> dict[str, Any]:
    """Return the keywords by which a model is loaded in float32, with the weights of a GGUF file dequantized."""
    keywords = find_place(exported)[1] | {"dtype": torch.float32}
    if exported.is_gguf and hasattr(transformers, "GgufConfig"):  # since 5.23 they stay packed otherwise
        keywords["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return keywords


def _render(
    exported: ExportedModel, reference: TrainedReference, *, trusts_code: bool
) -> tuple[list[list[int]] | None, dict[int, str], set[int]]:
    """Return the tokens of each prompt by the export's tokenizer, why some have none, and its end token."""
    place, keywords = find_place(exported)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trusts_code, **keywords)
    except Exception as error:
        if exported.is_gguf:  # transformers builds the tokenizers of few GGUF files; llama.cpp has its own
            return None, {}, set()
        raise RecipeError(_explain(exported, error)) from None
    ids: list[list[int]] = []
    problems: dict[int, str] = {}
    with pinned_date(reference.source):
        for number, prompt in enumerate(reference.prompts.prompts):
            try:
                ids.append(_render_prompt(tokenizer, prompt, exported))
            except Exception as error:  # of the template's own code
                ids.append([])
                problems[number] = first_line(error)
    return ids, problems, {tokenizer.eos_token_id} - {None}


def _render_prompt(tokenizer: Any, prompt: ProofPrompt, exported: ExportedModel) -> list[int]:
    """Return the tokens of a prompt as a server renders it: chats by the template, texts with the special tokens."""
    if isinstance(prompt.content, str):
        return list(tokenizer(prompt.content, add_special_tokens=not prompt.is_rendered)["input_ids"])
    if exported.render is not None:
        return list(tokenizer(exported.render(prompt.content))["input_ids"])
    encoding = tokenizer.apply_chat_template(
        prompt.content,
        tools=prompt.tools,
        add_generation_prompt=True,
        return_dict=True,
        **exported.template_kwargs,
    )
    return list(encoding["input_ids"])


def _load(exported: ExportedModel, *, trusts_code: bool) -> PreTrainedModel:
    """Return the exported model in float32. Raises RecipeError if transformers cannot load it, or not all of it."""
    place, keywords = find_place(exported)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if (exported.path / run_folder.ADAPTER_CONFIG).is_file():
        return _load_adapter(exported).to(accelerator or "cpu").eval()
    try:
        config = AutoConfig.from_pretrained(place, trust_remote_code=trusts_code, **keywords)
        named = getattr(transformers, (config.architectures or [""])[0], None)
        model_class = AutoModelForCausalLM if exported.is_gguf or named is None else named
        model, report = model_class.from_pretrained(
            place, output_loading_info=True, trust_remote_code=trusts_code, **describe_weights(exported)
        )
    except Exception as error:
        raise RecipeError(_explain(exported, error)) from None
    if unread := [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]:
        raise RecipeError(_explain(exported, ValueError(f"it does not hold the weights as they are: {unread[0]}")))
    return model.to(accelerator or "cpu").eval()


def _load_adapter(exported: ExportedModel) -> PreTrainedModel:
    """Return the base model with an exported adapter, in float32. Raises RecipeError if peft cannot load it."""
    try:
        model = AutoPeftModelForCausalLM.from_pretrained(str(exported.path), dtype=torch.float32)
        if (exported.path / "generation_config.json").is_file():  # the command of the export names this folder for it
            model.generation_config = GenerationConfig.from_pretrained(exported.path)
    except Exception as error:
        raise RecipeError(_explain(exported, error)) from None
    return cast("PreTrainedModel", model)


def _explain(exported: ExportedModel, error: Exception) -> Fault:
    """Return the fault of an exported model that transformers cannot load."""
    fix = "Serve the run itself with `chat` or `serve`, and report this with the versions in run.json."
    problem = f"transformers cannot load the export: {first_line(error)}"
    return Fault(exported.title, problem, fix, code="proof.unreadable_export")
