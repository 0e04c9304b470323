"""run.mirror from end to end, in this process: fsspec's memory file system is the place elsewhere."""

import errno
import json
import shutil
from pathlib import Path

import fsspec
import pytest
import resumed_runs
from fsspec.implementations.memory import MemoryFileSystem

from trl_sft.cli.evaluate import after_training
from trl_sft.errors import RunStopped
from trl_sft.mirroring import snapshot, storage
from trl_sft.recipe import build, resolved

RECIPE = """\
model: {name_or_path: trl_sft:tiny}
data: {train: rows.jsonl, eval_fraction: 0.2}
train:
  output_dir: out
  max_steps: 6
  save_steps: 2
  save_total_limit: 2
  per_device_train_batch_size: 2
  logging_steps: 1
  eval_strategy: steps
  eval_steps: 2
  load_best_model_at_end: true
evaluate: {max_rows: 2, generation: {max_new_tokens: 2}}
run: {mirror: "memory://bucket/runs"}
"""


@pytest.fixture
def memory():
    """Return the file system of memory://, empty."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


def list_copies():
    return snapshot.list_snapshots(storage.Storage("memory://bucket/runs"))


def flip_byte(files, name):
    """Change one bit in the middle of a file at the mirror."""
    content = bytearray(files.cat_file(name))
    content[len(content) // 2] ^= 1
    files.pipe_file(name, bytes(content))


def test_run_goes_on_at_a_new_host_from_its_mirror_and_ends_equal_to_one_that_was_never_stopped(
    go, memory, stop_after, here
):
    code, _, err = go(RECIPE, "run.mirror=null", "train.output_dir=whole")
    assert code == 0, err
    stop_after(4)
    code, out, err = go(RECIPE)
    assert code == 143
    assert out.count("verified)") == 2
    assert "mirror    checkpoint-4 can be fetched from memory://bucket/runs" in out
    assert list_copies() == ["checkpoint-2", "checkpoint-4"]
    stop_after(None)
    shutil.rmtree("out")
    code, out, err = go(RECIPE, "train.output_dir=elsewhere")  # another host may have other paths
    assert code == 0, err
    assert "mirror    checkpoint-4 was fetched from memory://bucket/runs" in out
    assert "resume    from " in out
    assert "mirror    checkpoint-6 and the finished run can be fetched from" in out
    assert resumed_runs.list_differences("elsewhere", "whole") == []
    assert list_copies() == [*(path.name for path in sorted(Path("elsewhere").glob("checkpoint-*"))), "finished"]
    assert not Path("elsewhere/_push").exists()
    copied = memory.cat_file("/bucket/runs/finished/model.safetensors")
    assert copied == Path("whole/model.safetensors").read_bytes()
    code, _, err = go(RECIPE)
    assert code == 2
    assert "memory://bucket/runs holds a finished run\n    -> Name another `run.mirror`, or set `run.overwrite" in err
    assert not Path("out").exists()


def test_upload_that_fails_is_named_and_tried_again_and_does_not_end_the_run(go, memory, monkeypatch):
    real, calls = MemoryFileSystem.put_file, []

    def fail_first(self, path, name, **keywords):
        calls.append(name)
        if "checkpoint-2" in name and sum("checkpoint-2" in call for call in calls) == 3:
            raise OSError(errno.ECONNRESET, "Connection reset; token hf_Secret1234567")
        real(self, path, name, **keywords)

    monkeypatch.setattr(MemoryFileSystem, "put_file", fail_first)
    code, out, err = go(RECIPE, "evaluate=false", "train.max_steps=4", "train.save_total_limit=null")
    assert code == 0, err
    assert "warning   checkpoint-2 is not at the mirror: [Errno 104] Connection reset" in out
    assert "the run goes on, and the next checkpoint tries again" in out
    assert "hf_Secret" not in out
    assert list_copies() == ["checkpoint-2", "checkpoint-4", "finished"]
    assert out.index("warning   checkpoint-2") < out.index("mirror    checkpoint-2 is at")
    assert "not there" not in out


SHORT = ("evaluate=false", "train.load_best_model_at_end=false", "train.eval_strategy='no'")


def test_what_is_written_after_the_training_reaches_the_mirror(go, memory, monkeypatch):
    def evaluate(run, failed_push):
        """Write what the evaluation after the training writes, and fail then."""
        (run.output_dir / "evaluation.jsonl").write_text("{}\n")
        (run.output_dir / "eval.json").write_text('{"evaluation": 1}')
        raise RunStopped("the evaluation failed", 130, code="evaluation.failed_after_training")

    monkeypatch.setattr(after_training, "evaluate", evaluate)
    words = ("evaluate={checks: exact, max_rows: 2, generation: {max_new_tokens: 2}}", *SHORT[1:], "train.max_steps=2")
    code, out, err = go(RECIPE.replace("evaluate:", "#"), *words)
    assert code == 130, err
    for name in ("evaluation.jsonl", "eval.json", "report.html", "run.json", "README.md", "resolved.yaml"):
        assert memory.cat_file(f"/bucket/runs/finished/{name}") == Path("out", name).read_bytes(), name
    copy = snapshot.read_snapshot(storage.Storage("memory://bucket/runs"), "finished")
    assert {"model.safetensors", "evaluation.jsonl", "report.html"} <= set(copy.files)
    assert "evaluation.jsonl" in out.rpartition("mirror    ")[2]


def test_finished_run_that_does_not_reach_the_mirror_ends_with_a_fault(go, memory, monkeypatch):
    real = MemoryFileSystem.put_file

    def fail_at_the_end(self, path, name, **keywords):
        if "finished" in name:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        real(self, path, name, **keywords)

    monkeypatch.setattr(MemoryFileSystem, "put_file", fail_at_the_end)
    code, out, err = go(RECIPE, *SHORT, "train.max_steps=2")
    assert code == 2
    assert "the finished run is not there: [Errno 122] Disk quota exceeded" in out
    assert "is trained and saved in out, but not at the mirror memory://bucket/runs: [Errno 122]" in err
    assert "Copy out to another place" in err
    assert list_copies() == ["checkpoint-2"]


def test_run_writes_no_more_to_a_mirror_that_another_process_has_claimed_since(go, memory, monkeypatch):
    real = MemoryFileSystem.put_file

    def claim_meanwhile(self, path, name, **keywords):
        if "checkpoint-4" in name:
            self.pipe_file("/bucket/runs/writer.json", b'{"process": "other", "host": "spot-2", "began": "today"}')
        real(self, path, name, **keywords)

    monkeypatch.setattr(MemoryFileSystem, "put_file", claim_meanwhile)
    code, out, err = go(RECIPE, *SHORT, "train.max_steps=6")
    assert code == 2
    problem = "another process, on spot-2 since today, writes to memory://bucket/runs now"
    assert f"warning   checkpoint-4 is not at the mirror: {problem}; the run goes on, and copies nothing more" in out
    assert problem in err
    assert list_copies() == ["checkpoint-2"]
    assert not any("checkpoint-6" in name or "finished" in name for name in memory.find("/bucket"))


def test_mirror_that_is_full_loses_the_older_copies_first_and_never_the_newest_one(go, memory, monkeypatch):
    real = MemoryFileSystem.put_file

    def refuse_third_copy(self, path, name, **keywords):
        copies = {key.split("/")[3] for key in [*self.store, name] if "checkpoint" in key}
        if len(copies) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, path, name, **keywords)

    monkeypatch.setattr(MemoryFileSystem, "put_file", refuse_third_copy)
    code, out, err = go(RECIPE, *SHORT, "train.max_steps=8")
    assert code == 0, err
    assert "not at the mirror" not in out
    assert list_copies() == ["checkpoint-6", "checkpoint-8", "finished"]


def test_copy_that_is_damaged_is_passed_over_and_the_one_before_it_is_fetched(go, memory, stop_after):
    stop_after(4)
    assert go(RECIPE, "evaluate=false")[0] == 143
    stop_after(None)
    shutil.rmtree("out")
    for step in (7, 8, 9):
        for name in memory.find("/bucket/runs/checkpoint-4"):
            memory.pipe_file(name.replace("checkpoint-4", f"checkpoint-{step}"), memory.cat_file(name))
    flip_byte(memory, "/bucket/runs/checkpoint-4/optimizer.pt")
    manifest = json.loads(memory.cat_file("/bucket/runs/checkpoint-7/mirror.json"))
    del manifest["files"]["optimizer.pt"]
    memory.pipe_file("/bucket/runs/checkpoint-7/mirror.json", json.dumps(manifest).encode())
    flip_byte(memory, "/bucket/runs/checkpoint-8/trl_sft.json")
    memory.pipe_file("/bucket/runs/checkpoint-9/mirror.json", b'{"files": {"model')
    memory.pipe_file("/bucket/runs/checkpoint-5/model.safetensors", b"half of an upload")  # no manifest
    code, out, err = go(RECIPE, "evaluate=false", "train.max_steps=3", "run.allow=[changed_recipe]")
    assert code == 0, err
    assert "checkpoint-9 is passed over: mirror.json of it is damaged" in out
    assert "checkpoint-8 is passed over: trl_sft.json has other bytes than when it was uploaded" in out
    assert "checkpoint-7 is passed over: optimizer.pt is missing" in out
    assert "checkpoint-4 is passed over: memory://bucket/runs/checkpoint-4/optimizer.pt has other bytes" in out
    assert "mirror    checkpoint-2 was fetched" in out
    assert list_copies() == ["checkpoint-2", "checkpoint-3", "finished"]  # those of the other run are gone


def test_mirror_of_another_recipe_is_refused_and_replaced_with_overwrite(go, memory, stop_after):
    stop_after(2)
    assert go(RECIPE, "evaluate=false")[0] == 143
    stop_after(None)
    words = ("evaluate=false", "train.output_dir=other", "train.seed=7", "train.max_steps=2")
    code, out, err = go(RECIPE, *words)
    assert code == 2
    assert "memory://bucket/runs holds checkpoint-2 of another recipe (train.max_steps: 6 -> 2; train.seed: " in err
    assert not Path("other").exists()
    code, _, err = go(RECIPE, *words, "run.resume=never")
    assert code == 2
    assert "holds checkpoint-2, and `run.resume` is never" in err
    before = memory.cat_file("/bucket/runs/checkpoint-2/model.safetensors")
    code, out, err = go(RECIPE, *words, "run.overwrite=true")
    assert code == 0, err
    assert "was fetched" not in out
    assert list_copies() == ["checkpoint-2", "finished"]
    assert memory.cat_file("/bucket/runs/checkpoint-2/model.safetensors") != before


def test_check_writes_to_the_mirror_and_leaves_nothing(go, memory):
    code, out, err = go(RECIPE, command=["check"])
    assert code == 0, err
    assert "mirror    memory://bucket/runs: a file was written, read and removed" in out
    assert not memory.find("/")


def test_mirror_that_cannot_be_written_to_is_refused_before_the_rows_are_read(go):
    code, out, err = go(RECIPE, "run.mirror=file:///proc/nowhere")
    assert code == 2
    assert "run.mirror\n    file:///proc/nowhere" in err
    assert "rows" not in out
    assert not Path("out").exists()


FAULTS = {
    "/backup/runs": ("has no scheme", "Write `file:///backup/runs`."),
    "backup": ("'backup' has no scheme, such as s3://", "Write s3://BUCKET/PATH"),
    "s4://bucket/x": ("no file system has the scheme `s4`", "Did you mean `s3://bucket/x`?"),
    "s3://": ("'s3://' names no place", "Write s3://BUCKET/PATH"),
    "https://example.com/x": ("`https://` can be read, and a mirror is written", "Write s3://"),
    "s3://AKIAKEY:secretsecret@bucket/x": ("holds a password or a key", "set the environment variables"),
    "az://bucket/x?sig=secretsecret1234": ("holds a password or a key", "set the environment variables"),
    "s3://b/x?aws_secret_access_key=secretsecret12": ("holds a password or a key", "set the environment variables"),
    "file://out/mirror": ("lies in the run folder, and is lost with it", "Name a folder on another disk"),
    "file://HERE/out/mirror": ("lies in the run folder, and is lost with it", "Name a folder on another disk"),
}


@pytest.mark.parametrize("url", FAULTS)
def test_address_that_cannot_be_a_mirror_is_a_fault_of_the_recipe(go, here, url):
    problem, fix = FAULTS[url]
    code, out, err = go(RECIPE.replace("memory://bucket/runs", url.replace("HERE", str(here))), command=["check"])
    assert code == 2
    assert problem in err
    assert fix in err
    assert "secretsecret" not in out + err


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.save_strategy='no'", "`mirror` copies checkpoints, but `train.save_strategy` is no"),
        ("train.save_only_model=true", "which `train.save_only_model` leaves out"),
    ],
)
def test_mirror_without_checkpoints_to_go_on_from_is_a_fault(go, override, problem):
    words = ("train.save_steps=null", "train.save_total_limit=null", "train.load_best_model_at_end=false")
    code, _, err = go(RECIPE, *words, override, command=["check"])
    assert code == 2
    assert problem in err


def test_change_of_the_mirror_does_not_change_the_fingerprint(here):
    Path("recipe.yaml").write_text(RECIPE)
    fingerprints = {
        resolved.compute_fingerprint(build.load_run("recipe.yaml", [f"run.mirror={url}"]))
        for url in ("s3://a/b", "hf://me/c", "null")
    }
    assert len(fingerprints) == 1
