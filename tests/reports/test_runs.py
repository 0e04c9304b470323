"""`runs`: the table of the runs below a folder, whatever state their files are in."""

import json

import pytest

from trl_sft import cli, run_folder
from trl_sft.reports import run_files, run_table

DONE = {"outcome": "done", "steps": 4, "seconds": 75.0, "metrics": {"eval_loss": 0.5}, "verdict": {"code": "better"}}
LOG = [{"eval_loss": 2.0, "step": 0}, {"loss": 1.0, "step": 2}, {"eval_loss": 0.5, "step": 4}]


@pytest.fixture
def make_run(tmp_path):
    """Return a function that writes a run folder with a run.json and a log.jsonl."""

    def make(name, record=DONE, log=LOG):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        recipe = {"recipe": {"model.name_or_path": "/models/toy"}}
        (folder / "run.json").write_text(json.dumps(recipe | record))
        (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
        (folder / "ledger.json").write_text('{"train": {"rows": {"kept": 40}}}')
        return folder

    return make


def test_finished_run_is_described_with_losses_before_and_after(make_run):
    described = run_table.describe(run_files.read_run(make_run("a")))
    assert described["state"] == "done"
    assert (described["eval_loss_before"], described["eval_loss_after"]) == (2.0, 0.5)
    assert (described["verdict"], described["rows"], described["steps"]) == ("better", 40, 4)


def test_unfinished_run_has_the_last_evaluation_and_step_of_its_log(make_run):
    described = run_table.describe(run_files.read_run(make_run("a", {"outcome": "running"}, LOG[:2])))
    assert (described["eval_loss_before"], described["eval_loss_after"], described["steps"]) == (2.0, None, 2)


def test_run_is_running_only_while_its_folder_is_locked(make_run):
    folder = make_run("a", {"outcome": "running"})
    (folder / run_folder.LOCK).write_text("")  # left by a process that was killed
    assert run_files.read_run(folder).state == "interrupted"
    with run_folder.lock(folder) as is_locked:
        assert is_locked
        assert run_files.read_run(folder).state == "running"
    assert run_files.read_run(folder).state == "interrupted"


def test_table_lists_every_run_with_what_its_files_hold(make_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    make_run("first")
    make_run("deep/second", {"outcome": "the training failed: loss is nan\nmore"}, [])
    make_run("first/checkpoint-4")  # inside a run
    make_run("_earlier_run")
    assert cli.main(["runs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["run", "deep/second", "first"]
    assert "better   2 -> 0.5" in lines[2]
    assert lines[3] == "runs/deep/second stopped: the training failed: loss is nan"
    assert len(lines) == 4


def test_damaged_record_is_named_and_the_other_runs_are_listed(make_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_run("whole")
    (make_run("cut") / "run.json").write_text('{"outcome": "do')
    (make_run("log", log=[]) / "log.jsonl").write_text('{"loss": 1.0, "step": 1}\n\x00\x00\n')
    assert cli.main(["runs", "--json"]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert [fault["code"] for fault in answer["faults"]] == ["report.damaged_file"]
    assert [run["folder"] for run in answer["runs"]] == ["runs/log", "runs/whole"]
    assert answer["runs"][0]["damaged"] == ["log.jsonl: line 2 is no JSON object"]
    assert answer["runs"][0]["steps"] == 4


@pytest.mark.parametrize(
    "text",
    [
        '{"metrics": [1], "measured": 3, "steps": "x", "verdict": "y", "recipe": null}',
        '{"outcome": 3}',
        '{"steps": true}',
    ],
)
def test_record_with_values_of_other_types_is_listed(make_run, text):
    folder = make_run("odd")
    (folder / "run.json").write_text(text)
    described = run_table.describe(run_files.read_run(folder))
    assert len(run_table.format_cells(described, parent=folder.parent)) == len(run_table.COLUMNS)


@pytest.mark.parametrize(
    ("folder", "problem"),
    [("absent", "there is no such folder"), ("rows.jsonl", "this is a file, not a folder")],
)
def test_folder_that_is_absent_or_a_file_is_refused(here, folder, problem, capsys):
    assert cli.main(["runs", folder]) == 2
    assert problem in capsys.readouterr().err


def test_folder_without_runs_says_how_to_train_one(here, capsys):
    assert cli.main(["runs", "."]) == 0
    assert capsys.readouterr().out == ". holds no run. Next: train one: python -m trl_sft RECIPE\n"
