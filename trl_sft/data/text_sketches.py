"""Short descriptions of texts, and an index of them: which earlier text may be a duplicate of a new one.

Inputs: texts, one after another. Outputs: the numbers of earlier texts that are equal, that share runs of eight words,
or whose three-word sequences are alike by MinHash (Broder 1997). The index holds hashes and no text. A number is a
candidate only: `text_matches.compare_texts` decides. Deliberately not here: what follows from a duplicate.
"""

from __future__ import annotations

import zlib
from collections import Counter
from typing import NamedTuple

import numpy as np

from trl_sft.data import mix, text_matches

BANDS, ROWS = (
    16,
    3,
)  # a Jaccard index of 0.5 makes a candidate with a probability of 0.88, 0.68 with 0.997, 0.1 with 0.02
_SEQUENCE_WORDS = 3  # of MinHash
_ALL_RUNS = 16  # a text of no more runs is indexed by all of them, a longer one by every fourth, chosen by its hash
_RUN_SHARE = 4
_MOST_CANDIDATES = 4
_LEAST_ESTIMATE = 0.33  # of the Jaccard index, from which a text is a candidate
_LEAST_RUNS = 0.1  # of the runs of a text, of which a fourth may be in the index
_RECENT = 1 << 16  # entries of a table that are in a dict, at least
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


def sketch_text(text: str, *, words_of_sequence: int = _SEQUENCE_WORDS) -> TextSketch:
    """Return the hashes of a text.

    Args:
        text: any text.
        words_of_sequence: how many words in order MinHash compares: 1 compares the words alone, for short texts.

    """
    words = text_matches.split_words(text)
    hashes = np.fromiter((zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words), np.uint64, len(words))
    runs = _hash_sequences(hashes, text_matches.RUN_WORDS)
    bands, minima = _hash_bands(_hash_sequences(hashes, words_of_sequence))
    return TextSketch(mix.hash_texts([text]), bands, runs, minima)


def _hash_sequences(hashes: np.ndarray, length: int) -> np.ndarray:
    """Return a hash of each sequence of so many words."""
    count = len(hashes) - length + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    total = np.zeros(count, np.uint64)
    for position in range(length):
        total += (hashes[position : position + count] + np.uint64(1)) * _WEIGHTS[position]
    total ^= total >> np.uint64(29)
    hashed: np.ndarray = total * _WEIGHTS[-1]
    return hashed


def _hash_bands(sequences: np.ndarray) -> tuple[np.ndarray, bytes]:
    """Return the bands of the MinHash of sequences, and a byte of each minimum."""
    if not len(sequences):
        return np.zeros(0, np.uint64), bytes(BANDS * ROWS)
    minima = ((_FACTORS * np.unique(sequences) + _OFFSETS) >> np.uint64(32)).min(axis=1)
    bands = (minima.reshape(BANDS, ROWS) * _WEIGHTS[:ROWS]).sum(axis=1, dtype=np.uint64) ^ _BAND_SALT
    return bands, minima.astype(np.uint8).tobytes()


class HashTable:
    """The first number that was added for each hash: new entries in a dict, the others in sorted arrays of 12 bytes."""

    def __init__(self) -> None:
        """Begin with no hash."""
        self._recent: dict[int, int] = {}
        self._hashes, self._numbers = np.zeros(0, np.uint64), np.zeros(0, np.int32)

    def find(self, hashes: np.ndarray) -> list[int]:
        """Return the numbers of the hashes that are known."""
        recent = [self._recent[key] for key in hashes.tolist() if key in self._recent]
        if not len(self._hashes) or not len(hashes):
            return recent
        places = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        return [*self._numbers[places[self._hashes[places] == hashes]].tolist(), *recent]

    def add(self, hashes: np.ndarray, number: int) -> None:
        """Add hashes that are not known yet."""
        for key in hashes.tolist():
            self._recent.setdefault(key, number)
        if len(self._recent) > max(_RECENT, len(self._hashes) // 8):
            self._merge()

    def _merge(self) -> None:
        """Move the new entries into the arrays."""
        hashes = np.fromiter(self._recent, np.uint64, len(self._recent))
        numbers = np.fromiter(self._recent.values(), np.int32, len(self._recent))
        order = np.argsort(hashes)
        hashes, numbers = hashes[order], numbers[order]
        places = np.searchsorted(self._hashes, hashes)
        if len(self._hashes):
            is_new = self._hashes[np.minimum(places, len(self._hashes) - 1)] != hashes
            hashes, numbers, places = hashes[is_new], numbers[is_new], places[is_new]
        self._hashes = np.insert(self._hashes, places, hashes)
        self._numbers = np.insert(self._numbers, places, numbers)
        self._recent = {}


class SketchIndex:
    """The sketches of many texts, which are numbered in the order in which they are added."""

    def __init__(self) -> None:
        """Begin with no text."""
        self.size = 0
        self._keys, self._bands, self._runs = HashTable(), HashTable(), HashTable()
        self._minima = bytearray()

    def find_equal(self, sketch: TextSketch) -> int | None:
        """Return the first text that is equal apart from case, spaces and punctuation; None = there is none."""
        return next(iter(self._keys.find(make_array(sketch.key))), None)

    def find_candidates(self, sketch: TextSketch) -> list[int]:
        """Return the texts that share most with a text: at most four by MinHash and four by runs of eight words."""
        minima = np.frombuffer(sketch.minima, np.uint8)
        near = []
        for number in set(self._bands.find(sketch.bands)):
            start = number * len(minima)
            other = np.frombuffer(bytes(self._minima[start : start + len(minima)]), np.uint8)
            near.append(((minima == other).mean(), number))
        near = sorted((entry for entry in near if entry[0] >= _LEAST_ESTIMATE), reverse=True)[:_MOST_CANDIDATES]
        least = _LEAST_RUNS * len(sketch.runs)
        runs = Counter(self._runs.find(sketch.runs)).most_common(_MOST_CANDIDATES)
        found = [number for _, number in near] + [number for number, count in runs if count >= least]
        return list(dict.fromkeys(found))

    def add(self, sketch: TextSketch) -> int:
        """Add a text; return its number."""
        number, self.size = self.size, self.size + 1
        self._keys.add(make_array(sketch.key), number)
        self._bands.add(sketch.bands, number)
        self._minima += sketch.minima
        runs = sketch.runs
        if len(runs) > _ALL_RUNS:
            runs = runs[runs % np.uint64(_RUN_SHARE) == 0]
        self._runs.add(runs, number)
        return number


def make_array(key: int) -> np.ndarray:
    """Return the key of a text as the hashes that a table takes."""
    return np.array([key & 0xFFFFFFFFFFFFFFFF], np.uint64)
