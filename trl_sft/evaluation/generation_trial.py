"""Tries the generation settings of a recipe on a model of one layer, before a run touches any file.

Input: `evaluate.generation` of the recipe, the tokenizer. Output: nothing, or a fault. transformers refuses many
settings only when it generates, which would be after an earlier run was replaced, or after the last step. Not here:
settings that only a certain architecture refuses.
"""

from __future__ import annotations

import copy

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from trl_sft.errors import Fault, RecipeError, first_line
from trl_sft.recipe.checked import Run

_NEW_TOKENS = 2  # of the trial's answers
_PROMPT_TOKENS = 3


def check_settings(run: Run, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, num_embeddings: int) -> None:
    """Refuse generation settings with which transformers cannot generate.

    Args:
        run: the checked recipe.
        tokenizer: has the tokens that stop and pad an answer.
        batch_size: prompts that are answered at once; some settings take one prompt only.
        num_embeddings: rows of the model's embedding: settings may name tokens by number.

    Raises:
        RecipeError: the message of transformers, at `evaluate.generation`.

    """
    generation = (run.evaluate or {}).get("generation")
    if not generation:
        return
    defaults = {"do_sample": False, "max_new_tokens": _NEW_TOKENS}
    defaults |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            config = GenerationConfig(**defaults | copy.deepcopy(generation))
            if type(config.max_new_tokens) is int and config.max_new_tokens > _NEW_TOKENS:
                config.max_new_tokens = _NEW_TOKENS
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=num_embeddings,
                    hidden_size=8,
                    intermediate_size=8,
                    num_hidden_layers=1,
                    num_attention_heads=1,
                )
            ).eval()
            prompts = torch.zeros((min(batch_size, 2), _PROMPT_TOKENS), dtype=torch.long)
            model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), generation_config=config)
        except Exception as error:
            raise RecipeError(_explain(run, error)) from error


def _explain(run: Run, error: Exception) -> Fault:
    """Return the fault of what transformers refused, at the key that its message names."""
    text = f"{type(error).__name__}: {first_line(error)}"
    names = [name for name in run.evaluate["generation"] if name in str(error)] if run.evaluate else []
    if not names and run.evaluate and len(run.evaluate["generation"]) == 1:
        names = list(run.evaluate["generation"])
    where = run.recipe.where(("evaluate", "generation", *names[:1]))
    problem = f"transformers cannot generate with these settings: {text}"
    return Fault(where, problem, "Set another value, or remove the key.", code="recipe.refused_by_library")
