"""Which characters of a rendered chat carry loss: from the end of the prompt of inference to the end of the turn.

In: the turns of a chat and their whole rendering. Out: spans of characters, one for each assistant turn
that is learned. They are found by rendering parts of the chat, so any template can be trained with, marked
or not. Deliberately absent: tokens (`tokens`), and which turns are learned (`data.loss_on`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from trl_sft.data.messages import Message, special_pattern
from trl_sft.tokenization import chat_template, special_tokens

Span = tuple[int, int]  # of characters, the second excluded
# messages, tools, whether the prompt of an answer follows -> text
Render = Callable[[Sequence[Message], Sequence[Any] | None, bool], str]

_PLAIN = 2  # keys of a turn that has role and content alone
_ASKS, _ANSWERS = "trlsftasks", "trlsftanswers"  # words that no template writes


class Unclear(ValueError):
    """The loss of a row cannot be placed: what was found, what to write, and how the user can accept it."""

    def __init__(self, problem: str, fix: str, allow: str = "") -> None:
        """Keep the parts for the fault that the caller builds."""
        self.problem, self.fix, self.allow = problem, fix, allow
        super().__init__(problem)


class Template(NamedTuple):
    """A chat template, as far as masks need to know it."""

    render: Render
    specials: tuple[str, ...]  # strings that are one special token each
    mismatch: bool  # whether a prompt that inference renders otherwise is accepted
    header: str = ""  # what stands before every answer; "" where that was not found to be one string
    closing: str = ""  # what ends an answer that is followed by another turn
    final: str = ""  # what ends the last answer


def template(tokenizer: PreTrainedTokenizerBase, keywords: dict[str, Any], mismatch: bool = False) -> Template:
    """Return what a tokenizer's template writes around answers, found by trial; `keywords` are handed to it."""

    def render(messages: Sequence[Message], tools: Sequence[Any] | None, prompt: bool) -> str:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt, **keywords
            )
        )

    shape = Template(render, special_tokens.strings(tokenizer), mismatch)
    turns = [{"role": role, "content": words} for role, words in (("user", _ASKS), ("assistant", _ANSWERS))] * 2
    try:
        plain, asked = render(turns[:1], None, False), render(turns[:1], None, True)
        text = render(turns, None, False)
        (_, middle), (_, last) = exact(shape, text, turns, None, (1, 3))
    except Exception:  # a template of a kind that the trial does not fit: every row is then rendered in parts
        return shape
    at = alike(plain, asked)
    # a template that ends a text with a token of its own parts from the prompt within that token
    at = min(
        (b for t in shape.specials if (b := asked.rfind(t, 0, at + len(t))) >= 0 and b < at < b + len(t)), default=at
    )
    if at == len(asked):
        return shape
    after = [text.find(_ANSWERS), text.rfind(_ANSWERS)]
    closing, final = (text[at + len(_ANSWERS) : end] for at, end in zip(after, (middle, last), strict=True))
    return shape._replace(header=asked[at:], closing=closing, final=final) if closing and final else shape


def quick(shape: Template, text: str, turns: Sequence[Message]) -> list[Span] | None:
    """Return the spans of all answers by what stands around them; None where that is not certain.

    Certain means: plain turns, the header as often in the text as there are answers, and each answer, up to
    what closes it, holds all that the turn says and no special token.
    """
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    # calls and answers of tools may end in other tokens than the trial found
    if not shape.header or any(len(turn) > _PLAIN or turn["role"] == "tool" for turn in turns):
        return None
    if text.count(shape.header) != len(answers):
        return None
    special = special_pattern(shape.specials)
    spans = []
    start = text.find(shape.header)
    for number, turn in enumerate(answers, 1):
        start += len(shape.header)
        following = text.find(shape.header, start) if number < len(answers) else len(text)
        closing = shape.final if turn is turns[-1] else shape.closing
        end = text.find(closing, start, following)
        said = text[start - len(shape.header) : end]  # what the prompt ends with may be the answer's beginning
        if end < 0 or turn["content"].strip() not in said:
            return None
        if special.search(text, start, end):
            return None
        spans.append((start, end + len(closing)))
        start = following
    return spans


def exact(
    shape: Template, text: str, turns: Sequence[Message], tools: Sequence[Any] | None, learned: Collection[int]
) -> list[Span]:
    """Return the span of each turn of `learned` (numbers into `turns`) by rendering up to it. Raises Unclear."""
    return [_span(shape, text, turns, tools, number) for number in sorted(learned)]


def differing(text: str, marked: Sequence[Span], spans: Sequence[Span], header: str, whole: bool) -> Span | None:
    """Return the first place where a template's own markers and the spans disagree; None = nowhere.

    Markers may begin with the header and may end with the spaces after the turn's end, as several of TRL's
    do: the spans leave out both, since generation writes neither. `whole`: the spans are those of all answers;
    else markers of others are left aside.
    """
    if not whole:
        marked = [m for m in marked if any(m[0] < until and start < m[1] for start, until in spans)]
    joined: list[Span] = []
    for start, end in marked:  # several of TRL's mark an answer and its end one after the other
        joined = [*joined[:-1], (joined[-1][0], end)] if joined and joined[-1][1] == start else [*joined, (start, end)]
    for (start, end), (ours, until) in zip(joined, spans, strict=False):
        if start > ours or text[start:ours] not in header or end < until or text[until:end].strip():
            return min(start, ours), max(end, until)
    rest = [*joined[len(spans) :], *spans[len(joined) :]]
    return rest[0] if rest else None


def _span(shape: Template, text: str, turns: Sequence[Message], tools: Sequence[Any] | None, number: int) -> Span:
    before = shape.render(turns[:number], tools, True)
    start = len(before)
    if lost := chat_template.lost(turns[number], text):
        raise _dropped(lost, number < len(turns) - 1)
    last = "data.loss_on: last_turn; " if number < len(turns) - 1 else ""
    if not text.startswith(before):
        start = alike(before, text)
        if not shape.mismatch:
            found = (
                f"the prompt as inference renders it ends in {before[max(0, start - 20) :][:60]!r}, but the answer of "
                f"turn {number + 1} follows on {text[max(0, start - 20) : start + 20]!r}: at inference the model sees "
                "another beginning than it learns"
            )
            write = f"{last}tokenizer.chat_template_kwargs ({{enable_thinking: false}}, where the template reads it)"
            raise Unclear(found, write, "prompt_mismatch")
    end = _end(shape, text, turns, tools, number, start)
    if chat_template.lost(turns[number], text[start:end]):
        # what the prompt ends with may be the answer's beginning: <think>
        header = len(shape.render(turns[:number], tools, False)) if text.startswith(before) else start
        if lost := chat_template.lost(turns[number], text[min(header, start) : end]):
            raise _dropped(lost, number < len(turns) - 1)
    return start, end


def _dropped(lost: str, followed: bool) -> Unclear:
    last = "data.loss_on: last_turn; " if followed else ""
    found = f"the chat template drops a part of an answer: {lost[:60]!r}"
    return Unclear(found, f"{last}a template that renders it, or rows without it")


def alike(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many characters, or tokens, two texts begin with alike."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _end(
    shape: Template, text: str, turns: Sequence[Message], tools: Sequence[Any] | None, number: int, start: int
) -> int:
    """Return where a turn ends: after its last special token. Raises Unclear where it ends in none."""
    turn, until, same = turns[number], len(text), True
    if number < len(turns) - 1:  # as far as the chat up to this turn is rendered like the whole
        try:
            part = shape.render(turns[: number + 1], tools, False)
        except Exception:  # a template may refuse a chat that breaks off here
            part = ""
        until = max(start, alike(part, text))
        same = text.startswith(part) and bool(part)
    ends = [at + len(token) for token in shape.specials if (at := text.rfind(token, start, until)) >= 0]
    if same and ends:
        return max(ends)
    # a turn that is the last one may be rendered otherwise: with an empty thought before it, another end after it
    said = turn["content"].strip()
    at = text.find(said, start)
    follows = turns[number + 1]["content"].strip() if number < len(turns) - 1 else ""
    spoken = at + len(said) if at >= 0 and follows in text[at + len(said) :] else until
    if max(ends, default=0) > spoken:
        return max(ends)
    tail = spoken + len(text[spoken:]) - len(text[spoken:].lstrip())
    closing = max((token for token in shape.specials if text.startswith(token, tail)), key=len, default="")
    if not closing:
        found = f"turn {number + 1} ends with no token that generation could stop on: {text[tail - 20 : tail + 20]!r}"
        raise Unclear(found, "a template that writes {{ eos_token }} after every answer")
    return tail + len(closing)
