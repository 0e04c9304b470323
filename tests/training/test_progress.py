"""The screen of a running run: columns, the time left against a clock, throughput, the live line."""

import json
import re
import sys
import types

import pytest
import torch
from conftest import RECIPE

from trl_sft import console
from trl_sft.training import clock as clock_module
from trl_sft.training import throughput
from trl_sft.training.clock import PARTS, Clock

FULL = RECIPE.replace("rows.jsonl}", "rows.jsonl, eval_fraction: 0.2}")
HEADER = "           step  train loss  eval loss  learning rate  tokens/s     time left"


@pytest.fixture
def clock(monkeypatch):
    """Return a clock and a function that lets time pass."""
    now = [100.0]
    monkeypatch.setattr(clock_module, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    measured = Clock()
    measured.start()

    def wait(seconds):
        now[0] += seconds

    return measured, wait


def test_time_goes_to_the_event_that_ends_it(clock):
    measured, wait = clock
    for seconds, end in [(9, "step"), (1, "step"), (5, "evaluation"), (3, "step"), (2, "saving"), (2, "step")]:
        wait(seconds)
        getattr(measured, f"end_{end}")()
    described = measured.describe()
    assert {name: described[name] for name in described if name.removesuffix("_seconds") not in PARTS} == {
        "training_seconds": 6.0,  # without the first step
        "other_seconds": 0.0,
        "evaluation_seconds": 5.0,
        "saving_seconds": 2.0,
        "seconds_per_step": 2.0,
    }


def test_time_of_steps_is_split_into_its_parts(clock):
    measured, wait = clock
    # of each step: data, two micro-batches with forward and backward, optimizer, log entry
    for data, forward, backward, optimizer, log in [(9, 9, 9, 9, 9), (1, 2, 4, 0.5, 0.25), (3, 2, 4, 0.5, 0.5)]:
        for seconds, part in [
            (data, "data"),
            (forward, "forward"),
            (backward, "backward"),
            (forward, "forward"),
            (backward, "backward"),
        ]:
            wait(seconds)
            measured.end_part(part)
        wait(optimizer)
        measured.end_step()
        wait(log)
        measured.end_part(None)
    wait(5)
    measured.end_evaluation()
    described = measured.describe()
    assert {part: described[f"{part}_seconds"] for part in PARTS} == {
        "data": 4.0,
        "forward": 8.0,
        "backward": 16.0,
        "optimizer": 1.0,
    }
    # the log entry of a step lies in the time of the step that follows, that of the last one in no step
    assert described["training_seconds"] == 29.0 + 9 + 0.25
    assert described["other_seconds"] == pytest.approx(9.25)
    assert described["evaluation_seconds"] == 5.5
    assert measured.describe_parts() == "data 10%, forward 21%, backward 42%, optimizer 3%, other 24%"


def test_parts_on_a_gpu_are_read_from_events_that_are_complete(monkeypatch):
    now, complete = [0.0], [0.0]

    class Event:
        def __init__(self, **_):
            self.at = 0.0

        def record(self):
            self.at = now[0]

        def query(self):
            return self.at <= complete[0]

        def elapsed_time(self, other):
            return 1000 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    parts = clock_module.PartTimes(torch.device("cuda"))
    for seconds, part in [(5, None), (1, "data"), (2, "forward"), (3, "backward"), (4, "optimizer")]:
        now[0] += seconds
        parts.mark(part)
    assert parts.read() == {"data": 0.0, "forward": 0.0, "backward": 0.0, "optimizer": 0.0}  # it still works
    complete[0] = 8.0
    assert parts.read() == {"data": 1.0, "forward": 2.0, "backward": 0.0, "optimizer": 0.0}
    complete[0] = 15.0
    assert parts.read() == {"data": 1.0, "forward": 2.0, "backward": 3.0, "optimizer": 4.0}


def test_parts_on_other_devices_are_the_wait_for_batches_alone():
    assert clock_module.PartTimes(torch.device("mps")).read() == {"data": 0.0}


def test_time_left_counts_steps_and_evaluations_with_its_interval(clock):
    measured, wait = clock
    for seconds in (9, 1, 3, 1, 3):
        wait(seconds)
        measured.end_step()
    seconds, margin = measured.estimate_left(100, evaluations=3)
    assert seconds == 200  # no evaluation was measured yet
    # standard deviation sqrt(4/3); of a hundred steps and of the mean of four
    assert margin == pytest.approx(1.96 * (4 / 3) ** 0.5 * (100 + 100**2 / 4) ** 0.5)
    wait(10)
    measured.end_evaluation()
    assert measured.estimate_left(100, evaluations=3)[0] == 230


def test_time_left_is_unknown_before_two_timed_steps(clock):
    measured, wait = clock
    wait(1)
    measured.end_step()
    measured.end_step()
    assert measured.estimate_left(10, evaluations=0) is None


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (7.5, "7.5"),
        (950, "950"),
        (999.4, "999"),
        (999.6, "1k"),
        (12_345, "12.3k"),
        (1e6, "1M"),
        (2.5e15, "2.5e+03T"),
    ],
)
def test_count_has_three_digits_and_a_unit(number, text):
    assert console.format_count(number) == text


def test_peak_of_a_device_is_found_by_its_name_and_absent_where_it_is_not_known(monkeypatch):
    assert throughput.find_peak_flops(torch.device("cpu")) is None
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA L40S": 362e12, "Another card": None}
    for name, flops in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert throughput.find_peak_flops(torch.device("cuda")) == flops


def test_screen_has_columns_below_80_characters_and_run_json_the_throughput(go, here):
    words = ("train.max_steps=8", "train.logging_steps=2", "train.eval_strategy=steps", "train.eval_steps=4")
    code, out, err = go(FULL, *words)
    assert code == 0, err
    lines = out[out.index(HEADER) :].splitlines()
    rows = [line for line in lines if re.match(r" +\d/8 ", line)]
    assert [row.split()[0] for row in rows] == ["0/8", "2/8", "4/8", "4/8", "6/8", "8/8", "8/8"]
    assert all(len(row) <= 80 for row in rows)
    column = HEADER.index("eval loss")
    evaluations = [row for row in rows if row[column : column + 9].strip()]
    assert len(evaluations) == 3
    assert re.search(r"^about .* left \(give or take .*\), not counting evaluation and saving$", out, re.MULTILINE)
    assert re.search(r"^Time: the steps took .* \(estimated after step 3: .*\), evaluation .*", out, re.MULTILINE)
    measured = json.loads((here / "out/run.json").read_text())["throughput"]
    assert {"training_seconds", "evaluation_seconds", "seconds_per_step", "tokens_per_second", "padding"} <= set(
        measured
    )
    parts = [measured[f"{part}_seconds"] for part in (*PARTS, "other")]
    assert min(parts[1:3]) > 0  # forward and backward
    assert sum(parts) == pytest.approx(measured["training_seconds"], abs=0.01)
    assert 0 <= measured["padding"] < 1
    assert measured["peak_memory_bytes"] > 50 * 2**20


def test_verbose_shows_every_logged_value(go, here, capsys):
    from trl_sft import cli

    (here / "recipe.yaml").write_text(FULL)
    assert cli.main(["recipe.yaml", "-v"]) == 0
    out = capsys.readouterr().out
    assert "grad_norm" in out
    assert re.search(r"^Time of the steps: data \d+%, forward \d+%, backward \d+%, optimizer \d+%", out, re.MULTILINE)
    assert all(len(line) <= 80 for line in out.splitlines() if line.startswith("    ") and "grad_norm" in line)


def test_live_line_of_a_notebook_is_one_output_that_is_replaced(monkeypatch, capsys):
    shown = []
    handle = types.SimpleNamespace(update=lambda data, raw: shown.append(data["text/plain"]))
    display = types.SimpleNamespace(display=lambda data, raw, display_id: handle)
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    line = console.start_live_line(total=10, initial=0)
    line.update(3, "train loss 1\x1b[31m")
    line.show_above("a row")
    line.close()
    assert shown == ["step 3/10  train loss 1\\x1b[31m"]
    assert capsys.readouterr().out == "a row\n"


def test_price_of_an_hour_shows_the_time_as_money(go):
    code, out, err = go(FULL, "train.max_steps=5", "run.price_per_hour=3600")
    assert code == 0, err
    left, money = re.search(r"^about (\S+) s, (\S+) at 3600 an hour, left", out, re.MULTILINE).groups()
    assert float(money) == pytest.approx(float(left), abs=0.06)  # one a second
    code, _, err = go(FULL, "run.price_per_hour=0")
    assert code == 2
    assert "price_per_hour" in err
