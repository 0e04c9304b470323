"""The thought of an answer is taken off by one rule, for scores and in a chat.

Inputs: the text of an answer, and the marks that the chat template writes around a thought. Outputs: the thought, the
rest, and whether the thought was closed. The rule: where the prompt has opened the thought, or the answer begins with
the opening mark, everything up to the first closing mark is the thought. Without a closing mark the whole answer is
thought, and the rest is empty. An opening mark later in an answer is text. Not here: the marks of a template
(`tokenization.thinking`).
"""

from __future__ import annotations

from typing import NamedTuple

RULE = "the thought ends at its first closing mark; an answer that never closes its thought is empty"
COMMON_MARKS = ("<think>", "</think>")  # of answers from a server, whose template is not known


class SplitAnswer(NamedTuple):
    """An answer with its thought apart."""

    answer: str  # without the thought
    thought: str  # "" = none
    is_closed: bool  # False = the thought never ended; True also where there is no thought


def split_thought(text: str, opening: str, closing: str, *, is_open: bool = False) -> SplitAnswer:
    r"""Return an answer with its thought apart.

    Args:
        text: what the model wrote.
        opening: the mark before a thought; "" = the template has none.
        closing: the mark after it; "" = the template has none.
        is_open: whether the prompt ends with the opening mark.

    Example:
        >>> split_thought("<think>2 and 2</think>\n4", "<think>", "</think>").answer
        '4'

    """
    if not opening or not closing:
        return SplitAnswer(text, "", True)
    rest = text
    if rest.lstrip().startswith(opening):  # also where the prompt has opened it already
        rest = rest.lstrip()[len(opening) :]
    elif not is_open:
        return SplitAnswer(text, "", True)
    thought, mark, answer = rest.partition(closing)
    return SplitAnswer(answer.lstrip("\n"), thought.strip(), bool(mark))
