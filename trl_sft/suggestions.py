"""The known name that a mistyped one most likely means, for the fix of a fault.

Inputs: a word, and the names that are allowed instead of it. Outputs: the nearest name, or none; and whether the
word is surely a misspelling of it, so that a program may write the name.
Deliberately not here: how a message words the suggestion.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable
from itertools import islice

# The least similarity at which a name is suggested: difflib's ratio, from 0 (nothing in common) to 1 (equal).
# STRICT: for names that resemble each other, as the keys of one owner do (`eval_steps`, `save_steps`). Also for words
# that may be right (an instruction as a task, the name of a recipe file), where a suggestion stops the run. Only a
# typing error is near enough.
STRICT = 0.75
# LOOSE: for few names that do not resemble each other (columns, modules, files, formats, chat templates). A distant
# suggestion still helps: the user sees at once if it is wrong.
LOOSE = 0.5
# A misspelling is certain if it is this near to one name, and every other name is farther by the gap.
_CERTAIN, _GAP = 0.84, 0.05
_MOST_COMPARED = 2000  # names with which a word is compared; a file may have more columns
_SHORTEST, _SHORTEST_SLIP = 4, 5  # letters of a word whose misspelling can be certain: by nearness, by one wrong letter


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
    return " or ".join(difflib.get_close_matches(word, list(islice(names, _MOST_COMPARED)), limit, cutoff))


def is_misspelling(word: str, name: str, names: Collection[str]) -> bool:
    """Tell whether a word is surely a misspelling of one name: very near to it, and clearly farther from all others."""
    if (
        len(names) > _MOST_COMPARED
        or len(word) < _SHORTEST
        or name not in names
        or re.findall(r"\d", word) != re.findall(r"\d", name)
    ):
        return False
    lower = word.lower()
    nearness = {other: difflib.SequenceMatcher(None, lower, other).ratio() for other in names}
    best = nearness.pop(name)
    if best - max(nearness.values(), default=0.0) < _GAP:
        return False
    return best >= _CERTAIN or (len(word) >= _SHORTEST_SLIP and _is_one_slip(lower, name))


def _is_one_slip(word: str, name: str) -> bool:
    """Tell whether one letter is missing, added, wrong, or exchanged with the next one."""
    if len(word) > len(name):
        word, name = name, word
    start = next((number for number, letter in enumerate(word) if letter != name[number]), len(word))
    if len(word) < len(name):
        return word[start:] == name[start + 1 :]
    rest, expected = word[start:], name[start:]
    return rest[1:] == expected[1:] or (rest[:2] == expected[1::-1] and rest[2:] == expected[2:])
