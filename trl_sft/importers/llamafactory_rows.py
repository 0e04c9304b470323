"""What LLaMA-Factory's data sets mean: dataset_info.json, masks, packing, its templates.

From llamafactory/data (parser.py, converter.py, processor/) in 0.9.5. In: the settings with dataset_info.json among
them. Out: lines of `data:`, and of `train:` and `tokenizer:` where they say how rows become tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trl_sft.errors import Fault, RecipeError
from trl_sft.importers.settings import Given, Item, Left, RecipeLine, refuse, several, source
from trl_sft.recipe import paths

_INFO = "dataset_info"  # its content, beside the settings
_FILE = "dataset_info.json"
NAMES = (
    *("dataset", "eval_dataset", "dataset_dir", "template", "train_on_prompt", "mask_history", "streaming"),
    *("mix_strategy", "interleave_probs", "max_samples", "val_size", "packing", "neat_packing", "enable_thinking"),
)
# the columns of a layout: what dataset_info.json calls them -> what they are called here
_ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
_CHAT = {"system": "system", "tools": "tools"}
_MEDIA = ("images", "videos", "audios")
_TEMPLATES = {"qwen": "chatml", "phi": "phi3", "deepseek3": "deepseekv3", "cohere": "cohere", "gemma": "gemma"}


def beside(given: Given, folder: Path) -> Path | None:
    """Return the dataset_info.json near the file of settings, where LLaMA-Factory's own place for it has none."""
    own = Path(str(given.get("dataset_dir", "data")))
    near = [path for path in (folder / own / _FILE, folder / _FILE) if path.is_file()]
    return near[0] if near and not (own / _FILE).is_file() and not isinstance(given.get("dataset_dir"), dict) else None


def with_datasets(given: Given, file: Path | None) -> Given:
    """Return the settings with what dataset_info.json says of their data sets. Raises RecipeError."""
    folder = given.get("dataset_dir", "data")
    if isinstance(folder, dict):
        info = folder
    elif file is None and str(folder) == "ONLINE":
        info = {name: {"hf_hub_url": name} for part in ("dataset", "eval_dataset") for name in _names(given, part)}
    else:
        path = file or Path(str(folder)) / _FILE
        try:
            info = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            found = f"{path}: {error.strerror if isinstance(error, OSError) else error}"
            raise RecipeError(
                Fault(given.where("dataset_dir"), found, f"--dataset-info FILE, the {_FILE} of LLaMA-Factory")
            ) from None
    return given._replace(values=given.values | {_INFO: info, "_folder": str(file.parent if file else folder)})


def lines(given: Given) -> Iterator[Item]:
    """Yield what became of the data sets. Raises RecipeError."""
    names = _names(given, "dataset")
    if not names:
        raise refuse(given, "dataset", "no rows are named", "dataset: NAME, as dataset_info.json has it")
    notes: list[str] = []
    train = [_source(given, "dataset", name, notes) for name in names]
    most = given.get("max_samples")
    if most:
        notes.append(f"LLaMA-Factory takes the first {most:,} rows of each, max_rows draws as many")
    shares = given.get("interleave_probs")
    if given.get("mix_strategy", "concat") != "concat":
        notes.append(
            "LLaMA-Factory draws until a data set, or each, was used up; here an epoch has as many rows as all have"
        )
        parts = [float(part) for part in str(shares).split(",")] if shares else [1.0] * len(train)
        train = [_more(entry, weight=weight) for entry, weight in zip(train, parts, strict=False)]
    if given.get("streaming"):
        train = [_more(entry, streaming=True) for entry in train]
    train = [_more(entry, max_rows=most) for entry in train] if most else train
    used = ("dataset", "dataset_dir", _INFO, "_folder", "max_samples", "mix_strategy", "interleave_probs", "streaming")
    yield RecipeLine(("data", "train"), several(train), used, "; ".join(dict.fromkeys(notes)))
    if held := _names(given, "eval_dataset"):
        yield RecipeLine(
            ("data", "eval"), several([_source(given, "eval_dataset", name, []) for name in held]), ("eval_dataset",)
        )
    size = given.get("val_size", 0)
    if size >= 1:
        yield Left("val_size", "a number of rows; data.eval_fraction takes their share", aloud=True)
    elif size:
        yield RecipeLine(("data", "eval_fraction"), size, ("val_size",), "other rows than there, by train.seed")
    yield from _masks(given)
    yield from _packing(given)
    yield from _template(given)


def _names(given: Given, part: str) -> list[str]:
    value = given.get(part, [])
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else list(value)


def _more(entry: Any, **keys: Any) -> dict[str, Any]:
    return (entry if isinstance(entry, dict) else {"path": entry}) | keys


def _source(given: Given, part: str, name: str, notes: list[str]) -> Any:
    """Return one data set of dataset_info.json as a source. Raises RecipeError."""
    entry = given.get(_INFO, {}).get(name)
    if not isinstance(entry, dict):
        known = ", ".join(sorted(given.get(_INFO, {}))[:8]) or "none"
        raise refuse(given, part, f"{name}: not in {_FILE}", f"one that is there ({known}), or --dataset-info FILE")
    path = next((entry[key] for key in ("hf_hub_url", "ms_hub_url", "script_url") if key in entry), None)
    if path is None and "file_name" in entry:
        path = str(Path(given.get("_folder", "."), entry["file_name"]))
    if path is None or entry.get("ranking"):
        found = f"{name}: {'pairs to rank' if entry.get('ranking') else 'no file_name and no hf_hub_url'}"
        raise refuse(given, part, found, "a data set for supervised fine-tuning, in a file or on the hub")
    if set(_MEDIA) & set(entry.get("columns", {})):
        notes.append(f"{name} has images or sound: this version trains on text alone")
    split = entry.get("split", "train")
    keys = {"name": entry.get("subset"), "split": split if split != "train" else None, "data_dir": entry.get("folder")}
    layout = _layout(entry, notes, given.get("stage") == "pt")
    return source(path, max_rows=entry.get("num_samples"), **keys, **layout)


def _layout(entry: dict[str, Any], notes: list[str], texts: bool) -> dict[str, Any]:
    """Return the keys that say how the rows of a data set become text."""
    columns, tags = entry.get("columns", {}), entry.get("tags", {})
    if texts:
        column = columns.get("prompt", "instruction" if not columns else "text")
        return {"format": "text", "rename": {column: "text"} if column != "text" else {}}
    if entry.get("formatting", "alpaca") == "alpaca":
        rename = {columns[name]: ours for name, ours in _ALPACA.items() if columns.get(name, ours) != ours}
        notes.append("LLaMA-Factory joins question and input by one line break, here there are two")
        return {"format": "alpaca", "wording": "chat", "rename": rename}
    openai = tags.get("role_tag", "from") == "role" or entry.get("formatting") == "openai"
    ours = "messages" if openai else "conversations"
    column = columns.get("messages", "conversations")
    rename = {column: ours} if column != ours else {}
    rename |= {columns[name]: ours for name, ours in _CHAT.items() if columns.get(name, ours) != ours}
    standard = {
        "from",
        "value",
        "role",
        "content",
        "human",
        "gpt",
        "user",
        "assistant",
        "observation",
        "function_call",
        "system",
    }
    if odd := sorted(set(tags.values()) - standard):
        notes.append(f"tags {', '.join(odd)} are not known here: format: rows.py:FUNCTION")
    return {"format": "messages" if openai else "sharegpt", "wording": "chat", "rename": rename}


def _masks(given: Given) -> Iterator[Item]:
    """Yield which tokens are trained."""
    if given.get("train_on_prompt"):
        yield RecipeLine(("data", "loss_on"), "all", ("train_on_prompt",))
    elif given.get("mask_history"):
        yield RecipeLine(("data", "loss_on"), "last_turn", ("mask_history",))
    elif given.get("stage") != "pt":
        yield RecipeLine(("data", "loss_on"), "assistant", (), "LLaMA-Factory's default")


def _packing(given: Given) -> Iterator[Item]:
    """Yield how rows share a sequence."""
    packs = given.get("packing", given.get("stage") == "pt")
    neat = given.get("neat_packing")
    if neat or packs:
        note = "" if neat else "without neat_packing documents see each other there; here they do not"
        yield RecipeLine(("train", "packing"), True, ("packing", "neat_packing"), note)
    elif "packing" in given.values:
        yield RecipeLine(("train", "packing"), False, ("packing", "neat_packing"))


def _template(given: Given) -> Iterator[Item]:
    """Yield the chat template; LLaMA-Factory brings its own for each family, here the tokenizer's is the default."""
    name = given.get("template")
    if given.get("enable_thinking") is False:
        yield RecipeLine(("tokenizer", "chat_template_kwargs"), {"enable_thinking": False}, ("enable_thinking",))
    elif "enable_thinking" in given.values:
        yield Left("enable_thinking", "a template's own default")
    if name is None:
        return
    ours = _TEMPLATES.get(name, name)
    if ours in paths.list_templates():
        note = "without it the tokenizer's own is taken; the words of the two may differ"
        yield RecipeLine(("tokenizer", "chat_template"), ours, ("template",), note)
    else:
        yield Left(
            "template", "no template of that name here: the tokenizer's own is taken; compare by `preview`", aloud=True
        )
