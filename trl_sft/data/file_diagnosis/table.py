"""What is wrong with a text that should be a table: CSV or TSV.

Inputs: the text of a file and the separator that it is read with. Outputs: faults with file and line, as an editor
counts lines, and the separator that fits. Deliberately not here: encodings (`encodings`), and what the columns mean.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Sequence

from trl_sft.data import column_names, formats
from trl_sft.data.file_diagnosis import json_text
from trl_sft.data.file_diagnosis.json_text import make_place
from trl_sft.errors import Fault

SEPARATORS = (",", ";", "\t", "|", "，", "；", "^", "~", ":")
_TITLES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars", ":": "colons"}
_JSON = re.compile(r"\s*(\{\s*[\"}]|\[\s*[{\"\]])")
_DECLARATION = re.compile(r'"?sep=([^\r\n"])"?\r?\n', re.IGNORECASE)
SAMPLE_RECORDS = 20  # records by which a separator is judged
_MAX_TITLE_LINES = 5  # before the header of a table
_NAME = re.compile(r"[^\W\d][\w.-]*")  # a column, as programs name it
_HEADER_CELL = re.compile(r"[\w .-]{1,40}")
_MAX_CELL = 1 << 30  # characters; the standard library stops at 131,072


def find_separator(text: str, separator: str) -> str:
    """Return the separator that a table really has; "" = the one that it is read with, or none is better.

    Args:
        text: the beginning of the file.
        separator: the one that it is read with.

    """
    header = read_records(text, separator, 1)
    if header and len(header[0]) > 1:
        return ""
    best, best_width = "", 1
    for candidate in SEPARATORS:
        if candidate == separator:
            continue
        widths = Counter(len(record) for record in read_records(text, candidate, SAMPLE_RECORDS) if record)
        if not widths:
            continue
        width, number = widths.most_common(1)[0]
        header_width = len(read_records(text, candidate, 1)[0])
        if header_width > best_width and width == header_width and number >= 0.8 * sum(widths.values()):
            best, best_width = candidate, header_width
    return best


def find_declared_separator(text: str) -> str:
    """Return the separator that the first line declares, as Excel reads it (`sep=;`); "" = there is no such line."""
    match = _DECLARATION.match(text)
    return match[1] if match else ""


def count_lines_before_header(text: str, separator: str) -> int:
    """Return the number of lines before the header of a table: a title, a comment; 0 = it begins with its header.

    Args:
        text: the beginning of the file.
        separator: what stands between cells.

    """
    lines = json_text.split_lines(text)
    records = read_records(text, separator, SAMPLE_RECORDS)
    is_title = [len(record) == 1 or record[0].lstrip().startswith("#") for record in records]
    number = next((number for number, title in enumerate(is_title) if not title), 0)
    table = records[number:]
    is_table = len(table) > 1 and {len(record) for record in table} == {len(table[0])}
    if not number or number > _MAX_TITLE_LINES or not is_table or not names_columns(table[0]):
        return 0
    filled = [line for line, text in enumerate(lines) if text.strip()]
    return filled[number] if number < len(filled) else 0


def names_columns(cells: Sequence[str]) -> bool:
    """Tell whether cells are a header: names of the field, or names as programs write them."""
    header = [cell.strip() for cell in cells]
    if not all(map(_HEADER_CELL.fullmatch, header)) or len(set(header)) < len(header):
        return False
    return has_known_names(cells) or all(map(_NAME.fullmatch, cells))


def has_known_names(cells: Sequence[str]) -> bool:
    """Tell whether the cells of a header are names of the field: question, answer."""
    header = [cell.strip() for cell in cells]
    suggestion = column_names.suggest_format(header)
    return bool(formats.recognise(header)) or (suggestion is not None and suggestion.is_known)


def describe_separator(separator: str) -> str:
    """Return the name of a separator in messages."""
    return _TITLES.get(separator, repr(separator))


def find_json(text: str, file_name: str) -> list[Fault]:
    """Return the fault of a table that holds JSON, by its beginning."""
    if not _JSON.match(text):
        return []
    problem = "the file holds JSON, not CSV"
    fix = f"Rename the file to {file_name.partition('.')[0]}.jsonl."
    return [Fault(make_place(file_name, 1), problem, fix, code="data.other_content")]


def find_faults(text: str, file_name: str, separator: str, *, quote: str = '"') -> list[Fault]:
    """Return the faults of a table, at most `json_text.MAX_SHOWN`: long records, an open quote.

    Args:
        text: the text of the file, without a byte order mark.
        file_name: the name of the file, for the place of a fault.
        separator: what stands between cells.
        quote: what encloses a cell that holds a separator or a line break.

    """
    if not text.strip():
        problem = "the file has only empty lines"
        return [Fault(make_place(file_name), problem, "Name a file that has rows.", code="data.no_rows")]
    if faults := find_json(text, file_name):
        return faults
    old_limit = csv.field_size_limit(_MAX_CELL)
    try:
        return _find_record_faults(text, file_name, separator, quote=quote)
    finally:
        csv.field_size_limit(old_limit)


def _find_record_faults(text: str, file_name: str, separator: str, *, quote: str) -> list[Fault]:
    """Return the faults of the records of a table."""
    faults: list[Fault] = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quotechar=quote, strict=False)
    header: list[str] = []
    begin = 1
    record: list[str] = []
    for record in reader:
        if record and not header:
            header = record
        elif record and len(record) > len(header):
            problem = f"the row has {len(record)} cells, and the header has {len(header)}"
            fix = f'Enclose a cell that holds {describe_separator(separator)} in quotes: "...".'
            if quote == '"' and record[0].lstrip().startswith("'"):
                fix = f"If ' encloses cells in this file, set `quotechar: \"'\"` in the source. Else e{fix[1:]}"
            faults.append(Fault(make_place(file_name, begin), problem, fix, code="data.invalid_table"))
        last_begin, begin = begin, reader.line_num + 1
        if len(faults) >= json_text.MAX_SHOWN:
            return faults
    if record and _ends_open(text, quote) and "\n" in record[-1]:
        problem = "a quote is opened in this row and never closed, so the rest of the file is one cell"
        fix = (
            f"Close the quote, or write {quote}{quote} for a quote inside a cell. "
            "Or set `quoting: 3` if quotes have no meaning."
        )
        faults.append(Fault(make_place(file_name, last_begin), problem, fix, code="data.invalid_table"))
    return faults


def _ends_open(text: str, quote: str) -> bool:
    """Tell whether a table ends inside a quoted cell."""
    return text.count(quote) % 2 == 1


def read_records(text: str, separator: str, number: int) -> list[list[str]]:
    """Return the first records of a table that are not empty."""
    records = []
    old_limit = csv.field_size_limit(_MAX_CELL)
    try:
        for record in csv.reader(io.StringIO(text, newline=""), delimiter=separator):
            if record:
                records.append(record)
            if len(records) >= number:
                break
    except csv.Error:
        pass
    finally:
        csv.field_size_limit(old_limit)
    return records
