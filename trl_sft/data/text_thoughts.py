"""Thoughts that stand in the text of an answer, as DeepSeek-R1 writes them: `<think>`, thought, `</think>`, answer.

Input: a turn of the assistant. Output: the turn with the thought under its key, for a template with its own form of
thoughts: gpt-oss' writes them into a channel. Not here: which template has one (`tokenization.chat_template`).
"""

from __future__ import annotations

import re
from typing import Any

# among the features of a template: it renders thoughts under a key, and those in the text of an answer as that text
TEXT_THOUGHTS = "thoughts in the text"

_THOUGHT_AS_TEXT = re.compile(r"\s*<think>\s*(\S.*?)\s*</think>\s*(\S.*)", re.DOTALL)


def take_out_thought(message: dict[str, Any]) -> None:
    """Move a thought before the text of an answer to `reasoning_content`; a turn that has that key stays as it is."""
    if message["role"] != "assistant" or "reasoning_content" in message:
        return
    thought = _THOUGHT_AS_TEXT.fullmatch(message["content"] or "")
    if thought is not None:
        message |= {"reasoning_content": thought[1], "content": thought[2]}
