"""The tokenizer of a model, as metadata of a GGUF file.

Inputs: a fast tokenizer of transformers, the rows of the embedding, the tokens that end an answer. Outputs: a
`Vocabulary`, or a refusal by name. Two kinds are written: byte-level BPE (`gpt2`) and BPE with fallback to bytes, as
SentencePiece makes it (`llama`). Deliberately not here: which rules of llama.cpp split the text
(`pre_tokenizers`), and the chat template (`gguf_template`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NoReturn

import gguf

from trl_sft.errors import Fault, TemplateError

BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"  # `tokenizer.ggml.model`
_SPACE = "▁"  # SentencePiece's


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a GGUF file and how text becomes tokens.

    Attributes:
        kind: BYTE_LEVEL or SENTENCEPIECE.
        pre: of llama.cpp's rules that split a text; "" = none, of SENTENCEPIECE.
        tokens: (rows,)
        types: (rows,) of `gguf.TokenType`.
        scores: (rows,) of SENTENCEPIECE; () = none.
        merges: pairs of tokens, of BYTE_LEVEL; () = none.
        special_ids: by the name that GGUF has: "bos", "eos", "eot", "eom", "unk", "padding".
        adds_bos: whether llama.cpp begins a text with the BOS token.
        adds_space: whether llama.cpp puts a space before a text; None = it decides.
        normalizes: whether the tokenizer brings texts to Unicode's form NFC first, which llama.cpp does not.

    """

    kind: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]
    special_ids: dict[str, int]
    adds_bos: bool
    adds_space: bool | None = None
    normalizes: bool = False

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Add the vocabulary to the header of a file."""
        writer.add_tokenizer_model(self.kind)
        if self.pre:
            writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, number in self.special_ids.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(False)
        if self.adds_space is not None:
            writer.add_add_space_prefix(self.adds_space)


def build(tokenizer: Any, rows: int, stop_ids: list[int], *, adds_bos: bool, where: str) -> Vocabulary:
    """Return the vocabulary of a tokenizer, without the rules that split a text.

    Args:
        tokenizer: Of transformers, with a fast form.
        rows: Of the embedding; those without a token get a name of their own.
        stop_ids: Tokens that end an answer; the first ends a turn.
        adds_bos: Whether prompts begin with the BOS token.
        where: The place that a refusal names.

    Raises:
        TemplateError: The tokenizer cannot be written.

    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        _refuse(where, "the tokenizer has no fast form (tokenizer.json), from which its merges are read")
    content = json.loads(backend.to_str())
    model, kind = content["model"], _find_kind(content, where)
    ids: dict[str, int] = dict(model["vocab"])
    added = {token["content"]: token for token in content["added_tokens"]}
    ids |= {text: int(token["id"]) for text, token in added.items()}
    if max(ids.values()) >= rows:
        _refuse(where, f"the tokenizer has the token {max(ids.values()):,}, and the embedding has {rows:,} rows")
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [gguf.TokenType.UNUSED] * rows
    for text, number in ids.items():
        tokens[number] = text
        types[number] = _choose_type(text, added.get(text), tokenizer, kind=kind)
    merges = [_join(merge) for merge in model.get("merges", [])]
    return Vocabulary(
        kind=kind,
        pre="default" if kind == SENTENCEPIECE else "",
        tokens=tuple(tokens),
        types=tuple(map(int, types)),
        scores=_compute_scores(model, tokens) if kind == SENTENCEPIECE else (),
        merges=tuple(merges) if kind == BYTE_LEVEL else (),
        special_ids=_choose_special_ids(tokenizer, stop_ids, where),
        adds_bos=adds_bos,
        normalizes=kind == BYTE_LEVEL and bool(_list_parts(content.get("normalizer"), "normalizers")),
    )


def _find_kind(content: dict[str, Any], where: str) -> str:
    """Return the kind of a tokenizer by its tokenizer.json. Raises TemplateError if llama.cpp has none like it."""
    model = content["model"]
    if model["type"] != "BPE":
        _refuse(where, f"a tokenizer of the kind {model['type']} cannot be written; BPE can")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            _refuse(where, f"llama.cpp has no `{name}` of the tokenizer's BPE")
    if model.get("byte_fallback"):
        return SENTENCEPIECE
    parts = _list_parts(content.get("pre_tokenizer"), "pretokenizers")
    if not any(part["type"] == "ByteLevel" for part in parts):
        _refuse(where, "the tokenizer's BPE has neither bytes as letters (ByteLevel) nor `byte_fallback`")
    normalizers = _list_parts(content.get("normalizer"), "normalizers")
    if normalizers and not all(part["type"] == "NFC" for part in normalizers):
        _refuse(where, f"llama.cpp has no normalizer {normalizers[0]['type']} of text before byte-level BPE")
    if any(part["type"] == "ByteLevel" and part.get("add_prefix_space") for part in parts):
        _refuse(where, "llama.cpp has no `add_prefix_space: true` of byte-level BPE")
    return BYTE_LEVEL


def _list_parts(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """Return the steps of a sequence in tokenizer.json; one step alone is a sequence of one."""
    if part is None:
        return []
    return list(part[name]) if part["type"] == "Sequence" else [part]


def _choose_type(text: str, added: dict[str, Any] | None, tokenizer: Any, *, kind: str) -> gguf.TokenType:
    """Return the type of a token."""
    if kind == SENTENCEPIECE and text == tokenizer.unk_token:
        return gguf.TokenType.UNKNOWN
    if added is not None:
        return gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    if kind == SENTENCEPIECE and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return gguf.TokenType.BYTE
    return gguf.TokenType.NORMAL


def _join(merge: str | list[str]) -> str:
    """Return a merge as one text, which older tokenizer.json have and newer ones have as a pair."""
    return merge if isinstance(merge, str) else " ".join(merge)


def _compute_scores(model: dict[str, Any], tokens: list[str]) -> tuple[float, ...]:
    """Return a score for each token, so that llama.cpp joins pairs in the order of the tokenizer's merges."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    return tuple(-float(ranks.get(token, len(ranks))) for token in tokens)


def _choose_special_ids(tokenizer: Any, stop_ids: list[int], where: str) -> dict[str, int]:
    """Return the ids of the special tokens; up to three tokens that end an answer have a place."""
    ids: dict[str, int] = {}
    if tokenizer.bos_token_id is not None:
        ids["bos"] = tokenizer.bos_token_id
    stops = list(dict.fromkeys(stop_ids))
    if len(stops) > 3:
        names = ", ".join(tokenizer.convert_ids_to_tokens(stops))
        _refuse(where, f"answers end with {len(stops)} different tokens ({names}), and GGUF has a place for three")
    ids |= dict(zip(("eos", "eot", "eom"), stops, strict=False))
    if tokenizer.unk_token_id is not None:
        ids["unknown"] = tokenizer.unk_token_id
    if tokenizer.pad_token_id is not None:
        ids["padding"] = tokenizer.pad_token_id
    return ids


def _refuse(where: str, problem: str) -> NoReturn:
    """Raise TemplateError for a tokenizer that cannot be written."""
    fix = "Export with `--to merged` or `--to vllm`."
    raise TemplateError(Fault(where, problem, fix, code="export.unsupported_tokenizer"))
