"""An answer as a check gets it.

Inputs: the text of an answer, the expected answer, and what the row says of its check. Not here: any rule.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class CheckedAnswer(NamedTuple):
    """An answer of one model with what is expected."""

    answer: str  # without its thought
    reference: str  # the expected answer; "" = the row has none
    parameters: Any = None  # of the check, from the row or the command line: a pattern, a schema, tests
    prompt: Any = None  # a text, or messages
    task: str = ""
