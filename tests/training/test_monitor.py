"""A run says its findings while it runs, each once, and keeps them in run.json."""

import json
import math

from conftest import RECIPE
from transformers import TrainerState

from trl_sft.training import clock, monitor
from trl_sft.training.diagnosis.findings import RunFacts

FACTS = RunFacts(False, 2e-5, 10**9, "adamw_torch", 100, 0, 1.0, False, {"eval": 10})


def make_monitor(measure=lambda: None, log=()):
    """Return a monitor of a run of 100 steps that has logged `log`, the lines that it shows, and the state."""
    lines = []
    result = monitor.Monitor(lines.append, {"eval": 10}, clock=clock.Clock(), measure_completions=measure)
    result.facts = FACTS
    state = TrainerState(max_steps=100)
    state.log_history = list(log)
    return result, lines, state


def log(result, state, entry):
    """Add an entry to the log, as the Trainer does."""
    state.log_history.append(entry)
    state.global_step = entry["step"]
    result.on_log(None, state, None, logs={key: value for key, value in entry.items() if key != "step"})


def test_finding_is_said_once_at_the_entry_that_shows_it():
    result, lines, state = make_monitor()
    for step in range(1, 30):
        log(result, state, {"step": step, "loss": 1.0 if step < 10 else 0.0})
    assert [line for line in lines if line.startswith("Finding: ")] == [
        "Finding: zero loss. The train loss is exactly 0 at step 10."
    ]
    assert all(len(line) <= 80 for line in lines)
    assert [(finding["code"], finding["steps"][0]) for finding in result.list_findings()] == [("zero_loss", 10)]


def test_finding_that_a_later_one_explains_is_not_kept():
    result, lines, state = make_monitor()
    result.facts = RunFacts(**vars(FACTS) | {"peak_rate": 0.5})
    for step, loss in enumerate([3.0, 9.0, 9.0, 9.0], 1):
        log(result, state, {"step": step, "loss": loss})
    said = [line.split(".")[0] for line in lines if line.startswith("Finding: ")]
    assert said == ["Finding: unusual rate", "Finding: diverging"]
    assert [finding["code"] for finding in result.list_findings()] == ["diverging"]


def test_overfitting_is_tried_for_memorisation_once():
    calls = []

    def measure():
        calls.append(1)
        return monitor.Completions(24, 24, 24, 0)

    result, _, state = make_monitor(measure)
    for step, loss in enumerate([2.0, 1.0, 1.2, 1.4, 1.6]):
        log(result, state, {"step": 20 * step + 1, "loss": 2.0 - 0.4 * step, "epoch": 0.0})
        state.epoch = step
        log(result, state, {"step": 20 * step + 2, "eval_loss": loss})
    assert calls == [1]
    assert [finding["code"] for finding in result.list_findings()] == ["memorisation"]


def test_first_steps_are_described_once_at_the_first_entry_from_step_fifty():
    result, lines, state = make_monitor()
    for step in range(10, 100, 10):
        log(result, state, {"step": step, "loss": 3.0 - step / 50})
    assert [line for line in lines if line.startswith("So far: ")] == [
        "So far: better beyond noise (train loss 2.8 -> 2 in 5 entries, p = 0.0083)"
    ]


def test_long_log_is_read_a_hundred_times_for_each_tenfold(monkeypatch):
    looks = []
    result, _, state = make_monitor()
    monkeypatch.setattr(result, "_find", lambda state: looks.append(1) or [])
    for step in range(1, 2001):
        log(result, state, {"step": step, "loss": 1.0})
    assert 100 <= len(looks) <= 600


def test_loop_that_waits_for_batches_is_said(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    for waiting, expected in ((0.1, []), (3.0, ["Finding: slow input"])):
        result, lines, state = make_monitor()
        for step in range(1, 40):
            now[0] += waiting
            result._clock.end_part(clock.DATA)
            now[0] += 0.5
            result._clock.end_step()
            now[0] += 5.0
            result._clock.end_saving()  # which is no waiting
            log(result, state, {"step": step, "loss": 1.0 / step})
        assert [line.partition(".")[0] for line in lines if line.startswith("Finding")] == expected


def test_phases_of_the_loss_are_said_once_each_while_it_runs():
    result, lines, state = make_monitor()
    state.max_steps = 1000
    for step in range(1, 200):
        log(result, state, {"step": step, "loss": 4 * math.exp(-step / 8) + 1 + 0.01 * math.sin(9 * step)})
    said = [line for line in lines if line.startswith("So far: the train loss")]
    assert [line.partition("(")[0] for line in said] == [
        "So far: the train loss levels off ",
        "So far: the train loss has converged ",
    ]
    assert all(len(line) <= 80 for line in said)
    assert [phase["name"] for phase in result.list_phases(state.log_history)] == [
        "steep fall",
        "levelling off",
        "convergence",
    ]
    even, lines, state = make_monitor()
    for step in range(1, 99):
        log(even, state, {"step": step, "loss": 5 - step / 25})
    assert [line for line in lines if line.startswith("So far: the train loss")] == []


def test_run_says_what_it_finds_and_keeps_it_in_run_json(go, here):
    code, out, err = go(RECIPE, "train.learning_rate=30")
    assert code == 0, err
    lines = out.splitlines()
    said = [
        number for number, line in enumerate(lines) if line.startswith("Finding: unusual rate. train.learning_rate is")
    ]
    assert len(said) == 1
    assert next(number for number, line in enumerate(lines) if line.strip().startswith("1/2 ")) > said[0]
    (finding,) = json.loads((here / "out" / "run.json").read_text())["findings"]
    assert set(finding) == {"code", "steps", "observation", "meaning", "advice", "numbers", "stops"}
    assert (finding["code"], finding["steps"], finding["numbers"]["peak_rate"]) == ("unusual_rate", [0], 30)
