"""What a paraphrase has to keep: numbers, names, quoted texts, code, addresses and negations; what it lost or added.

Inputs: two texts. Outputs: the facts that only one of them has. Names are words with a capital letter inside a
sentence, or at its beginning before a verb or a possessive, and Latin words in Chinese text. Numbers are compared as
`number_words` reads them. Not here: whether two texts mean the same.
"""

from __future__ import annotations

import re
import unicodedata

from trl_sft.building import number_words
from trl_sft.evaluation.checks.text_match import has_ideographs

_QUOTED = re.compile(r"\"([^\"\n]+)\"|“([^”\n]+)”|「([^」\n]+)」|《([^》\n]+)》|`([^`\n]+)`")
_ADDRESS = re.compile(r"https?://\S+|[\w.+-]+@[\w-]+\.\w+")
_NAME = re.compile(r"(?<![.!?:;\n\"“(] )(?<!^)(?<!\n)\b[A-Z][\w’'-]*[\w]\b", re.MULTILINE)
_FIRST_NAME = re.compile(  # "Tom has", "Anna's dog", "Sarah and Ben"
    r"(?:^|(?<=[.!?:;\n] ))(?!(?:He|She|It|We|They|You|This|That|There|Here|What|Who|Which|Where|When|Why|How|Every\w*"
    r"|No\w*|Some\w*|Any\w*|One|Each|All|Many|Most|Both|Another|The|An|My|Your|His|Her|Its|Our|Their|Let)\b)"
    r"([A-Z][a-z]+)(?=['’]s\b| and [A-Z]| (?:has|had|buys|bought|sells|sold|gives|gave|goes|went|wants|wanted|works"
    r"|worked|earns|earned|eats|ate|runs|ran|lives|lived|owns|spends|spent)\b)",
    re.MULTILINE,
)
_CODE = re.compile(r"(?<![A-Za-z])[A-Za-z]+-?\d[\w.-]*\w|(?<![A-Za-z])[A-Za-z]+\d(?!\w)")  # mp3, G1, A380
_LATIN_WORD = re.compile(r"[A-Za-z][\w.+-]*")
_PRONOUNS = ("I", "I'm", "I’m", "I've", "I’ve", "I'd", "I’d", "I'll", "I’ll")
_ONE = re.compile(r"\b(?:one|an?|single|first)\b|一", re.IGNORECASE)  # may stand for the figure 1
_NEGATION = re.compile(
    r"n['’]t\b|\b(?:not|never|no|without|neither|nor|cannot)\b|不(?![同错仅但过断久少管])|没|无(?!论)|(?<![除并])非(?!常)|未(?!来)"
    r"|(?<![特区差级性个分])别(?!人)|勿",
    re.IGNORECASE,
)
# further words that can take the place of a negation in a paraphrase
_NEGATIVE = re.compile(
    rf"{_NEGATION.pattern}|\bun(?!der|til|it|iv|cle|iq|ion|iform)[a-z]{{3,}}|\bim(?:possib|prop|perf|pol|mat)\w+"
    r"|\bin(?:correct|valid|ab|cap|complete|accurate|visib|suffic|adequate|effective|edib|formal|direct|secure)\w*"
    r"|\bir(?:reg|rel|resp)\w+|\bdis(?:like|agree|advantage|allow|trust|honest|appear|satisf)\w*|\bnon-?\w+|\w+less\b"
    r"|\black|\bfail|\bavoid|\bexcept|\bexclud|\bforbid|\brefus|\bden(?:y|ied)|\bprevent|\bstop|\binstead|\brather"
    r"|\bhardly|\brarely|\bseldom|\bunless|\bfree\b|\bremember|\bmiss(?:ing)?\b|\bforget|\bkeep|避免|缺|禁|拒|防止|除|难|否|反",
    re.IGNORECASE,
)
_DIFFERENCE = re.compile(r"(\d[\d.]*)\s*([-−/÷^])\s*(\d[\d.]*)")  # whose two numbers have an order


def find_changes(before: str, after: str, *, names: bool = True) -> list[str]:
    """Return the facts that one of two texts has and the other has not, in order; [] = all were kept.

    Args:
        before: the text of the parent.
        after: the text of the child.
        names: whether names, quoted texts and negations count too; else numbers alone.

    """
    before, after = _normalise(before), _normalise(after)
    old_numbers, new_numbers = number_words.list_numbers(before), number_words.list_numbers(after)
    lost = [f"the number {value} is lost" for value in old_numbers if not _has_number(after, value, new_numbers)]
    if not names:
        return lost
    added = [f"the number {value} is new" for value in new_numbers if not _has_number(before, value, old_numbers)]
    lost += [f"`{fact}` is lost" for fact in list_names(before) if fact.lower() not in after.lower()]
    if not has_ideographs(before):
        words = [fact for fact in _list_capital_words(after) if fact.lower() not in before.lower()]
        added += [f"`{word}` is new" for word in words]
    return lost + added + _find_reversed(before, after) + _find_negations(before, after)


def list_names(text: str) -> list[str]:
    """Return the names, quoted texts, code and addresses of a text, each once."""
    facts = ["".join(match.groups("")) for match in _QUOTED.finditer(text)] + _ADDRESS.findall(text)
    facts += _CODE.findall(text)
    facts += _LATIN_WORD.findall(text) if has_ideographs(text) else _list_capital_words(text)
    return list(dict.fromkeys(facts))


def _list_capital_words(text: str) -> list[str]:
    """Return the words with a capital letter that does not come from the beginning of a sentence."""
    words = _FIRST_NAME.findall(text) + [re.sub(r"['’]s$", "", word) for word in _NAME.findall(text)]
    return [word for word in words if word not in _PRONOUNS and not _is_month(word)]


def _is_month(word: str) -> bool:
    """Tell whether a word is the name of a month, which a date in figures may replace."""
    return number_words.write_figures(f"{word} 1") != f"{word} 1"


def _has_number(text: str, number: str, numbers: list[str]) -> bool:
    """Tell whether a text has a number; `one` and `a` may stand for 1."""
    return number in numbers or (number == "1" and bool(_ONE.search(text)))


def _find_reversed(before: str, after: str) -> list[str]:
    """Return the subtractions, divisions and powers whose numbers changed their places."""
    old, new = (set(_DIFFERENCE.findall(text)) for text in (before, after))
    turned = [(first, sign, second) for first, sign, second in old - new if (second, sign, first) in new - old]
    return [f"`{first} {sign} {second}` is turned around" for first, sign, second in sorted(turned)]


def _find_negations(before: str, after: str) -> list[str]:
    """Return whether a negation was lost or added; another negative word may take its place."""
    if _NEGATION.search(before) and not _NEGATIVE.search(after):
        return ["a negation is lost"]
    if _NEGATION.search(after) and not _NEGATIVE.search(before):
        return ["a negation is new"]
    return []


def _normalise(text: str) -> str:
    """Return a text with one form of each character and of spaces; lines stay lines."""
    text = unicodedata.normalize("NFKC", text).replace("’", "'")
    return "\n".join(" ".join(line.split()) for line in text.splitlines())
