"""An answer in parts, as a stream sends them: thought and answer apart, and nothing of a text that ends the answer.

Inputs: parts of the generated text. Outputs: `AnswerPart`s, whose texts put together are the thought and the answer of
`chat`. Deliberately not here: generation (`serving.answers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from trl_sft.serving.answers import split_thought
from trl_sft.tokenization.thinking import ThoughtMarks


class AnswerPart(NamedTuple):
    """The next characters of an answer."""

    thought: str
    text: str


class PartSplitter:
    """Turns the parts of a generated text into parts of thought and answer."""

    def __init__(self, marks: ThoughtMarks | None, *, is_open: bool, stops: Sequence[str]) -> None:
        """Take what the template writes around thoughts.

        Args:
            marks: None = the template has no thoughts.
            is_open: Whether the prompt has begun the thought.
            stops: Texts that end the answer.

        """
        self._marks = marks if marks is not None and marks.opening and marks.closing else None
        self._is_open, self._stops = is_open, stops
        self._generated, self._sent = "", AnswerPart("", "")

    def take(self, part: str) -> AnswerPart:
        """Return what can be sent after the next part of the generated text; the rest is held back."""
        self._generated += part
        waiting = 0
        if self._marks is not None:
            begun = self._generated.lstrip()
            if self._marks.opening.startswith(begun):
                return AnswerPart("", "")
            is_thought = self._is_open or begun.startswith(self._marks.opening)
            if is_thought and self._marks.closing not in begun:
                waiting = _count_waiting(self._generated, [self._marks.closing])
        whole = self._split(self._generated[: len(self._generated) - waiting])
        if cut := _count_waiting(whole.text, self._stops):
            whole = AnswerPart(whole.thought, whole.text[:-cut])
        return self._send(whole)

    def finish(self, thought: str, text: str) -> AnswerPart:
        """Return the rest of an answer. `thought`, `text`: of the whole answer."""
        return self._send(AnswerPart(thought, cut_at_stop(text, self._stops)))

    def _split(self, generated: str) -> AnswerPart:
        """Return thought and answer of the text so far."""
        thought, text = split_thought(self._marks, self._is_open, generated)
        return AnswerPart(thought, cut_at_stop(text, self._stops))

    def _send(self, whole: AnswerPart) -> AnswerPart:
        """Return what of the text so far was not sent yet."""
        before = self._sent
        part = AnswerPart(
            whole.thought[len(before.thought) :] if whole.thought.startswith(before.thought) else "",
            whole.text[len(before.text) :] if whole.text.startswith(before.text) else "",
        )
        self._sent = AnswerPart(before.thought + part.thought, before.text + part.text)
        return part


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the first of the texts that end it."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def _count_waiting(text: str, endings: Sequence[str]) -> int:
    """Return how many characters at the end of a text may be the beginning of an ending."""
    longest = 0
    for ending in endings:
        for length in range(min(len(ending) - 1, len(text)), longest, -1):
            if ending.startswith(text[-length:]):
                longest = length
                break
    return longest
