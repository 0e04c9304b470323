"""Runs in two workers of Ray Train: they train, stop and fail as those of torchrun. Ray is no part of the dev group."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from test_two_processes_of_a_run import (
    ENDLESS,
    RECIPE,
    assert_equal_losses,
    read_log,
    start,
    wait_for_checkpoint,
)

from trl_sft.run_folder import CHECKPOINT

pytest.importorskip("ray", reason="pip install 'trl-sft[ray]'")
pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
RAY = "launch={engine: ray}"
STOPPED_AT_ONCE = ("run.max_hours=1e-7", "run.allow=[changed_recipe]")  # after the next step


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def find_workers(name):
    """Return the process ids of processes whose command contains a name, by their number in the run."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "environ").read_bytes().decode(errors="replace").split("\0")
            variables = dict(word.split("=", 1) for word in words if "=" in word)
            if f"train.output_dir={name}" in (path / "cmdline").read_text() and "RANK" in variables:
                found[int(variables["RANK"])] = int(path.name)
        except OSError:
            continue
    return found


def get_parent(process_id):
    status = Path(f"/proc/{process_id}/status").read_text()
    return int(status.partition("PPid:\t")[2].split()[0])


def is_running(process_id):
    return Path(f"/proc/{process_id}").exists()


def test_two_workers_train_as_two_processes_of_torchrun(folder):
    spans = {}
    for name, launch in (("torchrun", "launch=null"), ("ray", RAY)):
        began = time.monotonic()
        process = start(folder, launch, f"train.output_dir={name}", "--json")
        out, err = process.communicate(timeout=600)
        spans[name] = time.monotonic() - began
        assert json.loads(out)["ok"], err
        assert err.count("Done: 9 steps") == 1  # one process prints, and no line has a prefix of Ray
        assert "pid=" not in err
    print(f"seconds in all: {spans['torchrun']:.0f} with torchrun, {spans['ray']:.0f} with Ray")
    assert_equal_losses(read_log(folder / "torchrun"), read_log(folder / "ray"))
    assert {path.name for path in (folder / "ray").iterdir()} == {path.name for path in (folder / "torchrun").iterdir()}
    measured = json.loads((folder / "ray" / "run.json").read_text())["measured"]
    assert [measured["before_training"][name] for name in ("processes", "engine")] == [2, "DDP"]
    assert measured["after_training"]["rows"] == 66  # none twice


def test_signal_to_the_command_ends_all_workers_with_a_checkpoint_and_one_process_resumes(folder):
    process = start(folder, RAY, *ENDLESS, "train.output_dir=term")
    wait_for_checkpoint(process, folder / "term", seconds=600)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, err = process.communicate(timeout=120)
    print(f"SIGTERM ended two workers after {time.monotonic() - began:.1f} s")
    assert process.returncode == 143
    assert "stopped by SIGTERM after step" in err
    last = max(int(path.name.removeprefix(CHECKPOINT)) for path in (folder / "term").glob(f"{CHECKPOINT}*"))
    process = start(folder, *ENDLESS, "train.output_dir=term", *STOPPED_AT_ONCE, processes=1)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 75, err
    assert f"resume    from {folder / 'term' / f'{CHECKPOINT}{last}'}" in out


@pytest.mark.parametrize("victim", ["process", "worker"])
def test_killed_worker_ends_the_others_within_a_minute_and_the_run_resumes(folder, victim):
    process = start(folder, RAY, *ENDLESS, f"train.output_dir={victim}")
    wait_for_checkpoint(process, folder / victim, seconds=600)
    children = find_workers(victim)
    assert set(children) == {0, 1}
    os.kill(children[1] if victim == "process" else get_parent(children[1]), signal.SIGKILL)
    began = time.monotonic()
    _, err = process.communicate(timeout=120)
    print(f"the run ended {time.monotonic() - began:.1f} s after a {victim} was killed")
    assert time.monotonic() - began < 60
    assert process.returncode == 2
    cause = "SIGKILL" if victim == "process" else "the end of its Ray worker"
    assert f"process 1 of 2 was ended by {cause}" in err
    assert "Traceback" not in err
    assert not any(map(is_running, children.values()))
    process = start(folder, RAY, *ENDLESS, f"train.output_dir={victim}", *STOPPED_AT_ONCE)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 75, err
    assert "resume    from" in out


def test_fault_of_a_worker_has_the_text_and_exit_code_of_one_process(folder):
    words = ("train.output_dir=nan", "train.learning_rate=1e30", "evaluate=false", "train.max_grad_norm=0")
    codes, texts = [], []
    for launch in ("launch=null", RAY):
        process = start(folder, launch, *words)
        texts.append(process.communicate(timeout=600)[1])
        codes.append(process.returncode)
    assert codes == [3, 3]
    assert [line for line in texts[1].splitlines() if line.startswith("trl_sft:")] == [
        line for line in texts[0].splitlines() if line.startswith("trl_sft:")
    ]


def test_cluster_that_does_not_answer_or_lacks_resources_is_reported_in_time(folder, monkeypatch):
    monkeypatch.setenv("TRL_SFT_MEETING_SECONDS", "20")
    for config, problem in (
        ("{init: {address: '127.0.0.1:29999'}}", "the Ray cluster at 127.0.0.1:29999 cannot be used"),
        ("{scaling_config: {resources_per_worker: {CPU: 1, chip: 1}}}", "Ray has started 0 of 2 workers after 20 s"),
    ):
        began = time.monotonic()
        process = start(folder, f"launch={{engine: ray, config: {config}}}", "train.use_cpu=true", "run=null")
        _, err = process.communicate(timeout=600)
        print(f"{problem}: {time.monotonic() - began:.0f} s")
        assert process.returncode == 2
        assert problem in err
        assert "Traceback" not in err
