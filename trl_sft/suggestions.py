"""The known name that a mistyped one most likely means, for the fix of a fault.

Inputs: a word, and the names that are allowed instead of it. Output: the nearest name, or none.
Deliberately not here: how a message words the suggestion.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# The least similarity at which a name is suggested: difflib's ratio, from 0 (nothing in common) to 1 (equal).
# STRICT: for names that resemble each other, as the keys of one owner do (`eval_steps`, `save_steps`). Also for words
# that may be right (an instruction as a task, the name of a recipe file), where a suggestion stops the run. Only a
# typing error is near enough.
STRICT = 0.75
# LOOSE: for few names that do not resemble each other (columns, modules, files, formats, chat templates). A distant
# suggestion still helps: the user sees at once if it is wrong.
LOOSE = 0.5


def nearest_name(word: str, names: Iterable[str], *, cutoff: float, limit: int = 1) -> str:
    """Return the name that is most similar to a word.

    Args:
        word: what the user wrote.
        names: the names that are allowed instead.
        cutoff: `STRICT` or `LOOSE`, the least similarity of a suggestion.
        limit: the largest number of names to return.

    Returns:
        The nearest names, the best first, joined by " or "; "" if none is similar enough.

    """
    return " or ".join(difflib.get_close_matches(word, list(names), limit, cutoff))
