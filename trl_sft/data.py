"""Loads the sources of a run, formats their rows, splits with the run's seed.

In: a `Run` and what its tokenizer renders. Out: `Rows`, datasets in one of TRL's forms. Every fault
names file and row. Deliberately absent: tokens; TRL prepares them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from datasets import Dataset, concatenate_datasets

from trl_sft import conversion, formatting, sources, textfiles, turns, wordings
from trl_sft.errors import DataError, Fault, RecipeError, first_line
from trl_sft.formatting import Target
from trl_sft.recipe import Recipe
from trl_sft.run import Run, Source

_AS_IT_IS = "as it is"
_CHAT, _TEXT, _PAIRS = "a chat", "plain text", "prompts with completions"


class Rows(NamedTuple):
    """The rows of a run in one of TRL's forms."""

    train: Dataset
    eval: Dataset | None
    loss: dict[str, bool]  # keywords of trl.SFTConfig that put the loss where the run wants it
    loss_on: str  # as `data.loss_on` says it
    said: tuple[str, ...] = ()  # a line a source: rows, layout, wording

    @property
    def chats(self) -> bool:
        """Whether the rows are chats: the template renders them."""
        return "messages" in self.train.column_names or _form(self.train) == _CHAT


class Part(NamedTuple):
    """One source, formatted."""

    name: str
    layout: str
    rows: Dataset
    several: bool  # whether some chat holds an earlier answer


def load(run: Run, target: Target) -> Rows:
    """Load, format and split the rows of a run. Raises DataError, RecipeError."""
    said: list[str] = []
    parts: dict[str, list[Part]] = {"train": [], "eval": []}
    for part, source in ((part, source) for part, those in run.sources.items() for source in those):
        try:
            parts[part].append(_formatted(run, source, part, target._replace(task=source.task), said))
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
    several = any(part.several for part in parts["train"])
    return _with_loss(run, _less_empty(train), held and _less_empty(held), given, several)._replace(said=tuple(said))


def look(recipe: Recipe, source: Source) -> tuple[str, list[str], int]:
    """Return layout, columns and number of rows of one source, unformatted. Raises DataError."""
    rows = sources.load(recipe, source, "train")
    return sources.recognised(recipe, source, rows.column_names), rows.column_names, len(rows)


def _formatted(run: Run, source: Source, part: str, target: Target, said: list[str]) -> Part:
    """Return one source's rows as prompt and completion, or as text."""
    recipe, name = run.recipe, source.name
    rows = sources.load(recipe, source, part)
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
    how = conversion.How(layout, wording, target, name, source.code, run.template_kwargs)
    forms = rows.map(
        conversion.convert,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=conversion.features(run.template_kwargs) if wording == "chat" else None,
        fn_kwargs={"how": how, "types": rows.features},
        new_fingerprint=conversion.fingerprint(rows, how),
        desc=f"Formatting {name}",
    )
    about = conversion.take_notes(forms)
    unused = sorted({column for column in rows.column_names if column not in used} | about.unused)
    told = _told(layout, wording, bool(target.renders), unused)
    label = f"; task {source.task}" if source.task else ""
    if label and "task" not in (layout, wording):
        label += " (a label: neither this format nor this wording uses it)"
    said.append(f"{name}: {len(rows):,} rows to {part}; {source.format + ' -> ' if source.code else ''}{told}{label}")
    if about.as_text:
        shown = "the chat template does not render" if wording == "chat" else f"wording {wording} has no place for"
        said.append(f"{name}: {shown} {' and '.join(sorted(about.as_text))}: kept as text")
    return Part(name, layout, about.rows, about.several)


def _called(recipe: Recipe, source: Source, row: dict[str, Any]) -> dict[str, Any]:
    """Return what the user's function makes of the first row, as columns. Raises RecipeError, DataError."""
    assert source.code is not None
    where = recipe.where((*source.key, "format"))
    try:
        conversion.function(source.code)
    except (Exception, SystemExit) as error:
        found = f"{source.format}: cannot be imported: {type(error).__name__}: {first_line(error)}"
        raise RecipeError(Fault(where, found, "FILE.py:FUNCTION or MODULE:FUNCTION, a function of a row")) from None
    try:
        return conversion.columns(source.code, row)
    except turns.BadRow as error:
        raise DataError(Fault(f"{source.name} row 1", error.found, error.write)) from None


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


def _told(layout: str, wording: Any, has_template: bool, unused: Sequence[str]) -> str:
    """Say format and wording of a source, and which columns and keys of turns are not used."""
    shown = "the recipe's own" if isinstance(wording, dict) else wording
    apart = " (this model has a chat template, which it leaves unused)" if has_template and wording != "chat" else ""
    spare = f"; not used: {', '.join(unused)}" if unused else ""
    last = "; of several answers the last is learned" if isinstance(wording, str) and wording in wordings.CHATS else ""
    return f"format {layout or 'its own'}, wording {shown}{apart}{last}{spare}"


def _less_empty(rows: Dataset) -> Dataset:
    """Leave out `tools` and `task` where no row has any."""
    there = [name for name in ("tools", "task") if name in rows.column_names]
    return rows.remove_columns([name for name in there if rows.data[name].null_count == len(rows)])


def _one_form(run: Run, parts: list[Part]) -> None:
    """Refuse sources of different forms: TRL trains one form at a time."""
    if len({_form(part.rows) for part in parts}) > 1:
        found = "; ".join(f"{part.name} is {_form(part.rows)}" for part in parts)
        write = "one kind for all: chats (wording: chat), prompts with completions (any other wording), or text"
        raise DataError(Fault(run.recipe.where(("data",)), found, write))


def _form(rows: Dataset) -> str:
    if "text" in rows.column_names:
        return _TEXT
    return _CHAT if isinstance(rows[0]["completion"], list) else _PAIRS


def _with_loss(run: Run, train: Dataset, held: Dataset | None, given: bool | None, several: bool) -> Rows:
    """Bring the rows into the form by which TRL puts the loss where `data.loss_on` wants it.

    `given`: the rows themselves say what the completion is, so earlier assistant turns are prompt; None
    where some do and some do not. `several`: some chat holds an earlier answer.
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
    if several and asked is None and given is None:
        found = "some sources say what their completion is, others are chats of several turns"
        raise RecipeError(Fault(where, found, "loss_on: assistant, last_turn or all"))
    if asked == "all" or (several and (asked == "assistant" or (asked is None and not given))):
        joined = [rows and conversion.joined(rows) for rows in (train, held)]
        return Rows(joined[0], joined[1], {"assistant_only_loss": asked != "all"}, asked or "assistant")
    return Rows(train, held, {"completion_only_loss": True}, "last_turn" if several and not given else "completion")
