"""What is wrong with a text that should be JSON: one object in each line, or a list of objects.

Inputs: the text of a file. Outputs: faults with file and line, as an editor counts lines, each with the exact change.
Deliberately not here: encodings (`encodings`), and what the columns mean.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from trl_sft.console import format_rows
from trl_sft.data.file_diagnosis.json_mistakes import (
    ONE_PER_LINE,
    JsonMistake,
    begins_as_json,
    explain_mistake,
    find_parse_error,
)
from trl_sft.errors import Fault, Place

MAX_SHOWN = 5  # faulty lines that are named one by one
_LINE_END = re.compile(r"\r\n|\n|\r")  # what editors count; str.splitlines also ends lines at U+2028 and others
_SURROGATE = re.compile(r"(?<!\\)(?:\\\\)*(\\u[dD][89a-fA-F][0-9a-fA-F]{2})")
_TURN_KEYS = {"role", "from", "speaker", "author", "sender"}
_MAX_LOCATED = 50  # objects whose lines are compared
_NOT_BLANK = re.compile(r"\S")
_MIN_HEADER_CELLS = 2
_HEADER_CELL = re.compile(r"\"?[\w .-]{1,40}\"?")
_MAX_JOINED = 50  # lines over which an open text is followed
_EXCERPT = 30  # characters before a mistake that are shown
_SHOWN_DEPTH = 100  # levels of a value that is nested too deeply, where its line is shown
_TEXTS_AND_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]')


class RepeatedKey(ValueError):
    """An object has a key twice; the text of the exception is the key."""


def make_place(file_name: str, line: int | None = None) -> Place:
    """Return the place of a fault in a data file; without a line it is the file as a whole."""
    return Place(file_name if line is None else f"{file_name}:{line}", file=file_name, line=line)


def split_lines(text: str) -> list[str]:
    """Return the lines of a text as an editor counts them: they end with LF, CRLF or CR."""
    return _LINE_END.split(text)


def count_lines(text: str, position: int) -> int:
    """Return the line, from 1, in which a position of a text is."""
    return len(_LINE_END.findall(text, 0, position)) + 1


def find_faults(text: str, file_name: str) -> list[Fault]:
    """Return the faults of a JSON file, at most `MAX_SHOWN` and one that counts the others.

    Args:
        text: the text of the file, without a byte order mark.
        file_name: the name of the file, for the place of a fault.

    """
    start = text.lstrip()
    if not start:
        problem = "the file has only empty lines"
        return [Fault(make_place(file_name), problem, "Name a file that has rows.", code="data.no_rows")]
    is_list = start.startswith("[") and begins_as_json(start)
    faults = _find_list_faults(text, file_name) if is_list else _find_line_faults(text, file_name)
    return faults or _find_value_faults(text, file_name)


def check_objects(text: str) -> None:
    """Refuse a JSON text in which an object has a key twice. Raises RepeatedKey, ValueError."""
    json.loads(text, object_pairs_hook=_refuse_repeated)


def _refuse_repeated(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; raise RepeatedKey if it has a key twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise RepeatedKey(next(key for key, number in counts.items() if number > 1))
    return values


def _find_list_faults(text: str, file_name: str) -> list[Fault]:
    """Return the fault of a file that is one list."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        lines = [line for line in split_lines(text) if line.strip()]
        if len(lines) > 1 and all(is_json(line, list) for line in lines[:MAX_SHOWN]):
            problem = "each line is a list, and lists have no column names"
            fix = f"Write each line as an object with names, as in {_name_columns(json.loads(lines[0]))}."
            return [Fault(make_place(file_name, 1), problem, fix, code="data.not_rows")]
        return [_make_fault(explain_mistake(text, error), text, file_name)]
    except RecursionError:
        return [_explain_nesting(text, file_name)]
    except ValueError:
        mistake = find_parse_error(text)
        return [_make_fault(explain_mistake(text, mistake), text, file_name)] if mistake else []
    return _find_item_faults(value, file_name)


def _find_item_faults(value: list[Any], file_name: str) -> list[Fault]:
    """Return the fault of a list whose items are no objects; a list of texts is read as documents."""
    kinds = {type(item).__name__ for item in value}
    if not value:
        return [Fault(make_place(file_name), "the list is empty", "Name a file that has rows.", code="data.no_rows")]
    if kinds <= {"dict"} or kinds == {"str"}:
        return []
    number, item = next((n, item) for n, item in enumerate(value, 1) if not isinstance(item, dict))
    problem = f"row {number} is {json.dumps(item, ensure_ascii=False)[:40]}, not an object"
    fix = f"Write each row as an object with names, as in {_name_columns(item)}."
    return [Fault(make_place(file_name), problem, fix, code="data.not_rows")]


def _name_columns(row: Any) -> str:
    """Return how a row without names is written as an object: as a chat where it is a list of turns."""
    is_chat = isinstance(row, list) and row and all(isinstance(turn, dict) and _TURN_KEYS & set(turn) for turn in row)
    return '{"messages": [...]}' if is_chat else '{"prompt": ..., "completion": ...}'


def _find_line_faults(text: str, file_name: str) -> list[Fault]:
    """Return the faults of a file that should have one object in each line."""
    lines = split_lines(text)
    filled = [number for number, line in enumerate(lines) if line.strip()]
    broken = [(number, error) for number in filled if (error := find_parse_error(lines[number])) is not None]
    if not broken:
        return [fault for number in filled if (fault := _check_row(lines[number], number, file_name))][:MAX_SHOWN]
    whole = _explain_whole(text, file_name, first_is_broken=broken[0][0] == filled[0])
    if whole:
        return [whole]
    table = _explain_table(lines[filled[0]], file_name)
    if table and broken[0][0] == filled[0]:
        return [table]
    if (mistake := _explain_open_text(lines, broken)) is not None:
        return [_make_fault(mistake, lines[broken[0][0]], file_name, lines_before=broken[0][0])]
    faults = []
    for number, error in broken[:MAX_SHOWN]:
        mistake = explain_mistake(lines[number], error, is_last=number == filled[-1])
        faults.append(_make_fault(mistake, lines[number], file_name, lines_before=number))
    if len(broken) > MAX_SHOWN:
        more = len(broken) - MAX_SHOWN
        problem = f"{more} more {'line is' if more == 1 else 'lines are'} not JSON"
        fix = "Correct them in the same way."
        faults.append(Fault(make_place(file_name), problem, fix, code="data.more_faulty_rows"))
    return faults


def _explain_table(line: str, file_name: str) -> Fault | None:
    """Return the fault of a file that is CSV by its first line; None = the line does not look like a header."""
    cells = re.split(r"[,;\t|]", line.strip())
    if len(cells) < _MIN_HEADER_CELLS or not all(_HEADER_CELL.fullmatch(cell.strip()) for cell in cells):
        return None
    name = file_name.partition(".")[0]
    problem = "the file holds a table (CSV), not JSON"
    return Fault(make_place(file_name, 1), problem, f"Rename the file to {name}.csv.", code="data.other_content")


def _explain_open_text(lines: Sequence[str], broken: Sequence[tuple[int, json.JSONDecodeError]]) -> JsonMistake | None:
    """Return the mistake of a text that goes on in the next lines; None = the first broken line has another one."""
    number, error = broken[0]
    if not error.msg.startswith("Unterminated string"):
        return None
    for end in range(number + 2, min(number + _MAX_JOINED, len(lines)) + 1):
        try:
            json.loads("\n".join(lines[number:end]), strict=False)
        except ValueError:
            continue
        problem = "a text goes on in the next line"
        return JsonMistake(error.pos, problem, r"Write a line break in a text as \n, as `json.dumps` does.")
    return None


def _explain_whole(text: str, file_name: str, *, first_is_broken: bool) -> Fault | None:
    """Return the fault of a file whose objects are not one in each line; None = its lines are looked at one by one."""
    values = _decode_values(text)
    if not values:
        return None
    if len(values) == 1:
        return _explain_object(values[0][1], file_name)
    lines = [count_lines(text, position) for position, _ in values[:_MAX_LOCATED]]
    same_line = next((line for line, following in itertools.pairwise(lines) if line == following), 0)
    fix = f"{ONE_PER_LINE} `jq -c . {file_name} > lines.jsonl` does that."
    if same_line:
        where = make_place(file_name, same_line)
        return Fault(where, "the line holds several objects", fix, code="data.invalid_json")
    if not first_is_broken:
        return None
    problem = f"the file holds {len(values):,} objects one after another, and they are not one in each line"
    return Fault(make_place(file_name, lines[0]), problem, fix, code="data.invalid_json")


def _decode_values(text: str) -> list[tuple[int, Any]]:
    """Return position and value of each JSON value of a text; an empty list if something in it is not JSON."""
    decoder = json.JSONDecoder()
    values: list[tuple[int, Any]] = []
    position = _skip_blank(text, 0)
    while position < len(text):
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            return []
        values.append((position, value))
        position = _skip_blank(text, end)
    return values


def _skip_blank(text: str, position: int) -> int:
    """Return the position of the next character that is not whitespace."""
    match = _NOT_BLANK.search(text, position)
    return match.start() if match else len(text)


def _explain_object(value: Any, file_name: str) -> Fault | None:
    """Return the fault of a file that is one object over several lines."""
    if not isinstance(value, dict):
        return None
    field = find_row_key(value)
    if field:
        problem = f"the file is one object, whose key {field} holds {format_rows(len(value[field]))}"
        return Fault(make_place(file_name), problem, f"Set `field: {field}` in the source.", code="data.rows_under_key")
    problem, fix = explain_no_rows(value, file_name)
    return Fault(make_place(file_name), problem, fix, code="data.not_rows")


def find_row_key(value: dict[str, Any]) -> str:
    """Return the key of an object under which its rows stand, the longest list of objects; "" = there is none."""
    return max(keys, key=lambda key: len(value[key])) if (keys := list_row_keys(value)) else ""


def list_row_keys(value: dict[str, Any]) -> list[str]:
    """Return the keys of an object under which lists of objects stand.

    The turns of a chat are no rows: an object that holds them is one row.
    """
    return [
        key
        for key, item in value.items()
        if isinstance(item, list) and item and all(isinstance(row, dict) and not _TURN_KEYS & set(row) for row in item)
    ]


def has_nested_rows(value: dict[str, Any]) -> bool:
    """Tell whether the only value of an object is an object that holds rows under a key."""
    items = list(value.values())
    return len(items) == 1 and isinstance(items[0], dict) and bool(find_row_key(items[0]))


def has_columns(value: dict[str, Any]) -> bool:
    """Tell whether an object holds columns: lists of texts of one length, or texts by the number of their row."""
    items = list(value.values())
    if len(items) < _MIN_HEADER_CELLS:
        return False
    if all(isinstance(item, list) for item in items):
        texts = all(isinstance(cell, str | int | float | None) for item in items for cell in item)
        return texts and len({len(item) for item in items}) == 1 and len(items[0]) > 0
    if all(isinstance(item, dict) and item for item in items):  # as pandas writes it
        return all(set(item) == set(items[0]) and all(key.isdecimal() for key in item) for item in items)
    return False


def has_ids(value: dict[str, Any]) -> bool:
    """Tell whether an object holds rows under their ids, or lists under names."""
    return len(value) > 1 and {type(item) for item in value.values()} in ({list}, {dict})


def explain_no_rows(value: dict[str, Any], file_name: str) -> tuple[str, str]:
    """Return problem and fix for an object that is no row and has no rows under a key."""
    if has_columns(value):
        problem = f"the file is one object that holds the columns {', '.join(list(value)[:5])} one after another"
        call = f"pandas.read_json('{file_name}').to_json('lines.jsonl', orient='records', lines=True)"
        return problem, f"Save it row by row: `{call}`."
    mappings = [item for item in value.values() if isinstance(item, dict)]
    if value and len(mappings) == len(value):
        if all(find_row_key(item) for item in mappings):
            key = next(iter(value))
            inner = find_row_key(mappings[0])
            problem = f"the rows are two keys deep, under {key}.{inner}"
            return problem, f"Run `jq -c '.{key}.{inner}[]' {file_name} > lines.jsonl`, and name that file."
        problem = (
            f"the file is one object that holds {len(value):,} rows under their ids ({', '.join(list(value)[:3])})"
        )
        return problem, f"Run `jq -c '.[]' {file_name} > lines.jsonl`, and name that file."
    problem = f"the file is one object over several lines, with the keys {', '.join(list(value)[:5])}"
    return problem, f"{ONE_PER_LINE} `jq -c . {file_name} > lines.jsonl` does that."


def _explain_nesting(text: str, file_name: str) -> Fault:
    """Return the fault of a list of which an item is nested too deeply, with its line."""
    depth = position = 0
    for match in _TEXTS_AND_BRACKETS.finditer(text):
        bracket = match[0][0]
        if bracket in "[{":
            depth += 1
        elif bracket in "]}":
            depth -= 1
        if depth > _SHOWN_DEPTH:
            position = match.start()
            break
    problem = f"the value is nested more than {_SHOWN_DEPTH} levels deep, and cannot be read"
    where = make_place(file_name, count_lines(text, position))
    return Fault(where, problem, "Remove levels of lists and objects.", code="data.invalid_json")


def is_json(line: str, kind: type) -> bool:
    """Tell whether a line is JSON of a kind: dict, list, str."""
    return find_parse_error(line) is None and isinstance(json.loads(line), kind)


def _check_row(line: str, number: int, file_name: str) -> Fault | None:
    """Return the fault of a line that is JSON but no object."""
    value = json.loads(line)
    if isinstance(value, dict):
        return None
    problem = f"the line is {line.strip()[:40]}, not an object"
    fix = 'Write it as an object with names, as in {"prompt": ..., "completion": ...}, or as {"text": ...}.'
    return Fault(make_place(file_name, number + 1), problem, fix, code="data.not_rows")


def _make_fault(mistake: JsonMistake, text: str, file_name: str, *, lines_before: int = 0) -> Fault:
    """Return the fault of a mistake, with its line, its column and the text around it."""
    line_start = max(text.rfind("\n", 0, mistake.position), text.rfind("\r", 0, mistake.position)) + 1
    line = lines_before + count_lines(text, mistake.position)
    column = mistake.position - line_start + 1
    excerpt = _LINE_END.split(text[max(line_start, mistake.position - _EXCERPT) : mistake.position + 10])[0]
    problem = f"{mistake.problem}, at column {column}: ...{excerpt}"
    return Fault(make_place(file_name, line), problem, mistake.fix, code=mistake.code)


def _find_value_faults(text: str, file_name: str) -> list[Fault]:
    """Return the faults of valid JSON that readers take for something else: repeated keys, half characters."""
    faults = []
    for position, escape in _find_lone_surrogates(text):
        line = count_lines(text, position)
        problem = f"{escape} is half of a character (a lone surrogate), which no text can hold"
        fix = "Write the whole character, or remove the escape."
        faults.append(Fault(make_place(file_name, line), problem, fix, code="data.lone_surrogate"))
        if len(faults) == MAX_SHOWN:
            return faults
    return faults + list(find_repeated_keys(text, file_name))[: MAX_SHOWN - len(faults)]


def find_repeated_keys(text: str, file_name: str) -> Iterator[Fault]:
    """Yield a fault for each object of a file of lines that has a key twice; a list is one object here."""
    is_list = text.lstrip().startswith("[")
    for number, line in enumerate([text] if is_list else split_lines(text), 1):
        if not line.strip():
            continue
        try:
            check_objects(line)
        except RepeatedKey as error:
            where = make_place(file_name, None if is_list else number)
            problem = f'the key "{error}" stands twice in one object, and only one of its values could be read'
            yield Fault(where, problem, "Remove one of the two.", code="data.repeated_key")
        except ValueError:
            return


def _find_lone_surrogates(text: str) -> Iterator[tuple[int, str]]:
    """Yield position and text of each escape of half a surrogate pair."""
    end_of_pair = -1
    for match in _SURROGATE.finditer(text):
        position = match.start(1)
        if position == end_of_pair:
            continue
        is_first = match[1][3].lower() in "89ab"
        following = text[match.end() : match.end() + 6]
        if is_first and re.fullmatch(r"\\u[dD][c-fC-F][0-9a-fA-F]{2}", following):
            end_of_pair = match.end()
            continue
        yield position, match[1]
