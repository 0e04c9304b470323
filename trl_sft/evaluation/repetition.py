"""Whether a text repeats itself.

Inputs: a text. Outputs: whether it loops, and the share of its word sequences that occurred before in it. Not here:
what that means for a run (`training.verdict`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# One unit at least four times in a row. Two or three times occur in answers that are meant ("no, no, no").
_LOOP = re.compile(r"(.{1,200}?)\1{3,}", re.DOTALL)
_LOOP_SHARE = 0.5  # of the text
_LOOP_CHARACTERS = 12  # at least: "aaaa" or "1111" may be an answer
_SEQUENCE, _SHORT, _DIFFERENT_SHARE = 6, 60, 0.625  # a quick look at longer texts: the pattern above takes milliseconds
_PART, _PARTS = 12, 4  # characters that are looked for first, and of how many such parts half of a text has at least
_LONGEST = 4000  # characters that are searched, from the end: an answer that loops does not leave its loop


def is_repeating(text: str) -> bool:
    """Tell whether at least half of a text is one unit again and again.

    Example:
        >>> is_repeating("The answer is is is is is is is")
        True
        >>> is_repeating("no, no, no")
        False

    """
    end = text.strip()[-_LONGEST:]
    middle = len(end) // 2
    if middle > _PART * _PARTS and _is_unlike_its_middle(end, middle):
        return False
    # A unit that stands four times in half of a text leaves at most 5 of 8 sequences of characters that are different.
    different = {end[start : start + _SEQUENCE] for start in range(len(end) - _SEQUENCE + 1)}
    if len(end) > _SHORT and len(different) > _DIFFERENT_SHARE * len(end) + _SEQUENCE:
        return False
    longest = max((len(match[0]) for match in _LOOP.finditer(end)), default=0)
    return longest >= max(_LOOP_CHARACTERS, _LOOP_SHARE * len(end))


def _is_unlike_its_middle(text: str, middle: int) -> bool:
    """Tell whether what begins, and what ends, in the middle of a text stands nowhere after, and before, that.

    A loop of half of a text has the middle in it, with two units or more on one of its sides: there it repeats.
    """
    after, before = text[middle : middle + _PART], text[middle - _PART : middle]
    return text.find(after, middle + 1) < 0 and text.rfind(before, 0, middle - 1) < 0


def measure_repetition(words: Sequence[str], length: int = 4) -> float:
    """Return the share of sequences of words that occurred before in the same text; 0.0 for fewer words.

    It is seq-rep-n of Welleck et al. 2019, https://arxiv.org/abs/1908.04319: 1 - different sequences / sequences.

    Args:
        words: of a text.
        length: of a sequence.

    """
    sequences = [tuple(words[start : start + length]) for start in range(len(words) - length + 1)]
    return 1 - len(set(sequences)) / len(sequences) if sequences else 0.0
