"""The special tokens that a chat template writes around turns: which end an answer, which begin the next header.

Inputs: a tokenizer with a chat template, or the rendered text of a chat. Outputs: `TurnMarkers`, found by rendering a
trial chat, and the places in a text where an answer's own text ends and where its end tokens end. A header is what a
template writes before a turn (`<|im_start|>user`); its first token is never taken for the end of an answer, whether
the template writes headers before turns, after turns, or always. Not here: where an answer begins (`loss_mask`).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from trl_sft.data.messages import MARK, special_pattern
from trl_sft.tokenization import special_tokens
from trl_sft.tokenization.chat_template import ANSWER, QUESTION, list_parts

_SECOND_QUESTION, _SECOND_ANSWER = "trlsftagains", "trlsftreplys"
# how the names of tokens differ that begin and end a part of an answer
_PAIRS = (("end", "begin"), ("end", "start"), ("END", "BEGIN"), ("END", "START"), ("/", ""))
_VISIBLE = re.compile(r"\S+")
_HIDDEN = "\ufdd1"  # stands in place of special tokens while text is searched; a noncharacter, which no text holds


@dataclass(frozen=True)
class TurnMarkers:
    """What a template writes after answers and before turns.

    Attributes:
        end_tokens: the special tokens that end the last answer of a chat, in order; empty = there is none.
        turn_end_tokens: the special tokens that end an answer which another turn follows.
        stop_tokens: those of `end_tokens` that generation stops on one of: nothing stands between answer and them, or
            they are the last one after named parts.
        header_tokens: the special tokens that begin a header, without those that end answers.
        appended_header: what the template writes after the end of the last answer: the header of a turn that does not
            follow; "" = nothing.

    """

    end_tokens: tuple[str, ...] = ()
    turn_end_tokens: tuple[str, ...] = ()
    stop_tokens: tuple[str, ...] = ()
    header_tokens: frozenset[str] = frozenset()
    appended_header: str = ""

    def strip_appended(self, text: str) -> str:
        """Return a rendered chat without the header that the template appends to every chat."""
        return text.removesuffix(self.appended_header) if self.appended_header else text


@dataclass(frozen=True)
class _TrialTexts:
    """What a template writes around the turns of a trial chat.

    Attributes:
        before_question: what stands before the first question, without the token that begins a text.
        before_answer: what stands between a question and its answer.
        after_question: what follows a question that ends the chat.
        prompt: the same with the generation prompt.
        after_answer: what follows an answer before the next question; None = the template refuses a second question.
        after_last_answer: what follows the answer that ends a chat.

    """

    before_question: str
    before_answer: str
    after_question: str
    prompt: str
    after_answer: str | None
    after_last_answer: str


def find_turn_markers(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> TurnMarkers:
    """Return what the template of a tokenizer writes around turns, found by rendering a trial chat.

    Args:
        tokenizer: has a chat template that renders a user and an assistant.
        kwargs: what the template gets beside the messages.

    """
    texts = _render_trial(tokenizer, kwargs)
    pattern = special_pattern(special_tokens.list_strings(tokenizer))
    generation_prompt, assistant_headers, always_appends = _find_generation_prompt(texts, pattern)
    user_headers = _list_user_headers(texts, pattern, eos_token=str(tokenizer.eos_token))
    headers = {*user_headers, *assistant_headers} - {str(tokenizer.eos_token)}
    if not always_appends:  # Kimi-K3's `<|open|>` begins turns and the parts of an answer
        headers -= {token for token in headers if generation_prompt.count(token) > 1}
    tail = texts.after_last_answer
    limits = _list_tokens(texts.after_answer or "", pattern) if always_appends else None
    names_parts = not always_appends and _names_parts(texts, pattern)
    ends = _list_end_tokens(tail, pattern, headers=headers, limits=limits, has_text=names_parts)
    if not ends:
        ends = _list_header_as_end(texts, pattern, user_headers=user_headers, generation_prompt=generation_prompt)
    position = ends[-1][0] + len(ends[-1][1]) if ends else 0
    end_tokens = tuple(token for _, token in ends)
    if always_appends:
        headers |= {*generation_prompt}
    headers -= {*end_tokens}
    turn_ends = _list_end_tokens(texts.after_answer or "", pattern, headers=headers)
    stop_tokens = _list_last_tokens(texts, ends, pattern) if names_parts else _list_first_tokens(tail, ends)
    appended = tail[position:] if tail[position:].strip() and (ends or always_appends) else ""
    turn_end_tokens = tuple(token for _, token in turn_ends)
    return TurnMarkers(end_tokens, turn_end_tokens, stop_tokens, frozenset(headers), appended)


def find_stop_token(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> str:
    """Return the token that ends an assistant's turn; "" where the template writes none.

    Of several tokens in a row it is the tokenizer's end-of-text token, else the first one.
    """
    stop_tokens = find_turn_markers(tokenizer, kwargs).stop_tokens
    if tokenizer.eos_token in stop_tokens:
        return str(tokenizer.eos_token)
    return stop_tokens[0] if stop_tokens else ""


def find_end_text(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> str:
    """Return the text that follows every answer of a trial chat, before a turn and at the end alike; "" = none."""
    texts = _render_trial(tokenizer, kwargs)
    tail = texts.after_last_answer
    return tail if (texts.after_answer or "").startswith(tail) else ""


def list_special(
    text: str, pattern: re.Pattern[str], *, start: int = 0, end: int | None = None
) -> list[tuple[int, str]]:
    """Return the special tokens of a text as (position, token); those that are plain text are left out."""
    matches = pattern.finditer(text, start, len(text) if end is None else end)
    return [(match.start(), match.group()) for match in matches if text[match.start() - 1 : match.start()] != MARK]


def find_parts_end(turn: Mapping[str, Any], text: str, pattern: re.Pattern[str], *, start: int) -> int:
    """Return where the last part of an answer ends in a rendered text: thought, content or tool call.

    Args:
        turn: the answer.
        text: the rendered chat.
        pattern: matches special tokens, within which nothing is found.
        start: where the answer begins.

    """
    hidden = _hide_special(text, pattern)
    position = furthest = start
    for part in list_parts(turn):
        words = _hide_special(part.strip(), pattern)
        found = _find_end_of(words, hidden, position)
        if found < 0:  # the template has another order
            found = _find_end_of(words, hidden, start)
        if found >= 0:
            position = found
            furthest = max(furthest, found)
    return furthest


def find_end(markers: TurnMarkers, text: str, pattern: re.Pattern[str], *, answer: tuple[int, int], limit: int) -> int:
    """Return where the tokens end that end an answer: before the next header; -1 = no token ends it.

    Args:
        markers: what the template writes around turns.
        text: the rendered chat.
        pattern: matches special tokens.
        answer: where the answer's own text begins and ends.
        limit: where the search ends; -1 = only tokens count that end the answers of a trial chat, and that follow
            the answer, or each other, with spaces between alone.

    """
    start, parts_end = answer
    adjacent, limit = limit < 0, len(text) if limit < 0 else limit
    end, last, known = -1, "", {*markers.end_tokens, *markers.turn_end_tokens}
    for position, token in list_special(text, pattern, start=parts_end, end=limit):
        gap = text[max(parts_end, end) : position]
        if token in markers.header_tokens or (adjacent and (gap.strip() or token not in known)):
            break
        end, last = position + len(token), token
    return -1 if _closes_a_part(markers, last, text[start:end]) else end


def _closes_a_part(markers: TurnMarkers, token: str, answer: str) -> bool:
    """Tell whether a token ends a part of an answer alone, as `<｜tool▁call▁end｜>` ends `<｜tool▁call▁begin｜>`."""
    if token in markers.end_tokens:
        return False
    openings = {token.replace(end, begin) for end, begin in _PAIRS if end in token}
    return any(opening in answer for opening in openings)


def _render_trial(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> _TrialTexts:
    """Return what the template writes around the turns of a trial chat."""

    def render(messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False) -> str:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **kwargs
            )
        )

    turns = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": _SECOND_QUESTION},
        {"role": "assistant", "content": _SECOND_ANSWER},
    ]
    single = chat = render(turns[:2])
    after_answer, after_question, prompt = None, "", ""
    with contextlib.suppress(Exception):  # a template may refuse a second question
        chat = render(turns)
        after_answer = chat.partition(ANSWER)[2].partition(_SECOND_QUESTION)[0]
    with contextlib.suppress(Exception):  # a template may refuse a chat without an answer
        prompt = render(turns[:1], add_generation_prompt=True).rpartition(QUESTION)[2]
        after_question = render(turns[:1]).rpartition(QUESTION)[2]
    before = chat.partition(QUESTION)[0].lstrip().removeprefix(str(tokenizer.bos_token or ""))
    between = single.partition(QUESTION)[2].partition(ANSWER)[0]
    return _TrialTexts(before, between, after_question, prompt, after_answer, single.rpartition(ANSWER)[2])


def _list_tokens(text: str, pattern: re.Pattern[str]) -> list[str]:
    """Return the special tokens of a text."""
    return [token for _, token in list_special(text, pattern)]


def _find_generation_prompt(texts: _TrialTexts, pattern: re.Pattern[str]) -> tuple[list[str], list[str], bool]:
    """Return the tokens of a generation prompt, those of its header, and whether it is written after every chat.

    The tokens of a prompt that the template writes with every question are those that end the question too; which of
    them begin the header is then unknown, and there are none.
    """
    tokens = _list_tokens(texts.prompt, pattern)
    if texts.prompt == texts.after_question:
        last = _list_tokens(texts.after_last_answer, pattern)
        return tokens, [], bool(tokens) and last[-1:] == tokens[-1:]
    # a chat that ends with the question may end with one more token, as Phi-3's does
    for token in _list_tokens(texts.after_question, pattern):
        if tokens[:1] != [token]:
            break
        tokens = tokens[1:]
    return tokens, tokens[:1], False


def _list_user_headers(texts: _TrialTexts, pattern: re.Pattern[str], *, eos_token: str) -> list[str]:
    """Return the tokens that begin the header of the user, or that of a system prompt of the template's own.

    They are the first one of the chat, and the last one before the question if no header of the assistant has it.
    """
    tokens = _list_tokens(texts.before_question, pattern)
    last = [token for token in tokens[-1:] if token not in _list_tokens(texts.before_answer, pattern)]
    return [token for token in (*tokens[:1], *last) if token != eos_token]


def _names_parts(texts: _TrialTexts, pattern: re.Pattern[str]) -> bool:
    """Tell whether an answer ends with tokens and names between them, before a turn and at the end of a chat alike.

    So Kimi-K3's do: `<|close|>response<|sep|><|close|>message<|sep|><|end_of_msg|>`.
    """
    tail = texts.after_last_answer.rstrip()
    tokens = list_special(tail, pattern)
    if len(tokens) < 2 or texts.after_answer is None or not texts.after_answer.startswith(tail):
        return False
    ends_with_token = tokens[-1][0] + len(tokens[-1][1]) == len(tail)
    return ends_with_token and any(part.strip() for part in pattern.split(tail[tokens[0][0] :]) if part)


def _list_first_tokens(tail: str, ends: Sequence[tuple[int, str]]) -> tuple[str, ...]:
    """Return the end tokens that nothing separates from the answer.

    Phi-3 writes a newline between its two end tokens: generation has to stop on the first.
    """
    position = ends[-1][0] + len(ends[-1][1]) if ends else 0
    tokens = [token for _, token in ends]
    joined = tail[:position]
    if not joined.startswith(tuple(tokens[:1])):  # a token may be line breaks itself, as RWKV-World's end of a turn
        joined = joined.lstrip()
    return tuple(token for number, token in enumerate(tokens) if joined.startswith("".join(tokens[: number + 1])))


def _list_last_tokens(texts: _TrialTexts, ends: Sequence[tuple[int, str]], pattern: re.Pattern[str]) -> tuple[str, ...]:
    """Return the last end token, if generation writes it nowhere before: not within the end, nor in the prompt."""
    tokens = [token for _, token in ends]
    earlier = {*tokens[:-1], *_list_tokens(texts.before_answer[len(texts.after_question) :], pattern)}
    return tuple(token for token in tokens[-1:] if token not in earlier)


def _list_end_tokens(
    tail: str,
    pattern: re.Pattern[str],
    *,
    headers: Collection[str],
    limits: Sequence[str] | None = None,
    has_text: bool = False,
) -> list[tuple[int, str]]:
    """Return the tokens that end an answer, as (position after the answer, token).

    Args:
        tail: what follows the answer.
        pattern: matches special tokens.
        headers: tokens that begin headers.
        limits: the tokens that `tail` may begin with; None = any.
        has_text: whether text stands between the tokens.

    """
    ends: list[tuple[int, str]] = []
    for number, (position, token) in enumerate(list_special(tail, pattern)):
        gap = tail[ends[-1][0] + len(ends[-1][1]) : position] if ends else ""
        if token in headers or (gap.strip() and not has_text):
            break
        if limits is not None and [*limits[number : number + 1]] != [token]:
            break
        ends.append((position, token))
    return ends


def _list_header_as_end(
    texts: _TrialTexts, pattern: re.Pattern[str], *, user_headers: Sequence[str], generation_prompt: Sequence[str]
) -> list[tuple[int, str]]:
    """Return the user's header as the end of an answer, where the template writes it after the last answer too.

    GLM-4 stops on `<|user|>`; TRL's training template for it ends every answer so. The assistant's header never ends
    an answer.
    """
    tokens = list_special(texts.after_last_answer, pattern)
    if len(tokens) != 1 or texts.after_last_answer[: tokens[0][0]].strip():
        return []
    token = tokens[0][1]
    follows_too = (texts.after_answer or "").lstrip().startswith(token)
    return tokens if follows_too and token in user_headers and token not in generation_prompt else []


def _hide_special(text: str, pattern: re.Pattern[str]) -> str:
    """Return a text of the same length in which no special token can be read."""
    return pattern.sub(lambda match: _HIDDEN * len(match.group()), text)


def _find_end_of(words: str, text: str, start: int) -> int:
    """Return where the first occurrence of `words` from `start` ends, spaces aside if need be; -1 = nowhere."""
    position = text.find(words, start)
    if position >= 0:
        return position + len(words)
    wanted = "".join(words.split())
    position = "".join(text[start:].split()).find(wanted)
    end = find_visible_end(text, position + len(wanted), start=start) if position >= 0 and wanted else None
    return -1 if end is None else end


def find_visible_end(text: str, number: int, *, start: int = 0) -> int | None:
    """Return where so many characters of a text from `start` end, spaces not counted; None = it has fewer."""
    if number <= 0:
        return start
    for match in _VISIBLE.finditer(text, start):
        length = match.end() - match.start()
        if length >= number:
            return match.start() + number
        number -= length
    return None
