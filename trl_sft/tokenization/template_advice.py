"""What to change in a recipe so that a chat can be trained, found by trying it: a keyword or a template with a name.

Inputs: a tokenizer, and a chat that its template cannot train. Outputs: the setting with which the same chat is
trained, as text for the fix of a fault; "" where no trial succeeds. Nothing is advised that was not tried. Not here:
what is wrong with the chat (`loss_mask`, `mask_errors`).
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from trl_sft.data import messages as data_messages
from trl_sft.data.messages import REASONING_KEYS, Chat, Message
from trl_sft.recipe import paths
from trl_sft.tokenization import chat_template, loss_mask, special_tokens, template_variables, turn_markers
from trl_sft.tokenization.chat_template import QUESTION

# read by most templates that can open, close or leave out thoughts: Qwen, GLM and Gemma, DeepSeek, Granite
_COMMON_KEYWORDS = ("enable_thinking", "thinking")
_THOUGHT_TAGS = re.compile(r"\s*</?think>\s*")
_THOUGHT_AS_TEXT = re.compile(r"<think>\n(.*?)\n</think>\n\n(.*)", re.DOTALL)
_CHUNK = re.compile(r"\{[%{].*?[%}]\}", re.DOTALL)  # a statement or an expression of a template

# the variable of a loop over the turns, and how its content is written, with what strips it
_TURN_VARIABLE = re.compile(r"\{%-?\s*for\s+(\w+)\s+in\s")
_TURN_CONTENT = r"\b{}(?:\.content|\[['\"]content['\"]\])(?:\s*\|\s*trim|\.r?strip\(\))?"


@dataclass(frozen=True)
class TrialChat:
    """A chat that a template cannot train.

    Attributes:
        turns: its messages.
        answers: the turns that carry loss.
        tools: the JSON schemas of functions that it offers.

    """

    turns: Sequence[Message]
    answers: Sequence[int]
    tools: Sequence[Any] | None = None


# a tokenizer, the keywords of its template, and a chat -> whether each of its answers gets a loss mask
Trial = Callable[[PreTrainedTokenizerBase, dict[str, Any], TrialChat], None]


def find_keyword(
    tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any], chat: TrialChat, *, train: Trial
) -> dict[str, Any]:
    """Return a keyword of the template and its value with which a chat is trained; {} = there is none.

    Args:
        tokenizer: has the template.
        kwargs: the keywords that it gets already.
        chat: is not trained with them.
        train: places the loss of a chat, or raises an error.

    """
    switches = template_variables.list_switches(chat_template.read_template(tokenizer, chat.tools))
    for name in sorted(switches, key=lambda name: (name not in _COMMON_KEYWORDS, name)):
        for value in sorted(switches[name], key=lambda value: value is True):  # most rows have no thoughts
            is_set = name in kwargs and kwargs[name] == value
            if not is_set and _succeeds(train, tokenizer, kwargs | {name: value}, chat=chat):
                return {name: value}
    return {}


def find_template(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any], chat: TrialChat, *, train: Trial) -> str:
    """Return the name of a template that trains a chat and writes the same prompts as the tokenizer's own; "" = none.

    Args:
        tokenizer: has the template that cannot train the chat.
        kwargs: the keywords that its template gets.
        chat: is not trained with it.
        train: places the loss of a chat, or raises an error.

    """
    own = chat_template.read_template(tokenizer, chat.tools)
    own_prompt, chunks = _render_prompt(tokenizer, kwargs), {*_CHUNK.findall(own)}
    similar: list[tuple[float, str]] = []
    vocabulary = tokenizer.get_vocab()
    for name in paths.list_templates():
        source = _read_named(name)
        strings = special_tokens.find_special_strings(source)
        is_known = not strings or any(string in vocabulary for string in strings)
        reads_keywords = all(re.search(rf"\b{re.escape(keyword)}\b", source) for keyword in kwargs)
        if is_known and reads_keywords and source != own:
            others = {*_CHUNK.findall(source)}
            similar.append((-len(chunks & others) / max(1, len(chunks | others)), name))
    for _, name in sorted(similar):
        other = copy.copy(tokenizer)
        other.chat_template = _read_named(name)
        if _render_prompt(other, kwargs) != own_prompt:
            continue
        adapted = _adapt_chat(other, kwargs, chat)
        if adapted is not None and _succeeds(train, other, kwargs, chat=adapted):
            return name
    return ""


def find_end_text(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> str:
    """Return the line breaks that end every answer, where generation could stop on them as one token; "" = none.

    One line break alone is none: it stands within answers too often.

    Args:
        tokenizer: its template ends answers with no special token.
        kwargs: the keywords that its template gets.

    """
    text = turn_markers.find_end_text(tokenizer, kwargs)
    if len(text) < len("\n\n") or text.strip():
        return ""
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"eos_token": text})
    trial = TrialChat(chat_template.TRIAL_CHAT, answers=[1])
    is_end = turn_markers.find_stop_token(other, kwargs) == text
    return text if is_end and _succeeds(place_loss, other, kwargs, chat=trial) else ""


def find_end_edit(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> tuple[str, str]:
    """Return what to replace in the tokenizer's own template so that answers end with `eos_token`: old and new text.

    Args:
        tokenizer: its template ends answers with no special token.
        kwargs: the keywords that its template gets.

    Returns:
        Two empty texts where no such change trains a trial chat.

    """
    source = chat_template.read_template(tokenizer)
    for variable in dict.fromkeys(_TURN_VARIABLE.findall(source)):
        for content in dict.fromkeys(re.findall(_TURN_CONTENT.format(re.escape(variable)), source)):
            end = f"{content} + (eos_token if {variable}['role'] == 'assistant' else '')"
            other = copy.copy(tokenizer)
            other.chat_template = source.replace(content, end)
            trial = TrialChat(chat_template.TRIAL_CHAT, answers=[1])
            is_end = turn_markers.find_stop_token(other, kwargs) == str(tokenizer.eos_token)
            if is_end and _succeeds(place_loss, other, kwargs, chat=trial):
                return content, end
    return "", ""


def place_loss(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any], chat: TrialChat) -> None:
    """Place the loss of a chat by rendering; a `Trial`. Raises MaskError, or what the template raises."""
    template = loss_mask.inspect_template(tokenizer, kwargs)
    text = template.render(chat.turns, chat.tools, False)
    loss_mask.find_spans_by_rendering(template, text, chat.turns, answers=chat.answers, tools=chat.tools)


@functools.cache
def _read_named(name: str) -> str:
    """Return the source of a template that has a name."""
    return Path(paths.list_templates()[name]).read_text(encoding="utf-8")


def _render_prompt(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> str | None:
    """Return the prompt of a trial chat without tags of thoughts; None where the template refuses it."""
    turns = [{"role": "user", "content": QUESTION}]
    try:
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **kwargs)
    except Exception:  # a template raises what it likes for messages that it does not take
        return None
    return _THOUGHT_TAGS.sub("\n", str(prompt)).rstrip()


def _adapt_chat(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any], chat: TrialChat) -> TrialChat | None:
    """Return a chat as the template of a tokenizer takes it; None where it cannot take it, or ends no answer."""
    strings = special_tokens.find_special_strings(chat_template.render_trials(tokenizer, kwargs))
    if special_tokens.find_split_strings(tokenizer, strings) or not turn_markers.find_stop_token(tokenizer, kwargs):
        return None
    features = chat_template.find_features("", tokenizer, kwargs)
    restored = Chat([_restore_turn(turn) for turn in chat.turns], list(chat.tools or []))
    adapted = data_messages.adapt_to_template(restored, features)
    if adapted.as_text - {"reasoning"} or len(adapted.messages) != len(chat.turns):
        return None
    return TrialChat(adapted.messages, chat.answers, adapted.tools or None)


def _restore_turn(turn: Message) -> Message:
    """Return a turn as `adapt_to_template` takes it: thoughts apart from the answer, arguments as a mapping."""
    restored = data_messages.restore_calls(turn)
    for key in REASONING_KEYS[1:]:
        if key in restored:
            restored["reasoning_content"] = restored.pop(key)
    thought = _THOUGHT_AS_TEXT.fullmatch(restored["content"]) if restored["role"] == "assistant" else None
    if thought is not None:
        restored |= {"reasoning_content": thought[1], "content": thought[2]}
    return restored


def _succeeds(train: Trial, tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any], *, chat: TrialChat) -> bool:
    """Tell whether a trial raises no error."""
    try:
        train(tokenizer, kwargs, chat)
    except Exception:  # MaskError, and what a template raises for messages that it does not take
        return False
    return True
