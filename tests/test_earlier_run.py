"""An earlier run is whole at any moment, until the run that replaces it is finished."""

import contextlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from conftest import RECIPE
from test_checkpoints import make_checkpoint

from trl_sft import earlier_run, load_recipe, run_folder
from trl_sft.errors import RecipeError
from trl_sft.recipe import folder_decision

FULL = RECIPE.replace("rows.jsonl}", "rows.jsonl, eval_fraction: 0.2}")
SAVING = ("train.save_strategy=steps", "train.save_steps=1")


class Killed(BaseException):
    """Stands for SIGKILL between two operations on files."""


def snapshot(folder):
    """Return the contents of all files below a folder, by their relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def folder(tmp_path):
    """Return a folder with a finished run, a link among its files, and files of the user."""
    folder = tmp_path / "out"
    (folder / "checkpoint-2").mkdir(parents=True)
    (folder / "checkpoint-2/model.safetensors").write_bytes(b"step 2")
    (folder / "checkpoint-2/trainer_state.json").write_text('{"global_step": 2}')
    for name in ("model.safetensors", "config.json", "recipe.yaml", "log.jsonl"):
        (folder / name).write_text(name)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/tokenizer.json").write_text("tokenizer")
    (folder / "tokenizer.json").symlink_to(tmp_path / "elsewhere/tokenizer.json")
    (folder / "notes.txt").write_text("mine")
    (folder / "plots").mkdir()
    (folder / "plots/a.png").write_bytes(b"mine")
    files = ["model.safetensors", "config.json", "tokenizer.json", "../elsewhere/tokenizer.json", "..", "plots/a.png"]
    (folder / "run.json").write_text(json.dumps({"outcome": "done", "files": files}))
    return folder


def test_run_is_set_aside_whole_and_files_of_the_user_stay(folder):
    before = snapshot(folder)
    aside = earlier_run.set_aside(folder)
    users = {"notes.txt", "plots/a.png"}
    assert {name for name in snapshot(folder) if not name.startswith("_earlier_run")} == users
    assert snapshot(aside) == {name: data for name, data in before.items() if name not in users}
    assert (aside / "tokenizer.json").is_symlink()


def test_removal_takes_only_what_the_run_names_and_follows_no_link(folder):
    aside = earlier_run.set_aside(folder)
    (aside / "added.txt").write_text("mine")
    earlier_run.remove(folder)
    assert snapshot(folder) == {"notes.txt": b"mine", "plots/a.png": b"mine", "_removed_run/added.txt": b"mine"}
    assert (folder.parent / "elsewhere/tokenizer.json").read_text() == "tokenizer"


def interrupt(monkeypatch, number):
    """Raise `Killed` at the `number`th operation that changes files."""
    count = 0

    def counting(original):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count > number:
                raise Killed
            return original(*args, **kwargs)

        return call

    for owner, name in (
        *((Path, name) for name in ("rename", "replace", "unlink", "mkdir", "rmdir", "write_text")),
        (shutil, "rmtree"),
        (os, "fsync"),
    ):
        monkeypatch.setattr(owner, name, counting(getattr(owner, name)))


def is_whole(folder, before):
    """Tell whether all files of the run that `before` holds are in a folder."""
    now = snapshot(folder)
    names = [name for name in before if name not in ("notes.txt", "plots/a.png")]
    return all(now.get(name) == before[name] for name in names)


def count_operations(folder, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, symlinks=True)
    for number in range(1000):
        with monkeypatch.context() as patch:
            interrupt(patch, number)
            try:
                earlier_run.set_aside(copy)
            except Killed:
                pass
            else:
                return number
        shutil.rmtree(copy)
        shutil.copytree(folder, copy, symlinks=True)
    raise AssertionError("never done")


def test_process_killed_at_any_operation_leaves_the_earlier_run_whole(folder, tmp_path, monkeypatch):
    before = snapshot(folder)
    total = count_operations(folder, tmp_path, monkeypatch)
    assert total >= 9  # a folder, each file, run.json
    for number in range(total + 1):
        copy = tmp_path / f"copy-{number}"
        shutil.copytree(folder, copy, symlinks=True)
        with monkeypatch.context() as patch:
            interrupt(patch, number)
            with contextlib.suppress(Killed):
                earlier_run.set_aside(copy)
        if earlier_run.is_set_aside(copy):
            assert is_whole(copy / "_earlier_run", before), number
        else:
            assert run_folder.read_json(copy / "run.json").get("outcome") == "done", number
        again = tmp_path / f"again-{number}"
        shutil.copytree(copy, again, symlinks=True)
        earlier_run.restore_interrupted(copy)  # the next run without overwrite
        place = copy / "_earlier_run" if earlier_run.is_set_aside(copy) else copy
        assert is_whole(place, before), number
        earlier_run.restore_interrupted(again)  # the next run with overwrite
        earlier_run.set_aside(again)
        assert is_whole(again / "_earlier_run", before), number


def test_interrupted_removal_is_taken_for_no_run(folder, tmp_path, monkeypatch):
    earlier_run.set_aside(folder)
    for number in range(20):
        copy = tmp_path / f"copy-{number}"
        shutil.copytree(folder, copy, symlinks=True)
        (copy / "run.json").write_text(json.dumps({"outcome": "done", "files": []}))
        with monkeypatch.context() as patch:
            interrupt(patch, number)
            with contextlib.suppress(Killed):
                earlier_run.remove(copy)
        earlier_run.restore_interrupted(copy)
        assert not (copy / "checkpoint-2").exists(), number
        assert not (copy / "model.safetensors").exists(), number
        earlier_run.remove(copy)
        assert set(snapshot(copy)) == {"notes.txt", "plots/a.png", "run.json"}, number


def test_move_that_a_kill_interrupted_is_taken_back_by_any_command(folder, tmp_path, monkeypatch):
    before = snapshot(folder)
    with monkeypatch.context() as patch:
        interrupt(patch, 4)
        with contextlib.suppress(Killed):
            earlier_run.set_aside(folder)
    assert (folder / "_earlier_run").is_dir()
    assert not is_whole(folder, before)
    with run_folder.lock(folder):  # another process trains there
        earlier_run.recover(folder)
        assert not is_whole(folder, before)
    earlier_run.recover(folder)
    assert is_whole(folder, before)
    assert not (folder / "_earlier_run").exists()


@pytest.mark.parametrize("number", [0, 1, 5])
def test_removal_that_a_kill_interrupted_is_completed_by_any_command(folder, monkeypatch, number):
    earlier_run.set_aside(folder)
    (folder / "run.json").write_text(json.dumps({"outcome": "done", "files": []}))
    with monkeypatch.context() as patch:
        interrupt(patch, number)
        with contextlib.suppress(Killed):
            earlier_run.remove(folder)
    earlier_run.recover(folder)
    assert set(snapshot(folder)) == {"notes.txt", "plots/a.png", "run.json"}


@pytest.mark.parametrize(("age", "stays"), [(0, True), (3600, False)])
def test_half_written_report_of_a_finished_run_is_removed_at_the_next_start(tmp_path, age, stays):
    (tmp_path / "run.json").write_text(json.dumps({"outcome": "done"}))
    part = tmp_path / ".report.html.part"
    part.write_text("<html>")
    os.utime(part, (time.time() - age, time.time() - age))
    earlier_run.recover(tmp_path)
    assert part.exists() == stays
    assert (tmp_path / "run.json").is_file()


def test_earlier_run_stays_aside_while_the_run_that_replaces_it_is_unfinished(folder):
    before = snapshot(folder)
    earlier_run.set_aside(folder)
    (folder / "run.json").write_text(json.dumps({"outcome": "running"}))
    earlier_run.recover(folder)
    assert is_whole(folder / "_earlier_run", before)


@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_refusal_names_the_place_of_the_run_that_an_unfinished_one_was_to_replace(here, folder, has_checkpoint):
    (here / "recipe.yaml").write_text(FULL)
    run = load_recipe("recipe.yaml")
    assert folder == run.output_dir
    earlier_run.set_aside(folder)
    (folder / "run.json").write_text(json.dumps({"outcome": "running"}))
    if has_checkpoint:
        make_checkpoint(folder, 1)
    with pytest.raises(RecipeError, match="_earlier_run") as error:
        folder_decision.check_folder(run)
    assert ("holds an unfinished run of another recipe" in str(error.value)) == has_checkpoint


def test_run_that_trained_nothing_is_removed_and_not_set_aside(folder):
    (folder / "run.json").write_text(json.dumps({"outcome": "running", "files": []}))
    shutil.rmtree(folder / "checkpoint-2")
    assert earlier_run.set_aside(folder) is None
    assert not (folder / "_earlier_run").exists()
    assert not (folder / "log.jsonl").exists()
    assert (folder / "notes.txt").exists()


def test_second_replacement_keeps_the_finished_run(folder):
    before = snapshot(folder)
    earlier_run.set_aside(folder)
    (folder / "run.json").write_text(json.dumps({"outcome": "running"}))
    (folder / "checkpoint-1").mkdir()
    earlier_run.set_aside(folder)
    assert is_whole(folder / "_earlier_run", before)
    assert not (folder / "checkpoint-1").exists()


def test_finished_run_stays_until_the_run_that_replaces_it_is_finished(go, here):
    assert go(FULL, *SAVING)[0] == 0
    before = snapshot(here / "out")
    other = ("train.learning_rate=1e-3", "run.overwrite=true")
    code, out, _ = go(FULL, *SAVING, *other, "run.max_hours=1e-9")
    assert code == 75
    assert "earlier   the run that this one replaces is in" in out
    assert snapshot(here / "out/_earlier_run") == before
    code, _, err = go(FULL, *SAVING, *other)
    assert code == 0, err
    assert not (here / "out/_earlier_run").exists()
    assert run_folder.read_json(here / "out/run.json")["outcome"] == "done"
    assert snapshot(here / "out")["model.safetensors"] != before["model.safetensors"]


def test_run_killed_before_its_first_file_leaves_the_earlier_one_that_the_next_command_names(go, here, monkeypatch):
    from trl_sft.training.record import RunRecord

    assert go(FULL, *SAVING)[0] == 0
    before = snapshot(here / "out")
    with monkeypatch.context() as patch:
        patch.setattr(RunRecord, "_write", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            go(FULL, *SAVING, "train.learning_rate=1e-3", "run.overwrite=true")
    code, _, err = go(FULL, *SAVING)
    assert code == 2
    assert "_earlier_run holds a run" in err
    assert is_whole(here / "out/_earlier_run", before)
    assert go(FULL, *SAVING, "run.overwrite=true")[0] == 0
    assert not (here / "out/_earlier_run").exists()


def test_folder_that_another_process_finished_during_preparation_is_not_touched(go, here, monkeypatch):
    from trl_sft import cli
    from trl_sft.training import stages

    prepare = stages.prepare

    def prepare_slowly(run):
        inputs = prepare(run)
        with monkeypatch.context() as patch:
            patch.setattr(stages, "prepare", prepare)
            assert cli.main(["recipe.yaml"]) == 0
        return inputs

    monkeypatch.setattr(stages, "prepare", prepare_slowly)
    code, _, err = go(FULL, "train.learning_rate=1e-3")
    assert code == 2
    assert "holds a finished run" in err
    assert "learning_rate: 0.001" not in (here / "out/resolved.yaml").read_text()


def test_half_written_file_of_a_killed_process_blocks_no_folder(go, here):
    (here / "out").mkdir()
    (here / "out/.lock").touch()
    (here / "out/.run.json.part").write_text("{")
    assert go(FULL)[0] == 0
    assert not (here / "out/.run.json.part").exists()


def test_file_that_resembles_a_half_written_one_still_blocks_the_folder(go, here):
    (here / "out").mkdir()
    (here / "out/.thesis.doc.part").write_text("{")
    assert go(FULL)[0] == 2
