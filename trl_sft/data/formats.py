"""Pure functions from a row to one of TRL's forms, and the dict of layouts.

In: a row as a dict. Out: `{"prompt": ..., "completion": ...}` (two texts, or two lists of messages, with
`tools` as JSON beside them) or `{"text": ...}`. A layout says what the columns mean, `wordings` how that
becomes text, `turns` what a chat is. Deliberately absent: files, tokenizers, the loss.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from trl_sft.data import messages as data_messages
from trl_sft.data import wordings
from trl_sft.data.messages import Chat, FormatError, Row, text
from trl_sft.data.wordings import Turn

_THOUGHT = "reasoning_content"


class TokenizerFeatures(NamedTuple):
    """What the rows are formatted for."""

    template_features: tuple[
        str, ...
    ]  # what the chat template renders, see `turns.render`; empty = there is no template
    eos_token: str  # the tokenizer's end token, which some wordings put after earlier answers
    task: str = ""  # of every row of the source, where the rows have no column for it
    special_tokens: tuple[str, ...] = ()  # strings that are one special token each
    escape_special_tokens: bool = (
        False  # whether these are plain text where a row holds them; else such a row is refused
    )


class Layout(NamedTuple):
    """What the columns of a row mean."""

    columns: tuple[str, ...]  # have to be there
    optional: tuple[str, ...]  # are used where they are
    wording: str  # where the tokenizer has no chat template; "" = only chat, or a wording of several turns
    read: Callable[[Row], Any]  # a Turn, a Chat, or a text


class Formed(NamedTuple):
    """A row in TRL's form."""

    columns: dict[str, Any]
    as_text: frozenset[str] = frozenset()  # what became text because the template does not render it


def _chat(row: Row, column: str) -> Chat:
    messages = data_messages.read(row, column)
    if row.get("system") and messages[0]["role"] != "system":  # a column of its own, as in LLaMA-Factory's data
        messages.insert(0, {"role": "system", "content": text(row, "system")})
    data_messages.check(messages, column)
    return Chat(messages, data_messages.tools(row))


def _pair(row: Row) -> Any:
    if not isinstance(row.get("prompt"), list):
        return Turn(text(row, "prompt"), "", text(row, "completion"))
    prompt, completion = data_messages.read(row, "prompt"), data_messages.read(row, "completion")
    if completion[0]["role"] != "assistant":
        raise FormatError(
            f"completion begins with {completion[0]['role']}", "the assistant's turn: it is what is learned"
        )
    data_messages.check(prompt + completion, "prompt with completion")
    return Chat(prompt + completion, data_messages.tools(row), len(completion))


def _alpaca(row: Row) -> Any:
    given = text(row, "input") if row.get("input") else ""
    turn = Turn(text(row, "instruction"), given, text(row, "output"))
    if not row.get("system") and not row.get("history"):
        return turn
    # https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md, "Alpaca Format"
    return _after(row, "history", turn)


def _conversation(row: Row) -> Any:
    turn = Turn(text(row, "human"), "", text(row, "assistant"))
    if isinstance(row.get("history"), str):
        return turn._replace(history=row["history"].strip())
    return _after(row, "history", turn)


def _after(row: Row, column: str, turn: Turn) -> Chat:
    """Return a turn after what was said before it: pairs [human, assistant], or turns."""
    said = row.get(column) or []
    if not isinstance(said, list):
        raise FormatError(f"{column} is {type(said).__name__}", "a list of [human, assistant], or of {role, content}")
    messages = [{"role": "system", "content": text(row, "system")}] if row.get("system") else []
    for item in said:
        named = item if isinstance(item, Mapping) and {"human", "assistant"} <= set(item) else {}
        if isinstance(item, list) and len(item) == 2:
            named = dict(zip(("human", "assistant"), item, strict=True))
        if named:
            messages += [
                {"role": data_messages.ROLES[name], "content": text(named, name)} for name in ("human", "assistant")
            ]
        elif isinstance(item, list):
            raise FormatError(f"{column} has a list of {len(item)} where two are due", "[human, assistant]")
        else:
            messages += data_messages.read({column: [item]}, column)
    messages += wordings.messages_of(turn)
    data_messages.check(messages, f"{column} with this turn")
    return Chat(messages, [])


def _task(row: Row) -> Turn:
    given = text(row, "input") if row.get("input") else ""
    return Turn("", given, text(row, "output"), task=text(row, "task") if "task" in row else "")


def _thinking(row: Row) -> Turn:
    if not text(row, "reasoning").strip():
        raise FormatError("reasoning is empty", "text there, or format: question_answer with the columns renamed")
    return Turn(text(row, "problem"), "", text(row, "answer"), thought=row["reasoning"])


LABEL = "task"  # a column that may stand beside any layout: what a row is about, told apart in the evaluation

LAYOUTS: dict[str, Layout] = {
    "messages": Layout(("messages",), ("tools", "system"), "", lambda row: _chat(row, "messages")),
    "sharegpt": Layout(("conversations",), ("tools", "system"), "", lambda row: _chat(row, "conversations")),
    "prompt_completion": Layout(("prompt", "completion"), ("tools",), "plain", _pair),
    "alpaca": Layout(("instruction", "output"), ("input", "system", "history"), "alpaca", _alpaca),
    "question_answer": Layout(
        ("question", "answer"), (), "question_answer", lambda row: Turn(text(row, "question"), "", text(row, "answer"))
    ),
    "conversation": Layout(("human", "assistant"), ("history", "system"), "conversation", _conversation),
    "task": Layout(("task", "input", "output"), (), "task", _task),
    "chain_of_thought": Layout(("problem", "reasoning", "answer"), (), "chain_of_thought", _thinking),
    "text": Layout(("text",), (), "plain", lambda row: text(row, "text")),
}


def recognise(columns: Collection[str]) -> list[str]:
    """Return the layouts whose columns are all there."""
    return [name for name, layout in LAYOUTS.items() if set(layout.columns) <= set(columns)]


def form(row: Row, layout: str, wording: str | Mapping[str, str], target: TokenizerFeatures) -> Formed:
    """Return a row in TRL's form: prompt and completion (texts or messages), or text.

    `wording` is a key of `wordings.TURNS` or `wordings.CHATS`, `chat`, or the recipe's own {prompt,
    completion}. Raises FormatError.
    """
    if isinstance(wording, Mapping):
        values = {name: text(row, name) for part in wording.values() for name in wordings.fields(part)}
        formed = wordings.own(values, wording)
        _some(formed.get("completion", formed.get("text", "")), "the completion")
        return Formed(formed)
    read = LAYOUTS[layout].read(row)
    if isinstance(read, str):
        _some(read, LAYOUTS[layout].columns[-1])
        return Formed({"text": read})
    if isinstance(read, Turn):
        if "task" in (layout, wording):
            read = read._replace(task=target.task or read.task)
            wordings.check_task(read.task)
        _some(read.response, LAYOUTS[layout].columns[-1])
        _some(read.question + read.task, LAYOUTS[layout].columns[0], "it asks nothing")
        if wording != "chat":
            return Formed(wordings.pair(read, wording, target.eos_token)._asdict())
        messages = wordings.messages_of(read)
        if read.thought and {_THOUGHT, "thinking"} & set(target.template_features):
            messages[-1] |= {"content": read.response, _THOUGHT: read.thought}
        read = Chat(messages, [])
    return _formed(read, wording, target)


def _formed(chat: Chat, wording: str, target: TokenizerFeatures) -> Formed:
    """Return a chat in TRL's form."""
    if wording != "chat":
        if data_messages.UNTRAINED in chat.messages[-1]:
            raise FormatError(
                "the last answer is not to be trained, and it is all that this wording trains", "wording: chat"
            )
        shown = data_messages.render(chat, {"system"})
        return Formed(wordings.pair(shown.messages, wording, target.eos_token)._asdict(), shown.as_text)
    shown = data_messages.render(chat, target.template_features)
    split = len(shown.messages) - shown.learned
    columns = {"prompt": shown.messages[:split], "completion": shown.messages[split:]}
    tools = json.dumps(shown.tools, ensure_ascii=False) if shown.tools else None
    untrained = [n for n, turn in enumerate(shown.messages) if turn.pop(data_messages.UNTRAINED, False)]
    return Formed(columns | {"tools": tools, data_messages.UNTRAINED: untrained or None}, shown.as_text)


def _some(words: str, column: str, why: str = "there is nothing to learn") -> None:
    if not words.strip():
        raise FormatError(f"{column} is empty: {why}", "text there")
