"""`train.metric_for_best_model` may be the score of generated answers: it decides, and changes nothing in training."""

import json
from pathlib import Path

import pytest
from conftest import QUESTIONS, RECIPE, jsonl
from resumed_runs import list_differences, read_log, read_run

from trl_sft.evaluation import before_after

FULL = RECIPE.replace("rows.jsonl}", "rows.jsonl, eval_fraction: 0.2}").replace("  save_strategy: 'no'\n", "")
EVALUATED = ("train.max_steps=4", "train.eval_strategy=steps", "train.eval_steps=1", "train.save_steps=1")
BEST = ("train.load_best_model_at_end=true", "train.metric_for_best_model=eval_no_refusal")
SAMPLED = "evaluate.generation={max_new_tokens: 4, do_sample: true}"


def read_scores(folder):
    return [entry["eval_no_refusal"] for entry in read_log(folder) if "eval_no_refusal" in entry]


@pytest.fixture
def answers_by_step(monkeypatch):
    """Let each call that answers the held-out prompts give the next share of answers; the others are empty."""
    shares = iter([0.25, 0.75, 0.5, 0.5, 0.75])  # before training, and after each step; then of the weights of step 2
    real = before_after.ask

    def ask(*words, **keywords):
        answers = real(*words, **keywords)
        right = int(next(shares) * len(answers))
        return [given._replace(text="yes" if index < right else "") for index, given in enumerate(answers)]

    monkeypatch.setattr(before_after, "ask", ask)


def test_step_with_the_best_answers_is_saved_and_every_file_says_so(go, answers_by_step):
    code, out, err = go(FULL, *EVALUATED, *BEST, "evaluate.max_rows=4", "run.early_stopping={patience: 2}")
    assert code == 0, err
    assert read_scores("out") == [0.25, 0.75, 0.5, 0.5, 0.75]
    record = read_run("out")
    assert record["best"] == {"step": 1, "steps": 3, "metric": "eval_no_refusal", "value": 0.75}
    assert record["stopped_early"]["metric"] == "eval_no_refusal"
    costs = record["answer_metric"]
    assert costs.pop("seconds") > 0
    counts = {"prompts": 4, "evaluations": 5, "generated": 16, "reused": 4}
    assert costs == {"metric": "eval_no_refusal", **counts}
    assert "eval_no_refusal decides: 4 prompts are answered at each of 4 evaluations to come, 16 answers" in out
    assert "eval_no_refusal 0.75 of the weights that are saved" in out
    assert "Answers for eval_no_refusal: 16 generated, 4 of the base model used again, in" in out
    assert "eval_no_refusal has not improved for 2 evaluations" in " ".join(out.split())
    # the answers of the last evaluation are those of the saved weights, and are not generated again
    assert [sample["after"] for sample in before_after.read_samples(Path("out/samples.jsonl"))] == ["yes"] * 3 + [""]
    page = Path("out/report.html").read_text(encoding="utf-8")
    assert "Score of the answers" in page


def test_training_is_the_same_bit_by_bit_with_and_without_the_answers(go):
    assert go(FULL, *EVALUATED, BEST[1], SAMPLED)[0] == 0
    assert go(FULL, *EVALUATED, "evaluate=false", "train.output_dir=alone", "train.eval_on_start=true")[0] == 0
    logs = [
        [{name: value for name, value in entry.items() if name != "eval_no_refusal"} for entry in read_log(folder)]
        for folder in ("out", "alone")
    ]
    assert logs[0] == logs[1]
    weights = [Path(folder, "model.safetensors").read_bytes() for folder in ("out", "alone")]
    assert weights[0] == weights[1]


def test_resumed_run_has_the_scores_of_a_run_that_was_never_stopped(go, stop_after):
    assert go(FULL, *EVALUATED, *BEST, SAMPLED, "train.output_dir=whole")[0] == 0
    stop_after(2)
    assert go(FULL, *EVALUATED, *BEST, SAMPLED)[0] == 143
    stop_after(None)
    code, _, err = go(FULL, *EVALUATED, *BEST, SAMPLED)
    assert code == 0, err
    assert list_differences("out", "whole") == []
    assert len(read_scores("out")) == 6
    assert read_run("out")["best"] == read_run("whole")["best"]


def test_one_of_several_evaluation_sets_is_scored_under_its_name(go, here):
    jsonl(here / "first.jsonl", QUESTIONS[:3])
    jsonl(here / "second.jsonl", QUESTIONS[3:8])
    text = RECIPE.replace(
        "train: rows.jsonl", "train: rows.jsonl, drop_leaked: false, eval: [first.jsonl, second.jsonl]"
    )
    words = (*EVALUATED[1:], "train.save_strategy=steps", "train.max_steps=1", "train.load_best_model_at_end=true")
    code, _, err = go(text, *words, "train.metric_for_best_model=second_chrf")
    assert code == 0, err
    logged = [entry for entry in read_log("out") if "eval_second_chrf" in entry]
    assert [entry["step"] for entry in logged] == [0, 1, 1]
    assert all("eval_second_loss" in entry for entry in logged)
    assert read_run("out")["answer_metric"]["prompts"] == 5
    code, _, err = go(text, *words, "train.metric_for_best_model=eval_chrf", "run.overwrite=true")
    assert code == 2
    assert "no evaluation logs eval_chrf: each evaluation set is logged under its own name" in err
    assert "eval_first_loss, eval_second_loss, eval_first_exact" in err


def test_check_of_the_recipe_scores_the_answers_of_its_task(go, here):
    rows = [row | {"task": "low" if number < 20 else "high"} for number, row in enumerate(QUESTIONS)]
    jsonl(here / "rows.jsonl", rows)
    (here / "score.py").write_text("def grade(row):\n    return float(row['task'] == 'low')\n")
    checks = "evaluate.checks=[low=score.py:grade]"
    words = (*EVALUATED[1:], "train.max_steps=1", "train.metric_for_best_model=score.py:grade", "evaluate.max_rows=8")
    code, _, err = go(FULL, *words, checks)
    assert code == 0, err
    assert [entry["eval_score.py:grade"] for entry in read_log("out") if "eval_score.py:grade" in entry] == [1.0, 1.0]
    samples = before_after.read_samples(Path("out/samples.jsonl"))
    low = sum(sample["task"] == "low" for sample in samples)
    assert 0 < low < len(samples)
    assert read_run("out")["answer_metric"]["prompts"] == low


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["train.metric_for_best_model=eval_exat"],
            "Set one of eval_loss, eval_mean_token_accuracy, eval_entropy, eval_exact",
        ),
        (["train.metric_for_best_model=eval_foo_loss"], "no evaluation logs eval_foo_loss"),
        (["train.metric_for_best_model=eval_code"], "no evaluation logs eval_code"),
        (["train.metric_for_best_model=eval_exact", "evaluate=false"], "no evaluation logs eval_exact"),
        (["train.metric_for_best_model=exact", "train.greater_is_better=false"], "a higher eval_exact is better"),
    ],
)
def test_metric_that_cannot_decide_is_refused_before_the_weights_load(words, message, go):
    code, _, err = go(FULL, *EVALUATED, *words, command=["check"])
    assert code == 2
    assert message in err


def test_misspelt_metric_comes_with_the_edit_that_fix_makes(go):
    code, out, _ = go(FULL, "--json", *EVALUATED, "train.metric_for_best_model=exat", command=["check"])
    assert code == 2
    edits = [edit for fault in json.loads(out)["faults"] for edit in fault["edits"]]
    assert edits == [{"action": "set", "key": ["train", "metric_for_best_model"], "value": "eval_exact"}]
