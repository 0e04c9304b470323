"""The special tokens of a chat template: each is one token of the vocabulary.

Inputs: a fast tokenizer and strings. Outputs: the same tokenizer, in which each string is one token: one that the
vocabulary has already, else a reserved one under the new name, else an added one. Not here: embeddings; `model` adds
and trains the rows of new tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

# How templates write tokens that no text contains: <|im_end|> of OpenAI, Qwen, Llama and Phi, <start_of_turn> of
# Gemma, <｜User｜> of DeepSeek. [INST] and <think> are ordinary words in some vocabularies, so they are not here.
_SPECIAL = re.compile(r"<\|[\w. /-]{1,40}\|>|<(?:start|end)_of_turn>|<｜[^｜<>]{1,40}｜>")
# How vocabularies name the tokens that they reserve: Llama 3, Gemma, BERT, Mistral, Baichuan, Qwen.
_RESERVED = re.compile(
    r"<\|reserved_special_token_\d+\|>|<unused\d+>|\[unused\d+\]|<SPECIAL_\d+>|<reserved_\d+>|<\|extra_\d+\|>"
)


class InstalledTokens(NamedTuple):
    """Where the special tokens of a template come from."""

    existing: list[str]  # the vocabulary has them already
    reserved: dict[str, str]  # string -> the reserved token that got this name
    added: list[str]


def find_special_strings(template: str) -> list[str]:
    """Return the special strings that the text of a template contains, in order."""
    return list(dict.fromkeys(_SPECIAL.findall(template)))


def find_split_strings(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> dict[str, int]:
    """Return the strings that are not one token of their own in this vocabulary, with their number of tokens."""
    vocabulary = tokenizer.get_vocab()
    tokens = {string: tokenizer(string, add_special_tokens=False)["input_ids"] for string in strings}
    return {string: len(ids) for string, ids in tokens.items() if ids != [vocabulary.get(string)]}


def list_strings(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return the strings that are one special token each, the longest first."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted({*added, *tokenizer.all_special_tokens} - {""}, key=lambda string: (-len(string), string)))


def install(tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> InstalledTokens:
    """Make each string one special token of a fast tokenizer, and return where each comes from."""
    split_strings = find_split_strings(tokenizer, strings)
    vocabulary = tokenizer.get_vocab()
    # strings of the vocabulary that no merge of the tokenizer produces: adding one keeps its id
    listed = [string for string in split_strings if string in vocabulary]
    missing = [string for string in split_strings if string not in vocabulary]
    reserved = dict(zip(missing, _list_reserved(tokenizer), strict=False))
    added = [string for string in missing if string not in reserved]
    if reserved:
        _rename_tokens(tokenizer, reserved)
    tokenizer.add_tokens([AddedToken(string, special=True, normalized=False) for string in (*listed, *added)])
    existing = [string for string in strings if string not in reserved and string not in added]
    return InstalledTokens(existing, reserved, added)


def _list_reserved(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the reserved tokens of a vocabulary by id, without those that serve as end or padding token."""
    in_use = {str(token) for token in tokenizer.special_tokens_map.values()}
    ids = sorted((number, token) for token, number in tokenizer.get_vocab().items() if _RESERVED.fullmatch(token))
    return [token for _, token in ids if token not in in_use]


def _rename_tokens(tokenizer: PreTrainedTokenizerBase, names: dict[str, str]) -> None:
    """Give reserved tokens new names, with their ids as before. `names`: new name -> reserved token.

    tokenizers 0.23 has no call for it, and transformers 5.17 to 5.23 no public way to set the backend. So the
    serialized form is changed where it names tokens: among the added tokens and in the model's vocabulary,
    https://huggingface.co/docs/tokenizers/api/tokenizer.
    """
    new_names = {reserved: string for string, reserved in names.items()}
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in state["added_tokens"]:
        if token["content"] in new_names:
            token |= {"content": new_names[token["content"]], "special": True, "normalized": False}
    vocabulary = state["model"]["vocab"]
    if isinstance(vocabulary, dict):
        state["model"]["vocab"] = {new_names.get(token, token): number for token, number in vocabulary.items()}
    else:  # unigram: a list of [token, score]
        state["model"]["vocab"] = [[new_names.get(token, token), score] for token, score in vocabulary]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    # transformers saves these by name and would add the old ones again on loading
    tokenizer._extra_special_tokens = [new_names.get(str(token), token) for token in tokenizer.extra_special_tokens]
    # a token that only the vocabulary has is matched in a text only if it is an added token too
    tokenizer.add_tokens([AddedToken(string, special=True, normalized=False) for string in names])
