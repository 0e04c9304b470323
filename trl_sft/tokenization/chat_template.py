"""What a chat template does, found by rendering trial chats.

Inputs: a tokenizer with a template. Outputs: what it renders, which token ends an assistant's turn, what it drops.
Not here: which template a run uses (`tokenizer`), and any list of known templates.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from trl_sft.data.messages import JSON_ARGUMENTS, REASONING_KEYS, adapt_calls
from trl_sft.data.text_thoughts import TEXT_THOUGHTS
from trl_sft.errors import Fault, TemplateError, first_line

_SIMPLE = re.compile(r"[A-Za-z0-9]+")
_TURN_NAMES = {"system": "the system prompt", "user": "a turn of the user", "tool": "the answer of a tool"}
QUESTION, ANSWER = "trlsftasks", "trlsftanswers"  # words of trial chats, which no template writes itself
TRIAL_CHAT: list[dict[str, Any]] = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
_CALL: dict[str, Any] = {
    "type": "function",
    "id": "trlsftid1",  # Mistral's templates take ids of nine letters and digits alone
    "function": {"name": "trlsftname", "arguments": {"trlsftkey": "trlsftvalue"}},
}
# as complete as real ones: several templates read all of it
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "trlsfttool",
        "description": "trlsftdescription",
        "parameters": {
            "type": "object",
            "properties": {"trlsftkey": {"type": "string", "description": "trlsftkeydescription"}},
            "required": ["trlsftkey"],
        },
    },
}
_CALLING_TURN: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_TOOL_TURN: dict[str, Any] = {
    "role": "tool",
    "content": "trlsftresult",
    "name": "trlsftname",
    "tool_call_id": "trlsftid1",
}
_CHAT_WITH_CALL: list[dict[str, Any]] = [TRIAL_CHAT[0], _CALLING_TURN, _TOOL_TURN, TRIAL_CHAT[1]]
# DeepSeek's and Functionary's templates take arguments as JSON text alone.
_CALL_FORMS: tuple[tuple[str, ...], ...] = ((), (JSON_ARGUMENTS,))
# what a template may render -> messages, tools, and the words that show that it renders it
_TRIALS: dict[str, tuple[list[dict[str, Any]], list[Any] | None, tuple[str, ...]]] = {
    "system": ([{"role": "system", "content": "trlsftsystem"}, *TRIAL_CHAT], None, ("trlsftsystem",)),
    "tools": (TRIAL_CHAT, [_TOOL], ("trlsfttool", "trlsftdescription")),
    "tool_calls": (_CHAT_WITH_CALL, [_TOOL], ("trlsftname", "trlsftvalue")),
    "tool": (_CHAT_WITH_CALL, [_TOOL], ("trlsftresult",)),
    **{
        key: ([TRIAL_CHAT[0], TRIAL_CHAT[1] | {key: "trlsftthought"}], None, ("trlsftthought",))
        for key in REASONING_KEYS
    },
}
NAMES = ("messages", *_TRIALS)


def read_template(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any] | None = None) -> str:
    """Return the template that renders a chat; of several named ones that for `tools`; "" = there is none."""
    if not tokenizer.chat_template:
        return ""
    return str(tokenizer.get_chat_template(tools=list(tools) if tools else None))


def find_features(where: str, tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> tuple[str, ...]:
    """Return what the template renders, found by trial.

    Args:
        where: the place in the recipe that sets the template, for messages.
        tokenizer: has the template.
        kwargs: what the template gets beside the messages.

    Returns:
        Those of `NAMES` that it renders; `messages` is always among them. `JSON_ARGUMENTS` is, where it takes
        the arguments of calls as JSON text alone; `TEXT_THOUGHTS`, where it has a form of its own for thoughts.

    Raises:
        TemplateError: it renders no chat of a user and an assistant.

    """
    try:
        rendered = tokenizer.apply_chat_template(TRIAL_CHAT, tokenize=False, **kwargs)
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

    calls = _find_call_forms(tokenizer, kwargs)
    shown = [name for name in _TRIALS if _is_rendered(tokenizer, name, kwargs, form=calls)]
    if calls and "tool_calls" in shown:
        shown += calls
    shown += _find_thoughts_of_calls(tokenizer, kwargs, form=calls, shown=shown)
    if _keeps_text_thoughts(tokenizer, kwargs, shown=shown):
        shown.append(TEXT_THOUGHTS)
    return ("messages", *shown)


def depends_on_eos(tokenizer: PreTrainedTokenizerBase, token: str, kwargs: dict[str, Any]) -> bool:
    """Tell whether the template renders something else where `token` is the tokenizer's end-of-text token."""
    before, eos_token = render_trials(tokenizer, kwargs), tokenizer.eos_token
    tokenizer.eos_token = token
    after = render_trials(tokenizer, kwargs)
    tokenizer.eos_token = eos_token
    return before != after


def render_trials(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> str:
    """Return all trial chats as the template renders them, with all that it writes around turns; "" = none."""
    form = _find_call_forms(tokenizer, kwargs)
    trials = [(_set_call_form(messages, form), tools) for messages, tools, _ in _TRIALS.values()]
    return "".join(_render(tokenizer, messages, kwargs, tools=tools) for messages, tools in trials)


def render_all_trials(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> str:
    """Return all trial chats as `render_trials` does, and one that ends in the generation prompt. Raises MemoryError.

    Unlike `render_trials` it lets errors of memory through.
    """
    text = ""
    form = _find_call_forms(tokenizer, kwargs)
    for trial, tools, _ in _TRIALS.values():
        messages = _set_call_form(trial, form)
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


def list_parts(turn: Mapping[str, Any]) -> list[str]:
    """Return the texts that the rendering of an answer has to hold, in the order of most templates."""
    thought = next((turn[key] for key in REASONING_KEYS if turn.get(key)), "")
    parts = [str(thought), str(turn["content"] or "")]
    for call in turn.get("tool_calls") or []:
        function = call["function"]
        arguments = function["arguments"]
        if isinstance(arguments, str):
            arguments = json.loads(arguments)
        # templates write arguments in several ways; these values look the same in all of them
        simple = [value for value in arguments.values() if isinstance(value, str) and _SIMPLE.fullmatch(value)]
        parts += [function["name"], *simple]
    return [part for part in parts if part.strip()]


def find_missing_part(turn: Mapping[str, Any], rendered: str) -> str:
    """Return the first part of an answer that its rendering lacks, spaces aside; "" = it lacks none."""
    without_spaces = "".join(rendered.split())
    return next((part for part in list_parts(turn) if "".join(part.split()) not in without_spaces), "")


def find_missing_turn(turns: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None, rendered: str) -> str:
    """Return what a rendering lacks of all that is no answer, in words with the text; "" = it lacks nothing.

    Looked at are the texts of the system prompt, the user and tools, and the names and descriptions of `tools`.
    """
    without_spaces = "".join(rendered.split())
    position = 0  # turns follow each other, so each is searched behind the one before it first
    for turn in turns:
        content = str(turn["content"] or "")
        place = without_spaces.find("".join(content.split()), position)
        if place >= 0:
            position = place
        elif turn["role"] != "assistant" and not _is_in(content, without_spaces, is_loose=turn["role"] == "tool"):
            return f"{_TURN_NAMES.get(turn['role'], turn['role'])}: {content.strip()[:60]!r}"
    for tool in tools or []:
        function = tool["function"]
        for key in ("name", "description"):
            text = function.get(key)
            if isinstance(text, str) and not _is_in(text, without_spaces):
                return f"the {key} of a tool: {text[:60]!r}"
    return ""


def _is_in(content: str, without_spaces: str, *, is_loose: bool = False) -> bool:
    """Tell whether a rendering, without its spaces, holds a text: as it is, or as text of JSON.

    `is_loose`: each of its words is enough, since templates write JSON that a tool answers in forms of their own.
    """
    forms = (content, json.dumps(content)[1:-1], json.dumps(content, ensure_ascii=False)[1:-1], html.escape(content))
    if any("".join(form.split()) in without_spaces for form in forms):
        return True
    return is_loose and all(word in without_spaces for word in {*re.findall(r"\w+", content)})


def _set_call_form(messages: Sequence[Mapping[str, Any]], form: Collection[str]) -> list[dict[str, Any]]:
    """Return trial messages with calls in one of `_CALL_FORMS`."""
    changed = []
    for message in messages:
        turn = dict(message)
        if turn.get("tool_calls"):
            turn = adapt_calls(turn, form)
        changed.append(turn)
    return changed


def _find_call_forms(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> tuple[str, ...]:
    """Return the first of `_CALL_FORMS` in which the template renders calls; () where it renders none.

    Arguments that come out in Python's own notation, `{'city': 'Rome'}`, are the last choice.
    """
    messages, tools, words = _TRIALS["tool_calls"]
    forms = []
    for form in _CALL_FORMS:
        rendered = _render(tokenizer, _set_call_form(messages, form), kwargs, tools=tools)
        if all(word in rendered for word in words):
            forms.append(("'trlsftkey': 'trlsftvalue'" in rendered, form))
    return min(forms, key=lambda entry: entry[0])[1] if forms else ()


def _find_thoughts_of_calls(
    tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any], *, form: Collection[str], shown: Collection[str]
) -> list[str]:
    """Return the key of thoughts that the template renders in turns with calls alone, as Kimi-K2's does."""
    if {*REASONING_KEYS} & {*shown} or "tool_calls" not in shown:
        return []
    for key in REASONING_KEYS:
        messages = _set_call_form([TRIAL_CHAT[0], _CALLING_TURN | {key: "trlsftthought"}], form)
        if "trlsftthought" in _render(tokenizer, messages, kwargs, tools=[_TOOL]):
            return [key]
    return []


def _keeps_text_thoughts(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any], *, shown: Collection[str]) -> bool:
    """Tell whether the template renders thoughts under a key in one form, and thoughts in the text as that text.

    gpt-oss writes a thought into a channel of its own. In the text of an answer it would be a second form of a thought.
    """
    key = next((key for key in REASONING_KEYS if key in shown), "")
    text = f"<think>\ntrlsftthought\n</think>\n\n{ANSWER}"
    if not key or text not in _render(
        tokenizer, [TRIAL_CHAT[0], TRIAL_CHAT[1] | {"content": text}], kwargs, tools=None
    ):
        return False
    return text not in _render(tokenizer, _TRIALS[key][0], kwargs, tools=None)


def _is_rendered(
    tokenizer: PreTrainedTokenizerBase, name: str, kwargs: dict[str, Any], *, form: Collection[str]
) -> bool:
    """Tell whether the template renders what one of the trials holds, with calls in a form."""
    messages, tools, words = _TRIALS[name]
    rendered = _render(tokenizer, _set_call_form(messages, form), kwargs, tools=tools)
    return all(word in rendered for word in words)


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    kwargs: dict[str, Any],
    *,
    tools: list[Any] | None,
) -> str:
    """Return trial messages as text; "" where the template raises an error."""
    try:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **kwargs))
    except Exception:  # a template raises what it likes for messages that it does not take
        return ""
