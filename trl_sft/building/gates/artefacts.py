"""The gate `artefact`: what a generator or a template left in the answers.

In: a row. Out: the trace with its text: "As an AI language model", a special token, the next turn of a template, a
placeholder that was never filled. What the instruction itself holds is no trace. Not here:
refusals, which may be right.
"""

from __future__ import annotations

import re

from trl_sft.building.candidates import CandidateRow, Rejection
from trl_sft.building.gates.row_text import list_answers, quote

_SELF = re.compile(
    r"(?:^|[.!?\n] *)(?:(?:I'm|I am) sorry,? but )?(?:as|being) (?:an? )?(?:AI|artificial intelligence)"
    r"(?: language)?(?: model| assistant| chatbot)?\b[ ,]"
    r"|\bas an? (?:large )?language model,"
    r"|(?:^|[。！？\n])\s*(?:很?抱歉，)?作为(?:一个|一款|一名)?(?:AI|人工智能|大?语言模型)"
    r"|\bmy (?:knowledge cutoff|training data) (?:is|was|ends|only)\b",
    re.IGNORECASE,
)
_SELF_HINTS = ("as a", "being a", "as ai", "being ai", "作为", "my knowledge", "my training")  # in small letters
_TOKEN = re.compile(
    r"<\|[a-zA-Z_]+\|>|<\|im_(?:start|end)\|>|\[/?INST\]|<</?SYS>>|</s>|<s>(?=\s|$)|<(?:start|end)_of_turn>|<eos>|<bos>"
    r"|<｜[^<>]{1,30}｜>"
)
_NEXT_TURN = re.compile(
    r"^(?:### ?(?:Instruction|Response|Input|Human|Assistant|User)\s*:|(?:Human|USER|ASSISTANT|Assistant) ?: )",
    re.MULTILINE,
)
_PLACEHOLDER = re.compile(r"\{\{ ?[a-z_]{2,30} ?\}\}|<(?:insert|your) [a-z ]{2,30} here>|\bTODO: (?:fill|write|add)\b")
_ABOUT_MODELS = re.compile(
    r"\bAI\b|artificial intelligence|chat ?bot|language model|\bare you\b|\byour name\b"
    r"|\bwho (?:made|created|built|trained|developed) you\b|\babout you(?:rself)?\b|\bintroduce yourself\b"
    r"|\bwho you are\b|你叫什么|介绍一下你|自我介绍|人工智能|语言模型|你是",
    re.IGNORECASE,
)
_ABOUT_TEMPLATES = re.compile(
    r"jinja|mustache|handlebars|template|prompt|token|special|模板|HTML|XML|\btags?\b", re.IGNORECASE
)


class ArtefactGate:
    """Rejects rows whose answer speaks of the model that wrote it, or holds parts of a template."""

    name = "artefact"

    def check(self, row: CandidateRow) -> Rejection | None:
        """Check every answer."""
        asked = "\n".join(str(turn.get("content") or "") for turn in row.messages if turn.get("role") != "assistant")
        for answer in list_answers(row):
            lower = answer.lower()
            speaks = any(hint in lower for hint in _SELF_HINTS)
            if speaks and (found := _SELF.search(answer)) and not _ABOUT_MODELS.search(asked):
                return Rejection(self.name, f"the answer speaks of itself as a model: {_quote_around(answer, found)}")
            if _ABOUT_TEMPLATES.search(asked):
                continue
            patterns = (_TOKEN, "special token"), (_NEXT_TURN, "beginning of a turn"), (_PLACEHOLDER, "placeholder")
            for pattern, kind in patterns:
                found = pattern.search(answer)
                if found and found[0] not in asked:
                    return Rejection(
                        self.name, f"the answer holds a {kind} of a template: {_quote_around(answer, found)}"
                    )
        return None


def _quote_around(text: str, found: re.Match[str]) -> str:
    """Return a quotation of a text around a match."""
    return quote(text[max(0, found.start() - 10) : found.end() + 40].strip(" .\n"))
