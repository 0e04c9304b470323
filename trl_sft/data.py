"""Loads the sources of a run, formats their rows, splits with the run's seed.

In: a `Run` and what its tokenizer renders. Out: `Rows`, datasets in one of TRL's forms. Every fault
names file and row. Deliberately absent: tokens; TRL prepares them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, Features, Json, List, Value, concatenate_datasets

from trl_sft import formatting, sources, textfiles, turns, wordings
from trl_sft.errors import DataError, Fault, RecipeError, first_line
from trl_sft.formatting import Target
from trl_sft.paths import Code
from trl_sft.recipe import Recipe
from trl_sft.run import Run, Source

_AS_IT_IS = "as it is"
_CHAT, _TEXT, _PAIRS = "a chat", "plain text", "prompts with completions"
# Reformatting code that changed must not meet rows formatted by the old one in datasets' cache.
_CODE = [hashlib.sha256(Path(str(m.__file__)).read_bytes()).hexdigest() for m in (formatting, turns, wordings)]
# A struct of Arrow has the keys of all rows, null where one lacks it, and a template would print them: a chat
# is stored as JSON. `_kept` says what a row's template does not render, so that it is said once.
_CHAT_FEATURES = {
    "prompt": List(Json()),
    "completion": List(Json()),
    "tools": Value("string"),
    "_as_text": Value("string"),
}


class Rows(NamedTuple):
    """The rows of a run in one of TRL's forms."""

    train: Dataset
    eval: Dataset | None
    loss: dict[str, bool]  # keywords of trl.SFTConfig that put the loss where the run wants it
    loss_on: str  # as `data.loss_on` says it
    said: tuple[str, ...] = ()  # a line a source: rows, layout, wording


class Part(NamedTuple):
    """One source, formatted."""

    name: str
    layout: str
    rows: Dataset


def load(run: Run, target: Target) -> Rows:
    """Load, format and split the rows of a run. Raises DataError, RecipeError."""
    said: list[str] = []
    parts: dict[str, list[Part]] = {"train": [], "eval": []}
    for part, source in ((part, source) for part, those in run.sources.items() for source in those):
        try:
            parts[part].append(_formatted(run.recipe, source, part, target._replace(task=source.task), said))
        except UnicodeDecodeError as error:  # datasets' JSON builder lets such bytes through
            bad = [fault for file in source.place.files for fault in textfiles.faults(file)]
            fault = Fault(source.name, f"not UTF-8: {first_line(error)}", "the file saved as UTF-8, or `encoding:`")
            raise DataError(bad or fault) from None
    _one_form(run, parts["train"] + parts["eval"])
    train = concatenate_datasets([part.rows for part in parts["train"]])
    held = concatenate_datasets([part.rows for part in parts["eval"]]) if parts["eval"] else None
    if fraction := run.data.get("eval_fraction"):
        if round(len(train) * fraction) in (0, len(train)):
            found = f"{fraction} of {len(train)} rows leaves one side empty"
            where = run.recipe.where(("data", "eval_fraction"))
            raise RecipeError(Fault(where, found, "a fraction that gives both rows"))
        split = train.train_test_split(round(len(train) * fraction), seed=run.train.get("seed", 42))
        train, held = split["train"], split["test"]
        said.append(f"{len(held):,} of them held out (eval_fraction {fraction}), {len(train):,} left to train")
    givens = {part.layout == "prompt_completion" for part in parts["train"]}
    given = givens.pop() if len(givens) == 1 else None
    train, held = _for_template(run, train), held and _for_template(run, held)
    return _with_loss(run, train, held, given)._replace(said=tuple(said))


def look(recipe: Recipe, source: Source) -> tuple[str, list[str], int]:
    """Return layout, columns and number of rows of one source, unformatted. Raises DataError."""
    rows = sources.load(recipe, source, "train")
    return sources.recognised(recipe, source, rows.column_names), rows.column_names, len(rows)


def _formatted(recipe: Recipe, source: Source, part: str, target: Target, said: list[str]) -> Part:
    """Return one source's rows as prompt and completion, or as text."""
    rows = sources.load(recipe, source, part)
    name = source.name
    if len(rows) == 0:
        raise DataError(Fault(recipe.where(source.key), f"{name} has no rows", "a source with rows"))
    first = dict(rows[0])
    if source.code:
        first = _called(recipe, source, first)
        layout = sources.recognised(recipe, source, list(first), f"what {source.format} returned for row 1")
    else:
        own = isinstance(source.wording, dict)
        layout = source.format or ("" if own else sources.recognised(recipe, source, rows.column_names))
    used = sources.used_columns(recipe, source, rows, layout)
    wording = _wording(recipe, source, layout, target, first)
    told = _told(layout, wording, bool(target.renders), rows, used)
    label = f"; task {source.task}" if source.task else ""
    said.append(f"{name}: {len(rows):,} rows to {part}; {source.format + ' -> ' if source.code else ''}{told}{label}")
    keywords = {"layout": layout, "wording": wording, "name": name, "target": target, "code": source.code}
    version = [*_CODE, hashlib.sha256(source.code.file.read_bytes()).hexdigest() if source.code else ""]
    forms = rows.map(
        _convert,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=Features(_CHAT_FEATURES) if wording == "chat" else None,
        fn_kwargs=keywords | {"version": version},
        desc=f"Formatting {name}",
    )
    as_text = sorted({what for words in forms.unique("_as_text") for what in words.split(", ") if what})
    if as_text:
        shown = "the chat template does not render" if wording == "chat" else f"wording {wording} has no place for"
        said.append(f"{name}: {shown} {' and '.join(as_text)}: kept as text")
    return Part(name, layout, forms.remove_columns("_as_text"))


def _called(recipe: Recipe, source: Source, row: dict[str, Any]) -> dict[str, Any]:
    """Return what the user's function makes of the first row, as columns. Raises RecipeError, DataError."""
    assert source.code is not None
    where = recipe.where((*source.key, "format"))
    try:
        sources.function(source.code)
    except Exception as error:
        found = f"{source.format}: cannot be imported: {type(error).__name__}: {first_line(error)}"
        raise RecipeError(Fault(where, found, "FILE.py:FUNCTION or MODULE:FUNCTION, a function of a row")) from None
    try:
        return _columns(source.code, row)
    except turns.BadRow as error:
        raise DataError(Fault(f"{source.name} row 1", error.found, error.write)) from None


def _columns(code: Code, row: Mapping[str, Any]) -> dict[str, Any]:
    """Call the user's function with one row. Raises BadRow for whatever it raises or wrongly returns."""
    try:
        made = sources.function(code)(row)
    except Exception as error:
        raise turns.BadRow(f"{code.name} raised {type(error).__name__}: {first_line(error)}", "a mend in it") from None
    if isinstance(made, str):
        return {"text": made}
    if not isinstance(made, Mapping):
        write = "a mapping with messages, with prompt and completion, or another format's columns; or a text"
        raise turns.BadRow(f"{code.name} returned {type(made).__name__}", write)
    return dict(made)


def _wording(recipe: Recipe, source: Source, layout: str, target: Target, row: dict[str, Any]) -> Any:
    """Return how rows of this layout become text; refuse a wording that the layout cannot take."""
    where = recipe.where((*source.key, "wording"))
    if isinstance(source.wording, dict):
        if source.format:
            found = f"format: {source.format} beside a wording of the recipe's own, which names its columns itself"
            raise RecipeError(Fault(where, found, "one of the two"))
        return source.wording
    if layout == "text":
        if source.wording:
            found = f"wording: {source.wording}, but rows of format text are text already"
            raise RecipeError(Fault(where, found, "no wording"))
        return _AS_IT_IS
    if source.wording == "task" and layout != "task" and not source.task:
        write = f"task: beside it: {', '.join(wordings.TASKS)}, or an instruction in words"
        raise RecipeError(Fault(where, "wording: task, but neither the rows nor the source name a task", write))
    turned = not formatting.LAYOUTS[layout].wording or isinstance(row.get("prompt"), list)
    if turned and source.wording and source.wording not in ("chat", *wordings.CHATS):
        # rows of one question and one answer each fit; the first that does not is told by its number
        turned = False
    wording = source.wording or ("chat" if target.renders or turned else formatting.LAYOUTS[layout].wording)
    if wording == "chat" and not target.renders:
        model = recipe.values["model"]["name_or_path"]
        found = f"{source.name}: rows of a chat, but the tokenizer of {model} has no template"
        write = f"tokenizer.chat_template: chatml, or wording: {' or '.join(wordings.CHATS)}, or an -Instruct model"
        raise DataError(Fault(recipe.where(source.key), found, write))
    return wording


def _told(layout: str, wording: Any, has_template: bool, rows: Dataset, used: set[str]) -> str:
    """Say format and wording of a source, and which columns and keys of turns are not used."""
    shown = "the recipe's own" if isinstance(wording, dict) else wording
    apart = " (this model has a chat template, which it leaves unused)" if has_template and wording != "chat" else ""
    unused = [column for column in rows.column_names if column not in used]
    for column in used & set(rows.column_names):
        first = rows[0][column]
        keys = list(first[0]) if isinstance(first, list) and first and isinstance(first[0], dict) else []
        unused += [f"{column}.{key}" for key in keys if key not in turns.KEYS and column != "tools"]
    spare = f"; not used: {', '.join(unused)}" if unused else ""
    last = "; of several answers the last is learned" if isinstance(wording, str) and wording in wordings.CHATS else ""
    return f"format {layout or 'its own'}, wording {shown}{apart}{last}{spare}"


def _convert(
    batch: dict[str, list[Any]],
    indices: list[int],
    name: str,
    code: Code | None,
    version: list[str],
    **how: Any,
) -> dict[str, list[Any]]:
    """Format one batch of columns; `version` only makes datasets' cache miss when code changed."""
    forms: list[dict[str, Any]] = []
    faults: list[Fault] = []
    columns = dict(batch.items())
    for n, index in enumerate(indices):
        row = {name: values[n] for name, values in columns.items()}
        try:
            formed = formatting.form(_columns(code, row) if code else row, **how)
            forms.append(formed.columns | {"_as_text": ", ".join(sorted(formed.as_text))})
        except turns.BadRow as bad:
            faults.append(Fault(f"{name} row {index + 1}", bad.found, bad.write))
    if len(faults) > textfiles.MAX_SHOWN:
        rest = f"{len(faults) - textfiles.MAX_SHOWN} more faulty rows among rows {indices[0] + 1} to {indices[-1] + 1}"
        faults[textfiles.MAX_SHOWN :] = [Fault(name, rest, "the same for each")]
    if faults:
        raise DataError(faults)
    return {column: [form[column] for form in forms] for column in forms[0]}


def _for_template(run: Run, rows: Dataset) -> Dataset:
    """Leave out `tools` where no row has any; put beside each chat the keywords that its template gets."""
    if "tools" in rows.column_names and rows.data["tools"].null_count == len(rows.data["tools"]):
        rows = rows.remove_columns("tools")
    if _form(rows) == _CHAT and run.template_kwargs:
        # the column of that name is where TRL reads them, trl.data_utils.apply_chat_template
        return rows.add_column("chat_template_kwargs", [run.template_kwargs] * len(rows))
    return rows


def _one_form(run: Run, parts: list[Part]) -> None:
    """Refuse sources of different forms: TRL trains one form at a time."""
    if len({_form(part.rows) for part in parts}) > 1:
        found = "; ".join(f"{part.name} is {_form(part.rows)}" for part in parts)
        write = "the same wording for all sources, as `wording: chat`"
        raise DataError(Fault(run.recipe.where(("data",)), found, write))


def _form(rows: Dataset) -> str:
    if "text" in rows.column_names:
        return _TEXT
    return _CHAT if isinstance(rows[0]["completion"], list) else _PAIRS


def _with_loss(run: Run, train: Dataset, held: Dataset | None, given: bool | None) -> Rows:
    """Bring the rows into the form by which TRL puts the loss where `data.loss_on` wants it.

    `given`: the rows themselves say what the completion is, so earlier assistant turns are prompt; None
    where some do and some do not.
    """
    asked, form = run.data.get("loss_on"), _form(train)
    where = run.recipe.where(("data", "loss_on"))
    if form == _TEXT:
        if asked not in (None, "all"):
            raise RecipeError(Fault(where, f"loss_on: {asked}, but rows of text have no response", "loss_on: all"))
        return Rows(train, held, {}, "all")
    if form == _PAIRS:
        if asked in ("assistant", "last_turn"):
            write = "completion or all; or wording: chat, with tokenizer.chat_template where the model has none"
            raise RecipeError(Fault(where, f"loss_on: {asked}, but the rows become plain text", write))
        return Rows(train, held, {"completion_only_loss": asked != "all"}, asked or "completion")
    several = any(any(turn["role"] == "assistant" for turn in prompt) for prompt in train["prompt"])
    if several and asked is None and given is None:
        found = "some sources say what their completion is, others are chats of several turns"
        raise RecipeError(Fault(where, found, "loss_on: assistant, last_turn or all"))
    if asked == "all" or (several and (asked == "assistant" or (asked is None and not given))):
        joined = [
            rows and rows.map(_joined, remove_columns=["prompt", "completion"], features=_joined_features(rows))
            for rows in (train, held)
        ]
        return Rows(joined[0], joined[1], {"assistant_only_loss": asked != "all"}, asked or "assistant")
    return Rows(train, held, {"completion_only_loss": True}, "last_turn" if several and not given else "completion")


def _joined_features(rows: Dataset) -> Features:
    kept = {name: feature for name, feature in rows.features.items() if name not in ("prompt", "completion")}
    return Features(kept | {"messages": List(Json())})


def _joined(row: dict[str, Any]) -> dict[str, Any]:
    return {"messages": row["prompt"] + row["completion"]}
