"""A GGUF file as a side of an evaluation: llama.cpp answers the tokens that the other sides get.

Inputs: the file, prompts as token ids, and how the sides decode. Outputs: answers as token ids. What its own chat
template and tokenizer do with a chat is proved by `export`; here the weights are compared. Not here: llama.cpp
(`serving.proof.llama_client`), and the other sides (`sides`).
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from trl_sft import file_digests, user_paths
from trl_sft.errors import DataError, Fault, RecipeError
from trl_sft.evaluation import eval_packages
from trl_sft.evaluation.generate import LIMIT, STOP_TOKEN
from trl_sft.serving.proof import gguf_tokens, llama_client

SUFFIX = ".gguf"
_EXTRA = "trl-sft[gguf]"  # pyproject.toml: gguf and xllamacpp in tested versions
_LEAST_EQUAL = 0.99  # of the tokens of the run's vocabulary
_SAMPLING = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "min_p": 0.0,
}  # key -> transformers' value where it is unset
_KNOWN = {*_SAMPLING, "max_new_tokens", "do_sample", "transformers_version"}
_TOKEN_IDS = "_token_id"


def is_file(path: Path | None) -> bool:
    """Tell whether an option names a GGUF file."""
    return path is not None and path.suffix.lower() == SUFFIX


def check_file(path: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """Refuse a file that cannot be read or has another vocabulary than the run; return the digest of the side.

    Raises:
        MissingPackage: the extra `gguf` is not installed.
        RecipeError: the file is absent, is no GGUF file, or its tokens are others.

    """
    user_paths.check("--tuned", path, user_paths.FILE)
    if not path.is_file():
        fix = "Name the file that `export --to gguf` wrote."
        raise RecipeError(Fault("--tuned", f"{path}: there is no such file", fix, code="chat.no_model"))
    eval_packages.require_packages(f"--tuned {path.name}", "gguf", "xllamacpp", extra=_EXTRA)
    try:
        texts = gguf_tokens.read_texts(path)
    except (ValueError, KeyError, IndexError) as error:
        fix = "Name the file that `export --to gguf` wrote."
        problem = f"{path}: this is no whole GGUF file: {error}"
        raise RecipeError(Fault("--tuned", problem, fix, code="proof.unreadable_export")) from None
    own = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    equal = sum(one == other for one, other in zip(own, texts, strict=False))
    if equal < _LEAST_EQUAL * len(own):
        problem = f"{path}: {len(own) - equal:,} of the {len(own):,} tokens of the run are others in this file"
        fix = "Name a GGUF file of this run: both sides get the same tokens."
        raise RecipeError(Fault("--tuned", problem, fix, code="evaluation.other_vocabulary"))
    return f"gguf {file_digests.hash_file(path)} xllamacpp {importlib.metadata.version('xllamacpp')}"


def choose_decoding(config: GenerationConfig, seed: int) -> dict[str, Any]:
    """Return how llama.cpp decodes, equal to a local model.

    Raises:
        DataError: a key of `evaluate.generation` that llama.cpp decodes otherwise, or not at all.

    """
    changed = [key for key in config.to_diff_dict() if key not in _KNOWN and not key.endswith(_TOKEN_IDS)]
    if changed:
        problem = f"a GGUF file is not decoded with `{changed[0]}` of evaluate.generation"
        fix = f"Remove `{changed[0]}` from the recipe, or evaluate the run itself."
        raise DataError(Fault("--tuned", problem, fix, code="run.bad_option"))
    decoding = {"n_predict": config.max_new_tokens, "temperature": 0.0, "repeat_penalty": 1.0}
    if config.do_sample:
        values = {key: getattr(config, key) for key in _SAMPLING}
        decoding |= {key: _SAMPLING[key] if value is None else value for key, value in values.items()}
        decoding["seed"] = seed
    return decoding


def answer_prompts(
    path: Path, prompts: Sequence[Sequence[int]], decoding: Mapping[str, Any], *, stop_tokens: set[int]
) -> Iterator[tuple[list[int], str]]:
    """Yield the tokens of each answer without its end token, and why it ended.

    Args:
        path: of the file.
        prompts: (rows, tokens).
        decoding: of `choose_decoding`.
        stop_tokens: of the run; an answer ends before the first of them.

    Raises:
        RecipeError: llama.cpp cannot use the file.

    """
    longest = max(map(len, prompts), default=0) + int(decoding["n_predict"])
    try:
        with llama_client.serve(path, longest + llama_client.MARGIN) as server:
            for prompt in prompts:
                request = {**decoding, "prompt": list(prompt), "return_tokens": True, "cache_prompt": False}
                answer = server.post("/completion", request)
                yield _cut(answer, stop_tokens)
    except llama_client.LlamaFailure as error:
        fix = "Write the file again with `export --to gguf`, or evaluate the run itself."
        problem = f"llama.cpp cannot use {path.name}: {error}"
        raise RecipeError(Fault("--tuned", problem, fix, code="proof.unreadable_export")) from None


def _cut(answer: Mapping[str, Any], stop_tokens: set[int]) -> tuple[list[int], str]:
    """Return the tokens before the first end token, and why the answer ended."""
    tokens = [int(token) for token in answer["tokens"]]
    end = next((place for place, token in enumerate(tokens) if token in stop_tokens), math.inf)
    if end < math.inf:
        return tokens[: int(end)], STOP_TOKEN
    return tokens, LIMIT if answer.get("stop_type") == "limit" else STOP_TOKEN
