"""A file is read once for its digest, and again after any change."""

import hashlib
import os

import pytest

from trl_sft import file_digests, load_recipe
from trl_sft.data.readers.data_file import DataFile, digest_file
from trl_sft.recipe import data_files


@pytest.fixture
def reads(monkeypatch):
    """Return a list of the sizes that were hashed."""
    sizes = []
    original = hashlib.file_digest

    def count(file, name):
        sizes.append(os.fstat(file.fileno()).st_size)
        return original(file, name)

    monkeypatch.setattr(file_digests.hashlib, "file_digest", count)
    return sizes


def test_readers_and_resume_share_one_reading_of_a_data_file(here, reads):
    (here / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n', encoding="utf-8")
    (here / "recipe.yaml").write_text(
        "model: {name_or_path: trl_sft:tiny}\ndata: {train: rows.jsonl}\ntrain: {output_dir: out}\n", encoding="utf-8"
    )
    run = load_recipe("recipe.yaml")
    files = data_files.read(run)
    path = here / "rows.jsonl"
    assert digest_file(DataFile("rows.jsonl", str(path))) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert files.digests == {str(path): hashlib.sha256(path.read_bytes()).hexdigest()}
    data_files.check_unchanged(run, files)
    assert reads == [33]


def test_a_file_with_other_bytes_of_the_same_size_and_time_has_another_digest(tmp_path, reads):
    path = tmp_path / "rows"
    path.write_text("one", encoding="utf-8")
    status = path.stat()
    before = file_digests.hash_file(path)
    with path.open("r+", encoding="utf-8") as file:  # in place: the number of the file stays
        file.write("two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (status.st_mtime_ns, status.st_ino)
    assert file_digests.hash_file(path) == hashlib.sha256(b"two").hexdigest() != before
    other = tmp_path / "other"
    other.write_text("six", encoding="utf-8")
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)
    assert file_digests.hash_file(path) == hashlib.sha256(b"six").hexdigest()
    assert reads == [3, 3, 3]
