"""Loads the sources of a run, formats their rows, splits with the run's seed.

In: a `Run` and whether its tokenizer has a chat template. Out: `Rows`, datasets in one of TRL's
forms. Every fault names file and row. Deliberately absent: tokens; TRL prepares them.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, concatenate_datasets, load_dataset

from trl_sft import formatting, hub, textfiles
from trl_sft.errors import DataError, Fault, RecipeError, first_line
from trl_sft.recipe import Recipe
from trl_sft.run import Run, Source

_AS_IT_IS = "as it is"
_CHAT, _TEXT, _PAIRS = "a chat", "plain text", "prompts with completions"
# part -> the split that a folder or a hub id gives where the source names none
_SPLITS = {"train": "train", "eval": "test"}
# A reformatting function that changed must not meet rows formatted by the old one in datasets' cache.
_CODE = hashlib.sha256(Path(formatting.__file__).read_bytes()).hexdigest()


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


def load(run: Run, has_template: bool) -> Rows:
    """Load, format and split the rows of a run. Raises DataError, RecipeError."""
    said: list[str] = []
    parts: dict[str, list[Part]] = {"train": [], "eval": []}
    for part, source in ((part, source) for part, sources in run.sources.items() for source in sources):
        try:
            parts[part].append(_formatted(run.recipe, source, part, has_template, said))
        except UnicodeDecodeError as error:  # datasets' JSON builder lets such bytes through
            bad = [fault for file in source.place.files for fault in textfiles.faults(file)]
            fault = Fault(source.name, f"not UTF-8: {first_line(error)}", "the file saved as UTF-8, or `encoding:`")
            raise DataError(bad or fault) from None
    _one_form(run, parts["train"] + parts["eval"])
    train = concatenate_datasets([part.rows for part in parts["train"]])
    held = concatenate_datasets([part.rows for part in parts["eval"]]) if parts["eval"] else None
    if fraction := run.data.get("eval_fraction"):
        if round(len(train) * fraction) in (0, len(train)):
            where = run.recipe.where(("data", "eval_fraction"))
            raise RecipeError(
                Fault(
                    where, f"{fraction} of {len(train)} rows leaves one side empty", "a fraction that gives both rows"
                )
            )
        split = train.train_test_split(round(len(train) * fraction), seed=run.train.get("seed", 42))
        train, held = split["train"], split["test"]
        said.append(f"{len(held):,} of them held out (eval_fraction {fraction}), {len(train):,} left to train")
    givens = {part.layout == "prompt_completion" for part in parts["train"]}
    given = givens.pop() if len(givens) == 1 else None
    return _with_loss(run, train, held, given)._replace(said=tuple(said))


def look(recipe: Recipe, source: Source) -> tuple[str, list[str], int]:
    """Return layout, columns and number of rows of one source, unformatted. Raises DataError."""
    rows = _loaded(recipe, source, "train")
    return _recognised(recipe, source, rows), rows.column_names, len(rows)


def _formatted(recipe: Recipe, source: Source, part: str, has_template: bool, said: list[str]) -> Part:
    """Return one source's rows as prompt and completion, or as text."""
    rows = _loaded(recipe, source, part)
    name = source.name
    if len(rows) == 0:
        raise DataError(Fault(recipe.where(source.key), f"{name} has no rows", "a source with rows"))
    layout = source.format or ("" if isinstance(source.wording, dict) else _recognised(recipe, source, rows))
    used = _check_columns(recipe, source, rows, layout)
    wording = _wording(recipe, source, layout, has_template, rows[0])
    if wording == "chat" and not has_template:
        found = f"{name}: rows of a chat, but the tokenizer of {recipe.values['model']['name_or_path']} has no template"
        raise DataError(Fault(recipe.where(source.key), found, "a model with a chat template, as the -Instruct ones"))
    said.append(f"{name}: {len(rows):,} rows to {part}; {_told(layout, wording, has_template, rows, used)}")
    forms = rows.map(
        _convert,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        fn_kwargs={"layout": layout, "wording": wording, "name": name, "code": _CODE},
        desc=f"Formatting {name}",
    )
    return Part(name, layout, forms)


def _wording(recipe: Recipe, source: Source, layout: str, has_template: bool, row: dict[str, Any]) -> Any:
    """Return how rows of this layout become text; refuse a wording that the layout cannot take."""
    where = recipe.where((*source.key, "wording"))
    if isinstance(source.wording, dict):
        if source.format:
            found = f"format: {layout} beside a wording of the recipe's own, which names its columns itself"
            raise RecipeError(Fault(where, found, "one of the two"))
        return source.wording
    chat = not formatting.LAYOUTS[layout].wording or isinstance(row.get("prompt"), list)
    fixed = _AS_IT_IS if layout == "text" else "chat" if chat else ""
    if fixed and source.wording not in ("", fixed):
        what, write = ("chats", "chat, or leave it out") if fixed == "chat" else ("text already", "no wording")
        raise RecipeError(Fault(where, f"wording: {source.wording}, but rows of format {layout} are {what}", write))
    return source.wording or fixed or ("chat" if has_template else formatting.LAYOUTS[layout].wording)


def _told(layout: str, wording: Any, has_template: bool, rows: Dataset, used: set[str]) -> str:
    """Say format and wording of a source, and which columns and keys of turns are not used."""
    shown = "the recipe's own" if isinstance(wording, dict) else wording
    apart = " (this model has a chat template, which it leaves unused)" if has_template and wording != "chat" else ""
    unused = [column for column in rows.column_names if column not in used]
    for column in used & set(rows.column_names):
        turns = rows[0][column]
        if isinstance(turns, list) and turns and isinstance(turns[0], dict):
            unused += [f"{column}.{key}" for key in turns[0] if key not in ("role", "content", "from", "value")]
    spare = f"; not used: {', '.join(unused)}" if unused else ""
    return f"format {layout or 'its own'}, wording {shown}{apart}{spare}"


def _convert(
    batch: dict[str, list[Any]], indices: list[int], layout: str, wording: Any, name: str, code: str
) -> dict[str, list[Any]]:
    """Format one batch of columns; `code` only makes datasets' cache miss when the code changed."""
    forms: list[dict[str, Any]] = []
    faults: list[Fault] = []
    columns = dict(batch.items())
    for n, index in enumerate(indices):
        try:
            forms.append(formatting.form({name: values[n] for name, values in columns.items()}, layout, wording))
        except formatting.BadRow as error:
            faults.append(Fault(f"{name} row {index + 1}", error.found, error.write))
    if len(faults) > textfiles.MAX_SHOWN:
        rest = f"{len(faults) - textfiles.MAX_SHOWN} more faulty rows among rows {indices[0] + 1} to {indices[-1] + 1}"
        faults[textfiles.MAX_SHOWN :] = [Fault(name, rest, "the same for each")]
    if faults:
        raise DataError(faults)
    return {column: [form[column] for form in forms] for column in forms[0]}


def _loaded(recipe: Recipe, source: Source, part: str) -> Dataset:
    """Return the rows of a source as they are. Foreign errors become DataError here."""
    keywords = {"split": _SPLITS[part]} | source.load
    where = recipe.where(source.key)
    files = [glob.escape(str(file)) for file in source.place.files]  # datasets takes them for patterns
    for file in source.place.files:
        if file.is_file() and file.stat().st_size == 0:
            raise DataError(Fault(where, f"{source.name} is empty: 0 bytes", "a file with rows"))
    try:
        if source.builder:
            keywords["split"] = source.load.get("split", "train")
            rows = load_dataset(source.builder, data_files=files, **keywords)
        else:
            if not source.place.files:
                hub.ask("dataset", source.place.name, keywords)
            rows = load_dataset(source.place.name, **keywords)
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        told = None if files else hub.explain(source.place.name, error)
        if told is not None:
            raise DataError(Fault(where, *told)) from None
        bad = (
            [fault for file in source.place.files for fault in textfiles.faults(file)]
            if source.builder == "json"
            else []
        )
        cause = error.__cause__ or error
        found, write = f"{source.name} cannot be read: {first_line(cause)}", "a file of that kind, or its keywords"
        if "corresponds to no data" in str(error):
            found, write = f"{source.name} has no rows", "a source with rows"
        elif "split" in str(error):
            write = "split: one that it has"
        raise DataError(bad or Fault(where, found, write)) from None
    return rows if isinstance(rows, Dataset) else concatenate_datasets(rows)


def _recognised(recipe: Recipe, source: Source, rows: Dataset) -> str:
    """Return the layout that the columns show; refuse where they show none or several."""
    fits = formatting.recognise(rows.column_names)
    if len(fits) == 1:
        return fits[0]
    have = f"{source.name} has the columns {', '.join(rows.column_names)}"
    where = recipe.where(source.key)
    if fits:
        raise DataError(Fault(where, f"{have}: they fit {' and '.join(fits)}", f"format: {' or '.join(fits)}"))
    wanted = "; ".join(f"{name} ({', '.join(layout.columns)})" for name, layout in formatting.LAYOUTS.items())
    write = f"columns of a known format: {wanted}; or wording: {{prompt: '...{{column}}...', completion: '{{column}}'}}"
    raise DataError(Fault(where, f"{have}: of no known format", write))


def _check_columns(recipe: Recipe, source: Source, rows: Dataset, layout: str) -> set[str]:
    """Return the columns that are used; refuse a source that lacks one."""
    try:
        own = source.wording if isinstance(source.wording, dict) else {}
        needed = {name for part in own.values() for name in formatting.fields(part)}
    except formatting.BadRow as error:
        raise RecipeError(Fault(recipe.where((*source.key, "wording")), error.found, error.write)) from None
    if own and set(own) not in ({"prompt", "completion"}, {"text"}):
        found = f"a wording with {', '.join(own)}"
        raise RecipeError(Fault(recipe.where((*source.key, "wording")), found, "prompt and completion, or text"))
    if own and not needed:
        where = recipe.where((*source.key, "wording"))
        raise RecipeError(Fault(where, "a wording without a column: every row the same", "columns in braces"))
    if not own:
        needed = set(formatting.LAYOUTS[layout].columns)
    missing = sorted(needed - set(rows.column_names))
    faults = []
    for column in missing:
        near = difflib.get_close_matches(column, rows.column_names, 1, 0.5)
        write = f"the column under that name{f'; nearest there: {near[0]}' if near else ''}"
        have = f"those present: {', '.join(rows.column_names)}"
        faults.append(Fault(recipe.where(source.key), f"{source.name} has no column {column} ({have})", write))
    if not own and layout in ("messages", "prompt_completion") and "tools" in rows.column_names:
        found = f"{source.name} has a column tools, which this version does not render"
        faults.append(Fault(recipe.where(source.key), found, "the rows without it"))
    if faults:
        raise DataError(faults)
    return needed | ({"input"} if layout == "alpaca" else set())


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
            raise RecipeError(Fault(where, f"loss_on: {asked}, but the rows are no chat", "completion or all"))
        return Rows(train, held, {"completion_only_loss": asked != "all"}, asked or "completion")
    several = any(any(turn["role"] == "assistant" for turn in prompt) for prompt in train["prompt"])
    if several and asked is None and given is None:
        found = "some sources say what their completion is, others are chats of several turns"
        raise RecipeError(Fault(where, found, "loss_on: assistant, last_turn or all"))
    if asked == "all" or (several and (asked == "assistant" or (asked is None and not given))):
        joined = [
            rows and rows.map(_joined, remove_columns=rows.column_names, desc="Joining turns") for rows in (train, held)
        ]
        return Rows(joined[0], joined[1], {"assistant_only_loss": asked != "all"}, asked or "assistant")
    return Rows(train, held, {"completion_only_loss": True}, "last_turn" if several and not given else "completion")


def _joined(row: dict[str, Any]) -> dict[str, Any]:
    return {"messages": row["prompt"] + row["completion"]}
