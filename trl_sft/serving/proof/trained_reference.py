"""The trained model as the reference of a proof: its greedy answers, the distribution of each token, its base.

Inputs: the folder of a run. Outputs: a `TrainedReference`, which holds no model. The model computes in float32, so that
a difference is one of the exported weights. One model is in memory at a time. Not here: exported models.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from trl_sft.console import format_bytes
from trl_sft.data.formats import CHAT
from trl_sft.errors import Fault, RecipeError, UserError
from trl_sft.evaluation.generate import pad_left
from trl_sft.model import positions
from trl_sft.row_progress import RowProgress
from trl_sft.serving import base_folder, base_tensors, merge_proof, model_loading
from trl_sft.serving.model_folder import ModelFolder
from trl_sft.serving.prompts import build_renderer
from trl_sft.serving.proof import run_prompts
from trl_sft.serving.proof.answer_comparison import AnswerComparison, AnswerSummary, TrainedAnswer, compare_logits
from trl_sft.serving.proof.run_prompts import ProofPrompt, RunPrompts
from trl_sft.tokenization import template_date, turn_markers

MOST_ANSWER_TOKENS, _LEAST_ANSWER_TOKENS = 32, 4
MOST_PROMPT_TOKENS = 2048  # a longer prompt is rendered and compared, and not answered
_MEMORY = 2**29  # bytes of all distributions
_MEMORY_FACTOR = 1.25  # of the weights: what loading and computing need beside them
_BATCH = 16
FULL, ADAPTER, ADAPTER_UNQUANTIZED = "full", "adapter", "adapter on the base that is not quantized"


@dataclass(frozen=True)
class TrainedReference:
    """What exported models are compared with.

    Attributes:
        source: the folder of the trained model.
        tokenizer: of the trained model.
        kind: FULL, ADAPTER or ADAPTER_UNQUANTIZED.
        prompts: all prompts.
        answers: to the prompts that are short enough.
        answer_tokens: the most tokens of an answer.
        stop_tokens: the tokens that end an answer.
        stop_token: the one that training teaches.
        bos_token: the token that begins a text; None = the tokenizer has none.
        base: the base model's distance, for each answer; None = there is no base model to compare with.
        template_kwargs: what the run hands to the chat template.
        notes: what could not be had, as sentences without a full stop.

    """

    source: ModelFolder
    tokenizer: PreTrainedTokenizerBase
    kind: str
    prompts: RunPrompts
    answers: list[TrainedAnswer]
    answer_tokens: int
    stop_tokens: set[int]
    stop_token: int | None
    bos_token: int | None
    base: AnswerSummary | None
    template_kwargs: dict[str, Any]
    notes: list[str]


def measure(source: ModelFolder, *, is_quantized_base: bool = False, trusts_code: bool = False) -> TrainedReference:
    """Let the trained model and its base answer the prompts of the run.

    Args:
        source: the folder of the run, or of a model.
        is_quantized_base: whether the adapter was merged into the dequantized weights of its training.
        trusts_code: whether Python code that a model brings may run.

    Raises:
        UserError: the model or its tokenizer cannot be loaded, or the memory does not hold it in float32.

    """
    tokenizer = model_loading.load_tokenizer(source, trusts_code=trusts_code)
    with pinned_date(source):
        prompts = run_prompts.collect(source, build_renderer(source, tokenizer))
    plain = _set_float32(source, keeps_quantization=is_quantized_base)
    check_memory(source)
    model = model_loading.load_model(plain, tokenizer, trusts_code=trusts_code)
    stops = _list_stop_tokens(model, tokenizer)
    answered = _choose_answered(prompts.prompts, model)
    limit = _limit_answers(len(answered), model)
    answers = _answer(model, tokenizer, answered, limit=limit, stops=sorted(stops))
    notes = list(prompts.notes)
    if missing := len(prompts.prompts) - len(answered):
        notes.append(f"{missing} prompts are too long to be answered here; only their tokens are compared")
    base: AnswerSummary | None = None
    if source.is_adapter:
        with model.disable_adapter():
            base, answers = _measure_base(model, answers)
    del model
    gc.collect()
    if not source.is_adapter:
        base, answers = _load_and_measure_base(plain, tokenizer, answers, notes=notes, trusts_code=trusts_code)
    return TrainedReference(
        source=source,
        tokenizer=tokenizer,
        kind=_name_kind(source, is_quantized_base=is_quantized_base),
        prompts=prompts,
        answers=answers,
        answer_tokens=limit,
        stop_tokens=stops,
        stop_token=_find_stop_token(source, tokenizer),
        bos_token=tokenizer.bos_token_id,
        base=base,
        template_kwargs=dict(source.inference.get("chat_template_kwargs", {})),
        notes=notes,
    )


def check_memory(source: ModelFolder) -> None:
    """Refuse a model that the memory does not hold in float32, in which it is compared. Raises RecipeError."""
    keywords = source.inference.get("model", {})
    folder = base_folder.find_folder(source.base, keywords) if source.is_adapter else source.weights
    parameters = base_tensors.load_on_meta(folder).parameters()
    needed = int(sum(parameter.numel() for parameter in parameters) * 4 * _MEMORY_FACTOR) + _MEMORY
    available = merge_proof.read_available_memory()
    if torch.cuda.is_available():
        available = torch.cuda.mem_get_info()[0]
    if available is not None and needed > available:
        problem = f"the proof needs {format_bytes(needed)} of memory (the model in float32), and "
        problem += f"{format_bytes(available)} are free"
        fix = "Export on a machine with more memory, or free some of it."
        raise RecipeError(Fault(str(source.folder), problem, fix, code="proof.memory_too_small"))


def _name_kind(source: ModelFolder, *, is_quantized_base: bool) -> str:
    """Return what the reference is: FULL, ADAPTER or ADAPTER_UNQUANTIZED."""
    if not source.is_adapter:
        return FULL
    return ADAPTER_UNQUANTIZED if source.inference.get("quantization") and not is_quantized_base else ADAPTER


@contextmanager
def pinned_date(source: ModelFolder) -> Iterator[None]:
    """Let chat templates write the day of the training inside the block: an export writes the day of its use."""
    with template_date.restored():
        if source.template_date:
            template_date.pin(datetime.date.fromisoformat(source.template_date))
        yield


@torch.no_grad()
def compute_logits(model: PreTrainedModel, ids: list[int], tokens: list[int]) -> torch.Tensor:
    """Return the logits from which a model chooses each token of an answer: (positions, vocabulary) in float32.

    Args:
        model: any causal language model.
        ids: the prompt.
        tokens: the answer.

    """
    input_ids = torch.tensor([[*ids, *tokens[:-1]]], device=model.device)
    keywords = (
        {"logits_to_keep": len(tokens)} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    )
    logits: torch.Tensor = model(input_ids=input_ids, use_cache=False, **keywords).logits
    return logits[0, -len(tokens) :].float().cpu()


def compare_model(model: PreTrainedModel, answers: list[TrainedAnswer], *, title: str) -> list[AnswerComparison]:
    """Return how far a model is from the trained one, for each answer. `title`: the words beside the progress bar."""
    comparisons = []
    with RowProgress(title, len(answers), unit="answers") as bar:
        for answer in answers:
            logits = compute_logits(model, answer.prompt.ids, answer.tokens)
            comparisons.append(compare_logits(answer, logits))
            bar.update(1)
    return comparisons


def _set_float32(source: ModelFolder, *, keeps_quantization: bool) -> ModelFolder:
    """Return the source with settings by which its model computes in float32, and quantized only on request."""
    model = {key: value for key, value in source.inference.get("model", {}).items() if key != "attn_implementation"}
    quantization = source.inference.get("quantization") if keeps_quantization else None
    inference = source.inference | {"model": model | {"dtype": "float32"}, "quantization": quantization}
    return dataclasses.replace(source, inference=inference)


def _list_stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens that end an answer of the trained model."""
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    tokens = {int(stop) for stop in stops if stop is not None}
    return tokens or ({int(tokenizer.eos_token_id)} if tokenizer.eos_token_id is not None else set())


def _find_stop_token(source: ModelFolder, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that training teaches to end an answer; None = there is none."""
    if source.inference.get("row_type", CHAT) == CHAT and tokenizer.chat_template:
        token = turn_markers.find_stop_token(tokenizer, source.inference.get("chat_template_kwargs", {}))
        if token:
            return int(tokenizer.convert_tokens_to_ids(token))
    return None if tokenizer.eos_token_id is None else int(tokenizer.eos_token_id)


def _choose_answered(prompts: list[ProofPrompt], model: PreTrainedModel) -> list[ProofPrompt]:
    """Return the prompts that are short enough to be answered."""
    limit = positions.read_limit(model.config) or math.inf
    most = min(MOST_PROMPT_TOKENS, limit - MOST_ANSWER_TOKENS)
    return [prompt for prompt in prompts if len(prompt.ids) <= most]


def _limit_answers(number: int, model: PreTrainedModel) -> int:
    """Return the most tokens of an answer: 32, and fewer where the distributions would need too much memory."""
    vocabulary: int = model.get_output_embeddings().weight.shape[0]
    fitting = _MEMORY // (4 * vocabulary * max(number, 1))
    return max(_LEAST_ANSWER_TOKENS, min(MOST_ANSWER_TOKENS, fitting))


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[ProofPrompt],
    *,
    limit: int,
    stops: list[int],
) -> list[TrainedAnswer]:
    """Return the greedy answers, with the distribution of each token. `limit`: tokens; `stops`: what ends an answer."""
    config = GenerationConfig(
        do_sample=False, max_new_tokens=limit, eos_token_id=stops or None, pad_token_id=tokenizer.pad_token_id or 0
    )
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number].ids))
    answers: dict[int, TrainedAnswer] = {}
    with RowProgress("Trained model", len(prompts), unit="answers") as bar:
        for start in range(0, len(order), _BATCH):
            batch = order[start : start + _BATCH]
            rows = [prompts[number].ids for number in batch]
            input_ids, mask = pad_left(rows, config.pad_token_id, model.device)
            with torch.no_grad():
                output = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=config)
            for number, tokens in zip(batch, output[:, input_ids.shape[1] :].tolist(), strict=True):
                answers[number] = _read_answer(model, prompts[number], tokens, stops=stops)
            bar.update(len(batch))
    return [answers[number] for number in range(len(prompts))]


def _read_answer(model: PreTrainedModel, prompt: ProofPrompt, tokens: list[int], *, stops: list[int]) -> TrainedAnswer:
    """Return an answer without what follows its end; it ends where a batch with padding chose another token."""
    end = next((n for n, token in enumerate(tokens) if token in stops), len(tokens) - 1)
    tokens = tokens[: end + 1]
    log_probs = compute_logits(model, prompt.ids, tokens).log_softmax(-1)
    choices = log_probs.argmax(-1).tolist()
    position = next((n for n, token in enumerate(tokens) if choices[n] != token), None)
    if position is None:
        return TrainedAnswer(prompt, tokens, log_probs)
    return TrainedAnswer(prompt, [*tokens[:position], choices[position]], log_probs[: position + 1])


def _measure_base(model: PreTrainedModel, answers: list[TrainedAnswer]) -> tuple[AnswerSummary, list[TrainedAnswer]]:
    """Return how far the base model is from the trained one, and the answers with its first distribution."""
    comparisons, completed = [], []
    with RowProgress("Base model", len(answers), unit="answers") as bar:
        for answer in answers:
            logits = compute_logits(model, answer.prompt.ids, answer.tokens)
            comparisons.append(compare_logits(answer, logits))
            completed.append(dataclasses.replace(answer, base_log_probs=logits[0].log_softmax(-1)))
            bar.update(1)
    return AnswerSummary(comparisons), completed


def _load_and_measure_base(
    source: ModelFolder,
    tokenizer: PreTrainedTokenizerBase,
    answers: list[TrainedAnswer],
    *,
    notes: list[str],
    trusts_code: bool,
) -> tuple[AnswerSummary | None, list[TrainedAnswer]]:
    """Measure the base model of a full run; None = it is not there, with a note."""
    try:
        model = model_loading.load_base(source, tokenizer, trusts_code=trusts_code)
    except UserError as error:
        notes.append(f"the base model is not compared: {error.faults[0].problem.rstrip('.')}")
        return None, answers
    base, answers = _measure_base(model, answers)
    del model
    gc.collect()
    return base, answers
