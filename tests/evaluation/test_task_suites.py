"""`evaluate --tasks`: scores are lm-eval's own, what was done is kept, and every number follows from the samples."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import QUESTIONS, jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_sft import cli
from trl_sft.evaluation import task_results, task_suites
from trl_sft.evaluation.task_suites import SideScores
from trl_sft.recipe import paths

lm_eval = pytest.importorskip("lm_eval")

_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: items.jsonl}}
test_split: train
doc_to_text: "{{{{question}}}}"
"""
CHOICE = "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: label\n"
CHOICE += "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
ANSWER = "output_type: generate_until\ndoc_to_target: answer\ngeneration_kwargs: {max_gen_toks: 4, do_sample: false}\n"
ANSWER += "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}, "
ANSWER += "{metric: chrf, aggregation: chrf, higher_is_better: true}]\n"
TEXT = "output_type: loglikelihood_rolling\ndoc_to_target: answer\n"
TEXT += "metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]\n"
ITEMS = [
    {
        "question": f"Name a word with {n} letters.",
        "choices": ["one", "three", f"{n}{n}"],
        "label": n % 3,
        "answer": "a b",
    }
    for n in range(40)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a base model, a tuned model of other weights, rows, and three tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    shutil.copytree(paths.EMBEDDED / "tiny", folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * weight.std() * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder / "tuned")
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / "tuned")
    jsonl(folder / "rows.jsonl", QUESTIONS[:2])
    jsonl(folder / "items.jsonl", ITEMS)
    for name, text in {"choice": CHOICE, "answer": ANSWER, "text": TEXT}.items():
        (folder / f"{name}.yaml").write_text(_TASK.format(name=name) + text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run_tasks(folder):
    """Return a function that runs `evaluate --tasks` and returns the exit code."""

    def call(output, *names, options=()):
        words = ["evaluate", folder / "tuned", "--against", folder / "base", "--data", folder / "rows.jsonl"]
        words += ["--few-shot", 0, "--max-new-tokens", 1, "--tasks", ",".join(str(folder / name) for name in names)]
        return cli.main([*map(str, words), "-o", str(output), *options])

    return call


@pytest.fixture(scope="module")
def output(folder, run_tasks):
    """Return the folder of one evaluation with all tasks."""
    assert run_tasks(folder / "out", "choice.yaml", "answer.yaml", "text.yaml") == 0
    return folder / "out"


def read_result(output):
    return json.loads((output / "eval.json").read_text(encoding="utf-8"))["evaluation"]["lm_eval"]


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_scores_are_those_of_lm_eval_on_the_same_folders(folder, output, monkeypatch):
    monkeypatch.chdir(folder)
    found = read_result(output)["tasks"]
    names = ["choice", "answer", "text"]
    for side in ("base", "tuned"):
        arguments = {"pretrained": str(folder / side), "dtype": "float32"}
        with task_suites.quiet():
            reference = lm_eval.simple_evaluate(
                model="hf",
                model_args=arguments,
                tasks=[f"{name}.yaml" for name in names],
                task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
                batch_size=8,
                device="cpu",
                apply_chat_template=True,
                bootstrap_iters=0,
            )
        for name in names:
            scores = {k: v for k, v in reference["results"][name].items() if "," in k and "_stderr" not in k}
            reported = {key: part["lm_eval"][side] for key, part in found[name]["metrics"].items()}
            assert reported == pytest.approx(scores, rel=1e-9, abs=1e-9)
            samples = {sample["doc_id"]: sample for sample in reference["samples"][name]}
            for record in read_lines(output / "task_samples.jsonl"):
                if record["task"] == name:
                    sample = samples[record["doc_id"]]
                    assert record["prompt"] == sample["arguments"][0][0]
                    assert record[side]["resps"] == json.loads(json.dumps(sample["resps"]))


def test_numbers_of_a_multiple_choice_task_follow_from_its_samples(output):
    task = read_result(output)["tasks"]["choice"]
    records = [record for record in read_lines(output / "task_samples.jsonl") if record["task"] == "choice"]
    pairs = [tuple(int(record[side]["metrics"]["acc"]) for side in ("base", "tuned")) for record in records]
    part = task["metrics"][task["metric"]]
    assert task["metric"] == "acc,none"
    assert part["base"] == pytest.approx(sum(a for a, _ in pairs) / len(pairs), abs=1e-9)
    assert part["tuned"] == pytest.approx(sum(b for _, b in pairs) / len(pairs), abs=1e-9)
    assert part["mcnemar"] == [[pairs.count((a, b)) for b in (1, 0)] for a in (1, 0)]
    better, worse = pairs.count((0, 1)), pairs.count((1, 0))
    tail = sum(math.comb(better + worse, k) for k in range(min(better, worse) + 1)) / 2 ** (better + worse)
    assert part["p"] == pytest.approx(1.0 if better == worse else min(1, 2 * tail), abs=1e-9)
    assert task["sha256"] == task_suites.load_tasks([str(output.parent / "choice.yaml")])[0].sha256
    side = read_result(output)["sides"]["tuned"]
    assert (side["template"], side["thinking"]) == ("chat template of the run", "none")


def test_a_command_that_was_stopped_runs_only_what_is_missing(output, run_tasks, tmp_path, capsys):
    shutil.copytree(output, tmp_path / "again")
    kept = (tmp_path / "again" / "task_answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert [(json.loads(line)["side"], json.loads(line)["task"]) for line in kept] == [
        (side, name) for side in ("tuned", "base") for name in ("choice", "answer", "text")
    ]
    torn = "\n".join(kept[:-1]) + "\n" + kept[-1][:100]  # what a killed process leaves
    (tmp_path / "again" / "task_answers.jsonl").write_text(torn, encoding="utf-8")
    capsys.readouterr()
    assert run_tasks(tmp_path / "again", "choice.yaml", "answer.yaml", "text.yaml", options=["--json"]) == 0
    out, err = capsys.readouterr()
    calls = json.loads(out)["task_calls"]
    missing = [(task, side) for task, sides in calls.items() for side, call in sides.items() if not call["is_cached"]]
    assert missing == [("text", "base")]
    for name in ("eval.json", "task_samples.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (output / name).read_bytes()
    assert len(task_sides_lines(tmp_path / "again")) == 6
    assert "Running" not in err
    assert "loglikelihood" not in out.replace("loglikelihood_rolling", "")


def task_sides_lines(folder):
    """Return the whole lines of task_answers.jsonl."""
    lines = (folder / "task_answers.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.endswith("}")]


def make_side(values, metric="acc", score=0.0):
    samples = [
        {"doc_id": n, "filter": "none", "metrics": [metric], metric: value, "doc_hash": str(n)}
        for n, value in enumerate(values)
    ]
    return SideScores({f"{metric},none": score}, samples)


class PlantedTask:
    """What `task_results` reads of a task of lm-eval."""

    OUTPUT_TYPE = "multiple_choice"

    def __init__(self, metric, aggregate):
        self.metric, self.aggregate = metric, aggregate

    def aggregation(self):
        return {self.metric: self.aggregate}

    def get_config(self, key):
        return None


def mean(values):
    return sum(values) / len(values)


def compute_perplexity(values):
    return math.exp(-sum(a for a, _ in values) / sum(b for _, b in values))


def compute_corpus_score(values):
    return float(len({text for pair in values for text in pair}))


def build(metric, aggregate, base, tuned, *, more_is_better=True):
    task = task_suites.SuiteTask("t", "", PlantedTask(metric, aggregate), list(range(len(base))), 0, "0")
    sides = {"base": make_side(base, metric), "tuned": make_side(tuned, metric)}
    result = task_results.build([task], {"t": sides}, version="", facts={}, metrics={"t": {metric: more_is_better}})
    return result["tasks"]["t"]


@pytest.mark.parametrize(
    ("base", "tuned", "resolution"),
    [
        ([0] * 100, [1] * 20 + [0] * 80, "improved"),
        ([1] * 20 + [0] * 80, [0] * 100, "worse"),
        ([0, 1] * 50, [0, 1] * 50, "no_difference"),
        ([0, 1] * 50, [1, 0] * 50, "not_resolved"),
        ([0] * 20, [1] * 20, "not_resolved"),
    ],
)
def test_planted_results_give_their_resolution(base, tuned, resolution):
    task = build("acc", mean, base, tuned)
    assert task["resolution"] == resolution
    assert task["metrics"]["acc,none"]["test"] == "mcnemar"


def test_a_perplexity_that_falls_is_an_improvement_with_an_interval_below_zero():
    base = [[-20.0 - n % 7, 10] for n in range(60)]
    tuned = [[value + 5 + n % 3, 10] for n, (value, _) in enumerate(base)]
    task = build("word_perplexity", compute_perplexity, base, tuned, more_is_better=False)
    part = task["metrics"]["word_perplexity,none"]
    assert task["resolution"] == "improved"
    expected = compute_perplexity(tuned) - compute_perplexity(base)
    assert part["difference"]["value"] == pytest.approx(expected, abs=1e-9)
    assert part["difference"]["low"] <= expected <= part["difference"]["high"] < 0
    assert (part["better"], part["test"]) == (60, "sign")


def test_a_score_of_all_answers_together_is_never_resolved():
    task = build("chrf", compute_corpus_score, [["a", "b"]] * 60, [["a", "a"]] * 60)
    assert task["resolution"] == "not_resolved"
    assert task["metrics"]["chrf,none"]["difference"]["low"] is None


def test_items_that_are_equal_count_once():
    side = make_side([0] * 40)
    for sample in side.samples:
        sample["doc_hash"] = "the same"
    task = task_suites.SuiteTask("t", "", PlantedTask("acc", mean), None, 0, "0")
    sides = {"base": side, "tuned": make_side([1] * 40)}
    part = task_results._compare_metrics(task, sides["base"], sides["tuned"], metrics={"acc": True})["acc,none"]
    assert (part["observations"], part["resolution"]) == (1, "not_resolved")


@pytest.fixture
def refuse(folder, tmp_path, monkeypatch, capsys):
    """Return a function that runs `evaluate --tasks` in the folder, and returns its only fault."""
    monkeypatch.chdir(folder)

    def call(name):
        words = ["evaluate", "tuned", "--against", "base", "--data", "rows.jsonl", "--few-shot", "0"]
        assert cli.main([*words, "--max-new-tokens", "1", "-o", str(tmp_path), "--tasks", name, "--json"]) == 2
        (fault,) = json.loads(capsys.readouterr().out)["faults"]
        return fault

    return call


@pytest.mark.parametrize(
    ("name", "text", "code"),
    [
        ("missing.yaml", None, "evaluation.bad_task"),
        ("broken.yaml", "task: [", "evaluation.bad_task"),
        ("other.yaml", _TASK.format(name="other").replace("items.jsonl", "none.jsonl"), "evaluation.task_data_missing"),
        ("choice.yaml,copy.yaml", _TASK.format(name="choice") + CHOICE, "evaluation.bad_task"),
        (
            "long.yaml",
            _TASK.format(name="long") + ANSWER.replace("max_gen_toks: 4", "max_gen_toks: 100000"),
            "evaluation.task_failed",
        ),
    ],
)
def test_a_task_that_cannot_be_run_is_one_fault(name, text, code, folder, refuse, matches):
    if text is not None:
        (folder / name.split(",")[-1]).write_text(text, encoding="utf-8")
    fault = refuse(name)
    assert fault["code"] == code
    message = f"{fault['where']['text']}: {fault['problem']}\n{fault['fix']}\n".replace(str(folder), "FOLDER")
    matches(f"task_{name.split('.')[0]}", message)


def test_task_of_the_page_is_loaded_with_its_row(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "task-suites.md").read_text(encoding="utf-8")
    for name, language in (("capitals.yaml", "yaml"), ("capitals.jsonl", "json")):
        block = re.search(rf"```{language}\n(.*?)```", page, re.DOTALL)[1]
        (tmp_path / name).write_text(block, encoding="utf-8")
    (task,) = task_suites.load_tasks([str(tmp_path / "capitals.yaml")])
    assert (task.name, task.items, task_suites.list_metrics(task)) == ("capitals", 1, {"acc": True})


@pytest.mark.long
def test_names_of_lm_eval_are_suggested_and_need_the_hub():
    with pytest.raises(Exception, match="Did you mean gsm8k"):
        task_suites.load_tasks(["gsm8kk"])
    with pytest.raises(Exception, match="cannot be fetched from the hub"):
        task_suites.load_tasks(["gsm8k"])
