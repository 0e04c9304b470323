"""What a data set of an axolotl file becomes: a source of a recipe, or a function that makes its rows.

Input: an entry of `datasets`, `test_datasets` or `pretraining_dataset`. Output: the source, with what axolotl's rows
have and the source lacks. The texts of prompts are those of axolotl's `prompters.py` and `prompt_strategies`
(Apache-2.0), as they are. Deliberately not here: settings outside of a data set.
"""

from __future__ import annotations

from typing import Any

from trl_sft.importers import recipe_parts
from trl_sft.importers.row_functions import RowFunction, add_function
from trl_sft.importers.settings import OmittedSetting, Outcome, Settings
from trl_sft.importers.tables import Table
from trl_sft.recipe.yaml_reader import format_value

_LOSS_KEYS = {  # keys of a turn that trl_sft reads as a mark of its loss
    *("weight", "loss", "train", "trainable", "training", "trained", "learn", "learnable", "masked", "loss_mask"),
    *("train_on_turn", "train_turn", "compute_loss", "has_loss", "loss_weight", "with_loss"),
}
TEXT_TYPES = ("completion", "pretrain")  # rows that are texts, which axolotl splits
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_NATIVE_ROLES = {**_ROLES, "system": "system", "tool": "tool"}
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_CHAT_WITH_INPUT = (
    "Below is an instruction from a USER that describes a task, paired with an input that provides further context. "
    "The ASSISTANT writes a response that concisely and appropriately completes the request.\n\n"
)
_CHAT_WITHOUT_INPUT = (
    "Below is an instruction from a USER that describes a task. The ASSISTANT writes a response that appropriately and "
    "concisely completes the request.\n\n"
)
# style of an Alpaca prompt -> with an input, without one, around the system prompt
_STYLES = {
    "instruct": (
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        "### Instruction:\n{instruction}\n\n### Response:\n",
        "{system}\n\n",
    ),
    "chat": ("USER: {instruction}\n{input}\nASSISTANT:", "USER: {instruction}\nASSISTANT:", "SYSTEM: {system}\n"),
    "chatml": (
        "<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\n{system}<|im_end|>\n",
    ),
    "phi": (
        "<|user|>\n{instruction}<|end|>{input}<|assistant|>",
        "<|user|>\n{instruction}<|end|>\n<|assistant|>\n",
        "<|system|>\n{system}<|end|>\n",
    ),
}
_COLUMNS = {"instruction": "instruction", "input": "input", "output": "output", "system": ""}
_NO_INPUT = {"input": "", "system": ""}
# type -> style, system prompt with an input, without one, and the columns
_ALPACA_TYPES: dict[str, tuple[str, str, str, dict[str, str]]] = {
    **{
        name: (style, _WITH_INPUT, _WITHOUT_INPUT, _COLUMNS)
        for name, style in {
            "alpaca": "instruct",
            "alpaca:instruct": "instruct",
            "alpaca:chat": "chat",
            "alpaca:chatml": "chatml",
            "alpaca:phi": "phi",
            "alpaca_instruct": "instruct",
            "alpaca_instruct.load": "instruct",
            "alpaca_chat": "chat",
            "alpaca_chat.load": "chat",
        }.items()
    },
    "alpaca_instruct.load_no_prompt": ("instruct", "", "", _COLUMNS),
    "alpaca_chat.load_no_prompt": ("chat", "", "", _COLUMNS),
    "alpaca_chat.load_concise": ("chat", _CHAT_WITH_INPUT, _CHAT_WITHOUT_INPUT, _COLUMNS),
    "alpaca_chat.load_qa": (
        "chat",
        _CHAT_WITH_INPUT,
        _CHAT_WITHOUT_INPUT,
        {"instruction": "question", "output": "answer", **_NO_INPUT},
    ),
    "alpaca_chat.load_camel_ai": (
        "chat",
        _CHAT_WITH_INPUT,
        _CHAT_WITHOUT_INPUT,
        {"instruction": "message_1", "output": "message_2", **_NO_INPUT},
    ),
    "gpteacher": ("instruct", _WITH_INPUT, _WITHOUT_INPUT, {**_COLUMNS, "output": "response"}),
}
_REFUSED_TYPES = ("bradley_terry", "stepwise_supervised", "dpo", "orpo", "kto", "ipo", "simpo", "ebft")


def make_sources(
    settings: Settings,
    table: Table,
    place: tuple[str, int],
    *,
    entry: dict[str, Any],
    functions: list[RowFunction],
    outcomes: list[Outcome],
) -> list[Any]:
    """Return the sources of `data.train` or `data.eval` for one data set: one for each of its configurations.

    Args:
        settings: The user's settings.
        table: The table of axolotl.
        place: The setting, and the number of the entry in it.
        entry: The data set.
        functions: Takes a function that makes the rows, where no format does.
        outcomes: Takes what the source lacks.

    Raises:
        RecipeError: The data set cannot be read, or is for another objective.
    """
    name, number = place
    path = entry.get("path")
    if not isinstance(path, str):
        fix = "Set its `path` to a file, a folder or a hub id."
        raise settings.make_error(name, "a data set has no path", fix, code="import.no_rows", path=(number,))
    is_mapping = isinstance(settings.get_inner(name, (number,)), dict)
    if is_mapping:
        part = "pretraining_dataset" if name == "pretraining_dataset" else "dataset"
        outcomes += table.audit(part, settings, name, path=(number,))
    resolved = recipe_parts.resolve_data_files(path, entry.get("data_files"))
    if not resolved:
        outcomes.append(OmittedSetting(name, recipe_parts.explain_data_files(path), "rows", (number, "data_files")))
    split = entry.get("split")
    if name != "test_datasets" or recipe_parts.is_local(resolved or path):
        split = recipe_parts.omit_train_split(split)
    keys = {"split": split, "revision": entry.get("revision")}
    row_format = _make_row_format(settings, table, place, entry=entry, functions=functions, outcomes=outcomes)
    configurations = _as_list(entry.get("name") or None)
    return [
        recipe_parts.make_source(resolved or path, name=configuration, **keys, **row_format)
        for configuration in configurations
    ]


def is_text(entry: dict[str, Any]) -> bool:
    """Return whether the rows of a data set are texts, which axolotl splits where they are long."""
    return str(entry.get("type") or "").partition(":")[0] in TEXT_TYPES


def _make_row_format(
    settings: Settings,
    table: Table,
    place: tuple[str, int],
    *,
    entry: dict[str, Any],
    functions: list[RowFunction],
    outcomes: list[Outcome],
) -> dict[str, Any]:
    """Return the keys of a source that say how its rows become text."""
    name, number = place
    kind = entry.get("type")
    if isinstance(kind, dict):
        outcomes += table.audit("type", settings, name, path=(number, "type"))
        return _make_wording(kind, functions)
    kind = str(kind or "")
    if kind.split(".")[0].split(":")[0] in _REFUSED_TYPES:
        problem = f"the value is {format_value(kind)}; trl_sft does supervised fine-tuning only"
        fix = "Import a file for supervised fine-tuning on text."
        raise settings.make_error(name, problem, fix, code="import.other_objective", path=(number, "type"))
    word = kind.partition(":")[0]
    if not word:
        reason = "The data set has no `type`. The recipe recognises the format by the columns."
        if entry.get("field_messages"):
            reason = "The data set has no `type`. The recipe reads it as chats."
        outcomes.append(OmittedSetting(name, reason, "wording", (number,)))
    default_system = ""
    if word == "sharegpt" and _get_sharegpt_template(settings, entry) == "chatml":
        default_system = str(settings.get("default_system_message", "You are a helpful assistant."))
    elif word == "sharegpt":
        outcomes.append(OmittedSetting(name, _explain_sharegpt(settings, entry), "wording", (number, "type")))
    if word in ("chat_template", "sharegpt") or (not word and entry.get("field_messages")):
        return _make_chat_format(
            place, entry, word, default_system=default_system, functions=functions, outcomes=outcomes
        )
    outcomes += _list_chat_keys(place, entry, kind)
    if not word:
        return {}
    if word in TEXT_TYPES:
        column = entry.get("field") or entry.get("text_column") or "text"
        return {"format": "text", "rename": recipe_parts.make_rename({column: "text"})}
    style = f"alpaca:{entry['conversation']}" if word == "alpaca_chat.load" and entry.get("conversation") else kind
    if style in _ALPACA_TYPES:
        return {"format": _add_alpaca(style, functions), "wording": "plain"}
    reason = (
        f"axolotl has its own text for rows of type {format_value(kind)}, and trl_sft does not have it. Set `format` "
        "and `wording` of the source, and compare the rows with `preview`."
    )
    outcomes.append(OmittedSetting(name, reason, "wording", (number, "type")))
    return {}


def _get_sharegpt_template(settings: Settings, entry: dict[str, Any]) -> Any:
    """Return the template of a data set of the type `sharegpt`; None = the settings name none."""
    return entry.get("conversation") or entry.get("chat_template") or settings.get("chat_template")


def _explain_sharegpt(settings: Settings, entry: dict[str, Any]) -> str:
    """Return what the releases of axolotl that read the type `sharegpt` write, and the recipe does not.

    Follows their `prompt_strategies/sharegpt.py`, and the conversations of fastchat that it uses.
    """
    if not _get_sharegpt_template(settings, entry):
        return (
            "Releases of axolotl that read this type write a chat as vicuna_v1.1 does where no template is named. The "
            "recipe uses the template of the tokenizer. Set `tokenizer.chat_template: vicuna` for the former."
        )
    return (
        "Releases of axolotl that read this type begin a chat without a system prompt with that of the conversation, "
        "and later ones refuse it. The recipe adds none. Add the system prompt to the rows if they need it."
    )


def _list_chat_keys(place: tuple[str, int], entry: dict[str, Any], kind: str) -> list[Outcome]:
    """Return the keys of a data set that axolotl reads only for chats."""
    name, number = place
    if not isinstance(entry, dict):
        return []
    keys = (
        *("field_messages", "message_property_mappings", "message_field_role", "message_field_content", "roles"),
        *("message_field_training", "drop_system_message", "field_tools", "roles_to_train", "train_on_eos"),
        *("train_on_eot", "chat_template", "chat_template_jinja"),
    )
    reason = f"axolotl does not read it for rows of type {format_value(kind)}."
    omitted: list[Outcome] = [OmittedSetting(name, reason, "", (number, key)) for key in keys if key in entry]
    if kind.partition(":")[0] not in TEXT_TYPES:
        omitted += [OmittedSetting(name, reason, "", (number, key)) for key in ("field", "text_column") if key in entry]
    if "conversation" in entry and not kind.startswith("alpaca_chat"):
        omitted.append(OmittedSetting(name, reason, "", (number, "conversation")))
    return omitted


def _make_chat_format(
    place: tuple[str, int],
    entry: dict[str, Any],
    word: str,
    *,
    default_system: str,
    functions: list[RowFunction],
    outcomes: list[Outcome],
) -> dict[str, Any]:
    """Return the keys of a source of chats, or of a function where turns, keys or roles have other names."""
    name, number = place
    for key in ("field", "text_column"):
        if key in entry:
            reason = "axolotl does not read it for chats."
            outcomes.append(OmittedSetting(name, reason, "", (number, key)))
    old = word == "sharegpt"
    mapping = dict(entry.get("message_property_mappings") or {})
    mapping.setdefault("role", entry.get("message_field_role") or ("from" if old else "role"))
    mapping.setdefault("content", entry.get("message_field_content") or ("value" if old else "content"))
    if entry.get("field_thinking"):
        mapping["reasoning_content"] = entry["field_thinking"]
    column = entry.get("field_messages") or ("conversations" if old else "messages")
    tools = entry.get("field_tools") or "tools"
    roles = _invert_roles(entry.get("roles"))
    training, drop_system = entry.get("message_field_training") or "", bool(entry.get("drop_system_message"))
    layout = (mapping["role"], mapping["content"])
    is_plain = layout in (("role", "content"), ("from", "value")) and len(mapping) == 2
    ignored = _list_ignored_keys(entry, column)
    if ignored:
        reason = (
            f"The turns have {' and '.join(f'`{key}`' for key in ignored)}, which axolotl reads only with "
            "`message_field_training`. The function that makes the rows leaves it out, so that every answer is trained."
        )
        outcomes.append(OmittedSetting(name, reason, "", (number, "path")))
    if (
        is_plain
        and not ignored
        and roles == _NATIVE_ROLES
        and training in ("", "train")
        and not (drop_system or default_system)
    ):
        row_format, target = ("sharegpt", "conversations") if layout[0] == "from" else ("messages", "messages")
        rename = recipe_parts.make_rename({column: target, tools: "tools"})
        return {"format": row_format, "wording": "chat", "rename": rename}
    function = add_function(
        functions,
        "read_chat",
        turns=column,
        keys=mapping,
        roles=roles,
        system="system",
        tools=tools,
        training=training,
        drop_system=drop_system,
        **({"default_system": default_system} if default_system else {}),
    )
    return {"format": function, "wording": "chat"}


def _list_ignored_keys(entry: dict[str, Any], column: str) -> list[str]:
    """Return the keys of turns that say to trl_sft, and not to axolotl, whether a turn carries loss.

    Known is only a file on this machine; of another one no key is known.
    """
    path = recipe_parts.resolve_data_files(str(entry.get("path")), entry.get("data_files"))
    training = entry.get("message_field_training")
    return [key for key in recipe_parts.list_turn_keys(path, column) if key in _LOSS_KEYS and key != training]


def _invert_roles(roles: Any) -> dict[str, str]:
    """Return the role of a message for each role of a turn; axolotl names them the other way round."""
    if not roles:
        return _NATIVE_ROLES
    return {str(source): target for target, sources in roles.items() for source in _as_list(sources)}


def _as_list(value: Any) -> list[Any]:
    """Return a value as a list: a list as it is."""
    return value if isinstance(value, list) else [value]


def _add_alpaca(kind: str, functions: list[RowFunction]) -> str:
    """Return `format:` for one of axolotl's Alpaca types."""
    style, system, system_without_input, columns = _ALPACA_TYPES[kind]
    form, form_without_input, system_form = _STYLES[style]
    return add_function(
        functions,
        "read_instruction",
        columns=columns,
        system=system,
        system_without_input=system_without_input,
        system_form=system_form,
        form=form,
        form_without_input=form_without_input,
    )


def _make_wording(kind: dict[str, Any], functions: list[RowFunction]) -> dict[str, Any]:
    """Return the wording of a type that the file itself defines, or a function where it depends on the row."""
    names = ("instruction", "input", "output", "system")
    columns = {name: str(kind.get(f"field_{name}") or name) for name in names}
    form = str(kind.get("format") or "{instruction} {input} ")
    # axolotl has the default `{instruction} ` here, and rows without an input get it
    form_without_input = str(kind.get("no_input_format") or "{instruction} ")
    system = str(kind.get("system_prompt") or "")
    is_plain = "{input}" not in form and form_without_input == form and not system
    if is_plain and not kind.get("field_system") and all(part.isidentifier() for part in columns.values()):
        return {
            "wording": {
                "prompt": form.replace("{instruction}", f"{{{columns['instruction']}}}"),
                "completion": f"{{{columns['output']}}}",
            }
        }
    function = add_function(
        functions,
        "read_instruction",
        columns=columns,
        system=system,
        system_without_input=system,
        system_form=str(kind.get("system_format") or "{system}"),
        form=form,
        form_without_input=form_without_input,
    )
    return {"format": function, "wording": "plain"}
