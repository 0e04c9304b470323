"""What is printed: columns, colours on terminals alone, numbers in words."""

import os
import re
import subprocess
import sys

import pytest
from rich.cells import cell_len

from trl_sft import console

FAULT = (
    "from trl_sft import console; from trl_sft.errors import Fault; import sys;"
    "fault = Fault('recipe.yaml:4 train.pakking', 'no such key ' + 'x' * 200, 'packing', 'recipe.unknown_key');"
    "console.print_faults([fault]);"
    "sys.exit('rich' in sys.modules)"
)
ROWS = [
    ("prompt", "expected", "base"),
    ("把猫翻译成英文", "cat", "é́ é́"),
    ("a very long prompt that has to be cut somewhere", "x\nof two lines", "👩‍👩‍👧 family"),
]


def run_in_terminal(**environment):
    """Return what the printing of a fault writes to a terminal of 80 columns."""
    pty = pytest.importorskip("pty")
    outside, inside = pty.openpty()
    settings = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    command = [sys.executable, "-c", FAULT]
    process = subprocess.Popen(
        command, stdout=inside, stderr=inside, env=settings | {"TERM": "xterm-256color", "COLUMNS": "80"} | environment
    )
    os.close(inside)
    written = b""
    while True:
        try:
            chunk = os.read(outside, 4096)
        except OSError:  # the process has closed its end
            break
        if not chunk:
            break
        written += chunk
    process.wait()
    os.close(outside)
    return written.decode().replace("\r\n", "\n")


def test_columns_stand_side_by_side_and_fit_also_in_chinese():
    lines = console.format_columns(ROWS, 40)
    assert len(lines) == len(ROWS)
    assert max(map(cell_len, lines)) <= 40
    for words in (("expected", "cat", "x of two"), ("base", "é́", "👩")):
        places = [cell_len(line[: line.index(word)]) for line, word in zip(lines, words, strict=True)]
        assert len(set(places)) == 1, words


def test_a_text_that_is_too_long_for_its_column_is_cut_with_an_ellipsis():
    lines = console.format_columns(ROWS, 50)
    assert "…" in lines[2]
    assert "…" not in lines[0] + lines[1]
    assert console.format_columns(ROWS, 200)[2] == (
        "  a very long prompt that has to be cut somewhere  x of two lines  👩‍👩‍👧 family"
    )


def test_columns_hold_no_control_characters():
    (line,) = console.format_columns([("a\x1b[31mred\x07", "b\x08\x9b1m\ud83d")], 60)
    assert line == r"  a\x1b[31mred\x07  b\x08\x9b1m\ud83d"


def test_faults_have_colours_on_a_terminal_and_are_not_wrapped():
    text = run_in_terminal()
    assert re.search(r"\x1b\[\d*;?\d*m", text)
    assert "\x1b[1mtrl_sft: 1 problem to fix\x1b[0m" in text
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert f"recipe.yaml:4 train.pakking\n    no such key {'x' * 200}\n    -> packing\n" in plain


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_faults_have_no_control_characters_where_colours_are_switched_off(environment):
    assert "\x1b" not in run_in_terminal(**environment)


def test_faults_in_a_pipe_are_plain_and_import_no_rich():
    done = subprocess.run([sys.executable, "-c", FAULT], capture_output=True, text=True, check=True)
    assert done.stderr == (
        f"trl_sft: 1 problem to fix\n\nrecipe.yaml:4 train.pakking\n    no such key {'x' * 200}\n    -> packing\n"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (4.21, "4.2 s"), (42, "42 s"), (185, "3 min 5 s"), (7800, "2 h 10 min")],
)
def test_duration_is_shown_in_the_unit_that_it_fills(seconds, text):
    assert console.format_duration(seconds) == text


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (512, "512 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB")])
def test_size_is_shown_in_the_unit_that_it_fills(size, text):
    assert console.format_bytes(size) == text


def test_number_of_rows_is_shown_with_its_noun():
    assert [console.format_rows(n) for n in (0, 1, 1024)] == ["0 rows", "1 row", "1,024 rows"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2J\x9b31m\r\x7f", "a\\x1b[2J\\x9b31m\\x0d\\x7f"),
        ("a\u202eb\u2066c\u200ed\u061c", "a\\u202eb\\u2066c\\u200ed\\u061c"),
        ("le\u200barn\ufeffing\u2060_r\xadate", "le\\u200barn\\ufeffing\\u2060_r\\xadate"),
        ("le\u200darn\u200cing", "le\\u200darn\\u200cing"),
        ("👩\u200d👩\u200d👧 🏳\ufe0f\u200d🌈 می\u200cخواهم", "👩\u200d👩\u200d👧 🏳\ufe0f\u200d🌈 می\u200cخواهم"),
        ("a\u2028b\U000e0041\ud800", "a\\u2028b\\U000e0041\\ud800"),
        ("tab\tline\nend", "tab\tline\nend"),
    ],
)
def test_characters_that_control_a_terminal_or_are_not_seen_are_codes(text, shown):
    assert console.escape_control_characters(text) == shown
