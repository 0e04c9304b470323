"""The tokenizer of a run and its chat template: loaded, set up and checked, before rows and weights are loaded.

Inputs: a `Run`, and the folders or hub ids that may have the tokenizer. Outputs: a `ChatTokenizer`: the tokenizer that
the run trains with and saves, what its template renders, the token that ends a turn, and the tokens that the model has
to learn. Not here: what a template does (`chat_template`), and how its tokens are installed (`special_tokens`).
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from trl_sft.data.formats import TokenizerFeatures
from trl_sft.errors import Edit, Fault, TemplateError, first_line
from trl_sft.recipe import hub, paths
from trl_sft.recipe.checked import Run, Setting
from trl_sft.recipe.yaml_reader import Key, format_value
from trl_sft.suggestions import STRICT, is_misspelling, nearest_name
from trl_sft.tokenization import chat_template, special_tokens, template_advice, template_limits, turn_markers
from trl_sft.tokenization.template_advice import TrialChat

# keywords of `model:` that another repository, and the tokenizer of the same one, are loaded with
_HUB_KWARGS = ("cache_dir", "local_files_only", "token", "trust_remote_code")
_MODEL_KWARGS = ("cache_dir", "force_download", "local_files_only", "revision", "token", "trust_remote_code")
# names that transformers passes to a template, or takes itself
# a name that a template uses if it is passed: `enable_thinking is defined and ...`
_OPTIONAL_NAME = re.compile(r"(?<![.\w])([A-Za-z_]\w*) is (?:not )?(?:defined|undefined)\b")
_RESERVED_KWARGS = {
    *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
}


class ChatTokenizer(NamedTuple):
    """A tokenizer with its template, ready to train with.

    Attributes:
        tokenizer: the tokenizer itself.
        features: what the formatting of rows needs to know of it.
        stop_token: the token that ends an assistant's turn; "" = there is no template.
        new_tokens: ids that the model has not learned; their embeddings are trained.
        num_embeddings: rows that the embedding needs, never fewer than the base model has.
        notes: lines for the screen.
        template_date: the day that the template writes in this run; None = it writes none.

    """

    tokenizer: PreTrainedTokenizerBase
    features: TokenizerFeatures
    stop_token: str
    new_tokens: tuple[int, ...]
    num_embeddings: int
    notes: tuple[str, ...]
    template_date: datetime.date | None = None


def load(run: Run, names: Sequence[str], num_embeddings: int) -> ChatTokenizer:
    """Load and set up the tokenizer of a run.

    Args:
        run: the checked recipe.
        names: folders or hub ids, an adapter before its base; the first one that has a tokenizer is used.
        num_embeddings: rows of the base model's embedding.

    Raises:
        TemplateError: no tokenizer can be loaded, or its template cannot train.

    """
    tokenizer = _load_tokenizer(run, names, run.tokenizer)
    # as its authors saved it: a token that the recipe adds may have a spare row of the embedding, which is not learned
    original = (_load_tokenizer(run, names, {}) if run.tokenizer else tokenizer).get_vocab()
    is_adapter = len(names) > 1
    learned = {token for token, number in original.items() if is_adapter or number < num_embeddings}
    notes: list[str] = []
    if not tokenizer.is_fast:
        notes.append(f"{type(tokenizer).__name__} is a slow tokenizer: rows are tokenized one by one")
    if run.chat_template is not None:
        installed = _install_template(run, tokenizer)
        notes.append(run.chat_template.name + _describe_installed(installed))
    else:
        template_limits.check_limits(_where(run), tokenizer, run.chat_template_kwargs)
    vocabulary = tokenizer.get_vocab()
    new_tokens = tuple(sorted(number for token, number in vocabulary.items() if token not in learned))
    num_rows = max(num_embeddings, max(vocabulary.values()) + 1)
    if new_tokens:
        notes.append(_describe_new_tokens(tokenizer, new_tokens, before=num_embeddings, after=num_rows))
    if new_tokens and is_adapter:
        problem = f"{notes[-1]}; but {names[0]} is an adapter, which learns no further tokens"
        raise TemplateError(
            Fault(_where(run), problem, "Set model.name_or_path to its base model.", code="model.new_tokens")
        )
    template, stop_token = chat_template.read_template(tokenizer), ""
    _check_template_kwargs(run, template)
    template_features: tuple[str, ...] = ()
    if template:
        template_features = chat_template.find_features(_where(run), tokenizer, run.chat_template_kwargs)
        stop_token = turn_markers.find_stop_token(tokenizer, run.chat_template_kwargs)
        split_strings = special_tokens.find_split_strings(tokenizer, _list_special_strings(run, tokenizer))
        if split_strings:
            strings = ", ".join(f"{string} ({length})" for string, length in split_strings.items())
            notes.append(f"the template writes special strings that are several tokens in this vocabulary: {strings}")
    features = _describe_features(run, tokenizer, template_features)
    return ChatTokenizer(tokenizer, features, stop_token, new_tokens, num_rows, tuple(notes))


def _describe_features(
    run: Run, tokenizer: PreTrainedTokenizerBase, template_features: tuple[str, ...]
) -> TokenizerFeatures:
    """Return what the formatting of rows needs to know of a tokenizer. Raises TemplateError."""
    escape = run.data.get("special_tokens_in_text") == "text"
    if escape and not tokenizer.is_fast:
        problem = f"special_tokens_in_text: text needs a fast tokenizer; this is {type(tokenizer).__name__}"
        where = run.recipe.where(("data", "special_tokens_in_text"))
        raise TemplateError(Fault(where, problem, "Set special_tokens_in_text: refuse.", code="model.slow_tokenizer"))
    # whoever adds a special token in the recipe means to write it in rows
    extra = run.tokenizer.get("extra_special_tokens") or []
    intended = {*(extra.values() if isinstance(extra, dict) else extra)}
    strings = tuple(string for string in special_tokens.list_strings(tokenizer) if string not in intended)
    eos_token = str(run.train.get("eos_token") or tokenizer.eos_token)
    return TokenizerFeatures(template_features, eos_token, special_tokens=strings, escape_special_tokens=escape)


def choose_settings(run: Run, chat: ChatTokenizer, chats: bool) -> dict[Key, Setting]:
    """Return the end-of-text token that chats need, where the tokenizer has another one.

    Args:
        run: the checked recipe.
        chat: the tokenizer of the run.
        chats: whether the rows are chats.

    Raises:
        TemplateError: the template ends no turn, or the recipe sets another end token or a template without chats.

    """
    if not chats:
        if run.chat_template or run.chat_template_kwargs:
            word = "chat_template" if run.chat_template else "chat_template_kwargs"
            problem = f"{word}, but no row becomes a chat: the model would not be trained on this template"
            fix = f"Set wording: chat for the sources, or remove {word}."
            raise TemplateError(Fault(run.recipe.where(("tokenizer", word)), problem, fix, code="template.unused"))
        return {}
    if not chat.stop_token:
        raise TemplateError(_explain_missing_end(run, chat.tokenizer))
    for key, section in ((("train", "eos_token"), run.train), (("tokenizer", "eos_token"), run.tokenizer)):
        if section.get("eos_token") not in (None, chat.stop_token):
            problem = f"{section['eos_token']}, but the template ends the assistant's turns with {chat.stop_token}"
            fix = f"Set {chat.stop_token}, or remove the key: the token is read from the template."
            raise TemplateError(Fault(run.recipe.where(key), problem, fix, code="template.other_end_token"))
    if run.train.get("eos_token") or str(chat.tokenizer.eos_token) == chat.stop_token:
        return {}
    if chat_template.depends_on_eos(chat.tokenizer, chat.stop_token, run.chat_template_kwargs):
        return {}  # the template writes the end-of-text token after this one; generation stops on both
    reason = (
        f"the template ends a turn with it, and generation has to stop; the tokenizer has {chat.tokenizer.eos_token}"
    )
    return {("train", "eos_token"): Setting(chat.stop_token, reason)}


def _explain_missing_end(run: Run, tokenizer: PreTrainedTokenizerBase) -> Fault:
    """Return the fault of a template that ends no answer with a token, with a change that a trial finds right."""
    problem = "the chat template ends an assistant's turn with no token that generation could stop on"
    code, kwargs = "template.no_end_token", run.chat_template_kwargs
    trial = TrialChat(chat_template.TRIAL_CHAT, answers=[1])
    name = template_advice.find_template(tokenizer, kwargs, trial, train=template_advice.place_loss)
    if name:
        fix = f"Set tokenizer.chat_template: {name}, which ends an answer as this model's generation does."
        edits = (Edit("set", ("tokenizer", "chat_template"), name),)
        return Fault(_where(run), problem, fix, code=code, edits=edits)
    old, new = template_advice.find_end_edit(tokenizer, kwargs)
    if not old:
        fix = "Set tokenizer.chat_template to a template that writes {{ eos_token }} after the answer."
        return Fault(_where(run), problem, fix, code=code)
    model = tokenizer.name_or_path
    command = (
        f"python -c \"from transformers import AutoTokenizer as T; print(T.from_pretrained('{model}').chat_template)\""
    )
    fix = (
        f"Write `{new}` everywhere in the template in place of `{old}`, so that {tokenizer.eos_token} ends each answer."
    )
    if run.chat_template is None or not (run.chat_template.files and run.chat_template.files[0].is_file()):
        fix += f" Save the template with `{command} > chat.jinja`, and set `tokenizer.chat_template: chat.jinja`."
    if text := template_advice.find_end_text(tokenizer, kwargs):
        problem = f"{problem}; it ends with the line breaks {text!r}"
        alternative = fix[0].lower() + fix[1:]
        fix = f"Set `tokenizer.eos_token: {format_value(text)}`, on which generation then stops. Or {alternative}"
    return Fault(_where(run), problem, fix, code=code)


def _load_tokenizer(run: Run, names: Sequence[str], kwargs: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Return the tokenizer as transformers loads it with the recipe's keywords. Raises TemplateError without one."""
    where = run.recipe.where(("model", "name_or_path"))
    keywords: dict[str, Any] = {name: run.model[name] for name in _MODEL_KWARGS if name in run.model} | kwargs
    keywords.setdefault("trust_remote_code", False)  # else upstream asks on the terminal
    errors: list[str] = []
    for name in names:
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **keywords)
            break
        except Exception as error:
            errors.append(first_line(error))
    else:
        fix = "Name a folder that has the tokenizer too: save it there with tokenizer.save_pretrained."
        raise TemplateError(
            Fault(where, f"{names[-1]}: no tokenizer can be loaded: {errors[-1]}", fix, code="model.no_tokenizer")
        )
    if tokenizer.eos_token is None and run.train.get("eos_token") is None and kwargs == run.tokenizer:
        problem = f"the tokenizer of {names[-1]} has no end token, so the model would never learn to stop"
        raise TemplateError(
            Fault(where, problem, "Set tokenizer.eos_token to the token that ends a text.", code="model.no_end_token")
        )
    return tokenizer


def _install_template(run: Run, tokenizer: PreTrainedTokenizerBase) -> special_tokens.InstalledTokens:
    """Give the tokenizer the recipe's template and its special tokens. Raises TemplateError."""
    assert run.chat_template is not None
    if not tokenizer.is_fast:
        problem = f"a template's tokens cannot be set up in {type(tokenizer).__name__}, a slow tokenizer"
        raise TemplateError(
            Fault(
                _where(run), problem, "Use a model with a fast tokenizer (tokenizer.json).", code="model.slow_tokenizer"
            )
        )
    files = run.chat_template.files
    if files and files[0].is_file():
        tokenizer.chat_template = _read_template_file(run, files[0], tokenizer)
        template_limits.check_limits(_where(run), tokenizer, run.chat_template_kwargs)
        return special_tokens.install(tokenizer, _list_special_strings(run, tokenizer))
    other = _load_template_source(run)
    template = chat_template.read_template(other)
    if not template:
        problem = f"the tokenizer of {run.chat_template.name} has no chat template itself"
        raise TemplateError(
            Fault(_where(run), problem, "Name another tokenizer, a .jinja file, or chatml.", code="template.missing")
        )
    tokenizer.chat_template = template
    template_limits.check_limits(_where(run), tokenizer, run.chat_template_kwargs)
    rendered = chat_template.render_trials(tokenizer, run.chat_template_kwargs)
    strings = [str(token.content) for token in other.added_tokens_decoder.values() if token.content in rendered]
    return special_tokens.install(tokenizer, list(dict.fromkeys([*_list_special_strings(run, tokenizer), *strings])))


def _read_template_file(run: Run, file: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the template of a file. Raises TemplateError."""
    try:
        template = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = f"{file.name} cannot be read: {first_line(error)}"
        raise TemplateError(
            Fault(_where(run), problem, "Name a text file in UTF-8.", code="template.unreadable")
        ) from None
    if not template.strip():
        raise TemplateError(
            Fault(_where(run), f"{file.name} is empty", "Write a chat template into it.", code="template.unreadable")
        )
    # templates of this package do not write the first token: where the tokenizer begins every text with one, so
    # does a chat
    needs_bos = file.is_relative_to(paths.TEMPLATES) and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return ("{{- bos_token }}" if needs_bos else "") + template


def _load_template_source(run: Run) -> PreTrainedTokenizerBase:
    """Return the tokenizer whose template the recipe names. Raises TemplateError."""
    assert run.chat_template is not None
    name, is_local = run.chat_template.name, bool(run.chat_template.files)
    keywords = {"trust_remote_code": False} | {key: run.model[key] for key in _HUB_KWARGS if key in run.model}
    try:
        if not is_local and not hub.check_id("model", name, {}):
            keywords["local_files_only"] = True
        return AutoTokenizer.from_pretrained(name, **keywords)
    except Exception as error:
        refusal = None if is_local else hub.translate_error(_where(run), name, error)
        problem = f"{name}: no tokenizer can be loaded: {first_line(error)}"
        fix = "Name the folder or the hub id of a tokenizer."
        raise refusal or TemplateError(Fault(_where(run), problem, fix, code="model.no_tokenizer")) from None


def _list_special_strings(run: Run, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the special strings that the template writes around text; those for images are not needed."""
    return special_tokens.find_special_strings(chat_template.render_trials(tokenizer, run.chat_template_kwargs))


def _check_template_kwargs(run: Run, template: str) -> None:
    """Refuse keywords that transformers passes itself, or that the template does not read. Raises TemplateError."""
    code = "template.unknown_keyword"
    reserved = sorted(set(run.chat_template_kwargs) & _RESERVED_KWARGS)
    if reserved:
        key = ("tokenizer", "chat_template_kwargs", reserved[0])
        problem = f"transformers passes {reserved[0]} to the template itself"
        raise TemplateError(Fault(run.recipe.where(key), problem, "Remove it.", code=code))
    unread = [name for name in run.chat_template_kwargs if not re.search(rf"\b{re.escape(name)}\b", template)]
    if not unread:
        return
    key = ("tokenizer", "chat_template_kwargs", unread[0])
    optional = sorted({*_OPTIONAL_NAME.findall(template)} - _RESERVED_KWARGS - {*chat_template.NAMES})
    edits: tuple[Edit, ...] = ()
    if not optional:
        fix, edits = "Remove it: the template reads no further names.", (Edit("remove", key),)
    else:
        nearest = nearest_name(unread[0], optional, cutoff=STRICT)
        fix = f"Use a name that it reads: {', '.join(optional)}."
        if is_misspelling(unread[0], nearest, optional):
            fix, edits = f"Did you mean `{nearest}`?", (Edit("rename", key, new=(*key[:2], nearest)),)
    raise TemplateError(
        Fault(run.recipe.where(key), f"the chat template reads no {unread[0]}", fix, code=code, edits=edits)
    )


def _where(run: Run) -> str:
    """Return the place in the recipe that decides which template is used."""
    return run.recipe.where(("tokenizer", "chat_template") if run.chat_template else ("model", "name_or_path"))


def _describe_installed(installed: special_tokens.InstalledTokens) -> str:
    """Return where the special tokens of a template come from, as the end of a sentence."""
    existing = f", {', '.join(installed.existing)} as the vocabulary has it" if installed.existing else ""
    reserved = "".join(f", {new} in the place of {old}" for new, old in installed.reserved.items())
    added = f", {', '.join(installed.added)} added" if installed.added else ""
    return f"{existing}{reserved}{added}"


def _describe_new_tokens(
    tokenizer: PreTrainedTokenizerBase, new_tokens: tuple[int, ...], *, before: int, after: int
) -> str:
    """Return which tokens the model has to learn, and how the embedding grows, in words."""
    names = ", ".join(tokenizer.convert_ids_to_tokens(list(new_tokens[:5]))) + (", ..." if len(new_tokens) > 5 else "")
    resized = f"the embedding grows from {before:,} to {after:,} rows" if after > before else "no row is added"
    return f"{len(new_tokens)} tokens that the model has not learned ({names}): {resized}, theirs are trained"
