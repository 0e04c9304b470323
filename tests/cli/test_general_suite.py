"""`evaluate --suite`: the general suite and the losses beside the evaluation of a run."""

import json
import shutil

import pytest
import torch
from conftest import QUESTIONS, jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_sft import cli, run_folder
from trl_sft.evaluation import suite
from trl_sft.recipe import paths

RECIPE = """\
model: {name_or_path: base}
data: {train: rows.jsonl, eval_fraction: 0.2}
lora: {r: 8, target_modules: all-linear}
evaluate: {generation: {max_new_tokens: 4}}
train: {output_dir: run, max_steps: 20, per_device_train_batch_size: 8, learning_rate: 0.02}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder in which a run was trained and evaluated with the suite."""
    folder = tmp_path_factory.mktemp("suite")
    shutil.copytree(paths.EMBEDDED / "tiny", folder / "base")
    jsonl(folder / "rows.jsonl", [row | {"answer": "seven"} for row in QUESTIONS])  # learned in a few steps
    text = RECIPE.replace(" base", f" {folder / 'base'}").replace(" rows", f" {folder / 'rows'}")
    (folder / "recipe.yaml").write_text(text.replace(" run,", f" {folder / 'run'},"), encoding="utf-8")
    assert cli.main([str(folder / "recipe.yaml")]) == 0
    evaluate = ["evaluate", str(folder / "run"), "--suite", "--max-new-tokens", "4", "--few-shot", "0"]
    assert cli.main([*evaluate, "--batch-size", "64"]) == 0
    return folder


def read_result(folder):
    return run_folder.read_json(folder / "run" / run_folder.EVAL)["evaluation"]


def test_suite_stands_beside_the_evaluation_of_the_run(folder):
    result = read_result(folder)
    found = result["suite"]
    assert {task: found[task]["prompts"] for task in ("general", "unsafe", "harmless")} == {
        "general": 40,
        "unsafe": 32,
        "harmless": 32,
    }
    before_after = run_folder.read_json(folder / "run" / run_folder.EVAL)
    assert found["held_out_loss"] == {"base": before_after["before"]["loss"], "tuned": before_after["after"]["loss"]}
    rows = [json.loads(line) for line in (folder / "run" / run_folder.EVALUATION).read_text().splitlines()]
    assert len(rows) == result["rows"] < 40  # the prompts of the suite are no rows of the evaluation
    shown = [json.loads(line) for line in (folder / "run" / run_folder.SUITE).read_text().splitlines()]
    assert len(shown) == 104
    wrong = sum(not row["tuned_right"] for row in shown if row["task"] == "general")
    assert found["general"]["tuned"]["successes"] == wrong
    stored = (folder / "run" / run_folder.ANSWERS).read_text(encoding="utf-8").splitlines()
    assert len(stored) >= 2 * 104


def test_losses_of_the_base_model_are_those_of_transformers(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "base").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    means = []
    for text in suite.read_texts():
        ids = torch.tensor([tokenizer(text)["input_ids"][: model.config.max_position_embeddings]])
        with torch.no_grad():
            means.append(float(model(input_ids=ids, labels=ids).loss))
    found = read_result(folder)["suite"]["text_loss"]
    assert found["paragraphs"] == len(means)
    assert found["base"] == pytest.approx(sum(means) / len(means), rel=1e-4)
    assert found["tuned"] != found["base"]
    assert found["difference"]["low"] <= found["tuned"] - found["base"] <= found["difference"]["high"]


def test_answers_have_a_perplexity_under_the_base_model(folder):
    perplexities = read_result(folder)["suite"]["perplexity_under_base"]
    assert set(perplexities) == {"base", "tuned"}
    assert all(value > 1 for value in perplexities.values())


def test_form_of_the_answers_is_in_the_evaluation(folder):
    found = read_result(folder)["format"]
    assert found["prompts"] == read_result(folder)["rows"]
    assert set(found["shares"]["refusal"]) >= {"base", "tuned", "gained", "lost"}


def test_report_has_a_chapter_on_the_suite(folder):
    text = (folder / "run" / run_folder.REPORT).read_text(encoding="utf-8")
    assert "General suite" in text
    assert "wrong answers to general prompts" in text
    assert "loss of general text" in text


def test_second_evaluation_generates_nothing_and_says_the_same(folder, capsys):
    before = read_result(folder)["suite"]
    words = ["evaluate", str(folder / "run"), "--suite", "--max-new-tokens", "4", "--few-shot", "0"]
    assert cli.main([*words, "--batch-size", "64"]) == 0
    out = capsys.readouterr().out
    assert "suite     tuned: 0 generated, 104 from answers.jsonl" in out
    assert "general   wrong answers to general prompts: " in out
    assert "held-out rows of the run: " in out
    assert read_result(folder)["suite"] == before


def test_people_judge_the_answers_of_the_evaluation_or_those_of_training(folder, tmp_path, capsys):
    assert cli.main(["judge", str(folder / "run"), "-o", str(tmp_path / "a.html")]) == 0
    assert "prompts of evaluation.jsonl" in capsys.readouterr().out
    words = ["judge", str(folder / "run"), "-o", str(tmp_path / "b.html"), "--answers", "samples"]
    assert cli.main(words) == 0
    assert "prompts of samples.jsonl" in capsys.readouterr().out
    names = [
        {item["pair"] for item in json.loads((tmp_path / f"{name}.key.json").read_text())["items"]} for name in "ab"
    ]
    assert names[0] & names[1]  # rows have one name in both


def vote_for_tuned(key, *, scores):
    """Return the file of a rater who prefers the tuned model in each pair."""
    votes = []
    for item in key["items"]:
        choice = "equal" if item["kind"] == "identical" else "left" if item["left"] == "tuned" else "right"
        given = {side: {"helpfulness": scores[item[side]]} for side in ("left", "right")}
        votes.append({"item": item["item"], "choice": choice, "seconds": 1, "harmful": [], "note": "", "scores": given})
    return {"format": 1, "page": key["page"], "rater": "Ana", "votes": votes}


def test_votes_are_part_of_the_verdict_and_the_report_until_the_answers_change(folder, tmp_path, capsys):
    run = shutil.copytree(folder / "run", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    assert cli.main(["judge", str(run), "-o", str(tmp_path / "page.html")]) == 0
    key = json.loads((tmp_path / "page.key.json").read_text(encoding="utf-8"))
    (tmp_path / "ana.json").write_text(json.dumps(vote_for_tuned(key, scores={"base": 2, "tuned": 4})))
    words = ["votes", str(tmp_path / "page.key.json"), str(tmp_path / "ana.json"), "--run", str(run)]
    assert cli.main(words) == 0
    found = run_folder.read_json(run / run_folder.EVAL)["evaluation"]
    assert found["votes"]["result"]["tuned"] == key["pairs"]
    people = {entry["name"]: entry for entry in found["evidence"] if entry["source"] == "people"}
    assert people[""]["value"] == 0.5
    assert (people["helpfulness"]["value"], people["helpfulness"]["unit"]) == (2, "points")
    assert "more_raters" in {given["rule"] for given in found["advice"]}
    text = (run / run_folder.REPORT).read_text(encoding="utf-8")
    assert "People judge" in text
    assert "2.00</td><td>4.00" in text
    evaluate = ["evaluate", str(run), "--suite", "--max-new-tokens", "4", "--few-shot", "0", "--batch-size", "64"]
    assert cli.main(evaluate) == 0  # the same answers
    assert run_folder.read_json(run / run_folder.EVAL)["evaluation"] == found
    records = (run / run_folder.EVALUATION).read_text(encoding="utf-8").splitlines()
    (run / run_folder.EVALUATION).write_text("\n".join(records[1:]) + "\n", encoding="utf-8")
    capsys.readouterr()
    assert cli.main(words) == 2
    assert "the page shows other answers than those that `evaluate` scored" in capsys.readouterr().err
    assert cli.main(evaluate) == 0
    assert "eval.json loses votes: the answers are no longer those that were judged" in capsys.readouterr().out
    assert "votes" not in run_folder.read_json(run / run_folder.EVAL)["evaluation"]


def test_votes_for_a_run_that_is_not_evaluated_say_what_to_do(folder, tmp_path, capsys):
    assert cli.main(["judge", str(folder / "run"), "-o", str(tmp_path / "page.html")]) == 0
    key = json.loads((tmp_path / "page.key.json").read_text(encoding="utf-8"))
    (tmp_path / "ana.json").write_text(json.dumps(vote_for_tuned(key, scores={"base": 1, "tuned": 1})))
    words = ["votes", str(tmp_path / "page.key.json"), str(tmp_path / "ana.json"), "--run", str(tmp_path)]
    assert cli.main(words) == 2
    assert "has no result of `evaluate`" in capsys.readouterr().err
