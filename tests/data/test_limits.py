"""No file hangs or fills the memory: long rows, compressed bombs, deep nesting, many columns, keys and turns."""

import bz2
import gzip
import io
import lzma
import tracemalloc
import zipfile
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trl_sft import console
from trl_sft.data import turn_shapes
from trl_sft.data.file_diagnosis import json_text, parquet_size
from trl_sft.data.messages import FormatError
from trl_sft.data.readers import csv_records, json_records, record_store, text_records
from trl_sft.data.readers.csv_records import CsvOptions
from trl_sft.data.readers.data_file import DataFile
from trl_sft.data.readers.record_block import BlankLinesError, LongRecordError, ReadingError
from trl_sft.data.readers.record_store import FileError, RecordReader
from trl_sft.data.source_rows import parse_record
from trl_sft.data.turn_shapes import ShapeError
from trl_sft.errors import Fault

ROW = '{"question": "a", "answer": "b"}\n'
SIZE = 40_000_000  # characters of a bomb
DEPTH = 1_000_000
LINE = "a" * 99 + "\n"


def zip_file(data):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.jsonl", data)
    return buffer.getvalue()


COMPRESSIONS = {
    "plain": bytes,
    "gzip": lambda data: gzip.compress(data, 1),
    "bzip2": lambda data: bz2.compress(data, 1),
    "xz": lambda data: lzma.compress(data, preset=0),
    "zip": zip_file,
}
# reader, what stands before the long row, what it is made of, the line that the message names
BOMBS = {
    "a line of JSON": (RecordReader("json"), ROW * 2, "a", 3),
    "an element of a list": (RecordReader("json"), f'[{ROW.strip()},\n\n"', "a", 3),
    "a value under a key": (RecordReader("json", field="rows"), '{"rows": [\n"', "a", 2),
    "white space": (RecordReader("json"), "", " \n", 1),
    "a line of CSV": (RecordReader("csv"), "question,answer\na,b\n", "a", 3),
    "a quote that is not closed": (RecordReader("csv"), 'question,answer\na,b\n"', LINE, 3),
    "a line of CSV that a pattern splits": (RecordReader("csv", csv=CsvOptions(sep=", +")), "q, a\n", "a", 2),
    "a line of text": (RecordReader("text"), "one\ntwo\n", "a", 3),
    "a paragraph": (RecordReader("text", sample_by="paragraph"), "one\n\n", LINE, 3),
    "a document": (RecordReader("text", sample_by="document"), "", LINE, 1),
}


def read(reader, path):
    for _ in record_store.read_tables(reader, [DataFile(path.name, str(path))]):
        pass


@pytest.fixture
def limited(monkeypatch):
    for module in (json_records, csv_records, text_records):
        monkeypatch.setattr(module, "LONGEST_RECORD", 2_000_000)


def check_bomb(path, reader, data, line):
    """Read a file whose long row is refused on its line, with the memory of a few blocks."""
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(FileError) as refused:
        read(reader, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    error = refused.value.error
    assert isinstance(error, LongRecordError)
    assert error.line == line
    assert error.code == "data.long_record"
    assert peak < SIZE / 2


@pytest.mark.parametrize("kind", BOMBS)
def test_a_row_without_end_is_refused_with_its_line(tmp_path, limited, kind):
    reader, before, unit, line = BOMBS[kind]
    data = (before + unit * (SIZE // len(unit))).encode()
    check_bomb(tmp_path / "rows.gz", reader, gzip.compress(data, 1), line)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_compressed_row_without_end_is_refused_with_its_line(tmp_path, limited, compression):
    data = COMPRESSIONS[compression]((ROW + "a" * SIZE).encode())
    check_bomb(tmp_path / "rows", RecordReader("json"), data, 2)


@pytest.mark.parametrize(("builder", "before"), [("json", ROW), ("csv", "question,answer\na,b\n")])
def test_too_many_blank_lines_are_refused(tmp_path, monkeypatch, builder, before):
    for module in (json_records, csv_records):
        monkeypatch.setattr(module, "MOST_BLANK_LINES", 1000)
    path = tmp_path / "rows"
    path.write_text(before + "\n" * 1000 + before.splitlines()[-1], encoding="utf-8")
    read(RecordReader(builder), path)
    path.write_text(before + "\n" * 5000, encoding="utf-8")
    with pytest.raises(FileError) as refused:
        read(RecordReader(builder), path)
    assert isinstance(refused.value.error, BlankLinesError)
    assert refused.value.error.line == before.count("\n") + 1


@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("size", range(1, 9))
def test_a_line_break_at_the_end_of_a_block_is_one_line_break(tmp_path, monkeypatch, line_break, size):
    monkeypatch.setattr(json_records, "BLOCK_CHARACTERS", size)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(f'{line_break}{line_break}1{line_break}22{line_break}{line_break}"a"{line_break}'.encode())
    blocks = list(json_records.read_json(DataFile("r", str(path)), field=None, encoding="utf-8", errors="strict"))
    rows = [pair for block in blocks for pair in zip(block.records, block.lines, strict=True)]
    assert rows == [("1", 3), ("22", 4), ('"a"', 6)]


def test_a_file_of_carriage_returns_is_read_in_blocks(tmp_path):
    class CountingStream(io.StringIO):
        reads = 0

        def read(self, *arguments):
            self.reads += 1
            return super().read(*arguments)

    stream = CountingStream("\r" * 100_000, newline="")
    breaks = json_records._WholeBreaks(stream)
    assert "".join(iter(lambda: breaks.read(1000), "")) == "\r" * 100_000
    assert stream.reads < 300


NESTED = "[" * DEPTH + "]" * DEPTH
DEEP_LINES = {"a row": '{"question": ' + NESTED + "}", "objects": '{"a":' * DEPTH + "1" + "}" * DEPTH}
DEEP_VALUES = {
    "an element": (RecordReader("json"), f"[{ROW.strip()},\n{NESTED}]"),
    "another key": (RecordReader("json", field="rows"), '{\n"x": ' + NESTED + ', "rows": []}'),
}


@pytest.mark.parametrize("kind", DEEP_LINES)
def test_a_line_nested_a_million_deep_is_a_row_that_cannot_be_parsed(tmp_path, kind):
    record = DEEP_LINES[kind]
    path = tmp_path / "rows.json"
    path.write_text(ROW + record + "\n", encoding="utf-8")
    read(RecordReader("json"), path)
    assert record_store.summarize([record]).unparsed == 1
    with pytest.raises(FormatError, match="nested too deeply"):
        parse_record(record)
    (fault,) = json_text.find_faults(ROW + record, "rows.json")
    assert fault.where.line == 2
    assert fault.problem.startswith("the line is nested too deeply to be read")


@pytest.mark.parametrize("kind", DEEP_VALUES)
def test_a_value_nested_a_million_deep_is_refused_on_its_line(tmp_path, kind):
    reader, text = DEEP_VALUES[kind]
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(FileError) as refused:
        read(reader, path)
    error = refused.value.error
    assert isinstance(error, ReadingError)
    assert (error.line, error.code) == (2, "data.invalid_json")
    assert "nested too deeply" in error.problem
    if reader.field is None:
        (fault,) = json_text.find_faults(text, "rows.json")
        assert fault.where.line == 2
        assert "nested more than 100 levels deep" in fault.problem


def test_a_header_with_a_million_columns_without_names_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("question,answer" + "," * 1_000_000 + "\na,b\n", encoding="utf-8")
    with pytest.raises(FileError) as refused:
        read(RecordReader("csv"), path)
    assert refused.value.error.line == 1
    assert "1,000,002 columns, 1,000,000 of them without a name" in refused.value.error.problem


def test_a_repeated_name_among_100_000_is_found(tmp_path):
    names = [f"k{number}" for number in range(99_999)]
    with pytest.raises(FormatError, match="the key k99998 is written twice"):
        parse_record("{" + ", ".join(f'"{name}": 1' for name in [*names, names[-1]]) + "}")
    path = tmp_path / "rows.csv"
    path.write_text(",".join([*names, names[-1]]) + "\n", encoding="utf-8")
    with pytest.raises(FileError) as refused:
        read(RecordReader("csv"), path)
    assert refused.value.error.problem == "the header has the column k99998 twice"


def test_a_message_lists_a_bounded_number_of_names():
    names = [f"k{number}" for number in range(1000)]
    assert console.format_names(names[:3]) == "k0, k1, k2"
    assert console.format_names(names[:21]).endswith("k18, k19 and 1 more")
    assert len(console.format_names(["a" * 10_000] * 1000)) < 2000
    assert console.format_names(dict.fromkeys(names), most=2) == "k0, k1 and 998 more"


def test_faults_beyond_the_first_are_counted(capsys):
    console.print_faults([Fault(f"r.yaml:{number}", "wrong", "Correct it.", code="x") for number in range(10_000)])
    err = capsys.readouterr().err
    assert err.startswith("trl_sft: 10000 problems to fix")
    assert err.count("Correct it.") == console.MOST_FAULTS
    assert err.rstrip().endswith("9,950 more problems: fix those above first, and check again.")


def test_patterns_do_not_try_the_same_characters_again_and_again():
    # each of these takes hours where two repeated parts of a pattern match the same characters
    blanks = "\n" * 300_000
    with pytest.raises(ShapeError):
        turn_shapes.list_turns("[{'role': 'user'}" + blanks + "x")
    (fault,) = json_text.find_faults("a," + " " * 300_000 + "!" * 50 + ",b", "rows.jsonl")
    assert fault.code == "data.invalid_json"


def write_repeated(path, rows, text, nested=False):
    column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([text]))
    if nested:
        turns = pa.StructArray.from_arrays([column], ["content"])
        column = pa.ListArray.from_arrays(pa.array(range(rows + 1), pa.int32()), turns)
    pq.write_table(pa.table({"text": column}), path, compression="zstd")


@pytest.mark.parametrize("nested", [False, True], ids=["text", "turns of chats"])
def test_a_parquet_file_that_repeats_a_long_text_is_refused_before_it_is_read(tmp_path, nested):
    path = tmp_path / "rows.parquet"
    write_repeated(path, 200_000, "a" * 100_000, nested)  # 20 GB of a file of a few kilobytes
    earlier_peak = pa.default_memory_pool().max_memory()
    found = parquet_size.find_large_rows(path, tmp_path)
    peak = pa.default_memory_pool().max_memory()
    assert peak <= max(earlier_peak, 100_000_000), "the texts were repeated in memory"
    assert found.code == "data.too_large"
    assert "18.6 GiB of repeated text, which is read at once" in found.problem
    write_repeated(path, 2000, "a" * 1000, nested)
    assert parquet_size.find_large_rows(path, tmp_path) is None


def test_a_parquet_file_larger_than_the_disk_of_the_cache_is_refused_with_the_key_to_set(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_size.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 30))
    path = tmp_path / "rows.parquet"
    write_repeated(path, 20_000, "a" * 100_000)
    found = parquet_size.find_large_rows(path, tmp_path / "cache")
    assert "has 1.0 GiB free" in found.problem
    assert "set `cache_dir` in the source" in found.fix


def test_a_value_of_a_parquet_file_that_is_too_long_for_a_row_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_size, "LONGEST_RECORD", 2_000_000)
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": ["a" * 3_000_000]}), path, compression="zstd")
    found = parquet_size.find_large_rows(path, tmp_path)
    assert found.code == "data.long_record"
    assert "in the column text of row group 1" in found.problem
