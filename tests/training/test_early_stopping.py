"""`run.early_stopping` stops where transformers' own callback does, saves the best step, and says so everywhere."""

import json
from pathlib import Path

import pytest
from conftest import RECIPE
from resumed_runs import killed_after_the_last_step, list_differences, read_run
from transformers import EarlyStoppingCallback
from trl import SFTTrainer

from trl_sft.recipe import build
from trl_sft.training import stages

FULL = RECIPE.replace("rows.jsonl}", "rows.jsonl, eval_fraction: 0.2}").replace("  save_strategy: 'no'\n", "")
# a learning rate at which the eval loss rises soon
RISING = ("train.max_steps=20", "train.learning_rate=0.5", "train.lr_scheduler_type=constant")
EVERY_STEP = "train.eval_steps=1"


def train_plainly(here, *, patience, threshold):
    """Train the same with SFTTrainer and transformers' callback; return its state."""
    run = build.load_run("recipe.yaml", [*RISING, EVERY_STEP, "run.early_stopping=true", "train.output_dir=plain"])
    inputs = stages.prepare(run)
    trainer = stages.build_trainer(run, inputs)
    assert type(trainer) is SFTTrainer
    trainer.add_callback(EarlyStoppingCallback(patience, threshold))
    trainer.train()
    return trainer.state


@pytest.mark.parametrize(("patience", "threshold"), [(2, 0.0), (3, 0.5)])
def test_run_stops_at_the_step_of_transformers_own_callback_with_the_same_best(patience, threshold, go, here):
    rule = f"run.early_stopping={{patience: {patience}, threshold: {threshold}}}"
    code, out, err = go(FULL, *RISING, EVERY_STEP, rule)
    assert code == 0, err
    plain = train_plainly(here, patience=patience, threshold=threshold)
    assert plain.global_step < 20
    record = read_run("out")
    stop = record["stopped_early"]
    assert (stop["step"], stop["best_step"]) == (plain.global_step, plain.best_global_step)
    assert stop["best_value"] == plain.best_metric
    assert stop | {"planned_steps": 20, "evaluations": patience, "threshold": threshold, "metric": "eval_loss"} == stop
    assert record["best"] == {
        "step": plain.best_global_step,
        "steps": plain.global_step,
        "metric": "eval_loss",
        "value": plain.best_metric,
    }
    assert record["outcome"] == "done"
    more = f" by more than {threshold:g}" if threshold else ""
    reason = f"the eval loss has not improved{more} for {patience} evaluations"
    assert f"Early stopping: the run ends at step {plain.global_step} of 20: {reason}." in " ".join(out.split())
    best = f"The best was {plain.best_metric:.4g} at step {plain.best_global_step}, whose weights are saved."
    line = f"Stopped early at step {plain.global_step} of 20: {reason}. {best}"
    assert line in out
    assert line in Path("out/README.md").read_text()
    assert "Stopped early" in Path("out/report.html").read_text(encoding="utf-8")


def test_early_stopping_sets_all_keys_that_it_needs_and_resolved_recipe_repeats_them(go, here):
    code, out, err = go(FULL, *RISING, "run.early_stopping=true", command=["check"])
    assert code == 0, err
    assert "eval_steps: 0.05" in out
    code, out, _ = go(None, *RISING, "run.early_stopping=true", command=["explain"])
    assert code == 0
    for line in (
        '* eval_strategy: "steps"',
        "* eval_steps: 0.05",
        "* save_steps: 0.05",
        "* load_best_model_at_end: true",
        '* metric_for_best_model: "eval_loss"',
        "* greater_is_better: false",
        "* save_total_limit: 2",
    ):
        assert next(shown for shown in out.splitlines() if shown.startswith(line)).partition("# trl_sft: run.early")[2]
    code, out, err = go(None, *RISING, "run.early_stopping=true")
    assert code == 0, err
    assert read_run("out")["stopped_early"]["evaluations"] == 3
    assert "early stop" in out
    assert "after 3 evaluations without an improvement, one every step" in out
    resolved = Path("out/resolved.yaml").read_text()
    assert "early_stopping: true" in resolved
    (here / "again.yaml").write_text(resolved)
    run = build.load_run("again.yaml")
    assert run.implied == {}
    assert (run.train["eval_steps"], run.train["save_total_limit"]) == (0.05, 2)


def test_run_that_does_not_stop_early_says_nothing_of_it(go, here):
    code, out, err = go(FULL, "train.max_steps=3", EVERY_STEP, "run.early_stopping={patience: 5}")
    assert code == 0, err
    assert "Stopped early" not in out
    assert "Early stopping" not in out
    assert "stopped_early" not in read_run("out")
    assert [path.name for path in here.glob("out/checkpoint-*")]


def test_resumed_run_keeps_the_count_of_evaluations(go, stop_after, here):
    words = (*RISING, EVERY_STEP, "run.early_stopping={patience: 3}")
    assert go(FULL, *words, "train.output_dir=whole")[0] == 0
    stop = read_run("whole")["stopped_early"]
    stop_after(stop["step"] - 1)  # two evaluations without an improvement
    assert go(FULL, *words)[0] == 143
    stop_after(None)
    code, out, err = go(FULL, *words)
    assert code == 0, err
    assert f"Stopped early at step {stop['step']} of 20" in out
    assert read_run("out")["stopped_early"] == stop
    assert list_differences("out", "whole") == []


def test_run_killed_after_it_stopped_early_trains_no_further_step(go, here, monkeypatch):
    words = (*RISING, EVERY_STEP, "run.early_stopping={patience: 2}")
    assert go(FULL, *words, "train.output_dir=whole")[0] == 0

    with killed_after_the_last_step(monkeypatch):
        assert go(FULL, *words)[0] != 0
    code, out, err = go(FULL, *words)
    assert code == 0, err
    assert "Early stopping: the run ends" not in out
    records = [read_run(folder) for folder in ("out", "whole")]
    assert records[0]["stopped_early"] == records[1]["stopped_early"]
    assert [[finding["code"] for finding in record["findings"]] for record in records] == [["diverging"]] * 2
    assert records[0]["throughput"]["evaluation_seconds"] < 60
    assert list_differences("out", "whole") == []
    # a finished run is not trained on
    code, _, err = go(FULL, *words)
    assert code == 2
    assert "holds a finished run" in err


def test_of_several_evaluation_sets_the_one_that_is_named_decides(go, here):
    text = FULL.replace("eval_fraction: 0.2", "eval: [first.jsonl, second.jsonl]")
    for name in ("first", "second"):
        (here / f"{name}.jsonl").write_text(json.dumps({"question": f"Who is {name}?", "answer": name}) + "\n")
    words = (*RISING, EVERY_STEP, "run.early_stopping={patience: 1}")
    code, _, err = go(text, *words)
    assert code == 2
    assert "Set one of eval_first_loss, eval_second_loss, " in " ".join(err.split())
    code, out, err = go(text, *words, "train.metric_for_best_model=eval_second_loss")
    assert code == 0, err
    assert read_run("out")["stopped_early"]["metric"] == "eval_second_loss"
    assert "eval_second_loss has not improved for 1 evaluation." in " ".join(out.split())
    assert "early stopping is disabled" not in err
