"""Which rows an epoch trains, and in which order: held out, dropped, weighed.

In: formatted rows and the run's seed. Out: row numbers, the same on every process and machine: numpy's
generators give the same draws everywhere (https://numpy.org/doc/stable/reference/random/compatibility.html).
Deliberately absent: the rows' texts, but for the key by which equal ones are found.
"""

from __future__ import annotations

import functools
import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from datasets.fingerprint import Hasher

from trl_sft.turns import Message

_PLANES = 0x20000  # where Unicode has punctuation and spaces


def held_out(size: int, number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the rows that stay and of those held out, drawn with the seed, each in order."""
    drawn = np.random.default_rng(seed).permutation(size)
    return np.sort(drawn[number:]), np.sort(drawn[:number])


def sampled(size: int, number: int, seed: int) -> np.ndarray:
    """Return `number` of `size` row numbers, drawn with the seed, in order."""
    return np.sort(np.random.default_rng(seed).permutation(size)[:number])


def shares(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Return how many rows of an epoch each source gives: all rows together, shared by weight."""
    return [round(sum(sizes) * weight / sum(weights)) for weight in weights]


def order(pools: Sequence[np.ndarray], weights: Sequence[float] | None, seed: int) -> np.ndarray:
    """Return the row numbers of an epoch.

    Without weights every row once, source after source. With weights each source gives its share, in whole
    passes and a drawn remainder, so that shares are exact and no source ends early; all of them shuffled,
    so that a pack holds rows of several.
    """
    if weights is None:
        return np.concatenate(pools).astype(np.int64)
    draw = np.random.default_rng(seed)
    taken = []
    for pool, count in zip(pools, shares([len(pool) for pool in pools], weights), strict=True):
        passes, rest = divmod(count, len(pool))
        taken += [pool] * passes + [np.sort(draw.permutation(pool)[:rest])]
    return draw.permutation(np.concatenate(taken)).astype(np.int64)


def keys(forms: Dataset) -> np.ndarray:
    """Return a number for each row that two rows share whose texts are equal but for case, spacing, punctuation."""
    texts = [name for name in ("prompt", "completion", "text") if name in forms.column_names]
    found = forms.select_columns(texts).map(
        _keys,
        batched=True,
        remove_columns=texts,
        features=Features({"key": Value("int64")}),
        new_fingerprint=Hasher.hash([forms._fingerprint, "key 1"]),
        desc="Comparing rows",
    )
    return np.asarray(found.data["key"].to_numpy())


def _keys(batch: Mapping[str, Sequence[Any]]) -> dict[str, list[int]]:
    rows = zip(*(batch[name] for name in batch), strict=True)
    return {"key": [_key(" ".join(_text(part) for part in row)) for row in rows]}


@functools.cache
def _spacing() -> dict[int, None]:
    """Return punctuation, spaces and what is not seen: two rows that differ in these alone are one row."""
    return {c: None for c in range(_PLANES) if unicodedata.category(chr(c)) in ("Cc", "Cf", "Zs", "Zl", "Zp", *_P)}


_P = ("Pc", "Pd", "Pe", "Pf", "Pi", "Po", "Ps")


def _text(part: str | Sequence[Message]) -> str:
    return part if isinstance(part, str) else " ".join(turn["content"] for turn in part)


def _key(text: str) -> int:
    bare = text.casefold().translate(_spacing()) or text
    return int.from_bytes(hashlib.blake2b(bare.encode(), digest_size=8).digest(), "little", signed=True)
