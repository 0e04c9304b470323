"""Finds texts that are equal or nearly equal: training rows that have an evaluation prompt, and duplicates in one set.

Inputs: texts. Outputs: pairs of them, each with what they share. Three steps, the strongest counts: equal apart from
case, spacing and punctuation (the key of `mix`); runs of eight words, as decontamination counts them since Brown et al.
2020; the Jaccard index of their words with the words in the same order. The index is computed from an inverted index,
and not estimated by MinHash: no pair is missed, and no package is needed. A Chinese or Japanese character is a word.
Deliberately not here: which text of a row is compared, and what follows from a match.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from trl_sft.data import mix

EXACT, OVERLAP, NEAR, NUMBERS, PHRASE = "exact", "overlap", "near", "numbers", "phrase"
LEAKS = (EXACT, OVERLAP, NEAR)  # texts with other numbers, or on one subject with a common phrase, are no leaks
RUN_WORDS = 8  # of a run; a shorter text is compared for equality alone
LEAST_COVERAGE = 0.5  # of a text's runs, from which an overlap is more than a phrase
LEAST_JACCARD = 0.6
_LEAST_ORDER = 0.7  # share of the words of two near texts that stand in the same order
_FREQUENT_SHARE = 0.3  # of a text's words, its most frequent ones, that find no candidates; below LEAST_JACCARD
_WORDING_SHARE, _LEAST_WORDING = 0.25, 5  # of the texts that have a run: it is part of their wording
# `one` is a pronoun too
NUMBER_WORDS = frozenset(
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen"
    " nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million half third quarter twice"
    " thrice double triple dozen".split()
)
_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W_{_IDEOGRAPHS}]+")


class TextMatch(NamedTuple):
    """Two texts that share more than chance explains."""

    text: int  # the number of the text
    reference: int  # the number of the reference
    kind: str  # EXACT, OVERLAP, NEAR, NUMBERS (one of the first three but for its numbers) or PHRASE
    similarity: float  # share of the reference's runs (OVERLAP, PHRASE), Jaccard index (NEAR, NUMBERS), or 1


class TextComparison(NamedTuple):
    """What a text and a reference share."""

    kind: str  # as in `TextMatch`; "" = nothing
    similarity: float  # as in `TextMatch`
    jaccard: float  # index of their words


class _Content(NamedTuple):
    """A text as it is compared, without the wording that many texts have."""

    words: list[str]  # in order
    runs: frozenset[str]
    word_set: frozenset[str]


class ReferenceIndex:
    """Finds texts that match one of many references; its memory is that of the references, not of the texts."""

    def __init__(self, references: Sequence[str], sample: Iterable[str] = ()) -> None:
        """Index references.

        Args:
            references: texts; their numbers are their positions.
            sample: some of the texts that will be compared: what many of them and of the references have in common is
                the wording around their content ("Below is an instruction ..."), and is not compared.

        """
        self._by_key: dict[int, list[int]] = defaultdict(list)
        for number, text in enumerate(references):
            self._by_key[_compute_key(text)].append(number)
        self._copies = list(self._by_key.values())  # of each different reference all numbers
        words = [split_words(references[copies[0]]) for copies in self._copies]
        others = {_compute_key(text): text for text in sample}
        known = [split_words(text) for key, text in others.items() if key not in self._by_key]
        self._wording = _find_wording([*words, *known])
        self._references = [self._read(parts) for parts in words]
        self._positions = {key: position for position, key in enumerate(self._by_key)}
        self._sizes = np.array([len(reference.word_set) for reference in self._references], np.int64)
        self._by_run: dict[str, list[int]] = defaultdict(list)
        by_word: dict[str, list[int]] = defaultdict(list)
        for position, reference in enumerate(self._references):
            for run in reference.runs:
                self._by_run[run].append(position)
            for word in reference.word_set if reference.runs else ():
                by_word[word].append(position)
        self._by_word = {word: np.array(positions, np.int32) for word, positions in by_word.items()}

    def find(self, text: str, number: int = 0) -> list[TextMatch]:
        """Return the references that a text matches, each with its strongest kind; `number`: of the text."""
        position = self._positions.get(_compute_key(text))
        equal = self._copies[position] if position is not None else []
        matches = [TextMatch(number, reference, EXACT, 1.0) for reference in equal]
        content = self._read(split_words(text))
        if not content.runs:
            return matches
        shared = Counter(found for run in content.runs & self._by_run.keys() for found in self._by_run[run])
        for found in sorted((set(shared) | self._list_candidates(content.word_set)) - {position}):
            kind, similarity = _compare(content, self._references[found], shared[found])
            if kind:
                matches += [TextMatch(number, copy, kind, similarity) for copy in self._copies[found]]
        return matches

    def find_all(self, texts: Iterable[str]) -> Iterator[TextMatch]:
        """Yield the matches of many texts, which are numbered from 0."""
        for number, text in enumerate(texts):
            yield from self.find(text, number)

    def _read(self, words: list[str]) -> _Content:
        """Return a text as it is compared."""
        runs = _list_runs(words)
        if not self._wording.isdisjoint(runs):
            words = _remove_wording(words, runs, self._wording)
            runs = _list_runs(words)
        return _Content(words, frozenset(runs), frozenset(words))

    def _list_candidates(self, words: frozenset[str]) -> set[int]:
        """Return all references that can have the least Jaccard index with a text.

        With n and m different words, two texts have the index J if they share J / (1 + J) * (n + m) of them. The most
        frequent words of the text are not looked up, because most references have them; each is counted as shared.
        """
        postings = sorted((self._by_word[word] for word in words if word in self._by_word), key=len)
        size = len(words)
        if len(postings) < LEAST_JACCARD * size:
            return set()
        skipped = max(0, math.floor(_FREQUENT_SHARE * size) - (size - len(postings)))
        counts = np.bincount(np.concatenate(postings[: len(postings) - skipped]), minlength=len(self._sizes))
        least = LEAST_JACCARD / (1 + LEAST_JACCARD) * (size + self._sizes) - skipped - 1e-9
        return set(np.flatnonzero((counts >= least) & (counts > 0)).tolist())


def compare_texts(text: str, reference: str) -> TextComparison:
    """Return what two texts share, without regard to a wording that many texts have."""
    if _compute_key(text) == _compute_key(reference):
        return TextComparison(EXACT, 1.0, 1.0)
    first, second = _read_content(text), _read_content(reference)
    union = len(first.word_set | second.word_set)
    jaccard = len(first.word_set & second.word_set) / union if union else 0.0
    kind, similarity = _compare(first, second, len(first.runs & second.runs)) if union else ("", 0.0)
    return TextComparison(kind, similarity, jaccard)


def _compare(content: _Content, reference: _Content, shared_runs: int) -> tuple[str, float]:
    """Return what a text and a reference share: a kind, "" = nothing, and how much."""
    coverage = shared_runs / len(reference.runs) if reference.runs else 0.0
    common = len(content.word_set & reference.word_set)
    jaccard = common / (len(content.word_set) + len(reference.word_set) - common)
    is_overlap = coverage >= LEAST_COVERAGE
    if is_overlap or (jaccard >= LEAST_JACCARD and _compute_order(content, reference) >= _LEAST_ORDER):
        others = content.word_set ^ reference.word_set
        if others and all(word.isnumeric() or word in NUMBER_WORDS for word in others):
            return NUMBERS, jaccard
        return (OVERLAP, coverage) if is_overlap else (NEAR, jaccard)
    return (PHRASE, coverage) if coverage else ("", 0.0)


def _read_content(text: str) -> _Content:
    words = split_words(text)
    return _Content(words, frozenset(_list_runs(words)), frozenset(words))


def _compute_order(content: _Content, reference: _Content) -> float:
    """Return the share of the words of two texts that stand in the same order."""
    return difflib.SequenceMatcher(None, content.words, reference.words, autojunk=False).ratio()


def group_duplicates(texts: Sequence[str]) -> list[list[TextMatch]]:
    """Return the groups of texts that are leaks of each other, without the first text of each.

    Args:
        texts: of one set.

    Returns:
        Groups in the order of their first text. Of each later text one match: the text, and as reference the text of
        the group that it resembles most, which stands before it.

    """
    best: dict[int, TextMatch] = {}
    for match in ReferenceIndex(texts).find_all(texts):
        if match.reference < match.text and match.kind in LEAKS:
            known = best.get(match.text)
            if known is None or _rank(match) > _rank(known):
                best[match.text] = match
    roots: dict[int, int] = {}
    groups: dict[int, list[TextMatch]] = {}
    for number in sorted(best):
        reference = best[number].reference
        roots[number] = roots.get(reference, reference)
        groups.setdefault(roots[number], []).append(best[number])
    return [groups[root] for root in sorted(groups)]


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation; an ideograph is a word.

    Example:
        >>> split_words("Don't sum 3,5: 你好!")
        ['don', 't', 'sum', '3', '5', '你', '好']

    """
    return list(_split_words(text))


@functools.lru_cache(maxsize=8)  # gates and tables ask for the words of one row in turn
def _split_words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.casefold()))


def _rank(match: TextMatch) -> tuple[int, float]:
    """Return how strong a match is, for comparison."""
    return -LEAKS.index(match.kind), match.similarity


def _compute_key(text: str) -> int:
    """Return the key that texts share if they differ only in case, spacing and punctuation."""
    return mix.hash_texts([text])


def _list_runs(words: Sequence[str]) -> list[str]:
    """Return all runs of eight words, in order."""
    return [" ".join(words[start : start + RUN_WORDS]) for start in range(len(words) - RUN_WORDS + 1)]


def _find_wording(texts: Sequence[Sequence[str]]) -> frozenset[str]:
    """Return the runs that so many texts have that they are their wording, not their content."""
    least = max(_LEAST_WORDING, _WORDING_SHARE * len(texts))
    counts = Counter(run for words in texts for run in set(_list_runs(words)))
    return frozenset(run for run, count in counts.items() if count >= least)


def _remove_wording(words: Sequence[str], runs: Sequence[str], wording: frozenset[str]) -> list[str]:
    """Return the words that stand in no run of the wording."""
    is_wording = [False] * len(words)
    for start, run in enumerate(runs):
        if run in wording:
            is_wording[start : start + RUN_WORDS] = [True] * RUN_WORDS
    return [word for word, hidden in zip(words, is_wording, strict=True) if not hidden]
