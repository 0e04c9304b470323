"""Rendered texts, which hold a question and its answer: how to split them so that the answer alone carries loss.

Inputs: texts of rows. Outputs: the mark after which the answer begins, and the instruction that splits each text there.
It is offered, never done: only the author of the texts knows what the mark means. Deliberately not here: the split
itself, which is the user's function (`user_function`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# What templates write directly before an answer, the most telling ones first
_MARKS = (
    *("<|start_header_id|>assistant<|end_header_id|>", "<|im_start|>assistant", "<start_of_turn>model"),
    *(
        "<|start_of_role|>assistant<|end_of_role|>",
        "<|assistant|>",
        "<|Assistant|>",
        "<|ASSISTANT|>",
        "<｜Assistant｜>",
    ),
    *("<|CHATBOT_TOKEN|>", "[/INST]", "### Response:", "### Assistant:", "### Answer:", "### Output:", "### 回答:"),
    *("### 答案:", "ASSISTANT:", "Assistant:", "assistant:", "Response:", "Answer:", "Output:"),
    *(
        "Completion:",
        "Solution:",
        "GPT:",
        "Bot:",
        "AI:",
        "<bot>:",
        "回答：",
        "回答:",
        "答案：",
        "答案:",
        "助手：",
        "答：",
        "A:",
    ),
)
_HEADING = re.compile(r"^#{2,4} [^\n:]{1,30}:?$", re.MULTILINE)  # a mark of the user's own: `### Translation:`
SAMPLE = 100  # texts that are searched
_SPEAKER = re.compile(
    r"^[ \t]*([A-Z][A-Za-z]*(?: [A-Z]+)?|用户|助手|问|答)[:：]", re.MULTILINE
)  # at the beginning of a line
_ASKING = frozenset({"user", "human", "question", "customer", "用户", "问"})
_ANSWERING = frozenset({"assistant", "gpt", "bot", "ai", "model", "agent", "answer", "助手", "答"})
_LONGEST_CHAT = 20_000  # characters that are searched
_MOST = 0.8  # the share of them that a mark has to stand in


def find_answer_mark(texts: Sequence[str]) -> str:
    """Return what stands before the answer in most texts, with the whitespace after it; "" = nothing does.

    Args:
        texts: the texts of rows, of which the first `SAMPLE` are searched.

    """
    sample = [text for text in texts[:SAMPLE] if text.strip()]
    if not sample:
        return ""
    for mark in (*_MARKS, *_find_headings(sample)):
        holders = [text for text in sample if text.rpartition(mark)[1] and text.rpartition(mark)[2].strip()]
        if len(holders) >= _MOST * len(sample):
            return mark + _find_spacing(holders, mark)
    return ""


def list_speakers(text: Any) -> str:
    """Return the speakers of a chat that is one text, `USER, ASSISTANT`; "" for another text.

    A chat has a line that begins with a speaker of questions, and one that begins with a speaker of answers.
    """
    if not isinstance(text, str):
        return ""
    names = list(dict.fromkeys(match[1] for match in _SPEAKER.finditer(text[:_LONGEST_CHAT])))
    lower = {name.lower() for name in names}
    return ", ".join(names) if lower & _ASKING and lower & _ANSWERING else ""


def write_split(mark: str) -> str:
    """Return the function, on one line of Python, that splits the text of a row after the last such mark."""
    literal = _quote(mark)
    return (
        f'def split(row): prompt, mark, answer = row["text"].rpartition({literal}); '
        'return {"prompt": prompt + mark, "completion": answer}'
    )


def advise_split(texts: Sequence[str], entry: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the instruction that makes the answer of rendered texts carry loss, and the source that it needs.

    Args:
        texts: the texts of the rows.
        entry: the source as the recipe has it, as a mapping.

    """
    mark = find_answer_mark(texts)
    new_entry = {key: value for key, value in entry.items() if key not in ("format", "wording")}
    new_entry |= {"format": "split.py:split" if mark else "FILE.py:FUNCTION", "wording": "plain"}
    if not mark:
        return (
            "Write each row as `prompt` and `completion` in the file, or with a function of your own that returns "
            '{"prompt": ..., "completion": ...}'
        ), new_entry
    return (
        f"Write split.py beside the recipe, with one line: `{write_split(mark)}`. It splits each text after {mark!r}; "
        "the answer then carries the loss"
    ), new_entry


def _find_headings(sample: Sequence[str]) -> list[str]:
    """Return the last headings of texts, the most frequent first."""
    last = [headings[-1] for text in sample if len(headings := _HEADING.findall(text)) > 1]
    return sorted(set(last), key=lambda heading: (-last.count(heading), heading))


def _find_spacing(texts: Sequence[str], mark: str) -> str:
    """Return the whitespace that stands after a mark in all texts; it belongs to the prompt."""
    spacings = set()
    for text in texts:
        answer = text.rpartition(mark)[2]
        spacings.add(answer[: len(answer) - len(answer.lstrip())])
    return spacings.pop() if len(spacings) == 1 else ""


def _quote(text: str) -> str:
    """Return a text as a Python literal in double quotes."""
    return '"' + repr(text + "'")[1:-2].replace('"', '\\"') + '"'
