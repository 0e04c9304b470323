"""run.mirror in a repository of the hub, against the stand-in: a copy is one commit, and each file is compared."""

import io
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import fsspec
import hub_server
import pytest
import resumed_runs
from huggingface_hub import BucketFile, BucketFolder, HfApi, HfFileSystem

from trl_sft.errors import LaunchError
from trl_sft.mirroring import access, snapshot
from trl_sft.mirroring.storage import DamagedCopy, Storage

URL = "hf://me/mine/runs/one"
RECIPE = resumed_runs.MIRRORED.replace("URL", URL)


@pytest.fixture
def hub(monkeypatch):
    """Return the stand-in with the private repository me/mine, and the public one me/open."""
    with hub_server.connected(monkeypatch) as server:
        server.repositories["me/mine"] = hub_server.Repository(private=True)
        server.repositories["me/open"] = hub_server.Repository(private=False)
        fsspec.get_filesystem_class("hf").clear_instance_cache()
        yield server
        fsspec.get_filesystem_class("hf").clear_instance_cache()


@pytest.fixture
def files(tmp_path):
    """Return files of a copy: a large one, which the hub stores outside of Git, small ones, and one in a folder."""
    paths = {}
    for name, size in (
        ("model.safetensors", 200_000),
        ("trainer_state.json", 700),
        ("_run/run.json", 30),
        ("empty", 0),
    ):
        paths[name] = tmp_path / name
        paths[name].parent.mkdir(exist_ok=True)
        paths[name].write_bytes(os.urandom(size))
    return paths


def test_copy_is_one_commit_with_its_manifest_in_another_and_comes_back_equal(hub, files, tmp_path):
    target = access.open_storage(URL, "run.mirror")
    trial = len(hub.repositories["me/mine"].titles)
    snapshot.write_snapshot(target, "checkpoint-10", files, count=lambda _: None)
    assert len(hub.repositories["me/mine"].titles) == trial + 2
    assert hub.repositories["me/mine"].titles[trial] == "Mirror of checkpoint-10"
    target.write("checkpoint-20/model.safetensors", b"half")
    assert snapshot.list_snapshots(target) == ["checkpoint-10"]
    assert snapshot.list_incomplete(target) == ["checkpoint-20"]
    copy = snapshot.read_snapshot(target, "checkpoint-10")
    snapshot.download_snapshot(target, copy, tmp_path / "back", count=lambda _: None)
    for name, path in files.items():
        assert (tmp_path / "back" / name).read_bytes() == path.read_bytes()
    files["trainer_state.json"].write_bytes(b"{}")
    assert snapshot.update_snapshot(target, "checkpoint-10", files) == ["trainer_state.json"]
    assert hub.repositories["me/mine"].files["runs/one/checkpoint-10/trainer_state.json"] == b"{}"
    snapshot.remove_snapshot(target, "checkpoint-10")
    assert snapshot.list_snapshots(target) == []
    assert not any("checkpoint-10" in name for name in hub.repositories["me/mine"].files)


def test_copy_in_a_bucket_comes_back_equal(hub, files, tmp_path, monkeypatch):
    """The calls for buckets are replaced: their uploads take a protocol that the stand-in does not speak."""
    stored = {}

    def change(self, bucket, *, add=(), delete=(), **_):
        stored.update({name: path if isinstance(path, bytes) else Path(path).read_bytes() for path, name in add})
        for name in delete:
            del stored[name]

    def list_tree(self, bucket, prefix=None, recursive=False):
        inside = [name for name in stored if not prefix or name.startswith(f"{prefix}/")]
        parts = {name: name[len(prefix) + 1 if prefix else 0 :].partition("/") for name in inside}
        folders = {name[: len(name) - len(rest) - 1] for name, (_, slash, rest) in parts.items() if slash}
        yield from (BucketFolder(type="directory", path=folder) for folder in ([] if recursive else folders))
        for name in inside if recursive else [name for name in inside if not parts[name][1]]:
            yield BucketFile(type="file", path=name, size=len(stored[name]), xetHash="0")

    def read(self, path, **_):
        if (name := self.resolve_path(path).path) not in stored:
            raise FileNotFoundError(name)
        return stored[name]

    monkeypatch.setattr(HfApi, "batch_bucket_files", change)
    monkeypatch.setattr(HfApi, "list_bucket_tree", list_tree)
    monkeypatch.setattr(HfApi, "bucket_info", lambda self, bucket: SimpleNamespace(private=bucket == "me/own"))
    monkeypatch.setattr(HfFileSystem, "cat_file", read)
    real = HfFileSystem.open
    monkeypatch.setattr(
        HfFileSystem,
        "open",
        lambda self, path, mode="rb", **words: (
            io.BytesIO(read(self, path)) if mode == "rb" else real(self, path, mode, **words)
        ),
    )
    target = access.open_storage("hf://buckets/me/own/run", "run.mirror")
    assert stored == {}
    snapshot.write_snapshot(target, "checkpoint-3", files, count=lambda _: None)
    assert set(stored) == {f"run/checkpoint-3/{name}" for name in (*files, "mirror.json")}
    copy = snapshot.read_snapshot(target, snapshot.list_snapshots(target)[0])
    snapshot.download_snapshot(target, copy, tmp_path / "back", count=lambda _: None)
    assert {name: (tmp_path / "back" / name).read_bytes() for name in files} == {
        name: path.read_bytes() for name, path in files.items()
    }
    snapshot.remove_snapshot(target, "checkpoint-3")
    assert stored == {}
    with pytest.raises(LaunchError, match="can be read by everybody"):
        access.open_storage("hf://buckets/me/open/run", "run.mirror")


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json"])
def test_copy_with_other_bytes_on_the_hub_gets_no_manifest(hub, files, monkeypatch, name):
    real = Storage.verify

    def verify(self, stored, digest):
        commit = hub.repositories["me/mine"].branches["main"][-1]
        path = f"runs/one/checkpoint-1/{name}"
        commit["files"][path] = bytes([commit["files"][path][0] ^ 1]) + commit["files"][path][1:]
        real(self, stored, digest)

    monkeypatch.setattr(Storage, "verify", verify)
    target = access.connect(URL)
    with pytest.raises(DamagedCopy, match="has other bytes there"):
        snapshot.write_snapshot(target, "checkpoint-1", {name: files[name]}, count=lambda _: None)
    assert snapshot.list_snapshots(target) == []


@pytest.mark.parametrize(
    ("url", "token", "code", "fix"),
    [
        ("hf://me/open/x", "hf_Writer123456", "mirror.public", "Make the repository private"),
        ("hf://me/absent/x", "hf_Writer123456", "mirror.absent", "Create the repository"),
        ("hf://me/mine/x", "hf_Reader123456", "mirror.refused", "HF_TOKEN to a token that may write"),
    ],
)
def test_repository_that_cannot_be_a_mirror_is_refused_by_name(hub, monkeypatch, url, token, code, fix):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(LaunchError) as raised:
        access.open_storage(url, "run.mirror")
    (fault,) = raised.value.faults
    assert fault.code == code
    assert fix in fault.fix
    assert token not in str(fault)


@pytest.mark.long
def test_run_goes_on_at_a_new_host_from_the_hub_and_ends_equal(go, hub, stop_after):
    assert go(RECIPE, "run.mirror=null", "train.output_dir=whole")[0] == 0
    stop_after(3)
    code, out, err = go(RECIPE)
    assert code == 143, err
    assert f"mirror    checkpoint-3 can be fetched from {URL}" in out
    stop_after(None)
    shutil.rmtree("out")
    code, out, err = go(RECIPE)
    assert code == 0, err
    assert f"mirror    checkpoint-3 was fetched from {URL}" in out
    assert resumed_runs.list_differences("out", "whole") == []
    folders = {name.split("/")[2] for name in hub.repositories["me/mine"].files if name.startswith("runs")}
    assert folders == {"checkpoint-6", "finished", "writer.json"}
