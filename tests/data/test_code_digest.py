"""Caches of rows and tokens: a change in any module that formats or tokenizes leads to a new cache key."""

import shutil
from pathlib import Path

import pytest

import trl_sft
from trl_sft.data import pipeline
from trl_sft.data.code_digest import digest_code
from trl_sft.tokenization import cache

PACKAGE = Path(trl_sft.__file__).parent
DATA = sorted((PACKAGE / "data").rglob("*.py"))
TOKENIZATION = sorted((PACKAGE / "tokenization").rglob("*.py"))


@pytest.mark.parametrize("file", [*DATA, *TOKENIZATION], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_key_of_prepared_tokens_changes_with_each_module(file, tmp_path):
    copies = [shutil.copytree(PACKAGE / name, tmp_path / name) for name in ("data", "tokenization")]
    assert digest_code(*copies) == cache.CODE, "the key holds the digest of both folders as they are installed"
    changed = tmp_path / file.relative_to(PACKAGE)
    changed.write_text(changed.read_text(encoding="utf-8") + "\n# changed\n", encoding="utf-8")
    assert digest_code(*copies) != cache.CODE


@pytest.mark.parametrize("file", DATA, ids=lambda path: path.stem)
def test_key_of_formatted_rows_changes_with_each_module(file, tmp_path):
    copy = shutil.copytree(PACKAGE / "data", tmp_path / "data")
    assert digest_code(copy) == pipeline.CODE
    (copy / file.name).write_text("changed = True\n", encoding="utf-8")
    assert digest_code(copy) != pipeline.CODE


def test_a_module_that_is_added_or_renamed_changes_the_digest(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    before = digest_code(tmp_path)
    (tmp_path / "b.py").write_text("")
    added = digest_code(tmp_path)
    (tmp_path / "b.py").rename(tmp_path / "c.py")
    assert len({before, added, digest_code(tmp_path)}) == 3


def test_fingerprint_of_formatted_rows_holds_the_digest(here, monkeypatch):
    from datasets import Dataset

    from trl_sft.data.formats import TokenizerFeatures
    from trl_sft.data.source_format import SourceFormat

    source_format = SourceFormat("rows", "text", "plain", TokenizerFeatures((), ""))
    rows = Dataset.from_dict({"text": ["a"]})
    before = pipeline.fingerprint(rows, source_format)
    monkeypatch.setattr(pipeline, "CODE", "another")
    assert pipeline.fingerprint(rows, source_format) != before
