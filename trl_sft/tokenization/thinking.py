"""How answers begin under a template for thoughts: with a thought, with an empty one, or with none.

A model that thinks writes a thought before its answer: `<think>`, text, `</think>`. Templates differ in whether the
generation prompt opens the thought, closes it at once, or leaves it to the model, and whether answers in a chat keep
theirs. A model learns each beginning that its rows have, and inference shows it one prompt.

Inputs: a tokenizer with a chat template; rendered chats with the places where their prompts end. Outputs: the strings
around a thought, how each answer begins, and lines for the screen. Not here: which settings change it
(`training.thinking_choices`).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from trl_sft.data.messages import REASONING_KEYS
from trl_sft.tokenization import chat_template, template_variables
from trl_sft.tokenization.chat_template import ANSWER, QUESTION
from trl_sft.tokenization.template_variables import SwitchValue

# how an answer begins; the keys of `answers` in ledger.json
THOUGHT, EMPTY, SKIPPED, NONE = "with_thought", "with_empty_thought", "after_empty_thought", "without_thought"
BEGINNINGS = (THOUGHT, EMPTY, SKIPPED, NONE)
WORDS = {
    THOUGHT: "with a thought",
    EMPTY: "with an empty thought",
    SKIPPED: "after an empty thought that carries no loss",
    NONE: "without a thought",
}
_REASONING = "trlsftthought"
_DEFAULT = ("<think>", "</think>")
_VISIBLE = re.compile(r"\S")
# the tag before a thought: `<think>`, and with its name between two tokens `<|open|>think<|sep|>`
_LAST_TAG = re.compile(r"(?:<[^<>\s]{1,40}>\w*(?:think|thought|reason)\w*)?<[^<>\s]{1,40}>\w*\s*$")
_BEGUN_TAG = re.compile(r"<[^<>\s]{0,40}$")


@dataclass(frozen=True)
class ThoughtMarks:
    """What a template writes around a thought, without spaces at the ends.

    Attributes:
        opening: stands before a thought.
        closing: stands after it.
        generation_prompt: what the template writes after a question at inference.

    """

    opening: str
    closing: str
    generation_prompt: str

    def classify(self, text: str, start: int) -> str:
        """Return how the answer that generation begins at `start` begins: THOUGHT, EMPTY or NONE."""
        begin = self._find_thought(text, start)
        if begin < 0:
            return NONE
        end = text.find(self.closing, begin)
        return THOUGHT if end < 0 or text[begin:end].strip() else EMPTY

    def skip_empty(self, text: str, start: int) -> int:
        """Return where an answer goes on after an empty thought; `start` where it has none."""
        if self.classify(text, start) != EMPTY:
            return start
        end = text.find(self.closing, self._find_thought(text, start)) + len(self.closing)
        visible = _VISIBLE.search(text, end)
        return visible.start() if visible else len(text)

    def keep_one(self, text: str) -> str:
        """Return a rendered chat without the empty thoughts that the template writes before a thought of a row.

        Such a template does not render thoughts, so a row's thought is a part of its text: `<think></think>` of the
        template is followed by `<think>` of the row. Generation writes one.
        """
        twice = rf"{re.escape(self.opening)}\s*{re.escape(self.closing)}\s*(?={re.escape(self.opening)})"
        return re.sub(twice, "", text) if self.opening in text else text

    def _find_thought(self, text: str, start: int) -> int:
        """Return where the thought of an answer begins, after its opening; -1 = the answer has none."""
        if text[max(0, start - 200) : start].rstrip().endswith(self.opening):
            return start
        visible = _VISIBLE.search(text, start)
        begin = visible.start() if visible else len(text)
        return begin + len(self.opening) if text.startswith(self.opening, begin) else -1


def find_thought_marks(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> ThoughtMarks | None:
    """Return what a template writes around thoughts, found by rendering; None = it is no template for thoughts.

    Args:
        tokenizer: has a chat template.
        kwargs: what the template gets beside the messages.

    """
    question = [{"role": "user", "content": QUESTION}]
    after_question = _render(tokenizer, kwargs, question, prompt=True).rpartition(QUESTION)[2]
    prompt = after_question.removeprefix(_render(tokenizer, kwargs, question).rpartition(QUESTION)[2])
    for key in REASONING_KEYS:
        answer = {"role": "assistant", "content": ANSWER, key: _REASONING}
        text = _render(tokenizer, kwargs, [*question, answer])
        before, found, after = text.rpartition(QUESTION)[2].partition(_REASONING)
        if not found or ANSWER not in after:
            continue
        header = _common_length(before, after_question)
        header -= len(_find(_BEGUN_TAG, before[:header]))  # `<think>` and `</think>` have `<` in common
        opening = before[header:].strip() or _find(_LAST_TAG, before).strip()
        closing = after.partition(ANSWER)[0].strip()
        if opening and closing:
            return ThoughtMarks(opening, closing, prompt)
    source = chat_template.read_template(tokenizer)
    if any(tag in source for tag in _DEFAULT):
        return ThoughtMarks(*_DEFAULT, prompt)
    return None


def find_switches(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> dict[str, tuple[SwitchValue, ...]]:
    """Return the variables of a template that change what it writes around thoughts, each with the values that do.

    The variables are those that the template reads and does not set, and whose name is about thinking. A value is left
    out where the recipe sets it, and where it renders what the template renders now, or what a value before it renders.

    Args:
        tokenizer: has a chat template.
        kwargs: what the template gets beside the messages.

    """
    switches: dict[str, tuple[SwitchValue, ...]] = {}
    now = _render_trials(tokenizer, kwargs)
    for name, values in template_variables.list_switches(chat_template.read_template(tokenizer)).items():
        changed: list[tuple[SwitchValue, list[str]]] = []
        for value in values:
            texts = _render_trials(tokenizer, {**kwargs, name: value})
            if _differ(now, texts) and texts not in [earlier for _, earlier in changed]:
                changed.append((value, texts))
        if changed:
            switches[name] = tuple(value for value, _ in changed)
    return switches


def count_beginnings(answers: Mapping[str, int]) -> int:
    """Return in how many ways the trained part of answers begins."""
    return sum(bool(answers.get(kind)) for kind in (THOUGHT, EMPTY, NONE))


def describe(marks: ThoughtMarks | None, answers: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Yield lines for the screen: how the answers with loss begin, and what inference begins with.

    Args:
        marks: what the template writes around thoughts; None = it is no template for thoughts.
        answers: how many answers begin in each of `BEGINNINGS`.

    """
    if marks is None:
        return
    kinds = [kind for kind in BEGINNINGS if answers.get(kind)]
    counts = ", ".join(f"{answers[kind]:,} {WORDS[kind]}" for kind in kinds)
    yield "thoughts", f"answers with loss begin: {counts}; the generation prompt is {marks.generation_prompt!r}"
    if count_beginnings(answers) > 1:
        choices = "run `preview --compare` to see what each setting trains"
        yield "thoughts", f"the model learns {count_beginnings(answers)} beginnings for the same prompt; {choices}"


def _render(
    tokenizer: PreTrainedTokenizerBase,
    kwargs: Mapping[str, Any],
    messages: Sequence[Mapping[str, Any]],
    *,
    prompt: bool = False,
) -> str:
    """Return a trial chat as text; "" where the template refuses it."""
    with contextlib.suppress(Exception):  # a template raises what it likes
        turns = [dict(message) for message in messages]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt, **kwargs))
    return ""


def _render_trials(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> list[str]:
    """Return what a template writes for chats with and without thoughts, and as generation prompt."""
    question, answer = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
    thoughtful = [answer | {key: _REASONING} for key in REASONING_KEYS] + [
        answer | {"content": f"<think>\nt\n</think>\n\n{ANSWER}"}
    ]
    chats = [[question, first, question, answer] for first in (answer, *thoughtful)]
    return [_render(tokenizer, kwargs, [question], prompt=True), *(_render(tokenizer, kwargs, chat) for chat in chats)]


def _differ(now: Sequence[str], changed: Sequence[str]) -> bool:
    """Tell whether trial chats are rendered differently; not where a template refuses one that it renders now."""
    return list(now) != list(changed) and all(text or not before for before, text in zip(now, changed, strict=True))


def _find(pattern: re.Pattern[str], text: str) -> str:
    """Return the part of a text that a pattern matches first; "" = none."""
    match = pattern.search(text)
    return match.group() if match else ""


def _common_length(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their beginning."""
    pairs = zip(one, other, strict=False)
    return next((position for position, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
