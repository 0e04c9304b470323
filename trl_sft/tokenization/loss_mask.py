"""Where the answers are in a chat: the spans of characters, or of tokens, that carry loss.

The span of an answer begins where the generation prompt ends, and ends after the token that ends the assistant's turn.

Inputs: a chat template, the turns of a chat and their rendered text, or the tokens of many chats. Outputs: one span
for each answer. Three functions find them:

- `find_spans_by_rendering` renders the chat up to each answer. It is right for any template, and slow.
- `find_spans_by_search` searches the text for what the template writes around answers. It gives up where the result
  is not certain, and a sample of its results is compared with those by rendering.
- `find_token_spans` searches the tokens in the same way, so that these chats need no offsets: without it tokenizing
  takes 10 to 20% more processor time (measured, `docs/development/log.md`, 2026-11-25).

`find_difference` compares spans with a template's own generation markers. Not here: how spans become labels
(`encode`), and which answers carry loss (`render`).
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from trl_sft.data.messages import Message, special_pattern
from trl_sft.errors import first_line
from trl_sft.tokenization import chat_template, mask_errors, special_tokens, template_limits, turn_markers
from trl_sft.tokenization.chat_template import ANSWER, QUESTION
from trl_sft.tokenization.turn_markers import TurnMarkers

Span = tuple[int, int]  # start and end, the end excluded
# messages, tools, whether the generation prompt follows -> text
Render = Callable[[Sequence[Message], Sequence[Any] | None, bool], str]

_PLAIN_TURN = 2  # keys of a turn that has role and content alone
_TAG = re.compile(r"</?[\w|. /-]{1,40}>")  # what may be one unit in a header: <think>, <|channel|>


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, and what it writes around answers.

    Attributes:
        render: renders messages as text.
        special_tokens: the strings that are one special token each, the longest first.
        special_pattern: matches any of them.
        allow_prompt_mismatch: whether a generation prompt that differs from the text before the answer is accepted.
        generation_prompt: what stands before every answer; "" = a trial found no such string, and only
            `find_spans_by_rendering` can be used.
        turn_end: what ends an answer that another turn follows.
        last_turn_end: what ends the last answer.
        markers: the special tokens that the template writes around turns.

    """

    render: Render
    special_tokens: tuple[str, ...]
    special_pattern: re.Pattern[str]
    allow_prompt_mismatch: bool
    generation_prompt: str = ""
    turn_end: str = ""
    last_turn_end: str = ""
    markers: TurnMarkers = dataclasses.field(default_factory=TurnMarkers)


class TokenMarks(NamedTuple):
    """What a chat template writes around answers, as tokens."""

    generation_prompt: tuple[int, ...]
    turn_end: tuple[int, ...]
    last_turn_end: tuple[int, ...]


def inspect_template(
    tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any], allow_prompt_mismatch: bool = False
) -> ChatTemplate:
    """Return a tokenizer's chat template with what it writes around answers, found by rendering a trial chat.

    Args:
        tokenizer: has a chat template.
        kwargs: keyword arguments that the template gets beside the messages.
        allow_prompt_mismatch: whether `run.allow` has `prompt_mismatch`.

    """

    def render(messages: Sequence[Message], tools: Sequence[Any] | None, add_generation_prompt: bool) -> str:
        with template_limits.limit_seconds():
            return str(
                tokenizer.apply_chat_template(
                    list(messages), tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt, **kwargs
                )
            )

    tokens = special_tokens.list_strings(tokenizer)
    markers = turn_markers.find_turn_markers(tokenizer, kwargs)
    template = ChatTemplate(render, tokens, special_pattern(tokens), allow_prompt_mismatch, markers=markers)
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}] * 2
    try:
        question, prompt = markers.strip_appended(render(turns[:1], None, False)), render(turns[:1], None, True)
        text = render(turns, None, False)
        (_, first_end), (_, last_end) = find_spans_by_rendering(template, text, turns, answers=(1, 3))
    except Exception:  # a template of a kind that the trial does not fit: each row is then rendered in parts
        return template
    start = _start_of_token(prompt, common_prefix_length(question, prompt), tokens)
    turn_end = text[text.find(ANSWER) + len(ANSWER) : first_end]
    last_turn_end = text[text.rfind(ANSWER) + len(ANSWER) : last_end]
    if start == len(prompt) or not turn_end or not last_turn_end:
        return template
    return dataclasses.replace(
        template, generation_prompt=prompt[start:], turn_end=turn_end, last_turn_end=last_turn_end
    )


def find_spans_by_search(template: ChatTemplate, text: str, turns: Sequence[Message]) -> list[Span] | None:
    r"""Return the spans of all answers by what stands around them; None where they are not certain.

    They are certain if all turns have role and content alone, the generation prompt occurs as often as there are
    answers, and each answer, up to the end of its turn, holds all that the turn says and no special token.

    Example:
        `"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"`, a chat in ChatML, has one
        span, that of `"yes<|im_end|>"`.

    """
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    # calls and answers of tools may end in other tokens than the trial found
    if not template.generation_prompt or any(len(turn) > _PLAIN_TURN or turn["role"] == "tool" for turn in turns):
        return None
    text = template.markers.strip_appended(text)
    if text.count(template.generation_prompt) != len(answers):
        return None
    if not _holds_all(text, [turn["content"].strip() for turn in turns if turn["role"] != "assistant"]):
        return None
    spans = []
    prompt_start = text.find(template.generation_prompt)
    for number, turn in enumerate(answers, 1):
        start = prompt_start + len(template.generation_prompt)
        next_prompt = text.find(template.generation_prompt, start) if number < len(answers) else len(text)
        turn_end = template.last_turn_end if turn is turns[-1] else template.turn_end
        end = text.find(turn_end, start, next_prompt)
        # the generation prompt may end with the beginning of the answer: <think>
        if end < 0 or turn["content"].strip() not in text[prompt_start:end]:
            return None
        if template.special_pattern.search(text, start, end):
            return None
        spans.append((start, end + len(turn_end)))
        prompt_start = next_prompt
    return spans


def _holds_all(text: str, parts: Sequence[str]) -> bool:
    """Tell whether a text holds all parts; each is searched first behind the one before it."""
    position = 0
    for part in parts:
        place = text.find(part, position)
        if place >= 0:
            position = place
        elif part not in text:
            return False
    return True


def find_spans_by_rendering(
    template: ChatTemplate,
    text: str,
    turns: Sequence[Message],
    *,
    answers: Collection[int],
    tools: Sequence[Any] | None = None,
) -> list[Span]:
    """Return the span of each answer by rendering the chat up to it.

    Args:
        template: renders the chat.
        text: the rendering of the whole chat.
        turns: its messages.
        answers: which of the turns are wanted, from 0.
        tools: the JSON schemas of functions that the chat offers.

    Returns:
        One span of characters for each of `answers`, in order.

    Raises:
        MaskError: the template drops a part of an answer or a whole turn, ends an answer with no token, or renders
            another prompt for generation than in the chat.

    """
    if missing := chat_template.find_missing_turn(turns, tools, text):
        raise mask_errors.dropped_turn(missing)
    return [_render_span(template, text, turns, number=number, tools=tools) for number in sorted(answers)]


def find_token_marks(template: ChatTemplate, backend: Tokenizer) -> TokenMarks | None:
    """Return what stands around answers as tokens; None where it does not begin with a special token.

    Only then does it stand around answers alone: special tokens within rows are refused, or are plain text.
    """
    parts = (template.generation_prompt, template.turn_end, template.last_turn_end)
    if not all(parts) or not all(part.startswith(template.special_tokens) for part in parts):
        return None
    return TokenMarks(*(tuple(backend.encode(part, add_special_tokens=False).ids) for part in parts))


def find_token_spans(
    marks: TokenMarks, input_ids: np.ndarray, row_starts: Sequence[int], *, with_loss: Sequence[Sequence[bool] | None]
) -> list[list[Span] | None]:
    """Return the spans of tokens of the answers that carry loss.

    Args:
        marks: what stands around answers.
        input_ids: (tokens,) the tokens of all rows, one row after another.
        row_starts: (rows + 1,) where each row begins in `input_ids`, and the end.
        with_loss: for each row which of its answers carry loss; None = the row is not looked at.

    Returns:
        For each row its spans, counted from its first token; None where they are not certain.

    """
    starts = _find_sequence(input_ids, marks.generation_prompt) + len(marks.generation_prompt)
    turn_ends = _find_sequence(input_ids, marks.turn_end)
    last_turn_ends = _find_sequence(input_ids, marks.last_turn_end)
    first_answers = np.searchsorted(starts, row_starts)
    spans: list[list[Span] | None] = []
    for row, answers in enumerate(with_loss):
        row_start, row_end = row_starts[row], row_starts[row + 1]
        answer_starts = starts[first_answers[row] : first_answers[row + 1]].tolist()
        spans.append(None)
        if answers is None or len(answer_starts) != len(answers):
            continue
        answer_ends = [_first_end(turn_ends, marks.turn_end, start) for start in answer_starts[:-1]]
        answer_ends += [_first_end(last_turn_ends, marks.last_turn_end, start) for start in answer_starts[-1:]]
        limits = [*answer_starts[1:], row_end + 1]
        if all(end < limit for end, limit in zip(answer_ends, limits, strict=True)):
            places = zip(answer_starts, answer_ends, answers, strict=True)
            spans[row] = [(start - row_start, end - row_start) for start, end, has_loss in places if has_loss]
    return spans


def find_difference(
    text: str,
    marked: Sequence[Span],
    spans: Sequence[Span],
    *,
    generation_prompt: str,
    pattern: re.Pattern[str],
    all_answers: bool,
) -> Span | None:
    """Return the first place where a template's own generation markers and the spans disagree; None = nowhere.

    Markers may begin with the generation prompt or special tokens and may end with the spaces after the end of a turn,
    as several of TRL's do. The spans leave out both, since generation writes neither.

    Args:
        text: the rendered chat.
        marked: what the template marks, as spans of characters.
        spans: what carries loss.
        generation_prompt: what the template writes before an answer.
        pattern: matches special tokens.
        all_answers: whether `spans` are those of all answers; False = markers of other answers are ignored.

    """
    if not all_answers:
        marked = [mark for mark in marked if any(mark[0] < end and start < mark[1] for start, end in spans)]
    joined: list[Span] = []
    for start, end in marked:  # several of TRL's mark an answer and its end one after the other
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    for (mark_start, mark_end), (start, end) in zip(joined, spans, strict=False):
        header = text[mark_start:start]
        is_header = header in generation_prompt or not pattern.sub("", header).strip()
        begins_alike = mark_start <= start and is_header
        ends_alike = mark_end >= end and not text[end:mark_end].strip()
        if not begins_alike or not ends_alike:
            return min(mark_start, start), max(mark_end, end)
    rest = [*joined[len(spans) :], *spans[len(joined) :]]
    return rest[0] if rest else None


def find_generation_prompt(template: ChatTemplate, turns: Sequence[Message], tools: Sequence[Any] | None) -> str:
    """Return what the template writes before the first answer of a chat at inference; "" = nothing, or unknown."""
    first = next(number for number, turn in enumerate(turns) if turn["role"] == "assistant")
    prompt = template.render(turns[:first], tools, True)
    start = _find_header_start(template, prompt, turns[:first], tools=tools)
    return "" if start is None else prompt[start:]


def common_prefix_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many characters, or tokens, two sequences have in common at their beginning."""
    same, limit = 0, min(len(one), len(other))
    while same < limit:  # halves are compared at once: a loop over single characters of a long text takes seconds
        middle = (same + limit + 1) // 2
        if one[same:middle] == other[same:middle]:
            same = middle
        else:
            limit = middle - 1
    return same


def _start_of_token(text: str, position: int, tokens: Sequence[str]) -> int:
    """Return where the special token begins that a position lies within; the position itself where it lies in none.

    A chat that ends in `<|end|>` and one that goes on with `<|assistant|>` have `<|` in common. What only the second
    one has begins before these two characters: `_start_of_token("<|assistant|>", 2, ["<|assistant|>"])` is 0.
    """
    starts = [position]
    for token in tokens:
        start = text.rfind(token, 0, position + len(token))
        if 0 <= start < position < start + len(token):
            starts.append(start)
    return min(starts)


def _render_span(
    template: ChatTemplate, text: str, turns: Sequence[Message], *, number: int, tools: Sequence[Any] | None
) -> Span:
    """Return the span of the answer that is turn `number`, by rendering the turns before it. Raises MaskError."""
    is_last = number == len(turns) - 1
    if part := chat_template.find_missing_part(turns[number], text):
        raise mask_errors.dropped_part(part, is_last)
    try:
        prompt = template.render(turns[:number], tools, True)
    except Exception as error:  # a template raises what it likes for messages that it does not take
        raise mask_errors.refused_prompt(first_line(error), number, is_last) from None
    header_start = _find_header_start(template, prompt, turns[:number], tools=tools)
    start = len(prompt)
    if not text.startswith(prompt):
        position = _find_accepted_start(template, text, prompt, header_start=header_start)
        if position is None or not template.allow_prompt_mismatch:
            raise mask_errors.prompt_mismatch(
                prompt, text, number=number, is_last=is_last, can_accept=position is not None
            )
        start = position
    end = _find_end(template, text, turns, number=number, tools=tools, start=start)
    if chat_template.find_missing_part(turns[number], text[start:end]):
        # the generation prompt may end with the beginning of the answer: <think>
        begin = start if header_start is None or not text.startswith(prompt) else min(header_start, start)
        if part := chat_template.find_missing_part(turns[number], text[begin:end]):
            raise mask_errors.dropped_part(part, is_last)
    return start, end


def _find_header_start(
    template: ChatTemplate, prompt: str, turns: Sequence[Message], *, tools: Sequence[Any] | None
) -> int | None:
    """Return where the header of the next answer begins in its prompt, after all `turns`; None = unknown."""
    try:
        without = template.markers.strip_appended(template.render(turns, tools, False))
    except Exception:  # a template may refuse a chat that ends there
        return None
    position = common_prefix_length(without, prompt)
    position = _start_of_token(prompt, position, template.special_tokens)
    # a chat that ends there may end with one more token, as Phi-3's does; else the turns are rendered in another way
    return None if template.special_pattern.sub("", without[position:]).strip() else position


def _find_accepted_start(template: ChatTemplate, text: str, prompt: str, *, header_start: int | None) -> int | None:
    """Return where an answer begins in a text that does not go on from its prompt; None where that is not certain.

    It is certain where both part within the answer's own header or after it, and where they differ in spaces alone.
    So the text of another turn is never taken for the answer.
    """
    position = common_prefix_length(prompt, text)
    if header_start is not None and position >= header_start:
        for match in (*_TAG.finditer(text, header_start), *_TAG.finditer(prompt, header_start)):
            if match.start() < position < match.end():
                position = match.start()
        return max(header_start, _start_of_token(text, position, template.special_tokens))
    return _skip_alike(text, prompt)


def _skip_alike(text: str, prompt: str) -> int | None:
    """Return where `prompt` ends at the beginning of `text`, spaces aside; None = the text begins in another way."""
    visible = "".join(prompt.split())
    position = turn_markers.find_visible_end(text, len(visible))
    if position is None or "".join(text[:position].split()) != visible:
        return None
    spaces = prompt[len(prompt.rstrip()) :]
    return position + common_prefix_length(spaces, text[position:])


def _find_end(
    template: ChatTemplate,
    text: str,
    turns: Sequence[Message],
    *,
    number: int,
    tools: Sequence[Any] | None,
    start: int,
) -> int:
    """Return where turn `number`, which begins at `start`, ends: after the token that ends it. Raises MaskError."""
    markers, pattern, turn = template.markers, template.special_pattern, turns[number]
    beginning = _render_beginning(template, text, turns[: number + 1], tools=tools, is_last=number == len(turns) - 1)
    if text.startswith(beginning) and len(beginning) > start:  # nothing of the next turn is in it
        parts_end = turn_markers.find_parts_end(turn, beginning, pattern, start=start)
        end = turn_markers.find_end(markers, beginning, pattern, answer=(start, parts_end), limit=len(beginning))
    else:  # the last answer of a chat is rendered in another way: with a thought before it, or another end after it
        parts_end = turn_markers.find_parts_end(turn, text, pattern, start=start)
        common = 0
        if beginning.startswith(text[:start]):
            last_end = turn_markers.find_parts_end(turn, beginning, pattern, start=start)
            common = common_prefix_length(beginning[last_end:], text[parts_end:])
        end = turn_markers.find_end(markers, text, pattern, answer=(start, parts_end), limit=parts_end + common)
    if end < 0:  # another token ends the last answer of a chat
        end = turn_markers.find_end(markers, text, pattern, answer=(start, parts_end), limit=-1)
    if end < 0:
        raise mask_errors.missing_end(text, parts_end, number=number)
    return end


def _render_beginning(
    template: ChatTemplate, text: str, turns: Sequence[Message], *, tools: Sequence[Any] | None, is_last: bool
) -> str:
    """Return a chat up to an answer as text, without an appended header; "" where the template refuses that.

    `text`: the rendering of the whole chat, which ends with the answer where `is_last`.
    """
    if is_last:
        return template.markers.strip_appended(text)
    try:
        return template.markers.strip_appended(template.render(turns, tools, False))
    except Exception:  # a template may refuse a chat that breaks off here
        return ""


def _first_end(positions: np.ndarray, tokens: Sequence[int], start: int) -> int:
    """Return where the first of `tokens` at or after `start` ends; `sys.maxsize` = nowhere.

    `positions`: where `tokens` begin.
    """
    index = np.searchsorted(positions, start)
    return int(positions[index]) + len(tokens) if index < len(positions) else sys.maxsize


def _find_sequence(input_ids: np.ndarray, tokens: Sequence[int]) -> np.ndarray:
    """Return the positions at which a sequence of tokens begins: (occurrences,)."""
    size = len(input_ids) - len(tokens) + 1
    if size <= 0:
        return np.zeros(0, dtype=np.int64)
    same = input_ids[:size] == tokens[0]
    for offset, token in enumerate(tokens[1:], 1):
        same &= input_ids[offset : offset + size] == token
    return np.flatnonzero(same)
