"""The storage and the copies in it: every byte is compared, a copy counts only with its manifest, faults are named."""

import hashlib
import os
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from transformers.trainer_utils import rotate_checkpoints

from trl_sft.errors import LaunchError
from trl_sft.mirroring import access, snapshot, storage
from trl_sft.mirroring.storage import DamagedCopy, Storage


@pytest.fixture
def memory():
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


@pytest.mark.parametrize("url", ["memory://a/b", "file://HERE/far"])
def test_copy_is_listed_with_its_manifest_alone_and_comes_back_equal(memory, tmp_path, url):
    target = Storage(url.replace("HERE", str(tmp_path)))
    files = {}
    for name, size in (("model.safetensors", 3_000_000), ("sub/optimizer.pt", 17), ("empty", 0)):
        files[name] = tmp_path / name
        files[name].parent.mkdir(exist_ok=True)
        files[name].write_bytes(os.urandom(size))
    counts = []
    snapshot.write_snapshot(target, "checkpoint-10", files, count=counts.append)
    assert sum(counts) in (0, 3_000_017)  # fsspec's own file systems need not count
    target.write("checkpoint-20/model.safetensors", b"half")
    target.write("checkpoint-30/mirror.json", b'{"files": {"../../evil": {"bytes": 1, "sha256": "x"}}}')
    target.write("checkpoint-40/mirror.json", b'{"files": ')
    assert snapshot.list_snapshots(target) == ["checkpoint-10", "checkpoint-30", "checkpoint-40"]
    assert snapshot.read_snapshot(target, "checkpoint-20") is None
    assert snapshot.read_snapshot(target, "checkpoint-30") is None
    assert snapshot.read_snapshot(target, "checkpoint-40") is None
    copy = snapshot.read_snapshot(target, "checkpoint-10")
    snapshot.download_snapshot(target, copy, tmp_path / "back", count=counts.append)
    for name, path in files.items():
        assert (tmp_path / "back" / name).read_bytes() == path.read_bytes()
    snapshot.remove_snapshot(target, "checkpoint-10")
    assert "checkpoint-10" not in target.list_folders()
    target.remove("checkpoint-10")  # nothing is there any more


def test_copy_with_another_byte_is_refused_and_gets_no_manifest(memory, tmp_path, monkeypatch):
    def flip(self, path, name, **keywords):
        content = bytearray(Path(path).read_bytes())
        content[5] ^= 4
        self.pipe_file(name, bytes(content))

    monkeypatch.setattr(MemoryFileSystem, "put_file", flip)
    (tmp_path / "weights").write_bytes(b"0123456789")
    target = Storage("memory://a")
    with pytest.raises(DamagedCopy, match="weights has other bytes there"):
        snapshot.write_snapshot(target, "checkpoint-1", {"weights": tmp_path / "weights"}, count=lambda _: None)
    assert snapshot.list_snapshots(target) == []


def test_digest_has_the_etag_that_s3_computes_of_one_part_and_of_several(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "PART", 1000)
    content = os.urandom(2500)
    path = tmp_path / "file"
    for size in (0, 1999):
        path.write_bytes(content[:size])
        assert storage.digest_file(path).etag == hashlib.md5(content[:size]).hexdigest()
    path.write_bytes(content)
    parts = b"".join(hashlib.md5(content[at : at + 1000]).digest() for at in (0, 1000, 2000))
    assert storage.digest_file(path).etag == hashlib.md5(parts).hexdigest() + "-3"
    assert storage.digest_file(path).sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("best", ["", "checkpoint-10", "checkpoint-30", "checkpoint-40"])
def test_mirror_removes_the_checkpoints_that_the_trainer_removes(tmp_path, limit, best):
    names = [f"checkpoint-{step}" for step in (10, 20, 30, 40)]
    for name in names:
        (tmp_path / name).mkdir()
    best_path = str(tmp_path / best) if best else None
    rotate_checkpoints(str(tmp_path), save_total_limit=limit, best_model_checkpoint=best_path, use_mtime=False)
    kept = {path.name for path in tmp_path.iterdir()}
    assert set(names) - set(snapshot.choose_removals(names, limit, best)) == kept
    assert snapshot.choose_removals(names, None, best) == []


class NoCredentialsError(Exception):
    pass


CASES = [
    (PermissionError("Access Denied"), "s3://b/x", "mirror.refused", "Set AWS_ACCESS_KEY_ID and AWS_SECRET"),
    (NoCredentialsError("Unable to locate credentials"), "s3://b/x", "mirror.refused", "AWS_PROFILE"),
    (PermissionError("403 Client Error. sk-Abc1234567890abcdef"), "hf://me/x", "mirror.refused", "hf auth login"),
    (FileNotFoundError("The specified bucket does not exist"), "s3://b/x", "mirror.absent", "Create the bucket"),
    (FileNotFoundError("me/x (repository not found)"), "hf://me/x", "mirror.absent", "Create the repository"),
    (TimeoutError("it did not answer within 60 s"), "gs://b/x", "mirror.unreached", "Check the network"),
    (ImportError("Install s3fs to access S3"), "s3://b/x", "package.missing", "pip install 'trl-sft[mirror]'"),
    (ImportError("Please install gcsfs to access Google Storage"), "gs://b/x", "package.missing", "install 'gcsfs'"),
    (NotImplementedError(), "ftp://b/x", "mirror.refused", "Name a place in which files can be written"),
]


@pytest.mark.parametrize(("error", "url", "code", "fix"), CASES, ids=[f"{c[1]} {c[0]!r}"[:40] for c in CASES])
def test_error_of_a_storage_is_a_fault_that_says_what_to_do_without_secrets(monkeypatch, error, url, code, fix):
    def refuse(self, url):
        raise error

    monkeypatch.setattr(Storage, "__init__", refuse)
    with pytest.raises(LaunchError) as raised:
        access.open_storage(url, "recipe.yaml:9 run.mirror")
    (fault,) = raised.value.faults
    assert (fault.code, fault.where) == (code, "recipe.yaml:9 run.mirror")
    assert fix in fault.fix
    assert "sk-Abc" not in str(fault)


def test_storage_that_does_not_answer_is_given_up(monkeypatch):
    import threading

    monkeypatch.setattr(access, "_SECONDS", 0.05)
    monkeypatch.setattr(Storage, "try_out", lambda self: threading.Event().wait(1))
    with pytest.raises(LaunchError, match="did not answer within"):
        access.open_storage("memory://a", "run.mirror")
