"""The known name that a mistyped one most likely means, for the fix of a fault.

Inputs: a word and the names that are known in its place. Output: the nearest name, or none.
Deliberately not here: how a message words the suggestion.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# The least similarity at which a name is suggested: difflib's ratio, from 0 (nothing in common) to 1 (equal).
# STRICT: the names resemble each other, as the keys of one owner do (`eval_steps`, `save_steps`), or a match
# refuses a word that could be meant as it stands (a task, a recipe file). Only a slip of the fingers counts.
STRICT = 0.75
# LOOSE: few names, chosen independently of each other (columns, modules, files, formats, chat templates).
# A far match still helps, because a wrong one is seen at once.
LOOSE = 0.5


def nearest_name(word: str, names: Iterable[str], *, cutoff: float, limit: int = 1) -> str:
    """Return the name that is most similar to a word.

    Args:
        word: what the user wrote.
        names: the names that are known in its place.
        cutoff: `STRICT` or `LOOSE`, the least similarity of a suggestion.
        limit: the largest number of names to return.

    Returns:
        The nearest names, the best first, joined by " or "; "" if none is similar enough.

    """
    return " or ".join(difflib.get_close_matches(word, list(names), limit, cutoff))
