r"""Whether the tokens of a prompt, as inference makes them, are the beginning of the tokens that are trained.

They are not where a token holds the end of the prompt and the beginning of the answer: `"A: "` is `A`, `:`, space at
inference, and in `"A: yes"` the last token is space with `yes`. Then the model is trained on a token that inference
cannot reach.

Inputs: a tokenizer, the text of a row, its tokens, and where the prompt ends. Outputs: whether both agree; the fault of
rows that do not. `differs_plainly` tokenizes the prompt alone, as TRL does. `differs` looks at the token at the end of
the prompt, and tokenizes only where it is not certain: no tokenizer of pieces (BPE, Unigram, WordPiece) splits a prompt
otherwise where one of its tokens ends exactly there. Not here: whether the texts agree (`loss_mask`), and counts
(`ledger`).
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from trl_sft.errors import Fault
from trl_sft.recipe.checked import Run

MAX_PROMPT_MISMATCH = 0.05  # of the rows may have other prompt tokens, unless run.allow has prompt_mismatch
ALLOW = "prompt_mismatch"  # the word of run.allow
_SPACE = "Ġ"  # a space in tokens of bytes; tokenizers leaves it out of offsets where `trim_offsets` is set
_SHOWN_TOKENS = 3  # on each side of the end of the prompt that a message shows


class TokenizedText(NamedTuple):
    """A text with its tokens."""

    text: str
    encoding: Any  # a `tokenizers.Encoding` with offsets; of a slow tokenizer the ids
    ids: Sequence[int] | np.ndarray  # (tokens,)


@dataclass(frozen=True)
class PromptTokenizer:
    """Tokenizes prompts as inference does, and knows where the end of a prompt has to be looked at twice.

    Attributes:
        tokenizer: the tokenizer of the run.
        backend: the fast tokenizer; None = the tokenizer is slow.
        add_special_tokens: whether the tokenizer adds its own tokens; a chat template writes them itself.
        appends_tokens: whether the tokenizer adds a token at the end of a text.
        trims_spaces: whether offsets leave out the spaces of a token.
        ignores_merges: whether a word that is one token is never split.
        normalizes: whether the tokenizer changes characters first.
        keeps_spaces: whether it leaves the number of spaces as it is.

    """

    tokenizer: PreTrainedTokenizerBase
    backend: Tokenizer | None
    add_special_tokens: bool
    appends_tokens: bool = False
    trims_spaces: bool = False
    ignores_merges: bool = False
    normalizes: bool = False
    keeps_spaces: bool = True

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a prompt: (tokens,)."""
        if self.backend is None:
            return list(self.tokenizer(text, add_special_tokens=self.add_special_tokens)["input_ids"])
        return list(self.backend.encode(text, add_special_tokens=self.add_special_tokens).ids)


def build_prompt_tokenizer(
    tokenizer: PreTrainedTokenizerBase, backend: Tokenizer | None, *, add_special_tokens: bool
) -> PromptTokenizer:
    """Return what tokenizes the prompts of a run.

    Args:
        tokenizer: the tokenizer of the run.
        backend: the fast tokenizer; None = the tokenizer is slow.
        add_special_tokens: whether the tokenizer adds its own tokens to a row.

    """
    added = tokenizer("a", add_special_tokens=add_special_tokens)["input_ids"]
    appends_tokens = added[-1:] != tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    if backend is None:
        return PromptTokenizer(tokenizer, None, add_special_tokens, appends_tokens)
    state = b"" if backend.post_processor is None else backend.post_processor.__getstate__()
    return PromptTokenizer(
        tokenizer,
        backend,
        add_special_tokens,
        appends_tokens=appends_tokens,
        trims_spaces=b'"trim_offsets":true' in state.replace(b" ", b""),
        ignores_merges=bool(getattr(backend.model, "ignore_merges", False)),
        normalizes=backend.normalizer is not None,
        keeps_spaces=_keeps_spaces(backend),
    )


def differs_plainly(prompts: PromptTokenizer, row: TokenizedText, position: int) -> bool:
    """Tell whether the tokens of a row's text up to a position alone are no beginning of its tokens, as TRL does."""
    prompt = prompts.encode(row.text[:position])
    return list(row.ids[: len(prompt)]) != prompt


def differs(prompts: PromptTokenizer, row: TokenizedText, position: int) -> bool:
    """Tell the same as `differs_plainly`, by the token at the end of the prompt.

    Args:
        prompts: tokenizes prompts.
        row: a row with its tokens.
        position: where the prompt ends in its text.

    """
    is_certain = prompts.backend is not None and not prompts.appends_tokens and 0 < position < len(row.text)
    return not (is_certain and _ends_with_a_token(prompts, row, position)) and differs_plainly(prompts, row, position)


def find_first_token(prompts: PromptTokenizer, row: TokenizedText, position: int) -> int:
    """Return the first token that holds a character from `position` on; the number of tokens = there is none."""
    first = len(row.ids)
    for character in range(position, len(row.text)):
        token = row.encoding.char_to_token(character)
        if token is not None:
            first = int(token)
            break
    while prompts.trims_spaces and first > 0:  # tokens of spaces alone have no characters where offsets leave them out
        bounds = _read_bounds(prompts, row, first - 1)
        if bounds is None or bounds[1] <= position:
            break
        first -= 1
    return first


def _ends_with_a_token(prompts: PromptTokenizer, row: TokenizedText, position: int) -> bool:
    """Tell whether a token certainly ends at a position, and the tokens before it are those of the prompt alone."""
    first = find_first_token(prompts, row, position)
    if not 0 < first < len(row.ids):
        return False
    before, after = (_read_bounds(prompts, row, token) for token in (first - 1, first))
    if before is None or after is None or before[1] != position or after[0] < position:
        return False
    if prompts.ignores_merges and row.encoding.token_to_word(first - 1) == row.encoding.token_to_word(first):
        return False  # the end of the prompt alone may be a token that no merges lead to
    pair = row.text[position - 1 : position + 1]
    if pair[0].isspace() and (pair[1].isspace() or row.text[position - 2 : position - 1].isspace()):
        return False  # several spaces are one token at the end of a text, and two tokens before a word
    if prompts.normalizes and not prompts.keeps_spaces and (pair[0].isspace() or pair[1].isspace()):
        return False
    return not (prompts.normalizes and not pair[1].isascii() and _are_composed(pair))


def _keeps_spaces(backend: Tokenizer) -> bool:
    """Tell whether a tokenizer's normalizer certainly leaves the number of spaces as it is."""
    if backend.normalizer is None:
        return True
    state = json.loads(backend.normalizer.__getstate__())
    steps = state["normalizers"] if state["type"] == "Sequence" else [state]
    replaces_one = {"type": "Replace", "pattern": {"String": " "}}
    return all(
        step["type"] in ("NFC", "Prepend") or {name: step.get(name) for name in replaces_one} == replaces_one
        for step in steps
    )


def _read_bounds(prompts: PromptTokenizer, row: TokenizedText, token: int) -> tuple[int, int] | None:
    """Return where a token begins and ends in the text, with its spaces; None = it is not from the text."""
    bounds: tuple[int, int] | None = row.encoding.token_to_chars(token)
    if bounds is None or not prompts.trims_spaces or prompts.backend is None:
        return bounds
    start, end = bounds
    name = prompts.backend.id_to_token(int(row.ids[token])) or ""
    leading = len(name) - len(name.lstrip(_SPACE))
    trailing = 0 if leading == len(name) else len(name) - len(name.rstrip(_SPACE))
    return max(0, start - leading), end + trailing


def _are_composed(pair: str) -> bool:
    """Tell whether normalization makes one character of two."""
    return unicodedata.normalize("NFKC", pair) != "".join(unicodedata.normalize("NFKC", one) for one in pair)


def accepts(run: Run, *, rows: int, mismatches: int) -> bool:
    """Tell whether so many rows may have other prompt tokens at inference. `mismatches`: how many of `rows` have."""
    return mismatches <= MAX_PROMPT_MISMATCH * rows or ALLOW in run.options.get("allow", [])


def build_fault(prompts: PromptTokenizer, where: str, *, text: str, prompt_ends: Sequence[int], counts: str) -> Fault:
    """Return the fault of rows whose prompt has other tokens at inference.

    Args:
        prompts: tokenizes prompts.
        where: the place in the recipe.
        text: the text of the first of the rows.
        prompt_ends: where the prompts of its answers end.
        counts: how many rows there are, and the name of the first, as the beginning of a sentence.

    """
    whole = prompts.encode(text)
    row = TokenizedText(text, None, whole)
    position = next((end for end in prompt_ends if differs_plainly(prompts, row, end)), -1)
    if position < 0:
        problem = f"{counts} another prompt at inference: the chat template renders it differently there"
        fix = f"Use another template, or accept it with run.allow: [{ALLOW}]."
        return Fault(where, problem, fix, code="template.prompt_mismatch")
    prompt = prompts.encode(text[:position])
    same = next((n for n, (one, other) in enumerate(zip(prompt, whole, strict=False)) if one != other), len(whole))
    begin = max(0, same - _SHOWN_TOKENS)
    problem = (
        f"{counts} other prompt tokens at inference than in training: the prompt ends with the tokens "
        f"{_show(prompts, prompt[begin:])}; in training the tokens there are "
        f"{_show(prompts, whole[begin : same + _SHOWN_TOKENS])}"
    )
    fix = f"{_advise(prompts, text, position)} Or accept it with run.allow: [{ALLOW}]."
    return Fault(where, problem, fix, code="template.prompt_mismatch")


def _show(prompts: PromptTokenizer, ids: Sequence[int]) -> str:
    """Return tokens as texts, one after another."""
    return ", ".join(repr(str(prompts.tokenizer.decode([token]))) for token in ids) or "no token"


def _advise(prompts: PromptTokenizer, text: str, position: int) -> str:
    """Return what to write so that a token ends where the prompt ends."""
    is_chat = not prompts.add_special_tokens  # a chat template writes the end of the prompt
    before, after = text[position - 1 : position], text[position : position + 1]
    if prompts.appends_tokens and getattr(prompts.tokenizer, "add_eos_token", False):
        return "Set tokenizer.add_eos_token: false."
    if prompts.appends_tokens:
        return "Use a tokenizer that adds no token after a prompt."
    if is_chat and after.isspace():
        return "Remove the white space at the beginning of the answers."
    if is_chat:
        return "Use a chat template whose generation prompt ends with a special token or with a line break."
    if before.isspace() and after.isspace():
        return "Remove the white space at the beginning of the completion."
    if before.isspace():
        return "Move the white space at the end of the prompt to the beginning of the completion."
    if after.isspace():
        return "Move the white space at the beginning of the completion to the end of the prompt."
    return "Begin the completion with a space, or end the prompt with a line break."
