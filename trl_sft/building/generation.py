"""Rows are written: the generator is called for each turn of each slot, and the answers become candidate rows.

Inputs: slots, a caller of the generator, and the number of the attempt. Outputs: a `CandidateRow` for each slot in the
order of the slots, or why there is none. What a row says depends on its slot, its attempt and the answers alone, never
on the order in which answers arrive. Slots are written in blocks, so that a build that stops early has whole rows. Not
here: which rows are good (`screening`), and how calls are made (`evaluation.model_calls`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from trl_sft.building import plan, spec_keys, templates, written_requests
from trl_sft.building.candidates import CandidateRow, Rejection
from trl_sft.building.plan import Slot
from trl_sft.building.spec import Spec
from trl_sft.building.templates import LanguageTexts, TemplateTurn
from trl_sft.evaluation import thoughts
from trl_sft.evaluation.call_log import ModelAnswer
from trl_sft.evaluation.model_calls import CallCounts, ModelRequest

GENERATION = "generation"  # the gate of rows that are not whole
_BLOCK = 8  # slots of a block for each call that is under way at once
_QUOTES = (('"', '"'), ("“", "”"), ("「", "」"), ("『", "』"))
_ROLES = {"en": {"user": "Person", "assistant": "Assistant"}, "zh": {"user": "用户", "assistant": "助手"}}
_CUT = "length"  # the word of the protocol for an answer that reached the limit


class Caller(Protocol):
    """Who calls a model: a server, or a model on this machine."""

    @property
    def counts(self) -> CallCounts:
        """The calls of this process."""

    @property
    def stop(self) -> str:
        """Why nothing more is called; "" = it goes on."""

    def call(self, requests: Sequence[ModelRequest], *, label: str = ...) -> list[ModelAnswer | None]:
        """Return the answer to each request, in their order; None = there is none."""


class WrittenRow(NamedTuple):
    """What came of one slot in one attempt."""

    slot: Slot
    row: CandidateRow  # with the turns so far
    rejection: Rejection | None  # why it is not whole: no answer came, the generator refused; None = it is whole


@dataclass
class _Draft:
    """A row that is being written."""

    slot: Slot
    attempt: int
    messages: list[dict[str, str]] = field(default_factory=list)
    was_cut: bool = False
    rejection: Rejection | None = None
    is_open: bool = True

    def end(self, reason: str, gate: str = GENERATION) -> None:
        """End the row: no turn follows."""
        self.rejection, self.is_open = Rejection(gate, reason), False


def write_rows(
    slots: Sequence[Slot], spec: Spec, caller: Caller, *, attempt: int, texts: LanguageTexts
) -> Iterator[list[WrittenRow]]:
    """Yield what came of the slots of each block, in their order; nothing of slots that the budget did not reach.

    Args:
        slots: the rows to write.
        spec: the checked spec.
        caller: calls the generator.
        attempt: how often these slots were written before.
        texts: what prompts say of the axes.

    """
    size = _BLOCK * spec.get(spec_keys.GENERATOR, "concurrent")
    for start in range(0, len(slots), size):
        drafts = [_Draft(slot, attempt) for slot in slots[start : start + size]]
        while open_drafts := [draft for draft in drafts if draft.is_open]:
            requests = [
                build_request(draft.slot, spec, texts, messages=draft.messages, attempt=attempt)
                for draft in open_drafts
            ]
            calls = [request for request in requests if request is not None]
            answers = iter(caller.call(calls, label="rows") if calls else [])
            for draft, request in zip(open_drafts, requests, strict=True):
                _add_turn(draft, None if request is None else next(answers), spec, is_call=request is not None)
        written = [WrittenRow(draft.slot, _build_row(draft, spec), draft.rejection) for draft in drafts]
        yield [row for row in written if not (row.rejection and row.rejection.gate == GENERATION and caller.stop)]
        if caller.stop:
            return


def build_request(
    slot: Slot, spec: Spec, texts: LanguageTexts, *, messages: Sequence[Mapping[str, str]], attempt: int
) -> ModelRequest | None:
    """Return the request for the next turn of a row; None = the turn needs no call.

    Args:
        slot: the row.
        spec: the checked spec.
        texts: what prompts say of the axes.
        messages: the turns so far.
        attempt: the number of the attempt, from 0.

    """
    number = len(messages)
    turn = slot.template.turns[number]
    if not turn.is_call:
        return None
    values = list_values(slot, spec, texts, messages=messages)
    if turn.role == "user":
        prompt = [{"role": "user", "content": templates.fill(turn.write, values).strip()}]
    else:
        system = templates.fill(turn.system, values).strip()
        prompt = [{"role": "system", "content": system}] if system else []
        prompt += [dict(message) for message in messages]
    decoding = choose_decoding(spec.sections[spec_keys.GENERATOR], spec.seed, slot.number, attempt, number)
    return ModelRequest(f"row {slot.number} attempt {attempt} turn {number}", prompt, decoding)


def list_values(
    slot: Slot, spec: Spec, texts: LanguageTexts, *, messages: Sequence[Mapping[str, str]]
) -> dict[str, object]:
    """Return what the placeholders of a template stand for."""
    roles = _ROLES[spec.language]
    return {
        **slot.cell,
        "topic": slot.topic,
        "language": spec.language,
        "requirements": texts.format_requirements(slot.cell, spec.descriptions),
        "variation": slot.variation,
        "conversation": "\n\n".join(f"{roles[message['role']]}: {message['content']}" for message in messages),
        "seed_instruction": slot.seed_row.instruction if slot.seed_row else "",
    }


def choose_decoding(model: Mapping[str, Any], *parts: object) -> dict[str, Any]:
    """Return the decoding of a call; its seed depends on the parts."""
    decoding = {"max_tokens": model["max_tokens"], "temperature": model["temperature"]}
    decoding |= {} if model["top_p"] is None else {"top_p": model["top_p"]}
    return {**decoding, "seed": plan.derive_seed(*parts), **model["options"]}


def clean_text(text: str) -> str:
    """Return what a model wrote without its thought, and without quotation marks around the whole."""
    text = thoughts.split_thought(text, *thoughts.COMMON_MARKS).answer.strip()
    for opening, closing in _QUOTES:
        if len(text) > 2 and text[0] == opening and text[-1] == closing and opening not in text[1:-1]:
            return text[1:-1].strip()
    return text


def is_cut(answer: ModelAnswer) -> bool:
    """Tell whether a model reached its limit of tokens before its answer ended."""
    return answer.finish == _CUT


def _add_turn(draft: _Draft, answer: ModelAnswer | None, spec: Spec, *, is_call: bool) -> None:
    """Add the next turn to a draft, or end it."""
    turn: TemplateTurn = draft.slot.template.turns[len(draft.messages)]
    if not is_call:
        values = list_values(draft.slot, spec, templates.NO_TEXTS, messages=draft.messages)
        text = templates.fill(turn.text, values)
    elif answer is None:
        draft.end("no answer came")
        return
    elif answer.refusal:
        draft.end(f"the generator refused: {answer.refusal}")
        return
    else:
        text = clean_text(answer.text)
        draft.was_cut = draft.was_cut or is_cut(answer)
    is_request = turn.role == "user" and is_call
    if is_request:
        text = written_requests.clean_request(text)
    draft.messages.append({"role": turn.role, "content": text})
    draft.is_open = len(draft.messages) < len(draft.slot.template.turns)
    if turn.role == "user" and not text.strip():
        draft.end("the generator wrote an empty request")
    elif is_request:
        _check_request(draft, text, turn=turn, spec=spec)


def _check_request(draft: _Draft, text: str, *, turn: TemplateTurn, spec: Spec) -> None:
    """End a draft whose request is not worth the calls for its answer."""
    if draft.was_cut:
        draft.end("the generator reached its limit of tokens before the row was whole", written_requests.GATE)
        return
    family = draft.slot.template.family
    problem = written_requests.find_problem(text, prompt=turn.write, family=family, language=spec.language)
    if problem:
        draft.end(problem, written_requests.GATE)


def _build_row(draft: _Draft, spec: Spec) -> CandidateRow:
    """Return the finished row with its provenance."""
    slot = draft.slot
    provenance = {
        "template": f"{slot.template.family}/{slot.template.name}",
        "template_sha256": slot.template.digest,
        "generator": spec.get(spec_keys.GENERATOR, "model"),
        "seed": plan.derive_seed(spec.seed, slot.number, draft.attempt, 0),
        "topic": slot.topic,
        "seed_row": slot.seed_row.id if slot.seed_row else "",
        "attempt": draft.attempt,
    }
    is_problem_of_seed = slot.seed_row is not None and any(turn.text for turn in slot.template.turns)
    return CandidateRow(
        id=f"{slot.number:06d}",
        messages=tuple(draft.messages),
        language=spec.language,
        cell=dict(slot.cell),
        provenance=provenance,
        was_cut=draft.was_cut,
        key=slot.seed_row.key if slot.seed_row and is_problem_of_seed else "",
    )
