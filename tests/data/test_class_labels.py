"""Class labels of `datasets` are read as their names, wherever they stand: the numbers mean nothing to a model."""

import json

import pytest
from conftest import RECIPE
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

NAMES = ["negative", "positive"]
FEATURES = Features({"question": Value("string"), "answer": ClassLabel(names=NAMES)})
ROWS = {"question": [f"Mood of text {n}?" for n in range(6)], "answer": [0, 1, 1, 0, 1, 0]}


@pytest.fixture
def dataset():
    return Dataset.from_dict(ROWS, features=FEATURES)


def assert_names_are_trained(out):
    assert "⟦negative⟧" in out
    assert "⟦positive⟧" in out


def save_folder(dataset, folder):
    dataset.save_to_disk(folder / "ds")
    return "ds"


def save_splits(dataset, folder):
    DatasetDict({"train": dataset, "test": dataset}).save_to_disk(folder / "ds")
    return "ds"


def save_parquet(dataset, folder):
    dataset.to_parquet(folder / "rows.parquet")
    return "rows.parquet"


def save_parquet_folder(dataset, folder):
    (folder / "data").mkdir()
    dataset.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    return "./data"


def save_parquet_files_of_two_types(dataset, folder):
    dataset.to_parquet(folder / "a.parquet")
    dataset.add_column("extra", [1] * len(dataset)).to_parquet(folder / "b.parquet")
    return "'*.parquet'"


SAVERS = [save_folder, save_splits, save_parquet, save_parquet_folder, save_parquet_files_of_two_types]


@pytest.mark.parametrize("save", SAVERS)
def test_class_labels_are_read_as_their_names(go, here, dataset, save):
    source = save(dataset, here)
    code, out, err = go(RECIPE.replace("train: rows.jsonl", f"train: {source}"), command=["preview"])
    assert code == 0, err
    assert_names_are_trained(out)


def test_class_labels_of_a_stream_are_read_as_their_names(go, here, dataset):
    source = save_parquet(dataset, here)
    recipe = RECIPE.replace("train: rows.jsonl", f"train: {{path: {source}, streaming: true}}")
    code, out, err = go(recipe, command=["preview"])
    assert code == 0, err
    assert_names_are_trained(out)


def test_class_labels_under_another_name_are_read_as_their_names(go, here):
    features = Features({"text_of": Value("string"), "label": ClassLabel(names=NAMES)})
    Dataset.from_dict({"text_of": ["a", "b"], "label": [0, 1]}, features=features).to_parquet(here / "rows.parquet")
    source = "{path: rows.parquet, rename: {text_of: question, label: answer}}"
    code, out, err = go(RECIPE.replace("train: rows.jsonl", f"train: {source}"), command=["preview"])
    assert code == 0, err
    assert_names_are_trained(out)


def test_class_labels_inside_lists_and_turns_are_read_as_their_names(go, here):
    turn = {"role": ClassLabel(names=["user", "assistant"]), "content": Value("string")}
    features = Features({"messages": List(turn)})
    turns = [{"role": 0, "content": "Say a."}, {"role": 1, "content": "the reply"}]
    Dataset.from_dict({"messages": [turns]}, features=features).to_parquet(here / "rows.parquet")
    code, out, err = go(RECIPE.replace("train: rows.jsonl", "train: rows.parquet"), command=["preview"])
    assert code == 0, err
    assert "⟦the reply⟧" in out


def test_missing_class_label_is_a_fault_of_its_row(go, here):
    dataset = Dataset.from_dict({"question": ["a", "b"], "answer": [0, None]}, features=FEATURES)
    dataset.to_parquet(here / "rows.parquet")
    code, _, err = go(RECIPE.replace("train: rows.jsonl", "train: rows.parquet"), command=["preview"])
    assert code == 2
    assert "row 2" in err
    assert "answer is empty (null)" in err


def test_number_without_names_stays_a_fault(go, here):
    (here / "rows.jsonl").write_text(json.dumps({"question": "a", "answer": 1}) + "\n", encoding="utf-8")
    code, _, err = go(command=["preview"])
    assert code == 2
    assert "answer is 1 (whole number)" in err
