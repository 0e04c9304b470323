"""What a generator wrote for a turn of the user: labels are taken off, and what no person would write is named.

Inputs: the text of a turn, and the prompt after which it was written. Outputs: the request; why its row is not worth an
answer. The rules were made from replies of a real model, which often writes about its task in place of doing it. Not
here: whether a request is a good one, which a judge decides, and the gates of whole rows (`building.gates`).
"""

from __future__ import annotations

import functools
import re

from trl_sft.building.gates.row_text import quote
from trl_sft.building.templates import PLACEHOLDER
from trl_sft.evaluation import repetition

GATE = "request"
_COPIED_WORDS = {"en": 6, "zh": 12}  # of a prompt, one after the other; Chinese is counted in characters
_WORD = {"en": re.compile(r"[\w']+"), "zh": re.compile(r"\w")}
_KINDS = "question|request|task|problem|message|instruction|prompt|query"
_CHINESE_KINDS = "问题|请求|任务|题目|消息|指令|提问|请求内容"
# "Question:", "**Task 1:**", "Here is the request:" on a line of its own, "好的，以下是一个问题："
_LABEL = re.compile(
    rf"^[\s*_#>\"“]*(?:the )?(?:{_KINDS}|user|person)(?: \d+)?[*_]{{0,2}}\s*[:：][*_]{{0,2}}\s*"
    rf"|^[\s*_#]*(?:{_CHINESE_KINDS}|用户)[一二三\d]?[*_]{{0,2}}\s*[:：][*_]{{0,2}}\s*",
    re.IGNORECASE,
)
_LEAD_IN = re.compile(
    r"^(?:(?:sure|certainly|of course|absolutely|okay|ok|great)\b[^\n:.!]{0,40}[,.!:]\s*)?"
    r"(?:here(?:'s|’s| is| are)|this is|below is|the following is)(?: (?!my\b)[\w'-]+){0,6}? "
    rf"(?:{_KINDS}|version|conversation)s?\b[^\n:]{{0,80}}:[*_]{{0,2}}\s*\n+"
    r"|^(?:好的|当然|没问题)?[，,。！!]?\s*(?:以下|下面|这)是[^\n：:]{0,30}"
    rf"(?:{_CHINESE_KINDS}|版本)[^\n：:]{{0,20}}[：:]\s*",
    re.IGNORECASE,
)
_MOST_LABELS = 3
# A line that begins with the answer; a blank to fill in, and a question, are none.
_ANSWER = re.compile(
    r"^[\s*_#>-]*(?:(?:the )?(?:correct |final |right )?(?:answer|solution)(?: is)?[*_]{0,2}\s*[:：]"
    r"|here(?:'s|’s| is) the (?:answer|solution)\b|the (?:correct |final )?answer is\b"
    r"|(?:正确|最终)?(?:答案|解答)(?:是|为)?[*_]{0,2}\s*[:：])[*_]{0,2}\s*(?P<text>\S.*)?$"
    r"|^####\s*\S.*$",
    re.IGNORECASE | re.MULTILINE,
)
_WITHOUT_ANSWER = ("basic", "chain_of_thought")  # families in which the request alone is written
# The generator speaks to the person whose turn it writes.
_ASSISTANT = re.compile(
    r"\b(?:I'm|I’m|I am) (?:(?:here|ready|happy|glad|able) to (?:help|assist|support)"
    r"(?: you\b| with any\b|[.!,]|$)"
    r"|(?:an?|your) (?:[\w-]+ )?(?:AI|virtual|digital)(?:[ -][\w-]+)? assistant\b|the AI\b)"
    r"|\bthe AI is ready to (?:help|assist)\b|\bhow (?:can|may) I (?:help|assist) you\b"
    r"|\b(?:I'd|I’d|I would|I'll|I’ll) be (?:happy|glad) to (?:help|assist)\b"
    r"|我(?:很高兴|很乐意|可以|随时)(?:为您|为你|帮您|帮你)|有什么(?:可以|能)(?:帮您|帮你|帮助您|帮助你)|我是(?:一个|一名|您的|你的)?(?:AI|人工智能)",
    re.IGNORECASE,
)


def clean_request(text: str) -> str:
    """Return a request without a sentence that announces it, and without labels: `Question: `, `**Task:** `."""
    for _ in range(_MOST_LABELS):
        rest = _LABEL.sub("", _LEAD_IN.sub("", text.lstrip(), count=1), count=1).strip()
        if not rest or rest == text.strip():
            break
        text = rest
    return text.strip()


def find_problem(text: str, *, prompt: str, family: str, language: str) -> str:
    """Return why a request is not worth an answer; "" = nothing is known against it.

    Args:
        text: The request, cleaned.
        prompt: The text of the template after which it was written, with its placeholders.
        family: Of the template.
        language: en or zh.

    """
    if copied := _find_copy(text, prompt, language):
        return f"the request repeats the prompt that asked for it: {quote(copied)}"
    if family in _WITHOUT_ANSWER and (line := _find_answer(text)):
        return f"the request holds its answer: {quote(line)}"
    own = text.partition("\n\n")[0] if family == "task" else text  # the text that a task works on may be a letter
    if found := _ASSISTANT.search(own):
        return (
            f"the request is written as by the assistant: {quote(text[max(found.start() - 10, 0) : found.end() + 30])}"
        )
    if repetition.is_repeating(text):
        return f"the request repeats itself to its end: {quote(text[-60:])}"
    return ""


def _find_answer(text: str) -> str:
    """Return the line of a request that says its answer; "" = none does."""
    for match in _ANSWER.finditer(text):
        line = match[0].strip()
        is_label = line.rstrip("*_ ").endswith((":", "："))  # the answer is on the next line, or nowhere
        answer = text[match.end() :] if is_label else (match["text"] or line)
        if not line.endswith("?") and any(map(str.isalnum, answer)):
            return line
    return ""


def _find_copy(text: str, prompt: str, language: str) -> str:
    """Return the words of a prompt that a request repeats; "" = fewer than count."""
    size = _COPIED_WORDS[language]
    runs = _list_runs(prompt, language)
    words = list(_WORD[language].finditer(text.lower()))
    for start in range(len(words) - size + 1):
        part = words[start : start + size]
        if tuple(word[0] for word in part) in runs:
            return text[part[0].start() : part[-1].end()]
    return ""


@functools.cache
def _list_runs(prompt: str, language: str) -> frozenset[tuple[str, ...]]:
    """Return all runs of words in the parts of a prompt between its placeholders."""
    size, runs = _COPIED_WORDS[language], set()
    for part in PLACEHOLDER.sub("\0", prompt.lower()).split("\0"):
        words = _WORD[language].findall(part)
        runs |= {tuple(words[start : start + size]) for start in range(len(words) - size + 1)}
    return frozenset(runs)
