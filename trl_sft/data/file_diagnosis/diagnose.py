"""One diagnosis of a data file, from its raw bytes: what it is, and the exact text to write where that differs.

Inputs: a file of a source. Outputs: faults, each with file and line. `check_head` reads a few kilobytes of each file
before it is read; `explain_file` reads the whole file after a reader failed, or where its columns fit no format.
Deliberately not here: reading rows (`trl_sft.data.load`), and what columns mean (`trl_sft.data.column_names`).
"""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any

import datasets

from trl_sft.console import format_rows
from trl_sft.data import column_names
from trl_sft.data.file_diagnosis import content, encodings, json_text, parquet_size, server_answers, table, text_rows
from trl_sft.data.file_diagnosis.encodings import EncodingCandidate
from trl_sft.data.file_diagnosis.json_text import make_place
from trl_sft.data.readers.data_file import CompressionError
from trl_sft.errors import Edit, Fault
from trl_sft.recipe import sections
from trl_sft.recipe.checked import Source
from trl_sft.recipe.yaml_reader import Key, Recipe, format_value

_MAX_BYTES = 256 << 20  # of a file that is explained; the text after it is not looked at
_TEXT_BUILDERS = ("json", "csv", "text")
# texts that YAML reads as texts without quotes, between the braces of a mapping
_PLAIN = re.compile(r"[^\W\d][\w./-]*(?: [\w./-]+)*")
_WORDS_OF_YAML = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}
_TEXT_ROW = re.compile(r"\s*\[?\s*\"")  # JSON whose first row is a text
_ENCODING_SAMPLE = 1 << 20  # bytes by which an encoding is decided


def check_head(recipe: Recipe, source: Source, file: Path) -> list[Fault]:
    """Return the faults of a file that its first bytes show: no data at all, or another encoding than UTF-8.

    Args:
        recipe: the recipe, for the text to write.
        source: the source that names the file.
        file: the file.

    """
    builder = source.builder or find_builder(file)
    try:
        head = content.read_head(file)
        foreign = content.find_foreign_content(file, builder, head, is_text=source.format == "text")
    except CompressionError as error:
        head, foreign = b"", content.describe_missing_decompressor(error)
    if builder == "parquet" and not foreign:
        cache = Path(source.load_kwargs.get("cache_dir") or datasets.config.HF_DATASETS_CACHE)
        foreign = parquet_size.find_large_rows(file, cache)
    if foreign:
        return [Fault(make_place(file.name), f"{file.name} {foreign.problem}", foreign.fix, code=foreign.code)]
    if builder not in _TEXT_BUILDERS or content.is_zip(head):
        return []
    is_strict = "encoding" not in source.load_kwargs and source.load_kwargs.get("encoding_errors") in (None, "strict")
    if is_strict and not _begins_as_utf8(head):
        # of a file with NUL bytes only the encoding and the first of them are said
        size = _ENCODING_SAMPLE if b"\0" in head else _MAX_BYTES
        return _explain_encoding(recipe, source, file, data=_read_data(file, size))
    if not is_strict and _is_misread_utf8(source, head):
        return [_explain_needless_encoding(recipe, source)]
    text = _decode_head(source, head)
    if builder == "text" and not source.format:
        return text_rows.find_rows(text, file.name)
    if builder == "json" and not (source.format or source.wording or source.rename):
        return _find_no_rows(file, text, is_whole=len(head) < content.HEAD)
    if builder == "csv":
        return table.find_json(text, file.name) or _explain_separator(recipe, source, file, text=text)
    return []


def explain_file(recipe: Recipe, source: Source, file: Path) -> list[Fault]:
    """Return the faults of a file that a reader refused; an empty list = none that its bytes show.

    Args:
        recipe: the recipe, for the text to write.
        source: the source that names the file.
        file: the file.

    """
    head_faults = check_head(recipe, source, file)
    if head_faults:
        return head_faults
    broken = content.find_compression_fault(file)
    if broken:
        return [Fault(make_place(file.name), f"{file.name} {broken.problem}", broken.fix, code=broken.code)]
    builder = source.builder or find_builder(file)
    if builder not in _TEXT_BUILDERS or content.is_zip(content.read_head(file)):
        return []
    data = _read_data(file)
    if source.load_kwargs.get("encoding_errors") in (None, "strict"):
        faults = _check_encoding(recipe, source, file, data=data)
        if faults:
            return faults
    text = data.decode(_encoding_of(source), errors="replace").removeprefix("\ufeff")
    if builder == "json" and "field" not in source.load_kwargs:
        return _explain_field(recipe, source, file) or json_text.find_faults(text, file.name)
    if builder == "csv":
        return _explain_table(recipe, source, file, text=text)
    return []


def _find_no_rows(file: Path, text: str, *, is_whole: bool) -> list[Fault]:
    """Return the fault of a JSON file that holds the answer of a server, or texts that hold rows."""
    if is_whole and (answer := server_answers.find_error_objects(text)):
        problem = f"{file.name} {answer.problem}"
        return [Fault(make_place(file.name), problem, answer.fix, code="data.other_content")]
    return text_rows.find_encoded_rows(text, file.name) if _TEXT_ROW.match(text) else []


def _decode_head(source: Source, head: bytes) -> str:
    """Return the whole lines at the beginning of a file as text."""
    text = head.decode(_encoding_of(source), errors="replace").removeprefix("\ufeff")
    lines = text.splitlines(keepends=True)
    return "".join(lines[:-1]) if len(head) == content.HEAD and len(lines) > 1 else text


def _encoding_of(source: Source) -> str:
    """Return the encoding with which a source is read, or UTF-8 where Python does not know it."""
    encoding = str(source.load_kwargs.get("encoding") or "utf-8")
    try:
        codecs.lookup(encoding)
    except (LookupError, ValueError):  # ValueError: a name with the character NUL
        return "utf-8"
    return encoding


def _begins_as_utf8(head: bytes) -> bool:
    """Tell whether the beginning of a file is UTF-8 without NUL bytes; its last character may be cut."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return "\0" not in text


def explain_columns(recipe: Recipe, source: Source, *, stored: bool = False) -> list[Fault]:
    """Return the faults of the files of a source whose columns fit no format: rows under a key.

    Args:
        recipe: the recipe, for the text to write.
        source: the source that names the files.
        stored: only the fault of a file that is one object of columns, whatever their names.

    """
    faults = []
    for file in source.location.files:
        if not file.is_file():
            continue
        if source.builder == "json" and "field" not in source.load_kwargs:
            faults += _explain_field(recipe, source, file, only_columns=stored)
        if faults:
            return faults
    return faults


def find_builder(file: Path) -> str:
    """Return the builder of `datasets` for the suffix of a file; "" = none."""
    for suffix in reversed(file.suffixes):
        if suffix.lower() in sections.BUILDERS:
            return sections.BUILDERS[suffix.lower()]
    return ""


def write_source(recipe: Recipe, source: Source, values: dict[str, Any]) -> str:
    """Return the entry of a source with further keys, as YAML on one line: `{path: rows.csv, encoding: gbk}`."""
    return write_value(read_entry(recipe, source) | values)


def read_entry(recipe: Recipe, source: Source) -> dict[str, Any]:
    """Return the entry of a source as the recipe has it; a path alone is a mapping with `path`."""
    entry: Any = recipe.values
    for part in source.key:
        entry = entry[part]
    return dict(entry) if isinstance(entry, dict) else {"path": entry}


def make_edits(recipe: Recipe, source: Source, values: dict[str, Any]) -> tuple[Edit, ...]:
    """Return the changes of a recipe that give a source further keys; a source that is a path becomes a mapping."""
    entry: Any = recipe.values
    for part in source.key:
        entry = entry[part]
    if isinstance(entry, dict):
        return tuple(Edit("set", (*source.key, name), value) for name, value in values.items())
    return (Edit("set", source.key, {"path": entry, **values}),)


def write_value(value: Any) -> str:
    """Return a mapping, a list or a scalar as YAML on one line, with quotes only where YAML needs them."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{write_value(key)}: {write_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _WORDS_OF_YAML:
        return value
    return format_value(value)


def _read_data(file: Path, size: int = _MAX_BYTES) -> bytes:
    """Return the bytes of a file, decompressed, up to so many."""
    with content.open_bytes(file) as data:
        return data.read(size)


def _cut_sample(data: bytes) -> bytes:
    """Return the beginning of a file up to the end of a line, or of a word where its first line is very long."""
    if len(data) <= _ENCODING_SAMPLE:
        return data
    sample = data[:_ENCODING_SAMPLE]
    end = sample.rfind(b"\n") + 1 or max(map(sample.rfind, (b'"', b",", b" "))) + 1
    return sample[:end] if end else sample


def _check_encoding(recipe: Recipe, source: Source, file: Path, *, data: bytes) -> list[Fault]:
    """Return the fault of a file that is not in the encoding with which it is read."""
    encoding = str(source.load_kwargs.get("encoding") or "utf-8")
    try:
        data.decode(encoding)
    except UnicodeDecodeError:
        return _explain_encoding(recipe, source, file, data=data)
    except LookupError:
        fix = "Name an encoding that Python knows: utf-8, gbk, cp1252, utf-16."
        where = recipe.where((*source.key, "encoding"))
        return [Fault(where, f"there is no encoding {encoding!r}", fix, code="data.wrong_encoding")]
    return []


def _explain_encoding(recipe: Recipe, source: Source, file: Path, *, data: bytes) -> list[Fault]:
    """Return the fault of a file whose encoding is not the one with which it is read."""
    encoding = str(source.load_kwargs.get("encoding") or "utf-8")
    if encoding == "utf-8" and b"\0" not in data and (offsets := encodings.find_broken_utf8(data)):
        return _explain_broken_utf8(file, data, offsets)
    position = _find_undecodable(data, encoding)
    sample = _cut_sample(data)
    candidates = encodings.find_candidates(sample)
    others_are_utf8 = any(_is_utf8_beyond_ascii(other) for other in source.location.files if other != file)
    if candidates and candidates[0].name == "utf-8":  # the key is wrong, not the file
        return [_explain_needless_encoding(recipe, source)]
    where = make_place(file.name, _line_of(data, position))
    value = data[position : position + 1].hex()
    problem = f"byte 0x{value} is not {_title(encoding)}"
    if candidates and candidates[0].name.startswith("utf"):
        problem = f"the file is not {_title(encoding)}"
    if not candidates and position < 0 and b"\0" in data:  # valid, apart from a byte that no text holds
        where = make_place(file.name, _line_of(data, data.index(0)))
        if not data.strip(b"\0\r\n"):
            problem = "the file holds NUL bytes (0x00) and no text: it was not written or copied as a whole"
            return [Fault(where, problem, "Copy or download the file again.", code="data.nul_byte")]
        return [Fault(where, "the line holds a NUL byte (0x00)", "Remove the byte.", code="data.nul_byte")]
    if not candidates:
        fix = "Save the file as UTF-8, or set `encoding` to the one that it was saved in."
        return [Fault(where, problem, fix, code="data.wrong_encoding")]
    problem += _describe_candidates(candidates)
    if others_are_utf8:
        entry = write_value({"path": file.name, "encoding": candidates[0].name})
        fix = (
            f"Save the file as UTF-8, like the other files of the source. Or name it as a source of its own: `{entry}`."
        )
        return [Fault(where, problem, fix, code="data.wrong_encoding")]
    fix = _offer(recipe, source, candidates)
    is_certain = len(candidates) == 1 and encodings.count_bytes(sample, 0x80) > encodings.FEW_BYTES
    edits = make_edits(recipe, source, {"encoding": candidates[0].name}) if is_certain else ()
    return [Fault(where, problem, fix, code="data.wrong_encoding", edits=edits)]


def _is_misread_utf8(source: Source, head: bytes) -> bool:
    """Tell whether a file begins as UTF-8, although the recipe names another encoding."""
    encoding = _encoding_of(source)
    if encoding.lower().replace("_", "-").startswith("utf") or not _begins_as_utf8(head):
        return False
    text = codecs.getincrementaldecoder("utf-8")().decode(head)
    return sum(character > "\x7f" for character in text) >= encodings.count_sure_characters(encoding)


def _explain_needless_encoding(recipe: Recipe, source: Source) -> Fault:
    """Return the fault of a recipe that names another encoding for a file of UTF-8."""
    key: Key = (*source.key, "encoding")
    problem = f"the file is UTF-8, not {source.load_kwargs['encoding']}"
    edits = (Edit("remove", key),)
    return Fault(recipe.where(key), problem, "Remove `encoding`.", code="data.wrong_encoding", edits=edits)


def _is_utf8_beyond_ascii(file: Path) -> bool:
    """Tell whether the beginning of a file is UTF-8 and has characters that other encodings write otherwise."""
    try:
        head = content.read_head(file)
    except (CompressionError, OSError):
        return False
    return not head.isascii() and _begins_as_utf8(head)


def _describe_candidates(candidates: list[EncodingCandidate]) -> str:
    """Return how the file reads in each encoding, as the end of a sentence."""
    readings = [f'in {candidate.title} the file reads "{candidate.sample}"' for candidate in candidates]
    return "; " + ", ".join(readings)


def _offer(recipe: Recipe, source: Source, candidates: list[EncodingCandidate]) -> str:
    """Return the instruction that offers one encoding, or two where both give plausible text."""
    entries = [f"`{write_source(recipe, source, {'encoding': candidate.name})}`" for candidate in candidates]
    if len(candidates) == 1:
        return f"Set `encoding: {candidates[0].name}` in the source: {entries[0]}. Or save the file as UTF-8."
    names = " or ".join(f"`encoding: {candidate.name}`" for candidate in candidates)
    return f"Set {names}, whichever reads right: {' or '.join(entries)}. Or save the file as UTF-8."


def _explain_broken_utf8(file: Path, data: bytes, offsets: list[int]) -> list[Fault]:
    """Return the faults of a file that is UTF-8 apart from a few bytes."""
    if offsets[-1] >= len(data) - 3 and len(offsets) == 1:
        where = make_place(file.name, _line_of(data, offsets[0]))
        problem = "the file ends in the middle of a character"
        return [Fault(where, problem, "Copy or download the file again.", code="data.truncated_file")]
    lines = _list_lines(data, offsets)
    shown = ", ".join(str(line) for line in lines[:5]) + (f" and {len(lines) - 5} more" if len(lines) > 5 else "")
    line = _cut_line(data, offsets[0])
    others = [candidate for candidate in encodings.find_candidates(line) if candidate.name != "utf-8"]
    reading = _describe_candidates(others).replace("the file reads", "that line reads") if others else ""
    problem = (
        f"the file is UTF-8, except line{'s' if len(lines) > 1 else ''} {shown}: byte 0x{data[offsets[0]]:02x} is not "
        f"UTF-8{reading}"
    )
    fix = "Save those lines as UTF-8. Parts of several encodings were probably joined into one file."
    return [Fault(make_place(file.name, lines[0]), problem, fix, code="data.wrong_encoding")]


def _list_lines(data: bytes, offsets: list[int]) -> list[int]:
    """Return the lines, from 1, of bytes in their order, each line once."""
    lines: list[int] = []
    number, begin = 1, 0
    for offset in offsets:
        number += len(re.findall(rb"\r\n|\n|\r", data[begin:offset]))
        begin = offset
        if not lines or lines[-1] != number:
            lines.append(number)
    return lines


def _cut_line(data: bytes, position: int) -> bytes:
    """Return the line of a file around a position."""
    begin = max(data.rfind(b"\n", 0, position), data.rfind(b"\r", 0, position)) + 1
    end = data.find(b"\n", position)
    return data[begin : end if end >= 0 else len(data)]


def _find_undecodable(data: bytes, encoding: str) -> int:
    """Return the position of the first byte that is not in an encoding; -1 = all bytes are."""
    try:
        data.decode(encoding)
    except UnicodeDecodeError as error:
        return error.start
    return -1


def _line_of(data: bytes, position: int) -> int:
    """Return the line, from 1, of a byte, as an editor counts lines."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return 1
    return len(re.findall(rb"\r\n|\n|\r", data[:position])) + 1


def _title(encoding: str) -> str:
    """Return the name of an encoding in messages."""
    return "UTF-8" if encoding == "utf-8" else encoding


def _explain_table(recipe: Recipe, source: Source, file: Path, *, text: str) -> list[Fault]:
    """Return the faults of a CSV file."""
    faults = _explain_separator(recipe, source, file, text=text)
    if faults:
        return faults
    separator = str(source.load_kwargs.get("sep") or source.load_kwargs.get("delimiter") or ",")
    if len(separator) > 1:  # a regular expression of pandas
        return []
    return table.find_faults(text, file.name, separator, quote=str(source.load_kwargs.get("quotechar") or '"'))


def _explain_separator(recipe: Recipe, source: Source, file: Path, *, text: str) -> list[Fault]:
    """Return the fault of a table that is read with another separator than it has."""
    if "dialect" in source.load_kwargs:  # it says what separates the cells
        return []
    declared = table.find_declared_separator(text)
    if declared and not {"skiprows", "header", "names", "column_names"} & set(source.load_kwargs):
        values = {"sep": declared, "skiprows": 1}
        problem = f"the first line only declares the separator, for Excel: sep={declared}"
        fix = f"Set `sep` and `skiprows: 1` in the source: `{write_source(recipe, source, values)}`."
        edits = make_edits(recipe, source, values)
        return [Fault(make_place(file.name, 1), problem, fix, code="data.wrong_separator", edits=edits)]
    separator = str(source.load_kwargs.get("sep") or source.load_kwargs.get("delimiter") or ",")
    if fault := _explain_title(recipe, source, file, text=text, separator=separator):
        return [fault]
    better = table.find_separator(text, separator) if len(separator) == 1 else ""
    if not better:
        return []
    header = json_text.split_lines(text)[0][:60]
    key = "delimiter" if "delimiter" in source.load_kwargs else "sep"
    value = json.dumps(better, ensure_ascii=False)
    problem = (
        f"the cells are separated by {table.describe_separator(better)}, and the file is read with "
        f"{table.describe_separator(separator)}: {header!r} is one column"
    )
    entry = write_source(recipe, source, {key: better})
    fix = f"Set `{key}: {value}` in the source: `{entry}`."
    edits = make_edits(recipe, source, {key: better})
    return [Fault(make_place(file.name, 1), problem, fix, code="data.wrong_separator", edits=edits)]


def _explain_title(recipe: Recipe, source: Source, file: Path, *, text: str, separator: str) -> Fault | None:
    """Return the fault of a table with lines before its header; None = it begins with its header."""
    keys = {"skiprows", "header", "names", "column_names", "comment"}
    if len(separator) != 1 or keys & set(source.load_kwargs):
        return None
    separators = dict.fromkeys([separator, *table.SEPARATORS])
    numbers = {candidate: table.count_lines_before_header(text, candidate) for candidate in separators}
    best = next((candidate for candidate, number in numbers.items() if number), "")
    if not best:
        return None
    number, lines = numbers[best], json_text.split_lines(text)
    problem = f"the header is in line {number + 1} ({lines[number][:60]}); before it stands {lines[0][:60]!r}"
    values = {"skiprows": number} | ({} if best == separator else {"sep": best})
    keys_to_set = " and ".join(f"`{key}: {write_value(value)}`" for key, value in values.items())
    fix = f"Set {keys_to_set} in the source: `{write_source(recipe, source, values)}`."
    edits = make_edits(recipe, source, values)
    return Fault(make_place(file.name, 1), problem, fix, code="data.invalid_table", edits=edits)


def _explain_field(recipe: Recipe, source: Source, file: Path, *, only_columns: bool = False) -> list[Fault]:
    """Return the fault of a JSON file that is one object with its rows under a key."""
    text = _read_data(file).decode(_encoding_of(source), errors="replace")
    try:
        value = json.loads(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError):
        return []
    if not isinstance(value, dict) or column_names.list_token_columns(value, value):
        return []
    field = "" if only_columns else json_text.find_row_key(value)
    if field:
        problem = f"the file is one object, whose key {field} holds {format_rows(len(value[field]))}"
        others = [key for key in json_text.list_row_keys(value) if key != field]
        if others:
            problem += (
                f"; {' and '.join(others)} {'hold' if len(others) > 1 else 'holds'} rows too, and would not be read"
            )
        entry = write_source(recipe, source, {"field": field})
        fix = f"Set `field: {write_value(field)}` in the source: `{entry}`."
        edits = make_edits(recipe, source, {"field": field})
        return [Fault(make_place(file.name), problem, fix, code="data.rows_under_key", edits=edits)]
    is_no_row = json_text.has_ids(value) or json_text.has_nested_rows(value)
    if json_text.has_columns(value) or (not only_columns and is_no_row):
        problem, fix = json_text.explain_no_rows(value, file.name)
        return [Fault(make_place(file.name), problem, fix, code="data.not_rows")]
    return []
