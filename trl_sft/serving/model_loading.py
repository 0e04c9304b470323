"""Loads a tuned model with its tokenizer, and its base model beside it.

Inputs: a `ModelFolder`. Outputs: a live model in eval mode, whose generation config has the stop tokens of training.
Keywords are those that run.json records; code of a model's author runs only if the user says so. Not here: answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from trl_sft.data.formats import CHAT
from trl_sft.errors import Fault, RecipeError, TemplateError, first_line
from trl_sft.model import load, patches
from trl_sft.serving.model_folder import ModelFolder, check_base
from trl_sft.tokenization import turn_markers

_GENERATION = "generation_config.json"
_HUB_KEYS = ("revision", "cache_dir", "local_files_only")  # of the base model, not of the run's own folder


def load_tokenizer(source: ModelFolder, *, trusts_code: bool) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder, or that of its base. Raises TemplateError."""
    tokenizer = read_tokenizer(source.tokenizer_source, source.folder, trusts_code=trusts_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_tokenizer(name: str, where: Path, *, trusts_code: bool = False) -> PreTrainedTokenizerBase:
    """Return a tokenizer as it was saved.

    Args:
        name: a folder or a hub id.
        where: the folder that a fault names.
        trusts_code: whether Python code that it brings may run.

    Raises:
        TemplateError: it is absent or damaged.

    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=trusts_code)
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
    else:
        if len(tokenizer.get_vocab()) > len(tokenizer.added_tokens_decoder):
            return tokenizer
        reason = "its vocabulary is empty"  # transformers 5.23 builds one of tokenizer_config.json alone
    problem = f"no tokenizer can be loaded from {name}: {reason}"
    fix = "Restore the files of the tokenizer from a copy, or save it there with tokenizer.save_pretrained."
    raise TemplateError(Fault(str(where), problem, fix, code="model.no_tokenizer"))


def load_model(source: ModelFolder, tokenizer: PreTrainedTokenizerBase, *, trusts_code: bool) -> PreTrainedModel:
    """Return the tuned model: a whole model, or an adapter on its base.

    Args:
        source: the folder.
        tokenizer: for the rows of the embedding and the token that ends a turn.
        trusts_code: whether Python code that a model brings may run.

    Raises:
        RecipeError: the weights cannot be loaded, or the base model is gone or another one.

    """
    if not source.is_adapter:
        model = _load(source, str(source.weights), trusts_code=trusts_code)
    else:
        from peft import PeftModel

        base = load_base(source, tokenizer, trusts_code=trusts_code)
        try:
            model = PeftModel.from_pretrained(base, str(source.weights))
        except Exception as error:
            raise _explain(source, str(source.weights), error) from None
    set_stop_tokens(source, model, tokenizer)
    return model.eval()


def load_base(source: ModelFolder, tokenizer: PreTrainedTokenizerBase, *, trusts_code: bool) -> PreTrainedModel:
    """Return the base model as it is before training: with rows for new tokens. Raises RecipeError."""
    check_base(source)
    model = _load(source, source.base, trusts_code=trusts_code)
    rows, new_tokens = max(tokenizer.get_vocab().values()) + 1, source.inference.get("new_tokens", [])
    if new_tokens or rows > model.get_input_embeddings().weight.shape[0]:
        load.add_embedding_rows(model, rows, new_tokens)
    set_stop_tokens(source, model, tokenizer)
    return model.eval()


def set_stop_tokens(source: ModelFolder, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let generation stop where the run's does."""
    model.generation_config = read_generation_config(source, tokenizer, own=model.generation_config)


def read_generation_config(
    source: ModelFolder, tokenizer: PreTrainedTokenizerBase, *, own: GenerationConfig
) -> GenerationConfig:
    """Return the generation config that the run saved, with the token that ends a turn as a stop token.

    Args:
        source: the folder.
        tokenizer: of the folder.
        own: what counts where no folder has a generation config.

    """
    folder = source.find_first(_GENERATION)
    config = own if folder is None else GenerationConfig.from_pretrained(str(folder))
    kwargs = source.inference.get("chat_template_kwargs", {})
    if source.inference.get("row_type", CHAT) == CHAT and tokenizer.chat_template:
        stop_token = turn_markers.find_stop_token(tokenizer, kwargs)
        if stop_token:
            load.add_stop_token(config, tokenizer.convert_tokens_to_ids(stop_token))
    return config


def count_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of a model's weights."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def _load(source: ModelFolder, name: str, *, trusts_code: bool) -> PreTrainedModel:
    """Return a model on the accelerator, or on the CPU where there is none. Raises RecipeError."""
    keywords: dict[str, Any] = {"dtype": "auto"} | source.inference.get("model", {})
    if Path(name).is_dir():
        keywords = {key: value for key, value in keywords.items() if key not in _HUB_KEYS}
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = accelerator or torch.device("cpu")
    if source.inference.get("quantization") and name == source.base:
        keywords["quantization_config"] = BitsAndBytesConfig.from_dict(dict(source.inference["quantization"]))
        keywords["device_map"] = {"": device}
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=trusts_code, **keywords)
    except Exception as error:
        raise _explain(source, name, error) from None
    patches.repair(model)
    return model if "device_map" in keywords else model.to(device)


def _explain(source: ModelFolder, name: str, error: Exception) -> RecipeError:
    """Return the fault of weights that cannot be loaded."""
    problem = f"{name} cannot be loaded: {first_line(error)}"
    fix = "Copy or download the model again."
    if "trust_remote_code" in str(error):
        fix = "Read the code of the model; if you trust it, add --trust-remote-code."
    return RecipeError(Fault(str(source.folder), problem, fix, code="chat.unreadable_model"))
