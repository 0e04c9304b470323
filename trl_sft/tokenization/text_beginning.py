"""The beginning of a long text whose first tokens are those of the whole text.

A row far longer than `max_length` is cut before it is tokenized, where that is certain to give the same tokens:

- at a *boundary*: two characters that no match of the tokenizer's pre-tokenizer holds together, so that words before
  them do not depend on what follows. Words are tokenized one by one.
- inside a word, for BPE and Unigram. A beginning of a text that ends where one of the text's tokens ends has the
  text's tokens up to there: no merge of BPE crosses that place, and Unigram's best way to a place depends only on
  what stands before it. Of as many places in a row as the longest token has characters, one is the end of a token. So
  if the beginnings up to each of these places agree in their first tokens, the whole text has these tokens too.

Inputs: a fast tokenizer, a text. Outputs: where to cut, or None where it is not certain. Deliberately not here: labels,
truncation, and what becomes of a long text that cannot be cut (`encode`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer

from trl_sft.tokenization import regex_spans
from trl_sft.tokenization.regex_spans import MatchSpans

_SEARCHED = 10_000  # characters before a place in which a boundary is searched
_FIRST_FACTOR = 8  # characters of the first beginning that is tried, for each wanted token
_MOST_ENDS = 300  # the longest token for which cuts inside a word are tried
# Characters that no normalizer joins with their neighbours: ASCII, ideographs, kana, and the punctuation of Chinese
_STABLE = re.compile(r"[\n\x20-\x7e\u3001\u3002\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fff\uff0c]+")
# the pattern of GPT-2, which `tokenizers` uses where `use_regex` is set (tokenizers, pre_tokenizers/byte_level.rs)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# pre-tokenizers that decide by two neighbouring characters alone
_LOCAL = (
    *("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "Punctuation", "Digits", "CharDelimiterSplit"),
    "Metaspace",
)
_LOCAL_NORMALIZERS = (
    *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "BertNormalizer", "StripAccents", "Nmt"),
    *("Precompiled", "ByteLevel", "Prepend", "Strip"),
)
# Characters of one kind, which patterns of words treat alike
_ALIKE = re.compile(r"[a-z]+|[A-Z]+|[0-9]+|([!-/:-@\[-`{-~])\1*")
_TRIED_WINDOWS = 8  # places at which a cut inside a word is tried


class TextCutter:
    """Finds where texts can be cut for one tokenizer."""

    def __init__(self, backend: Tokenizer) -> None:
        """Read the parts of a tokenizer."""
        self.backend = backend
        state = json.loads(backend.to_str())
        self.model: Mapping[str, Any] = state["model"]
        pieces = list(_list_vocabulary(self.model))
        self.added = [token["content"] for token in state["added_tokens"]]
        self.strips_spaces = any(token["lstrip"] or token["rstrip"] for token in state["added_tokens"])
        self.strips_spaces |= '"Strip"' in json.dumps(state["normalizer"])
        self.has_bytes = '"ByteLevel"' in json.dumps([state["normalizer"], state["pre_tokenizer"]])
        self.longest = max(map(len, [*pieces, *self.added]), default=1)
        self.singles = {piece for piece in pieces if len(piece) == 1}
        self.patterns: list[MatchSpans | None] = []
        self.is_readable = self._read_normalizer(state["normalizer"]) and self._read_splits(state["pre_tokenizer"])
        self.has_words = self._tokenizes_words()
        self.known: dict[tuple[str, str], bool] = {}  # pair of characters -> whether there is a boundary between them

    def find_cut(self, text: str, num_tokens: int, *, add_special_tokens: bool) -> int | None:
        """Return the length of a beginning of a text whose first tokens are those of the text; None = not certain.

        Args:
            text: the text.
            num_tokens: how many tokens have to be the same.
            add_special_tokens: whether the tokenizer adds its own.

        Returns:
            A number of characters, shorter than the text; the beginning has more than `num_tokens` tokens.

        """
        if not self.is_readable:
            return None
        size = max(_SEARCHED, _FIRST_FACTOR * num_tokens)
        while 2 * size < len(text):
            cut = self._find_boundary(text, size)
            beginning = text[: size if cut is None else cut]
            number = len(self.backend.encode(beginning, add_special_tokens=add_special_tokens).ids)
            if number > num_tokens + self.longest:
                for end in range(size, size - _TRIED_WINDOWS * 3 * self.longest, -3 * self.longest):
                    if cut is None and end > size // 2:
                        cut = self._find_agreement(text, end, num_tokens, add_special_tokens=add_special_tokens)
                return cut
            size *= 2
        return None

    def _find_boundary(self, text: str, size: int) -> int | None:
        """Return the last boundary of words before a place; None = there is none near it."""
        for position in range(size, max(1, size - _SEARCHED), -1):
            if self._is_boundary(text[position - 1], text[position]) and not self._has_added_token(text, position):
                return position
        return None

    def _has_added_token(self, text: str, position: int) -> bool:
        """Tell whether an added token stands near a place; it may be recognised by what follows it."""
        near = text[max(0, position - self.longest) : position + self.longest]
        folded = near.casefold()
        return any(content in near or content.casefold() in folded for content in self.added)

    def _is_boundary(self, first: str, second: str) -> bool:
        """Tell whether the words before a place between two characters do not depend on what follows."""
        pair = (first, second)
        if pair not in self.known:
            self.known[pair] = self._check_boundary(first, second)
        return self.known[pair]

    def _check_boundary(self, first: str, second: str) -> bool:
        """Tell whether a pair of characters is a boundary."""
        if first.isspace() or not _STABLE.fullmatch(first + second):
            return False
        if any(pattern is None or pattern.may_hold(first, second) for pattern in self.patterns):
            return False
        before, both = self._normalize(first), self._normalize(f"{first}{second}a")
        if not before or not both.startswith(before) or len(both) <= len(before):
            return False
        if any(pattern is None or pattern.may_hold(before[-1], both[len(before)]) for pattern in self.patterns):
            return False
        if self.backend.pre_tokenizer is None:
            return False
        words = self.backend.pre_tokenizer.pre_tokenize_str(both)
        return any(end == len(before) for _, (_, end) in words) and all(
            end <= len(before) or begin >= len(before) for _, (begin, end) in words
        )

    def _normalize(self, text: str) -> str:
        """Return a text as the tokenizer normalizes it."""
        return text if self.backend.normalizer is None else str(self.backend.normalizer.normalize_str(text))

    def _find_agreement(self, text: str, size: int, num_tokens: int, *, add_special_tokens: bool) -> int | None:
        """Return a place inside a word up to which the first tokens are those of the text; None = not certain."""
        if self.has_words or self.longest > _MOST_ENDS:
            return None
        begin = size - self.longest - 1
        window = text[max(0, begin - 2 * self.longest) : size + self.longest]
        if not _STABLE.fullmatch(window) or any(content.casefold() in window.casefold() for content in self.added):
            return None
        if self.has_bytes and not window.isascii():  # a token may end inside a character
            return None
        if not self._is_inside_one_word(text, begin, size, window=window):
            return None
        first: list[int] | None = None
        for end in range(begin, size + 1):
            ids = self.backend.encode(text[:end], add_special_tokens=add_special_tokens).ids
            if len(ids) <= num_tokens or (first is not None and ids[:num_tokens] != first):
                return None
            first = ids[:num_tokens]
        return size

    def _is_inside_one_word(self, text: str, begin: int, end: int, *, window: str) -> bool:
        """Tell whether one word of the pre-tokenizer covers the text between two places, and its characters are known.

        Where patterns decide, the characters there have to be of one kind, which they treat alike.
        """
        if self.strips_spaces and any(character.isspace() for character in window):
            return False
        if self.patterns and not _ALIKE.fullmatch(window):
            return False
        normalized = self._normalize(window)
        if self.backend.pre_tokenizer is None:
            return self._knows_characters(normalized)
        starts = []
        for place in (begin, end):
            words = self.backend.pre_tokenizer.pre_tokenize_str(self._normalize(text[:place]))
            starts.append(words[-1][1][0])
            shortest = words[-1][1][1] - words[-1][1][0]
        is_one = len(set(starts)) == 1 and shortest > 2 * self.longest
        characters = "".join(word for word, _ in self.backend.pre_tokenizer.pre_tokenize_str(normalized))
        return is_one and self._knows_characters(characters)

    def _knows_characters(self, text: str) -> bool:
        """Tell whether each character is a token, so that none of them becomes a part of an unknown token."""
        return all(character in self.singles for character in set(text))

    def _tokenizes_words(self) -> bool:
        """Tell whether the tokens of a word depend on where it ends, so that it cannot be cut inside."""
        if self.model["type"] == "Unigram":
            return self.model.get("alpha") is not None
        if self.model["type"] != "BPE":
            return True
        parts = (self.model.get("end_of_word_suffix"), self.model.get("continuing_subword_prefix"))
        return any(parts) or self.model.get("dropout") is not None

    def _read_normalizer(self, state: Mapping[str, Any] | None) -> bool:
        """Tell whether a normalizer changes characters one by one, or by patterns that are known."""
        if state is None:
            return True
        kind = state["type"]
        if kind == "Sequence":
            return all(self._read_normalizer(part) for part in state["normalizers"])
        if kind == "Replace":
            literal = state["pattern"].get("String")
            if literal is not None:
                return len(literal) == 1
            self.patterns.append(regex_spans.read_pattern(state["pattern"]["Regex"]))
            return True
        return kind in _LOCAL_NORMALIZERS

    def _read_splits(self, state: Mapping[str, Any] | None) -> bool:
        """Tell whether a pre-tokenizer decides by neighbouring characters, or by patterns that are known."""
        if state is None:
            return True
        kind = state["type"]
        if kind == "Sequence":
            return all(self._read_splits(part) for part in state["pretokenizers"])
        if kind == "ByteLevel":
            if state["use_regex"]:
                self.patterns.append(regex_spans.read_pattern(_GPT2))
            return True
        if kind == "Split":
            literal = state["pattern"].get("String")
            if literal is None:
                self.patterns.append(regex_spans.read_pattern(state["pattern"]["Regex"]))
            return state["behavior"] in ("Isolated", "Removed") or (literal is not None and len(literal) == 1)
        return kind in _LOCAL


def _list_vocabulary(model: Mapping[str, Any]) -> Iterator[str]:
    """Yield the tokens of a model's vocabulary."""
    vocabulary = model.get("vocab", {})
    if isinstance(vocabulary, Mapping):
        yield from vocabulary
    else:
        yield from (piece for piece, _ in vocabulary)
