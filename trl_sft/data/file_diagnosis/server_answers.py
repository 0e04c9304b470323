"""What a server answers in place of a file: a web page, an XML message, a JSON object or a line that says what failed.

Inputs: the first bytes or the text of a file. Outputs: what the file is, with the instruction that mends it; or None.
Deliberately not here: pointers and files of other kinds (`content`), and JSON that is wrong (`json_text`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from trl_sft.data.column_names import normalise

MAX_LINE = 300  # bytes of a file that can be the error message of a server in one line
_SHOWN = 80  # characters of a message that are shown
_DOWNLOAD_AGAIN = "Download the file again."
_ASK_AGAIN = "Correct the address, or the token with which the file is requested, and download it again."
_COMMENTS = re.compile(rb"(?:\s*<!--.*?-->)+\s*", re.DOTALL)
_TAG = re.compile(
    rb"<(!doctype\s+html|html|head|body|title|meta|link|script|style|div|span|p|h[1-6]|center|pre|table|img|a|br|hr)"
    rb"(\s[^>]*)?/?>"
)
_PAGE = re.compile(rb"<(!doctype\s+html|html|head|body)\b")
# The whole of a file in one line, as web servers, proxies and the hub write it
_REASONS = r"(page |file )?(not found|forbidden|unauthori[sz]ed|bad request|gone|bad gateway|too many requests)"
_ERROR_LINE = re.compile(
    r"(entry|repository|page|file|resource|object|revision|route) not found|not found\W*$|no such (file|key|bucket)"
    rf"|invalid (username|credentials|token|api key)|404:|(http(/[\d.]+)?\W+)?(error\W+)?[45]\d\d\W+{_REASONS}"
    r"|error code: \d|(access|permission) (to .* is )?(denied|restricted|forbidden)|unauthori[sz]ed|forbidden\W*$"
    r"|bad (request|gateway)|service (temporarily )?unavailable|(internal )?server error|gateway time-?out"
    r"|too many requests|rate limit|upstream connect error|no healthy upstream|login required|please (log|sign) ?in"
    r"|authentication (is )?required|not authenticated",
    re.IGNORECASE,
)
# Keys of the one object in which a web interface says what failed (FastAPI, GitHub, OpenAI, the hub, others)
_ERROR_KEYS = {"error", "errors", "detail", "fault", "exception", "err", "errmsg", "error_message"}
_ERROR_KEYS |= {"error_msg", "error_description", "error_code", "errcode"}
_MESSAGE_KEYS = {"message", "msg", "details"}  # in other data too: they count beside a key that says how a request went
_STATUS_KEYS = {"status", "status_code", "statuscode", "code", "success", "ok", "documentation_url", "type"}
_OTHER_KEYS = {"title", "path", "timestamp"}
_OTHER_KEYS |= {"request_id", "requestid", "trace_id", "traceid", "documentation_url", "reason", "instance", "data"}
_OTHER_KEYS |= {"param", "result", "cause_exception", "cause_message", "retry_after", "url", "method", "name"}


class ServerAnswer(NamedTuple):
    """What a file is, in place of data."""

    problem: str  # the end of a sentence that begins with the name of the file
    fix: str


def find_markup(head: bytes, builder: str, *, is_text: bool = False) -> ServerAnswer | None:
    """Return what a web page, an XML file or an error message in one line is.

    Args:
        head: the first bytes of the file.
        builder: the builder of `datasets` that reads the file.
        is_text: whether the recipe says that the file is text, which may hold markup.

    """
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    start = _COMMENTS.sub(b"", start, count=1).lower() if start.startswith(b"<!--") else start[:512].lower()
    tag = _PAGE if builder == "text" else _TAG
    if not is_text and tag.match(start):
        return _describe_page(head, builder)
    if start.startswith((b"<?xml", b"<error")) and b"<error" in start:
        message = re.search(rb"<message>(.*?)</message>", head, re.IGNORECASE | re.DOTALL)
        detail = f": {message[1].decode('utf-8', 'replace')[:_SHOWN]}" if message else ""
        return ServerAnswer(f"is the error message of a server, not data{detail}", _DOWNLOAD_AGAIN)
    if start.startswith(b"<?xml") and builder != "text":
        return ServerAnswer("is XML, not data that a recipe reads", "Save its rows as JSON lines or as Parquet.")
    line = head.strip().decode("utf-8", "replace").strip('"')
    if len(head) < MAX_LINE and "\n" not in line and _ERROR_LINE.match(line):
        return ServerAnswer(f"is the error message of a server, not data: {line[:_SHOWN]}", _DOWNLOAD_AGAIN)
    return None


def find_error_objects(text: str) -> ServerAnswer | None:
    """Return what a JSON file is whose objects all say that a request failed; None = it may hold rows.

    Args:
        text: the whole text of the file.

    """
    values = _read_objects(text)
    if not values or not all(map(_is_error, values)):
        return None
    message = _find_message(values[0])
    return ServerAnswer(f"is the answer of a server to a request that failed, not data: {message[:_SHOWN]}", _ASK_AGAIN)


def _describe_page(head: bytes, builder: str) -> ServerAnswer:
    """Return what a web page is, with where the file itself is found."""
    fix = "Download the file itself, not its page."
    if b"huggingface" in head.lower():
        fix += " On the hub its address has /resolve/ in place of /blob/."
    elif b"github" in head.lower():
        fix += " On GitHub it is the link `Raw`."
    if builder == "text":
        fix += " If the markup is the text, set `format: text`."
    return ServerAnswer("is a web page (HTML), not data", fix)


def _read_objects(text: str) -> list[dict[str, Any]]:
    """Return the one object of a text, or that of each of its lines; [] = it holds something else."""
    try:
        values = [json.loads(text)]
    except (ValueError, RecursionError):
        try:
            values = [json.loads(line) for line in text.splitlines() if line.strip()]
        except (ValueError, RecursionError):
            return []
    return values if all(isinstance(value, dict) for value in values) else []


def _is_error(value: Mapping[str, Any]) -> bool:
    """Tell whether an object has only keys that say what failed, and no turns of a chat."""
    names = {normalise(key) for key, item in value.items() if item is not None}
    if any(isinstance(value.get(key), list) for key in ("message", "data", "result")):
        return False
    text = next((item for key, item in value.items() if normalise(key) in _MESSAGE_KEYS), None)
    says_so = isinstance(text, str) and (bool(names & _STATUS_KEYS) or _ERROR_LINE.match(text) is not None)
    return (bool(names & _ERROR_KEYS) or says_so) and names <= _ERROR_KEYS | _MESSAGE_KEYS | _STATUS_KEYS | _OTHER_KEYS


def _find_message(value: Mapping[str, Any]) -> str:
    """Return the text that says what failed."""
    named = [item for key, item in value.items() if normalise(key) in _ERROR_KEYS | _MESSAGE_KEYS and item]
    text = next((item for item in named if isinstance(item, str)), None)
    if text is not None:
        return text
    inner = next((item for item in named if isinstance(item, dict)), {})
    message = next((item for item in inner.values() if isinstance(item, str)), "")
    return message or json.dumps(value, ensure_ascii=False)
