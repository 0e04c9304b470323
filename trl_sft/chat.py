"""The tokenizer of a run and its chat template: loaded and checked, before rows and weights.

In: a `Run` and the folders or ids to look in. Out: the tokenizer that is trained with and saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from trl_sft.errors import Fault, TemplateError, first_line
from trl_sft.run import Run

_RENDERED = 200  # rows tried against the template before the weights load
_SHARED = ("cache_dir", "force_download", "local_files_only", "revision", "token", "trust_remote_code")


def load(run: Run, names: Sequence[str], num_embeddings: int) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the first of `names` (an adapter, its base) that has one. Raises TemplateError.

    `num_embeddings` is how many tokens the model knows; a tokenizer that makes more would index past them.
    """
    where = run.recipe.where(("model", "name_or_path"))
    keywords: dict[str, Any] = {name: run.model[name] for name in _SHARED if name in run.model} | run.tokenizer
    errors: list[str] = []
    for name in names:
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **keywords)
            break
        except Exception as error:
            errors.append(first_line(error))
    else:
        write = "a folder into which the tokenizer was saved too (tokenizer.save_pretrained)"
        raise TemplateError(Fault(where, f"{names[-1]}: no tokenizer can be loaded: {errors[-1]}", write))
    if tokenizer.eos_token is None and run.train.get("eos_token") is None:
        found = f"the tokenizer of {names[-1]} has no end token, so the model would never learn to stop"
        raise TemplateError(Fault(where, found, "tokenizer.eos_token: the token that ends a text"))
    if len(tokenizer) > num_embeddings:
        new = ", ".join(tokenizer.convert_ids_to_tokens(list(range(num_embeddings, len(tokenizer)))[:5]))
        found = f"the tokenizer makes {len(tokenizer)} tokens, the model knows {num_embeddings}: not {new}"
        write = "tokens that it has, in tokenizer: or train.eos_token"
        raise TemplateError(Fault(run.recipe.where(("tokenizer",)), found, write))
    if tokenizer.chat_template:
        _check_renders(where, tokenizer)
    return tokenizer


def check(run: Run, tokenizer: PreTrainedTokenizerBase, train: Dataset, loss: dict[str, bool]) -> None:
    """Refuse rows that the template refuses, and a loss that it cannot place. Raises TemplateError."""
    for row in train.select(range(min(len(train), _RENDERED))):
        turns: Any = row.get("messages") or (row["prompt"] + row["completion"] if "prompt" in row else "")
        if isinstance(turns, str):
            break
        try:
            tokenizer.apply_chat_template(turns, tokenize=False)
        except Exception as error:
            found = f"the chat template refuses a row: {first_line(error)}; its roles are {[t['role'] for t in turns]}"
            write = "rows that this model's template takes"
            raise TemplateError(Fault(run.recipe.where(("data", "train")), found, write)) from None
    _check_loss(run, tokenizer, loss)


def _check_loss(run: Run, tokenizer: PreTrainedTokenizerBase, loss: dict[str, bool]) -> None:
    if not loss.get("assistant_only_loss") or has_generation_markers(tokenizer.chat_template):
        return
    try:
        get_training_chat_template(tokenizer)
    except ValueError:
        found = "rows with several assistant turns, but the chat template marks none ({% generation %})"
        write = "data.loss_on: last_turn, or all; or a template with the markers"
        raise TemplateError(Fault(run.recipe.where(("data", "loss_on")), found, write)) from None


def _check_renders(where: str, tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:
        found = f"the tokenizer's chat template does not render: {first_line(error)}"
        raise TemplateError(Fault(where, found, "a model whose template renders a user and an assistant")) from None
