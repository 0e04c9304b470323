"""What a chat template does, found out by rendering with it.

In: a tokenizer with a template. Out: what it renders, where an assistant's turn ends, what it drops.
Deliberately absent: which template a run uses (`chat`), and any list of known ones.
"""

from __future__ import annotations

import re
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from trl_sft.errors import Fault, TemplateError, first_line

_ASKS, _ANSWERS = "trlsftasks", "trlsftanswers"  # words that no template writes
_SMALL: list[dict[str, Any]] = [{"role": "user", "content": _ASKS}, {"role": "assistant", "content": _ANSWERS}]
_CALL: dict[str, Any] = {
    "type": "function",
    "id": "trlsftid1",
    "function": {"name": "trlsftname", "arguments": {"k": "trlsftvalue"}},
}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "trlsfttool", "description": "d", "parameters": {"type": "object"}},
}
_CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": _ASKS},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
    {"role": "tool", "content": "trlsftresult", "name": "trlsftname", "tool_call_id": "trlsftid1"},
    {"role": "assistant", "content": _ANSWERS},
]
# what a template may render -> messages, tools, and the words that show that it does
_TRIALS: dict[str, tuple[list[dict[str, Any]], list[Any] | None, tuple[str, ...]]] = {
    "system": ([{"role": "system", "content": "trlsftsystem"}, *_SMALL], None, ("trlsftsystem",)),
    "tools": (_SMALL, [_TOOL], ("trlsfttool",)),
    "tool_calls": (_CALLED, [_TOOL], ("trlsftname", "trlsftvalue")),
    "tool": (_CALLED, [_TOOL], ("trlsftresult",)),
    "reasoning_content": ([_SMALL[0], _SMALL[1] | {"reasoning_content": "trlsftthought"}], None, ("trlsftthought",)),
    "thinking": ([_SMALL[0], _SMALL[1] | {"thinking": "trlsftthought"}], None, ("trlsftthought",)),
}
NAMES = ("messages", *_TRIALS)


def text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the template that training uses; of several named ones the default."""
    return str(tokenizer.get_chat_template()) if tokenizer.chat_template else ""


def renders(where: str, tokenizer: PreTrainedTokenizerBase, keywords: dict[str, Any]) -> tuple[str, ...]:
    """Return what the template renders, by trying; `messages` is always in it. Raises TemplateError.

    `where` is the place in the recipe, `keywords` are what the template gets beside the messages.
    """
    try:
        small = tokenizer.apply_chat_template(_SMALL, tokenize=False, **keywords)
    except jinja2.TemplateSyntaxError as error:
        found = f"the chat template is no Jinja, line {error.lineno}: {error.message}"
        raise TemplateError(Fault(where, found, "a template that transformers renders")) from None
    except Exception as error:
        found = f"the chat template does not render: {first_line(error)}"
        raise TemplateError(Fault(where, found, "one that renders a user and an assistant")) from None
    if _ASKS not in small or _ANSWERS not in small:
        read = sorted({a or b for a, b in re.findall(r"\bmessage(?:\[['\"](\w+)['\"]\]|\.(\w+))", text(tokenizer))})
        who = " and ".join(name for name, words in (("user", _ASKS), ("assistant", _ANSWERS)) if words not in small)
        found = f"the chat template leaves out what the {who} says; of a message it reads {', '.join(read) or 'no key'}"
        raise TemplateError(Fault(where, found, "message['role'] and message['content']"))

    def shows(what: str) -> bool:
        shown = _tried(tokenizer, what, keywords)
        return all(word in shown for word in _TRIALS[what][2])

    return ("messages", *(what for what in _TRIALS if shows(what)))


def stop(tokenizer: PreTrainedTokenizerBase, keywords: dict[str, Any]) -> str:
    """Return the token that ends an assistant's turn; "" where a template writes none.

    Of several special tokens after the answer it is the tokenizer's end token, else the first.
    """
    shown = tokenizer.apply_chat_template(_SMALL, tokenize=False, **keywords)
    after = shown.rpartition(_ANSWERS)[2].lstrip()
    tokens = {*map(str, tokenizer.added_tokens_decoder.values()), *tokenizer.all_special_tokens}
    found: list[str] = []
    while follows := max((token for token in tokens if after.startswith(token)), key=len, default=""):
        found.append(follows)
        after = after.removeprefix(follows)
    return str(tokenizer.eos_token) if tokenizer.eos_token in found else found[0] if found else ""


def changed_by_eos(tokenizer: PreTrainedTokenizerBase, token: str, keywords: dict[str, Any]) -> bool:
    """Tell whether the template renders something else where `token` is the tokenizer's end token."""
    before, own = everything(tokenizer, keywords), tokenizer.eos_token
    tokenizer.eos_token = token
    after = everything(tokenizer, keywords)
    tokenizer.eos_token = own
    return before != after


def everything(tokenizer: PreTrainedTokenizerBase, keywords: dict[str, Any]) -> str:
    """Return all that the template writes around turns, tools and thoughts of text; "" where it does not render."""
    return "".join(_tried(tokenizer, what, keywords) for what in _TRIALS)


def lost(turn: dict[str, Any], shown: str) -> str:
    """Return the part of an answer that its rendering lacks, spaces aside; "" = none."""
    made = [call["function"] for call in turn.get("tool_calls") or []]
    # of arguments what every way to write them leaves as it is
    given = [v for f in made for v in f["arguments"].values() if isinstance(v, str) and v.isascii() and v.isalnum()]
    calls = [*(function["name"] for function in made), *given]
    parts = [turn["content"], turn.get("reasoning_content") or turn.get("thinking") or "", *calls]
    bare = "".join(shown.split())
    return next((part for part in parts if "".join(part.split()) not in bare), "")


def _tried(tokenizer: PreTrainedTokenizerBase, what: str, keywords: dict[str, Any]) -> str:
    messages, tools, _ = _TRIALS[what]
    try:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **keywords))
    except Exception:  # whatever a template raises for what it does not take
        return ""
