"""The tokenizer of a run and its chat template: loaded, set up and checked, before rows and weights.

In: a `Run` and the folders or ids to look in. Out: a `Chat`: the tokenizer that is trained with and
saved, what its template renders, the token that ends a turn, and which tokens the model has to learn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trl_sft.data.formats import TokenizerFeatures
from trl_sft.errors import Fault, TemplateError, first_line
from trl_sft.recipe import hub, paths
from trl_sft.recipe.checked import Run, Setting
from trl_sft.recipe.yaml_reader import Key
from trl_sft.tokenization import chat_template, special_tokens

_REACH = ("cache_dir", "local_files_only", "token", "trust_remote_code")
_SHARED = ("cache_dir", "force_download", "local_files_only", "revision", "token", "trust_remote_code")


# What transformers hands to a template, or takes itself, by these names.
_GIVEN = {
    *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
}


class ChatTokenizer(NamedTuple):
    """A tokenizer with its template, ready to train with."""

    tokenizer: PreTrainedTokenizerBase
    target: TokenizerFeatures
    stop: str  # the token that ends an assistant's turn; "" = no template
    new: tuple[int, ...]  # ids that the model has not learned: their rows have to be trained
    rows: int  # how many rows the embedding needs; at most the model's = as many as it has
    said: tuple[str, ...]


def load(run: Run, names: Sequence[str], num_embeddings: int) -> ChatTokenizer:
    """Return the tokenizer of the first of `names` (an adapter, its base) that has one, set up. Raises TemplateError.

    `num_embeddings` is how many tokens the base model knows.
    """
    tokenizer = _loaded(run, names, run.tokenizer)
    said: list[str] = []
    # as its authors saved it: a token of the recipe's may lie in rows that the embedding has to spare
    theirs = (_loaded(run, names, {}) if run.tokenizer else tokenizer).get_vocab()
    learned = set(theirs) if len(names) > 1 else {token for token, number in theirs.items() if number < num_embeddings}
    if not tokenizer.is_fast:
        said.append(f"{type(tokenizer).__name__} is a slow tokenizer: rows are tokenized one by one")
    if run.chat_template is not None:
        installed = _install(run, tokenizer)
        said.append(run.chat_template.name + _told(installed))
    vocabulary = tokenizer.get_vocab()
    new = tuple(sorted(number for token, number in vocabulary.items() if token not in learned))
    rows = max(num_embeddings, max(vocabulary.values()) + 1)
    if new:
        said.append(_grown(tokenizer, new, num_embeddings, rows))
    if new and len(names) > 1:
        found = f"{said[-1]}; but {names[0]} is an adapter, which learns no further tokens"
        raise TemplateError(Fault(_where(run), found, "its base model in model.name_or_path"))
    renders: tuple[str, ...] = ()
    stop, text = "", chat_template.read_template(tokenizer)
    _check_kwargs(run, text)
    if text:
        renders = chat_template.find_features(_where(run), tokenizer, run.chat_template_kwargs)
        stop = chat_template.find_stop_token(tokenizer, run.chat_template_kwargs)
        several = special_tokens.find_split_strings(tokenizer, _written(run, tokenizer))
        if several:
            shown = ", ".join(f"{string} ({length})" for string, length in several.items())
            said.append(f"the template writes special strings that are several tokens in this vocabulary: {shown}")
    eos = str(run.train.get("eos_token") or tokenizer.eos_token)
    escape = run.data.get("special_tokens_in_text") == "text"
    if escape and not tokenizer.is_fast:
        found = f"special_tokens_in_text: text needs a fast tokenizer; this is {type(tokenizer).__name__}"
        raise TemplateError(Fault(run.recipe.where(("data", "special_tokens_in_text")), found, "refuse"))
    added = run.tokenizer.get("extra_special_tokens") or []  # who adds them means to write them
    meant = {*(added.values() if isinstance(added, dict) else added)}
    specials = tuple(string for string in special_tokens.list_strings(tokenizer) if string not in meant)
    target = TokenizerFeatures(renders, eos, special_tokens=specials, escape_special_tokens=escape)
    return ChatTokenizer(tokenizer, target, stop, new, rows, tuple(said))


def settings(run: Run, chat: ChatTokenizer, chats: bool) -> dict[Key, Setting]:
    """Return the end token that rows of a chat need where the tokenizer's is another. Raises TemplateError.

    `chats`: the rows become chats.
    """
    if not chats:
        if run.chat_template or run.chat_template_kwargs:
            word = "chat_template" if run.chat_template else "chat_template_kwargs"
            found = f"{word}, but no row becomes a chat: the saved tokenizer would offer what was not learned"
            write = "wording: chat beside the sources, or leave it out"
            raise TemplateError(Fault(run.recipe.where(("tokenizer", word)), found, write))
        return {}
    if not chat.stop:
        found = "the chat template ends an assistant's turn with no token that generation could stop on"
        write = "one that writes {{ eos_token }} after the answer, in tokenizer.chat_template"
        raise TemplateError(Fault(_where(run), found, write))
    for key, given in ((("train", "eos_token"), run.train), (("tokenizer", "eos_token"), run.tokenizer)):
        if given.get("eos_token") not in (None, chat.stop):
            found = f"{given['eos_token']}, but the template ends the assistant's turns with {chat.stop}"
            raise TemplateError(Fault(run.recipe.where(key), found, f"{chat.stop}, or leave it out: it is found"))
    if run.train.get("eos_token") or str(chat.tokenizer.eos_token) == chat.stop:
        return {}
    if chat_template.depends_on_eos(chat.tokenizer, chat.stop, run.chat_template_kwargs):
        return {}  # the template writes the end token itself, after this one: it stays; generation stops on both
    why = f"the template ends a turn with it, the tokenizer says {chat.tokenizer.eos_token}: generation has to stop"
    return {("train", "eos_token"): Setting(chat.stop, why)}


def _loaded(run: Run, names: Sequence[str], given: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Return the tokenizer as its owner loads it with the recipe's keywords `given`, and with an end token."""
    where = run.recipe.where(("model", "name_or_path"))
    keywords: dict[str, Any] = {name: run.model[name] for name in _SHARED if name in run.model} | given
    keywords.setdefault("trust_remote_code", False)  # else upstream asks on the terminal
    errors: list[str] = []
    for name in names:
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **keywords)
            break
        except Exception as error:
            errors.append(first_line(error))
    else:
        write = "a folder into which the tokenizer was saved too (tokenizer.save_pretrained)"
        raise TemplateError(Fault(where, f"{names[-1]}: no tokenizer can be loaded: {errors[-1]}", write))
    if tokenizer.eos_token is None and run.train.get("eos_token") is None and given == run.tokenizer:
        found = f"the tokenizer of {names[-1]} has no end token, so the model would never learn to stop"
        raise TemplateError(Fault(where, found, "tokenizer.eos_token: the token that ends a text"))
    return tokenizer


def _install(run: Run, tokenizer: PreTrainedTokenizerBase) -> special_tokens.InstalledTokens:
    """Give the tokenizer the recipe's template and its special tokens."""
    assert run.chat_template is not None
    if not tokenizer.is_fast:
        found = f"a template's tokens cannot be set up in {type(tokenizer).__name__}, a slow tokenizer"
        raise TemplateError(Fault(_where(run), found, "a model with a fast tokenizer (tokenizer.json)"))
    file = run.chat_template.files[0] if run.chat_template.files and run.chat_template.files[0].is_file() else None
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            found = f"{file.name} cannot be read: {first_line(error)}"
            raise TemplateError(Fault(_where(run), found, "a text file in UTF-8")) from None
        if not text.strip():
            raise TemplateError(Fault(_where(run), f"{file.name} is empty", "a chat template"))
        # our own leave the first token to the vocabulary: where it begins every text with one, a chat does too
        ours = file.is_relative_to(paths.TEMPLATES) and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        tokenizer.chat_template = ("{{- bos_token }}" if ours else "") + text
        return special_tokens.install(tokenizer, _written(run, tokenizer))
    keywords = {"trust_remote_code": False} | {name: run.model[name] for name in _REACH if name in run.model}
    try:
        if not run.chat_template.files and not hub.check_id("model", run.chat_template.name, {}):
            keywords["local_files_only"] = True
        other = AutoTokenizer.from_pretrained(run.chat_template.name, **keywords)
    except Exception as error:
        told = (
            f"{run.chat_template.name}: no tokenizer can be loaded: {first_line(error)}",
            "a tokenizer's folder or id",
        )
        refused = None if run.chat_template.files else hub.translate_error(_where(run), run.chat_template.name, error)
        raise refused or TemplateError(Fault(_where(run), *told)) from None
    text = chat_template.read_template(other)
    if not text:
        found = f"the tokenizer of {run.chat_template.name} has no chat template itself"
        raise TemplateError(Fault(_where(run), found, "another tokenizer, a .jinja file, or chatml"))
    tokenizer.chat_template = text
    shown = chat_template.render_trials(tokenizer, run.chat_template_kwargs)
    theirs = [str(token.content) for token in other.added_tokens_decoder.values() if token.content in shown]
    return special_tokens.install(tokenizer, list(dict.fromkeys([*_written(run, tokenizer), *theirs])))


def _written(run: Run, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the special strings that the template writes around text; one for pictures is not needed."""
    return special_tokens.find_special_strings(chat_template.render_trials(tokenizer, run.chat_template_kwargs))


def _check_kwargs(run: Run, text: str) -> None:
    taken = sorted(set(run.chat_template_kwargs) & _GIVEN)
    if taken:
        where = run.recipe.where(("tokenizer", "chat_template_kwargs", taken[0]))
        raise TemplateError(Fault(where, f"{taken[0]} is handed to the template already", "leave it out"))
    unread = [name for name in run.chat_template_kwargs if not re.search(rf"\b{re.escape(name)}\b", text)]
    if unread:
        where = run.recipe.where(("tokenizer", "chat_template_kwargs", unread[0]))
        raise TemplateError(Fault(where, f"the chat template reads no {unread[0]}", "a name that it reads"))


def _where(run: Run) -> str:
    return run.recipe.where(("tokenizer", "chat_template") if run.chat_template else ("model", "name_or_path"))


def _told(installed: special_tokens.InstalledTokens) -> str:
    held = f", {', '.join(installed.existing)} as the vocabulary has it" if installed.existing else ""
    reserved = "".join(f", {new} in the place of {old}" for new, old in installed.reserved.items())
    return f"{held}{reserved}" + (f", {', '.join(installed.added)} added" if installed.added else "")


def _grown(tokenizer: PreTrainedTokenizerBase, new: tuple[int, ...], before: int, after: int) -> str:
    some = ", ".join(tokenizer.convert_ids_to_tokens(list(new[:5]))) + (", ..." if len(new) > 5 else "")
    resized = f"the embedding grows from {before:,} to {after:,} rows" if after > before else "no row is added"
    return f"{len(new)} tokens that the model has not learned ({some}): {resized}, theirs are trained"
