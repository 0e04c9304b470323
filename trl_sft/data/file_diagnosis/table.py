"""What is wrong with a text that should be a table: CSV or TSV.

Inputs: the text of a file and the separator that it is read with. Outputs: faults with file and line, as an editor
counts lines, and the separator that fits. Deliberately not here: encodings (`encodings`), and what the columns mean.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter

from trl_sft.data.file_diagnosis import json_text
from trl_sft.data.file_diagnosis.json_text import make_place
from trl_sft.errors import Fault

SEPARATORS = (",", ";", "\t", "|", "，", "；", "^", "~", ":")
_TITLES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars", ":": "colons"}
_JSON = re.compile(r"\s*(\{\s*[\"}]|\[\s*[{\"\]])")
_DECLARATION = re.compile(r'"?sep=([^\r\n"])"?\r?\n', re.IGNORECASE)
SAMPLE_RECORDS = 20  # records by which a separator is judged
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
