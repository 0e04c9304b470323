"""What a paraphrase has to keep: numbers, names, quoted texts, code and addresses; what a text lost or added of them.

Inputs: two texts. Outputs: the facts that only one of them has. Names are words with a capital letter inside a
sentence, and Latin words in Chinese text. Not here: whether two texts mean the same.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

from trl_sft.evaluation.checks.text_match import has_ideographs

_NUMBER = re.compile(r"(?<![A-Za-z\d])\d+(?:[.,:/]\d+)*%?")
_QUOTED = re.compile(r"\"([^\"\n]+)\"|“([^”\n]+)”|「([^」\n]+)」|《([^》\n]+)》|`([^`\n]+)`")
_ADDRESS = re.compile(r"https?://\S+|[\w.+-]+@[\w-]+\.\w+")
_NAME = re.compile(r"(?<![.!?:;\n\"“(] )(?<!^)(?<!\n)\b[A-Z][\w’'-]*[\w]\b", re.MULTILINE)
_CODE = re.compile(r"(?<![A-Za-z])[A-Za-z]+-?\d[\w.-]*\w|(?<![A-Za-z])[A-Za-z]+\d(?!\w)")  # mp3, G1, A380
_LATIN_WORD = re.compile(r"[A-Za-z][\w.+-]*")
_WORD_NUMBERS = {
    **{"zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7"},
    **{"eight": "8", "nine": "9", "ten": "10", "eleven": "11", "twelve": "12"},
}
_WORD_NUMBER = re.compile(rf"\b({'|'.join(_WORD_NUMBERS)})\b", re.IGNORECASE)


def find_changes(before: str, after: str, *, names: bool = True) -> list[str]:
    """Return the facts that one of two texts has and the other has not, in order; [] = all were kept.

    Args:
        before: the text of the parent.
        after: the text of the child.
        names: whether names and quoted texts count too; else numbers alone.

    """
    old_numbers, new_numbers = _count_numbers(before), _count_numbers(after)
    lost = [f"the number {value} is lost" for value in (old_numbers - new_numbers)]
    added = [f"the number {value} is new" for value in (new_numbers - old_numbers)]
    if not names:
        return lost
    plain = _normalise(after).lower()
    lost += [f"`{fact}` is lost" for fact in list_names(before) if _normalise(fact).lower() not in plain]
    return lost + added


def list_names(text: str) -> list[str]:
    """Return the names, quoted texts, code and addresses of a text, each once."""
    facts = ["".join(match.groups("")) for match in _QUOTED.finditer(text)] + _ADDRESS.findall(text)
    facts += _CODE.findall(text)
    pattern = _LATIN_WORD if has_ideographs(text) else _NAME
    facts += [word for word in pattern.findall(text) if word not in ("I", "I'm", "I’m", "I've", "I’ve", "I'd", "I’d")]
    return list(dict.fromkeys(facts))


def _count_numbers(text: str) -> Counter[str]:
    """Return the numbers of a text; `1,000` is 1000, and small numbers in words count in figures."""
    text = _WORD_NUMBER.sub(lambda match: _WORD_NUMBERS[match[1].lower()], _normalise(text))
    return Counter(re.sub(r",(?=\d{3}(?!\d))", "", number) for number in _NUMBER.findall(text))


def _normalise(text: str) -> str:
    """Return a text with one form of each character and of spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).replace("’", "'").split())
