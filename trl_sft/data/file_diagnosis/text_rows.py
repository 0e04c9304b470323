"""Rows that stand in a file as text: JSON or a table in a text file, and rows of JSON that were encoded twice.

Inputs: the text at the beginning of a file. Outputs: the fault of a file that would be trained as it stands although it
holds rows; `format: text` in the source accepts it. Deliberately not here: what is wrong with the rows (`json_text`,
`table`).
"""

from __future__ import annotations

import csv
import json
import re

from trl_sft.data.file_diagnosis import table
from trl_sft.data.file_diagnosis.json_text import is_json, make_place, split_lines
from trl_sft.errors import Fault

_ACCEPT = "If the lines are the text, set `format: text`."
_TEXT_SUFFIX = re.compile(r"\.(txt|md)(?=\.|$)", re.IGNORECASE)
_KEY_OF_JSON = re.compile(r"(\[\s*)?\{\s*\"[^\"\n]{1,60}\"\s*:")
_KEY_OF_PYTHON = re.compile(r"(\[\s*)?\{\s*'[^'\n]{1,60}'\s*:")
_FEW_RECORDS = 3  # a header of unknown names and two rows
_TSV = {"\t": ".tsv"}  # separator -> the suffix of such files, where it is not .csv


def find_rows(text: str, file_name: str) -> list[Fault]:
    """Return the fault of a text file that holds rows: JSON, Python values or a table.

    Args:
        text: the whole lines at the beginning of the file.
        file_name: the name of the file.

    """
    lines = [line for line in split_lines(text) if line.strip()]
    if not lines:
        return []
    if all(line.lstrip().startswith("{") and is_json(line, dict) for line in lines):
        return [_make_fault("each line is a JSON object", file_name, suffix=".jsonl")]
    start = text.lstrip()
    if _KEY_OF_JSON.match(start):
        suffix = ".json" if start.startswith("[") or len(lines[0].strip()) == 1 else ".jsonl"
        return [_make_fault("the file holds JSON objects", file_name, suffix=suffix)]
    if _KEY_OF_PYTHON.match(start):
        problem = "the file holds Python values (repr), and a text file is trained as it stands"
        fix = f"Write each row into a .jsonl file with `json.dumps(row, ensure_ascii=False)`. {_ACCEPT}"
        return [Fault(make_place(file_name, 1), problem, fix, code="data.other_content")]
    return _find_table(text, file_name)


def find_encoded_rows(text: str, file_name: str) -> list[Fault]:
    """Return the fault of a JSON file whose rows are texts that hold JSON objects: they were encoded twice.

    Args:
        text: the beginning of the file.
        file_name: the name of the file.

    """
    start = re.sub(r"^\s*\[?\s*", "", text)
    if not start.startswith('"'):
        return []
    try:
        value, _ = json.JSONDecoder().raw_decode(start)
    except ValueError:
        return []
    if not value.lstrip().startswith("{") or not is_json(value, dict):
        return []
    problem = "the row is a text that holds a JSON object: it was encoded twice, and would be trained as that text"
    fix = "Write the object itself: `json.dumps(row)` once. If the texts are what to train, set `format: text`."
    return [Fault(make_place(file_name, 1), problem, fix, code="data.other_content")]


def _make_fault(content: str, file_name: str, *, suffix: str, keys: str = "") -> Fault:
    """Return the fault of a text file that holds rows; `keys`: what the source needs beside the new name."""
    problem = f"{content}, and a text file is trained as it stands"
    name = _TEXT_SUFFIX.sub("", file_name)
    if not name.lower().removesuffix(".gz").endswith(suffix):  # not rows.jsonl.txt
        name = _TEXT_SUFFIX.sub(suffix, file_name)
    fix = f"Rename the file to {name}{keys}. {_ACCEPT}"
    return Fault(make_place(file_name, 1), problem, fix, code="data.other_content")


def _find_table(text: str, file_name: str) -> list[Fault]:
    """Return the fault of a text file that is a table: lines of as many cells as the header, or as each other."""
    first_line = text.lstrip().partition("\n")[0]
    for separator in filter(first_line.__contains__, ("\t", ",", ";", "|")):
        try:
            records = table.read_records(text, separator, table.SAMPLE_RECORDS)
        except csv.Error:
            continue
        if not _is_table(records, separator):
            continue
        names = ", ".join(cell.strip() for cell in records[0])
        content = f"the file is a table, whose cells are separated by {table.describe_separator(separator)} ({names})"
        suffix = _TSV.get(separator, ".csv")
        keys = "" if separator in "\t," else f' and set `sep: "{separator}"` in the source'
        return [_make_fault(content, file_name, suffix=suffix, keys=keys)]
    return []


def _is_table(records: list[list[str]], separator: str) -> bool:
    """Tell whether records are those of a table, by their widths and by what the first one holds."""
    if len(records) < 2 or len(records[0]) < 2 or {len(record) for record in records} != {len(records[0])}:
        return False
    header = [cell.strip() for cell in records[0]]
    if not all(header):
        return False
    if separator == "\t" and len(records) >= _FEW_RECORDS:  # no text has a tab at the same place of each line
        return True
    has_names = table.names_columns(records[0])
    return has_names and (len(records) >= _FEW_RECORDS or table.has_known_names(records[0]))
