"""Column names that data sets of this field use, and what they mean: the `rename:` that makes them fit a row format.

Inputs: the names of the columns of a source. Outputs: a `FormatSuggestion`, a format with the renames that it needs, or
none. It is offered in a message, and `init` writes it with a comment; nothing is renamed without the recipe saying so.
Deliberately not here: the formats themselves (`formats`), and rows.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from trl_sft.data.turn_shapes import ROLE_KEYS

# What a column means -> the names that data sets give it, the usual ones first; in lower case, words joined by _
_NAMES: dict[str, tuple[str, ...]] = {
    "question": (
        *("question", "query", "prompt", "instruction", "problem", "user", "human", "input", "q", "ask", "request"),
        *("user_input", "user_message", "user_prompt", "task_description", "inputs", "questions", "prompts", "source"),
        *("问题", "提问", "指令", "输入", "问", "用户", "問題", "提問", "指示", "質問", "질문", "frage", "pregunta"),
        *("pergunta", "domanda", "вопрос", "запрос", "سؤال"),
    ),
    "answer": (
        *("answer", "response", "completion", "output", "assistant", "gpt", "bot", "reply", "solution", "target", "a"),
        *("ai", "model", "outputs", "answers", "responses", "completions", "targets", "generation"),
        *("assistant_message", "model_response", "ground_truth", "chatgpt", "targets_pretokenized"),
        *(
            "答案",
            "回答",
            "回复",
            "输出",
            "答复",
            "答",
            "助手",
            "回覆",
            "輸出",
            "解答",
            "応答",
            "답변",
            "대답",
            "antwort",
        ),
        *("respuesta", "réponse", "reponse", "resposta", "risposta", "ответ", "إجابة"),
    ),
    "context": (
        *(
            "context",
            "input",
            "passage",
            "document",
            "background",
            "contexts",
            "article",
            "知识",
            "上下文",
            "背景",
            "输入",
        ),
        *("材料", "contexto", "kontext", "контекст", "文脈"),
    ),
    "system": ("system", "system_prompt", "system_message", "sys", "系统", "系统提示", "系统提示词", "系統"),
    "summary": ("summary", "highlights", "abstract", "tldr", "tl_dr", "headline", "summaries", "摘要", "总结", "要約"),
    "history": ("history", "chat_history", "历史", "对话历史", "歷史"),
    "reasoning": (
        *("reasoning", "thinking", "thought", "thoughts", "cot", "complex_cot", "chain_of_thought", "rationale"),
        *("reasoning_content", "think", "reasoning_trace", "思考", "推理", "思维链", "推理过程", "思考过程"),
    ),
    "messages": (
        *("messages", "conversations", "conversation", "message", "chat", "chats", "dialog", "dialogue", "dialogs"),
        *("dialogues", "turns", "chat_messages", "conversation_history", "对话", "会话", "聊天", "對話"),
    ),
    "text": (
        *(
            "text",
            "content",
            "contents",
            "body",
            "document",
            "documents",
            "article",
            "passage",
            "raw_content",
            "raw_text",
        ),
        *(
            "page_content",
            "texts",
            "story",
            "paragraph",
            "文本",
            "内容",
            "正文",
            "內容",
            "文章",
            "テキスト",
            "본문",
            "текст",
        ),
    ),
}
# The words by which the pair of a question and its answer is a chat of `human` and `assistant`
_SPEAKERS = {"human", "user", "assistant", "gpt", "bot", "ai", "model", "chatgpt"}
_PROMPTS = {"prompt", "prompts", "user_prompt", "completion", "completions"}
_INSTRUCTIONS = {"instruction", "指令", "指示"}
# Columns that a tokenizer or a collator makes, of TRL, transformers, axolotl, verl and torchtune
_TOKEN_NAMES = {
    *("input_ids", "labels", "attention_mask", "token_type_ids", "position_ids", "special_tokens_mask", "tokens"),
    *("token_ids", "ids", "mask", "loss_mask", "completion_mask", "assistant_masks", "assistant_mask", "seq_lengths"),
    *("prompt_ids", "completion_ids", "prompt_input_ids", "response_ids", "target_ids", "label_ids", "input_tokens"),
}
_NUMBERS = re.compile(r"[\[\]\d\s,-]*\d[\[\]\d\s,-]*")


class FormatSuggestion(NamedTuple):
    """A row format that columns fit once some of them are renamed."""

    format: str  # a key of `formats.FORMATS`
    rename: dict[str, str]  # column of the file -> column of the format; {} = none has to be renamed
    is_known: bool  # whether the names are those of the field; False = only that there are two columns


def suggest_format(columns: Sequence[str], row: Mapping[str, Any] = MappingProxyType({})) -> FormatSuggestion | None:
    """Return the format that columns most likely have, with the renames that make them fit.

    Args:
        columns: the names of the columns, as the file has them.
        row: one of the rows, whose values tell a chat from a text; {} = the names alone decide.

    Returns:
        None = the names say nothing, and there are not two of them.

    """
    if not columns:
        return None
    meanings = {meaning: column for meaning in _NAMES if (column := _find_column(columns, meaning))}
    _match_chat(columns, meanings, row)
    solution = next((column for column in columns if normalise(column) == "solution"), "")
    if solution and "reasoning" not in meanings and meanings.get("answer") != solution:  # the steps, then the result
        meanings["reasoning"] = solution
    preference = _suggest_preferred(columns, meanings)
    suggestion = preference or _suggest_by_meaning(columns, meanings)
    if suggestion is None and len(columns) == len(("question", "answer")) and "system" not in meanings:
        return _make_suggestion("question_answer", {columns[0]: "question", columns[1]: "answer"}, is_known=False)
    return suggestion


def _match_chat(columns: Sequence[str], meanings: dict[str, str], row: Mapping[str, Any]) -> None:
    """Correct the meanings of columns by what a row has in them: turns are no text, and a text is no chat."""
    if isinstance(text := row.get(meanings.get("messages", "")), str) and not text.lstrip().startswith(("[", "{")):
        meanings.setdefault("context", meanings.pop("messages"))
    if "messages" in meanings or {"question", "answer"} <= set(meanings):
        return
    chat = next((column for column in columns if is_chat(row.get(column))), "")
    if chat:
        meanings["messages"] = chat


def is_chat(value: Any) -> bool:
    """Tell whether a value is a list of turns, or the mapping of lists in which `datasets` stores one."""
    if isinstance(value, Mapping):
        return any(isinstance(value.get(key), list) for key in ROLE_KEYS)
    is_list = isinstance(value, list) and len(value) > 0
    return is_list and all(isinstance(turn, Mapping) and not set(ROLE_KEYS).isdisjoint(turn) for turn in value)


def list_token_columns(columns: Iterable[str], row: Mapping[str, Any]) -> list[str]:
    """Return the columns that hold token ids, or a mask of them, as a tokenizer made them; [] = there are none.

    Args:
        columns: the names of the columns of the source.
        row: one of the rows; a column counts by its name and by the whole numbers that the row has in it.

    """
    named = [column for column in columns if normalise(column) in _TOKEN_NAMES]
    return named if any(_are_ids(column, row.get(column)) for column in named) else []


def _are_ids(column: str, value: Any) -> bool:
    """Tell whether a value is a list of token ids, or in a table its text."""
    if isinstance(value, str):
        return normalise(column).endswith(("input_ids", "token_ids")) and _NUMBERS.fullmatch(value) is not None
    return isinstance(value, list) and _are_numbers(value)


def _are_numbers(values: Sequence[Any]) -> bool:
    """Tell whether a list holds whole numbers, or lists of them, and nothing else."""
    return len(values) > 0 and all(
        (type(value) is int) or (isinstance(value, list) and _are_numbers(value)) for value in values
    )


def suggest_column(columns: Iterable[str], target: str) -> str:
    """Return the column that most likely is what a format calls `target`; "" = none.

    Args:
        columns: the names of the columns of the source.
        target: a column of a format, as output.

    """
    meaning = next((meaning for meaning, names in _NAMES.items() if target in names), "")
    return _find_column(list(columns), meaning) if meaning else ""


def _suggest_preferred(columns: Sequence[str], meanings: dict[str, str]) -> FormatSuggestion | None:
    """Return the format of preference data of which the preferred answers are trained; None = it is none."""
    names = {normalise(column): column for column in columns}
    if not {"chosen", "rejected"} <= set(names):
        return None
    if "question" not in meanings:
        return _make_suggestion("messages", {names["chosen"]: "messages"}, is_known=False)
    pair = {meanings["question"]: "prompt", names["chosen"]: "completion"}
    return _make_suggestion("prompt_completion", pair, is_known=False)


def _suggest_by_meaning(columns: Sequence[str], meanings: dict[str, str]) -> FormatSuggestion | None:
    """Return the format that the meanings of columns name; None = they name none."""
    question, answer = meanings.get("question"), meanings.get("answer")
    source = meanings.get("text") or meanings.get("context")
    if "summary" in meanings and "answer" not in meanings and source:  # nothing says that the summary is to be trained
        pair = {source: "question", meanings["summary"]: "answer"}
        return _make_suggestion("question_answer", pair, is_known=False)
    if "messages" in meanings:
        return _make_suggestion("messages", {meanings["messages"]: "messages"})
    if question and answer and question != answer:
        return _suggest_pair(meanings, question, answer)
    others = {column for meaning, column in meanings.items() if meaning not in ("text", "context")}
    if "text" in meanings and not others - {meanings["text"]}:
        return _make_suggestion("text", {meanings["text"]: "text"})
    return None if len(columns) > 1 else _make_suggestion("text", {columns[0]: "text"}, is_known=False)


def _suggest_pair(meanings: dict[str, str], question: str, answer: str) -> FormatSuggestion:
    """Return the format of a question and an answer, with what else stands beside them."""
    context = meanings.get("context")
    if context in (question, answer):
        context = None
    names = {normalise(question), normalise(answer)}
    reasoning = meanings.get("reasoning")
    if reasoning and not context and reasoning not in (question, answer):
        pair = {question: "problem", reasoning: "reasoning", answer: "answer"}
        return _make_suggestion("chain_of_thought", pair)
    if context or names & _INSTRUCTIONS or "system" in meanings or "history" in meanings:
        columns = {question: "instruction", answer: "output"}
        for meaning, target in (("context", "input"), ("system", "system"), ("history", "history")):
            if meaning in meanings and meanings[meaning] not in (question, answer):
                columns[meanings[meaning]] = target
        return _make_suggestion("alpaca", columns)
    if normalise(question) in _SPEAKERS and normalise(answer) in _SPEAKERS:
        return _make_suggestion("conversation", {question: "human", answer: "assistant"})
    if names & _PROMPTS:
        return _make_suggestion("prompt_completion", {question: "prompt", answer: "completion"})
    return _make_suggestion("question_answer", {question: "question", answer: "answer"})


def _make_suggestion(format_name: str, columns: dict[str, str], *, is_known: bool = True) -> FormatSuggestion:
    """Return a suggestion that renames what has another name."""
    rename = {old: new for old, new in columns.items() if old != new}
    return FormatSuggestion(format_name, rename, is_known)


def _find_column(columns: Sequence[str], meaning: str) -> str:
    """Return the column of a meaning: by its whole name, in the order of the usual names, else by one of its words."""
    names = {normalise(column): column for column in reversed(columns)}
    names |= {column.strip().casefold(): column for column in columns}
    for name in _NAMES[meaning]:
        if name in names:
            return names[name]
    if meaning in ("messages", "text", "history", "summary"):
        return ""
    for column in columns:
        if normalise(column).endswith(_list_joined(meaning)):
            return column
    words = set(_NAMES[meaning][:_WORDS])
    for column in columns:
        if words & set(normalise(column).split("_")[-1:]) or words & set(normalise(column).split("_")[:1]):
            return column
    return ""


@functools.cache
def _list_joined(meaning: str) -> tuple[str, ...]:
    """Return the names of a meaning in scripts that write no spaces, which may end a longer name: 用户问题."""
    return tuple(name for name in _NAMES[meaning] if len(name) > 1 and "\u3040" <= name[0] <= "\u9fff")


_WORDS = 9  # of the usual names of a meaning: also as the first or the last word of a longer name (`final_answer`)


def normalise(column: str) -> str:
    """Return a name in lower case with its words joined by _: `User Message` and `userMessage` -> user_message."""
    text = unicodedata.normalize("NFKC", column).strip().strip("\ufeff")
    text = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", text)
    return re.sub(r"\W+", "_", text).strip("_").casefold()
