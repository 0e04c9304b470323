"""Columns, and keys of turns, that no format reads although they bear on the loss or on what the model gets.

Inputs: rows as they were read, and which columns are read. Outputs: the names of a row that carry a meaning, and for a
whole source one fault for each name, or a line where `run.allow: [unused_columns]` accepts it. Deliberately not here:
what a name means (`key_meanings`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from trl_sft.console import format_names, format_rows
from trl_sft.data import column_names, formats, key_meanings, messages
from trl_sft.data.file_diagnosis import diagnose
from trl_sft.data.formats import TASK
from trl_sft.data.source_format import SourceFormat
from trl_sft.errors import Edit, Fault
from trl_sft.recipe.checked import Run, Source

ALLOW = "unused_columns"  # the word of `run.allow`
# The column of a format that takes what a column of this meaning holds
_TARGETS = {
    key_meanings.SYSTEM: "system",
    key_meanings.HISTORY: "history",
    key_meanings.TOOLS: "tools",
    key_meanings.CONTEXT: "input",
}


class UnreadKey(NamedTuple):
    """A column, or a key of turns, whose meaning training would miss."""

    name: str  # of a key of turns as column.key
    num_rows: int  # rows in which it holds something
    place: str  # the name of the first of them


def list_unread(row: Mapping[str, Any], columns_read: Collection[str]) -> tuple[set[str], set[str]]:
    """Return the columns and keys of turns of a row that nothing reads, and those of them that carry a meaning.

    Args:
        row: the columns of the row.
        columns_read: the columns that its format reads.

    """
    read = {column: value for column, value in row.items() if column in columns_read}
    keys = messages.list_unread_keys(read)
    columns = {column: [row[column]] for column in row if column not in read and column != TASK}
    watched = {
        name: values for name, values in (columns | keys).items() if key_meanings.find_meaning(_last_part(name, keys))
    }
    meaningful: set[str] = set()
    if watched:
        row_text = "\0".join(messages.iterate_read_texts(read))
        for name, values in watched.items():
            last_part = _last_part(name, keys)
            if any(key_meanings.carries_meaning(last_part, value, row_text=row_text) for value in values):
                meaningful.add(name)
    if set(read) == {"text"}:  # nothing else of the row is trained
        meaningful |= {column for column in columns if _is_untold_answer(column, row[column], text=str(row["text"]))}
    return set(keys), meaningful


def _is_untold_answer(column: str, value: Any, *, text: str) -> bool:
    """Tell whether a column is an answer that the text of the row does not hold."""
    is_answer = column_names.normalise(column) in key_meanings.ANSWER_NAMES and isinstance(value, str)
    return is_answer and bool(value.strip()) and value.strip() not in text


def is_accepted(run: Run) -> bool:
    """Tell whether the recipe accepts that columns with a meaning are not used."""
    return ALLOW in run.options.get("allow", [])


def explain(
    run: Run, source: Source, unread: Sequence[UnreadKey], *, source_format: SourceFormat, columns: Sequence[str]
) -> list[Fault]:
    """Return a fault for each column or key whose meaning would be passed over.

    Args:
        run: the checked recipe.
        source: the source that has them.
        unread: the columns and keys, each with its rows.
        source_format: the format of the source, or a wording of the recipe's own.
        columns: the columns of the source.

    """
    return [_explain_key(run, source, key, source_format=source_format, columns=columns) for key in unread]


def _explain_key(
    run: Run, source: Source, unread: UnreadKey, *, source_format: SourceFormat, columns: Sequence[str]
) -> Fault:
    """Return the fault of one column or key. The arguments are those of `explain`."""
    format_name = source_format.format
    is_turn_key = unread.name not in columns and "." in unread.name
    name = unread.name.rpartition(".")[2] if is_turn_key else unread.name
    meaning = key_meanings.find_meaning(name) or key_meanings.ANSWER
    kind = "key" if is_turn_key else "column"
    reader = f"format {format_name}" if format_name else "the wording"
    problem = (
        f"the {kind} {unread.name} is not read by {reader}, but its name says that it holds {meaning}: it is filled in "
        f"{format_rows(unread.num_rows)}, the first is {unread.place}"
    )
    if meaning == key_meanings.LOSS:
        problem = problem.replace("holds the loss", "bears on the loss")
    fix, edits = _advise(run, source, unread.name, meaning=meaning, format_name=format_name, columns=columns)
    if is_turn_key:
        fix, edits = _advise_turn_key(unread.name, meaning), ()
    accept = f"Or accept with run.allow: [{ALLOW}] that it is not used."
    return Fault(run.recipe.where(source.key), problem, f"{fix} {accept}", code="data.unused_meaning", edits=edits)


def describe_accepted(source_name: str, unread: Sequence[UnreadKey]) -> str:
    """Return the line on columns and keys that the recipe accepts as not used."""
    names = format_names([f"{key.name} in {format_rows(key.num_rows)}" for key in unread])
    return f"{source_name}: not used, as run.allow: [{ALLOW}] accepts: {names}"


def _last_part(name: str, keys: Collection[str]) -> str:
    """Return the name of a column, or of a key of turns without its column."""
    return name.rpartition(".")[2] if name in keys else name


def _advise_turn_key(name: str, meaning: str) -> str:
    """Return what to do about a key of turns."""
    column, _, key = name.rpartition(".")
    if meaning == key_meanings.LOSS:
        return f"Write `loss: true` or `loss: false` in the turns of {column}, in place of `{key}`."
    if key == "channel":
        return "Write a text of the channel analysis as `reasoning_content` of the answer after it."
    if meaning == key_meanings.REASONING:
        return "Name the key `reasoning_content`, in the file or in `format: FILE.py:FUNCTION`."
    if meaning == key_meanings.MEDIA:
        return "Train with TRL itself: this version trains on text alone."
    if meaning == key_meanings.TOOLS:
        return "Put the functions into the column `tools` of the row, and calls into `tool_calls` of the turn."
    return "Put it into the content of the turns, or into a turn of its own, in `format: FILE.py:FUNCTION`."


def _advise(
    run: Run, source: Source, column: str, *, meaning: str, format_name: str, columns: Sequence[str]
) -> tuple[str, tuple[Edit, ...]]:
    """Return what to do about a column, and the change of the recipe where it is certain."""
    if meaning == key_meanings.LOSS:
        fix = "Leave out rows with `format: FILE.py:FUNCTION`, or set `loss: false` on turns; then remove the column."
        return fix, ()
    if meaning == key_meanings.MEDIA:
        return "Train with TRL itself: this version trains on text alone.", ()
    if meaning == key_meanings.ANSWER:
        rename = diagnose.write_value({"text": "question", column: "answer"})
        return f"If {column} is what to train, set `rename: {rename}`.", ()
    if meaning == key_meanings.SPEAKER:
        return "Join the turns of a chat into one row, whose column `messages` is a list of {role, content}.", ()
    if meaning == key_meanings.TEMPLATE:
        return "Set `tokenizer.chat_template_kwargs` for all rows, in place of the column.", ()
    values = _find_rename(column, meaning=meaning, format_name=format_name, columns=columns)
    if "rename" in values:  # columns have the names that the source's own `rename` gives them
        names_in_file = {new: old for old, new in source.rename.items()}
        renames = {names_in_file.get(old, old): new for old, new in values["rename"].items()}
        values["rename"] = source.rename | renames
    if values and not source.function and not source.wording:
        fix = " and ".join(f"`{key}: {diagnose.write_value(value)}`" for key, value in values.items())
        return f"Set {fix} to train with it.", diagnose.make_edits(run.recipe, source, values)
    if format_name == "text":
        return "Put it into the text, in `format: FILE.py:FUNCTION`.", ()
    if source.function:
        return (
            f"Return it in a column that the format reads, or leave it out of what {source.function.name} returns.",
            (),
        )
    wording = f"`wording: {{prompt: '{{{column}}} ...', completion: '...'}}`"
    return f"Name it in a wording of your own, as in {wording}, or in `format: FILE.py:FUNCTION`.", ()


def _find_rename(column: str, *, meaning: str, format_name: str, columns: Sequence[str]) -> dict[str, Any]:
    """Return the keys of the source with which a format reads a column; {} = none does."""
    target = _TARGETS.get(meaning, "")
    row_format = formats.FORMATS.get(format_name)
    if row_format and target in row_format.optional_columns and target not in columns:
        return {"rename": {column: target}}
    suggestion = column_names.suggest_format(columns)
    if suggestion is None or not suggestion.is_known or suggestion.format == format_name:
        return {}
    renamed = suggestion.rename.get(column, column)
    new_format = formats.FORMATS[suggestion.format]
    if renamed not in (*new_format.columns, *new_format.optional_columns):
        return {}
    return {"format": suggestion.format} | ({"rename": suggestion.rename} if suggestion.rename else {})
