r"""Characters that a text writes as two halves, as JSON writes emoji: `"\ud83d\ude00"`.

Input: a text of a recipe. Outputs: the text with whole characters; whether half of one is left, which no file name and
no file in UTF-8 can hold. Not here: who says so (`yaml_reader`).
"""

from __future__ import annotations

import re

PROBLEM = "the text holds half a character (a lone surrogate)"
FIX = "Write the whole character."

_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_HALF = re.compile("[\ud800-\udfff]")


def join_pairs(text: str) -> str:
    """Return a text in which each two halves of a character are one."""
    return _PAIR.sub(lambda match: match[0].encode("utf-16", "surrogatepass").decode("utf-16"), text)


def has_half(text: str) -> bool:
    """Tell whether a text holds half of a character."""
    return _HALF.search(text) is not None
