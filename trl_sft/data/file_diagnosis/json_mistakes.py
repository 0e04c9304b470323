"""Mistakes in a text that should be one JSON value: what is wrong at the place where a parser stopped.

Inputs: a line, or a whole file that is a list, and the parser's error. Outputs: a `JsonMistake` with the exact change.
Deliberately not here: where the text stands in its file (`json_text`).
"""

from __future__ import annotations

import ast
import json
import re
from typing import NamedTuple

ONE_PER_LINE = "Write one JSON object per line."
_COMMENT = re.compile(r"\s*(//|#|/\*)")
_BARE_KEY = re.compile(r"([^\W\d]\w*)\s*:")
_MAX_LITERAL = 100_000  # characters of a line that is tried as a Python literal
_LONG_NUMBER = re.compile(r"\d{4301,}")  # what Python reads: 4,300 digits (`sys.get_int_max_str_digits`)
_TOO_MANY_DIGITS = "a number has more than 4,300 digits"
_TOO_DEEP = "Too many levels"
_BEGIN = re.compile(r"\s*(\{|\[\s*([\[\]{\"'“#/-]|\d|$))")
_MISSING = {
    "Expecting ',' delimiter": "a comma or a closing bracket",
    "Expecting ':' delimiter": "a colon",
    "Expecting property name enclosed in double quotes": "a key in quotes",
}
_WORD = re.compile(r"[^\W\d]\w*")
_QUOTES = "“”„‟‘’«»＂'`"  # of texts and of other programs, in place of "
_FULL_WIDTH = {"：": ":", "，": ",", "｛": "{", "｝": "}", "［": "[", "］": "]"}  # punctuation of Chinese keyboards

# control character -> its name, and how JSON writes it
_CONTROL_ESCAPES = {
    "\n": ("line break", r"\n"),
    "\r": ("line break", r"\n"),
    "\t": ("tab", r"\t"),
}


class JsonMistake(NamedTuple):
    """A mistake of a JSON text: its place, what is wrong, and what to do."""

    position: int  # characters before it
    problem: str
    fix: str
    code: str = "data.invalid_json"


def find_parse_error(line: str) -> json.JSONDecodeError | None:
    """Return the error of a line that is not JSON; None = it is JSON."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error
    except RecursionError:
        return json.JSONDecodeError(_TOO_DEEP, line, 0)
    except ValueError:  # a number of more digits than Python reads
        match = _LONG_NUMBER.search(line)
        return json.JSONDecodeError(_TOO_MANY_DIGITS, line, match.start() if match else 0)
    return None


def begins_as_json(text: str) -> bool:
    """Tell whether a text begins as an object or a list of JSON does; a line of a log may begin with a bracket too."""
    return _BEGIN.match(text) is not None


def explain_mistake(text: str, error: json.JSONDecodeError, *, is_last: bool = True) -> JsonMistake:
    """Return what is wrong at the place where a JSON parser stopped.

    Args:
        text: a line, or the whole file where it is a list.
        error: the parser's error.
        is_last: whether nothing but empty lines follows the text in its file.

    """
    position = error.pos
    if error.msg == _TOO_DEEP:
        return JsonMistake(0, "the line is nested too deeply to be read", "Remove levels of lists and objects.")
    rest = text[position:].lstrip()
    before = text[:position].rstrip()
    if rest.startswith("\ufeff") or text.startswith("\ufeff"):
        problem = "a byte order mark (U+FEFF) stands before the row: two files were joined"
        return JsonMistake(position, problem, "Remove the mark.")
    if error.msg == _TOO_MANY_DIGITS:
        return JsonMistake(position, error.msg, "Write the number as text, or shorten it.")
    if error.msg == "Extra data" and rest.strip() == ",":
        return JsonMistake(position, "a comma ends the line", "Remove the comma, or write all rows as one list in [ ].")
    if rest[:1] in ("}", "]") and before.endswith(","):
        return JsonMistake(position, f"a comma stands before {rest[0]}", "Remove the comma.")
    if before.endswith(",") and error.msg.startswith("Illegal trailing comma"):
        return JsonMistake(position, "a comma stands before the bracket", "Remove the comma.")
    if _COMMENT.match(rest) or _COMMENT.match(text):
        return JsonMistake(position, "JSON has no comments", "Remove the comment.")
    if error.msg.startswith(("Invalid control character", "Invalid \\escape")):
        return _explain_character(text, error)
    if _is_literal(text):
        fix = (
            "Write each row with `json.dumps(row, ensure_ascii=False)`, not with `str(row)` or `print(row)`. "
            "`ast.literal_eval(line)` reads the rows that exist."
        )
        return JsonMistake(position, "this is a Python value (repr), not JSON", fix)
    if _is_truncated(text, error) and is_last:
        if text.rstrip().endswith("}") and text.lstrip().startswith("["):
            fix = "Write ] at the end. If rows are missing there, copy or download the file again."
            return JsonMistake(position, "the list is not closed", fix, code="data.truncated_file")
        fix = "Copy or download the file again, or remove the incomplete row."
        return JsonMistake(position, "the file ends in the middle of this row", fix, code="data.truncated_file")
    if error.msg == "Extra data" and rest.startswith(("{", "[")):
        return JsonMistake(position, "the line holds several objects", ONE_PER_LINE)
    return _explain_word(text, position, rest, missing=_MISSING.get(error.msg, ""))


def _explain_word(text: str, position: int, rest: str, *, missing: str) -> JsonMistake:
    """Return the mistake of a text that goes on with a word or a character that JSON does not have there.

    Args:
        text: the text.
        position: where the parser stopped.
        rest: the text from there.
        missing: what the parser expected there; "" = a value or a key.

    """
    if match := _BARE_KEY.match(rest):
        return JsonMistake(
            position, f"not JSON: the key {match[1]} stands without quotes", f'Write it as "{match[1]}".'
        )
    if rest[:1] in _FULL_WIDTH:
        problem = f"not JSON: the character {rest[0]} (full width) stands in place of {_FULL_WIDTH[rest[0]]}"
        return JsonMistake(position, problem, f"Write {_FULL_WIDTH[rest[0]]} there.")
    if rest and rest[0] in _QUOTES:
        return JsonMistake(
            position, f"not JSON: the quote {rest[0]} stands in place of a straight one", 'Write " there.'
        )
    if missing and begins_as_json(text):
        return JsonMistake(position, f"not JSON: {missing} is missing", "Write it there.")
    if not begins_as_json(text):
        return JsonMistake(position, "this is not JSON", ONE_PER_LINE)
    if match := _WORD.match(rest):
        fix = "Write it in quotes, or as null, true, false or a number."
        return JsonMistake(position, f"the word {match[0][:40]} is no value of JSON", fix)
    return JsonMistake(position, "this is not JSON", "Correct the JSON there.")


def _explain_character(text: str, error: json.JSONDecodeError) -> JsonMistake:
    """Return the mistake of a text that holds a control character as it is, or an escape that JSON does not have."""
    position = error.pos
    if error.msg.startswith("Invalid \\escape"):
        problem = f"a text holds {text[position : position + 2]}, which is no escape of JSON"
        return JsonMistake(position, problem, r"Write a backslash as \\.")
    title, escape = _CONTROL_ESCAPES.get(text[position], ("control character", f"\\u{ord(text[position]):04x}"))
    return JsonMistake(position, f"a text holds a {title} as it is", f"Write it as {escape}.")


def _is_literal(text: str) -> bool:
    """Tell whether a text is a Python literal: a dict or a list as `repr` writes it."""
    stripped = text.strip()
    if len(stripped) > _MAX_LITERAL or not stripped.startswith(("{", "[")):
        return False
    try:
        return isinstance(ast.literal_eval(stripped), dict | list)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False


def _is_truncated(text: str, error: json.JSONDecodeError) -> bool:
    """Tell whether a JSON text stops before its end."""
    return error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
