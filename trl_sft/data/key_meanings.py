"""What the name of a column, or of a key of a turn, says that its value means for training.

Inputs: a key that no format reads, and its value. Outputs: the meaning that would be lost, or none. `MEANINGS` is the
one table; a name in any case and with other words beside it is found (`chat_history`, `trainOnTurn`, `lossmask`).
Deliberately not here: keys that a format reads (`formats`, `messages`), and what the run does about it (`pipeline`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from trl_sft.data.column_names import normalise
from trl_sft.data.turn_shapes import find_role

# Meanings. LOSS: whether, or how much, a row or a turn is trained. The others: what the model gets beside the question.
LOSS, SYSTEM, CONTEXT, HISTORY, TOOLS, REASONING, MEDIA, TEMPLATE, SPEAKER, ANSWER = (
    *("the loss", "a system prompt", "a context", "a history", "tools", "reasoning", "images, audio or video"),
    *("variables of the chat template", "who speaks", "an answer"),
)
# Columns that are an answer beside a text; beside a question and an answer of other names they describe these
ANSWER_NAMES = frozenset(
    (
        *(
            "answer",
            "answers",
            "response",
            "responses",
            "completion",
            "output",
            "outputs",
            "target",
            "targets",
            "reply",
        ),
        *("solution", "summary", "highlights", "答案", "回答", "回复", "输出", "摘要", "总结"),
    )
)
# Meaning -> the words that name it, in lower case and in the singular. A name has the meaning if one of its words does.
MEANINGS: dict[str, tuple[str, ...]] = {
    LOSS: (
        *("loss", "mask", "masked", "unmasked", "train", "trained", "trainable", "training", "untrained"),
        *("learn", "learned", "learnable", "weight", "supervised", "权重", "损失", "掩码", "训练"),
    ),
    SYSTEM: (
        *("system", "sys", "sysprompt", "developer", "preamble", "persona", "instruction"),
        *("系统", "系统提示", "系统提示词", "系統", "人设"),
    ),
    CONTEXT: (
        *("context", "ctx", "background", "input", "document", "doc", "passage", "paragraph", "article", "abstract"),
        *("evidence", "knowledge", "retrieval", "retrieved", "reference_text", "transcript", "story", "excerpt"),
        *("schema", "ddl", "table", "choice", "option", "hint", "premise"),
        *("上下文", "背景", "材料", "知识", "文档", "选项", "输入"),
    ),
    HISTORY: (
        *("history", "historie", "conversation", "dialog", "dialogue", "message", "turn", "历史", "对话历史", "歷史"),
    ),
    TOOLS: ("tool", "function", "api", "plugin", "工具", "函数"),
    REASONING: (
        *("reasoning", "thinking", "think", "thought", "cot", "rationale", "scratchpad", "chainofthought"),
        *("思考", "推理", "思维链", "推理过程", "思考过程"),
    ),
    MEDIA: ("image", "img", "picture", "photo", "audio", "video", "pixel", "图片", "图像", "音频", "视频"),
}
# Names that have a meaning as a whole, and not as a word of a longer name
_WHOLE_NAMES = {"text": CONTEXT, "content": CONTEXT, "body": CONTEXT, "labels": LOSS, "speech": MEDIA}
_WHOLE_NAMES |= dict.fromkeys(
    ("chat_template_kwargs", "template_kwargs", "enable_thinking", "thinking_mode"), TEMPLATE
)  # whether an answer is a good one (KTO), in which part of an answer a text stands (gpt-oss), whose turn a row is
_WHOLE_NAMES |= {"label": LOSS, "channel": REASONING, "role": SPEAKER}
# Words of flags that leave a row or a turn out, or keep it; they have a meaning as `true`, `false`, 1 or 0 alone
_FLAGS = ("skip", "ignore", "exclude", "excluded", "include", "keep", "drop", "chosen", "rejected", "selected")
# A name that ends with one of these describes the thing and does not hold it: context_length, tool_id
_DESCRIBING = {
    *("id", "ids", "uid", "uuid", "name", "title", "length", "len", "count", "size", "type", "kind", "source", "url"),
    *("uri", "link", "path", "file", "filename", "lang", "language", "time", "timestamp", "date", "hash", "version"),
    *("score", "rating", "token", "tokens", "split", "category", "topic", "tag", "tags", "author", "model", "index"),
    *("idx", "format", "encoding", "status", "level", "stage", "effort", "budget", "cutoff", "by", "role", "num"),
    *(
        "domain",
        "subject",
        "license",
        "quality",
        "lengths",
        "counts",
        "names",
        "types",
        "urls",
        "set",
        "dataset",
        "fingerprint",
    ),
}
_FILES = {"url", "uri", "link", "path", "file", "filename", "name"}  # a picture is often stored as one of these
_COUNTING = {"num", "n", "number", "count", "total", "has", "max", "min"}  # a name that begins with one counts things
_OTHER_MASKS = {"attention", "padding", "pad", "causal"}  # masks that say nothing about the loss
# Words that stand beside the words of a meaning in names without separators: systemprompt, chathistory
_FILLERS = (
    *("prompt", "chat", "message", "text", "turn", "on", "is", "do", "the", "of", "available", "has", "user", "model"),
    *("assistant", "instruction", "content", "list", "call", "used", "data", "compute", "with", "previous", "step"),
)
# What a flag or a weight says by itself: words by which 1 means that the loss is there, and by which 1 takes it away
_WITH_LOSS = {"loss", "train", "trained", "trainable", "training", "learn", "learned", "learnable", "weight"}
_WITH_LOSS |= {"unmasked", "supervised", "include", "keep", "chosen", "selected"}
_WITHOUT_LOSS = {"masked", "untrained", "skip", "ignore", "exclude", "excluded", "drop", "rejected"}
_WITHOUT_LOSS |= {"no", "not", "non", "without", "never", "dont", "disable", "disabled", "unsupervised"}
_EMPTY_TEXTS = {"", "[]", "{}", "null", "none", "nan", '""'}  # what a cell of a table holds that has no value
_TRUE, _FALSE = {"true", "1", "1.0", "yes"}, {"false", "0", "0.0", "no"}
# Keys of nested mappings whose values are names, not content
_NAMING_KEYS = {"role", "from", "speaker", "type", "id"}
_WORD_MEANINGS = {word: meaning for meaning, words in MEANINGS.items() for word in words}
_JOINED = re.compile(
    "(?:" + "|".join(sorted(map(re.escape, (*_WORD_MEANINGS, *_FILLERS)), key=len, reverse=True)) + ")+?$"
)
_PIECE = re.compile("|".join(sorted(map(re.escape, (*_WORD_MEANINGS, *_FILLERS)), key=len, reverse=True)))


def find_meaning(name: str) -> str:
    """Return what the value of a column or key means, by its name; "" = nothing that training would miss."""
    return _find_meaning(name)[0]


def carries_meaning(name: str, value: Any, *, row_text: str = "") -> bool:
    """Tell whether a key that nothing reads holds something that training would miss.

    Nothing is missed where the value is empty, where it says what holds anyway (`train: true`), or where its text also
    stands in what is read, or contains it.

    Args:
        name: the column, or the key of a turn.
        value: its value.
        row_text: the texts of the row that are read.

    """
    meaning, is_flag = _find_meaning(name)
    if not meaning or _is_empty(value):
        return False
    whole = normalise(name)
    if whole == "label":  # other labels are classes
        return value is False
    if whole == "channel":
        return value in ("analysis", "commentary")
    if meaning == SPEAKER:
        return find_role(value) is not None
    if meaning == LOSS:
        return _changes_loss(name, value, is_flag=is_flag)
    if meaning in (MEDIA, TEMPLATE):
        return True
    if meaning == TOOLS:
        return not isinstance(value, bool | int | float)  # parallel_tool_calls: true
    texts = [text.strip() for text in _iterate_content(value) if text.strip()]
    if not texts:  # a number, or a switch: context: 4096
        return False
    if row_text and all(text in row_text for text in texts):
        return False
    parts = [part.strip() for part in row_text.split("\0") if part.strip()]
    return not (parts and all(any(part in text for text in texts) for part in parts))


@functools.lru_cache(maxsize=4096)
def _find_meaning(name: str) -> tuple[str, bool]:
    """Return the meaning of a name, and whether only its flags count (`skip`, `chosen`)."""
    whole = normalise(name)
    if whole in _WHOLE_NAMES:
        return _WHOLE_NAMES[whole], False
    words = _split_words(whole)
    if words and words[-1] in _FILES and MEDIA in map(_find_word, words):
        return MEDIA, False
    if not words or words[-1] in _DESCRIBING or words[0] in _COUNTING or _OTHER_MASKS & set(words):
        return "", False
    meanings = [meaning for word in words if (meaning := _find_word(word))]
    if LOSS in meanings:
        return ("", False) if words[-1] == "data" else (LOSS, False)
    if meanings:
        return _choose(meanings), False
    return (LOSS, True) if set(words) & set(_FLAGS) else ("", False)


def _choose(meanings: list[str]) -> str:
    """Return the meaning of a name with words of several: `system_message` is a system prompt, not a history."""
    precise = [meaning for meaning in meanings if meaning not in (HISTORY, CONTEXT)]
    return (precise or meanings)[0]


def _split_words(name: str) -> list[str]:
    """Return the words of a normalised name; a word without separators is split where known words fill it."""
    words: list[str] = []
    for word in name.split("_"):
        if word and not _find_word(word) and _JOINED.match(word):
            words += _PIECE.findall(word)
        elif word:
            words.append(word)
    return words


def _find_word(word: str) -> str:
    """Return the meaning of a word in the singular or the plural; "" = none."""
    return _WORD_MEANINGS.get(word) or _WORD_MEANINGS.get(word.removesuffix("s")) or ""


def _is_empty(value: Any) -> bool:
    """Tell whether a value holds nothing: null, an empty text or list, or a list or mapping of such values."""
    if value is None:
        return True
    if isinstance(value, str):
        return value.strip().casefold() in _EMPTY_TEXTS
    if isinstance(value, Mapping):
        return all(_is_empty(item) for item in value.values())
    return isinstance(value, list | tuple) and all(_is_empty(item) for item in value)


def _changes_loss(name: str, value: Any, *, is_flag: bool) -> bool:
    """Tell whether a value says something else about the loss than that all of it is there."""
    words = set(_split_words(normalise(name)))
    number = _read_flag(value)
    if is_flag and number is None:
        return False
    if "mask" in words or number is None:  # a mask is written in both ways: 1 keeps a token, or hides it
        return True
    if words & _WITHOUT_LOSS:
        return number
    return not number if words & _WITH_LOSS else True


def _read_flag(value: Any) -> bool | None:
    """Return what a flag says: true, false, 1 and 0, also as text; None = it is something else."""
    text = str(value).strip().casefold()
    if text in _TRUE:
        return True
    return False if text in _FALSE else None


def _iterate_content(value: Any) -> Iterator[str]:
    """Yield the texts of a value, without names of roles and types."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key not in _NAMING_KEYS:
                yield from _iterate_content(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _iterate_content(item)
