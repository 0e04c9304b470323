"""A disk that refuses to write ends a command with exit code 2, the folder, and the command that goes on."""

import errno
import json
import resource
import subprocess
from pathlib import Path

import forks
import pytest
from conftest import QUESTIONS, RECIPE, jsonl

from trl_sft import cli, disk

FULL = RECIPE.replace("rows.jsonl}", "rows.jsonl, eval_fraction: 0.2}")
SAVING = ("train.save_strategy=steps", "train.save_steps=1", "train.max_steps=3")


def raise_from(outer, inner):
    try:
        try:
            raise inner
        except type(inner) as error:
            raise outer from error
    except type(outer) as error:
        return error


DISK_ERRORS = [
    OSError(errno.ENOSPC, "No space left on device", "/tmp/x/file"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    OSError(errno.EFBIG, "File too large"),
    OSError(errno.EROFS, "Read-only file system"),
    RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file data/3: file write"),
    RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    raise_from(ValueError("An error occurred while generating the dataset"), OSError(errno.ENOSPC, "No space left")),
]


@pytest.mark.parametrize("error", DISK_ERRORS, ids=lambda error: f"{type(error).__name__} {error}"[:40])
def test_error_of_a_disk_is_recognised_and_names_a_folder_with_its_free_space(error, tmp_path):
    fault = disk.explain(error, [tmp_path], command="python -m trl_sft r.yaml")
    assert Path(fault.where).is_absolute()
    assert "are free" in fault.problem
    assert fault.fix.endswith("Then run: python -m trl_sft r.yaml")


def test_permission_that_is_refused_counts_for_files_that_are_written_alone(tmp_path):
    def deny(path):
        return disk.explain(PermissionError(errno.EACCES, "Permission denied", str(path)), [tmp_path / "out"])

    fault = deny(tmp_path / "out/checkpoint-1/optimizer.pt")
    assert fault.where == str(tmp_path / "out/checkpoint-1")
    assert "no longer lets you write there" in fault.problem
    assert "Correct the permissions" in fault.fix
    assert deny("/elsewhere/rows.jsonl") is None


def test_run_that_is_done_stays_done_where_the_earlier_one_cannot_be_removed(go, here, monkeypatch):
    from trl_sft import earlier_run

    def refuse(folder):
        raise OSError(errno.EIO, "Input/output error")

    assert go(FULL)[0] == 0
    monkeypatch.setattr(earlier_run, "remove", refuse)
    code, out, err = go(FULL, "run.overwrite=true")
    assert code == 0, err
    assert f"cannot be removed: Input/output error. Remove {here / 'out/_earlier_run'}" in out
    assert json.loads((here / "out/run.json").read_text())["outcome"] == "done"


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "No such file"), ValueError("x"), MemoryError()])
def test_other_errors_are_none_of_a_disk(error):
    assert disk.explain(error) is None


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Train the run that nothing stops; return the bytes of its weights."""
    folder = tmp_path_factory.mktemp("whole")
    jsonl(folder / "rows.jsonl", QUESTIONS)
    (folder / "recipe.yaml").write_text(FULL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["recipe.yaml", *SAVING]) == 0
    return (folder / "out/model.safetensors").read_bytes()


def test_run_that_cannot_write_ends_with_exit_code_2_and_goes_on_to_the_same_weights(go, here, whole_run):
    """300,000 bytes are less than the weights. tests/training/test_kills.py refuses each operation."""
    (here / "recipe.yaml").write_text(FULL)
    limit = {"prepare": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = forks.start(here, "recipe.yaml", "--json", *SAVING, **limit, **streams)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2, err
    assert "Traceback" not in err
    (fault,) = json.loads(out)["faults"]
    assert fault["code"] == "machine.disk_full"
    assert "ulimit -f" in fault["problem"]
    assert "-m trl_sft recipe.yaml" in fault["fix"]
    code, _, err = go(FULL, *SAVING)
    assert code == 0, err
    assert (here / "out/model.safetensors").read_bytes() == whole_run


def test_run_whose_folder_is_removed_says_so(go, here, monkeypatch):
    import shutil

    from trl_sft.training.stages import SFTTrainer

    def remove(self, *args, **kwargs):
        shutil.rmtree(here / "out")
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(here / "out/checkpoint-1"))

    monkeypatch.setattr(SFTTrainer, "_save_checkpoint", remove)
    code, _, err = go(FULL, *SAVING)
    assert code == 2, err
    assert "was removed while the run used it" in err


def test_full_disk_while_the_outcome_is_written_hides_nothing(go, monkeypatch):
    from trl_sft.training.record import RunRecord
    from trl_sft.training.stages import SFTTrainer

    def fill(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SFTTrainer, "_save_checkpoint", fill)
    monkeypatch.setattr(RunRecord, "close", fill)
    code, _, err = go(FULL, *SAVING)
    assert code == 2
    assert "the disk is full" in err


def test_killed_data_worker_is_explained(go, monkeypatch):
    from trl_sft.training.stages import SFTTrainer

    def die(*_, **__):
        raise RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed.")

    monkeypatch.setattr(SFTTrainer, "training_step", die)
    code, _, err = go(FULL)
    assert code == 2
    assert "train.dataloader_num_workers: 0" in err


def test_full_cache_of_prepared_rows_is_no_fault_of_the_file(go, monkeypatch):
    from trl_sft.data import load

    def fill(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(load, "_load_all", fill)
    code, _, err = go(FULL, command=["check"])
    assert code == 2
    assert "the disk is full" in err
    assert "rows.jsonl cannot be read" not in err
