"""Runs of two real processes on CPUs: they train as one process does, and end as one process does."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trl_sft import load_recipe, train
from trl_sft.model import patches
from trl_sft.recipe import paths
from trl_sft.run_folder import CHECKPOINT

# 66 rows to train in steps of 8 and 17 held-out rows: the last batches of both are filled up with repeated rows.
RECIPE = f"""\
model: {{name_or_path: {paths.EMBEDDED / "tiny"}}}
data:
  train:
    - {{path: {paths.EMBEDDED / "phrases" / "train.jsonl"}, task: one, max_rows: 43}}
    - {{path: {paths.EMBEDDED / "phrases" / "test.jsonl"}, task: two, max_rows: 40}}
  eval_fraction: 0.2
train:
  per_device_train_batch_size: 4
  per_device_eval_batch_size: 3
  num_train_epochs: 1
  learning_rate: 1.0e-3
  logging_steps: 1
  save_strategy: "no"
evaluate: {{max_rows: 2, generation: {{max_new_tokens: 4}}}}
run: {{global_batch_size: 8}}
"""
ENDLESS = ("train.num_train_epochs=1000", "train.save_strategy=steps", "train.save_steps=2", "evaluate=false")


def start(folder, *words, processes=2):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "trl_sft", "launch", "recipe.yaml", "--processes", str(processes), *words]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_equal_losses(one, two):
    assert [entry["step"] for entry in one] == [entry["step"] for entry in two]
    names = {name for entry in one for name in entry if "loss" in name or name == "grad_norm"}
    assert {"loss", "eval_loss", "train_loss"} <= names
    if patches.has_fused_head():  # older versions of TRL return no loss of each token
        assert {"eval_loss/one", "loss/two"} <= names
    for first, second in zip(one, two, strict=True):
        wanted = {name: value for name, value in first.items() if name in names}
        assert {name: second[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with the recipe, and the log of one process that accumulates two batches."""
    folder = tmp_path_factory.mktemp("several")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def test_two_processes_train_and_evaluate_as_one_process_that_accumulates_two_batches(folder):
    train(load_recipe(folder / "recipe.yaml", [f"train.output_dir={folder / 'one'}"]))
    out, err = start(folder, "train.output_dir=two", "--json").communicate(timeout=300)
    answer = json.loads(out)
    assert answer["ok"], err
    assert answer["command"] == "launch"
    assert answer["steps"] == 9
    one, two = read_log(folder / "one"), read_log(folder / "two")
    assert_equal_losses(one, two)
    assert err.count("Done: 9 steps") == 1  # one process prints
    record = json.loads((folder / "two" / "run.json").read_text())
    assert record["outcome"] == "done"
    measured = record["measured"]["before_training"]
    assert [measured[name] for name in ("processes", "engine", "parameters_of_a_process")] == [2, "DDP", "all"]
    assert record["measured"]["after_training"]["rows"] == 66  # none twice
    samples = (folder / "two" / "samples.jsonl").read_text().splitlines()
    assert len(samples) == 2
    assert not list(folder.glob("two/.*"))


@pytest.mark.long
@pytest.mark.parametrize("size", [1, 2])
def test_packs_of_two_processes_train_as_those_of_one(folder, size):
    words = ["train.packing=true", "train.max_length=96", f"train.per_device_train_batch_size={size}"]
    words += ["run.global_batch_size=4", "train.num_train_epochs=2"]
    train(load_recipe(folder / "recipe.yaml", [*words, f"train.output_dir={folder / f'pack1-{size}'}"]))
    _, err = (process := start(folder, *words, f"train.output_dir=pack2-{size}")).communicate(timeout=300)
    assert process.returncode == 0, err
    assert_equal_losses(read_log(folder / f"pack1-{size}"), read_log(folder / f"pack2-{size}"))


def wait_for_checkpoint(process, folder, seconds=240):
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        if any((path / "trl_sft.json").exists() for path in folder.glob(f"{CHECKPOINT}*")):
            return
        time.sleep(0.1)
    process.terminate()
    raise AssertionError(process.communicate())


def find_processes(parent):
    """Return the process ids of the two processes of a run, by their number."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            variables = dict(
                word.split("=", 1) for word in (path / "environ").read_text().split("\0") if word.count("=")
            )
            if f"PPid:\t{parent}\n" in (path / "status").read_text() and "RANK" in variables:
                found[int(variables["RANK"])] = int(path.name)
        except (OSError, UnicodeDecodeError):
            continue
    return found


@pytest.mark.long
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_signal_to_the_command_ends_all_processes_with_a_checkpoint(folder, name):
    number = getattr(signal, name)
    process = start(folder, *ENDLESS, f"train.output_dir={name}")
    wait_for_checkpoint(process, folder / name)
    process.send_signal(number)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    print(f"{name} ended two processes after {time.monotonic() - began:.1f} s")
    assert process.returncode == 128 + number
    assert f"stopped by {name} after step" in err
    assert json.loads((folder / name / "run.json").read_text())["outcome"].startswith(f"stopped by {name}")
    steps = [int(path.name.removeprefix(CHECKPOINT)) for path in (folder / name).glob(f"{CHECKPOINT}*")]
    if name == "SIGTERM":
        process = start(
            folder, *ENDLESS, f"train.output_dir={name}", "run.max_hours=0.0001", "run.allow=[changed_recipe]"
        )
        out, err = process.communicate(timeout=300)
        assert process.returncode == 75, err
        assert f"resume    from {folder / name / f'{CHECKPOINT}{max(steps)}'}" in out


@pytest.mark.long
@pytest.mark.parametrize("number", [0, 1])
def test_killed_process_ends_the_others_within_a_minute_and_the_run_resumes(folder, number):
    output = folder / f"killed-{number}"
    process = start(folder, *ENDLESS, f"train.output_dir={output.name}")
    wait_for_checkpoint(process, output)
    os.kill(find_processes(process.pid)[number], signal.SIGKILL)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    print(f"the run ended {time.monotonic() - began:.1f} s after process {number} was killed")
    assert process.returncode == 2
    assert f"process {number} of 2 was ended by SIGKILL" in err
    assert "Traceback" not in err
    process = start(
        folder, *ENDLESS, f"train.output_dir={output.name}", "run.max_hours=0.0001", "run.allow=[changed_recipe]"
    )
    out, err = process.communicate(timeout=300)
    assert process.returncode == 75, err
    assert "resume    from" in out


@pytest.mark.long
def test_run_stopped_within_an_epoch_ends_with_the_losses_and_weights_of_one_that_was_not(folder):
    """66 rows in steps of 8: the last batch of each epoch is filled up with repeated rows, after a resume too."""
    words = ("train.num_train_epochs=2", "train.save_strategy=steps", "train.save_steps=3", "evaluate=false")
    outs = {}
    for name, more in {
        "unstopped": (),
        "stopped": ("run.max_hours=1e-7",),
        "resumed": ("run.allow=[changed_recipe]",),
    }.items():
        output = "unstopped" if name == "unstopped" else "stopped"
        process = start(folder, *words, f"train.output_dir={output}", *more)
        outs[name], err = process.communicate(timeout=300)
        assert process.returncode == (75 if name == "stopped" else 0), err
    assert f"resume    from {folder / 'stopped' / CHECKPOINT}" in outs["resumed"]
    assert_equal_losses(read_log(folder / "unstopped"), read_log(folder / "stopped"))
    whole, resumed = (load_file(folder / name / "model.safetensors") for name in ("unstopped", "stopped"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.long
def test_stopped_run_goes_on_at_another_host_from_its_mirror(folder, tmp_path):
    """One process copies; the command fetches before its processes begin, and all of them resume."""
    mirrored = (*ENDLESS, "train.output_dir=mirrored", f"run.mirror=file://{tmp_path}/far")
    process = start(folder, *mirrored)
    wait_for_checkpoint(process, folder / "mirrored")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    copies = [path.name for path in (tmp_path / "far").glob("checkpoint-*") if (path / "mirror.json").is_file()]
    newest = max(copies, key=lambda name: int(name.partition("-")[2]))
    assert f"{newest} can be fetched from" in out
    shutil.rmtree(folder / "mirrored")
    process = start(folder, *mirrored, "run.max_hours=0.0001", "run.allow=[changed_recipe]")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 75, err
    assert out.count(f"mirror    {newest} was fetched from") == 1
    assert out.index("was fetched from") < out.index("preparing the rows")
    assert f"mirrored/{newest}" in out.partition("resume    from ")[2].partition("\n")[0]


@pytest.mark.long
def test_killed_command_lets_its_processes_save_and_stop(folder):
    process = start(folder, *ENDLESS, "train.output_dir=orphans")
    wait_for_checkpoint(process, folder / "orphans")
    children = find_processes(process.pid)
    assert len(children) == 2
    process.kill()
    process.communicate()
    until = time.monotonic() + 60
    while any(Path(f"/proc/{child}").exists() for child in children.values()) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{child}").exists() for child in children.values())
    assert json.loads((folder / "orphans" / "run.json").read_text())["outcome"].startswith("stopped by SIGTERM")


@pytest.mark.long
def test_host_that_does_not_answer_is_reported_in_time(folder, monkeypatch):
    monkeypatch.setenv("TRL_SFT_MEETING_SECONDS", "5")
    for address, reason in (("127.0.0.1", "refused"), ("no-such-host.invalid", "")):
        began = time.monotonic()
        process = start(folder, "--hosts", "2", "--host-rank", "1", "--host", address, "--port", "29777", "run=null")
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2
        assert f"host 0 does not answer at {address}:29777" in err
        assert reason in err
        print(f"{address}: {time.monotonic() - began:.0f} s")


@pytest.mark.long
def test_faulty_row_is_reported_once_and_before_any_process_starts(folder):
    (folder / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 5, "completion": "b"}\n')
    process = start(folder, "data={train: bad.jsonl}", "train.output_dir=bad")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err.count("problem to fix") == 1


@pytest.mark.long
def test_processes_of_torchrun_alone_say_once_why_they_cannot_train(folder):
    rows = paths.EMBEDDED / "phrases" / "train.jsonl"
    (folder / "streamed.yaml").write_text(
        f"model: {{name_or_path: {paths.EMBEDDED / 'tiny'}}}\ndata: {{train: {{path: {rows}, streaming: true}}}}\n"
        "train: {output_dir: alone, max_steps: 3}\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*command, "-m", "trl_sft", "streamed.yaml"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1  # torchrun's own, whatever ends a process
    assert done.stderr.count("rows are streamed to one process alone, and 2 train") == 1
    assert not (folder / "alone").exists()
