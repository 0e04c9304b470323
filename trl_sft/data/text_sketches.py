"""Short descriptions of texts, and an index of them: which earlier text may be a duplicate of a new one.

Inputs: texts, one after another. Outputs: the numbers of earlier texts that are equal, that share runs of eight words,
or whose three-word sequences are alike by MinHash (Broder 1997). The index holds hashes and no text. A number is a
candidate only: `text_matches.compare_texts` decides. Deliberately not here: what follows from a duplicate.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from trl_sft.data import mix, text_matches

BANDS, ROWS = (
    16,
    3,
)  # a Jaccard index of 0.5 makes a candidate with a probability of 0.88, 0.68 with 0.997, 0.1 with 0.02
_SEQUENCE_WORDS = 3  # of MinHash
_ALL_RUNS = 16  # a text of no more runs is indexed by all of them, a longer one by every fourth, chosen by its hash
_RUN_SHARE = np.uint64(4)
_MOST_CANDIDATES = 4
_LEAST_ESTIMATE = 0.33  # of the Jaccard index, from which a text is a candidate
_LEAST_EQUAL = math.ceil(_LEAST_ESTIMATE * BANDS * ROWS)
_LEAST_RUNS = 0.1  # of the runs of a text, of which a fourth may be in the index
_MOST_WORDS = 1 << 17  # whose hashes are remembered
_SHIFT = np.uint64(29)
_RECENT = 1 << 14  # entries of a table that are in a dict, at most
_LARGE = 8  # times as many entries as the small array of a table are in the large one
_random = np.random.default_rng(20261126)
_WEIGHTS = _random.integers(0, 1 << 63, text_matches.RUN_WORDS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_FACTORS = _random.integers(0, 1 << 63, (BANDS * ROWS, 1), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_OFFSETS = _random.integers(0, 1 << 63, (BANDS * ROWS, 1), dtype=np.uint64)
_BAND_SALT = np.arange(1, BANDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


class TextSketch(NamedTuple):
    """The hashes of a text."""

    key: int  # of the text without case, spaces and punctuation
    bands: np.ndarray  # (BANDS,) uint64; (0,) for a text of fewer words than a sequence
    runs: np.ndarray  # (runs,) uint64, of eight words each
    minima: bytes  # (BANDS * ROWS,) one byte of each minimum: the share that is equal estimates the Jaccard index


class _WordHashes(dict[str, int]):
    """The hashes of the words that were met so far, plus 1; emptied where it grows too large."""

    def __missing__(self, word: str) -> int:
        """Compute the hash of a new word."""
        if len(self) >= _MOST_WORDS:
            self.clear()
        value = self[word] = zlib.crc32(word.encode("utf-8", "surrogatepass")) + 1
        return value


_word_hashes = _WordHashes()


def sketch_text(text: str, *, words_of_sequence: int = _SEQUENCE_WORDS) -> TextSketch:
    """Return the hashes of a text.

    Args:
        text: any text.
        words_of_sequence: how many words in order MinHash compares: 1 compares the words alone, for short texts.

    """
    return sketch_words(text_matches.split_words(text), mix.hash_texts([text]), words_of_sequence=words_of_sequence)


def sketch_words(words: Sequence[str], key: int, *, words_of_sequence: int = _SEQUENCE_WORDS) -> TextSketch:
    """Return the hashes of a text whose words and key are known; see `sketch_text`."""
    hashes = np.fromiter(map(_word_hashes.__getitem__, words), np.uint64, len(words))
    runs = _hash_sequences(hashes, text_matches.RUN_WORDS)
    runs.sort()  # as the bands: neighbours are looked up after each other
    bands, minima = _hash_bands(_hash_sequences(hashes, words_of_sequence))
    return TextSketch(key, bands, runs, minima)


def _hash_sequences(hashes: np.ndarray, length: int) -> np.ndarray:
    """Return a hash of each sequence of so many words."""
    if len(hashes) < length:
        return np.zeros(0, np.uint64)
    total = np.correlate(hashes, _WEIGHTS[:length])  # of each sequence the weighted sum, modulo 2**64
    total ^= total >> _SHIFT
    total *= _WEIGHTS[-1]
    return total


def _hash_bands(sequences: np.ndarray) -> tuple[np.ndarray, bytes]:
    """Return the bands of the MinHash of sequences, and a byte of each minimum."""
    if not len(sequences):
        return np.zeros(0, np.uint64), bytes(BANDS * ROWS)
    products = _FACTORS * sequences
    products += _OFFSETS
    minima = products.min(axis=1) >> np.uint64(32)
    bands = (minima.reshape(BANDS, ROWS) * _WEIGHTS[:ROWS]).sum(axis=1, dtype=np.uint64) ^ _BAND_SALT
    bands.sort()
    return bands, minima.astype(np.uint8).tobytes()


class _SortedHashes(NamedTuple):
    """Hashes in rising order, each with its number: 12 bytes an entry."""

    hashes: np.ndarray  # (entries,) uint64
    numbers: np.ndarray  # (entries,) int32

    def find(self, hashes: np.ndarray) -> list[int]:
        """Return the numbers of those of the hashes that are here."""
        if not len(self.hashes):
            return []
        places = np.searchsorted(self.hashes, hashes)
        places[places == len(self.hashes)] = 0
        found: list[int] = self.numbers[places[self.hashes[places] == hashes]].tolist()
        return found

    def merge(self, newer: _SortedHashes) -> _SortedHashes:
        """Return the entries of both; of a hash that both have, the one that is here."""
        places = np.searchsorted(self.hashes, newer.hashes)
        hashes, numbers = newer
        if len(self.hashes):
            is_new = self.hashes[np.minimum(places, len(self.hashes) - 1)] != hashes
            hashes, numbers, places = hashes[is_new], numbers[is_new], places[is_new]
        return _SortedHashes(np.insert(self.hashes, places, hashes), np.insert(self.numbers, places, numbers))


_NO_HASHES = _SortedHashes(np.zeros(0, np.uint64), np.zeros(0, np.int32))


class HashTable:
    """The first number that was added for each hash.

    New entries are in a dict, which takes ten times the memory of an array. When it is full, they go into a small
    array, and when that has an eighth of the entries, into the large one.
    """

    def __init__(self) -> None:
        """Begin with no hash."""
        self._recent: dict[int, int] = {}
        self._small, self._large = _NO_HASHES, _NO_HASHES

    def find(self, hashes: np.ndarray) -> list[int]:
        """Return the numbers of the hashes that are known."""
        recent = [self._recent[key] for key in hashes.tolist() if key in self._recent]
        return [*self._large.find(hashes), *self._small.find(hashes), *recent]

    def add(self, hashes: np.ndarray, number: int) -> None:
        """Add hashes that are not known yet."""
        for key in hashes.tolist():
            self._recent.setdefault(key, number)
        if len(self._recent) > _RECENT:
            self._merge()

    def _merge(self) -> None:
        """Move the new entries into the arrays."""
        hashes = np.fromiter(self._recent, np.uint64, len(self._recent))
        numbers = np.fromiter(self._recent.values(), np.int32, len(self._recent))
        order = np.argsort(hashes)
        self._small = self._small.merge(_SortedHashes(hashes[order], numbers[order]))
        self._recent = {}
        if len(self._small.hashes) > len(self._large.hashes) // _LARGE:
            self._large, self._small = self._large.merge(self._small), _NO_HASHES


class SketchIndex:
    """The sketches of many texts, which are numbered in the order in which they are added."""

    def __init__(self, *, finds_equal: bool = True) -> None:
        """Begin with no text; `finds_equal`: whether keys are held, for `find_equal`."""
        self.size = 0
        self._keys = HashTable() if finds_equal else None
        self._bands, self._runs, self._runs_of_long = HashTable(), HashTable(), HashTable()
        self._minima = bytearray()

    def find_equal(self, sketch: TextSketch) -> int | None:
        """Return the first text that is equal apart from case, spaces and punctuation; None = there is none."""
        return None if self._keys is None else next(iter(self._keys.find(make_array(sketch.key))), None)

    def find_candidates(self, sketch: TextSketch) -> list[int]:
        """Return the texts that share most with a text: at most four by MinHash and four by runs of eight words."""
        least = _LEAST_RUNS * len(sketch.runs)
        counts = Counter(self._runs.find(sketch.runs) + self._runs_of_long.find(_choose_runs(sketch.runs)))
        runs = sorted((-count, number) for number, count in counts.items() if count >= least)[:_MOST_CANDIDATES]
        return list(dict.fromkeys([*self._find_near(sketch), *(number for _, number in runs)]))

    def _find_near(self, sketch: TextSketch) -> list[int]:
        """Return the texts with most equal minima, at most four of those that share a band."""
        numbers = list(set(self._bands.find(sketch.bands)))
        if not numbers:
            return []
        known = np.frombuffer(self._minima, np.uint8).reshape(-1, BANDS * ROWS)[numbers]
        equal = np.count_nonzero(known == np.frombuffer(sketch.minima, np.uint8), axis=1).tolist()
        del known  # the bytes cannot grow while an array looks at them
        near = [(count, number) for count, number in zip(equal, numbers, strict=True) if count >= _LEAST_EQUAL]
        return [number for _, number in sorted(near, reverse=True)[:_MOST_CANDIDATES]]

    def add(self, sketch: TextSketch) -> int:
        """Add a text; return its number."""
        number, self.size = self.size, self.size + 1
        if self._keys is not None:
            self._keys.add(make_array(sketch.key), number)
        self._bands.add(sketch.bands, number)
        self._minima += sketch.minima
        if len(sketch.runs) > _ALL_RUNS:
            self._runs_of_long.add(_choose_runs(sketch.runs), number)
        else:
            self._runs.add(sketch.runs, number)
        return number


def _choose_runs(runs: np.ndarray) -> np.ndarray:
    """Return the runs by which a long text is indexed."""
    chosen: np.ndarray = runs[runs % _RUN_SHARE == 0]
    return chosen


def make_array(key: int) -> np.ndarray:
    """Return the key of a text as the hashes that a table takes."""
    return np.array([key & 0xFFFFFFFFFFFFFFFF], np.uint64)
