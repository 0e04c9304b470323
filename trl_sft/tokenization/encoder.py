"""The encoder: a tokenizer, its chat template and the settings of one pass over rows.

Inputs: `EncodingSettings` and a tokenizer. Outputs: an `Encoder`, which `render` and `encode` use for every row. Not
here: rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from trl_sft.data.formats import CHAT
from trl_sft.data.messages import MARK, Message
from trl_sft.tokenization import loss_mask, prompt_tokens, thinking
from trl_sft.tokenization.loss_mask import ChatTemplate, TokenMarks
from trl_sft.tokenization.prompt_tokens import PromptTokenizer
from trl_sft.tokenization.text_beginning import TextCutter
from trl_sft.tokenization.thinking import ThoughtMarks


@dataclass(frozen=True)
class EncodingSettings:
    """How rows become tokens and labels; part of the key of the cache.

    Attributes:
        row_type: CHAT, PAIRS or TEXT of `data.rows`.
        loss_on: which tokens carry loss: completion, assistant, last_turn or all.
        eos_token: the token that ends a text.
        max_length: the most tokens of a row; None = no row is truncated here.
        overlong: what happens to longer rows: truncate, drop, truncate_and_end or error.
        keep_end: whether truncation keeps the end of a row in place of its beginning.
        allow_prompt_mismatch: whether `run.allow` has `prompt_mismatch`.
        allow_template_markers: whether `run.allow` has `template_markers`.
        skip_empty_thoughts: whether an empty thought at the beginning of an answer carries no loss.

    """

    row_type: str
    loss_on: str
    eos_token: str
    max_length: int | None
    overlong: str = "truncate"
    keep_end: bool = False
    allow_prompt_mismatch: bool = False
    allow_template_markers: bool = False
    skip_empty_thoughts: bool = False


@dataclass(frozen=True)
class Encoder:
    """A tokenizer that is ready to encode rows.

    Attributes:
        settings: how rows become tokens and labels.
        tokenizer: the tokenizer of the run.
        template_kwargs: what the chat template gets beside messages and tools.
        template: the chat template; None = rows are no chats.
        backend: the fast tokenizer; None = the tokenizer is slow.
        escaped_tokens: id of an escaped special token -> the ids of its characters.
        prompts: tokenizes prompts as inference does.
        thoughts: what the template writes around thoughts; None = it has none, or rows are no chats.
        marks: the tokens that the template writes before and after answers; None = masks need offsets.
        search_errors: chats in which the search for answers failed the check; after the first one every chat is
            rendered in parts.
        advised: the codes of faults for whose rows another template was tried.
        cutters: empty, or the cutter of long texts, which is made when a row needs it.

    """

    settings: EncodingSettings
    tokenizer: PreTrainedTokenizerBase
    template_kwargs: dict[str, Any]
    template: ChatTemplate | None
    backend: Tokenizer | None
    escaped_tokens: dict[int, list[int]]
    prompts: PromptTokenizer
    thoughts: ThoughtMarks | None
    marks: TokenMarks | None
    search_errors: list[str] = field(default_factory=list)
    advised: list[str] = field(default_factory=list)
    cutters: list[TextCutter] = field(default_factory=list)


def build_encoder(
    settings: EncodingSettings,
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: dict[str, Any],
    *,
    escaped: Sequence[str] = (),
) -> Encoder:
    """Return the encoder of a run.

    Args:
        settings: how rows become tokens and labels.
        tokenizer: the tokenizer of the run, with its chat template.
        template_kwargs: what the chat template gets beside messages and tools.
        escaped: special tokens that rows may hold as plain text.

    """
    template = thoughts = None
    if settings.row_type == CHAT:
        template = loss_mask.inspect_template(tokenizer, template_kwargs, settings.allow_prompt_mismatch)
        thoughts = thinking.find_thought_marks(tokenizer, template_kwargs)
        if thoughts is not None:
            template = _keep_one_thought(template, thoughts)
    backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
    escaped_tokens: dict[int, list[int]] = {}
    if backend is not None:
        backend = Tokenizer.from_str(backend.to_str()) if escaped else backend
        backend.no_truncation()
        backend.no_padding()
    if escaped and backend is not None:
        escaped_tokens = _add_escaped_tokens(backend, escaped)
    marks = loss_mask.find_token_marks(template, backend) if template is not None and backend is not None else None
    prompts = prompt_tokens.build_prompt_tokenizer(
        tokenizer,
        backend,
        add_special_tokens=settings.row_type != CHAT,  # a template writes its own first token
    )
    return Encoder(settings, tokenizer, template_kwargs, template, backend, escaped_tokens, prompts, thoughts, marks)


def _keep_one_thought(template: ChatTemplate, thoughts: ThoughtMarks) -> ChatTemplate:
    """Return a template that writes no empty thought before a thought of a row."""
    render = template.render

    def render_one(messages: Sequence[Message], tools: Sequence[Any] | None, add_generation_prompt: bool) -> str:
        return thoughts.keep_one(render(messages, tools, add_generation_prompt))

    return dataclasses.replace(template, render=render_one)


def _add_escaped_tokens(backend: Tokenizer, strings: Sequence[str]) -> dict[int, list[int]]:
    """Make each escaped special token one token of `backend`; return id -> the ids of its characters."""
    newline = backend.encode("\n", add_special_tokens=False).ids
    backend.encode_special_tokens = True
    # after a newline, since some tokenizers put a space before what begins a text
    encodings = [backend.encode("\n" + string, add_special_tokens=False).ids for string in strings]
    backend.encode_special_tokens = False
    characters = [ids[len(newline) :] if ids[: len(newline)] == newline else ids for ids in encodings]
    escaped = [MARK + string for string in strings]
    backend.add_special_tokens([AddedToken(string, special=True, normalized=False) for string in escaped])
    numbers = [backend.token_to_id(string) for string in escaped]
    return {number: ids for number, ids in zip(numbers, characters, strict=True) if number}
