"""Whether the export renders the prompts as training does, and stops where training stops.

Inputs: the reference and what a reader rendered. Outputs: a `PromptAgreement`, with the problem in words. Not here: the
weights (`attribution`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from trl_sft.serving.proof.folder_reader import ReaderOutput
from trl_sft.serving.proof.trained_reference import TrainedReference

_SHOWN_TOKENS = 6  # of a text around a difference


@dataclass(frozen=True)
class PromptAgreement:
    """The rendered prompts of an export beside those of the training.

    Attributes:
        compared: how many prompts.
        equal: how many have the same tokens.
        first_difference: of the first prompt that differs: prompt, position and both tokens; None = all are equal.
        bos_doubled: how many begin with two BOS tokens, where training has one.
        stop_token: the token that ends an answer in training, as text.
        stop_tokens: those of the export.
        has_stop_token: whether it is among them.
        continued: how many answers go on after it.
        ended_early: how many answers end where the trained model goes on.
        problem: what differs; "" = nothing, or the reader is no runtime of the export.

    """

    compared: int
    equal: int
    first_difference: dict[str, Any] | None
    bos_doubled: int
    stop_token: str
    stop_tokens: list[int]
    has_stop_token: bool
    continued: int
    ended_early: int
    problem: str

    def describe(self) -> dict[str, Any]:
        """Return the agreement for JSON."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "problem"}
        return values | {"problem": self.problem or None}


def compare(reference: TrainedReference, output: ReaderOutput) -> PromptAgreement:
    """Compare what a reader rendered with what training renders.

    Args:
        reference: the trained model.
        output: of a reader; one without a tokenizer is compared in its stop token alone.

    """
    prompts = reference.prompts.prompts if output.ids is not None else []
    equal, doubled, first = 0, 0, None
    for number, (prompt, ids) in enumerate(zip(prompts, output.ids or [], strict=True)):
        if ids == prompt.ids:
            equal += 1
            continue
        doubled += _has_doubled_bos(prompt.ids, ids)
        if first is None:
            first = _describe_difference(reference, number, trained=prompt.ids, exported=ids) | {
                "error": output.problems.get(number)
            }
    agreement = PromptAgreement(
        compared=len(prompts),
        equal=equal,
        first_difference=first,
        bos_doubled=doubled,
        stop_token=_show(reference, [reference.stop_token] if reference.stop_token is not None else []),
        stop_tokens=sorted(output.stop_tokens),
        has_stop_token=reference.stop_token is None or reference.stop_token in output.stop_tokens,
        continued=output.continued,
        ended_early=sum(c.position is not None and c.exported is None for c in output.summary.comparisons),
        problem="",
    )
    problem = _explain(reference, agreement) if output.is_runtime else ""
    return dataclasses.replace(agreement, problem=problem)


def _has_doubled_bos(trained: list[int], exported: list[int]) -> bool:
    """Tell whether the export writes the first token of the training twice."""
    return exported[1:] == trained and exported[0] == trained[0]


def _describe_difference(
    reference: TrainedReference, number: int, *, trained: list[int], exported: list[int]
) -> dict[str, Any]:
    """Return where two token lists part, with a few tokens of each as text."""
    pairs = zip(trained, exported, strict=False)
    shortest = min(len(trained), len(exported))
    position = next((n for n, (ours, theirs) in enumerate(pairs) if ours != theirs), shortest)
    end = position + _SHOWN_TOKENS
    return {
        "prompt": number,
        "position": position,
        "trained": _show(reference, trained[position:end]),
        "exported": _show(reference, exported[position:end]),
    }


def _show(reference: TrainedReference, tokens: list[int]) -> str:
    """Return tokens as text."""
    return str(reference.tokenizer.decode(tokens, skip_special_tokens=False)) if tokens else ""


def _explain(reference: TrainedReference, agreement: PromptAgreement) -> str:
    """Return what differs; "" = nothing."""
    numbers = f"{agreement.compared - agreement.equal} of {agreement.compared} prompts"
    difference = agreement.first_difference
    if agreement.bos_doubled:
        return f"the BOS token is doubled: {agreement.bos_doubled} of {agreement.compared} prompts begin with two"
    if difference is not None and difference["error"]:
        return f"the template of the export does not render {numbers}: {difference['error']}"
    if difference is not None:
        kwargs = f" (the run has tokenizer.chat_template_kwargs {reference.template_kwargs})"
        return (
            f"{numbers} are rendered otherwise than in training: prompt {difference['prompt']} differs at token "
            f"{difference['position']}, where training has {difference['trained']!r} and the export "
            f"{difference['exported']!r}{kwargs if reference.template_kwargs else ''}"
        )
    if not agreement.has_stop_token:
        names = _show(reference, agreement.stop_tokens) or "none"
        problem = f"the stop token {agreement.stop_token!r} of training does not end an answer in the export"
        return f"{problem}; what ends it: {names}"
    if agreement.continued:
        return f"{agreement.continued} answers go on after the stop token {agreement.stop_token!r} of training"
    if agreement.ended_early:
        return f"{agreement.ended_early} answers end where the trained model goes on"
    return ""
