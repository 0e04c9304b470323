"""Decides how the rows of one source are formatted: which format their columns have, and which wording they get.

Inputs: a `Source` of the recipe, its rows as they were read, and what the tokenizer can do. Outputs: a
`SourceFormat`, or a fault at the source's place in the recipe. Deliberately not here: formatting (`pipeline`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from trl_sft.console import format_names, format_rows
from trl_sft.data import answer_lists, bad_rows, column_names, formats, messages, rendered_text, user_function, wordings
from trl_sft.data.bad_rows import Kinds
from trl_sft.data.file_diagnosis import diagnose
from trl_sft.data.formats import TokenizerFeatures
from trl_sft.data.source_rows import SourceRows
from trl_sft.errors import DataError, Fault, Place, RecipeError, first_line
from trl_sft.recipe.checked import Source
from trl_sft.recipe.paths import FunctionLocation
from trl_sft.recipe.yaml_reader import Recipe
from trl_sft.suggestions import LOOSE, nearest_name

_COMMON_FORMATS = ("messages", "prompt_completion", "question_answer", "alpaca", "text")
_MAX_TRIED = 10  # rows of which one is taken to say what the columns hold
_NUMBERING = ("id", "idx", "index", "uuid", "key", "row_id", "conversation_id")  # columns that hold no text
_NO_WORDING = "as it is"  # the wording of rows of text, in notes


class SourceFormat(NamedTuple):
    """How the rows of one source are formatted; a part of the name under which they are cached."""

    source_name: str  # for messages
    format: str  # a key of `formats.FORMATS`; "" = none, with a wording of the recipe's own
    wording: str | dict[str, str]
    features: TokenizerFeatures
    task: str = ""  # of all rows of the source; "" = the rows name theirs, or none
    function: FunctionLocation | None = None  # the user's formatting function
    rename: tuple[tuple[str, str], ...] = ()  # columns of the file, each with the name that the format expects
    own_columns: tuple[str, ...] = ()  # that a wording of the recipe's own names

    @property
    def columns_read(self) -> tuple[str, ...]:
        """The columns of a row, or of what the user's function returns, that formatting reads."""
        row_format = formats.FORMATS.get(self.format)
        columns = (*row_format.columns, *row_format.optional_columns) if row_format else self.own_columns
        return (*columns, formats.TASK)


def choose_format(
    recipe: Recipe, source: Source, features: TokenizerFeatures, *, rows: SourceRows, numbers: Sequence[int]
) -> tuple[SourceFormat, set[str]]:
    """Choose format and wording of a source by the recipe, the columns and the first row.

    Args:
        recipe: the recipe, for the place of a fault.
        source: the entry of `data.train` or `data.eval`.
        features: what the tokenizer can do.
        rows: all rows of the source.
        numbers: the numbers of those that are formatted, from 0, at least one.

    Returns:
        The format, and the columns that formatting does not read.

    Raises:
        DataError: the columns fit no format or several, or one is missing.
        RecipeError: format, wording and task of the source contradict each other.

    """
    columns = list(rows.columns)
    if source.function:
        first_row, number = _call_for_first_row(recipe, source, rows, numbers=numbers)
        title = f"the result of {source.format} for {rows.places.name_row(number)}"
        format_name = recognise_format(recipe, source, list(first_row), title=title)
    elif source.format or isinstance(source.wording, dict):
        format_name = source.format
    else:
        format_name = recognise_format(recipe, source, columns, rows=rows)
    if not source.function:
        first_row = _find_first_row(rows, numbers)
    columns_read = _columns_read(recipe, source, columns, format_name=format_name, first_row=first_row)
    wording = _choose_wording(recipe, source, features, format_name=format_name, first_row=first_row)
    own_columns = tuple(sorted(columns_read - {formats.TASK})) if isinstance(source.wording, dict) else ()
    source_format = SourceFormat(
        source.name,
        format_name,
        wording,
        features,
        source.task,
        source.function,
        rename=tuple(source.rename.items()),
        own_columns=own_columns,
    )
    return source_format, set(columns) - columns_read


def recognise_format(
    recipe: Recipe, source: Source, columns: Sequence[str], *, title: str = "", rows: SourceRows | None = None
) -> str:
    """Return the one format that columns fit.

    Args:
        recipe: the recipe, for the place of a fault.
        source: the entry of `data.train` or `data.eval`.
        columns: the names of the columns.
        title: what has the columns, for messages; "" = the source.
        rows: the rows of the source, whose values help to say what its columns are.

    Raises:
        DataError: the columns fit no format, or several.

    """
    fitting = formats.recognise(columns)
    if len(fitting) == 1:
        return fitting[0]
    if not columns:
        where = recipe.where(source.key)
        number = len(rows.rows) if rows is not None else 0
        problem = f"{title or source.name} has {f'{format_rows(number)} without a column' if number else 'no rows'}"
        raise DataError(Fault(where, problem, "Name a source that has rows.", code="data.no_rows"))
    if fitting:
        raise DataError(_explain_several_formats(recipe, source, fitting, columns=columns, title=title, rows=rows))
    first_row = _find_first_row(rows, range(min(len(rows.rows), _MAX_TRIED))) if rows is not None else {}
    suggestion = None if title else column_names.suggest_format(columns, first_row)
    is_known = suggestion is not None and suggestion.is_known
    if not title and not is_known and (faults := diagnose.explain_columns(recipe, source)):
        raise DataError(faults)
    raise DataError(
        _explain_unknown_format(recipe, source, suggestion, columns=columns, title=title, first_row=first_row)
    )


def _explain_several_formats(
    recipe: Recipe,
    source: Source,
    fitting: Sequence[str],
    *,
    columns: Sequence[str],
    title: str,
    rows: SourceRows | None,
) -> Fault:
    """Return the fault of columns that fit several formats, in the same rows or each in other rows."""
    where = recipe.where(source.key)
    problem = f"{title or source.name} has the columns {format_names(columns)}"
    if rows is not None:
        numbers = {name: min(rows.columns[column] for column in formats.FORMATS[name].columns) for name in fitting}
        if sum(numbers.values()) <= len(rows.rows) and all(numbers.values()):
            shown = " and ".join(
                f"{format_rows(number)} of format {name} ({', '.join(formats.FORMATS[name].columns)})"
                for name, number in numbers.items()
            )
            problem = f"{source.name} has rows of several formats: {shown}"
            fix = "Put the rows of each format into files of their own, and name these as a source each."
            return Fault(where, problem, fix, code="data.ambiguous_format")
    problem = f"{problem}, which fit several formats: {' and '.join(fitting)}"
    return Fault(where, problem, f"Set `format` to {' or '.join(fitting)}.", code="data.ambiguous_format")


def _explain_unknown_format(
    recipe: Recipe,
    source: Source,
    suggestion: column_names.FormatSuggestion | None,
    *,
    columns: Sequence[str],
    title: str,
    first_row: Mapping[str, Any],
) -> Fault:
    """Return the fault of columns that fit no format; `title` has them, in place of the source."""
    where = recipe.where(source.key)
    if token_columns := column_names.list_token_columns(columns, first_row):
        return _explain_token_ids(recipe, source, token_columns)
    problem = f"{title or source.name} has the columns {format_names(columns)}, which fit no format"
    for column in columns:
        if speakers := rendered_text.list_speakers(first_row.get(column)):
            problem = f"{problem}; the column {column} holds a whole chat as text, with the speakers {speakers}"
            fix = "Split it into messages in a function: `format: FILE.py:FUNCTION`. "
            fix += "docs/how-to/formats-and-wordings.md has one (A chat in one text)."
            return Fault(where, problem, fix, code="data.unknown_format")
    nested = next((column for column in columns if isinstance(first_row.get(column), Mapping)), "")
    if nested and not (suggestion and suggestion.is_known and not _find_nested(suggestion, first_row)):
        inner = column_names.suggest_format(list(first_row[nested]), first_row[nested])
        return _explain_inner_columns(where, problem, first_row, nested=nested, inner=inner)
    if suggestion is None or not (suggestion.rename or suggestion.is_known):
        return Fault(where, problem, _list_formats(columns), code="data.unknown_format")
    nearest = ", ".join(formats.FORMATS[suggestion.format].columns)
    problem = f"{problem}; the nearest is {suggestion.format} ({nearest})"
    if nested := _find_nested(suggestion, first_row):
        problem = f"{problem}, but the column {nested} holds {_describe_nested(first_row[nested])}, not text"
        fix = "Make the text of each row in a function: `format: FILE.py:FUNCTION`."
        return Fault(where, problem, f"{fix} docs/how-to/formats-and-wordings.md has one.", code="data.unknown_format")
    if source.builder == "csv" and _has_spaced_header(source, columns):
        values: dict[str, Any] = {"skipinitialspace": True}
        problem = f"{problem}: in the file a space follows each separator"
        fix = f"Set `skipinitialspace: true` in the source: `{diagnose.write_source(recipe, source, values)}`."
        edits = diagnose.make_edits(recipe, source, values)
        return Fault(where, problem, fix, code="data.unknown_format", edits=edits)
    values = {"rename": _join_renames(source, suggestion.rename)}
    entry = diagnose.write_source(recipe, source, values)
    text = f"`rename: {diagnose.write_value(values['rename'])}` in the source: `{entry}`."
    if not suggestion.is_known:
        wording = _write_wording(list(suggestion.rename) if len(suggestion.rename) > 1 else columns)
        fix = f"If the columns mean that, set {text} Otherwise write a wording: {wording}."
        if source.builder == "csv" and not {"column_names", "names", "header"} & set(source.load_kwargs):
            fix += f" If the file has no header, set `column_names: [{', '.join(suggestion.rename.values())}]`."
        return Fault(where, problem, fix, code="data.unknown_format")
    edits = diagnose.make_edits(recipe, source, values)
    return Fault(where, problem, f"Set {text}", code="data.unknown_format", edits=edits)


def _explain_token_ids(recipe: Recipe, source: Source, columns: Sequence[str]) -> Fault:
    """Return the fault of rows that a tokenizer made already."""
    problem = (
        f"{source.name} holds token ids ({format_names(columns)}), which another program tokenized; a recipe trains "
        "on text, so that its own tokenizer and loss mask apply"
    )
    fix = (
        "Name the file of texts or chats from which they were made. If there is none, decode the ids in a function: "
        "`format: FILE.py:FUNCTION`. docs/how-to/formats-and-wordings.md has one."
    )
    return Fault(recipe.where(source.key), problem, fix, code="data.token_ids")


def _explain_inner_columns(
    where: Place | str,
    problem: str,
    first_row: Mapping[str, Any],
    *,
    nested: str,
    inner: column_names.FormatSuggestion | None,
) -> Fault:
    """Return the fault of rows of which a column holds a mapping: with the function that takes its columns out.

    Args:
        where: the place of the source.
        problem: what is wrong, to which the content of the column is added.
        first_row: a row.
        nested: the column that holds a mapping.
        inner: the format that the keys of the mapping have; None = none.

    """
    content: Mapping[str, Any] = first_row[nested]
    problem = f"{problem}; the column {nested} holds {_describe_nested(content)}"
    if function := answer_lists.write_function(list(first_row), nested=nested, content=content):
        fix = (
            f"Write `def to_row(row): {function}` into rows.py beside the recipe, and set `format: rows.py:to_row` in "
            "the source: it takes the first of several right answers, and leaves out rows without one."
        )
        return Fault(where, f"{problem}, as SQuAD has its answers", fix, code="data.unknown_format")
    fits = bool(formats.recognise(list(content)))
    if inner is None or not (fits or (inner.is_known and inner.rename)) or _find_nested(inner, content):
        fix = "Make the columns of a format in a function: `format: FILE.py:FUNCTION`."
        return Fault(where, problem, f"{fix} docs/how-to/formats-and-wordings.md has one.", code="data.unknown_format")
    value = f'row["{nested}"]'
    if inner.rename:
        row_format = formats.FORMATS[inner.format]
        names_in_file = {new: old for old, new in inner.rename.items()}
        names = {name: names_in_file.get(name, name) for name in (*row_format.columns, *row_format.optional_columns)}
        pairs = [f'"{name}": {value}["{old}"]' for name, old in names.items() if old in content]
        value = "{" + ", ".join(pairs) + "}"
    fix = (
        f"Write `def to_row(row): return {value}` into rows.py beside the recipe, and set `format: rows.py:to_row` in "
        "the source."
    )
    return Fault(where, f"{problem}, which fit {inner.format}", fix, code="data.unknown_format")


def _find_nested(suggestion: column_names.FormatSuggestion, first_row: Mapping[str, Any]) -> str:
    """Return the column that would become text although it holds a list or a mapping; "" = there is none."""
    if suggestion.format in ("messages", "sharegpt"):
        return ""
    for column, name in suggestion.rename.items():
        value = first_row.get(column)
        is_chat = suggestion.format == "prompt_completion" and column_names.is_chat(value)
        if isinstance(value, list | Mapping) and not is_chat and name not in ("history", "tools"):
            return column
    return ""


def _describe_nested(value: Any) -> str:
    """Return what a list or a mapping holds."""
    if isinstance(value, Mapping):
        return f"a mapping with the keys {', '.join(map(str, list(value)[:5]))}"
    return "a list" if not value else f"a list of {len(value)}"


def _has_spaced_header(source: Source, columns: Sequence[str]) -> bool:
    """Tell whether every name of a header but the first begins with a space, and the names without it fit a format."""
    stripped = [column.strip().strip('"') for column in columns]
    is_spaced = all(column.startswith(" ") for column in columns[1:]) and not columns[0].startswith(" ")
    return is_spaced and "skipinitialspace" not in source.load_kwargs and len(formats.recognise(stripped)) == 1


def _join_renames(source: Source, rename: dict[str, str]) -> dict[str, str]:
    """Return the renames of a source together with further ones, which name columns as they are after the first."""
    columns_of_file = {new: old for old, new in source.rename.items()}
    return source.rename | {columns_of_file.get(old, old): new for old, new in rename.items()}


def _list_formats(columns: Sequence[str]) -> str:
    """Return the instruction for columns whose names say nothing: the formats, and a wording with these columns."""
    known = "; ".join(f"{name} ({', '.join(formats.FORMATS[name].columns)})" for name in _COMMON_FORMATS)
    return (
        f"Rename columns with `rename: {{{columns[0]}: its_column}}` so that they fit a format: {known}. "
        f"Or write a wording: {_write_wording(columns)}. docs/how-to/formats-and-wordings.md has all formats."
    )


def _write_wording(columns: Sequence[str]) -> str:
    """Return a wording of the recipe's own, with the first and the last column as prompt and completion."""
    texts = [column for column in columns if column_names.normalise(column) not in _NUMBERING] or list(columns)
    return f"`wording: {{prompt: '{{{texts[0]}}}', completion: '{{{texts[-1]}}}'}}`"


def describe_format(source: Source, source_format: SourceFormat, unused: Sequence[str]) -> str:
    """Return format and wording of a source in words, with the columns and keys that nothing reads."""
    wording = source_format.wording
    if isinstance(wording, dict):
        format_text = f"format {source_format.format}, " if source_format.format else ""
        text = f"{format_text}wording of the recipe"
    else:
        text = f"format {source_format.format}, wording {wording}"
    if source_format.features.template_features and wording != "chat":
        text += " (the model's chat template is not used)"
    if isinstance(wording, str) and wording in wordings.MULTI_TURN:
        text += "; of several answers only the last one is trained"
    if unused:
        text += f"; not used: {format_names(unused)}"
    if source.function:
        text = f"{source.format} -> {text}"
    if source.task:
        text += f"; task {source.task}"
        if "task" not in (source_format.format, wording):
            text += " (a label: neither this format nor this wording uses it)"
    return text


def _call_for_first_row(
    recipe: Recipe, source: Source, rows: SourceRows, *, numbers: Sequence[int]
) -> tuple[dict[str, Any], int]:
    """Return the columns that the user's function makes of the first row that it takes, and the row's number.

    Raises:
        RecipeError: the function cannot be imported.
        DataError: the function fails for every row, or drops every row.

    """
    assert source.function is not None
    try:
        user_function.import_function(source.function)
    except (Exception, SystemExit) as error:
        problem = f"{source.format} cannot be imported: {type(error).__name__}: {first_line(error)}"
        fix = "Write FILE.py:FUNCTION or MODULE:FUNCTION, the name of a function that takes a row."
        where = recipe.where((*source.key, "format"))
        raise RecipeError(Fault(where, problem, fix, code="data.function_import")) from None
    kinds: Kinds = {}
    for number in numbers:
        try:
            columns = user_function.call_function(source.function, rows.decode_row(number))
        except messages.FormatError as error:
            bad_row = bad_rows.describe_problem(error.problem, error.fix, code=error.code)
            bad_rows.add(kinds, bad_row, number=number, place=rows.places.name_row(number))
            continue
        if columns is not None:
            return columns, number
    if kinds:
        raise DataError(list(bad_rows.list_kinds(kinds)))
    problem = f"{source.format} returns None for each of the {format_rows(len(numbers))}, so no row is left"
    where = recipe.where((*source.key, "format"))
    raise DataError(Fault(where, problem, "Return the columns of a row.", code="data.no_rows_left"))


def _find_first_row(rows: SourceRows, numbers: Sequence[int]) -> dict[str, Any]:
    """Return the first row that has a prompt, where there is such a column; else the first row that can be parsed."""
    first: dict[str, Any] = {}
    for number in numbers:
        try:
            row = rows.decode_row(number)
        except messages.FormatError:
            continue
        if row.get("prompt") or "prompt" not in rows.columns:
            return row
        first = first or row
    return first


def _columns_read(
    recipe: Recipe, source: Source, columns: Sequence[str], *, format_name: str, first_row: Mapping[str, Any]
) -> set[str]:
    """Return the columns that formatting reads. Raises DataError if one is missing, RecipeError."""
    if source.function:
        return set(columns)
    if isinstance(source.wording, dict):
        required, optional = _wording_columns(recipe, source, source.wording), set()
    else:
        row_format = formats.FORMATS[format_name]
        required = set(row_format.columns) - ({formats.TASK} if source.task else set())
        optional = set(row_format.optional_columns)
    if missing := sorted(required - set(columns)):
        if token_columns := column_names.list_token_columns(columns, first_row):
            raise DataError(_explain_token_ids(recipe, source, token_columns))
        raise DataError([_explain_missing_column(recipe, source, columns, missing=column) for column in missing])
    return required | optional | {formats.TASK}


def _explain_missing_column(recipe: Recipe, source: Source, columns: Sequence[str], *, missing: str) -> Fault:
    """Return the fault of a column that formatting needs and the source does not have."""
    problem = f"{source.name} has no column {missing}; its columns are {format_names(columns)}"
    where = recipe.where(source.key)
    if isinstance(source.wording, dict):
        nearest = nearest_name(missing, columns, cutoff=LOOSE)
        fix = f"Did you mean `{nearest}`?" if nearest else "Name a column that the source has."
        return Fault(where, problem, fix, code="data.missing_column")
    nearest = column_names.suggest_column(columns, missing) or nearest_name(missing, columns, cutoff=LOOSE)
    if not nearest:
        fix = f"Set `rename: {{{columns[0]}: {missing}}}` with the column that holds it, or correct `format`."
        return Fault(where, problem, fix, code="data.missing_column")
    values = {"rename": _join_renames(source, {nearest: missing})}
    fix = f"Set `rename: {diagnose.write_value(values['rename'])}`, or give the column that name in the file."
    edits = diagnose.make_edits(recipe, source, values)
    return Fault(where, problem, fix, code="data.missing_column", edits=edits)


def _wording_columns(recipe: Recipe, source: Source, wording: dict[str, str]) -> set[str]:
    """Return the columns that a wording of the recipe's own names. Raises RecipeError."""
    where = recipe.where((*source.key, "wording"))
    try:
        columns = {column for template in wording.values() for column in wordings.template_columns(template)}
    except messages.FormatError as error:
        raise RecipeError(Fault(where, error.problem, error.fix, code=error.code)) from None
    if set(wording) not in ({"prompt", "completion"}, {"text"}):
        raise RecipeError(
            Fault(
                where,
                f"the keys of the wording are: {format_names(wording)}",
                "Write the keys prompt and completion, or the key text.",
                code="data.invalid_wording",
            )
        )
    if not columns:
        problem = "the wording names no column, so every row would become the same text"
        raise RecipeError(
            Fault(where, problem, "Write columns in braces, as in {question}.", code="data.invalid_wording")
        )
    return columns


def _choose_wording(
    recipe: Recipe, source: Source, features: TokenizerFeatures, *, format_name: str, first_row: dict[str, Any]
) -> str | dict[str, str]:
    """Return the wording of a source; refuse one that its format cannot take. Raises RecipeError, DataError."""
    where = recipe.where((*source.key, "wording"))
    if isinstance(source.wording, dict):
        if source.format:
            problem = f"`format: {source.format}` has no effect, because the wording itself names its columns"
            raise RecipeError(Fault(where, problem, "Remove one of the two.", code="recipe.no_effect"))
        return source.wording
    if format_name == "text":
        if source.wording:
            problem = f"wording: {source.wording}, but rows of format text have no wording"
            raise RecipeError(Fault(where, problem, "Remove `wording`.", code="recipe.no_effect"))
        return _NO_WORDING
    if source.wording == "task" and format_name != "task" and not source.task:
        fix = f"Set `task` in the source to {', '.join(wordings.TASKS)}, or to an instruction."
        raise RecipeError(
            Fault(
                where, "wording: task, but neither the rows nor the source name a task", fix, code="data.unknown_task"
            )
        )
    default = formats.FORMATS[format_name].wording
    if features.template_features or not default or isinstance(first_row.get("prompt"), list):
        default = "chat"
    wording = source.wording or default
    if wording == "chat" and not features.template_features:
        raise DataError(_explain_missing_template(recipe, source))
    return wording


def _explain_missing_template(recipe: Recipe, source: Source) -> Fault:
    """Return the fault of chats without a chat template to render them."""
    model = recipe.values["model"]["name_or_path"]
    problem = f"{source.name} has chats, but the tokenizer of {model} has no chat template"
    fix = (
        f"Set `tokenizer.chat_template: chatml`, set `wording` to {' or '.join(wordings.MULTI_TURN)}, "
        "or choose an -Instruct model."
    )
    return Fault(recipe.where(source.key), problem, fix, code="template.missing")
