"""Reads one source of rows and formats it: which layout, which wording, what is said of it.

In: a `Source` and what the tokenizer renders. Out: a `Split` of its rows. Every fault names file and row. Deliberately
absent: what becomes of several sources (`data`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_sft.console import format_rows
from trl_sft.data import conversion, formats, load, messages, mix, wordings
from trl_sft.data.formats import TokenizerFeatures
from trl_sft.data.split import FormattedSource, Split, split_of_source
from trl_sft.errors import DataError, Fault, RecipeError, first_line
from trl_sft.recipe.checked import Run, Source
from trl_sft.recipe.yaml_reader import Recipe

_AS_IT_IS = "as it is"


def look(recipe: Recipe, source: Source) -> tuple[str, list[str], int]:
    """Return layout, columns and number of rows of one source, unformatted. Raises DataError."""
    rows = load.load(recipe, source, "train")
    return load.recognised(recipe, source, rows.column_names), rows.column_names, len(rows)


def formatted(
    run: Run, source: Source, target: TokenizerFeatures, said: list[str], which: tuple[str, int | None]
) -> Split:
    """Return one source's rows as prompt and completion, or as text.

    `which`: to train or to evaluate, and how many rows from the beginning (None = all).
    """
    recipe, name, (part, head) = run.recipe, source.name, which
    rows = load.load(recipe, source, part, head)
    if len(rows) == 0:
        raise DataError(Fault(recipe.where(source.key), f"{name} has no rows", "a source with rows"))
    if left := load.passed_over(source):
        shown = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
        every = f"{source.location.name}/*{Path(left[0]).suffix}"
        said.append(f"{name}: NOT READ: {shown}; a folder's files go by names as in train.jsonl, {every} reads all")
    numbers = None
    if head is None and source.max_rows is not None and source.max_rows > len(rows):
        said.append(f"{name}: has {format_rows(len(rows))}, fewer than max_rows: {source.max_rows:,}")
    elif head is None and source.max_rows is not None and source.max_rows < len(rows):
        said.append(f"{name}: {source.max_rows:,} of its {len(rows):,} rows, drawn with the seed (max_rows)")
        numbers = mix.sampled(len(rows), source.max_rows, seed(run))
        rows = rows.select(numbers)
    first = dict(rows[0])
    if source.function:
        first = _called(recipe, source, first, 0 if numbers is None else int(numbers[0]))
        layout = load.recognised(recipe, source, list(first), f"what {source.format} returned for row 1")
    else:
        own = isinstance(source.wording, dict)
        layout = source.format or ("" if own else load.recognised(recipe, source, rows.column_names))
    used = load.used_columns(recipe, source, rows, layout)
    wording = _wording(recipe, source, layout, target, first)
    how = conversion.SourceFormat(layout, wording, target, name, source.function)
    forms = rows.map(
        conversion.convert,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        features=conversion.features() if wording == "chat" else None,
        fn_kwargs={"how": how, "types": rows.features, "numbers": numbers},
        num_proc=run.train.get("dataset_num_proc"),
        new_fingerprint=conversion.fingerprint(rows, how),
        desc=f"Formatting {name}",
    )
    about = conversion.take_notes(forms)
    unused = sorted({column for column in rows.column_names if column not in used} | about.unused)
    told = _told(layout, wording, bool(target.template_features), unused)
    label = f"; task {source.task}" if source.task else ""
    if label and "task" not in (layout, wording):
        label += " (a label: neither this format nor this wording uses it)"
    count = f"{format_rows(len(rows))} to {part}" if head is None else f"its first {format_rows(len(rows))}"
    said.append(f"{name}: {count}; {source.format + ' -> ' if source.function else ''}{told}{label}")
    if about.as_text:
        shown = "the chat template does not render" if wording == "chat" else f"wording {wording} has no place for"
        said.append(f"{name}: {shown} {' and '.join(sorted(about.as_text))}: kept as text")
    described = FormattedSource(name, layout, about.several, about.escaped, how, source.weight)
    return split_of_source(about.rows, described, numbers)


def _called(recipe: Recipe, source: Source, row: dict[str, Any], number: int) -> dict[str, Any]:
    """Return what the user's function makes of a row, as columns. Raises RecipeError, DataError."""
    assert source.function is not None
    where = recipe.where((*source.key, "format"))
    try:
        conversion.function(source.function)
    except (Exception, SystemExit) as error:
        found = f"{source.format}: cannot be imported: {type(error).__name__}: {first_line(error)}"
        raise RecipeError(Fault(where, found, "FILE.py:FUNCTION or MODULE:FUNCTION, a function of a row")) from None
    try:
        return conversion.columns(source.function, row)
    except messages.FormatError as error:
        raise DataError(Fault(f"{source.name} row {number + 1}", error.problem, error.fix)) from None


def _wording(recipe: Recipe, source: Source, layout: str, target: TokenizerFeatures, row: dict[str, Any]) -> Any:
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
    turned = not formats.LAYOUTS[layout].wording or isinstance(row.get("prompt"), list)
    if turned and source.wording and source.wording not in ("chat", *wordings.CHATS):
        # rows of one question and one answer each fit; the first that does not is told by its number
        turned = False
    wording = source.wording or ("chat" if target.template_features or turned else formats.LAYOUTS[layout].wording)
    if wording == "chat" and not target.template_features:
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


def seed(run: Run) -> int:
    """Return the one seed of a run: SFTConfig's."""
    return int(run.train.get("seed", 42))
