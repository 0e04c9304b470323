"""The errors of a chat whose loss cannot be placed, with what to do about each.

Inputs: what a rendering lacks, or the two texts that differ. Outputs: a `MaskError`; the caller makes a fault of it,
with the name of the row. Not here: finding any of it (`loss_mask`).
"""

from __future__ import annotations

_SHOWN = 20  # characters on each side of a place that a message shows


class MaskError(ValueError):
    """The loss of a chat cannot be placed."""

    def __init__(self, problem: str, fix: str, allow: str = "", *, code: str) -> None:
        """Keep the parts for the fault that the caller builds.

        Args:
            problem: what is wrong.
            fix: how to change the recipe or the rows, as an imperative without a full stop.
            allow: the word of `run.allow` that accepts it; "" = nothing accepts it.
            code: the kind of fault, one of `fault_codes.yaml`.

        """
        self.problem, self.fix, self.allow, self.code = problem, fix, allow, code
        super().__init__(problem)


def dropped_turn(missing: str) -> MaskError:
    """Return the error for a turn that is no answer and that the template does not render."""
    fix = "Use a template that renders it, or remove it from the rows"
    if missing.startswith("the system prompt"):
        fix = "Move it to the beginning of the first user turn, or use a template that renders it"
    return MaskError(f"the chat template drops {missing}", fix, code="template.drops_content")


def prompt_mismatch(prompt: str, text: str, *, number: int, is_last: bool, can_accept: bool) -> MaskError:
    """Return the error for a generation prompt that differs from the chat. `can_accept`: a word of `run.allow` may."""
    position = _first_difference(prompt, text)
    begin = max(0, position - _SHOWN)
    where = "" if can_accept else ", before the header of this answer,"
    problem = (
        f"turn {number + 1}: the generation prompt has {prompt[begin : begin + 60]!r}, but the chat has "
        f"{text[begin : position + _SHOWN]!r}{where} in its place: at inference the model would see a different "
        "prompt than in training"
    )
    fix = "Use a template that renders the turns before an answer in the same way as in its generation prompt"
    return MaskError(
        problem,
        fix if is_last else f"Set data.loss_on: last_turn. Or: {fix[:1].lower()}{fix[1:]}",
        "prompt_mismatch" if can_accept else "",
        code="template.prompt_mismatch",
    )


def refused_prompt(reason: str, number: int, is_last: bool) -> MaskError:
    """Return the error for turns that the template renders in a whole chat, but not as a prompt."""
    problem = f"turn {number + 1}: the chat template refuses the turns before it as a prompt: {reason}"
    fix = "Change the row to what this model's template takes"
    return MaskError(
        problem,
        fix if is_last else f"Set data.loss_on: last_turn. Or: {fix[:1].lower()}{fix[1:]}",
        code="template.refuses_row",
    )


def dropped_part(part: str, is_last: bool) -> MaskError:
    """Return the error for a part of an answer that the template does not render."""
    fix = "Use a template that renders it, or remove it from the rows"
    return MaskError(
        f"the chat template drops a part of an answer: {part[:60]!r}",
        fix if is_last else f"Set data.loss_on: last_turn. Or: {fix[:1].lower()}{fix[1:]}",
        code="template.drops_content",
    )


def missing_end(text: str, position: int, *, number: int) -> MaskError:
    """Return the error for an answer, of turn `number`, that ends at `position` with no end token."""
    shown = text[max(0, position - _SHOWN) : position + _SHOWN]
    problem = f"turn {number + 1} ends with no token that generation could stop on: {shown!r}"
    return MaskError(
        problem, "Use a template that writes {{ eos_token }} after every answer", code="template.no_end_token"
    )


def _first_difference(one: str, other: str) -> int:
    """Return the first position at which two texts differ."""
    pairs = zip(one, other, strict=False)
    return next((position for position, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
