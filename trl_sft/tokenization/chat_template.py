"""What a chat template does, found by rendering trial chats.

Inputs: a tokenizer with a template. Outputs: what it renders, which token ends an assistant's turn, what it drops.
Not here: which template a run uses (`tokenizer`), and any list of known templates.
"""

from __future__ import annotations

import re
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from trl_sft.errors import Fault, TemplateError, first_line

QUESTION, ANSWER = "trlsftasks", "trlsftanswers"  # words of trial chats, which no template writes itself
_CHAT: list[dict[str, Any]] = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
_CALL: dict[str, Any] = {
    "type": "function",
    "id": "trlsftid1",
    "function": {"name": "trlsftname", "arguments": {"k": "trlsftvalue"}},
}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "trlsfttool", "description": "d", "parameters": {"type": "object"}},
}
_CHAT_WITH_CALL: list[dict[str, Any]] = [
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "content": "trlsftresult", "name": "trlsftname", "tool_call_id": "trlsftid1"},
    {"role": "assistant", "content": ANSWER},
]
# what a template may render -> messages, tools, and the words that show that it renders it
_TRIALS: dict[str, tuple[list[dict[str, Any]], list[Any] | None, tuple[str, ...]]] = {
    "system": ([{"role": "system", "content": "trlsftsystem"}, *_CHAT], None, ("trlsftsystem",)),
    "tools": (_CHAT, [_TOOL], ("trlsfttool",)),
    "tool_calls": (_CHAT_WITH_CALL, [_TOOL], ("trlsftname", "trlsftvalue")),
    "tool": (_CHAT_WITH_CALL, [_TOOL], ("trlsftresult",)),
    "reasoning_content": ([_CHAT[0], _CHAT[1] | {"reasoning_content": "trlsftthought"}], None, ("trlsftthought",)),
    "thinking": ([_CHAT[0], _CHAT[1] | {"thinking": "trlsftthought"}], None, ("trlsftthought",)),
}
NAMES = ("messages", *_TRIALS)


def read_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the template that training uses; of several named ones the default; "" = the tokenizer has none."""
    return str(tokenizer.get_chat_template()) if tokenizer.chat_template else ""


def find_features(where: str, tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> tuple[str, ...]:
    """Return what the template renders, found by trial.

    Args:
        where: the place in the recipe that sets the template, for messages.
        tokenizer: has the template.
        kwargs: what the template gets beside the messages.

    Returns:
        Those of `NAMES` that it renders; `messages` is always among them.

    Raises:
        TemplateError: it renders no chat of a user and an assistant.

    """
    try:
        rendered = tokenizer.apply_chat_template(_CHAT, tokenize=False, **kwargs)
    except jinja2.TemplateSyntaxError as error:
        problem = f"the chat template is not valid Jinja, line {error.lineno}: {error.message}"
        raise TemplateError(
            Fault(where, problem, "Use a template that transformers can render.", code="template.invalid")
        ) from None
    except Exception as error:
        problem = f"the chat template does not render: {first_line(error)}"
        raise TemplateError(
            Fault(where, problem, "Use a template that renders a user and an assistant.", code="template.invalid")
        ) from None
    dropped = [role for role, word in (("user", QUESTION), ("assistant", ANSWER)) if word not in rendered]
    if dropped:
        accesses = re.findall(r"\bmessage(?:\[['\"](\w+)['\"]\]|\.(\w+))", read_template(tokenizer))
        keys = ", ".join(sorted({subscript or attribute for subscript, attribute in accesses})) or "none"
        problem = f"the chat template drops the content of {' and '.join(dropped)}; keys that it reads: {keys}"
        raise TemplateError(
            Fault(
                where,
                problem,
                "Read message['role'] and message['content'] in the template.",
                code="template.drops_content",
            )
        )

    def shows(name: str) -> bool:
        rendered = _render_trial(tokenizer, name, kwargs)
        return all(word in rendered for word in _TRIALS[name][2])

    return ("messages", *(name for name in _TRIALS if shows(name)))


def find_stop_token(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> str:
    """Return the token that ends an assistant's turn; "" where the template writes none.

    Of several special tokens after the answer it is the tokenizer's end-of-text token, else the first one.
    """
    rendered = tokenizer.apply_chat_template(_CHAT, tokenize=False, **kwargs)
    rest = rendered.rpartition(ANSWER)[2].lstrip()
    special = {*map(str, tokenizer.added_tokens_decoder.values()), *tokenizer.all_special_tokens}
    tokens: list[str] = []
    while token := max((token for token in special if rest.startswith(token)), key=len, default=""):
        tokens.append(token)
        rest = rest.removeprefix(token)
    if tokenizer.eos_token in tokens:
        return str(tokenizer.eos_token)
    return tokens[0] if tokens else ""


def depends_on_eos(tokenizer: PreTrainedTokenizerBase, token: str, kwargs: dict[str, Any]) -> bool:
    """Tell whether the template renders something else where `token` is the tokenizer's end-of-text token."""
    before, eos_token = render_trials(tokenizer, kwargs), tokenizer.eos_token
    tokenizer.eos_token = token
    after = render_trials(tokenizer, kwargs)
    tokenizer.eos_token = eos_token
    return before != after


def render_trials(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> str:
    """Return all trial chats as the template renders them, with all that it writes around turns; "" = none."""
    return "".join(_render_trial(tokenizer, name, kwargs) for name in _TRIALS)


def render_all_trials(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> str:
    """Return all trial chats as `render_trials` does, and one that ends in the generation prompt. Raises MemoryError.

    Unlike `render_trials` it lets errors of memory through.
    """
    text = ""
    for messages, tools, _ in _TRIALS.values():
        for add_generation_prompt in (False, True):
            try:
                text += tokenizer.apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt, **kwargs
                )
            except MemoryError:
                raise
            except Exception:  # a template raises what it likes for messages that it does not take
                continue
    return text


def find_missing_part(turn: dict[str, Any], rendered: str) -> str:
    """Return the first part of an answer that its rendering lacks, spaces aside; "" = it lacks none."""
    functions = [call["function"] for call in turn.get("tool_calls") or []]
    arguments = [value for function in functions for value in function["arguments"].values()]
    # templates write arguments in several ways; these values look the same in all of them
    simple = [value for value in arguments if isinstance(value, str) and value.isascii() and value.isalnum()]
    thought = turn.get("reasoning_content") or turn.get("thinking") or ""
    parts = [turn["content"], thought, *(function["name"] for function in functions), *simple]
    without_spaces = "".join(rendered.split())
    return next((part for part in parts if "".join(part.split()) not in without_spaces), "")


def _render_trial(tokenizer: PreTrainedTokenizerBase, name: str, kwargs: dict[str, Any]) -> str:
    """Return one of the trial chats as text; "" where the template raises an error."""
    messages, tools, _ = _TRIALS[name]
    try:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **kwargs))
    except Exception:  # a template raises what it likes for messages that it does not take
        return ""
