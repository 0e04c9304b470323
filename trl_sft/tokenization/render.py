"""Formatted rows become texts with the spans that carry loss.

Inputs: batches of formatted rows by column. Outputs: a `RenderedRow` for each. Every chat is checked on the way: that
the template takes it and drops no part of an answer. For a part of the chats the spans are also compared with those by
rendering, and with the template's own generation markers. Not here: tokens (`encode`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import has_generation_markers

from trl_sft.console import format_names
from trl_sft.data.bad_rows import BadRow, describe_problem
from trl_sft.data.formats import PAIRS, TEXT
from trl_sft.data.messages import Message
from trl_sft.errors import Edit, first_line
from trl_sft.tokenization import chat_template, loss_mask, mask_errors, template_advice, template_limits, thinking
from trl_sft.tokenization.encoder import Encoder, build_encoder
from trl_sft.tokenization.loss_mask import Span
from trl_sft.tokenization.mask_errors import MaskError
from trl_sft.tokenization.template_advice import TrialChat

# faults of a chat that another template, or a keyword of the template, may solve
# How much is rendered to check, or to find, the answers of one chat: characters, and as many more for each turn
_MOST_CHECKED, _MOST_RENDERED = 50_000_000, 1_000_000_000
_TURN_COST = 1000
_MOST_REMEMBERED = 4  # beginnings of a chat whose rendering is remembered
_SHOWN_TEXT = 2000  # characters of a chat that an error shows
_MAX_ADVISED = 3  # rows of one kind of fault for which other templates are tried, which takes up to some seconds each
_CODES_OF_TEMPLATES = (
    "template.prompt_mismatch",
    "template.drops_content",
    "template.no_end_token",
)


class RenderedRow(NamedTuple):
    """A row as text.

    Attributes:
        number: which of the formatted rows it is.
        text: what is tokenized.
        spans: the characters that carry loss; None = all of them.
        answers: which of the answers carry loss, where tokens alone show where answers are; None = use `spans`.
        bad_row: why the row cannot be trained, its text is empty then; None = it can.
        prompt_ends: where the prompts of answers end, in characters; None = where `spans` begin.
        has_other_prompt: whether the template renders one of these prompts differently at inference, which the recipe
            accepts.
        beginnings: how each of the answers with loss begins, as `thinking.BEGINNINGS` has it.
        is_beginning: whether `text` is only the beginning of the row, which has its first `max_length` tokens.
        loses_answer: whether the rest of the row, which is not tokenized, has a part of an answer with loss.

    """

    number: int
    text: str
    spans: list[Span] | None
    answers: list[bool] | None = None
    bad_row: BadRow | None = None
    prompt_ends: list[int] | None = None
    has_other_prompt: bool = False
    beginnings: tuple[str, ...] = ()
    is_beginning: bool = False
    loses_answer: bool = False

    def list_prompt_ends(self) -> list[int]:
        """Return where the prompts of answers end, in characters."""
        return [start for start, _ in self.spans or []] if self.prompt_ends is None else self.prompt_ends


def render_rows(
    encoder: Encoder,
    batch: Mapping[str, Sequence[Any]],
    *,
    numbers: Sequence[int],
    check: Sequence[bool],
) -> Iterator[RenderedRow]:
    """Yield the rows of a batch as texts with the spans that carry loss, and with their problem where they have none.

    Args:
        encoder: has the chat template, and says which tokens carry loss.
        batch: the formatted rows by column: text, or prompt and completion, with tools and untrained beside them.
        numbers: the number of each row among the formatted rows.
        check: for each row whether its spans are compared with those that other ways find.

    Raises:
        AssertionError: the search for answers was wrong, after rows that were not checked.
        TemplateError: the template takes too long for a chat, or writes far more than the row holds.

    """
    settings = encoder.settings
    if settings.row_type == TEXT:
        for number, text in zip(numbers, batch["text"], strict=True):
            yield RenderedRow(number, _end_text(text, settings.eos_token), None)
    elif settings.row_type == PAIRS:
        for number, prompt, completion in zip(numbers, batch["prompt"], batch["completion"], strict=True):
            text = prompt + _end_text(completion, settings.eos_token)
            spans = None if settings.loss_on == "all" else [(len(prompt), len(text))]
            yield RenderedRow(number, text, spans, prompt_ends=[len(prompt)])
    else:
        yield from _render_chats(encoder, batch, numbers=numbers, check=check)


def _end_text(text: str, eos_token: str) -> str:
    """Return a text with one end-of-text token, as TRL has it."""
    return text if text.endswith(eos_token) else text + eos_token


def _render_chats(
    encoder: Encoder,
    batch: Mapping[str, Sequence[Any]],
    *,
    numbers: Sequence[int],
    check: Sequence[bool],
) -> Iterator[RenderedRow]:
    """Yield the chats of a batch as texts with the spans that carry loss. The arguments are those of `render_rows`."""
    chats = [[*prompt, *completion] for prompt, completion in zip(batch["prompt"], batch["completion"], strict=True)]
    tools = batch.get("tools") or [None] * len(chats)
    untrained = batch.get("untrained") or [None] * len(chats)
    texts = _render_texts(encoder, chats, tools)
    errors_before = len(encoder.search_errors)
    for index, number in enumerate(numbers):
        text = texts[index]
        if isinstance(text, BadRow):
            yield RenderedRow(number, "", [], bad_row=text)
            continue
        template_limits.check_length(chats[index], tools[index], text)
        answers = _list_answers_with_loss(
            encoder.settings.loss_on,
            chats[index],
            completion=len(batch["prompt"][index]),
            untrained=untrained[index],
        )
        try:
            row = _place_loss(
                encoder,
                RenderedRow(number, text, None),
                chats[index],
                tools=tools[index],
                answers=answers,
                check=check[index],
            )
            yield _read_thoughts(encoder, row)
        except template_limits.RenderTimeout:
            raise template_limits.build_fault(chats[index]) from None
        except MaskError as error:
            chat = TrialChat(chats[index], answers, tools[index])
            yield RenderedRow(number, "", [], bad_row=_advise(encoder, chat, error))
    if len(encoder.search_errors) > errors_before and not all(check):
        raise AssertionError(
            f"two ways to find the loss mask differ, and earlier rows were not checked: {encoder.search_errors[-1]}"
        )


def _advise(encoder: Encoder, chat: TrialChat, error: MaskError) -> BadRow:
    """Return the problem of a chat whose loss cannot be placed, with what a trial has shown to help."""
    fixes, edits = [error.fix], []
    if error.code in _CODES_OF_TEMPLATES and encoder.advised.count(error.code) < _MAX_ADVISED:
        encoder.advised.append(error.code)

        def train(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any], trial: TrialChat) -> None:
            other = build_encoder(encoder.settings, tokenizer, kwargs)
            assert other.template is not None
            row = RenderedRow(0, other.template.render(trial.turns, trial.tools, False), None)
            _place_loss(other, row, trial.turns, tools=trial.tools, answers=trial.answers, check=True)

        keyword = template_advice.find_keyword(encoder.tokenizer, encoder.template_kwargs, chat, train=train)
        name = template_advice.find_template(encoder.tokenizer, encoder.template_kwargs, chat, train=train)
        if name:
            fixes.insert(0, f"Set tokenizer.chat_template: {name}, which trains this row")
            edits = [Edit("set", ("tokenizer", "chat_template"), name)]
        for word, value in keyword.items():
            shown = json.dumps(value)
            fixes.insert(0, f"Set tokenizer.chat_template_kwargs: {{{word}: {shown}}}, which trains this row")
            edits = [Edit("set", ("tokenizer", "chat_template_kwargs", word), value)]
    advice = ". Or: ".join([fixes[0], *(f"{fix[:1].lower()}{fix[1:]}" for fix in fixes[1:])])
    fix = f"{advice}. Or accept it with run.allow: [{error.allow}]." if error.allow else f"{advice}."
    return describe_problem(error.problem, fix, code=error.code)._replace(edits=tuple(edits))


def _apply_template(
    encoder: Encoder, chats: Sequence[Sequence[Message]], tools: Sequence[Sequence[Any] | None]
) -> list[str]:
    """Return chats as texts; those without tools are rendered in one call."""
    assert encoder.template is not None
    plain = [list(turns) for turns, functions in zip(chats, tools, strict=True) if not functions]
    texts: Iterator[str] = iter(())
    if plain:
        with template_limits.limit_seconds():
            texts = iter(encoder.tokenizer.apply_chat_template(plain, tokenize=False, **encoder.template_kwargs))
    if encoder.thoughts is not None:
        texts = map(encoder.thoughts.keep_one, texts)
    return [
        encoder.template.render(turns, functions, False) if functions else next(texts)
        for turns, functions in zip(chats, tools, strict=True)
    ]


def _render_texts(
    encoder: Encoder, chats: Sequence[Sequence[Message]], tools: Sequence[Sequence[Any] | None]
) -> list[str | BadRow]:
    """Return chats as texts; a chat that the template does not take as its problem."""
    try:
        return list(_apply_template(encoder, chats, tools))
    except (Exception, template_limits.RenderTimeout):
        return [_render_text(encoder, turns, functions) for turns, functions in zip(chats, tools, strict=True)]


def _render_text(encoder: Encoder, turns: Sequence[Message], tools: Sequence[Any] | None) -> str | BadRow:
    """Return one chat as text, or its problem where the template does not take it."""
    try:
        return _apply_template(encoder, [turns], [tools])[0]
    except template_limits.RenderTimeout:
        raise template_limits.build_fault(turns) from None
    except Exception as error:
        reason = f"the chat template refuses this chat: {first_line(error)}"
        roles = format_names([str(turn["role"]) for turn in turns])
        fix = "Change the row to what this model's template takes."
        bad_row = describe_problem(reason, fix, code="template.refuses_row")
        return bad_row._replace(problem=f"{reason}; its roles are {roles}")


def _list_answers_with_loss(
    loss_on: str, turns: Sequence[Message], *, completion: int, untrained: Sequence[int] | None
) -> list[int]:
    """Return the turns that carry loss. `completion`: the first turn of the completion; `untrained`: these never do."""
    answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    if loss_on == "completion":
        answers = [number for number in answers if number >= completion]
    elif loss_on == "last_turn":
        answers = answers[-1:]
    excluded = {*(untrained or ())}
    return [number for number in answers if number not in excluded]


def _place_loss(
    encoder: Encoder,
    row: RenderedRow,
    turns: Sequence[Message],
    *,
    tools: Sequence[Any] | None,
    answers: Sequence[int],
    check: bool,
) -> RenderedRow:
    """Return a chat with the spans of the turns that carry loss (`answers`). Raises MaskError."""
    template, text = encoder.template, row.text
    assert template is not None
    all_answers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
    if encoder.settings.loss_on == "all":
        _check_loss_on_all(text, turns, tools=tools, all_answers=all_answers, answers=answers)
        return _find_prompts(encoder, row, turns, tools=tools, answers=all_answers)
    spans = None if encoder.search_errors else loss_mask.find_spans_by_search(template, text, turns)
    if spans is not None:
        with_loss = {*answers}
        spans = [span for number, span in zip(all_answers, spans, strict=True) if number in with_loss]
        row = row._replace(spans=spans, answers=[number in with_loss for number in all_answers])
        if not check:
            return row
    template = _remember_renders(template)
    rendered_answers = _choose_rendered(text, turns, answers, are_known=spans is not None)
    rendered = loss_mask.find_spans_by_rendering(template, text, turns, answers=rendered_answers, tools=tools)
    if spans is not None:
        known = dict(zip(answers, spans, strict=True))
        expected = [known[number] for number in rendered_answers]
        if expected != rendered:
            encoder.search_errors.append(f"{expected} and {rendered} in {text[:_SHOWN_TEXT]!r}")
            row = row._replace(answers=None)
            _choose_rendered(text, turns, answers, are_known=False)
        elif len(rendered_answers) < len(answers):
            rendered = spans
    answers = rendered_answers
    if check:
        _compare_with_markers(encoder, template, row._replace(spans=rendered), turns=turns, tools=tools)
    accepts_others = encoder.settings.allow_prompt_mismatch
    differs = accepts_others and _has_other_prompt(template, text, turns, tools=tools, answers=answers)
    return row._replace(spans=rendered, has_other_prompt=differs)


def _choose_rendered(text: str, turns: Sequence[Message], answers: Sequence[int], *, are_known: bool) -> Sequence[int]:
    """Return the answers of a chat up to which it is rendered: all of them, or a part of those of a very long chat.

    Args:
        text: the rendered chat.
        turns: its messages.
        answers: the turns that carry loss.
        are_known: whether the search found them, so that a part is enough to check it.

    Raises:
        MaskError: rendering the chat up to each of them takes too long.

    """
    most = _MOST_CHECKED if are_known else _MOST_RENDERED
    number = max(2, most // (len(text) + _TURN_COST * len(turns)))
    if len(answers) <= number:
        return answers
    if not are_known:
        problem = f"the chat has {len(answers):,} answers, too many to render it up to each, as its template needs"
        raise MaskError(problem, "Split the chat into shorter ones, or remove it", code="template.too_many_answers")
    places = sorted({round(place * (len(answers) - 1) / (number - 1)) for place in range(number)})
    return [answers[place] for place in places]


def _read_thoughts(encoder: Encoder, row: RenderedRow) -> RenderedRow:
    """Return a chat with how its answers begin, and without loss on empty thoughts where the settings say so."""
    marks = encoder.thoughts
    if marks is None:
        return row
    starts = row.list_prompt_ends()
    beginnings = [marks.classify(row.text, start) for start in starts]
    if thinking.EMPTY not in beginnings:
        return row._replace(beginnings=tuple(beginnings))
    if not encoder.settings.skip_empty_thoughts or row.spans is None:
        return row._replace(beginnings=tuple(beginnings))
    beginnings = [thinking.SKIPPED if beginning == thinking.EMPTY else beginning for beginning in beginnings]
    spans = [(marks.skip_empty(row.text, start), end) for start, end in row.spans]
    return row._replace(spans=spans, answers=None, prompt_ends=starts, beginnings=tuple(beginnings))


def _find_prompts(
    encoder: Encoder, row: RenderedRow, turns: Sequence[Message], *, tools: Sequence[Any] | None, answers: Sequence[int]
) -> RenderedRow:
    """Return a chat whose every token carries loss with the places where its prompts end."""
    template = encoder.template
    assert template is not None
    spans = loss_mask.find_spans_by_search(template, row.text, turns)
    if spans is None:
        try:
            answers = _choose_rendered(row.text, turns, answers, are_known=False)
            spans = loss_mask.find_spans_by_rendering(template, row.text, turns, answers=answers, tools=tools)
        except MaskError:  # the loss needs no spans, and a prompt that is rendered differently is counted
            spans = []
    rendered_answers = _choose_rendered(row.text, turns, answers, are_known=True)
    differs = not spans or _has_other_prompt(template, row.text, turns, tools=tools, answers=rendered_answers)
    return row._replace(prompt_ends=[start for start, _ in spans], has_other_prompt=differs)


def _has_other_prompt(
    template: loss_mask.ChatTemplate,
    text: str,
    turns: Sequence[Message],
    *,
    tools: Sequence[Any] | None,
    answers: Sequence[int],
) -> bool:
    """Tell whether the template renders the prompt of one of the answers differently at inference."""
    return any(not text.startswith(template.render(turns[:number], tools, True)) for number in answers)


def _check_loss_on_all(
    text: str,
    turns: Sequence[Message],
    *,
    tools: Sequence[Any] | None,
    all_answers: Sequence[int],
    answers: Sequence[int],
) -> None:
    """Refuse a chat under `loss_on: all` if a turn has no loss, or is dropped, or the last answer lost a part.

    Raises MaskError.
    """
    if missing := chat_template.find_missing_turn(turns, tools, text):
        raise mask_errors.dropped_turn(missing)
    if part := chat_template.find_missing_part(turns[all_answers[-1]], text):
        problem = f"the chat template drops a part of an answer: {part[:60]!r}"
        raise MaskError(
            problem, "Use a template that renders it, or remove it from the rows", code="template.drops_content"
        )
    if excluded := sorted({*all_answers} - {*answers}):
        problem = f"turn {excluded[0] + 1} is not to be trained, but loss_on: all trains everything"
        raise MaskError(
            problem,
            "Set data.loss_on: assistant, or remove `train: false` and `weight: 0` from the rows",
            code="data.loss_on_mismatch",
        )


def _remember_renders(template: loss_mask.ChatTemplate) -> loss_mask.ChatTemplate:
    """Return a template that renders the first beginnings of one chat once: several functions ask for the same ones."""
    texts: dict[tuple[int, bool], str] = {}

    def render(messages: Sequence[Message], tools: Sequence[Any] | None, add_generation_prompt: bool) -> str:
        key = len(messages), add_generation_prompt
        if key in texts:
            return texts[key]
        text = template.render(messages, tools, add_generation_prompt)
        if len(texts) < _MOST_REMEMBERED:
            texts[key] = text
        return text

    return dataclasses.replace(template, render=render)


def _compare_with_markers(
    encoder: Encoder,
    template: loss_mask.ChatTemplate,
    row: RenderedRow,
    *,
    turns: Sequence[Message],
    tools: Sequence[Any] | None,
) -> None:
    """Refuse spans that differ from the template's own generation markers, where it has any. Raises MaskError."""
    text, spans = row.text, row.spans or []
    source = chat_template.read_template(encoder.tokenizer, tools)
    if encoder.settings.allow_template_markers or not has_generation_markers(source):
        return
    _, marked = render_jinja_template(
        conversations=[list(turns)],
        tools=tools,
        chat_template=source,
        return_assistant_tokens_mask=True,
        **{**encoder.tokenizer.special_tokens_map, **encoder.template_kwargs},
    )
    difference = loss_mask.find_difference(
        text,
        marked[0],
        spans,
        generation_prompt=loss_mask.find_generation_prompt(template, turns, tools),
        pattern=template.special_pattern,
        all_answers=len(spans) == sum(turn["role"] == "assistant" for turn in turns),
    )
    if difference:
        start, end = difference
        problem = (
            "the template's generation markers and the answers that its rendering shows differ: the markers cover "
            f"{[text[a:b][:60] for a, b in marked[0]]}, the answers are {[text[a:b][:60] for a, b in spans]}; they "
            f"differ first at {text[start:end][:80]!r}"
        )
        fix = "Put the markers around each whole answer with the token that ends it, or remove them from the template"
        raise MaskError(problem, fix, "template_markers", code="template.other_markers")
