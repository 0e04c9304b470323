"""Thousands of files, sources and rows: each file is opened a few times, and each row is read and formatted once."""

import collections
import os
import sys

import pytest
from conftest import RECIPE as RUN_RECIPE
from conftest import jsonl
from datasets import load_dataset_builder

from trl_sft.data import folder_listing, load, pipeline
from trl_sft.data.readers import record_store
from trl_sft.errors import RecipeError
from trl_sft.recipe import build, data_files, paths, yaml_reader

RECIPE = "model: {name_or_path: trl_sft:tiny}\ndata: {train: SOURCE}\ntrain: {output_dir: out, max_steps: 2}\n"
FILES = 2000


@pytest.fixture(scope="module")
def counters():
    """Return the list of the counters of openings and listings of files; a hook that counts cannot be removed."""
    active = []

    def count(event, arguments):
        if event in ("open", "os.scandir", "os.listdir"):
            for counts in active:
                counts[event] += 1

    sys.addaudithook(count)
    return active


@pytest.fixture
def operations(monkeypatch, counters):
    """Count openings, listings and statuses of files, in this process, from here to the end of the test."""
    counts = collections.Counter()
    status = os.stat

    def count_status(*arguments, **keywords):
        counts["os.stat"] += 1
        return status(*arguments, **keywords)

    monkeypatch.setattr(os, "stat", count_status)
    counters.append(counts)
    yield counts
    counters.remove(counts)


def read_run(folder, source):
    value = f"\n  train:{source}" if source.startswith("\n") else f"{{train: {source}}}"
    (folder / "recipe.yaml").write_text(RECIPE.replace("{train: SOURCE}", value), encoding="utf-8")
    return build.build_run(yaml_reader.read_recipe(folder / "recipe.yaml"))


@pytest.mark.parametrize(("source", "suffix"), [("./rows", "jsonl"), ("'rows/*.jsonl'", "jsonl"), ("./rows", "txt")])
def test_each_of_two_thousand_files_is_opened_and_asked_for_its_status_a_few_times(
    tmp_path, operations, source, suffix
):
    (tmp_path / "rows").mkdir()
    for number in range(FILES):
        text = f'{{"question": "a{number}", "answer": "b"}}\n' if suffix == "jsonl" else f"document {number}"
        (tmp_path / "rows" / f"{number:04}.{suffix}").write_text(text, encoding="utf-8")
    run = read_run(tmp_path, source)
    operations.clear()
    files = data_files.read(run)
    rows = load.load_source(run.recipe, run.sources["train"][0])
    data_files.check_unchanged(run, files)
    counts = {event: number / FILES for event, number in operations.items()}
    numbers = [rows.decode_row(number) for number in (0, 1, FILES - 1)]
    assert [str(row.get("question", row.get("text")))[-4:].lstrip("a nt") for row in numbers] == ["0", "1", "1999"]
    assert len(rows.rows) == FILES
    assert len(rows.rows.data.column(0).chunks) <= 3, "one batch of Arrow for each file is slow to look up"
    assert counts["open"] <= 6.1
    assert counts["os.stat"] <= 7.1
    assert operations["os.scandir"] + operations["os.listdir"] <= 20


@pytest.mark.parametrize(
    "command", [["check"], ["preview"], ["prepare"], []], ids=["check", "preview", "prepare", "train"]
)
def test_each_command_reads_and_formats_each_row_once(go, here, monkeypatch, command):
    counts = collections.Counter()
    read, format_one = record_store.RecordReader.read, pipeline.format_one

    def count_records(reader, file):
        for block in read(reader, file):
            counts["read from", file.name] += len(block.records)
            yield block

    def count_formatted(row, source_format):
        counts["formatted", row["question"]] += 1
        return format_one(row, source_format)

    monkeypatch.setattr(record_store.RecordReader, "read", count_records)
    monkeypatch.setattr(pipeline, "format_one", count_formatted)
    for name, number in (("train.jsonl", 30), ("held.jsonl", 10)):  # others for each command: they are cached
        jsonl(here / name, [{"question": f"{command[:1]} {name} {n}?", "answer": str(n)} for n in range(number)])
    code, _, err = go(
        RUN_RECIPE.replace("{train: rows.jsonl}", "{train: train.jsonl, eval: held.jsonl}"), command=command
    )
    assert code == 0, err
    held = {} if command == ["preview"] else {("read from", "held.jsonl"): 10}
    assert {key: number for key, number in counts.items() if key[0] == "read from"} == {
        ("read from", "train.jsonl"): 30,
        **held,
    }
    formatted = [number for key, number in counts.items() if key[0] == "formatted"]
    assert set(formatted) == {1}
    assert command == ["preview"] or len(formatted) == 40


def test_list_of_more_than_a_thousand_sources_is_refused_with_the_pattern_to_write(here, go, matches):
    sources = "".join(f"\n  - rows{number}.jsonl" for number in range(1001))
    code, _, err = go(RECIPE.replace("{train: SOURCE}", f"\n  train:{sources}"), command=["check"])
    assert code == 2
    matches("too_many_sources", err)


def test_similar_names_are_searched_for_the_first_of_a_thousand_missing_files_only(tmp_path, monkeypatch):
    searched = []
    monkeypatch.setattr(paths, "nearest_name", lambda word, names, **_: searched.append(word) or "")
    sources = "".join(f"\n  - rows{number}.jsonl" for number in range(1000))
    with pytest.raises(RecipeError) as error:
        read_run(tmp_path, sources)
    assert len(error.value.faults) == 1000
    assert 0 < len(set(searched)) <= 50


LAYOUTS = {
    "no split": ["a.jsonl", "b.jsonl", "sub/c.jsonl"],
    "splits in names": ["train.jsonl", "my-test-1.jsonl", "sub/dev.jsonl", "other.jsonl"],
    "splits in folders": ["train/a.jsonl", "x/validation set/b.jsonl", "x/mytest/c.jsonl", "d.jsonl"],
    "shards": ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/odd-00000-of-00001.jsonl"],
    "hidden": ["a.jsonl", ".b.jsonl", ".git/c.jsonl", "__pycache__/d.jsonl", "README.md", "config.json"],
    "other kinds": ["a.csv", "b.csv", "c.jsonl", "d.pdf"],
    "words in the name of the folder": ["a.jsonl", "evaluation/b.jsonl"],
    "logs": ["logs/a.eval", "b.jsonl"],
    "card with patterns": ["x/one.jsonl", "x/two.jsonl", "linked/three.jsonl", "README.md"],
    "no file": [],
    "brackets": ["a[1].jsonl", "train[2].jsonl"],
}
CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: x/one.jsonl}
  - {split: test, path: ["x/t*.jsonl", "link/*.jsonl"]}
---
"""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_listing_finds_the_files_that_datasets_finds(tmp_path, layout):
    folder = tmp_path / "train of [1] rows" if layout == "brackets" else tmp_path / "training"
    folder.mkdir()
    for name in LAYOUTS[layout]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name == "README.md":
            (folder / name).write_text(CARD if "card" in layout else "# Rows\n", encoding="utf-8")
        else:
            jsonl(folder / name, [{"text": name}])
    if "linked/three.jsonl" in LAYOUTS[layout]:
        (folder / "link").symlink_to(folder / "linked")

    def find():
        try:
            builder = load_dataset_builder(str(folder))
        except Exception as error:
            return type(error)
        return type(builder).__name__, {str(split): list(files) for split, files in builder.config.data_files.items()}

    expected = find()
    with folder_listing.list_once(folder):
        assert find() == expected
    assert find() == expected
