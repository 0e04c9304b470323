"""Files that a reader would take for something else are named, with the source that reads them as they stand."""

import bz2
import functools
import gzip
import io
import json
import lzma
import re
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import RECIPE, jsonl
from test_file_diagnosis import ROW, explain, read_rows

CHINESE = ("问题：什么是机器学习？请简单解释。", "机器学习让计算机从数据中学习规律。")


def zip_file(name, data):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, data)
    return buffer.getvalue()


PARTS_OF_FILES = {
    # name of the file -> its bytes, and what the fault has to say
    "joined.jsonl": (
        (json.dumps({"question": CHINESE[0]}, ensure_ascii=False) + "\n").encode()
        + (json.dumps({"question": CHINESE[1]}, ensure_ascii=False) + "\n").encode("gbk"),
        ("joined.jsonl:2", "the file is UTF-8, except line 2", "Save those lines as UTF-8"),
    ),
    "wide.csv": (
        f"question,answer\n{CHINESE[0]},{CHINESE[1]}\n".encode("utf-16-le"),
        ("wide.csv", "in UTF-16", "Set `encoding: utf-16-le`"),
    ),
    "nul.csv": (b"question,answer\nq,a\nq,a\0b\n", ("nul.csv:3", "NUL byte", "Remove the byte.")),
    "mark.jsonl": (
        ROW.encode("utf-8-sig") + ROW.encode("utf-8-sig"),
        ("mark.jsonl:2", "a byte order mark (U+FEFF) stands before the row", "Remove the mark."),
    ),
    "digits.jsonl": (
        (ROW + '{"question": "a", "answer": "b", "id": ' + "9" * 5000 + "}\n").encode(),
        ("digits.jsonl:2", "more than 4,300 digits", "Write the number as text"),
    ),
    "digits.json": (
        b'[{"question": "a", "answer": "b"},\n{"id": ' + b"9" * 5000 + b"}]",
        ("digits.json:2", "more than 4,300 digits", "Write the number as text"),
    ),
    "declared.csv": (
        b"sep=;\r\nquestion;answer\r\nq;a, b\r\n",
        ("declared.csv:1", "declares the separator, for Excel", 'sep: ";", skiprows: 1'),
    ),
    "caret.csv": (b"question^answer\na, b^c, d\n", ("caret.csv:1", "one column", 'Set `sep: "^"`')),
    "full.csv": ("问题，答案\n甲，乙\n".encode(), ("full.csv:1", "one column", 'Set `sep: "，"`')),
    "open.tsv": (b'question\tanswer\nq\t"a\nb\tc\n', ("open.tsv:2", "never closed", "set `quoting: 3`")),
    "escaped.csv": (
        b'question,answer\nq,"say \\"hi\\" now"\n',
        ("escaped.csv:2", "text after its closing", 'set `escapechar: "\\\\"`'),
    ),
    "spaces.csv": (b"question, answer\nq, a\n", ("spaces.csv", "a space follows", "Set `skipinitialspace: true`")),
    "nested.json": (b'{"result": {"data": [{"question": "a"}]}}', ("nested.json", "result.data", "jq -c")),
    "splits.json": (
        b'{"train": [{"question": "a"}], "test": [{"question": "b"}]}',
        ("splits.json", "holds 1 row; test holds rows too", "Set `field: train`"),
    ),
    "rows.txt": (ROW.encode() * 2, ("rows.txt:1", "each line is a JSON object", "Rename the file to rows.jsonl")),
    "list.txt": (
        json.dumps([json.loads(ROW)] * 2, indent=1).encode(),
        ("list.txt:1", "holds JSON objects", "Rename the file to list.json", "set `format: text`"),
    ),
    "rows.md": (ROW.encode() * 2, ("rows.md:1", "each line is a JSON object", "Rename the file to rows.jsonl")),
    "python.txt": (b"{'question': 'a', 'answer': None}\n" * 2, ("python.txt:1", "Python values", "json.dumps(row")),
    "table.txt": (
        b"question,answer\nSay a.,a\n",
        ("table.txt:1", "a table", "separated by commas (question, answer)", "Rename the file to table.csv"),
    ),
    "tabs.txt": (
        b"hello\tbonjour\ngood day\tbonjour\nbye\tau revoir\n",
        ("tabs.txt:1", "separated by tabs", "Rename the file to tabs.tsv", "set `format: text`"),
    ),
    "semi.txt.gz": (
        gzip.compress("问题;答案\n甲;乙\n".encode()),
        ("semi.txt.gz:1", "separated by semicolons", 'semi.csv.gz and set `sep: ";"`'),
    ),
    "names.txt": (b"src|tgt\na b|c d\ne|f\n", ("names.txt:1", "vertical bars (src, tgt)", 'set `sep: "|"`')),
    "page.txt": (b"<!DOCTYPE html>\n<html></html>", ("page.txt", "a web page", "If the markup is the text")),
    "twice.jsonl": (
        json.dumps(ROW).encode() + b"\n",
        ("twice.jsonl:1", "encoded twice", "`json.dumps(row)` once", "set `format: text`"),
    ),
    "twice.json": (json.dumps([ROW, ROW]).encode(), ("twice.json:1", "encoded twice")),
    "chats.json": (
        json.dumps([[{"role": "user", "content": "a"}]] * 2).encode(),
        ("chats.json", "row 1 is", 'as in {"messages": [...]}'),
    ),
    "title.csv": (
        b"Export of 2024\n\nquestion;answer\na;b\nc;d\n",
        ("title.csv:1", "the header is in line 3 (question;answer)", "Set `skiprows: 2` and `sep: "),
    ),
    "comment.tsv": (
        b"# one\n# two\tthree\nprompt\tresponse\na\tb\nc\td\n",
        ("comment.tsv:1", "before it stands '# one'", "Set `skiprows: 2`"),
    ),
    "bare.json": (
        b'[{question: "a", answer: "b"}]',
        ("bare.json:1", "the key question stands without quotes", 'Write it as "question".'),
    ),
    "open.json": (
        b'[\n{"question": "a"},\n{"question": "b"}',
        ("open.json:3", "the list is not closed", "Write ] at the end."),
    ),
    "curly.jsonl": ("{“question”: 1}\n".encode(), ("the quote “ stands in place of a straight one", 'Write " there.')),
    "wide.jsonl": ('{"question"："a"}\n'.encode(), ("the character ： (full width) stands in place of :",)),
    "word.jsonl": (b'{"question": undefined, "x": true}\n', ("the word undefined is no value of JSON",)),
    "equals.jsonl": (b'{"question"="a"}\n', ("a colon is missing, at column 12", "Write it there.")),
    "joined_cells.jsonl": (b'{"question": "a" "answer": "b"}\n', ("a comma or a closing bracket is missing",)),
    "log.jsonl": (b'[INFO] start\n{"question": "a"}\n', ("log.jsonl:1", "Write one JSON object per line.")),
    "single.csv": (b"question,answer\n'a, b','c'\n", ("single.csv:2", "3 cells", 'set `quotechar: "\'"`')),
    "rows.jsonl.txt": (ROW.encode(), ("rows.jsonl.txt:1", "Rename the file to rows.jsonl.")),
    "none.jsonl": (b"{}\n{}\n", ("2 rows without a column", "Name a source that has rows.")),
    "viewer.json": (
        json.dumps([{"row_idx": 0, "row": {"question": "a", "answer": "b"}}] * 2).encode(),
        ("the column row holds a mapping", "which fit question_answer", 'def to_row(row): return row["row"]'),
    ),
    "argilla.jsonl": (
        json.dumps({"id": "1", "fields": {"prompt": "a", "response": "b"}, "status": "x"}).encode() + b"\n",
        ('return {"prompt": row["fields"]["prompt"], "completion": row["fields"]["response"]}`',),
    ),
    "batch.jsonl": (
        json.dumps({"id": "1", "response": {"status_code": 200, "body": {"choices": []}}}).encode() + b"\n",
        ("the column response holds a mapping with the keys status_code, body", "Make the columns of a format in"),
    ),
    "sheet.xlsx": (b"PK\x03\x04", ("sheet.xlsx", "cannot be read", "Save its sheet as CSV")),
    "only_nul.jsonl": (
        b"\0" * 2_000_000,
        ("only_nul.jsonl:1", "NUL bytes (0x00) and no text", "download the file again"),
    ),
    "one_line.json": (
        json.dumps([{"question": CHINESE[0], "answer": CHINESE[1]}] * 20_000, ensure_ascii=False).encode("gbk"),
        ("one_line.json:1", "is not UTF-8", "Set `encoding: gb"),
    ),
    "twice.jsonl.gz": (
        gzip.compress(bz2.compress(ROW.encode())),
        ("twice.jsonl.gz", "holds a file compressed with bzip2", "compress them once"),
    ),
    "twice.jsonl.zip": (
        zip_file("rows.jsonl.gz", gzip.compress(ROW.encode())),
        ("twice.jsonl.zip", "holds a file compressed with gzip", "compress them once"),
    ),
    "zip.jsonl.gz": (
        gzip.compress(zip_file("rows.jsonl", ROW.encode())),
        ("zip.jsonl.gz", "holds a file compressed with zip", "compress them once"),
    ),
    "ten.jsonl.xz": (
        functools.reduce(lambda data, _: lzma.compress(data), range(10), ROW.encode()),
        ("ten.jsonl.xz", "compressed more than once", "compress them once"),
    ),
    "blank.jsonl": (b"\n\n", ("blank.jsonl", "no rows", "Name a source that has rows.")),
    "header.csv": (b"question,answer\n", ("header.csv", "no rows", "Name a source that has rows.")),
}


@pytest.mark.parametrize("name", PARTS_OF_FILES)
def test_file_that_would_be_misread_is_named_with_what_to_write(tmp_path, name):
    data, words = PARTS_OF_FILES[name]
    (tmp_path / name).write_bytes(data)
    message = explain(tmp_path, name)
    assert all(part in message for part in words), message


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("declared.csv", [{"question": "q", "answer": "a, b"}]),
        ("caret.csv", [{"question": "a, b", "answer": "c, d"}]),
        ("full.csv", [{"问题": "甲", "答案": "乙"}]),
        ("spaces.csv", [{"question": "q", "answer": "a"}]),
        ("title.csv", [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]),
        ("comment.tsv", [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}]),
        ("wide.csv", [{"question": CHINESE[0], "answer": CHINESE[1]}]),
    ],
)
def test_source_that_a_fault_offers_reads_the_cells_as_they_stand(tmp_path, name, expected):
    (tmp_path / name).write_bytes(PARTS_OF_FILES[name][0])
    offered = re.findall(r"`(\{path: .*?\})`", explain(tmp_path, name))
    assert read_rows(tmp_path, offered[0]) == expected


@pytest.mark.parametrize(("encoding", "text"), [("latin-1", "café, naïve"), ("cp1252", "déjà vu"), ("gbk", CHINESE[0])])
def test_encoding_that_misreads_a_file_of_utf8_is_refused(tmp_path, encoding, text):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    message = explain(tmp_path, f"{{path: rows.jsonl, encoding: {encoding}}}")
    assert f"the file is UTF-8, not {encoding}\n    -> Remove `encoding`." in message
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding=encoding)
    assert read_rows(tmp_path, f"{{path: rows.jsonl, encoding: {encoding}}}") == [{"text": text}]


def test_lines_of_json_in_a_text_file_are_trained_where_the_recipe_says_that_they_are_text(tmp_path):
    (tmp_path / "rows.txt").write_text(ROW)
    assert read_rows(tmp_path, "{path: rows.txt, format: text}") == [{"text": ROW.strip()}]


TEXTS = {
    "prose.txt": b"Dear reader, hello.\nThis is a text, with commas.\nGood bye, then.\n",
    "poem.txt": b"Question, answer me!\nSay a word\n",
    "tabs.txt": b"\tif a:\n\t\tb()\n",
    "list.md": b"[a](http://b)\n- {x}\n",
    "single.txt": b"name\tvalue\n",
    "part.md": b"<div align=center>\n# Title\n</div>\n",
    "words.jsonl": b'"a text"\n"{not an object}"\n',
    "messages.jsonl": b'{"message": "Hello.", "text": "a"}\n{"message": "Bye.", "text": "b"}\n',
    "miles.txt": b"500 Miles\n",
    "error.jsonl": ROW.encode() + b'{"question": "Say error.", "answer": "error"}\n',
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_that_only_resembles_rows_is_no_fault(tmp_path, name):
    (tmp_path / name).write_bytes(TEXTS[name])
    assert explain(tmp_path, name) == ""


@pytest.mark.parametrize("name", ["table.txt", "list.txt", "python.txt", "page.txt", "twice.jsonl"])
def test_rows_in_a_text_file_are_text_where_the_source_says_so(tmp_path, name):
    (tmp_path / name).write_bytes(PARTS_OF_FILES[name][0])
    assert explain(tmp_path, f"{{path: {name}, format: text}}") == ""


ANSWERS = {
    "error.json": (b'{"error": "Invalid username or password."}', "Invalid username or password."),
    "detail.jsonl": (b'{"detail": "Not Found"}\n', "Not Found"),
    "quota.json": (b'{"error": {"message": "Quota exceeded", "type": "quota", "code": null}}', "Quota exceeded"),
    "fields.json": (b'{"detail": [{"loc": ["query"], "msg": "field required"}]}', "field required"),
    "github.json": (b'{"message": "Not Found", "documentation_url": "https://x", "status": "404"}', "Not Found"),
    "code.json": ('{"code": 500, "msg": "服务器错误", "data": null}'.encode(), "服务器错误"),
    "aws.json": (b'{"message": "Permission denied", "code": 403}', "Permission denied"),
    "weak.json": (b'{"message": "Unauthorized"}', "Unauthorized"),
    "lines.jsonl": (b'{"error": "rate limit"}\n{"error": "rate limit"}\n', "rate limit"),
    "part.csv": (b"<!-- page --><div>Sign in</div>", "a web page"),
    "denied.json": (b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>", "Access Denied"),
    "line.csv": (b"404 page not found\n", "404 page not found"),
    "line.jsonl": (b'"Unauthorized"', "Unauthorized"),
    "line.parquet": (b"error code: 1020", "error code: 1020"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answer_of_a_server_in_place_of_data_is_named(tmp_path, name):
    data, message = ANSWERS[name]
    (tmp_path / name).write_bytes(data)
    fault = explain(tmp_path, name)
    assert f"{name} is " in fault
    assert message in fault
    assert "ownload" in fault


def test_object_of_a_server_is_read_where_the_source_names_its_columns(tmp_path):
    (tmp_path / "rows.json").write_bytes(ANSWERS["detail.jsonl"][0])
    assert read_rows(tmp_path, "{path: rows.json, rename: {detail: text}}") == [{"text": "Not Found"}]


@pytest.mark.parametrize(
    "row",
    [
        {"input_ids": [1, 2], "attention_mask": [1, 1], "labels": [-100, 2]},
        {"input_ids": [[1, 2], [3]]},
        {"tokens": [5, 6], "loss_mask": [0, 1], "id": 7},
        {"input_ids": "[1, 2]", "labels": "[-100, 2]"},
    ],
)
@pytest.mark.parametrize("keys", ["", ", format: text"])
def test_rows_of_token_ids_are_named_with_what_to_do(go, here, row, keys, matches):
    jsonl(here / "rows.jsonl", [row])
    code, _, err = go(RECIPE.replace("rows.jsonl", f"{{path: rows.jsonl{keys}}}"), command=["preview"])
    assert code == 2
    assert f"rows.jsonl holds token ids ({next(iter(row))}" in err
    assert "`format: FILE.py:FUNCTION`" in err
    if "attention_mask" in row and not keys:
        matches("token_ids", err)


def test_parquet_file_without_rows_or_with_a_column_twice_says_so(tmp_path):
    pq.write_table(pa.table({"question": pa.array([], pa.string())}), tmp_path / "empty.parquet")
    assert "empty.parquet has no rows" in explain(tmp_path, "empty.parquet")
    table = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["question", "answer", "answer"])
    pq.write_table(table, tmp_path / "twice.parquet")
    assert "twice.parquet has the column answer twice" in explain(tmp_path, "twice.parquet")


def test_column_of_a_type_that_cannot_be_read_is_named(tmp_path):
    column = pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"question": ["a"], "answer": ["b"], "meta": column}), tmp_path / "rows.parquet")
    message = explain(tmp_path, "rows.parquet")
    assert "has the column meta of the Arrow type map<string, string>, which cannot be read" in message
    assert "without that column" in message
