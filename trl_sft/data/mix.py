"""Which rows an epoch trains, and in which order: held out, dropped, weighed.

In: formatted rows and the run's seed. Out: row numbers, the same on every process and machine: numpy's
generators give the same draws everywhere (https://numpy.org/doc/stable/reference/random/compatibility.html).
Deliberately absent: the rows' texts, but for the key by which equal ones are found.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from datasets.fingerprint import Hasher

from trl_sft.data.code_digest import get_fingerprint
from trl_sft.data.messages import Message

_SIGNS = re.compile(r"[-*/%.,:](?=\d)")
_PRIVATE = 0xE000  # letters of nobody, where these signs are out of reach of what is taken away
# categories of punctuation, spaces and what is not seen
_UNSEEN = {*("Pc", "Pd", "Pe", "Pf", "Pi", "Po", "Ps"), *("Zs", "Zl", "Zp", "Cc", "Cf")}
_PLANES = 0x20000  # where Unicode has punctuation and spaces


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
        new_fingerprint=Hasher.hash([get_fingerprint(forms), "key 2"]),
        desc="Comparing rows",
    )
    return np.asarray(found.data["key"].to_numpy())


def _keys(batch: Mapping[str, Sequence[Any]]) -> dict[str, list[int]]:
    return {"key": row_keys(batch)}


def row_keys(batch: Mapping[str, Sequence[Any]]) -> list[int]:
    """Return the key of each row of a batch of formatted rows."""
    rows = zip(*(batch[name] for name in ("prompt", "completion", "text") if name in batch), strict=True)
    return [_key(*(part for side in row for part in _texts(side))) for row in rows]


def _texts(side: str | Sequence[Message]) -> list[str]:
    """Return the texts of a prompt or completion, each apart: what is said, thought, called."""
    if isinstance(side, str):
        return [side]
    more = [
        json.dumps([turn[k] for k in sorted(turn) if k not in ("role", "content")], sort_keys=True) for turn in side
    ]
    return [text for turn, rest in zip(side, more, strict=True) for text in (turn["content"], rest)]


def _key(*texts: str) -> int:
    """Return the number of a row; signs before a digit count: -1 is not 1, and 4/2 not 4*2."""
    marked = (_SIGNS.sub(lambda sign: chr(_PRIVATE + ord(sign[0])), text.casefold()) for text in texts)
    bare = "\0".join(text.translate(_spacing()) or text for text in marked)
    return int.from_bytes(hashlib.blake2b(bare.encode(), digest_size=8).digest(), "little", signed=True)


@functools.cache
def _spacing() -> dict[int, None]:
    """Return punctuation, spaces and what is not seen: two rows that differ in these alone are one row."""
    return {c: None for c in range(_PLANES) if unicodedata.category(chr(c)) in _UNSEEN}
