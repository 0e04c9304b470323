"""What the data sets of a file for axolotl mean: where rows come from, how they become text, which tokens are trained.

Types and their columns are those of axolotl/prompt_strategies in 0.19.0. In: the settings. Out: lines of `data:` and
of the chat template.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trl_sft.importers.settings import Given, Item, Left, RecipeLine, located, refuse, several, source
from trl_sft.recipe import paths
from trl_sft.recipe.yaml_reader import format_value

NAMES = (
    *(
        "datasets",
        "test_datasets",
        "pretraining_dataset",
        "val_set_size",
        "train_on_inputs",
        "chat_template",
        "streaming",
    ),
    *("chat_template_jinja", "excess_length_strategy"),
)
_SHARED = {"name": "name", "split": "split", "revision": "revision"}
# keys of a data set that say how its rows become text, and are read below
_READ = {
    *("path", "type", "ds_type", "data_files", "field", "field_messages", "message_property_mappings", "chat_template"),
    *(
        "message_field_role",
        "message_field_content",
        "roles_to_train",
        "train_on_eos",
        "chat_template_jinja",
        "conversation",
    ),
    *_SHARED,
}
# chat templates that axolotl calls otherwise than TRL
_TEMPLATES = {"qwen_25": "qwen2_5", "phi_3": "phi3", "deepseek_v3": "deepseekv3"}
_NO_BREAK = "axolotl breaks the line after ### Response:, the wording alpaca does not"


def holds_out(given: Given) -> bool:
    """Tell whether rows are held out."""
    return bool(given.get("test_datasets")) or 0 < given.get("val_set_size", 0) < 1


def lines(given: Given) -> Iterator[Item]:
    """Yield what became of the data sets. Raises RecipeError."""
    name = next((name for name in ("datasets", "pretraining_dataset") if given.get(name)), None)
    if name is None:
        raise refuse(given, "datasets", "no rows are named", "datasets: [{path: FILE or HUB ID, type: chat_template}]")
    notes: list[str] = []
    train = [_source(given, name, entry, notes) for entry in _list(given.get(name))]
    if name == "pretraining_dataset":
        train = [entry | {"streaming": True} if isinstance(entry, dict) else entry for entry in train]
    yield RecipeLine(("data", "train"), several(train), (name, "streaming"), "; ".join(dict.fromkeys(notes)))
    if given.get("test_datasets"):
        held = [_source(given, "test_datasets", entry, []) for entry in _list(given.get("test_datasets"))]
        yield RecipeLine(("data", "eval"), several(held), ("test_datasets",))
    size = given.get("val_set_size", 0)
    if size >= 1:
        yield Left("val_set_size", "a number of rows; data.eval_fraction takes their share", aloud=True)
    elif size:
        yield RecipeLine(("data", "eval_fraction"), size, ("val_set_size",), "other rows than axolotl's, by train.seed")
    yield from _masks(given, _list(given.get(name)))
    long = {"drop": "drop", "truncate": "truncate", "raise": "error"}.get(given.get("excess_length_strategy", "drop"))
    yield RecipeLine(
        ("data", "overlong"),
        long,
        ("excess_length_strategy",) if given.get("excess_length_strategy") else (),
        "" if given.get("excess_length_strategy") else "axolotl's default",
    )
    yield from _template(given, _list(given.get(name)))


def _list(value: Any) -> list[dict[str, Any]]:
    """Return data sets as a list of mappings, as axolotl writes them in three ways."""
    many = value if isinstance(value, list) else [value]
    return [entry if isinstance(entry, dict) else {"path": str(entry), "type": "pretrain"} for entry in many]


def _source(given: Given, name: str, entry: dict[str, Any], notes: list[str]) -> Any:
    """Return one source; `notes` takes what changed of its meaning."""
    path, files = entry.get("path"), entry.get("data_files")
    if not isinstance(path, str):
        raise refuse(given, name, "a data set without a path", "path: FILE, FOLDER or HUB ID")
    path = located(path, files, notes)
    unread = sorted(set(entry) - _READ - {"trust_remote_code"})
    notes += [f"{key} of {path} is not built in this version" for key in unread if entry[key] is not None]
    shared = {
        new: entry[old] for old, new in _SHARED.items() if entry.get(old) and (old, entry[old]) != ("split", "train")
    }
    return source(path, **shared, **_layout(entry, notes))


def _layout(entry: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Return the keys that say how the rows of a data set become text."""
    kind = entry.get("type")
    if isinstance(kind, dict):
        return _own(kind, notes)
    word = str(kind or "").partition(":")[0]
    if word in ("chat_template", "sharegpt") or (word == "" and entry.get("field_messages")):
        return _chat(entry, word)
    if word in ("completion", "pretrain"):
        column = entry.get("field") or entry.get("text_column") or "text"
        if word == "completion":
            notes.append(
                "axolotl cuts a long text into rows of sequence_len, here data.overlong says what becomes of it"
            )
        return {"format": "text", "rename": {column: "text"} if column != "text" else {}}
    if word == "alpaca":
        notes.append(_NO_BREAK)
        return {"format": "alpaca", "wording": "alpaca"}
    known = {"alpaca_chat.load_qa": "question_answer", "alpaca_w_system.load_open_orca": ""}
    notes.append(f"type {kind} words rows in its own way: look at wording and `preview` before training")
    return {"format": known.get(word, "")}


def _chat(entry: dict[str, Any], word: str) -> dict[str, Any]:
    """Return the keys of a chat: messages by role and content, or by from and value."""
    mapping = entry.get("message_property_mappings") or {}
    role = mapping.get("role", entry.get("message_field_role") or ("from" if word == "sharegpt" else "role"))
    column = entry.get("field_messages") or ("conversations" if word == "sharegpt" else "messages")
    layout, name = ("sharegpt", "conversations") if role == "from" else ("messages", "messages")
    return {"format": layout, "wording": "chat", "rename": {column: name} if column != name else {}}


def _own(kind: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Return the wording of a type that the file itself writes."""
    asked, given, answered = (kind.get(f"field_{name}") or name for name in ("instruction", "input", "output"))
    prompt = kind.get("format") or "{instruction} {input} "
    if kind.get("no_input_format") and "{input}" in prompt:
        notes.append("no_input_format is not built in this version: rows without an input get the same wording")
    prompt = prompt.replace("{instruction}", f"{{{asked}}}").replace("{input}", f"{{{given}}}")
    if kind.get("system_prompt"):
        shown = str(kind["system_prompt"]).replace("{", "{{").replace("}", "}}")
        prompt = (kind.get("system_format") or "{system}").replace("{system}", shown) + prompt
    return {"wording": {"prompt": prompt, "completion": f"{{{answered}}}"}}


def _masks(given: Given, entries: list[dict[str, Any]]) -> Iterator[Item]:
    """Yield which tokens are trained."""
    if given.get("train_on_inputs"):
        yield RecipeLine(("data", "loss_on"), "all", ("train_on_inputs",))
    elif given.get("train_on_inputs") is False:
        yield Left("train_on_inputs", "false is the default: the answers are trained")
    for entry in entries:
        if entry.get("roles_to_train") not in (None, ["assistant"], ["gpt"]):
            yield Left(
                "roles_to_train",
                f"{format_value(entry['roles_to_train'])}: the assistant's turns are trained, or data.loss_on: all",
                aloud=True,
            )
        if entry.get("train_on_eos") not in (None, "turn"):
            yield Left("train_on_eos", f"{entry['train_on_eos']}: the end of every trained turn is trained", aloud=True)


def _template(given: Given, entries: list[dict[str, Any]]) -> Iterator[Item]:
    """Yield the chat template."""
    chats = [entry for entry in entries if entry.get("chat_template") or entry.get("chat_template_jinja")]
    holder = next(
        (
            e
            for e in (
                {"chat_template": given.get("chat_template"), "chat_template_jinja": given.get("chat_template_jinja")},
                *chats,
            )
            if any(e.values())
        ),
        {},
    )
    name, jinja = holder.get("chat_template"), holder.get("chat_template_jinja")
    used = (
        ("chat_template", "chat_template_jinja")
        if given.get("chat_template") or given.get("chat_template_jinja")
        else ("datasets",)
    )
    if isinstance(jinja, str) and "{" not in jinja:
        yield RecipeLine(("tokenizer", "chat_template"), jinja, used)
    elif jinja:
        yield Left(
            "chat_template_jinja", "write the template to a file: tokenizer.chat_template: FILE.jinja", aloud=True
        )
    elif name and name != "tokenizer_default":
        own = str(name).removeprefix("tokenizer_default_fallback_")
        ours = _TEMPLATES.get(own, own)
        if ours in paths.list_templates():
            falls = "axolotl takes it only where the tokenizer has none" if own != name else ""
            yield RecipeLine(("tokenizer", "chat_template"), ours, used, falls)
        else:
            yield Left(
                "chat_template", f"{name}: no template of that name here; the tokenizer's own is taken", aloud=True
            )
    elif name:
        yield Left("chat_template", "the tokenizer's own is the default")
