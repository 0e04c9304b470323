"""The key that a user most likely means by a word that is no key: by its meaning first, then by its letters.

Inputs: the word, and where it stands. Outputs: keys, and whether the first one is certain, so that a program may write
it. Not here: values (`corrections`), and the wording of a message.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from trl_sft.recipe import renamed_keys, sections, synonyms
from trl_sft.recipe.upstream import keys, types
from trl_sft.recipe.upstream.fields import Field
from trl_sft.recipe.yaml_reader import Key
from trl_sft.suggestions import is_misspelling

_SHORTEST_ELSEWHERE = 7  # letters of a word whose misspelling is looked for in other sections
_MAX_SUGGESTIONS = 3
_NAMES_OF_TOKENIZERS = (
    "name_or_path",
    "name",
    "path",
    "model_name_or_path",
    "pretrained_model_name_or_path",
    "tokenizer",
)


class SuggestedKeys(NamedTuple):
    """The keys that a word may mean, the most likely first."""

    keys: tuple[Key, ...] = ()
    is_certain: bool = False  # the first one is meant, and takes the value unchanged


def suggest(word: str, key: Key, names: Collection[str]) -> SuggestedKeys:
    """Return the keys that a word most likely means.

    Args:
        word: what the user wrote.
        key: the mapping in which it stands: `("train",)`, `("data", "train", 0)`; () = beside the sections.
        names: the keys of that mapping that a recipe can set.

    Returns:
        The keys with their sections; without keys if nothing is near.

    """
    if word in sections.OWNERS and len(key) > 1:
        return SuggestedKeys()
    if key == ("tokenizer",) and word in _NAMES_OF_TOKENIZERS:
        return SuggestedKeys()  # a recipe has no key for another tokenizer
    by_letters = types.suggest(word, names)
    if by_letters and is_misspelling(word, by_letters, names):
        return SuggestedKeys(((*key, by_letters),), True)
    meant = _find_by_meaning(word, key)
    if meant.keys:
        return meant
    if elsewhere := _find_elsewhere(word, key):
        return SuggestedKeys(tuple(elsewhere[:_MAX_SUGGESTIONS]), len(elsewhere) == 1)
    if by_letters:
        return SuggestedKeys(tuple((*key, name) for name in by_letters.split(" or ")))
    return _find_misspelt_elsewhere(word)


def get_field(key: Key) -> Field | None:
    """Return the declaration of a key; None for a section, and for a key of a nested mapping."""
    if len(key) < 2 or key[0] not in sections.OWNERS:
        return None
    if key[0] == "data" and len(key) > 2:
        return keys.get_fields(keys.SOURCE).get(str(key[-1]))
    if key[:2] == ("evaluate", "generation") and len(key) == 3:
        return keys.get_fields(keys.GENERATION).get(str(key[-1]))
    return keys.get_fields(str(key[0])).get(str(key[1])) if len(key) == 2 else None


def takes(key: Key, value: Any) -> bool:
    """Tell whether a key exists, can be set in a recipe, and accepts a value."""
    field = get_field(key)
    refused = sections.REFUSED.get(_name_section(key), {})
    return field is not None and key[-1] not in refused and types.accepts(field, value)


def _name_section(key: Key) -> str:
    """Return the name under which the tables have the section of a key: `data.*` for a key of a source."""
    if key[0] == "data" and len(key) > 2:
        return keys.SOURCE
    return keys.GENERATION if key[:2] == ("evaluate", "generation") and len(key) == 3 else str(key[0])


def _find_by_meaning(word: str, key: Key) -> SuggestedKeys:
    """Return the key for which a word stands in other trainers; nothing inside a mapping of other keys."""
    normalized = word.lower().replace("_", "").replace("-", "")
    if _is_source(key):
        for table, is_certain in ((synonyms.SOURCE_SYNONYMS, True), (synonyms.SOURCE_RELATED, False)):
            if normalized in table:
                return SuggestedKeys(((*key, table[normalized]),), is_certain)
    if not key and normalized in synonyms.SECTIONS:
        return SuggestedKeys(((synonyms.SECTIONS[normalized],),), True)
    inner = synonyms.SECTION_SYNONYMS.get(str(key[0]), {}) if len(key) == 1 else {}
    if normalized in inner:
        return SuggestedKeys(((*key, inner[normalized]),), True)
    for table, is_certain in ((synonyms.SYNONYMS, True), (synonyms.RELATED, False)):
        meant: Key = tuple(table[normalized].split(".")) if normalized in table else ()
        if not meant or meant == key or (len(meant) == 2 and get_field(meant) is None):
            continue  # no such word, or the installed owner lacks the key
        return SuggestedKeys((meant,), is_certain and not _is_source(key))
    return SuggestedKeys()


def _is_source(key: Key) -> bool:
    """Tell whether a key is that of one source: `data.train`, `data.train.0`."""
    return len(key) > 1 and key[0] == "data" and key[1] in ("train", "eval")


def _find_elsewhere(word: str, key: Key) -> list[Key]:
    """Return the places at which a recipe has a key of this name, under its current or an old name."""
    places: list[Key] = []
    for section in sections.OWNERS:
        if key == (section,):
            continue
        fields = keys.get_fields(section)
        old = renamed_keys.renamed_in(section).get(word)
        is_current = word in fields and word not in sections.REFUSED.get(section, {})
        if is_current or (old is not None and old.new):
            places.append((section, word))
    if not places and word in keys.get_fields(keys.GENERATION) and key != ("evaluate", "generation"):
        places.append(("evaluate", "generation", word))
    if not _is_source(key) and not places and word in keys.get_fields(keys.SOURCE):
        places.append(("data", "train", word))
    return places


def _find_misspelt_elsewhere(word: str) -> SuggestedKeys:
    """Return the key of another section that a word is nearly."""
    if len(word) < _SHORTEST_ELSEWHERE:
        return SuggestedKeys()
    owners: dict[str, list[Key]] = {}
    for section in sections.OWNERS:
        for name in keys.get_fields(section):
            owners.setdefault(name, []).append((section, name))
    nearest = types.suggest(word, owners)
    if not nearest or " or " in nearest or not is_misspelling(word, nearest, owners):
        return SuggestedKeys()
    return SuggestedKeys(tuple(owners[nearest]), len(owners[nearest]) == 1)
