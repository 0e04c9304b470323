r"""What a regular expression of a tokenizer can match: whether a match may hold two characters next to each other.

Inputs: patterns of pre-tokenizers, as alternatives of character classes: `\p{L}+`, ` ?[^\s\p{L}\p{N}]+`, `\s+(?!\S)`.
Outputs: `MatchSpans`, or None for patterns of other kinds (lookbehind, backreferences, lazy quantifiers). Deliberately
not here: matching.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import regex

_QUANTIFIERS = {"*": (0, True), "+": (1, True), "?": (0, False)}
# Ends of alternatives that look at what follows spaces; where a match ends in another character they say nothing.
_SPACES_BEFORE = (r"\s+(?!\S)", r"\s+$")
_NOT_READ = frozenset("^.$)*+?{}")  # outside classes they have a meaning that is not read here


class _Class(NamedTuple):
    """A class of characters with its quantifier."""

    pattern: str  # matches one character
    is_optional: bool
    is_repeated: bool

    def matches(self, character: str) -> bool:
        """Tell whether the class holds a character, in upper or lower case."""
        return regex.fullmatch(self.pattern, character, regex.IGNORECASE) is not None


class MatchSpans(NamedTuple):
    """A pattern as alternatives, each a sequence of classes."""

    alternatives: tuple[tuple[_Class, ...], ...]

    def may_hold(self, first: str, second: str) -> bool:
        """Tell whether a match may hold two characters, one directly after the other."""
        return any(_may_hold(classes, first, second) for classes in self.alternatives)


def read_pattern(pattern: str) -> MatchSpans | None:
    """Return what a pattern can match; None = it has parts that are not read here."""
    try:
        alternatives = _read_alternatives(pattern)
    except (_UnreadableError, regex.error, IndexError):
        return None
    return MatchSpans(tuple(tuple(classes) for classes in alternatives))


class _UnreadableError(Exception):
    """A part of a pattern that is not read here."""


def _may_hold(classes: tuple[_Class, ...], first: str, second: str) -> bool:
    """Tell whether the matches of a sequence of classes may hold two characters next to each other."""
    for number, one in enumerate(classes):
        if not one.matches(first):
            continue
        if one.is_repeated and one.matches(second):
            return True
        for other in classes[number + 1 :]:
            if other.matches(second):
                return True
            if not other.is_optional:
                break
    return False


def _read_alternatives(pattern: str) -> list[list[_Class]]:
    """Return the alternatives of a pattern. Raises _UnreadableError."""
    alternatives = []
    for part in _split_alternatives(pattern):
        end = next((end for end in _SPACES_BEFORE if part.endswith(end)), "")
        alternatives += _read_sequence(part.removesuffix(end) + (r"\s+" if end else ""))
    return alternatives


def _split_alternatives(pattern: str) -> list[str]:
    """Return what `|` separates outside of classes and groups. Raises _UnreadableError."""
    parts, begin, depth = [], 0, 0
    for position, character, depth in _walk(pattern, 0):
        if character == "|" and depth == 0:
            parts.append(pattern[begin:position])
            begin = position + 1
    if depth:
        raise _UnreadableError
    return [*parts, pattern[begin:]]


def _walk(pattern: str, position: int) -> Iterator[tuple[int, str, int]]:
    """Yield each character outside of escapes and classes: its position, the character, the groups open after it.

    Raises _UnreadableError for a class that does not end.
    """
    depth = 0
    while position < len(pattern):
        character = pattern[position]
        if character == "\\":
            position += 1
        elif character == "[":
            position = _find_class_end(pattern, position) - 1
        else:
            depth += (character == "(") - (character == ")")
            yield position, character, depth
        position += 1


def _read_sequence(pattern: str) -> list[list[_Class]]:
    """Return the sequences of classes that an alternative means: several where it holds groups."""
    sequences: list[list[_Class]] = [[]]
    position = 0
    while position < len(pattern):
        if pattern[position] == "(":
            end = _find_group_end(pattern, position)
            inner = pattern[position + 1 : end - 1]
            if inner.startswith("?"):
                prefix = next((prefix for prefix in ("?i:", "?:") if inner.startswith(prefix)), None)
                if prefix is None:
                    raise _UnreadableError
                inner = inner.removeprefix(prefix)
            is_optional, is_repeated, position = _read_quantifier(pattern, end)
            if is_repeated:
                raise _UnreadableError
            groups = _read_alternatives(inner) + ([[]] if is_optional else [])
            sequences = [[*sequence, *group] for sequence in sequences for group in groups]
            continue
        end = _find_atom_end(pattern, position)
        atom = pattern[position:end]
        is_optional, is_repeated, position = _read_quantifier(pattern, end)
        for sequence in sequences:
            sequence.append(_Class(atom, is_optional, is_repeated))
    return sequences


def _find_atom_end(pattern: str, position: int) -> int:
    """Return where a class, an escape or a literal character ends. Raises _UnreadableError."""
    character = pattern[position]
    if character == "[":
        return _find_class_end(pattern, position)
    if character != "\\":
        if character in _NOT_READ:
            raise _UnreadableError
        return position + 1
    following = pattern[position + 1]
    if following in "pP" and pattern[position + 2] == "{":
        return pattern.index("}", position) + 1 if "}" in pattern[position:] else len(pattern) + 1
    if following in "xu" or following.isdigit() or following in "bBAZzGkgQ":
        raise _UnreadableError
    return position + 2


def _find_class_end(pattern: str, position: int) -> int:
    """Return where the class ends that begins at a position. Raises _UnreadableError."""
    end = position + 1
    if pattern[end : end + 1] == "^":
        end += 1
    if pattern[end : end + 1] == "]":
        end += 1
    while end < len(pattern) and pattern[end] != "]":
        if pattern[end] == "[" or pattern[end : end + 2] in ("&&", "--", "~~", "||"):  # sets within sets
            raise _UnreadableError
        end += 2 if pattern[end] == "\\" else 1
    if end >= len(pattern):
        raise _UnreadableError
    return end + 1


def _find_group_end(pattern: str, position: int) -> int:
    """Return where the group ends that begins at a position. Raises _UnreadableError."""
    for end, _, depth in _walk(pattern, position):
        if depth == 0:
            return end + 1
    raise _UnreadableError


def _read_quantifier(pattern: str, position: int) -> tuple[bool, bool, int]:
    """Return whether what stands before is optional and repeated, and where its quantifier ends.

    Raises _UnreadableError for lazy and possessive ones.
    """
    is_optional, is_repeated = False, False
    character = pattern[position : position + 1]
    if character in _QUANTIFIERS:
        minimum, is_repeated = _QUANTIFIERS[character]
        is_optional = minimum == 0
        position += 1
    elif match := regex.match(r"\{(\d+)(,?)(\d*)\}", pattern[position:]):
        is_optional = int(match[1]) == 0
        is_repeated = match[1] != "1" or bool(match[2])
        position += match.end()
    if pattern[position : position + 1] in ("?", "+"):
        raise _UnreadableError
    return is_optional, is_repeated, position
