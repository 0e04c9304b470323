"""The tokens of a GGUF file as bytes, and those that end an answer.

Inputs: a GGUF file. Outputs: `GgufTokens`. llama.cpp's server leaves out the probabilities of a token after which the
text ends inside a character, and only the bytes tell which tokens these are. Not here: the server (`llama_reader`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_BYTE_LEVEL = "gpt2"  # value of tokenizer.ggml.model
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6  # gguf.TokenType
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_LONGEST_CHARACTER = 4  # bytes in UTF-8
_MOST_PLAIN = 256  # bytes, of which GPT-2's byte-level BPE writes the others as the characters that follow


@dataclass(frozen=True)
class GgufTokens:
    """The tokens of a GGUF file.

    Attributes:
        pieces: the bytes that each token adds to an answer: (rows,).
        stop_tokens: those that end an answer by the metadata of the file.

    """

    pieces: list[bytes]
    stop_tokens: set[int]

    def find_listed(self, answer: list[int]) -> list[bool]:
        """Return for each token of an answer whether llama.cpp's server lists its probabilities."""
        text, listed = b"", []
        for token in answer:
            text = (text + self.pieces[token])[-_LONGEST_CHARACTER:]
            listed.append(not _ends_inside_character(text))
        return listed


def read(path: Path) -> GgufTokens:
    """Return the tokens of a GGUF file."""
    from gguf import GGUFReader  # noqa: PLC0415 (optional package)

    fields = GGUFReader(path).fields
    texts, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    is_byte_level = fields["tokenizer.ggml.model"].contents() == _BYTE_LEVEL
    table = _build_byte_table() if is_byte_level else None
    pieces = [_read_piece(text, kind, table) for text, kind in zip(texts, kinds, strict=True)]
    names = [f"tokenizer.ggml.{key}" for key in _STOP_KEYS]
    return GgufTokens(pieces, {int(fields[name].contents()) for name in names if name in fields})


def read_texts(path: Path) -> list[str]:
    """Return the tokens of a GGUF file as its vocabulary writes them. Raises ValueError, KeyError for other files."""
    from gguf import GGUFReader  # noqa: PLC0415 (optional package)

    return list(GGUFReader(path).fields["tokenizer.ggml.tokens"].contents())


def _read_piece(text: str, kind: Any, table: dict[str, int] | None) -> bytes:
    """Return the bytes of a token; `table`: character -> byte of byte-level BPE, None = SentencePiece."""
    if kind == _CONTROL:
        return b""
    if kind == _BYTE and (match := _BYTE_TOKEN.fullmatch(text)):
        return bytes([int(match[1], 16)])
    if table is not None and kind != _USER_DEFINED and all(character in table for character in text):
        return bytes(table[character] for character in text)
    return text.replace("▁", " ").encode() if table is None else text.encode()


def _build_byte_table() -> dict[str, int]:
    """Return character -> byte of GPT-2's byte-level BPE (`bytes_to_unicode` of openai/gpt-2, encoder.py)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(_MOST_PLAIN) if byte not in plain]
    table = {chr(byte): byte for byte in plain}
    return table | {chr(_MOST_PLAIN + number): byte for number, byte in enumerate(others)}


def _ends_inside_character(text: bytes) -> bool:
    """Tell whether a text ends before the last byte of a character, as `validate_utf8` of llama.cpp's server does."""
    for length, byte in enumerate(reversed(text[-_LONGEST_CHARACTER:]), 1):
        for mask, start, size in ((0xE0, 0xC0, 2), (0xF0, 0xE0, 3), (0xF8, 0xF0, 4)):
            if byte & mask == start and length < size:
                return True
    return False
