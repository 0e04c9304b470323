"""Files of JSON lines that only grow: whole lines are read, whatever a killed process or a text left in them."""

import json

import pytest

from trl_sft import run_folder
from trl_sft.building import call_budget

TEXT = "one\u2028two\u0085three\x1cfour"  # separators that `str.splitlines` knows, and JSON leaves in a text


def test_line_with_other_separators_in_its_text_is_one_line(tmp_path):
    path = tmp_path / "log.jsonl"
    run_folder.append_json(path, {"text": "first"})
    run_folder.append_json(path, {"text": TEXT})
    assert run_folder.read_last_json(path) == {"text": TEXT}
    assert list(run_folder.read_json_lines(path)) == [{"text": "first"}, {"text": TEXT}]


@pytest.mark.parametrize("damage", [b'{"key": "b", "te', b"\xff\xfe", b"3", b"[" * 100_000, b"null", b""])
def test_damaged_line_is_left_out_and_the_others_are_read(tmp_path, damage):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"key": "a"}\n' + damage + b'\n{"key": "c"}\n')
    assert [entry["key"] for entry in run_folder.read_json_lines(path)] == ["a", "c"]


def test_absent_file_has_no_lines(tmp_path):
    assert list(run_folder.read_json_lines(tmp_path / "gone.jsonl")) == []


def test_spending_counts_whole_calls_only(tmp_path):
    path = tmp_path / "calls.jsonl"
    path.write_text(json.dumps({"model": "m"}) + "\n3\n{half\n")
    assert call_budget.read_spending(path, {}) == (1, 0.0)
