"""Letters of another script that look like those around them: `ѕeed` with a Cyrillic first letter.

Input: a word of a recipe. Output: which letter it is, in words, since the word and the right one look alike in a
message. Not here: whether the word is right.
"""

from __future__ import annotations

import unicodedata

_SCRIPTS = ("CYRILLIC", "GREEK", "FULLWIDTH", "MATHEMATICAL")  # have letters that look like Latin ones


def describe(word: str) -> str:
    """Return the first letter or space of another script among Latin letters, for the end of a message; "" = none."""
    if word.isascii() or not any(letter.isascii() and letter.isalpha() for letter in word):
        return ""
    for letter in word:
        name = unicodedata.name(letter, "")
        is_space = unicodedata.category(letter) == "Zs" and letter != " "
        if is_space or (letter.isalpha() and name.startswith(_SCRIPTS)):
            return f"; it has U+{ord(letter):04X} ({name.lower()})"
    return ""
