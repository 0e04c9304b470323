"""`suspects` finds planted rows, accuses nothing on clean rows, continues, and refuses what it cannot rerun."""

import json
import random
import re
import shutil
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from conftest import jsonl

from trl_sft import cli, load_recipe
from trl_sft.recipe import paths

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "json.md"
BLOCK = re.search(r"<!-- schema -->\n```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
SCHEMA = jsonschema.Draft202012Validator(json.loads(BLOCK))
NOUNS = ["cat", "house", "plate", "bear", "road", "cook"]
FORMS = ["The {n}?", "Tell me of the {n}.", "a {n} is", "Say it: {n}", "And the {n}?", "For the {n}:", "{n}, {n}!"]
WRONG = list(range(3, 39, 4))
RECIPE = """\
model: {{name_or_path: trl_sft:tiny}}
data: {{train: rows.jsonl, eval: held_out.jsonl}}
train:
  output_dir: {folder}
  max_steps: 48
  per_device_train_batch_size: 8
  learning_rate: 0.01
  lr_scheduler_type: cosine
  save_strategy: 'no'
evaluate: false
"""


def write_run(folder, *, wrong=(), seed=0, answers=("white",), train=48):
    """Train a run on rows of which some are wrong; return its folder.

    Args:
        folder: of recipe and rows.
        wrong: numbers of the wrong rows.
        seed: of the order of the rows and of training.
        answers: the right answer of each noun, repeated.
        train: how many of the 84 rows are trained; the others are held out.

    """
    rows = [
        {"question": start + form.format(n=noun), "answer": answers[number % len(answers)]}
        for start in ("", "Well, ")
        for form in FORMS
        for number, noun in enumerate(NOUNS)
    ]
    if seed:
        random.Random(seed).shuffle(rows)
    for number in wrong:
        rows[number]["answer"] = "slow"
    folder.mkdir()
    jsonl(folder / "rows.jsonl", rows[:train])
    jsonl(folder / "held_out.jsonl", rows[train:])
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder / "run"), encoding="utf-8")
    assert cli.main([str(folder / "recipe.yaml"), f"train.seed={seed}"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("suspects") / "planted", wrong=WRONG)


@pytest.fixture
def suspects(capsys):
    """Return a function that runs `suspects` under `--json` and returns the object."""

    def call(folder, *words):
        capsys.readouterr()
        code = cli.main(["suspects", str(folder), *words, "--json"])
        content = json.loads(capsys.readouterr().out)
        SCHEMA.validate(content)
        assert content["exit_code"] == code
        return content

    return call


def read_suspects(folder):
    return [json.loads(line) for line in (folder / "suspects.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.long  # nine reruns
def test_planted_rows_are_found_measured_to_hurt_and_left_out(suspects, planted, tmp_path):
    words = ["--by", "all", "--pairs", "3", "-o", str(tmp_path), "--fix", str(tmp_path / "clean.jsonl")]
    content = suspects(planted, *words)
    assert content["ok"], content["faults"]
    result = content["suspects"]
    assert result["signals"]["loss"] >= len(WRONG)
    assert (result["reruns"], result["steps"]) == (9, 48)
    (group,) = result["groups"]
    assert (group["verdict"], group["rows"]) == ("hurts", len(read_suspects(tmp_path))), group
    assert group["against_others"]["high"] < 0
    lines = {entry["line"] - 1 for entry in read_suspects(tmp_path)}
    assert set(WRONG) <= lines
    rejected = [json.loads(line) for line in (tmp_path / "clean.rejected.jsonl").read_text("utf-8").splitlines()]
    assert {entry["line"] - 1 for entry in rejected} == lines
    clean = (tmp_path / "clean.jsonl").read_text(encoding="utf-8")
    assert "slow" not in clean
    assert len(clean.splitlines()) == 48 - len(lines)
    began = (tmp_path / "suspect_reruns.jsonl").read_bytes()
    assert len(began.splitlines()) == 9
    (tmp_path / "suspect_reruns.jsonl").write_bytes(began + b'{"key": "half')
    again = suspects(planted, *words)
    assert again["suspects"]["groups"] == result["groups"]
    assert len((tmp_path / "suspect_reruns.jsonl").read_bytes().splitlines()) == 10


def test_signals_alone_are_suggestions_and_train_nothing(planted, capsys, tmp_path):
    assert cli.main(["suspects", str(planted), "--signals-only", "-o", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"suggested loss, \d+ rows: suggested by signals, not measured", out)
    assert re.search(r"time +about .* for \d+ reruns, measured on a few steps", out)
    assert "no row is ranked" in out
    assert not (tmp_path / "suspect_reruns.jsonl").exists()
    lines = [entry["line"] for entry in read_suspects(tmp_path)]
    assert lines == sorted(lines)
    assert {verdict for entry in read_suspects(tmp_path) for verdict in entry["groups"].values()} == {None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record, _: record["measured"]["before_training"].update(processes=4), "trained by 4 processes"),
        (lambda _, resolved: resolved.replace("eval:", "# eval:"), "it has no held-out rows"),
        (lambda record, _: record["tokens"].update(train="0"), "they are not those of the run any more"),
        (lambda record, _: record.update(outcome="stopped"), "the run is not finished (stopped)"),
        (lambda record, _: record.update(tokens=[]), "its run.json is damaged"),
    ],
)
def test_run_that_cannot_be_rerun_is_refused_by_name(change, message, planted, suspects, tmp_path):
    run = shutil.copytree(planted, tmp_path / "run")
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    resolved = (run / "resolved.yaml").read_text(encoding="utf-8")
    changed = change(record, resolved)
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    (run / "resolved.yaml").write_text(changed if isinstance(changed, str) else resolved, encoding="utf-8")
    content = suspects(run)
    assert content["exit_code"] == 2
    assert message in content["faults"][0]["problem"].replace("its rows are not", "they are not")


def test_folder_that_is_no_run_and_file_that_holds_its_rows_are_refused_by_name(planted, suspects):
    (fault,) = suspects(paths.EMBEDDED / "tiny")["faults"]
    assert fault["problem"] == "the folder is no run: it has no run.json and no resolved.yaml"
    assert fault["fix"].startswith("Name the folder of a finished run")
    (fault,) = suspects(planted / "run.json")["faults"]
    assert (fault["where"]["text"], fault["problem"]) == (str(planted / "run.json"), "this is a file, not a folder")
    rows = planted.parent / "rows.jsonl"
    before = rows.read_bytes()
    (fault,) = suspects(planted, "--fix", str(rows))["faults"]
    assert (fault["where"]["text"], "holds the rows that are read" in fault["problem"]) == ("--fix", True)
    assert rows.read_bytes() == before


def test_rerun_without_planted_rows_has_a_lower_held_out_loss_and_is_the_same_again(planted, tmp_path):
    from trl_sft.suspects import reruns, short_run
    from trl_sft.suspects.plan import Arm

    record = json.loads((planted / "run.json").read_text(encoding="utf-8"))
    short = short_run.prepare(
        load_recipe(planted / "resolved.yaml"), record, folder=planted, temporary=tmp_path / "temporary"
    )
    every = np.arange(48)
    complete, without = (
        reruns.train(short, Arm("", False, 1, places, 40)) for places in (every, np.setdiff1d(every, WRONG))
    )
    assert len(complete) == len(short.judging.rows) == 18
    assert np.mean(without) < 0.7 * np.mean(complete)
    assert reruns.train(short, Arm("", False, 1, every, 40)) == complete


@pytest.mark.long
def test_clean_sets_accuse_no_rows(suspects, capsys, tmp_path):
    accused = []
    for seed in range(1, 11):
        run = write_run(tmp_path / str(seed), seed=seed, answers=("white", "white", "black")[: 1 + 2 * (seed % 2)])
        content = suspects(run, "--by", "all", "--pairs", "3")
        assert content["ok"], content["faults"]
        accused += [group for group in content["suspects"]["groups"] if group["verdict"] == "hurts"]
        with capsys.disabled():
            print(seed, content["suspects"]["signals"], content["suspects"]["groups"])
    assert len(accused) <= 1, accused  # chance alone accuses one in forty
