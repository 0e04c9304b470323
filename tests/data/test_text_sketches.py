"""Sketches of texts: their hashes are those of the definition; a table finds what was added, also after merges."""

import re
import unicodedata
import zlib

import numpy as np
import pytest

from trl_sft.data import mix, text_matches, text_sketches

TEXTS = ["", "a", "Row 3: 4/2 is not 4*2, and -1 is not 1.", "- - -", "Éclair 3,5 -4", "你好 3:4，再见", "x " * 40,
         " ".join(f"word{number}" for number in range(90))]  # fmt: skip
CATEGORIES = {"Pc", "Pd", "Pe", "Pf", "Pi", "Po", "Ps", "Zs", "Zl", "Zp", "Cc", "Cf"}


def normalise(text):
    """Return what the key of a text is made of, letter by letter."""
    text = re.sub(r"[-*/%.,:](?=\d)", lambda sign: chr(0xE000 + ord(sign[0])), text.casefold())
    return "".join(letter for letter in text if unicodedata.category(letter) not in CATEGORIES) or text


@pytest.mark.parametrize("text", TEXTS)
def test_runs_and_key_of_a_text_are_those_of_the_definition(text):
    words = text_matches.split_words(text)
    hashes = [zlib.crc32(word.encode()) + 1 for word in words]
    weights = text_sketches._WEIGHTS.tolist()
    expected = []
    for start in range(len(words) - 7):
        total = sum(hashes[start + place] * weights[place] for place in range(8)) % 2**64
        expected.append((total ^ total >> 29) * weights[-1] % 2**64)
    assert text_sketches.sketch_text(text).runs.tolist() == sorted(expected)
    assert mix._encode_compared(text) == normalise(text).encode()


def test_first_number_of_a_hash_is_found_after_every_merge(monkeypatch):
    monkeypatch.setattr(text_sketches, "_RECENT", 40)
    table, first = text_sketches.HashTable(), {}
    generator = np.random.default_rng(1)
    for number in range(400):
        hashes = np.sort(generator.integers(0, 3000, 20, dtype=np.uint64))
        found = table.find(hashes)
        known = [first[key] for key in hashes.tolist() if key in first]
        assert set(known) <= set(found)
        assert len(found) <= 3 * len(known)  # at most one from each of the dict and the two arrays
        table.add(hashes, number)
        for key in hashes.tolist():
            first.setdefault(key, number)
