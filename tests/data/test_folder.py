"""Folders as sources: text files are documents, every file that is not read is named, pointers of Git LFS too."""

import re
from pathlib import Path

import datasets.packaged_modules
import pytest
from conftest import RECIPE, jsonl

from trl_sft.data import folder

QUESTION = [{"question": "Say a.", "answer": "a"}]


@pytest.fixture
def preview(go, here):
    """Return a function that previews the folder `data` of the current folder as a source."""

    def call(keywords=""):
        return go(RECIPE.replace("train: rows.jsonl", f"train: {{path: ./data{keywords}}}"), command=["preview"])

    (here / "data").mkdir()
    return call


def write(path, text="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_text_and_markdown_files_of_a_folder_are_one_row_each(here, preview):
    write(here / "data" / "a.txt", "line one\n\nline two\n")
    write(here / "data" / "notes" / "b.md", "# Title\n\nline three\n")
    write(here / "data" / "README.md", "not data")
    code, out, err = preview()
    assert code == 0, err
    assert "⟦line one\n\nline two\n⟧" in out
    assert "⟦# Title\n\nline three\n⟧" in out
    assert "its first 2 rows" in out
    assert "not data" not in out


@pytest.mark.parametrize(("sample_by", "rows"), [("line", 3), ("paragraph", 2), ("document", 1)])
def test_rows_of_a_document_are_what_sample_by_says(here, preview, sample_by, rows):
    write(here / "data" / "a.txt", "one\ntwo\n\nthree")
    code, out, err = preview(f", sample_by: {sample_by}")
    if sample_by == "line":  # the empty line is no row that can be trained
        assert code == 2
        assert "text is empty" in err
        return
    assert code == 0, err
    assert f"its first {rows} row" in out


def test_every_file_of_a_folder_that_is_not_read_is_named(here, preview):
    jsonl(here / "data" / "train.jsonl", QUESTION)
    for name in ("extra.csv", "paper.pdf", "sub/notes.docx", "sub/more.xlsx", "z.bin"):
        write(here / "data" / name)
    code, out, err = preview()
    assert code == 0, err
    assert "5 files NOT READ: extra.csv, paper.pdf, sub/more.xlsx and 2 more" in out
    assert "**/*.csv" in out


def test_files_of_types_that_no_recipe_reads_are_named_beside_documents(here, preview):
    write(here / "data" / "a.txt", "text")
    write(here / "data" / "b.pdf")
    code, out, err = preview()
    assert code == 0, err
    assert "1 file NOT READ: b.pdf; a recipe reads no files of these types" in out


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (
            ["train.jsonl", "test.jsonl", "validation.jsonl"],
            "the splits validation (validation.jsonl) and test (test.jsonl) are NOT READ. To evaluate on validation",
        ),
        (["train/a.txt", "test/b.txt", "test/c.txt"], "the split test (test/b.txt, test/c.txt) is NOT READ."),
    ],
)
def test_splits_of_a_folder_that_are_not_read_are_named_with_the_keys_that_read_them(here, go, names, note):
    for name in names:
        write(here / "data" / name, '{"question": "Say a.", "answer": "a"}\n' if "json" in name else name)
    text = RECIPE.replace("train: rows.jsonl", "train: ./data")
    code, out, err = go(text, command=["preview"])
    assert code == 0, err
    assert note in out
    both = text.replace("data: {train: ./data", "data: {train: {path: ./data, split: train+test}")
    out = go(both.replace("+test", "+validation+test") if "valid" in note else both, command=["preview"])[1]
    assert "2 rows" in out or "3 rows" in out
    assert "NOT READ" not in out


def test_split_of_a_folder_that_is_evaluated_is_not_reported(here, go):
    for name in ("train", "test"):
        write(here / "data" / f"{name}.jsonl", f'{{"question": "Say {name}.", "answer": "a"}}\n')
    code, out, err = go(RECIPE.replace("train: rows.jsonl", "train: ./data, eval: ./data"), command=["check"])
    assert code == 0, err
    assert "NOT READ" not in out


def test_splits_of_documents_are_named_by_their_folder_or_their_whole_name(tmp_path):
    for name in ("a.txt", "test-plan.md", "test.txt", "validation/b.md", "train/c.txt"):
        write(tmp_path / name)
    documents = folder.find_documents(tmp_path, folder.list_files(tmp_path))
    names = {split: [file.name for file in files] for split, files in documents.items()}
    assert names == {"train": ["a.txt", "test-plan.md", "c.txt"], "test": ["test.txt"], "validation": ["b.md"]}


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet", "data/train-00000-of-00001.parquet", "a.txt"])
def test_git_lfs_pointer_in_a_folder_is_named(here, preview, name):
    write(here / "data" / name, "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123456789\n")
    code, _, err = preview()
    assert code == 2
    assert "Git LFS pointer" in err
    assert "git lfs pull" in err


def test_tables_among_markdown_files_are_not_taken_for_another_kind_of_data(here, preview, matches):
    jsonl(here / "data" / "rows.jsonl", QUESTION)
    for number in range(3):
        write(here / "data" / f"note{number}.md")
    code, out, err = preview()
    if "harbor" in datasets.packaged_modules._PACKAGED_DATASETS_MODULES:  # datasets 5
        assert code == 2
        matches("folder_of_tables_and_markdown", err)
    else:
        assert code == 0, err
        assert "3 files NOT READ: note0.md, note1.md, note2.md" in out
        assert "1 to train" in out
    code, out, err = preview("/**/*.jsonl")
    assert code == 0, err
    assert "⟦a⟧" in out


def test_folder_without_a_file_that_can_be_read_names_its_files(here, preview, matches):
    for name in ("a.docx", "b.pdf", "c.pptx", "d.odt"):
        write(here / "data" / name)
    code, _, err = preview()
    assert code == 2
    matches("folder_without_data", err)


def test_separator_of_files_in_a_folder_is_a_key_of_the_source(here, preview):
    write(here / "data" / "rows.csv", "question;answer\nsay;the reply\n")
    code, _, err = preview()
    assert code == 2
    assert 'sep: ";"' in err
    code, out, err = preview(', sep: ";"')
    assert code == 0, err
    assert "⟦the reply⟧" in out


def test_whole_message_of_a_library_is_in_the_log_that_the_fault_names(go, here):
    write(here / "rows.parquet", "PAR1 but nothing else PAR1")
    code, _, err = go(RECIPE.replace("train: rows.jsonl", "train: rows.parquet"), command=["preview"])
    assert code == 2
    log = re.search(r"The whole message is in (\S+\.log)\.", err)[1]
    assert "Traceback" in Path(log).read_text(encoding="utf-8")


def test_encoding_of_a_document_in_a_folder_is_offered(here, preview):
    (here / "data" / "a.txt").write_bytes("说出苹果的颜色。\n".encode("gbk"))
    code, _, err = preview()
    assert code == 2
    assert "encoding: gbk" in err
    code, out, err = preview(", encoding: gbk")
    assert code == 0, err
    assert "说出苹果的颜色。" in out
