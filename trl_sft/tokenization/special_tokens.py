"""The special tokens of a chat template: each one token of the vocabulary.

In: a fast tokenizer and strings. Out: the same tokenizer, in which each string is one token: one that it
holds already, else a reserved one under the new name, else an added one. What the model has not learned
yet is told by id. Deliberately absent: embeddings; `model` makes and trains their rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

# How templates write tokens that no text contains: <|im_end|> of OpenAI, Qwen, Llama and Phi, <start_of_turn> of
# Gemma, <｜User｜> of DeepSeek. [INST] and <think> are ordinary words in some vocabularies, so they are not among them.
_SPECIAL = re.compile(r"<\|[\w. /-]{1,40}\|>|<(?:start|end)_of_turn>|<｜[^｜<>]{1,40}｜>")
# How vocabularies name the tokens that they keep free: Llama 3, Gemma, BERT, Mistral, Baichuan, Qwen.
_RESERVED = re.compile(
    r"<\|reserved_special_token_\d+\|>|<unused\d+>|\[unused\d+\]|<SPECIAL_\d+>|<reserved_\d+>|<\|extra_\d+\|>"
)


class Installed(NamedTuple):
    """What became of the strings."""

    held: list[str]  # one token already
    reserved: dict[str, str]  # string -> the reserved token that it replaced
    added: list[str]


def written(template: str) -> list[str]:
    """Return the special strings that a template's text writes, in order."""
    return list(dict.fromkeys(_SPECIAL.findall(template)))


def split(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> dict[str, int]:
    """Return those strings that are no token of their own in this vocabulary, with how many tokens they make."""
    vocabulary = tokenizer.get_vocab()
    made = {string: tokenizer(string, add_special_tokens=False)["input_ids"] for string in strings}
    return {string: len(ids) for string, ids in made.items() if ids != [vocabulary.get(string)]}


def strings(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the strings that are one special token each, the longest first."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted({*added, *tokenizer.all_special_tokens} - {""}, key=lambda s: (-len(s), s)))


def install(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> Installed:
    """Make each string one special token of a fast tokenizer."""
    several = split(tokenizer, strings)
    vocabulary = tokenizer.get_vocab()
    free = _reserved(tokenizer)
    # a string of the vocabulary that no rule of the tokenizer builds: adding it gives it its own id back
    known = [string for string in several if string in vocabulary]
    reserved = dict(zip([string for string in several if string not in vocabulary], free, strict=False))
    added = [string for string in several if string not in vocabulary and string not in reserved]
    if reserved:
        _rename(tokenizer, reserved)
    tokenizer.add_tokens([AddedToken(string, special=True, normalized=False) for string in (*known, *added)])
    return Installed([string for string in strings if string not in reserved and string not in added], reserved, added)


def _reserved(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield the free tokens of a vocabulary by id; whoever uses one as end or pad token has not kept it free."""
    used = {str(token) for token in tokenizer.special_tokens_map.values()}
    ids = sorted((number, token) for token, number in tokenizer.get_vocab().items() if _RESERVED.fullmatch(token))
    yield from (token for _, token in ids if token not in used)


def _rename(tokenizer: PreTrainedTokenizerBase, names: dict[str, str]) -> None:
    """Give reserved tokens new names, their ids as before.

    tokenizers 0.23 has no call for it, and transformers 5.17 to 5.23 no public way to set the backend. So the
    serialized form is changed where it names tokens: among the added ones and in the model's vocabulary,
    https://huggingface.co/docs/tokenizers/api/tokenizer.
    """
    old = {reserved: string for string, reserved in names.items()}
    form = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in form["added_tokens"]:
        if token["content"] in old:
            token |= {"content": old[token["content"]], "special": True, "normalized": False}
    vocabulary = form["model"]["vocab"]
    if isinstance(vocabulary, dict):
        form["model"]["vocab"] = {old.get(token, token): number for token, number in vocabulary.items()}
    else:  # unigram: a list of [token, score]
        form["model"]["vocab"] = [[old.get(token, token), score] for token, score in vocabulary]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(form))
    # transformers writes these down by name and would add the old ones again on loading
    tokenizer._extra_special_tokens = [old.get(str(token), token) for token in tokenizer.extra_special_tokens]
    # one that only the vocabulary holds is found in a text only once it is an added token too
    tokenizer.add_tokens([AddedToken(string, special=True, normalized=False) for string in names])
