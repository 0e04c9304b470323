"""Rows arrive exactly as they stand in their files: every pair of kinds of values, wherever the second one stands.

The pairs stand in one block, in a later block, in a second file; each is read whole, as a stream and as a head. A guard
that parses the raw text a second time finds a reader that gives something else.
"""

import bz2
import csv
import gzip
import itertools
import json
import lzma
import os
import random
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import jsonl
from datasets import ClassLabel, Dataset, DatasetDict, Features, Json, List, Value

from trl_sft.data import load
from trl_sft.data.messages import FormatError
from trl_sft.data.readers import csv_records, guard, json_records, record_store
from trl_sft.data.source_rows import decode_batch
from trl_sft.errors import NotAsAsked, UserError
from trl_sft.recipe import build, yaml_reader

RECIPE = "model: {name_or_path: trl_sft:tiny}\ndata: {train: SOURCE}\ntrain: {output_dir: out, max_steps: 2}\n"
QUESTION = "model: {name_or_path: trl_sft:tiny}\ndata: {train: SOURCE, special_tokens_in_text: text}\n"

# kind -> a value as JSON holds it
VALUES = {
    "text": "alpha",
    "empty text": "",
    "integer": 5,
    "large integer": 12345678901234567890123,
    "float": 0.1234567890123456,
    "whole float": 1.0,
    "boolean": True,
    "null": None,
    "list of texts": ["a", "b"],
    "list of objects": [{"type": "text", "text": "x"}],
    "empty list": [],
    "object": {"default": None, "minimum": 0},
    "object with other keys": {"maximum": 0.5, "nested": {"a": [1, "1", None]}},
    "empty object": {},
    "date": "2024-01-05",
    "time": "2024-01-05T10:00:00Z",
    "leading zeros": "00007",
    "number as text": "1.50",
    "boolean as text": "True",
    "missing value as text": "NA",
    "null as text": "None",
    "JSON as text": '{"a": 1}',
    "line separator": "a\u2028b\u2029c\x85d",
    "line breaks": "a\r\nb\rc\nd\n",
    "quotes": "say \"a\", 'b' \\ c",
    "emoji": "\U0001f600é中",
    "spaces": " a ",
}
PAIRS = list(itertools.permutations(VALUES, 2))
TEXTS = {name: value for name, value in VALUES.items() if isinstance(value, str)}


def read_source(folder, source, template=RECIPE):
    """Return the recipe with one source, and that source."""
    (folder / "recipe.yaml").write_text(template.replace("SOURCE", source), encoding="utf-8")
    run = build.build_run(yaml_reader.read_recipe(folder / "recipe.yaml"))
    return run.recipe, run.sources["train"][0]


def decode(source_rows):
    """Return the rows of a source as dicts."""
    rows = source_rows.rows
    return list(decode_batch(rows[:], rows.features, source_rows.rename)) if len(rows) else []


def read_whole(folder, source):
    return decode(load.load_source(*read_source(folder, source)))


def read_head(folder, source):
    return decode(load.load_source(*read_source(folder, source), max_rows=10_000))


def read_stream(folder, source):
    return [row for batch in load.stream_source(*read_source(folder, source)) for row in decode(batch)]


READINGS = {"whole": read_whole, "head": read_head, "stream": read_stream}


def canonical(rows):
    """Return rows as JSON: 1, 1.0 and true are three values."""
    return [json.dumps(row) for row in rows]


@pytest.fixture
def small_blocks(monkeypatch):
    """Let the readers read blocks of a few characters and rows."""

    def set_size(characters, rows):
        for module in (json_records, csv_records, guard):
            monkeypatch.setattr(module, "BLOCK_CHARACTERS", characters)
        for module in (json_records, csv_records):
            monkeypatch.setattr(module, "BLOCK_ROWS", rows)

    return set_size


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("placing", ["first block", "later block", "second file"])
def test_every_pair_of_values_of_json_arrives_exactly(placing, reading, tmp_path, small_blocks):
    """All pairs are columns of one row, and the second value stands where `placing` says."""
    first = {f"c{n}": VALUES[a] for n, (a, _) in enumerate(PAIRS)}
    second = {f"c{n}": VALUES[b] for n, (_, b) in enumerate(PAIRS)}
    rows = [first, second, first]
    if placing == "later block":
        small_blocks(1000, 1)
        rows = [first] * 3 + [second] * 2
    if placing == "second file":
        jsonl(tmp_path / "a.jsonl", [first])
        jsonl(tmp_path / "b.jsonl", [second, first])
    else:
        jsonl(tmp_path / "a.jsonl", rows)
    assert canonical(READINGS[reading](tmp_path, "'*.jsonl'")) == canonical(rows)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("layout", ["array", "indented array", "field", "columns under a field"])
def test_every_value_of_a_json_file_that_is_one_value_arrives_exactly(layout, reading, tmp_path, small_blocks):
    small_blocks(64, 3)
    rows = [{"a": VALUES[a], "b": VALUES[b]} for a, b in PAIRS]
    content = rows
    source = "r.json"
    if layout == "field":
        content, source = {"version": "1.0", "rows": rows, "more": [{"rows": 1}]}, "{path: r.json, field: rows}"
    if layout == "columns under a field":
        columns = {name: [row[name] for row in rows] for name in ("a", "b")}
        content, source = {"version": "1.0", "rows": columns}, "{path: r.json, field: rows}"
    indent = 2 if layout == "indented array" else None
    (tmp_path / "r.json").write_text(json.dumps(content, indent=indent, ensure_ascii=False), encoding="utf-8")
    assert canonical(READINGS[reading](tmp_path, source)) == canonical(rows)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("placing", ["first block", "later block", "second file"])
def test_every_pair_of_cells_of_csv_is_the_text_of_the_file(placing, reading, tmp_path, small_blocks):
    pairs = list(itertools.permutations(TEXTS.values(), 2))
    names = [f"c{n}" for n in range(len(pairs))]
    first, second = (
        dict(zip(names, (a for a, _ in pairs), strict=False)),
        dict(zip(names, (b for _, b in pairs), strict=False)),
    )
    files = {"a.csv": [first, second, first]}
    if placing == "later block":
        small_blocks(1000, 1)
        files = {"a.csv": [first] * 3 + [second] * 2}
    if placing == "second file":
        files = {"a.csv": [first], "b.csv": [second, first]}
    for name, rows in files.items():
        with (tmp_path / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names, quoting=csv.QUOTE_ALL)
            writer.writeheader()
            writer.writerows(rows)
    expected = [row for rows in files.values() for row in rows]
    assert READINGS[reading](tmp_path, "'*.csv'") == expected


COLUMNS = {
    "text": pa.array(["a", "5"]),
    "large text": pa.array(["a", "5"], pa.large_string()),
    "integer": pa.array([1, 0]),
    "float": pa.array([0.1, 1.0]),
    "boolean": pa.array([True, False]),
    "dictionary": pa.array(["a", "b"]).dictionary_encode(),
    "list of texts": pa.array([["a"], []]),
    "turns": pa.array([[{"role": "user", "content": "a"}], []]),
    "turns with a name": pa.array([[{"role": "user", "content": "a", "name": "bob"}], []]),
    "object": pa.array([{"a": 1}, {"a": 2}]),
}


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("first", COLUMNS)
def test_every_pair_of_types_of_parquet_files_arrives_exactly(first, reading, tmp_path):
    for second, values in COLUMNS.items():
        for file in tmp_path.glob("*.parquet"):
            file.unlink()
        pq.write_table(pa.table({"c": COLUMNS[first]}), tmp_path / "a.parquet")
        pq.write_table(pa.table({"c": values, "extra": pa.array([1, 2])}), tmp_path / "b.parquet")
        rows = READINGS[reading](tmp_path, "'*.parquet'")
        expected = [{"c": value} for value in COLUMNS[first].to_pylist() + values.to_pylist()]
        assert canonical({"c": row["c"]} for row in rows) == canonical(expected), second


def test_value_of_another_type_in_an_unused_column_of_parquet_does_not_matter(tmp_path, go, here):
    pq.write_table(pa.table({"question": ["a?"], "answer": ["a"], "when": pa.array([1])}), here / "a.parquet")
    times = pa.array([10**9], pa.timestamp("s"))
    pq.write_table(pa.table({"question": ["b?"], "answer": ["b"], "when": times}), here / "b.parquet")
    code, out, err = go(QUESTION.replace("SOURCE", "'*.parquet'"), command=["preview"])
    assert code == 0, err
    assert "⟦b⟧" in out


LINES = {
    "last line without a line break": ('{"a": 1}\n{"a": 2}', [1, 2]),
    "blank lines": ('\n{"a": 1}\n\n  \n{"a": 2}\n\n', [2, 5]),
    "byte order mark": ('\ufeff{"a": 1}\n{"a": 2}\n', [1, 2]),
    "CRLF": ('{"a": 1}\r\n\r\n{"a": 2}\r\n', [1, 3]),
    "CR": ('{"a": 1}\r\r{"a": 2}\r', [1, 3]),
    "separators inside a text": ('{"a": "\u2028\u2029\x85"}\n{"a": 2}\n', [1, 2]),
    "array on one line": ('[{"a": 1}, {"a": 2}]', [1, 1]),
    "array over lines": ('\n[\n{"a":\n1},\r\n{"a": 2}\n]\n', [3, 5]),
}


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1 << 20])
@pytest.mark.parametrize("name", LINES)
def test_row_of_json_has_the_line_that_an_editor_counts(name, size, tmp_path, small_blocks):
    small_blocks(size, 1000)
    text, lines = LINES[name]
    (tmp_path / "r.json").write_bytes(text.encode())
    rows = load.load_source(*read_source(tmp_path, "r.json"))
    assert [rows.places.name_row(number) for number in range(2)] == [
        f"r.json row {number} (line {line})" for number, line in enumerate(lines, 1)
    ]


def test_row_of_csv_has_the_line_that_an_editor_counts(tmp_path):
    text = 'q,a\r\n\r\n"one\ntwo\r\nthree",x\r\n"four\rfive",y\n\nsix,z'
    (tmp_path / "r.csv").write_bytes(text.encode())
    rows = load.load_source(*read_source(tmp_path, "r.csv"))
    assert [rows.places.name_row(number) for number in range(3)] == [
        "r.csv row 1 (line 3)",
        "r.csv row 2 (line 6)",
        "r.csv row 3 (line 9)",
    ]
    assert [row["q"] for row in decode(rows)] == ["one\ntwo\r\nthree", "four\rfive", "six"]


def test_rows_at_random_with_blocks_of_any_size_arrive_exactly(tmp_path, small_blocks):
    rng = random.Random(0)
    for trial in range(300):
        small_blocks(rng.choice([1, 2, 3, 7, 20, 64]), rng.choice([1, 2, 1000]))
        rows = [
            {f"c{n}": rng.choice(list(VALUES.values())) for n in range(rng.randrange(1, 4))}
            for _ in range(rng.randrange(1, 6))
        ]
        line_break = rng.choice(["\n", "\r\n", "\r"])
        ascii_only = rng.random() < 0.5
        if trial % 2:
            text = "".join(json.dumps(row, ensure_ascii=ascii_only) + line_break for row in rows)
        else:
            text = json.dumps(rows, ensure_ascii=ascii_only, indent=rng.choice([None, 2])).replace("\n", line_break)
        (tmp_path / "r.json").write_bytes(text.encode())
        assert canonical(read_stream(tmp_path, "r.json")) == canonical(rows), text


COMPRESSIONS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("suffix", [*COMPRESSIONS, "zip"])
def test_compressed_file_gives_the_rows_of_the_plain_file(suffix, reading, tmp_path):
    content = '{"a": 1}\n\n{"a": "x"}\n'
    path = tmp_path / f"r.jsonl.{suffix}"
    if suffix == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("r.jsonl", content)
    else:
        path.write_bytes(COMPRESSIONS[suffix](content.encode()))
    assert READINGS[reading](tmp_path, path.name) == [{"a": 1}, {"a": "x"}]


CSV_KEYS = {
    "sep": ("q;a\n1;2\n", "sep: ';'", [{"q": "1", "a": "2"}]),
    "sep of two characters": ("q||a\n1||2\n", r"sep: '\|\|'", [{"q": "1", "a": "2"}]),
    "delimiter": ("q|a\n1|2\n", "delimiter: '|'", [{"q": "1", "a": "2"}]),
    "names": ("1,2\n", "names: [q, a]", [{"q": "1", "a": "2"}]),
    "names in place of a header": ("x,y\n1,2\n", "names: [q, a], header: 0", [{"q": "1", "a": "2"}]),
    "no header": ("1,2\n", "header: null", [{"0": "1", "1": "2"}]),
    "header later": ("note,\nq,a\n1,2\n", "header: 1", [{"q": "1", "a": "2"}]),
    "skiprows": ("note\n\nq,a\n1,2\n", "skiprows: 2", [{"q": "1", "a": "2"}]),
    "skiprows by number": (
        "q,a\nx,y\n1,2\nx,y\n3,4\n",
        "skiprows: [1, 3]",
        [{"q": "1", "a": "2"}, {"q": "3", "a": "4"}],
    ),
    "skipfooter": ("q,a\n1,2\ntotal,1\n", "skipfooter: 1", [{"q": "1", "a": "2"}]),
    "nrows": ("q,a\n1,2\n3,4\n5,6\n", "nrows: 2", [{"q": "1", "a": "2"}, {"q": "3", "a": "4"}]),
    "usecols": ("q,x,a\n1,9,2\n", "usecols: [q, a]", [{"q": "1", "a": "2"}]),
    "quotechar": ("q,a\n'1,5',2\n", 'quotechar: "\'"', [{"q": "1,5", "a": "2"}]),
    "quoting": ('q,a\n"1,2"\n', "quoting: 3", [{"q": '"1', "a": '2"'}]),
    "escapechar": ('q,a\n"1\\"5",2\n', 'escapechar: "\\\\"', [{"q": '1"5', "a": "2"}]),
    "skipinitialspace": ("q, a\n1, 2\n", "skipinitialspace: true", [{"q": "1", "a": "2"}]),
    "comment": ("# note\nq,a\n1,2 # two\n", "comment: '#'", [{"q": "1", "a": "2 "}]),
    "blank lines": ("q\n1\n\n2\n", "skip_blank_lines: false", [{"q": "1"}, {"q": ""}, {"q": "2"}]),
    "na_values": ("q,a\nNA,-\n", "na_values: '-'", [{"q": "NA", "a": None}]),
    "keep_default_na": ("q,a\nNA,\n", "keep_default_na: true", [{"q": None, "a": None}]),
    "no keys": (
        "q,a\nNA,\nnull,None\n007,1e5\n",
        "",
        [{"q": "NA", "a": ""}, {"q": "null", "a": "None"}, {"q": "007", "a": "1e5"}],
    ),
    "dialect": ("q\ta\n1\t2\n", "dialect: excel-tab", [{"q": "1", "a": "2"}]),
    "rows with too many cells": ("q,a\n1,2,3\n4,5\n", "on_bad_lines: skip", [{"q": "4", "a": "5"}]),
    "row with too few cells": ("q,a\n1\n", "", [{"q": "1"}]),
    "chunksize": ("q,a\n1,2\n", "chunksize: 1", [{"q": "1", "a": "2"}]),
    "column without a name": ("q,,a\n1,9,2\n", "", [{"q": "1", "Unnamed: 1": "9", "a": "2"}]),
}


@pytest.mark.parametrize("name", CSV_KEYS)
def test_key_of_csv_is_carried_out(name, tmp_path):
    text, keys, expected = CSV_KEYS[name]
    (tmp_path / "r.csv").write_bytes(text.encode())
    assert read_whole(tmp_path, f"{{path: r.csv, {keys}}}" if keys else "r.csv") == expected


@pytest.mark.parametrize("encoding", ["gbk", "utf-16", "latin-1", "utf-8"])
@pytest.mark.parametrize(("suffix", "text"), [("csv", "q,a\né,\xfc\n"), ("jsonl", '{"q": "é", "a": "\xfc"}\n')])
def test_encoding_of_the_recipe_is_used(encoding, suffix, text, tmp_path):
    (tmp_path / f"r.{suffix}").write_bytes(text.encode(encoding))
    assert read_whole(tmp_path, f"{{path: r.{suffix}, encoding: {encoding}}}") == [{"q": "é", "a": "\xfc"}]


FAULTS = {
    "a quote that is not closed": ("r.csv", 'q,a\n1,"2\n3,4\n', "r.csv:2"),
    "text after a quote": ("r.csv", 'q,a\n1,2\n3,"4"x\n', "r.csv:3"),
    "too many cells": ("r.csv", "q,a\n1,2\n\n3,4,5\n", "r.csv:4"),
    "a column twice": ("r.csv", "q,q\n1,2\n", "q"),
    "an array that ends early": ("r.json", '[{"a": 1},\n{"a": 2}', "r.json"),
    "a list without a comma": ("r.json", '[{"a": 1}\n{"a": 2}]', "r.json:2"),
    "a key that decides types": ("r.csv", "q,a\n1,2\n", "thousands"),
    "a line that is not JSON": ("r.jsonl", '{"a": 1}\n\n{"a": 2,}\n', "r.jsonl:3"),
    "a row that is a list": ("r.jsonl", '{"a": 1}\n[1]\n', "r.jsonl"),
}


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("name", FAULTS)
def test_file_that_cannot_be_read_is_refused_at_its_line(name, reading, tmp_path):
    file, text, expected = FAULTS[name]
    (tmp_path / file).write_bytes(text.encode())
    source = "{path: r.csv, thousands: ','}" if "types" in name else file
    with pytest.raises(UserError, match=expected):
        READINGS[reading](tmp_path, source)


WRONG = {
    "a number": ('{"question": "q", "answer": 5}', "answer is 5 (whole number)"),
    "null": ('{"question": "q", "answer": null}', "answer is empty (null)"),
    "a list": ('{"question": "q", "answer": ["a"]}', "answer is \"['a']\" (list)"),
    "a key written twice": ('{"question": "q", "answer": "a", "answer": "b"}', "answer"),
    "a lone surrogate": ('{"question": "q", "answer": "\\ud83d"}', "surrogate"),
}


@pytest.mark.parametrize("name", WRONG)
def test_value_of_the_wrong_kind_is_refused_with_file_row_and_line(name, here, go):
    line, problem = WRONG[name]
    right = '{"question": "q", "answer": "right"}\n'
    (here / "a.jsonl").write_text(right)
    (here / "b.jsonl").write_text(f"{right}\n{line}\n{right}")
    for command in (["check"], ["preview"]):
        code, _, err = go(QUESTION.replace("SOURCE", "'[ab].jsonl'"), command=command)
        assert code == 2
        assert "b.jsonl row 2 (line 3)\n" in err
        assert problem in err
        assert err.count("\n    -> ") == 1


def test_lone_surrogate_and_repeated_key_in_an_unused_column_do_not_matter(here, go):
    (here / "a.jsonl").write_text('{"question": "q", "answer": "a", "note": "\\ud83d"}\n')
    code, out, err = go(QUESTION.replace("SOURCE", "a.jsonl"), command=["preview"])
    assert code == 0, err
    assert "⟦a⟧" in out


def test_numbers_of_tools_and_calls_are_trained_as_they_stand(here, go):
    schema = {"x": {"type": "number", "default": None, "minimum": 0, "maximum": 1.0}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": schema}}}]
    arguments = {"x": 0.1234567890123456, "y": 12345678901234567890123, "z": None, "w": 1.0}
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    jsonl(
        here / "a.jsonl",
        [{"tools": tools, "messages": turns}, {"messages": [*turns[:1], {"role": "assistant", "content": "a"}]}],
    )
    recipe = QUESTION.replace("SOURCE", "a.jsonl") + "tokenizer: {chat_template: qwen2_5}\n"
    code, out, err = go(recipe, command=["preview"])
    assert code == 0, err
    assert '"default": null, "minimum": 0, "maximum": 1.0' in out
    assert json.dumps(arguments) in out


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "txt", "parquet", "jsonl.gz"])
def test_file_with_other_rows_but_the_same_size_and_time_is_read_anew(suffix, tmp_path):
    def write(word):
        path = tmp_path / f"r.{suffix}"
        rows = {"jsonl": f'{{"text": "{word}"}}\n', "csv": f"text\n{word}\n", "txt": f"{word}\n"}
        if suffix == "parquet":
            pq.write_table(pa.table({"text": [word]}), path, compression="none")
        elif suffix == "jsonl.gz":
            path.write_bytes(gzip.compress(rows["jsonl"].encode(), compresslevel=0, mtime=0))
        else:
            path.write_text(rows[suffix])
        os.utime(path, ns=(10**18, 10**18))
        return path.stat().st_size

    size = write("alpha")
    assert read_whole(tmp_path, f"r.{suffix}") == [{"text": "alpha"}]
    assert write("gamma") == size
    assert read_whole(tmp_path, f"r.{suffix}") == [{"text": "gamma"}]


def test_saved_dataset_with_other_rows_has_another_fingerprint(tmp_path):
    folder = tmp_path / "ds"
    fingerprints = set()
    for word in ("alpha", "gamma", "alpha"):
        rows = Dataset(pa.table({"text": [word]}), fingerprint="same")
        rows.save_to_disk(folder)
        source_rows = load.load_source(*read_source(tmp_path, "./ds"))
        assert decode(source_rows) == [{"text": word}]
        fingerprints.add(source_rows.rows._fingerprint)
    assert len(fingerprints) == 2


@pytest.mark.parametrize("reading", READINGS)
def test_files_of_a_folder_are_read_like_files_that_the_recipe_names(reading, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    jsonl(folder / "train-0.jsonl", [{"a": "00007", "b": 1}])
    jsonl(folder / "train-1.jsonl", [{"a": 5, "c": {"x": None}}])
    jsonl(folder / "test.jsonl", [{"a": "t"}])
    expected = [{"a": "00007", "b": 1}, {"a": 5, "c": {"x": None}}]
    assert canonical(READINGS[reading](tmp_path, "./data")) == canonical(expected)
    assert READINGS[reading](tmp_path, "{path: ./data, split: test}") == [{"a": "t"}]


def test_part_of_a_split_is_read_and_keeps_its_rows_and_lines(tmp_path):
    jsonl(tmp_path / "r.jsonl", [{"a": n} for n in range(10)])
    rows = load.load_source(*read_source(tmp_path, "{path: r.jsonl, split: 'train[30%:50%]+train[9:]'}"))
    assert [row["a"] for row in decode(rows)] == [3, 4, 9]
    assert rows.places.name_row(2) == "r.jsonl row 10 (line 10)"


def test_columns_are_those_of_all_rows_with_the_number_of_their_values(tmp_path):
    jsonl(tmp_path / "r.jsonl", [{"a": 1, "b": None}] * 3 + [{"a": 2, "system": "s"}])
    for reading in (None, 10):
        rows = load.load_source(*read_source(tmp_path, "r.jsonl"), max_rows=reading)
        assert rows.columns == {"a": 4, "b": 0, "system": 1}


def test_labels_of_a_saved_dataset_and_splits_are_read(tmp_path):
    features = Features({"answer": ClassLabel(names=["no", "yes"]), "messages": List(Json()), "text": Value("string")})
    rows = Dataset.from_dict({"answer": [1], "messages": [[{"a": 1}]], "text": ["t"]}, features=features)
    DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "ds")
    assert [row["text"] for row in read_whole(tmp_path, "./ds")] == ["t"]


BROKEN = {
    "changes a value": lambda block: block._replace(records=[record.replace("7", "8") for record in block.records]),
    "loses a row": lambda block: block._replace(records=block.records[:-1], lines=block.lines[:-1]),
    "adds a row": lambda block: block._replace(
        records=[*block.records, block.records[-1]], lines=[*block.lines, block.lines[-1]]
    ),
    "counts lines wrongly": lambda block: block._replace(lines=[line + 1 for line in block.lines]),
    "swaps two rows": lambda block: block._replace(records=block.records[::-1]),
}
GUARDED = {
    "r.jsonl": "".join(f'{{"a": "7 {n}"}}\n' for n in range(5)),
    "r.json": json.dumps([{"a": f"7 {n}"} for n in range(5)], indent=1),
    "r.csv": "a,b\n" + "".join(f'"7 {n}\n",x\n' for n in range(5)),
    "r.txt": "".join(f"7 {n}\n" for n in range(5)),
}


@pytest.mark.parametrize("file", GUARDED)
@pytest.mark.parametrize("name", BROKEN)
def test_reader_that_gives_something_else_than_the_file_is_stopped(name, file, tmp_path, monkeypatch):
    (tmp_path / file).write_text(GUARDED[file])
    assert len(read_stream(tmp_path, file)) == 5
    original = record_store.RecordReader.read
    monkeypatch.setattr(record_store.RecordReader, "read", lambda self, file: map(BROKEN[name], original(self, file)))
    monkeypatch.setattr(record_store, "CODE", f"{name} {tmp_path}")  # no entry of the cache
    for reading in (read_whole, read_stream):
        with pytest.raises(NotAsAsked, match="r\\.") as stopped:
            reading(tmp_path, file)
        assert stopped.value.faults[0].code == "data.misread_row"


def test_row_that_cannot_be_parsed_is_an_error_of_that_row_alone(tmp_path):
    (tmp_path / "r.jsonl").write_text('{"a": 1}\n{"a": }\n{"a": 3}\n')
    recipe, source = read_source(tmp_path, "r.jsonl")
    recipe.values["data"]["on_bad_row"] = "drop"
    rows = load.load_source(recipe, source)
    assert rows.unparsed == 1
    first, second, third = decode(rows)
    assert (first, third) == ({"a": 1}, {"a": 3})
    assert isinstance(second, FormatError)


def test_files_of_the_hub_are_read_exactly_and_again_without_a_network(tmp_path, monkeypatch):
    """`datasets` is told that the hub's data set is a folder; its cache is that of the tests."""
    folder = tmp_path / "hub"
    folder.mkdir()
    jsonl(folder / "train-0.jsonl", [{"a": "00007"}])
    jsonl(folder / "train-1.jsonl", [{"a": 5}])
    original, is_online = load.hub_files.load_dataset_builder, [True]

    def build(name, **keywords):
        if not is_online[0]:
            raise ConnectionError("no network")
        return original(str(folder), **keywords)

    monkeypatch.setattr(load.hub_files, "load_dataset_builder", build)
    monkeypatch.setattr(load.hub, "check_id", lambda *_: is_online[0])
    monkeypatch.setattr(
        load.hub_files.datasets,
        "DownloadManager",
        lambda **_: type("Manager", (), {"download": staticmethod(lambda path: path)}),
    )
    expected = [{"a": "00007"}, {"a": 5}]
    source = f"someone/{tmp_path.name.replace('_', '-')}"
    assert canonical(read_head(tmp_path, source)) == canonical(expected)
    assert canonical(read_whole(tmp_path, source)) == canonical(expected)
    is_online[0] = False
    for reading in READINGS.values():
        assert canonical(reading(tmp_path, source)) == canonical(expected)
    with pytest.raises(UserError, match="other"):
        read_whole(tmp_path, "someone/other")
