"""`preview --compare`: the first rows under each setting that could change how answers begin.

Inputs: a checked recipe. Outputs: for the recipe as it is and for each setting what training does with the first rows,
and these rows with their loss mask, as lines of a terminal or as an HTML page. Not here: which settings there are
(`training.thinking_choices`), and how a row is shown (`rows`).
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any, NamedTuple

from trl_sft.cli.preview import rows
from trl_sft.cli.preview.rows import Preview
from trl_sft.errors import UserError
from trl_sft.recipe.checked import Run
from trl_sft.training import stages, thinking_choices

NO_CHOICES = "No setting of this template changes how answers begin: it has no thoughts, or the rows are no chats."


class ComparedChoice(NamedTuple):
    """The first rows under one setting."""

    title: str  # the setting as a recipe has it
    result: str  # what training does with the rows, in words
    preview: Preview | None  # None = the rows are refused


def compare(run: Run, num_rows: int) -> list[ComparedChoice]:
    """Return the first rows under the recipe as it is and under each setting; empty = there is no setting to compare.

    Args:
        run: the checked recipe.
        num_rows: rows of each source to show.

    """
    compared = []
    for trial in thinking_choices.try_choices(run, stages.read_first_rows):
        preview, result = None, trial.describe()
        if not trial.problem:
            try:
                changed = run if trial.choice is None else thinking_choices.load_choice(run, trial.choice)
                preview = rows.build_preview(changed, num_rows)
            except UserError as error:
                result = f"refused: {error.faults[0].problem}"
        title = "the recipe as it is" if trial.choice is None else trial.choice.title
        compared.append(ComparedChoice(title, result, preview))
    return compared


def format_lines(compared: list[ComparedChoice], *, colour: bool) -> Iterator[str]:
    """Yield the lines of a terminal."""
    if not compared:
        yield NO_CHOICES
    for choice in compared:
        yield f"══ {choice.title}"
        yield f"   {choice.result}"
        yield ""
        if choice.preview:
            yield from choice.preview.row_lines(colour=colour)


def format_page(compared: list[ComparedChoice], title: str) -> str:
    """Return a page of HTML that needs no other file."""
    parts = [] if compared else [f"<p>{NO_CHOICES}</p>"]
    for choice in compared:
        parts.append(f"<h2>{html.escape(choice.title)}</h2><p>{html.escape(choice.result)}</p>")
        if choice.preview:
            parts.append(choice.preview.format_rows())
    return rows.format_page(title, "".join(parts))


def describe(compared: list[ComparedChoice]) -> list[dict[str, Any]]:
    """Return the comparison as plain values, as JSON has them."""
    return [
        {"setting": title, "result": result, "rows": preview.describe()["rows"] if preview else []}
        for title, result, preview in compared
    ]
