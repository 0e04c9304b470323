"""Trackers of `train.report_to` get the values of a run; one that fails does not stop it."""

import json
import sqlite3

import pytest
from conftest import RECIPE
from transformers.integrations import integration_utils

FULL = RECIPE.replace("rows.jsonl}", "rows.jsonl, eval_fraction: 0.2}")


def read_log(here):
    entries = map(json.loads, (here / "out/log.jsonl").read_text(encoding="utf-8").splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


def test_trackio_and_tensorboard_have_the_logged_losses(go, here):
    storage = pytest.importorskip("trackio.utils").TRACKIO_DIR  # chosen at the first import in this process
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    words = ("train.report_to=[trackio, tensorboard]", f"train.project={here.name}", "train.run_name=one")
    code, _, err = go(FULL, *words)
    assert code == 0, err
    losses = read_log(here)
    folder = next((here / "out").rglob("events.out.tfevents.*")).parent
    accumulator = events.EventAccumulator(str(folder))
    accumulator.Reload()
    assert [event.value for event in accumulator.Scalars("train/loss")] == pytest.approx(losses)
    with sqlite3.connect(storage / f"{here.name}.db") as connection:
        rows = connection.execute("select metrics from metrics").fetchall()
    stored = [json.loads(row[0]) for row in rows]
    assert [entry["train/loss"] for entry in stored if "train/loss" in entry] == pytest.approx(losses)


@pytest.mark.parametrize("event", ["on_train_begin", "on_log", "on_train_end"])
def test_tracker_that_fails_is_named_once_and_the_run_goes_on(event, go, here, monkeypatch):
    calls = []

    class Unreachable(integration_utils.TensorBoardCallback):
        def __init__(self):
            pass

        def on_train_begin(self, *args, **kwargs):
            calls.append("on_train_begin")
            if event == "on_train_begin":
                raise ConnectionError("no answer from tracker.example")

        def on_log(self, *args, **kwargs):
            calls.append("on_log")
            if event == "on_log":
                raise ConnectionError("no answer from tracker.example")

        def on_train_end(self, *args, **kwargs):
            calls.append("on_train_end")
            if event == "on_train_end":
                raise ConnectionError("no answer from tracker.example")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Unreachable)
    monkeypatch.setattr("trl_sft.model.needed_packages.is_installed", lambda modules: True)
    code, out, err = go(FULL, "train.report_to=[tensorboard]")
    assert code == 0, err
    assert (
        out.count("tensorboard failed and gets no more values; the run goes on: no answer from tracker.example.") == 1
    )
    assert calls.count(event) == 1
    assert len(read_log(here)) == 2


def test_run_that_is_refused_reaches_no_tracker(go, here, monkeypatch):
    calls = []

    class Recorder(integration_utils.TensorBoardCallback):
        def __init__(self):
            pass

        def on_train_begin(self, *args, **kwargs):
            calls.append("on_train_begin")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Recorder)
    monkeypatch.setattr("trl_sft.model.needed_packages.is_installed", lambda modules: True)

    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trl_sft.training.record.RunRecord.begin", refuse)
    code, _, _ = go(FULL, "train.report_to=[tensorboard]")
    assert code != 0
    assert calls == []
