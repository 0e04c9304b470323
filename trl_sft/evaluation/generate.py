"""Generation of answers to prompts: in batches, greedy unless `evaluate.generation` sets another decoding.

In: a live model, its tokenizer, token ids of prompts. Out: texts, and whether the model ended them. Deliberately
absent: the choice of prompts (`before_after`) and the metrics (`metrics`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTTrainer

from trl_sft.console import shows_progress
from trl_sft.model import positions

MAX_NEW_TOKENS = 256  # of an answer, unless the longest reference is shorter or the recipe says otherwise
STOP_TOKEN, LIMIT, CONTEXT = "stop_token", "max_new_tokens", "context"  # why an answer ended
_MARGIN = 8  # tokens beyond the longest reference, so that an answer that does not stop becomes visible


class GeneratedTokens(NamedTuple):
    """The tokens that a model wrote after one prompt."""

    number: int  # of the prompt
    tokens: list[int]  # (tokens,), with the one that ended it
    stop: str  # STOP_TOKEN, LIMIT or CONTEXT


class GeneratedAnswer(NamedTuple):
    """The answer to one prompt."""

    text: str
    stopped: bool | None  # whether the model ended it; None = the positions of the model did, before the limit


def answer_prompts(
    trainer: SFTTrainer, prompt_ids: Sequence[list[int]], config: GenerationConfig, *, label: str
) -> list[GeneratedAnswer]:
    """Return the live model's answers, in the order of the prompts.

    A model with a table of positions (GPT-2) stops an answer at its last position; a prompt that fills the table has
    the answer "".

    Args:
        trainer: holds the model, its tokenizer and the batch size of an evaluation.
        prompt_ids: token ids, one list a prompt.
        config: how to decode.
        label: what the progress bar says of the model.
    """
    if not prompt_ids:
        return []
    model, tokenizer = trainer.model, trainer.processing_class
    answers = [GeneratedAnswer("", None)] * len(prompt_ids)
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(prompt_ids), desc=f"answers {label}", unit="prompt", disable=not shows_progress(), leave=False)
    try:
        with trainer.autocast_smart_context_manager():
            for batch in generate_batches(
                model, tokenizer, prompt_ids, config=config, batch_size=trainer.args.per_device_eval_batch_size
            ):
                for index, tokens, stop in batch:
                    text = tokenizer.decode(tokens, skip_special_tokens=True)
                    answers[index] = GeneratedAnswer(text, None if stop == CONTEXT else stop == STOP_TOKEN)
                bar.update(len(batch))
    finally:
        bar.close()
        model.train(was_training)
    return answers


def generate_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    *,
    config: GenerationConfig,
    batch_size: int,
    seeds: Sequence[int] | None = None,
) -> Iterator[list[GeneratedTokens]]:
    """Yield the answers of each batch, longest prompts first, padded on the left.

    Args:
        model: in eval mode.
        tokenizer: has the token for padding.
        prompt_ids: token ids, one list a prompt.
        config: how to decode.
        batch_size: prompts that are answered at once.
        seeds: one of each prompt, for sampled answers; prompts are then answered one at a time, so that an answer does
            not depend on the others. None = torch's random state is used as it is.

    """
    # longest prompts first: an out-of-memory error comes at once, and a batch needs little padding
    order = sorted(range(len(prompt_ids)), key=lambda index: -len(prompt_ids[index]))
    size = 1 if seeds is not None else batch_size
    limit = positions.read_limit(model.config)
    table = None if limit is None else positions.find_table(model, limit)
    end_tokens = config.eos_token_id if config.eos_token_id is not None else model.generation_config.eos_token_id
    stops = set(end_tokens) if isinstance(end_tokens, list) else {end_tokens}
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        input_ids, mask = pad_left([list(prompt_ids[i]) for i in batch], tokenizer.pad_token_id, model.device)
        batch_config = _fit_positions(config, width=input_ids.shape[1], table=table)
        if batch_config is None:
            yield [GeneratedTokens(index, [], CONTEXT) for index in batch]
            continue
        if seeds is not None:
            torch.manual_seed(seeds[batch[0]])
        with torch.no_grad():
            output = model.generate(input_ids=input_ids, attention_mask=mask, generation_config=batch_config)
        is_short = batch_config is not config
        yield [
            _read_answer(index, tokens, stops, limit=batch_config.max_new_tokens or 0, is_short=is_short)
            for index, tokens in zip(batch, output[:, input_ids.shape[1] :].tolist(), strict=True)
        ]


def _read_answer(index: int, tokens: list[int], stops: set[Any], *, limit: int, is_short: bool) -> GeneratedTokens:
    """Return an answer without the padding after its stop token, and why it ended."""
    end = next((place for place, token in enumerate(tokens, 1) if token in stops), None)
    if end is not None or len(tokens) < limit:
        return GeneratedTokens(index, tokens[:end], STOP_TOKEN)
    return GeneratedTokens(index, tokens, CONTEXT if is_short else LIMIT)


def _fit_positions(config: GenerationConfig, *, width: int, table: int | None) -> GenerationConfig | None:
    """Return a config whose answers end with the positions of the model; None = a prompt leaves no position.

    Args:
        config: how to decode.
        width: the tokens of the longest prompt.
        table: the number of positions; None = they have no end.

    """
    if table is None or width + (config.max_new_tokens or table) <= table:
        return config
    if width >= table:
        return None
    shorter = copy.deepcopy(config)
    shorter.max_new_tokens = table - width
    return shorter


def build_generation_config(
    trainer: SFTTrainer, references: Sequence[str], generation: Mapping[str, Any]
) -> GenerationConfig:
    """Return a generation config: greedy search with the stop tokens of the model.

    Args:
        trainer: holds the model and its tokenizer.
        references: the expected answers; the longest limits the length of an answer; empty = 256 tokens do.
        generation: `evaluate.generation` of the recipe; its keys win.
    """
    tokenizer = trainer.processing_class
    limit = choose_limit(tokenizer, references)
    return choose_generation(trainer.model.generation_config, tokenizer, max_new_tokens=limit, generation=generation)


def choose_limit(tokenizer: PreTrainedTokenizerBase, references: Sequence[str]) -> int:
    """Return the most tokens of an answer: eight more than the longest reference has, and at most 256."""
    longest = max((len(tokenizer(reference)["input_ids"]) for reference in references), default=MAX_NEW_TOKENS)
    return min(longest + _MARGIN, MAX_NEW_TOKENS)


def choose_generation(
    own: GenerationConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    generation: Mapping[str, Any],
) -> GenerationConfig:
    """Return the generation config of all answers, in a run and in a chat: greedy search, the model's stop tokens.

    Args:
        own: the generation config of the model, for its stop tokens.
        tokenizer: has the token for padding.
        max_new_tokens: the most tokens of an answer.
        generation: `evaluate.generation` of the recipe; its keys win.

    """
    defaults = {
        "do_sample": False,
        "max_new_tokens": max_new_tokens,
        "eos_token_id": own.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return GenerationConfig(**defaults | dict(generation))


def pad_left(rows: Sequence[list[int]], pad_token_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return input_ids and attention_mask, each (rows, tokens), padded on the left as generation needs it."""
    longest = max(map(len, rows))
    input_ids = [[pad_token_id] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(input_ids, device=device), torch.tensor(mask, device=device)
