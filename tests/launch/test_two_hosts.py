"""Runs of two hosts: two network namespaces of this machine with a cable (veth) between them. Needs root on Linux."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_two_processes_of_a_run import ENDLESS, RECIPE, find_processes, wait_for_checkpoint

from trl_sft.run_folder import CHECKPOINT

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]
NAMES, CARDS = ("trl-sft-a", "trl-sft-b"), ("va", "vb")
RESUMED = ("run.max_hours=1e-7", "run.allow=[changed_recipe]")  # and stopped after one step


@pytest.fixture(scope="module")
def network():
    """Join two network namespaces: host 0 has the address 10.77.0.1, host 1 10.77.0.2."""
    commands = [f"ip netns add {name}" for name in NAMES]
    commands += [f"ip link add {CARDS[0]} netns {NAMES[0]} type veth peer name {CARDS[1]} netns {NAMES[1]}"]
    for number, (name, card) in enumerate(zip(NAMES, CARDS, strict=True), 1):
        commands += [f"ip -n {name} addr add 10.77.0.{number}/24 dev {card}", f"ip -n {name} link set lo up"]
        commands += [f"ip -n {name} link set {card} up"]
    try:
        started = subprocess.run(commands[0].split(), capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        started = False
    if not started:
        pytest.skip("no network namespaces here: `ip netns add` needs root and iproute2")
    try:
        for command in commands[1:]:
            subprocess.run(command.split(), check=True)
        yield
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, network):
    """Return the folder with the recipe, which both hosts share."""
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


def start_host(folder, number, *words, host="10.77.0.1"):
    command = ["ip", "netns", "exec", NAMES[number], sys.executable, "-m", "trl_sft", "launch", "recipe.yaml"]
    command += ["--processes", "1", "--hosts", "2", "--host-rank", str(number), "--host", host, "--port", "29611"]
    variables = {"GLOO_SOCKET_IFNAME": CARDS[number], "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [*command, *words],
        cwd=folder,
        env=os.environ | variables | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_hosts(folder, *words):
    return [start_host(folder, number, *words) for number in range(2)]


def wait(processes, seconds=600):
    """Return the exit codes and the standard errors of the two commands."""
    errors = [process.communicate(timeout=seconds)[1] for process in processes]
    return [process.returncode for process in processes], errors


def test_two_hosts_that_a_network_joins_train_as_one(folder):
    codes, errors = wait(start_hosts(folder, "train.output_dir=hosts", "evaluate=false", "train.max_steps=4"))
    assert codes == [0, 0], errors
    record = json.loads((folder / "hosts" / "run.json").read_text())
    assert (record["outcome"], record["measured"]["before_training"]["processes"]) == ("done", 2)


@pytest.mark.parametrize("number", [0, 1])
def test_killed_process_of_one_host_ends_both_hosts_within_a_minute_and_the_run_resumes(folder, number):
    output = folder / f"killed-{number}"
    processes = start_hosts(folder, *ENDLESS, f"train.output_dir={output.name}")
    wait_for_checkpoint(processes[0], output, seconds=600)
    child = find_processes(processes[number].pid)[number]
    os.kill(child, signal.SIGKILL)
    began = time.monotonic()
    codes, errors = wait(processes, seconds=120)
    seconds = time.monotonic() - began
    print(f"both hosts ended {seconds:.1f} s after process {number} was killed")
    assert seconds < 60
    assert f"process {number} of 2 was ended by SIGKILL" in errors[number]
    assert "another process of the run is gone" in errors[1 - number]
    assert codes == [2, 2], errors
    assert "Traceback" not in "".join(errors)
    codes, errors = wait(start_hosts(folder, *ENDLESS, f"train.output_dir={output.name}", *RESUMED))
    assert codes == [75, 75], errors


def test_signal_to_the_command_of_one_host_ends_both_with_a_checkpoint(folder):
    processes = start_hosts(folder, *ENDLESS, "train.output_dir=term")
    wait_for_checkpoint(processes[0], folder / "term", seconds=600)
    processes[1].terminate()
    began = time.monotonic()
    codes, errors = wait(processes, seconds=120)
    print(f"both hosts ended {time.monotonic() - began:.1f} s after SIGTERM to host 1")
    assert codes == [143, 143], errors
    assert json.loads((folder / "term" / "run.json").read_text())["outcome"].startswith("stopped by SIGTERM")
    assert any((folder / "term").glob(f"{CHECKPOINT}*"))


def test_host_0_that_nothing_reaches_is_reported_in_time(folder, monkeypatch):
    monkeypatch.setenv("TRL_SFT_MEETING_SECONDS", "6")
    for host, reason in (("10.77.0.1", "refused"), ("10.77.0.9", "o route|timed out"), ("10.99.0.1", "unreachable")):
        began = time.monotonic()
        codes, errors = wait([start_host(folder, 1, "run=null", "evaluate=false", host=host)])
        print(f"{host}: {time.monotonic() - began:.0f} s")
        assert codes == [2]
        assert f"host 0 does not answer at {host}:29611" in errors[0]
        assert any(word in errors[0] for word in reason.split("|"))
