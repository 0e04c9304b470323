"""The gate `artefact`: what a generator or a template left in the answers.

In: a row. Out: the trace with its text: "As an AI language model", a special token, the next turn of a template, a
placeholder that was never filled. What the instruction itself holds or asks for is no trace. Not here:
refusals, which may be right.
"""

from __future__ import annotations

import re

from trl_sft.building.candidates import CandidateRow, Rejection
from trl_sft.building.gates import request_kinds
from trl_sft.building.gates.row_text import list_answers, quote

_MODEL = (
    r"(?:AI|artificial intelligence|(?:large )?language model)(?: language)?(?: model| assistant| chatbot| system)?"
)
_CHINESE_MODEL = r"(?:AI|人工智能|大?语言模型)(?:大?语言模型|模型|助手|程序|系统|机器人)*"
# "As an AI, I ...": the clause is about the one who writes; "As AI models become cheaper" is not
_SELF = re.compile(
    r"(?:^|[.!?\n\"“] *)(?:(?:I'm|I’m|I am) sorry,? but )?(?:as|being|since I am|because I am) (?:an? )?"
    + _MODEL
    + r"(?:,| I\b| (?:developed|trained|created|made|built|designed|without|with|that|who|by)\b[^.!?\n]{0,80}?\bI\b)"
    r"|\bas an? (?:large |AI )?language model,"
    r"|(?:^|[。！？\n])\s*(?:很?抱歉，|对不起，)?作为(?:一个|一款|一名|一种)?" + _CHINESE_MODEL + r"[，,我]"
    r"|(?:^|[。！？，\n])\s*我(?:只)?是(?:一个|一款|一名)?" + _CHINESE_MODEL + r"[，,。]"
    r"|\bmy (?:knowledge cutoff|knowledge cut-off|training data (?:ends|only goes|goes up|was last))\b",
    re.IGNORECASE,
)
_SELF_HINTS = (
    "as a",
    "being a",
    "as ai",
    "i am a",
    "being ai",
    "作为",
    "我是",
    "我只是",
    "my knowledge",
    "my training",
)
# tokens that no text holds by itself; `<s>`, `<bos>` and the like count at the ends alone, where a template writes them
_TOKEN = re.compile(
    r"<\|[a-zA-Z_]+\|>|\[/INST\]|<<SYS>>|<(?:start|end)_of_turn>|<｜[^<>]{1,30}｜>"
    r"|^\s*(?:<s>(?=\s|$)|<bos>|\[INST\])|(?:</s>|<eos>|<pad>)\s*$|</s>\s*(?:<s>|\n)"
)
_STRUCK_OUT = re.compile(r"<s>.*?</s>", re.DOTALL)  # HTML
_HEADING = re.compile(r"^### ?(?:Instruction|Response|Human|Assistant|User)\s*:", re.MULTILINE)
# a turn has some words, so that `User: root` of a configuration is none
_NEXT_TURN = re.compile(
    r"(?<=\n)(?:(?:Human|USER|User|ASSISTANT|Assistant) ?: *(?=\S+ +\S+ +\S)|(?:用户|助手)[：:] *(?=\S{5}))"
)
_PLACEHOLDER = re.compile(
    r"(?<!\$)\{\{ ?[a-z_]{2,30} ?\}\}|<(?:insert|your) [a-z ]{2,30} here>|\bTODO: (?:fill|write|add)\b"
)
_CODE = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]+`", re.DOTALL)


class ArtefactGate:
    """Rejects rows whose answer speaks of the model that wrote it, or holds parts of a template."""

    name = "artefact"

    def check(self, row: CandidateRow) -> Rejection | None:
        """Check every answer."""
        for answer in list_answers(row):
            problem = _find_self(answer, row) or _find_template_part(answer, row)
            if problem:
                return Rejection(self.name, problem)
        return None


def _find_self(answer: str, row: CandidateRow) -> str:
    """Return where an answer speaks of its writer as a model; "" = nowhere, or the request is about models."""
    lower = answer.lower()
    if not any(hint in lower for hint in _SELF_HINTS):
        return ""
    found = _SELF.search(answer)
    if not found or request_kinds.MODELS.search(request_kinds.read_request(row)):
        return ""
    return f"the answer speaks of itself as a model: {_quote_around(answer, found)}"


def _find_template_part(answer: str, row: CandidateRow) -> str:
    """Return the part of a template in an answer; "" = there is none, or the request holds it or asks for such."""
    asked = ""
    for pattern, hints, kind, is_asked in _PARTS:
        found = pattern.search(answer) if any(hint in answer for hint in hints) else None
        if found is None:
            continue
        asked = asked or request_kinds.read_request(row)
        if found[0].strip() in asked or is_asked.search(asked) or not _counts(found, answer, kind):
            continue
        return f"the answer holds a {kind} of a template: {_quote_around(answer, found)}"
    return ""


def _counts(found: re.Match[str], answer: str, kind: str) -> bool:
    """Tell whether a match is a trace: no word of HTML that is struck out, and no placeholder in code."""
    if kind == "special token" and "</s>" in found[0]:
        return not (_STRUCK_OUT.search(answer) and answer.count("<s>") == answer.count("</s>"))
    if kind == "placeholder":
        return bool(_PLACEHOLDER.search(_CODE.sub(" ", answer)))
    return True


def _quote_around(text: str, found: re.Match[str]) -> str:
    """Return a quotation of a text around a match."""
    return quote(text[max(0, found.start() - 10) : found.end() + 40].strip(" .\n"))


_TOKEN_HINTS = ("<|", "INST]", "<<SYS>>", "_of_turn>", "<｜", "s>", "<bos>", "<eos>", "<pad>")
_TURN_HINTS = ("Human", "USER", "User", "ASSISTANT", "Assistant", "用户", "助手")
# a pattern, texts of which one stands in all that it matches, what it finds, and the requests that ask for it
_PARTS = (
    (_TOKEN, _TOKEN_HINTS, "special token", request_kinds.MARKUP),
    (_HEADING, ("###",), "beginning of a turn", request_kinds.HEADINGS),
    (_NEXT_TURN, _TURN_HINTS, "beginning of a turn", request_kinds.DIALOGUE),
    (_PLACEHOLDER, ("{{", "<insert", "<your", "TODO"), "placeholder", request_kinds.MARKUP),
)
