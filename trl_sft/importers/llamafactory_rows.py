"""What a data set of LLaMA-Factory's dataset_info.json becomes: a source, or a function that makes its rows.

Input: an entry of dataset_info.json. Output: the source, with what LLaMA-Factory's rows have and the source lacks.
Follows `data/parser.py` and `data/converter.py`. Deliberately not here: settings of the file that names the data set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl_sft.importers import recipe_parts
from trl_sft.importers.row_functions import RowFunction, add_function
from trl_sft.importers.settings import OmittedSetting, Outcome, Settings
from trl_sft.importers.tables import Table
from trl_sft.recipe.yaml_reader import format_value

INFO, FOLDER = "dataset_info", "_folder"  # content and folder of dataset_info.json, beside the settings
FILE = "dataset_info.json"
# a tag of dataset_info.json -> its default, and the role of such a turn here
_TAGS = {
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "observation"),
    "function_tag": ("function_call", "function_call"),
    "system_tag": ("system", "system"),
}
# The names of turns that the format `messages` reads as the same roles. Of a file with other names, those of its tags
# that LLaMA-Factory does not set by itself are none of its roles.
_KNOWN_ROLES = {
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt"),
    "observation": ("observation", "tool", "function"),
    "function_call": ("function_call",),
    "system": ("system",),
}


def make_source(
    settings: Settings,
    table: Table,
    name: str,
    *,
    setting: str,
    functions: list[RowFunction],
    outcomes: list[Outcome],
) -> Any:
    """Return the source for one data set of dataset_info.json.

    Args:
        settings: The user's settings.
        table: The table of LLaMA-Factory.
        name: The data set.
        setting: `dataset` or `eval_dataset`.
        functions: Takes a function that makes the rows, where no format does.
        outcomes: Takes what the source lacks.

    Raises:
        RecipeError: The data set cannot be read, or is for another objective.
    """
    info = settings.get(INFO, {})
    entry = info.get(name)
    if not isinstance(entry, dict):
        names = ", ".join(sorted(info)[:8]) or "none"
        fix = f"Write a name that it has ({names}), or add `--dataset-info FILE`."
        raise settings.make_error(setting, f"{FILE} has no data set {name}", fix, code="import.unknown_dataset")
    outcomes += table.audit("dataset", settings, INFO, path=(name,))
    for part in ("columns", "tags"):
        if isinstance(entry.get(part), dict):
            outcomes += table.audit(part, settings, INFO, path=(name, part))
    path = _find_path(settings, name, outcomes)
    split = entry.get("split") or "train"
    if setting == "dataset" or recipe_parts.is_local(path):
        split = recipe_parts.omit_train_split(split)
    keys = {"name": entry.get("subset"), "split": split, "data_dir": entry.get("folder")}
    if settings.get("stage") == "pt":
        keys |= _make_text_format(name, entry, outcomes)
    else:
        keys |= _make_row_format(name, entry, path=path, functions=functions, outcomes=outcomes)
    max_rows, max_samples = entry.get("num_samples"), settings.get("max_samples")
    if max_rows is not None:
        max_rows = _limit_rows(settings, name, path=path, outcomes=outcomes)
    first_rows = recipe_parts.take_first_rows(split, max_samples)
    if max_rows is None and first_rows:
        keys["split"] = first_rows
    elif max_samples:
        max_rows = min(value for value in (max_rows, max_samples) if value is not None)
    return recipe_parts.make_source(path, max_rows=max_rows, **keys)


def _limit_rows(settings: Settings, name: str, *, path: str, outcomes: list[Outcome]) -> int | None:
    """Return `max_rows` for `num_samples`: LLaMA-Factory trains exactly so many, and repeats rows of a smaller set."""
    number = settings.get(INFO)[name]["num_samples"]
    place = (name, "num_samples")
    if settings.get("streaming"):
        outcomes.append(OmittedSetting(INFO, "LLaMA-Factory does not read it with `streaming`.", "", place))
        return None
    count = sum(1 for _ in recipe_parts.read_rows(path))
    if count < number:
        rows = f"The data set has {count:,} rows. " if count else ""
        reason = (
            f"{rows}LLaMA-Factory repeats rows of a smaller data set until there are {number:,}. The recipe trains "
            "each row once in an epoch. Give the source a `weight` to train its rows more often."
        )
        outcomes.append(OmittedSetting(INFO, reason, "rows", place))
    return int(number)


def _find_path(settings: Settings, name: str, outcomes: list[Outcome]) -> str:
    """Return the path of a data set: a hub id, or a file in the folder of dataset_info.json."""
    entry = settings.get(INFO)[name]
    places = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "file_name")
    present = [place for place in places if entry.get(place)]
    if not present:
        fix = f"Add one of the two to {FILE}."
        problem = f"{name} has neither file_name nor hf_hub_url"
        raise settings.make_error(INFO, problem, fix, code="import.no_rows", path=(name,))
    reason = f"`{present[0]}` names the rows."
    outcomes += [OmittedSetting(INFO, reason, "", (name, other)) for other in present[1:]]
    if present[0] not in ("hf_hub_url", "file_name"):
        reason = (
            "trl_sft reads files, folders and data sets of the Hugging Face hub, and loads this path as one of them. "
            "Set `path` to the rows."
        )
        outcomes.append(OmittedSetting(INFO, reason, "rows", (name, present[0])))
    path = str(entry[present[0]])
    return path if present[0] != "file_name" else str(Path(settings.get(FOLDER, "."), path))


def _make_text_format(name: str, entry: dict[str, Any], outcomes: list[Outcome]) -> dict[str, Any]:
    """Return the keys of a source for the stage `pt`, whose rows are texts."""
    columns = entry.get("columns") or {}
    column = columns.get("prompt", "text" if columns else "instruction")
    others = [("columns", key) for key in columns if key != "prompt"]
    outcomes += [OmittedSetting(INFO, "A text has one column.", "", (name, *other)) for other in others]
    keys = [key for key in ("formatting", "tags") if entry.get(key)]
    outcomes += [OmittedSetting(INFO, "The stage pt reads texts.", "", (name, key)) for key in keys]
    return {"format": "text", "rename": recipe_parts.make_rename({column: "text"})}


def _make_row_format(
    name: str, entry: dict[str, Any], *, path: str, functions: list[RowFunction], outcomes: list[Outcome]
) -> dict[str, Any]:
    """Return the keys of a source that say how its rows become text."""
    if entry.get("formatting", "alpaca") == "alpaca":
        if entry.get("tags"):
            outcomes.append(OmittedSetting(INFO, "Only rows with messages have tags.", "", (name, "tags")))
        return {"format": _add_question(name, entry, functions=functions, outcomes=outcomes), "wording": "chat"}
    if entry["formatting"] not in ("sharegpt", "openai"):
        reason = f"trl_sft does not know the formatting {format_value(entry['formatting'])} and reads it as sharegpt."
        outcomes.append(OmittedSetting(INFO, reason, "wording", (name, "formatting")))
    return _make_chat_format(name, entry, path=path, functions=functions, outcomes=outcomes)


def _add_question(name: str, entry: dict[str, Any], *, functions: list[RowFunction], outcomes: list[Outcome]) -> str:
    """Return `format:` for rows of Alpaca: LLaMA-Factory joins question and input by one line break."""
    columns = entry.get("columns")
    if columns is None:
        columns = {"prompt": "instruction", "query": "input", "response": "output"}
    for key in ("messages", "tools"):
        if columns.get(key):
            reason = "Rows of Alpaca have no messages." if key == "messages" else "trl_sft reads tools beside messages."
            outcomes.append(
                OmittedSetting(INFO, reason, "" if key == "messages" else "wording", (name, "columns", key))
            )
    arguments = {key: columns.get(key) or "" for key in ("prompt", "query", "response", "system", "history")}
    return add_function(functions, "read_question", **arguments)


def _make_chat_format(
    name: str, entry: dict[str, Any], *, path: str, functions: list[RowFunction], outcomes: list[Outcome]
) -> dict[str, Any]:
    """Return the keys of a source of chats, or of a function where turns, keys or roles have other names."""
    columns, tags = entry.get("columns"), entry.get("tags")
    column = (columns or {}).get("messages") or "conversations"
    for key in ("prompt", "query", "response", "history"):
        if (columns or {}).get(key):
            reason = "Rows with messages have no such column."
            outcomes.append(OmittedSetting(INFO, reason, "", (name, "columns", key)))
    system, tools = (columns or {}).get("system") or "", (columns or {}).get("tools") or ""
    is_openai = entry.get("formatting") == "openai"
    role_key = (tags or {}).get("role_tag") or ("role" if is_openai else "from")
    content_key = (tags or {}).get("content_tag") or ("content" if is_openai else "value")
    roles = {}
    for tag, (default, role) in _TAGS.items():
        # a mapping of tags takes the place of all defaults
        word = (tags or {}).get(tag, None if tags else default)
        if word:
            roles[word] = role
    skip = _find_skipped_roles(name, tags or {}, path=path, column=column, role_key=role_key, outcomes=outcomes)
    is_plain = (role_key, content_key) in (("role", "content"), ("from", "value"))
    if is_plain and not skip and all(word in _KNOWN_ROLES[role] for word, role in roles.items()):
        row_format, target = ("sharegpt", "conversations") if role_key == "from" else ("messages", "messages")
        rename = recipe_parts.make_rename(
            {column: target} | ({system: "system"} if system else {}) | ({tools: "tools"} if tools else {})
        )
        return {"format": row_format, "wording": "chat", "rename": rename}
    function = add_function(
        functions,
        "read_chat",
        turns=column,
        keys={"role": role_key, "content": content_key},
        roles=roles,
        system=system,
        tools=tools,
        **({"skip": skip} if skip else {}),
    )
    return {"format": function, "wording": "chat"}


def _find_skipped_roles(
    name: str, tags: dict[str, Any], *, path: str, column: str, role_key: str, outcomes: list[Outcome]
) -> tuple[str, ...]:
    """Return the roles with which LLaMA-Factory skips a row, because `tags` gives them no name.

    A file on this machine is looked at: where no turn has such a role, nothing is skipped.
    """
    missing = [tag for tag in ("role_tag", "content_tag", *_TAGS) if tags and tag not in tags]
    needed = [tag for tag in missing if tag in ("role_tag", "content_tag", "user_tag", "assistant_tag")]
    if needed:
        shown = ", ".join(f"`{tag}`" for tag in needed)
        reason = f"{FILE} has `tags` without {shown}, so LLaMA-Factory has none and skips rows with such turns."
        outcomes.append(OmittedSetting(INFO, reason, "rows", (name, "tags")))
    others = [tag for tag in missing if tag not in needed]
    names = {word for tag in others for word in _KNOWN_ROLES[_TAGS[tag][1]]} - set(map(str, tags.values()))
    known = {str(turn.get(role_key)) for turn in recipe_parts.read_turns(path, column)}
    skip = tuple(sorted(names & known if known else names))
    if others:
        shown = ", ".join(f"`{tag}`" for tag in others)
        reason = f"{FILE} has `tags` without {shown}, so LLaMA-Factory skips rows with such turns. "
        reason += "The function that makes the rows skips them too." if skip else "The data set has no such turn."
        outcomes.append(OmittedSetting(INFO, reason, "", (name, "tags")))
    return skip
