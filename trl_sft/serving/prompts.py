"""Prompts of a chat become the tokens that training renders for the same prompt.

Inputs: a tokenizer and what run.json records. Outputs: messages or a text, and token ids. Formatting is
`data.prompts.format_prompt` and rendering is `encode.encode_prompt`, as for `evaluate.prompts`. Not here: answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from trl_sft import errors
from trl_sft.data import messages
from trl_sft.data import prompts as data_prompts
from trl_sft.data.formats import CHAT, PAIRS, TEXT, TokenizerFeatures
from trl_sft.data.messages import FormatError
from trl_sft.data.source_format import SourceFormat
from trl_sft.errors import DataError, Fault, TemplateError
from trl_sft.serving.model_folder import ModelFolder
from trl_sft.tokenization import chat_template, encode, special_tokens
from trl_sft.tokenization.encoder import Encoder, EncodingSettings, build_encoder

_PLACE = "the prompt"


class RenderedPrompt(NamedTuple):
    """One prompt, ready for generation."""

    content: Any  # a text, or messages
    ids: list[int]  # (tokens,)


@dataclass(frozen=True)
class PromptRenderer:
    """Words and renders prompts as a run does.

    Attributes:
        row_type: of the run's rows: CHAT, PAIRS or TEXT.
        source_format: how its rows are worded.
        encoder: renders and tokenizes.

    """

    row_type: str
    source_format: SourceFormat
    encoder: Encoder

    @property
    def has_history(self) -> bool:
        """Whether a prompt can follow earlier answers: rows are chats."""
        return self.row_type == CHAT

    def describe(self) -> str:
        """Return how prompts are rendered, for the screen."""
        if self.row_type == CHAT:
            return "chat template of the run"
        if self.row_type == TEXT:
            return "plain text: the model continues it; each prompt stands alone"
        name = self.source_format.wording if isinstance(self.source_format.wording, str) else "of the recipe"
        return f"wording {name}; each prompt stands alone"

    def render(self, text: str, *, system: str = "", history: list[dict[str, Any]] | None = None) -> RenderedPrompt:
        """Return a prompt with its tokens.

        Args:
            text: what the user writes.
            system: the system prompt; "" = none.
            history: earlier turns of the chat, without the system prompt.

        Raises:
            DataError: the prompt cannot be used, or has a system prompt that the rows cannot have.

        """
        if system and not self.has_history:
            fix = "Write it into the prompt: `/system` needs a run whose rows are chats."
            raise DataError(Fault(_PLACE, "the rows of this run have no system prompt", fix, code="chat.no_system"))
        turns = [{"role": "system", "content": system}, {"role": "user", "content": text}]
        item: Any = {"messages": turns} if system else text
        try:
            formatted = data_prompts.format_prompt(item, self.source_format, row_type=self.row_type, place=_PLACE)
        except FormatError as error:
            raise DataError(Fault(_PLACE, error.problem, data_prompts.adapt_fix(error.fix), code=error.code)) from None
        content = formatted.content
        if isinstance(content, list) and history:
            content = [*content[:-1], *history, content[-1]]
        try:
            ids = encode.encode_prompt(self.encoder, content)
        except errors.UserError:
            raise
        except Exception as error:  # of the template's own code
            problem = f"the chat template does not take this prompt: {errors.first_line(error)}"
            raise DataError(Fault(_PLACE, problem, "Correct the prompt.", code="template.refuses_row")) from None
        return RenderedPrompt(content, ids)

    def render_request(self, turns: list[dict[str, Any]]) -> RenderedPrompt:
        """Return a prompt with its tokens.

        Args:
            turns: {role, content} of each turn, the system prompt among them; where rows are no chats, one user turn.

        Raises:
            DataError: the turns cannot be used.

        """
        if self.has_history:
            return self.render_messages(turns)
        if len(turns) == 1 and turns[0].get("role") == "user":
            return self.render(str(turns[0].get("content") or ""))
        roles = ", ".join(str(turn.get("role")) for turn in turns)
        problem = f"the rows of this run are no chats, and the prompt has the turns {roles or 'none'}"
        fix = "Send one user turn, with all that the model has to know."
        raise DataError(Fault(_PLACE, problem, fix, code="serve.single_turn"))

    def render_messages(self, turns: list[dict[str, Any]], tools: Any = None) -> RenderedPrompt:
        """Return a chat that ends with a prompt, with its tokens. Raises DataError."""
        item = {"messages": turns} | ({"tools": tools} if tools else {})
        try:
            formatted = data_prompts.format_prompt(item, self.source_format, row_type=self.row_type, place=_PLACE)
        except FormatError as error:
            raise DataError(Fault(_PLACE, error.problem, data_prompts.adapt_fix(error.fix), code=error.code)) from None
        return self.render_worded(messages.unescape(formatted.content), formatted.tools)

    def render_worded(self, content: Any, tools: Any = None) -> RenderedPrompt:
        """Return a prompt that is worded already, as those of samples.jsonl are, with its tokens.

        Args:
            content: a text, or messages.
            tools: of a chat; None = none.

        Raises:
            UserError: the chat template does not take it.

        """
        features = self.source_format.features
        escaped = content
        if features.escape_special_tokens and features.special_tokens:
            escaped = messages.escape(content, messages.special_pattern(features.special_tokens))
        try:
            ids = encode.encode_prompt(self.encoder, escaped, tools)
        except errors.UserError:
            raise
        except Exception as error:  # of the template's own code
            problem = f"the chat template does not take this prompt: {errors.first_line(error)}"
            raise DataError(Fault(_PLACE, problem, "Correct the prompt.", code="template.refuses_row")) from None
        return RenderedPrompt(content, ids)


def build_renderer(source: ModelFolder, tokenizer: PreTrainedTokenizerBase) -> PromptRenderer:
    """Return what renders the prompts of a model.

    Args:
        source: the folder; without a record of a run the tokenizer's chat template renders.
        tokenizer: of the folder.

    Raises:
        TemplateError: there is neither a chat template nor a wording.

    """
    record = source.inference
    row_type, kwargs = record.get("row_type", CHAT), record.get("chat_template_kwargs", {})
    template = chat_template.read_template(tokenizer)
    where = str(source.folder)
    if row_type not in (CHAT, PAIRS, TEXT) or (row_type == CHAT and not template):
        problem = "the tokenizer has no chat template, and the folder records no wording of prompts"
        fix = "Name the folder of the run that trained the model, or save a tokenizer with its chat template there."
        raise TemplateError(Fault(where, problem, fix, code="template.missing"))
    escape = bool(record.get("escape_special_tokens"))
    intended = record.get("special_tokens_in_prompts", [])
    strings = tuple(string for string in special_tokens.list_strings(tokenizer) if string not in intended)
    names = chat_template.find_features(where, tokenizer, kwargs) if template else ()
    features = TokenizerFeatures(names, str(tokenizer.eos_token), special_tokens=strings, escape_special_tokens=escape)
    source_format = SourceFormat(
        "chat", record.get("format", "question_answer"), record.get("wording", "chat"), features
    )
    settings = EncodingSettings(
        row_type=row_type,
        loss_on="completion",
        eos_token=features.eos_token,
        max_length=None,
        allow_prompt_mismatch=True,
        allow_template_markers=True,
    )
    encoder = build_encoder(settings, tokenizer, kwargs, escaped=strings if escape else ())
    return PromptRenderer(row_type, source_format, encoder)
