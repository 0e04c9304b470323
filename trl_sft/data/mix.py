"""Which rows an epoch trains, and in which order: sampled, weighted, and compared with the evaluation set.

Inputs: formatted rows and the run's seed. Outputs: row numbers, the same on every process and machine: numpy's
generators give the same samples everywhere (https://numpy.org/doc/stable/reference/random/compatibility.html).
Deliberately not here: the rows' texts, except for the key by which equal rows are recognised.
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
import pyarrow as pa
from datasets import Dataset, Features, Value
from datasets.fingerprint import Hasher

from trl_sft.data.code_digest import get_fingerprint
from trl_sft.data.formatted_columns import read_columns
from trl_sft.data.messages import Message
from trl_sft.recipe.checked import Run

_SIGN_BEFORE_DIGIT = re.compile(r"[-*/%.,:](?=\d)")
_ASCII_SIGN_BEFORE_DIGIT, _SIGNS = re.compile(rb"[-*/%.,:](?=[0-9])"), b"-*/%.,:"
_ASCII_MARK = 0x80  # the highest bit of a byte, which ASCII has not
_PRIVATE_USE = 0xE000  # Signs are moved to Unicode's private use area: there they are no punctuation, so they stay
# Unicode's categories of punctuation, spaces and invisible characters
_IGNORED_CATEGORIES = {*("Pc", "Pd", "Pe", "Pf", "Pi", "Po", "Ps"), *("Zs", "Zl", "Zp", "Cc", "Cf")}
_IGNORED_BYTES = bytes(code for code in range(_ASCII_MARK) if unicodedata.category(chr(code)) in _IGNORED_CATEGORIES)
_CODE_POINTS = 0x20000  # the code points below it hold all of Unicode's punctuation and spaces
_COMPARED_COLUMNS = ("prompt", "completion", "text")


def run_seed(run: Run) -> int:
    """Return the one seed of a run: SFTConfig's."""
    return int(run.train.get("seed", 42))


def sample_numbers(size: int, number: int, seed: int) -> np.ndarray:
    """Return a random sample of the row numbers from 0 to `size` - 1: int64 (number,), in ascending order."""
    return np.sort(np.random.default_rng(seed).permutation(size)[:number])


def share_epoch(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Return how many rows each source contributes to an epoch: all rows together, shared by weight."""
    return [round(sum(sizes) * weight / sum(weights)) for weight in weights]


def order_epoch(pools: Sequence[np.ndarray], weights: Sequence[float] | None, seed: int) -> np.ndarray:
    """Return the row numbers of an epoch.

    Each source contributes exactly its share: full passes plus a random sample for the remainder, so that no source
    ends early.

    Args:
        pools: the row numbers of each source.
        weights: the weight of each source; the rows of all sources are then shuffled together, so that a pack holds
            rows of several sources. None = every row once, one source after another.
        seed: the seed of the sample and of the shuffle.

    Returns:
        int64 (rows,): the row numbers in the order of training.

    """
    if weights is None:
        return np.concatenate(pools).astype(np.int64)
    generator = np.random.default_rng(seed)
    chosen: list[np.ndarray] = []
    for pool, count in zip(pools, share_epoch([len(pool) for pool in pools], weights), strict=True):
        passes, remainder = divmod(count, len(pool))
        chosen += [pool] * passes
        chosen.append(np.sort(generator.permutation(pool)[:remainder]))
    return generator.permutation(np.concatenate(chosen)).astype(np.int64)


def dataset_keys(rows: Dataset) -> np.ndarray:
    """Return a key of each row, equal for rows whose texts differ only in case, spacing and punctuation.

    Args:
        rows: formatted rows.

    Returns:
        int64 (rows,).

    """
    columns = [name for name in _COMPARED_COLUMNS if name in rows.column_names]
    keys = (
        rows.select_columns(columns)
        .with_format("arrow")
        .map(
            _map_keys,
            batched=True,
            remove_columns=columns,
            features=Features({"key": Value("int64")}),
            new_fingerprint=Hasher.hash([get_fingerprint(rows), "key 2"]),  # 2: the version of the key
            desc="Comparing rows",
        )
    )
    return np.asarray(keys.data["key"].to_numpy())


def batch_keys(batch: Mapping[str, Sequence[Any]]) -> list[int]:
    """Return the keys of a batch of formatted rows, as `dataset_keys` does of all."""
    columns = [batch[name] for name in _COMPARED_COLUMNS if name in batch]
    keys = []
    for row in zip(*columns, strict=True):
        texts = [text for content in row for text in _compared_texts(content)]
        keys.append(hash_texts(texts))
    return keys


def _map_keys(table: pa.Table) -> pa.Table:
    """Return the keys of a batch as the column that `datasets.map` expects."""
    return pa.table({"key": pa.array(batch_keys(read_columns(table)), pa.int64())})


def _compared_texts(content: str | Sequence[Message]) -> list[str]:
    """Return the texts of a prompt or a completion: of each message its content, and the rest of it as JSON."""
    if isinstance(content, str):
        return [content]
    texts = []
    for message in content:
        rest = [message[key] for key in sorted(message) if key not in ("role", "content")]
        texts += [message["content"], json.dumps(rest, sort_keys=True)]
    return texts


def hash_texts(texts: Sequence[str]) -> int:
    """Return the key of a row; a sign before a digit counts: -1 is not 1, and 4/2 is not 4*2."""
    digest = hashlib.blake2b(b"\0".join(map(_encode_compared, texts)), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _encode_compared(text: str) -> bytes:
    """Return what is compared of a text, in UTF-8."""
    folded = text.casefold()
    if not folded.isascii():
        protected = _SIGN_BEFORE_DIGIT.sub(lambda sign: chr(_PRIVATE_USE + ord(sign[0])), folded)
        return (protected.translate(_ignored_characters()) or protected).encode()
    # ASCII alone has the same result in a tenth of the time: bytes are deleted by a table
    marked = _ASCII_SIGN_BEFORE_DIGIT.sub(lambda sign: bytes([_ASCII_MARK | sign[0][0]]), folded.encode())
    compared = marked.translate(None, _IGNORED_BYTES) or marked
    if compared.isascii():
        return compared
    for sign in _SIGNS:
        compared = compared.replace(bytes([_ASCII_MARK | sign]), chr(_PRIVATE_USE + sign).encode())
    return compared


@functools.cache
def _ignored_characters() -> dict[int, None]:
    """Return punctuation, spaces and invisible characters, as `str.translate` removes them."""
    return {code: None for code in range(_CODE_POINTS) if unicodedata.category(chr(code)) in _IGNORED_CATEGORIES}
