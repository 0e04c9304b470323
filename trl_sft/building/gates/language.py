"""The gate `language`: answers in another language than the row must have, or than its instruction.

In: a row. Out: the script of its answer where that is another one, and its language where the package py3langid is
installed. A text of few letters is `unknown`, which is never rejected. Chinese is counted in characters
(`evaluation.scripts`). Not here: translation, in which instruction and answer differ rightly.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from trl_sft.building.candidates import CandidateRow, Rejection
from trl_sft.building.gates import language_names
from trl_sft.building.gates.language_names import UNKNOWN
from trl_sft.building.gates.row_text import list_answers
from trl_sft.evaluation import scripts

_LEAST_CHARACTERS = 20  # a shorter text has no reliable language; a Chinese character counts as three
_ENGLISH_WORDS = frozenset("the is of and to a in that it are with as by this you be can".split())
_LEAST_WORDS = 3  # of these, from which Latin letters are English sentences
_MOST_CHARACTERS = 2000  # that are read
_EXPECTED = {"en": "latin", "zh": "han"}
_ENOUGH_LETTERS = re.compile(rf"(?:[A-Za-z][^A-Za-z]*){{{_LEAST_CHARACTERS}}}")
_PARTS = re.compile(r"[\n.!?:;\"“”«»„]+")
_WIDE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")
_NAMES_A_LANGUAGE = re.compile(
    r"translat|翻译|translate|\bin (?:english|chinese|spanish|french|german|japanese|korean|russian|arabic|hindi)\b"
    r"|用.{0,4}[文语]|[英中日韩法德俄]文|[英汉日韩法德俄]语|transliterat|拼音|pinyin|chinese|japanese|korean|russian|arabic"
    r"|greek|hebrew|hindi|languages?\b|script|alphabet|language|latin"
    rf"|\b(?:{'|'.join(language_names.NAMES.values())}|mandarin|cantonese|inglés|francés|español|alemán|anglais|français"
    r"|allemand|espagnol|englisch|französisch|deutsch|spanisch|inglese|francese|tedesco|inglês|francês|engels|frans"
    r"|angielski\w*|ingilizce|англий\w*|tradu[cirz]\w*|übersetz\w*|vertaal\w*|przetłumacz\w*|çevir\w*|перевед\w*)\b",
    re.IGNORECASE,
)


class LanguageGate:
    """Rejects rows whose answer is in another script than the row's language, or than its instruction."""

    name = "language"

    def __init__(self, set_language: str = "", identify: Callable[[str], str] | None = None) -> None:
        """Take the language of rows that name none.

        Args:
            set_language: a code of `language_names.NAMES`; "" = the answer of such a row must have the language of its
                instruction.
            identify: returns the language of a text or `unknown`; None = only scripts are compared.

        """
        self._set_language, self._identify = set_language, identify

    def check(self, row: CandidateRow) -> Rejection | None:
        """Compare script and language of each answer with the row's language, else with the instruction."""
        return self._compare_scripts(row) or (self._compare_languages(row) if self._identify else None)

    def _compare_scripts(self, row: CandidateRow) -> Rejection | None:
        """Return a rejection by the script of an answer."""
        name = row.language or self._set_language
        expected = _EXPECTED.get(name)
        instruction = row.instruction
        asked = find_language(instruction)
        for answer in list_answers(row):
            script = find_language(answer)
            if script == UNKNOWN:
                continue
            if expected is not None and script != expected:
                return Rejection(self.name, f"the answer is in {script} script, and the row's language is {name}")
            if expected is None and asked not in (UNKNOWN, script) and not _is_code(answer, script):
                if _NAMES_A_LANGUAGE.search(instruction):
                    return None
                return Rejection(self.name, f"the instruction is in {asked} script, and the answer in {script} script")
        return None

    def _compare_languages(self, row: CandidateRow) -> Rejection | None:
        """Return a rejection by the language of an answer."""
        assert self._identify is not None
        name, instruction = row.language or self._set_language, row.instruction
        expected = name or self._identify(instruction)
        for answer in list_answers(row) if expected != UNKNOWN else ():
            language = self._identify(answer)
            if not language_names.are_different(expected, language):
                continue
            if _NAMES_A_LANGUAGE.search(instruction) or (not name and self._has_part(instruction, language)):
                return None
            shown = language_names.NAMES[language]
            if name:
                return Rejection(self.name, f"the answer is in {shown}, and the row's language is {name}")
            asked = language_names.NAMES[expected]
            return Rejection(self.name, f"the instruction is in {asked}, and the answer in {shown}")
        return None

    def _has_part(self, instruction: str, language: str) -> bool:
        """Tell whether a sentence or line of an instruction is in a language: it asks about a text in another one."""
        assert self._identify is not None
        parts = (self._identify(part) for part in _PARTS.split(instruction[:_MOST_CHARACTERS]))
        return any(part != UNKNOWN and not language_names.are_different(part, language) for part in parts)


def _is_code(answer: str, script: str) -> bool:
    """Tell whether a text in Latin letters is no English sentence: code, names and formulas are of every language."""
    return script == "latin" and len(_ENGLISH_WORDS & set(answer.lower().split())) < _LEAST_WORDS


def find_language(text: str) -> str:
    """Return the script of a text that is long enough to tell, else `unknown`.

    Example:
        >>> find_language("Hi!")
        'unknown'

    """
    text = text[:_MOST_CHARACTERS]
    if text.isascii():
        return "latin" if _ENOUGH_LETTERS.search(text) else UNKNOWN
    letters = sum(map(str.isalpha, text))
    letters += 2 * len(_WIDE.findall(text))
    if letters < _LEAST_CHARACTERS:
        return UNKNOWN
    return scripts.find_script(text) or UNKNOWN
