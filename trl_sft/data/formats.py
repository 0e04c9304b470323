"""The formats of rows: what their columns mean, as pure functions from a row to one of TRL's dataset types.

Inputs: a row as a dict. Outputs: `{"prompt": ..., "completion": ...}` (two texts, or two lists of messages with
`tools` as JSON beside them) or `{"text": ...}`. A format says what the columns mean, `wordings` how a row becomes
text, `messages` what a chat is. Deliberately not here: files, tokenizers, the loss.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from trl_sft.data import messages as data_messages
from trl_sft.data import wordings
from trl_sft.data.messages import REASONING_KEYS, Chat, FormatError, Message, Row, read_text
from trl_sft.data.text_thoughts import TEXT_THOUGHTS
from trl_sft.data.wordings import SingleTurn

# TRL's dataset types, as messages call them: conversational prompt-completion, standard prompt-completion, language
# modeling. All rows of a run have one.
CHAT, PAIRS, TEXT = "a chat", "prompts with completions", "plain text"
TASK = "task"  # a column that may stand beside any format: the label of a row, which the evaluation groups by
_REASONING = "reasoning_content"


class TokenizerFeatures(NamedTuple):
    """What formatting has to know about the tokenizer."""

    template_features: tuple[str, ...]  # see `messages.adapt_to_template`; () = the tokenizer has no chat template
    eos_token: str  # end-of-sequence token, which some wordings put after earlier answers
    special_tokens: tuple[str, ...] = ()  # texts that are one special token each, the longest first
    escape_special_tokens: bool = False  # whether they are plain text where a row holds one; False = refuse the row


class RowFormat(NamedTuple):
    """What the columns of a row mean."""

    columns: tuple[str, ...]  # required
    optional_columns: tuple[str, ...]
    wording: str  # where the tokenizer has no chat template; "" = the rows are chats, which need one
    read: Callable[[Row], SingleTurn | Chat | str]


class FormattedRow(NamedTuple):
    """A row in one of TRL's dataset types."""

    columns: dict[str, Any]
    as_text: frozenset[str] = frozenset()  # what became text because the chat template does not render it


def recognise(columns: Collection[str]) -> list[str]:
    """Return the formats whose required columns are all there."""
    return [name for name, row_format in FORMATS.items() if set(row_format.columns) <= set(columns)]


def format_row(
    row: Row,
    format_name: str,
    wording: str | Mapping[str, str],
    *,
    features: TokenizerFeatures,
    task: str = "",
) -> FormattedRow:
    """Return a row in one of TRL's dataset types.

    Args:
        row: the columns of the row.
        format_name: a key of `FORMATS`; "" with a wording of the recipe's own.
        wording: a key of `wordings.SINGLE_TURN` or `wordings.MULTI_TURN`, `chat`, or the recipe's own {prompt,
            completion} or {text}.
        features: what the tokenizer can do.
        task: the task of the source, which takes the place of the row's own; "" = the row names it, or none.

    Raises:
        FormatError: the row does not hold what its format or its wording needs.

    """
    if isinstance(wording, Mapping):
        values = {name: read_text(row, name) for part in wording.values() for name in wordings.template_columns(part)}
        columns = wordings.fill_templates(values, wording)
        _refuse_empty(columns.get("completion", columns.get("text", "")), "the completion")
        return FormattedRow(columns)
    row_format = FORMATS[format_name]
    content = row_format.read(row)
    if isinstance(content, Chat):
        return _format_chat(content, wording, features)
    if isinstance(content, str):
        _refuse_empty(content, row_format.columns[-1])
        return FormattedRow({"text": content})
    if "task" in (format_name, wording):
        content = content._replace(task=task or content.task)
        wordings.check_task(content.task)
    _refuse_empty(content.response, row_format.columns[-1])
    _refuse_empty(content.question + content.task, row_format.columns[0], "there is nothing to answer")
    if wording != "chat":
        return FormattedRow(wordings.apply_wording(content, wording, features.eos_token)._asdict())
    messages = wordings.to_messages(content)
    has_key = bool(content.reasoning and {*REASONING_KEYS} & {*features.template_features})
    if has_key:
        messages[-1] |= {"content": content.response, _REASONING: content.reasoning}
    if has_key or TEXT_THOUGHTS in features.template_features:
        return _format_chat(Chat(messages, []), wording, features)
    return FormattedRow(_make_chat_columns(messages, [], completion_length=1))


def _format_chat(chat: Chat, wording: str, features: TokenizerFeatures) -> FormattedRow:
    """Return a chat as prompt and completion: as messages, or as plain text in a wording. Raises FormatError."""
    if wording != "chat":
        if data_messages.UNTRAINED in chat.messages[-1]:
            problem = f"the last answer carries no loss, but wording {wording} trains only that answer"
            raise FormatError(problem, "Set `wording: chat`, or remove the row.", code="data.wording_mismatch")
        chat = data_messages.adapt_to_template(chat, {"system"})
        return FormattedRow(wordings.apply_wording(chat.messages, wording, features.eos_token)._asdict(), chat.as_text)
    chat = data_messages.adapt_to_template(chat, features.template_features)
    columns = _make_chat_columns(chat.messages, chat.tools, completion_length=chat.completion_length)
    return FormattedRow(columns, chat.as_text)


def _make_chat_columns(
    messages: list[Message], tools: list[dict[str, Any]], *, completion_length: int
) -> dict[str, Any]:
    """Return the columns of a chat whose last `completion_length` messages are the completion."""
    untrained = [n for n, message in enumerate(messages) if message.pop(data_messages.UNTRAINED, False)]
    prompt_length = len(messages) - completion_length
    return {
        "prompt": messages[:prompt_length],
        "completion": messages[prompt_length:],
        "tools": json.dumps(tools, ensure_ascii=False) if tools else None,
        data_messages.UNTRAINED: untrained or None,
    }


def _refuse_empty(content: str, column: str, reason: str = "there is nothing to learn") -> None:
    """Refuse a text of whitespace alone. Raises FormatError."""
    if not content.strip():
        raise FormatError(
            f"{column} is empty: {reason}", "Write text there, or remove the row.", code="data.empty_value"
        )


def _read_chat(row: Row, column: str) -> Chat:
    """Read a row of messages. Raises FormatError."""
    messages = _put_system_prompt(row, data_messages.read_messages(row, column), column)
    data_messages.check_messages(messages, column)
    return Chat(messages, data_messages.read_tools(row))


def _put_system_prompt(row: Row, messages: list[Message], column: str) -> list[Message]:
    """Return messages after the system prompt of the column `system`, as in LLaMA-Factory's data. Raises FormatError.

    A row may have its system prompt in both places, if it is the same.
    """
    if not row.get("system"):
        return messages
    value = row["system"]
    if isinstance(value, Mapping) and "parts" in value:  # Gemini's systemInstruction
        value = value["parts"]
    prompt = data_messages.read_content(value, "system") if isinstance(value, list) else read_text(row, "system")
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": prompt}, *messages]
    if messages[0]["content"].strip() != prompt.strip():
        problem = f"the column system and the first turn of {column} hold different system prompts"
        raise FormatError(problem, "Keep one of the two.", code="data.system_prompt")
    return messages


def _read_prompt_completion(row: Row) -> SingleTurn | Chat:
    """Read a row with a prompt and a completion, as texts or as messages. Raises FormatError."""
    if not isinstance(row.get("prompt"), list):
        return SingleTurn(read_text(row, "prompt"), "", read_text(row, "completion"))
    prompt = data_messages.read_messages(row, "prompt")
    completion = data_messages.read_messages(row, "completion")
    if completion[0]["role"] != "assistant":
        fix = "Begin the completion with an assistant turn, which carries the loss."
        raise FormatError(f"completion begins with {completion[0]['role']}", fix, code="data.turn_order")
    data_messages.check_messages(prompt + completion, "prompt with completion")
    return Chat(prompt + completion, data_messages.read_tools(row), len(completion))


def _read_alpaca(row: Row) -> SingleTurn | Chat:
    """Read a row of Alpaca, or of LLaMA-Factory's extension of it. Raises FormatError."""
    context = read_text(row, "input") if row.get("input") else ""
    turn = SingleTurn(read_text(row, "instruction"), context, read_text(row, "output"))
    if not row.get("system") and not row.get("history"):
        return turn
    # https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md, "Alpaca Format"
    return _add_history(row, turn)


def _read_question_answer(row: Row) -> SingleTurn:
    """Read a row of one question and one answer. Raises FormatError."""
    return SingleTurn(read_text(row, "question"), "", read_text(row, "answer"))


def _read_conversation(row: Row) -> SingleTurn | Chat:
    """Read the last turn of a conversation with its history. Raises FormatError."""
    turn = SingleTurn(read_text(row, "human"), "", read_text(row, "assistant"))
    if isinstance(row.get("history"), str):
        return turn._replace(history=row["history"].strip())
    return _add_history(row, turn)


def _read_task(row: Row) -> SingleTurn:
    """Read a row with a task; the source may name the task in place of the row. Raises FormatError."""
    context = read_text(row, "input") if row.get("input") else ""
    return SingleTurn("", context, read_text(row, "output"), task=read_text(row, "task") if "task" in row else "")


def _read_chain_of_thought(row: Row) -> SingleTurn:
    """Read a row with reasoning before the answer. Raises FormatError."""
    if not read_text(row, "reasoning").strip():
        fix = "Write text there, or rename the columns and set `format: question_answer`."
        raise FormatError("reasoning is empty", fix, code="data.empty_value")
    return SingleTurn(read_text(row, "problem"), "", read_text(row, "answer"), reasoning=row["reasoning"])


def _add_history(row: Row, turn: SingleTurn) -> Chat:
    """Return a chat of a row's `system`, its `history` and a last turn. Raises FormatError."""
    history = row.get("history") or []
    if not isinstance(history, list):
        fix = "Write a list of [human, assistant], or of {role, content}."
        raise FormatError(f"history is {type(history).__name__}, not a list", fix, code="data.wrong_type")
    messages: list[Message] = []
    for item in history:
        messages += _read_history_item(item)
    messages = _put_system_prompt(row, messages, "history")
    messages += wordings.to_messages(turn)
    data_messages.check_messages(messages, "history with this turn")
    return Chat(messages, [])


def _read_history_item(item: Any) -> list[Message]:
    """Return one item of a history as messages: [human, assistant], the same by name, or a turn. Raises FormatError."""
    if isinstance(item, list):
        if len(item) != 2:
            raise FormatError(
                f"history has a list of {len(item)} texts",
                "Write [human, assistant], two texts.",
                code="data.wrong_type",
            )
        item = {"human": item[0], "assistant": item[1]}
    if isinstance(item, Mapping) and {"human", "assistant"} <= set(item):
        return [
            {"role": "user", "content": read_text(item, "human")},
            {"role": "assistant", "content": read_text(item, "assistant")},
        ]
    return data_messages.read_messages({"history": [item]}, "history")


FORMATS: dict[str, RowFormat] = {
    "messages": RowFormat(("messages",), ("tools", "system"), "", lambda row: _read_chat(row, "messages")),
    "sharegpt": RowFormat(("conversations",), ("tools", "system"), "", lambda row: _read_chat(row, "conversations")),
    "prompt_completion": RowFormat(("prompt", "completion"), ("tools",), "plain", _read_prompt_completion),
    "alpaca": RowFormat(("instruction", "output"), ("input", "system", "history"), "alpaca", _read_alpaca),
    "question_answer": RowFormat(("question", "answer"), (), "question_answer", _read_question_answer),
    "conversation": RowFormat(("human", "assistant"), ("history", "system"), "conversation", _read_conversation),
    "task": RowFormat(("task", "input", "output"), (), "task", _read_task),
    "chain_of_thought": RowFormat(("problem", "reasoning", "answer"), (), "chain_of_thought", _read_chain_of_thought),
    "text": RowFormat(("text",), (), "plain", lambda row: read_text(row, "text")),
}
