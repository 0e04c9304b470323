"""Runs of two real processes on CPUs: they train as one process does, and end as one process does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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


def wait_for_checkpoint(process, folder):
    until = time.monotonic() + 240
    while time.monotonic() < until and process.poll() is None:
        if any((path / "trl_sft.json").exists() for path in folder.glob(f"{CHECKPOINT}*")):
            return
        time.sleep(0.1)
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
def test_two_hosts_that_a_network_joins_train_as_one(folder):
    """Two network namespaces with a cable (veth) between them stand for two hosts."""
    names, cards = ("trl-sft-a", "trl-sft-b"), ("va", "vb")
    commands = [f"ip netns add {name}" for name in names]
    commands += [f"ip link add va netns {names[0]} type veth peer name vb netns {names[1]}"]
    for number, (name, card) in enumerate(zip(names, cards, strict=True), 1):
        commands += [f"ip -n {name} addr add 10.77.0.{number}/24 dev {card}", f"ip -n {name} link set lo up"]
        commands += [f"ip -n {name} link set {card} up"]
    if subprocess.run(commands[0].split(), capture_output=True, check=False).returncode:
        pytest.skip("no network namespaces here")
    try:
        for command in commands[1:]:
            subprocess.run(command.split(), check=True)
        processes = []
        for number, (name, card) in enumerate(zip(names, cards, strict=True)):
            words = f"launch recipe.yaml --processes 1 --hosts 2 --host-rank {number} --host 10.77.0.1 --port 29611"
            command = ["ip", "netns", "exec", name, sys.executable, "-m", "trl_sft", *words.split()]
            variables = {"GLOO_SOCKET_IFNAME": card, "PYTHONPATH": str(Path(__file__).parents[2])}
            environment = os.environ | variables | {"OMP_NUM_THREADS": "1"}
            command += ["train.output_dir=hosts", "evaluate=false", "train.max_steps=4"]
            processes.append(subprocess.Popen(command, cwd=folder, env=environment))
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)
    record = json.loads((folder / "hosts" / "run.json").read_text())
    assert (record["outcome"], record["measured"]["before_training"]["processes"]) == ("done", 2)


@pytest.mark.long
def test_run_folder_that_only_one_host_has_is_refused_before_the_weights_load(folder):
    """Two folders stand for the disks of two hosts, whose recipe names the same relative path."""
    environment = os.environ | {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577", "PYTHONPATH": str(Path(__file__).parents[2])}
    processes = []
    for number in range(2):
        disk = folder / f"disk-{number}"
        disk.mkdir()
        (disk / "recipe.yaml").write_text((folder / "recipe.yaml").read_text())
        command = [sys.executable, "-m", "trl_sft", "recipe.yaml", "train.output_dir=out", "train.use_cpu=true"]
        rank = environment | {"RANK": str(number)}
        processes.append(subprocess.Popen(command, cwd=disk, env=rank, stderr=subprocess.PIPE, text=True))
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    for error in errors:
        assert f"is {folder / 'disk-0' / 'out'}, and process 1 on" in error
        assert "a disk that all hosts share" in error
        assert "saving" not in error
    assert not (folder / "disk-0" / "out").exists()
