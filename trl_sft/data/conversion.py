"""What `datasets.map` calls: a batch of rows becomes a batch of TRL's forms, with notes on what was found.

In: columns as datasets read them, and how to format. Out: columns in TRL's form; beside them columns whose
names begin with _, which `take_notes` takes off again. Here too: the user's own function.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.compute as pc
from datasets import Dataset, Features, Json, List, Value
from datasets.fingerprint import Hasher

from trl_sft.data import formats, messages, text_files
from trl_sft.data.code_digest import digest_code, get_fingerprint
from trl_sft.errors import DataError, Fault, first_line
from trl_sft.recipe.paths import FunctionLocation

_AS_TEXT, _UNUSED, _ANSWERS, _ESCAPED = "_as_text", "_unused", "_answers", "_escaped"
_NOTES = {_AS_TEXT: Value("string"), _UNUSED: Value("string"), _ANSWERS: Value("int32"), _ESCAPED: Value("bool")}
# Formatting code that changed must not meet rows formatted by the old one in datasets' cache.
CODE = digest_code(Path(__file__).parent)


class SourceFormat(NamedTuple):
    """How the rows of one source are formatted."""

    layout: str
    wording: str | dict[str, str]
    target: formats.TokenizerFeatures
    name: str  # of the source, for messages
    code: FunctionLocation | None  # the user's function


class Notes(NamedTuple):
    """Formatted rows, and what is said once of all of them."""

    rows: Dataset
    as_text: set[str]  # what became text because the template does not render it
    unused: set[str]  # keys of turns, and columns of the user's function, that nothing reads
    several: bool  # whether some chat holds an earlier answer
    escaped: bool  # whether some row holds special strings that are plain text


def features() -> Features:
    """Return the columns of rows that are chats.

    A struct of Arrow has the keys of all rows, null where one lacks it, and a template would print them: so
    messages are stored as JSON.
    """
    chat = {"prompt": List(Json()), "completion": List(Json()), "tools": Value("string"), "task": Value("string")}
    return Features(chat | {messages.UNTRAINED: List(Value("int32"))} | _NOTES)


def fingerprint(rows: Dataset, how: SourceFormat) -> str:
    """Return under which name datasets caches the formatted rows.

    The user's function counts with every module that came along when it was imported: the hash that
    datasets would make knows neither.
    """
    return str(Hasher.hash([get_fingerprint(rows), CODE, how, _came_along(how.code) if how.code else []]))


def convert(
    batch: Mapping[str, list[Any]],
    indices: list[int],
    how: SourceFormat,
    types: Features,
    numbers: Sequence[int] | None = None,
) -> dict[str, list[Any]]:
    """Format one batch of columns, whose features are `types`. Raises DataError with the faulty rows.

    `numbers` are those of the rows in their source, where these are not all of it.
    """
    forms: list[dict[str, Any]] = []
    faults: list[Fault] = []
    nested = {column for column, kind in types.items() if not isinstance(kind, Value | Json)}
    given = {
        column: [_less_nulls(value, types[column]) for value in values] if column in nested else values
        for column, values in dict(batch.items()).items()
    }
    for n, index in enumerate(indices):
        row = {column: values[n] for column, values in given.items()}
        try:
            forms.append(_formed(columns(how.code, row) if how.code else row, how))
        except messages.FormatError as bad:
            number = index if numbers is None else int(numbers[index])
            faults.append(Fault(f"{how.name} row {number + 1}", bad.problem, bad.fix))
    if len(faults) > text_files.MAX_SHOWN:
        rest = f"{len(faults) - text_files.MAX_SHOWN} more faulty rows among rows {indices[0] + 1} to {indices[-1] + 1}"
        faults[text_files.MAX_SHOWN :] = [Fault(how.name, rest, "the same for each")]
    if faults:
        raise DataError(faults)
    return {column: [form[column] for form in forms] for column in forms[0]}


def take_notes(rows: Dataset) -> Notes:
    """Return the rows without the columns of notes, and what those say together."""

    def words(column: str) -> set[str]:
        return {word for text in rows.unique(column) for word in text.split(", ") if word}

    several = (pc.max(rows.data[_ANSWERS]).as_py() or 0) > 0
    escaped = bool(pc.any(rows.data[_ESCAPED]).as_py())
    return Notes(rows.remove_columns(list(_NOTES)), words(_AS_TEXT), words(_UNUSED), several, escaped)


@functools.cache
def function(code: FunctionLocation) -> Callable[[Mapping[str, Any]], Any]:
    """Return the user's formatting function. Raises whatever importing it raises, AttributeError, TypeError."""
    if str(code.root) not in sys.path:
        sys.path.append(str(code.root))  # last, so that a file of the user's hides no package
    if code.as_module:
        module = importlib.import_module(code.module)
    else:  # by its file, so that one named like a module of Python's is still the user's
        name = f"trl_sft_format_{code.module}"
        spec = importlib.util.spec_from_file_location(name, code.file)
        assert spec is not None, code.file
        assert spec.loader is not None, code.file
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    found = getattr(module, code.name, None)
    if found is None:
        raise AttributeError(f"{code.file.name} has no {code.name}")
    if not callable(found):
        raise TypeError(f"{code.name} is {type(found).__name__}, no function")
    return found  # type: ignore[no-any-return]


def columns(code: FunctionLocation, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the user's function makes of a row. Raises FormatError for whatever it raises or wrongly returns."""
    try:
        made = function(code)(row)
    except (Exception, SystemExit) as error:
        raise messages.FormatError(
            f"{code.name} raised {type(error).__name__}: {first_line(error)}", "a mend in it"
        ) from None
    if isinstance(made, str):
        return {"text": made}
    if not isinstance(made, Mapping):
        write = "a mapping with messages, with prompt and completion, or another format's columns; or a text"
        raise messages.FormatError(f"{code.name} returned {type(made).__name__}", write)
    media = sorted(set(messages.MEDIA) & set(made))
    if media:
        raise messages.FormatError(f"{code.name} returned {media[0]}: this version trains on text alone", "text alone")
    return dict(made)


def _formed(row: dict[str, Any], how: SourceFormat) -> dict[str, Any]:
    """Return one row's columns in TRL's form, and its notes."""
    held = _special(row, how)
    if held:
        row = messages.escaped(row, messages.special_pattern(how.target.special_tokens))
    formed = formats.form(row, how.layout, how.wording, how.target)
    layout = formats.LAYOUTS.get(how.layout)
    read = {*layout.columns, *layout.optional} if layout else set(row)
    unused = messages.unused({column: row[column] for column in read & set(row)})
    unused |= set(row) - read - {formats.LABEL} if how.code else set()
    prompt = formed.columns.get("prompt")
    answers = sum(turn["role"] == "assistant" for turn in prompt) if isinstance(prompt, list) else 0
    notes = {_AS_TEXT: ", ".join(sorted(formed.as_text)), _UNUSED: ", ".join(sorted(unused)), _ANSWERS: answers}
    label = how.target.task or row.get(formats.LABEL)
    task = {formats.LABEL: label if isinstance(label, str) and label else None}
    return formed.columns | task | notes | {_ESCAPED: held}


def _special(row: Mapping[str, Any], how: SourceFormat) -> bool:
    """Tell whether a row's texts hold special strings of the tokenizer; raises FormatError where that is refused.

    Texts that are trained as they stand are not asked: their author may have written the template's tokens.
    """
    as_it_stands = how.layout == "text" or (how.layout == "prompt_completion" and how.wording == "plain")
    if as_it_stands or not how.target.special_tokens:
        return False
    pattern = messages.special_pattern(how.target.special_tokens)
    found = next((match for text in messages.strings(row) if (match := pattern.search(text))), None)
    if found and not how.target.escape_special_tokens:
        write = "data.special_tokens_in_text: text, to train it letter by letter; or a row without it"
        raise messages.FormatError(f"{found[0]} stands in the text, and is a special token of this tokenizer", write)
    return found is not None


def _came_along(code: FunctionLocation) -> list[str]:
    """Return the digests of the modules that were loaded from the folder of the user's function."""
    files = {Path(str(file)) for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))}
    near = [f for f in files if f.is_relative_to(code.root) and "site-packages" not in f.parts and f.is_file()]
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted({*near, code.file})]


def _less_nulls(value: Any, kind: Any) -> Any:
    """Return a value without the nulls that Arrow put into its structs; what JSON holds stays as it is written."""
    if isinstance(kind, dict) and isinstance(value, Mapping):
        return {name: _less_nulls(value[name], kind[name]) for name in kind if value.get(name) is not None}
    inner = kind[0] if isinstance(kind, list) else getattr(kind, "feature", None)
    if inner is not None and isinstance(value, list):
        return [_less_nulls(item, inner) for item in value]
    return value
