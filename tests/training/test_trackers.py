"""Trackers of `train.report_to` get the values of a run; one that fails does not stop it."""

import json
import sqlite3
import types

import pytest
from conftest import RECIPE
from transformers.integrations import integration_utils

FULL = RECIPE.replace("rows.jsonl}", "rows.jsonl, eval_fraction: 0.2}")
# the eval loss rises and the train loss does not fall
DIVERGING = (
    *("train.learning_rate=0.5", "train.lr_scheduler_type=constant", "train.max_steps=4"),
    *("train.eval_strategy=steps", "train.eval_steps=1"),
)


def read_log(here):
    entries = map(json.loads, (here / "out/log.jsonl").read_text(encoding="utf-8").splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


def read_findings(here):
    return json.loads((here / "out/run.json").read_text(encoding="utf-8"))["findings"]


def test_trackio_and_tensorboard_have_the_logged_losses_and_the_findings(go, here):
    storage = pytest.importorskip("trackio.utils").TRACKIO_DIR  # chosen at the first import in this process
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    words = ("train.report_to=[trackio, tensorboard]", f"train.project={here.name}", "train.run_name=one")
    code, out, err = go(FULL, *words, *DIVERGING)
    assert code == 0, err
    losses = read_log(here)
    folder = next((here / "out").rglob("events.out.tfevents.*")).parent
    accumulator = events.EventAccumulator(str(folder))
    accumulator.Reload()
    assert [event.value for event in accumulator.Scalars("train/loss")] == pytest.approx(losses)
    with sqlite3.connect(storage / f"{here.name}.db") as connection:
        rows = connection.execute("select metrics from metrics").fetchall()
        alerts = connection.execute("select title, text, level from alerts").fetchall()
    stored = [json.loads(row[0]) for row in rows]
    assert [entry["train/loss"] for entry in stored if "train/loss" in entry] == pytest.approx(losses)
    (finding,) = read_findings(here)
    # the first one is said before the trackers begin, and the second one explains it
    titles = ["Finding: unusual rate", "Finding: diverging"]
    assert [(title, level) for title, _, level in alerts] == [(title, "warn") for title in titles]
    assert finding["advice"] in alerts[1][1]
    assert "did not take an alert" not in out
    assert "TRACKIO WARN" not in out  # the screen says it already, without control characters
    (text,) = accumulator.Tensors("findings/diverging/text_summary")
    assert finding["observation"] in text.tensor_proto.string_val[0].decode()
    assert text.step == finding["steps"][-1]


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


class StandInForWandb:
    """The parts of wandb that an alert needs."""

    AlertLevel = types.SimpleNamespace(WARN="WARN", ERROR="ERROR")

    def __init__(self, error=None):
        self.alerts, self.error = [], error
        self.run = self

    def alert(self, **words):
        self.alerts.append(words)
        if self.error:
            raise self.error


@pytest.mark.parametrize("error", [None, ConnectionError("no answer from wandb.example")])
def test_finding_is_an_alert_of_wandb_and_one_that_fails_ends_nothing(error, go, here, monkeypatch):
    wandb, logged = StandInForWandb(error), []

    class Tracker(integration_utils.WandbCallback):
        def __init__(self):
            self._wandb = wandb

        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(state.global_step)

    for event in ("on_train_begin", "on_train_end", "on_save", "on_predict"):
        setattr(Tracker, event, lambda self, *args, **kwargs: None)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Tracker)
    monkeypatch.setattr("trl_sft.model.needed_packages.is_installed", lambda modules: True)
    code, out, err = go(FULL, "train.report_to=[wandb]", *DIVERGING)
    assert code == 0, err
    (finding,) = read_findings(here)
    assert [alert["title"] for alert in wandb.alerts] == ["Finding: unusual rate", "Finding: diverging"]
    assert wandb.alerts[0]["level"] == "WARN"
    assert finding["observation"] in wandb.alerts[1]["text"]
    note = "wandb did not take an alert; the run goes on: no answer from wandb.example."
    assert out.count(note) == (1 if error else 0)
    assert max(logged) == 4  # an alert that fails takes no value away


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
