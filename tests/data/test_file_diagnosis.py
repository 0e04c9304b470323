"""A data file is diagnosed from its raw bytes: what it is, which line is wrong, and the exact text to write."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import re
import sqlite3
import tarfile
import zipfile

import pandas
import pytest
from conftest import RECIPE as CLI_RECIPE

from trl_sft.data import load, pipeline
from trl_sft.data.file_diagnosis import content, diagnose, encodings, json_text, table
from trl_sft.errors import UserError
from trl_sft.recipe import build, yaml_reader

RECIPE = "model: {name_or_path: trl_sft:tiny}\ndata: {train: SOURCE}\ntrain: {output_dir: out, max_steps: 2}\n"
ROW = '{"question": "Say a.", "answer": "a"}\n'


def read_source(folder, source):
    """Return the recipe with one source, and that source."""
    (folder / "recipe.yaml").write_text(RECIPE.replace("SOURCE", source), encoding="utf-8")
    run = build.build_run(yaml_reader.read_recipe(folder / "recipe.yaml"))
    return run.recipe, run.sources["train"][0]


def read_rows(folder, source):
    """Return the rows of a source, without the columns that only describe them."""
    source_rows = load.load_source(*read_source(folder, source))
    return [source_rows.decode_row(number) for number in range(len(source_rows.rows))]


def explain(folder, source):
    """Return the faults of a source as a user sees them; "" = it can be used."""
    try:
        pipeline.inspect_source(*read_source(folder, source))
    except UserError as error:
        return str(error) + "\n"
    return ""


QUESTIONS = {
    "gbk": ("说出苹果的颜色。", "红色"),
    "gb18030": ("说出苹果的颜色,𠮷。", "红色"),
    "big5": ("請說明蘋果的顏色。", "紅色"),
    "shift_jis": ("日本の首都はどこですか。", "東京です"),
    "euc_jp": ("日本の首都はどこですか。", "東京です"),
    "cp949": ("사과의 색깔은 무엇입니까?", "빨간색입니다"),
    "cp1252": ("Où est le café d’été ?", "Près de l'église"),
    "cp1250": ("Co to jest żółw?", "Zwierzę łagodne, z rzędu żółwi"),
    "cp1251": ("Какого цвета небо?", "Голубого"),
    "koi8-r": ("Какого цвета небо?", "Голубого"),
    "cp1253": ("Ποιο είναι το χρώμα;", "μπλε"),
    "cp1255": ("מה השם של הילד", "דוד"),
    "cp1256": ("ما لون السماء", "أزرق"),
    "cp874": ("ท้องฟ้าสีอะไร", "ฟ้า"),
    "utf-16": ("Où est le café ?", "là"),
}
WRITERS = {
    "csv": lambda question, answer: f'question,answer\n"{question}","{answer}"\n',
    "tsv": lambda question, answer: f"question\tanswer\n{question}\t{answer}\n",
    "json": lambda question, answer: (
        json.dumps([{"question": question, "answer": answer}], ensure_ascii=False, indent=1) + "\n"
    ),
    "jsonl": lambda question, answer: json.dumps({"question": question, "answer": answer}, ensure_ascii=False) + "\n",
}


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("encoding", QUESTIONS)
def test_encoding_is_offered_and_the_offered_source_reads_the_same_text(tmp_path, encoding, suffix):
    question, answer = QUESTIONS[encoding]
    file = tmp_path / f"rows.{suffix}"
    file.write_bytes(WRITERS[suffix](question, answer).encode(encoding))
    recipe, source = read_source(tmp_path, file.name)
    faults = diagnose.explain_file(recipe, source, file)
    assert len(faults) == 1
    offered = re.findall(r"`(\{path: .*?\})`", faults[0].fix)
    assert offered, faults[0]
    assert read_rows(tmp_path, offered[0]) == [{"question": question, "answer": answer}]


@pytest.mark.parametrize("encoding", [name for name in QUESTIONS if name != "utf-16"])
def test_encoding_of_a_text_file_names_the_line_and_shows_the_text(tmp_path, encoding):
    question, answer = QUESTIONS[encoding]
    (tmp_path / "rows.txt").write_bytes(f"first line\r\n{question}\r\n{answer}\r\n".encode(encoding))
    fault = diagnose.explain_file(*read_source(tmp_path, "rows.txt"), tmp_path / "rows.txt")[0]
    assert fault.where == "rows.txt:2"
    assert re.search(r"[^\x00-\x7f]+", question)[0] in fault.problem


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16", "utf-32"])
def test_wide_encoding_is_found_before_the_file_is_read(tmp_path, encoding):
    (tmp_path / "rows.jsonl").write_bytes((ROW * 3).encode(encoding))
    recipe, source = read_source(tmp_path, "rows.jsonl")
    fault = diagnose.check_head(recipe, source, tmp_path / "rows.jsonl")[0]
    assert f"encoding: {encoding}" in fault.fix


def test_utf8_with_a_mark_is_no_fault(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(ROW.encode("utf-8-sig"))
    assert explain(tmp_path, "rows.jsonl") == ""


def test_text_that_reads_well_in_two_encodings_is_shown_in_both(tmp_path, matches):
    (tmp_path / "rows.csv").write_bytes("question,answer\n臺灣,是\n".encode("big5"))
    recipe, source = read_source(tmp_path, "rows.csv")
    faults = diagnose.explain_file(recipe, source, tmp_path / "rows.csv")
    assert len(encodings.find_candidates((tmp_path / "rows.csv").read_bytes())) == 2
    matches("diagnosis_two_encodings", "\n".join(map(str, faults)) + "\n")


def test_bytes_that_no_encoding_explains_offer_none(tmp_path):
    data = b"question,answer\n" + bytes(range(0x80, 0x100)) + b"\n"
    assert encodings.find_candidates(data) == []


def test_lines_of_another_encoding_in_a_utf8_file_are_named(tmp_path, matches):
    rows = '{"question": "Où ça ?", "answer": "là"}\n' * 20
    data = rows.encode() + '{"question": "Déjà vu ?", "answer": "été"}\n'.encode("cp1252") + rows.encode()
    (tmp_path / "rows.jsonl").write_bytes(data)
    faults = diagnose.explain_file(*read_source(tmp_path, "rows.jsonl"), tmp_path / "rows.jsonl")
    matches("diagnosis_mixed_encodings", "\n".join(map(str, faults)) + "\n")


def test_wrong_encoding_of_the_recipe_is_the_fault_not_the_file(tmp_path):
    (tmp_path / "rows.csv").write_text("question,answer\nété,là\n", encoding="utf-8")
    recipe, source = read_source(tmp_path, "{path: rows.csv, encoding: ascii}")
    fault = diagnose.explain_file(recipe, source, tmp_path / "rows.csv")[0]
    assert fault.fix == "Remove `encoding`."


def make_sqlite(folder):
    """Return the bytes of an SQLite database."""
    with sqlite3.connect(folder / "db") as connection:
        connection.execute("create table rows (question, answer)")
    return (folder / "db").read_bytes()


def make_zip(*names):
    """Return the bytes of a zip archive that holds files of these names."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return buffer.getvalue()


def make_tar():
    """Return the bytes of a tar archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("rows.jsonl"))
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123456789\n"
FOREIGN = {
    "lfs.jsonl": POINTER,
    "lfs.parquet": POINTER,
    "xet.csv": b"# xet version 0\nfilesize = 1234\nhash = 'ab'\n",
    "hub_page.jsonl": b'<!doctype html>\n<html class=""><head><meta content="huggingface">',
    "github_page.json": b"\n<html><head><title>github",
    "page.parquet": b"<!DOCTYPE html><html>",
    "denied.jsonl": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>',
    "feed.json": b'<?xml version="1.0"?><rss>',
    "missing.jsonl": b"Entry not found",
    "table.jsonl": b"PAR1\x15\x04",
    "arrow.json": b"ARROW1\0\0\xff",
    "database.jsonl": make_sqlite,
    "workbook.csv": make_zip("xl/workbook.xml"),
    "letter.txt": make_zip("word/document.xml"),
    "weights.jsonl": make_zip("archive/data.pkl"),
    "old_workbook.csv": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
    "pickle.jsonl": b"\x80\x04\x95\x10",
    "rows.tar.jsonl": make_tar(),
    "manual.txt": b"%PDF-1.7",
    "lines.parquet": ROW.encode(),
    "noise.parquet": b"\x00\x01\x02\x03noise",
}


def test_content_of_another_kind_is_named_with_what_to_do(tmp_path, matches):
    messages = []
    for name, data in FOREIGN.items():
        (tmp_path / name).write_bytes(data(tmp_path) if callable(data) else data)
        faults = diagnose.check_head(*read_source(tmp_path, name), tmp_path / name)
        assert len(faults) == 1, name
        messages.append(str(faults[0]).replace(str(tmp_path), "FOLDER"))
    matches("diagnosis_content", "\n".join(messages) + "\n")


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_file_is_read_and_one_that_ends_early_is_named(tmp_path, compress):
    data = compress((ROW * 500).encode())
    (tmp_path / "rows.jsonl.gz").write_bytes(data)
    recipe, source = read_source(tmp_path, "rows.jsonl.gz")
    assert diagnose.explain_file(recipe, source, tmp_path / "rows.jsonl.gz") == []
    (tmp_path / "rows.jsonl.gz").write_bytes(data[:-8])
    fault = diagnose.explain_file(recipe, source, tmp_path / "rows.jsonl.gz")[0]
    assert "ends too early" in fault.problem


JSON_TEXTS = {
    "python_repr": "{'question': 'a', 'answer': None}\n",
    "comma_before_brace": ROW + '{"question": "a", "answer": "b",}\n',
    "comma_after_each_line": ROW.replace("\n", ",\n") * 2,
    "comma_in_list": "[\n" + ROW.strip() + ",\n]",
    "comment_line": "// of 2024\n" + ROW,
    "comment_in_list": "[\n  # of 2024\n" + ROW + "]",
    "truncated_lines": ROW * 2 + '{"question": "a", "ans',
    "truncated_list": "[\n" + ROW.strip() + ',\n{"question": "a", "ans',
    "lone_surrogate": ROW * 2 + '{"question": "a \\ud83d", "answer": "x"}\n',
    "low_surrogate": '{"question": "a \\ude00 b", "answer": "x"}\n',
    "repeated_key": ROW * 2 + '{"question": "a", "answer": "x", "answer": "y"}\n',
    "list_in_each_line": '["a", "b"]\n["c", "d"]\n',
    "text_in_each_line": '"a"\n"b"\n',
    "numbers_in_list": "[1, 2]",
    "empty_list": "[]",
    "line_break_in_text": '{"question": "a\n b", "answer": "b"}\n' + ROW,
    "tab_in_text": '{"question": "a\tb", "answer": "b"}\n',
    "wrong_escape": '{"question": "\\d+", "answer": "b"}\n',
    "objects_over_lines": '{\n "question": "a",\n "answer": "b"\n}\n' * 2,
    "objects_in_one_line": ROW.strip() * 2 + "\n",
    "one_object_over_lines": '{\n "question": "a",\n "answer": "b"\n}\n',
    "rows_under_a_key": '{"version": 1,\n "data": [\n' + ROW.strip() + ",\n" + ROW.strip() + "\n]}\n",
    "rows_two_keys_deep": '{"result":\n {"rows": [' + ROW.strip() + "]}}\n",
    "columns": '{"question": ["a", "b"],\n "answer": ["c", "d"]}\n',
    "rows_under_ids": '{"17":\n ' + ROW.strip() + ', "18": ' + ROW.strip() + "}\n",
    "csv": "question,answer\na,b\n",
    "blank": "\n \n",
    "many_mistakes": "{oops}\n" * 8,
}


def test_mistakes_of_json_are_named_with_their_line_and_the_text_to_write(matches):
    messages = []
    for name, text in JSON_TEXTS.items():
        faults = json_text.find_faults(text, f"{name}.jsonl")
        assert faults, name
        messages += map(str, faults)
    matches("diagnosis_json", "\n".join(messages) + "\n")


VALID_JSON = {
    "lines": ROW * 3,
    "blank lines between": ROW + "\n\n" + ROW,
    "list": "[\n" + ROW.strip() + ",\n" + ROW + "]\n",
    "list of texts": '["a", "b"]',
    "pair of surrogates": '{"question": "\\ud83d\\ude00 \\\\ud83d", "answer": "x"}\n',
    "nan": '{"question": "a", "answer": "b", "score": NaN, "rank": -Infinity}\n',
    "unicode line separators": '{"question": "a\u2028b\x85c", "answer": "x\u2029y"}\n' * 2,
    "same key in nested objects": '{"question": "a", "answer": "b", "meta": {"answer": 1}}\n',
}


@pytest.mark.parametrize("name", VALID_JSON)
def test_valid_json_has_no_fault(name):
    assert json_text.find_faults(VALID_JSON[name], "rows.jsonl") == []


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_lines_are_counted_as_an_editor_counts_them(line_end):
    text = line_end.join(['{"question": "a\u2028b\x0cc", "answer": "x"}'.replace("\x0c", "\x85")] * 3 + ["{oops}", ""])
    assert [fault.where for fault in json_text.find_faults(text, "rows.jsonl")] == ["rows.jsonl:4"]


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_separator_of_a_table_is_offered_and_the_offered_source_reads_its_columns(tmp_path, separator):
    text = f'question{separator}answer\n"Où, là?"{separator}b\nc{separator}d\n'
    (tmp_path / "rows.csv").write_text(text, encoding="utf-8")
    message = explain(tmp_path, "rows.csv")
    assert message.startswith("rows.csv:1\n")
    offered = re.search(r"`(\{path: .*?\})`", message)[1]
    assert read_rows(tmp_path, offered)[0] == {"question": "Où, là?", "answer": "b"}


def test_commas_are_offered_where_the_recipe_says_another_separator(tmp_path):
    (tmp_path / "rows.tsv").write_text("question,answer\na,b\n", encoding="utf-8")
    assert 'sep: ","' in explain(tmp_path, "rows.tsv")


TABLES = {
    "long_row": "question,answer\na,b\nc,d,e\n",
    "open_quote": 'question,answer\na,"b\nc,d\ne,f\n',
    "json": ROW,
    "blank": "\n\n",
}


def test_mistakes_of_a_table_are_named_with_their_line(matches):
    messages = [str(fault) for name, text in TABLES.items() for fault in table.find_faults(text, f"{name}.csv", ",")]
    matches("diagnosis_table", "\n".join(messages) + "\n")


def test_row_of_a_table_is_named_by_the_line_on_which_it_begins():
    text = 'question,answer\r\n"a\r\nb",c\r\nd,e,f\r\n'
    assert [fault.where for fault in table.find_faults(text, "rows.csv", ",")] == ["rows.csv:4"]


@pytest.mark.parametrize("line_ends", ["", "\n"])
def test_key_that_holds_the_rows_is_offered_and_the_offered_source_reads_them(tmp_path, line_ends):
    text = f'{{"version": "1",{line_ends} "data": [{ROW.strip()}, {ROW.strip()}]}}\n'
    (tmp_path / "rows.json").write_text(text, encoding="utf-8")
    offered = re.search(r"`(\{path: .*?\})`", explain(tmp_path, "rows.json"))[1]
    assert read_rows(tmp_path, offered) == [json.loads(ROW)] * 2


def test_head_of_a_healthy_file_is_all_that_is_read_of_it(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(ROW * 10_000, encoding="utf-8")
    recipe, source = read_source(tmp_path, "rows.jsonl")
    sizes = []
    original = content.open_bytes

    class Counted:
        def __init__(self, file):
            self.file = file

        def read(self, size=-1):
            sizes.append(size)
            return self.file.read(size)

    @contextlib.contextmanager
    def open_counted(path):
        with original(path) as file:
            yield Counted(file)

    monkeypatch.setattr(content, "open_bytes", open_counted)
    assert diagnose.check_head(recipe, source, tmp_path / "rows.jsonl") == []
    assert sizes
    assert all(0 < size <= content.HEAD for size in sizes)


@pytest.mark.parametrize("turns", [[{"role": "user", "content": "a"}], [{"from": "human", "value": "a"}]])
def test_turns_of_a_chat_are_not_taken_for_rows_under_a_key(turns):
    assert json_text.find_row_key({"dialog": turns, "id": 1}) == ""


def test_broken_byte_of_a_large_file_is_found_where_windows_cut_characters():
    data = "日本語テキスト、\n".encode() * 20_000
    assert encodings.find_broken_utf8(data) == []
    position = 300_009  # the beginning of a character
    assert encodings.find_broken_utf8(data[:position] + b"\xff" + data[position:]) == [position]


def test_file_of_another_encoding_among_utf8_files_becomes_a_source_of_its_own(tmp_path, matches):
    (tmp_path / "a.csv").write_text("question,answer\n说出苹果的颜色。,红色\n", encoding="utf-8")
    (tmp_path / "b.csv").write_bytes("question,answer\n说出苹果的颜色。,红色\n".encode("gbk"))
    matches("diagnosis_encoding_of_one_file", explain(tmp_path, "'*.csv'"))


def test_file_of_another_separator_among_others_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\na,b\n", encoding="utf-8")
    (tmp_path / "b.csv").write_text("question;answer\na;b\n", encoding="utf-8")
    assert explain(tmp_path, "'*.csv'").startswith("b.csv:1\n")


def test_single_column_that_holds_semicolons_is_not_taken_for_several(tmp_path):
    (tmp_path / "rows.csv").write_text("text\none; two\nthree; four\n", encoding="utf-8")
    assert explain(tmp_path, "rows.csv") == ""


def test_encoding_of_a_few_bytes_is_offered_but_never_set_by_itself(tmp_path):
    (tmp_path / "rows.csv").write_bytes("question,answer\nsay,是\n".encode("gbk"))
    recipe, source = read_source(tmp_path, "rows.csv")
    fault = diagnose.check_head(recipe, source, tmp_path / "rows.csv")[0]
    assert "encoding: gbk" in fault.fix
    assert fault.edits == ()


@pytest.mark.parametrize(
    "row",
    [
        '{"question": "hi \\ud83d", "answer": "x"}',
        '{"question": "hi", "answer": "\\ude00 x"}',
        '{"messages": [{"role": "user", "content": "\\ude00"}, {"role": "assistant", "content": "x"}]}',
    ],
)
def test_half_of_a_character_in_a_text_that_is_read_is_a_fault_of_its_row(go, here, row):
    (here / "rows.jsonl").write_text(row + "\n", encoding="utf-8")
    code, _, err = go(CLI_RECIPE, command=["preview"])
    assert code == 2
    assert "rows.jsonl row 1" in err
    assert "lone surrogate" in err


def test_half_of_a_character_in_a_column_that_nothing_reads_does_not_matter(go, here):
    (here / "rows.jsonl").write_text('{"question": "hi", "answer": "x", "extra": "\\ud83d"}\n', encoding="utf-8")
    code, _, err = go(CLI_RECIPE, command=["preview"])
    assert code == 0, err


COLUMNS = {
    "lists": {"question": ["a", "b"], "answer": ["c", "d"]},
    "pandas": {"question": {"0": "a", "1": "b"}, "answer": {"0": "c", "1": "d"}},
    "unknown names": {"foo": ["a", "b"], "bar": ["c", "d"]},
}


@pytest.mark.parametrize("name", COLUMNS)
def test_file_of_columns_is_named_with_the_command_that_writes_rows(tmp_path, name):
    (tmp_path / "rows.json").write_text(json.dumps(COLUMNS[name]), encoding="utf-8")
    message = explain(tmp_path, "rows.json")
    assert "one object that holds the columns" in message
    command = re.search(r"`(pandas.*?)`", message)[1].replace("'rows.json'", "FILE").replace("'lines.jsonl'", "OUT")

    eval(command, {"pandas": pandas, "FILE": tmp_path / "rows.json", "OUT": tmp_path / "lines.jsonl"})
    rows = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [list(row.values()) for row in rows] == [["a", "c"], ["b", "d"]]


def test_single_row_with_a_chat_is_no_file_of_columns(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns, "tools": []}) + "\n", encoding="utf-8")
    assert explain(tmp_path, "rows.jsonl") == ""


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl.bz2", "rows.jsonl.xz"])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9])
def test_damage_inside_a_compressed_file_is_a_fault_of_the_file(go, here, name, share):
    """Each decompressor raises errors of its own: zlib.error, LZMAError, OSError, EOFError."""
    compress = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[name.rpartition(".")[2]]
    rows = "".join(json.dumps({"question": f"What is {n * n}?", "answer": str(n * n)}) + "\n" for n in range(3000))
    data = bytearray(compress(rows.encode()))
    start = int(len(data) * share)
    data[start : start + 40] = bytes(40)
    (here / name).write_bytes(data)
    code, _, err = go(CLI_RECIPE.replace("rows.jsonl", name), command=["check"])
    assert code == 2
    assert "-> Download or copy the file again." in err
    assert "Traceback" not in err
