"""Parquet files of different types in a folder or on the hub: no value is cast to the type of another file."""

import datetime
import decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_readers import COLUMNS, READINGS, canonical

from trl_sft.data import load
from trl_sft.errors import UserError

FIRST = {"folder": "integer", "hub": "text"}  # the type of the first file, to which `datasets` would cast the others


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return a folder that stands for a data set of the hub, and its id."""
    folder = tmp_path / "hub"
    folder.mkdir()
    build, load_dataset = load.hub_files.load_dataset_builder, load.load_dataset

    def find(name):
        return str(folder) if name.startswith("someone/") else name

    monkeypatch.setattr(load.hub_files, "load_dataset_builder", lambda name, **keywords: build(find(name), **keywords))
    monkeypatch.setattr(load, "load_dataset", lambda name, **keywords: load_dataset(find(name), **keywords))
    monkeypatch.setattr(load.hub, "check_id", lambda *_: True)
    manager = type("Manager", (), {"download": staticmethod(lambda path: path)})
    monkeypatch.setattr(load.hub_files.datasets, "DownloadManager", lambda **_: manager)
    return folder, f"someone/{tmp_path.name.replace('_', '-')}"


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("place", FIRST)
def test_files_of_other_types_in_a_folder_or_on_the_hub_arrive_exactly(place, reading, tmp_path, hub):
    folder, source = hub
    first = COLUMNS[FIRST[place]]
    for second, values in COLUMNS.items():
        pq.write_table(pa.table({"c": first}), folder / "train-0.parquet")
        pq.write_table(pa.table({"c": values, "extra": pa.array([1, 2])}), folder / "train-1.parquet")
        rows = READINGS[reading](tmp_path, "hub" if place == "folder" else source)
        expected = [{"c": value} for value in first.to_pylist() + values.to_pylist()]
        assert canonical({"c": row["c"]} for row in rows) == canonical(expected), second


@pytest.mark.parametrize("place", FIRST)
def test_files_of_one_type_are_read_whole_and_in_parts(place, tmp_path, hub):
    folder, source = hub
    for number in range(2):
        pq.write_table(pa.table({"c": [str(number)] * (number + 1)}), folder / f"train-{number}.parquet")
    path = "hub" if place == "folder" else source
    assert [row["c"] for row in READINGS["whole"](tmp_path, path)] == ["0", "1", "1"]
    assert [row["c"] for row in READINGS["whole"](tmp_path, f"{{path: {path}, split: 'train[:2]'}}")] == ["0", "1"]


def test_part_of_files_of_different_types_is_refused(tmp_path, hub):
    folder, _ = hub
    pq.write_table(pa.table({"c": ["a"]}), folder / "train-0.parquet")
    pq.write_table(pa.table({"c": [1]}), folder / "train-1.parquet")
    with pytest.raises(UserError, match="different types"):
        READINGS["whole"](tmp_path, "{path: hub, split: 'train[:1]'}")


def test_part_of_matching_files_of_different_lengths_is_read(tmp_path):
    for number in range(2):
        pq.write_table(pa.table({"c": [str(number)] * (number + 1)}), tmp_path / f"{number}.parquet")
    rows = READINGS["whole"](tmp_path, "{path: '*.parquet', split: 'train[1:]'}")
    assert [row["c"] for row in rows] == ["1", "1"]


VALUES = {
    "decimal": decimal.Decimal("1.50"),
    "date": datetime.date(2024, 1, 5),
    "time": datetime.datetime(2024, 1, 5),
    "bytes": b"a",
    "integer": 5,
    "boolean": True,
}


@pytest.mark.parametrize("kind", VALUES)
def test_answer_of_another_type_in_a_folder_is_refused_with_its_file_and_the_others_stay(kind, go, here):
    (here / "d").mkdir()
    pq.write_table(pa.table({"question": ["a?"], "answer": ["007"]}), here / "d" / "a.parquet")
    pq.write_table(pa.table({"question": ["b?"], "answer": [VALUES[kind]]}), here / "d" / "b.parquet")
    recipe = "model: {name_or_path: trl_sft:tiny}\ndata: {train: d, on_bad_row: drop, max_untrained: 0.5}\n"
    code, out, err = go(recipe, command=["preview"])
    assert code == 0, err
    assert "⟦007⟧" in out
    assert "b.parquet row 1" in out + err


def test_parquet_file_that_was_cut_off_says_so(tmp_path):
    pq.write_table(pa.table({"question": ["a?"], "answer": ["a"]}), tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match="ends too early"):
        READINGS["whole"](tmp_path, "a.parquet")
