"""The language of a text, where the package py3langid is installed; its script decides where that is enough.

In: a text. Out: a code of ISO 639-1, or `unknown`. Of Latin script only clauses are read: four words in a row without
a sign between them, so that lists of names, formulas and code say nothing. Not here: which language a row must have
(`language`).
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable
from typing import Any

from trl_sft.evaluation import scripts

UNKNOWN = "unknown"
PACKAGE = "py3langid"
# scripts that one language in our list has
_LANGUAGES_OF_SCRIPTS = {
    **{"han": "zh", "japanese": "ja", "hangul": "ko", "thai": "th", "greek": "el"},
    **{"hebrew": "he", "bengali": "bn", "tamil": "ta"},
}
NAMES = {
    **{"ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "ca": "Catalan", "cs": "Czech", "da": "Danish"},
    **{"de": "German", "el": "Greek", "en": "English", "es": "Spanish", "et": "Estonian", "eu": "Basque"},
    **{"fa": "Persian", "fi": "Finnish", "fr": "French", "gl": "Galician", "he": "Hebrew", "hi": "Hindi"},
    **{"hr": "Croatian", "hu": "Hungarian", "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean"},
    **{"lt": "Lithuanian", "lv": "Latvian", "mr": "Marathi", "ms": "Malay", "nl": "Dutch", "no": "Norwegian"},
    **{"pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sk": "Slovak", "sl": "Slovenian"},
    **{"sq": "Albanian", "sr": "Serbian", "sv": "Swedish", "sw": "Swahili", "ta": "Tamil", "th": "Thai"},
    **{"tl": "Tagalog", "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu", "vi": "Vietnamese", "zh": "Chinese"},
}
# languages that a short text does not tell apart
_RELATIVES = (
    frozenset({"id", "ms"}),
    frozenset({"da", "no", "sv"}),
    frozenset({"hr", "sr", "sl"}),
    frozenset({"cs", "sk"}),
    frozenset({"gl", "pt", "es"}),
    frozenset({"hi", "mr"}),
    frozenset({"ru", "uk", "bg"}),
)
_CLAUSE = re.compile(r"[^\W\d_]+(?:['’ -]{1,2}[^\W\d_]+){3,}")
_LEAST_CHARACTERS = 30  # of all clauses
_READ_CHARACTERS, _CLAUSE_CHARACTERS = 1000, 300  # of a text, and of its clauses, that are read
_LEAST_PROBABILITY = 0.6
# words that are frequent in English and in no other language of these; three of them in ASCII are English
_ENGLISH_WORDS = frozenset(
    "the and to that with this are you for how what each they she his from your their there would could much".split()
)
_LEAST_ENGLISH_WORDS = 3
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`|https?://\S+", re.DOTALL)


def find_identifier() -> Callable[[str], str] | None:
    """Return `identify` where the package is installed, else None."""
    return identify if importlib.util.find_spec(PACKAGE) else None


@functools.lru_cache(maxsize=64)  # several gates ask for the texts of one row
def identify(text: str) -> str:
    """Return the language of a text, else `unknown`: too few clauses, or no language has a probability of 0.6.

    Example:
        >>> identify("Die Katze schläft auf dem Sofa, während es draußen regnet.")
        'de'

    """
    text = _CODE.sub(" ", text[:_READ_CHARACTERS])
    script = "latin" if text.isascii() else scripts.find_script(text)
    if script in _LANGUAGES_OF_SCRIPTS:
        return _LANGUAGES_OF_SCRIPTS[script]
    # in other scripts names and code are no words of the text
    clauses = ". ".join(_CLAUSE.findall(text)) if script == "latin" else text
    clauses = clauses[:_CLAUSE_CHARACTERS]
    if len(clauses) < _LEAST_CHARACTERS:
        return UNKNOWN
    if clauses.isascii() and len(_ENGLISH_WORDS & set(clauses.lower().split())) >= _LEAST_ENGLISH_WORDS:
        return "en"
    language, probability = _load_model().classify(clauses)
    if language in ("nb", "nn"):
        language = "no"
    return str(language) if language in NAMES and probability >= _LEAST_PROBABILITY else UNKNOWN


def are_different(language: str, other: str) -> bool:
    """Tell whether two languages are known, and are told apart in short texts."""
    if UNKNOWN in (language, other) or language == other:
        return False
    return not any(language in group and other in group for group in _RELATIVES)


@functools.cache
def _load_model() -> Any:
    """Return the model of the package, which gives probabilities: 5 MiB, in 0.1 s."""
    from py3langid import langid

    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
