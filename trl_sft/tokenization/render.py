"""Formatted rows become texts with the spans that carry loss.

In: batches of rows in TRL's forms. Out: `Row`s. Every row is checked on the way: that the template takes it
and drops no part of an answer; a part of them by a second way to find the mask, and by the template's own
markers. Deliberately absent: tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import has_generation_markers

from trl_sft.data.formats import PAIRS, TEXT
from trl_sft.data.messages import Message
from trl_sft.errors import Fault, TemplateError, first_line
from trl_sft.tokenization import chat_template, loss_mask
from trl_sft.tokenization.encode import Encoder, Plan, Row
from trl_sft.tokenization.loss_mask import Span, Unclear


def rendered(
    made: Encoder,
    batch: Mapping[str, Sequence[Any]],
    numbers: Sequence[int],
    check: Sequence[bool],
    name: Callable[[int], str],
) -> Iterator[Row]:
    """Yield rows as texts with their spans. Raises TemplateError where the template cannot carry one.

    `numbers` are the rows' own, `check` says which are compared with other ways to find the mask, `name`
    names a row for messages.
    """
    plan = made.plan
    if plan.form == TEXT:
        for number, text in zip(numbers, batch["text"], strict=True):
            yield Row(number, _ended(text, plan.eos), None)
    elif plan.form == PAIRS:
        for number, prompt, completion in zip(numbers, batch["prompt"], batch["completion"], strict=True):
            text = prompt + _ended(completion, plan.eos)
            yield Row(number, text, None if plan.loss_on == "all" else [(len(prompt), len(text))])
    else:
        chats = [[*p, *c] for p, c in zip(batch["prompt"], batch["completion"], strict=True)]
        tools = batch.get("tools") or [None] * len(chats)
        untrained = batch.get("untrained") or [None] * len(chats)
        try:
            texts = _texts(made, chats, tools)
        except Exception:
            _refused(made, chats, tools, [name(number) for number in numbers])
            raise
        doubts = len(made.doubts)
        for n, (number, turns, text) in enumerate(zip(numbers, chats, texts, strict=True)):
            learned = _learned(plan, turns, len(batch["prompt"][n]), untrained[n])
            try:
                yield _row(made, Row(number, text, None), turns, tools[n], (learned, check[n]))
            except Unclear as unclear:
                allow = f"; or run.allow: [{unclear.allow}], if that is meant" if unclear.allow else ""
                raise TemplateError(Fault(name(number), unclear.problem, unclear.fix + allow)) from None
        if len(made.doubts) > doubts and not all(check):
            raise AssertionError(f"two ways to find the mask differ, and one was taken unchecked: {made.doubts[-1]}")


def _ended(text: str, eos: str) -> str:
    return text if text.endswith(eos) else text + eos  # as TRL: one end token


def _texts(made: Encoder, chats: Sequence[Sequence[Message]], tools: Sequence[Any]) -> list[str]:
    """Return the renderings of chats; those without tools in one call."""
    out = [""] * len(chats)
    plain = [n for n in range(len(chats)) if not tools[n]]
    if plain:
        given = [list(chats[n]) for n in plain]
        texts = made.tokenizer.apply_chat_template(given, tokenize=False, **made.keywords)
        for n, text in zip(plain, texts, strict=True):
            out[n] = text
    assert made.shape is not None
    for n in set(range(len(chats))) - set(plain):
        out[n] = made.shape.render(chats[n], tools[n], False)
    return out


def _refused(made: Encoder, chats: Sequence[Sequence[Message]], tools: Sequence[Any], names: Sequence[str]) -> None:
    """Find the first chat that the template refuses. Raises TemplateError."""
    for turns, given, where in zip(chats, tools, names, strict=True):
        try:
            _texts(made, [turns], [given])
        except Exception as error:
            roles = ", ".join(str(turn["role"]) for turn in turns)
            found = f"the chat template refuses it: {first_line(error)}; its roles are {roles}"
            raise TemplateError(Fault(where, found, "rows that this model's template takes")) from None


def _learned(plan: Plan, turns: Sequence[Message], given: int, untrained: Sequence[int] | None) -> list[int]:
    """Return the numbers of the turns that are learned; `given` is where the completion begins."""
    answers = [n for n, turn in enumerate(turns) if turn["role"] == "assistant"]
    if plan.loss_on == "completion":
        answers = [n for n in answers if n >= given]
    elif plan.loss_on == "last_turn":
        answers = answers[-1:]
    return [n for n in answers if n not in (untrained or ())]


def _row(made: Encoder, row: Row, turns: Sequence[Message], tools: Any, how: tuple[Sequence[int], bool]) -> Row:
    """Return a chat with the spans of the turns that are learned. Raises Unclear.

    `how`: the numbers of these turns, and whether they are looked for by a second way too.
    """
    shape, text, (learned, check) = made.shape, row.text, how
    assert shape is not None
    answers = [n for n, turn in enumerate(turns) if turn["role"] == "assistant"]
    if made.plan.loss_on == "all":
        if lost := chat_template.lost(turns[answers[-1]], text):
            raise Unclear(f"the chat template drops a part of an answer: {lost[:60]!r}", "a template that renders it")
        if left := sorted({*answers} - {*learned}):
            found = f"turn {left[0] + 1} is not to be trained, but loss_on: all trains everything"
            raise Unclear(found, "data.loss_on: assistant, or rows without that")
        return row
    spans = None if made.doubts else loss_mask.quick(shape, text, turns)
    if spans is not None:
        spans = [span for n, span in zip(answers, spans, strict=True) if n in learned]
        row = row._replace(spans=spans, answers=[n in learned for n in answers])
    if spans is None or check:
        parts = loss_mask.exact(shape, text, turns, tools, learned)
        if spans is not None and spans != parts:
            made.doubts.append(f"{row.spans} and {parts} in {text!r}")  # from here on each row is rendered in parts
            row = row._replace(answers=None)
        if check:
            _agree(made, text, turns, tools, parts)
        row = row._replace(spans=parts)
    return row


def _agree(made: Encoder, text: str, turns: Sequence[Message], tools: Any, spans: Sequence[Span]) -> None:
    """Compare spans with the template's own generation markers, where it has any. Raises Unclear."""
    source = chat_template.text(made.tokenizer)
    if made.plan.other_markers or not has_generation_markers(source):
        return
    _, marked = render_jinja_template(
        conversations=[list(turns)],
        tools=tools,
        chat_template=source,
        return_assistant_tokens_mask=True,
        **{**made.tokenizer.special_tokens_map, **made.keywords},
    )
    assert made.shape is not None
    asked = made.shape.render(turns[:1], tools, True)
    header = asked[loss_mask.alike(asked, made.shape.render(turns[:1], tools, False)) :]  # what generation begins after
    whole = len(spans) == sum(turn["role"] == "assistant" for turn in turns)
    if place := loss_mask.differing(text, marked[0], spans, header, whole):
        found = (
            "the chat template's generation markers and the rendering of the prompt disagree where an answer is: "
            f"marked are {[text[a:b][:60] for a, b in marked[0]]}, found are {[text[a:b][:60] for a, b in spans]}, "
            f"the first difference is in {text[slice(*place)][:80]!r}"
        )
        write = "markers around each whole answer with the token that ends it, or a template without markers"
        raise Unclear(found, write, "template_markers")
