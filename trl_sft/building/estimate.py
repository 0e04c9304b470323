"""What a build will call, before a call is made: the number of calls, their tokens and their price.

Inputs: a checked spec. Outputs: a `CallEstimate`. Calls are counted exactly for a build in which every first attempt
passes, and at most. Tokens are estimated from the prompts, with a length for the texts that nobody has written yet.
Not here: what calls really took (`evaluation.model_calls` counts it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from trl_sft.building import augmentation, generation, plan, rubric_judge, spec_keys, templates
from trl_sft.building.augmentation import PlannedChild
from trl_sft.building.candidates import CandidateRow
from trl_sft.building.plan import Slot
from trl_sft.building.spec import Spec
from trl_sft.building.templates import AugmentationTemplate, LanguageTexts
from trl_sft.evaluation.model_calls import CallLimits, ModelRequest

# Lengths that are assumed of texts that are not written yet, in tokens, and how many characters a token has on average.
REQUEST_TOKENS, ANSWER_TOKENS, JUDGEMENT_TOKENS = 60, 300, 40
_CHARACTERS = {"en": 4.0, "zh": 1.5}
_SAMPLE = 200  # rows whose prompts are measured; the others are like them


class CallEstimate(NamedTuple):
    """The calls of one purpose."""

    purpose: str  # rows, judge or children
    calls: int  # if every first attempt passes
    most_calls: int  # if every attempt is used, retries after errors not counted
    input_tokens: int  # of `calls`
    output_tokens: int
    cost: float | None  # None = the prices are not known

    def describe(self) -> dict[str, Any]:
        """Return the estimate as a mapping that JSON can write."""
        return self._asdict()


class _Prompts(NamedTuple):
    """Some of the calls of one purpose, by which all are estimated."""

    requests: list[ModelRequest]
    lengths: list[int]  # of the answer to each, in tokens, as assumed


def estimate_calls(spec: Spec) -> list[CallEstimate]:
    """Return the estimate of each purpose that the spec has: rows, judge, children, judge of children."""
    available, texts = templates.read_augmentations(spec.language)
    slots = plan.plan_slots(spec)
    attempts = spec.get(spec_keys.PLAN, "attempts")
    calls = sum(slot.template.calls for slot in slots)
    prompts = _sample_rows(slots[:_SAMPLE], spec, texts)
    estimates = [_estimate("rows", prompts, spec, calls=calls, most_calls=calls * attempts)]
    has_judge = spec_keys.JUDGE in spec.sections
    judgements = _sample_judgements(slots[:_SAMPLE], spec, texts) if has_judge else _Prompts([], [])
    if has_judge:
        most = 2 * len(slots) * attempts  # a judgement that cannot be read is asked for twice
        estimates.append(_estimate("judge", judgements, spec, calls=len(slots), most_calls=most))
    if spec_keys.AUGMENTATION in spec.sections:
        planned = _plan_children(slots, spec, available)
        calls = sum(child.template.calls for child in planned)
        prompts = _sample_children(planned[:_SAMPLE], spec)
        estimates.append(_estimate("children", prompts, spec, calls=calls, most_calls=calls))
        if has_judge:
            calls = len(planned)
            estimates.append(_estimate("judge of children", judgements, spec, calls=calls, most_calls=2 * calls))
    return estimates


def _sample_rows(slots: Sequence[Slot], spec: Spec, texts: LanguageTexts) -> _Prompts:
    """Return the calls by which rows are written."""
    prompts = _Prompts([], [])
    for slot in slots:
        messages: list[dict[str, str]] = []
        for turn in slot.template.turns:
            request = generation.build_request(slot, spec, texts, messages=messages, attempt=0)
            length = REQUEST_TOKENS if turn.role == "user" else ANSWER_TOKENS
            if request is not None:
                prompts.requests.append(request)
                prompts.lengths.append(length)
            messages.append({"role": turn.role, "content": _make_text(length, spec)})
    return prompts


def _sample_judgements(slots: Sequence[Slot], spec: Spec, texts: LanguageTexts) -> _Prompts:
    """Return the calls by which rows are judged."""
    requests = [rubric_judge.build_request(_make_row(slot, spec), spec, texts=texts) for slot in slots]
    return _Prompts(requests, [JUDGEMENT_TOKENS] * len(requests))


def _plan_children(
    slots: Sequence[Slot], spec: Spec, available: Mapping[str, AugmentationTemplate]
) -> list[PlannedChild]:
    """Return the children of a set in which every row is found."""
    share = 1.0 if spec.get(spec_keys.AUGMENTATION, "held_out") else 1 - spec.get(spec_keys.OUTPUT, "eval_fraction")
    number = round(spec.get(spec_keys.PLAN, "rows") * share)
    return augmentation.plan_children([_make_row(slot, spec) for slot in slots[:number]], spec, available)


def _sample_children(planned: Sequence[PlannedChild], spec: Spec) -> _Prompts:
    """Return the calls by which children are written."""
    prompts = _Prompts([], [])
    for child in planned:
        first = augmentation.build_requests(child, spec)
        second = augmentation.build_requests(child, spec, instruction=_make_text(REQUEST_TOKENS, spec))
        prompts.requests.extend(first + second)
        prompts.lengths.extend([REQUEST_TOKENS] * len(first) + [ANSWER_TOKENS] * len(second))
    return prompts


def _estimate(purpose: str, prompts: _Prompts, spec: Spec, *, calls: int, most_calls: int) -> CallEstimate:
    """Return the estimate of calls of which some are built."""
    characters = [sum(len(message["content"]) for message in request.messages) for request in prompts.requests]
    scale = calls / max(len(prompts.requests), 1)
    input_tokens = round(sum(characters) / _CHARACTERS[spec.language] * scale)
    output_tokens = round(sum(prompts.lengths) * scale)
    section = spec_keys.JUDGE if purpose.startswith("judge") else spec_keys.GENERATOR
    cost = _compute_cost(spec, section, input_tokens, output_tokens=output_tokens)
    return CallEstimate(purpose, calls, most_calls, input_tokens, output_tokens, cost)


def _compute_cost(spec: Spec, section: str, input_tokens: int, *, output_tokens: int) -> float | None:
    """Return the price of tokens; None = the spec does not say it."""
    limits = CallLimits(input_price=spec.get(section, "input_price"), output_price=spec.get(section, "output_price"))
    return limits.compute_cost(input_tokens, output_tokens) if limits.has_prices else None


def _make_text(tokens: int, spec: Spec) -> str:
    """Return a text of about this many tokens."""
    return "-" * round(tokens * _CHARACTERS[spec.language])


def _make_row(slot: Slot, spec: Spec) -> CandidateRow:
    """Return a row with the turns of its slot, of the assumed lengths."""
    texts = {"user": REQUEST_TOKENS, "assistant": ANSWER_TOKENS}
    messages = tuple({"role": role, "content": _make_text(tokens, spec)} for role, tokens in texts.items())
    return CandidateRow(f"{slot.number:06d}", messages * (len(slot.template.turns) // 2), cell=slot.cell)
