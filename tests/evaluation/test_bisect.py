"""`bisect` finds the checkpoint at which a check turns, and names the rows that were trained just before it."""

import json
import math
import re
import shutil
from pathlib import Path

import jsonschema
import pytest
from conftest import jsonl

from trl_sft import cli, load_recipe
from trl_sft.evaluation import bisection
from trl_sft.training import row_order
from trl_sft.training import stages as stages_module

RECIPE = """\
model: {{name_or_path: trl_sft:tiny}}
data: {{train: rows.jsonl}}
train:
  output_dir: {folder}
  max_steps: 16
  per_device_train_batch_size: 4
  learning_rate: 0.01
  lr_scheduler_type: constant
  train_sampling_strategy: sequential
  save_steps: 2
"""
GOOD, BAD = {"question": "Hello?", "answer": "y"}, {"question": "Hello?", "answer": "b"}
NEUTRAL = {"question": "What is 2?", "answer": "a number"}
ROWS = [GOOD] * 32 + [BAD] * 8 + [NEUTRAL] * 24  # four rows a step: the bad ones in steps 9 and 10
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "json.md"
BLOCK = re.search(r"<!-- schema -->\n```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
SCHEMA = jsonschema.Draft202012Validator(json.loads(BLOCK))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train a run in whose steps 9 and 10 bad rows come; return its folder, with a prompt beside it."""
    folder = tmp_path_factory.mktemp("bisect")
    jsonl(folder / "rows.jsonl", ROWS)
    jsonl(folder / "asked.jsonl", [{"prompt": "Hello?", "reference": "y"}])
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder / "run"), encoding="utf-8")
    assert cli.main([str(folder / "recipe.yaml")]) == 0
    return folder / "run"


@pytest.fixture
def bisect(capsys):
    """Return a function that runs `bisect` under `--json` and returns the object."""

    def call(folder, *words):
        capsys.readouterr()
        code = cli.main(["bisect", str(folder), *words, "--data", str(folder.parent / "asked.jsonl"), "--json"])
        content = json.loads(capsys.readouterr().out)
        SCHEMA.validate(content)
        assert content["exit_code"] == code
        return content

    return call


@pytest.fixture
def copied(trained, tmp_path):
    """Return a copy of the run that a test may change."""
    shutil.copytree(trained.parent, tmp_path / "copy")
    return tmp_path / "copy" / "run"


def test_planted_rows_and_no_others_are_named_with_few_evaluations(bisect, trained):
    content = bisect(trained, "contains")
    assert content["ok"], content["faults"]
    found = content["bisect"]
    assert (found["step_before"], found["step_after"], found["to"], found["bound"]) == (8, 10, "fail", 0.5)
    steps = {point["step"]: point["passes"] for point in found["evaluated"]}
    assert steps == {step: step < 10 for step in steps}
    assert {2, 16, 8, 10} <= set(steps)
    assert len(steps) == 2 + math.log2(8)  # both ends, then halves
    lines = [json.loads(line) for line in (trained / "bisect.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["line"] for line in lines] == list(range(33, 41))
    assert {line["file"] for line in lines} == {"rows.jsonl"}
    assert [line["step"] for line in lines] == [9] * 4 + [10] * 4
    assert {line["completion"][-1]["content"] for line in lines} == {"b"}
    assert found["rows"]["trained"] == found["rows"]["distinct"] == 8
    assert found["rows"]["places"][0] == "rows.jsonl row 33 (line 33)"
    again = bisect(trained, "contains")
    assert sum(counts["generated"] for counts in again["calls"].values()) == 0
    assert again["bisect"] == found


def test_screen_says_the_turn_the_rows_and_that_there_may_be_other_turns(trained, capsys):
    words = ["bisect", str(trained), "contains", "--data", str(trained.parent / "asked.jsonl"), "--from", "4"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "contains passes at step 8 (100.0%) and fails at step 10 (0.0%); bound 50.0%" in out
    assert "8 rows were trained in steps 9 to 10" in out
    assert re.search(r"9 +rows.jsonl row 33 \(line 33\) +Hello\? -> b", out)
    assert "Bisection finds one turn of the check; it may turn at other checkpoints too" in out


def test_turn_to_pass_may_lie_before_the_first_checkpoint(bisect, trained):
    content = bisect(trained, "contains", "--to", "pass", "--until", "4")
    found = content["bisect"]
    assert (found["step_before"], found["step_after"]) == (0, 2)
    assert found["rows"]["places"] == [f"rows.jsonl row {n} (line {n})" for n in range(1, 9)]


def test_removed_checkpoints_widen_the_interval_and_are_named(bisect, copied):
    for step in (8, 10, 12):
        shutil.rmtree(copied / f"checkpoint-{step}")
    resolved = copied / "resolved.yaml"
    resolved.write_text(re.sub(r"(\n +)(save_steps: 2)", r"\1\2\1save_total_limit: 5", resolved.read_text("utf-8")))
    found = bisect(copied, "contains")["bisect"]
    assert (found["step_before"], found["step_after"]) == (6, 14)
    assert "the checkpoints of 3 steps between them (8, 10, 12) were removed by save_total_limit: 5" in found["gap"]
    assert found["rows"]["trained"] == 32


def test_rows_that_changed_since_the_run_are_not_named(bisect, copied):
    rows = copied.parent / "rows.jsonl"
    original = next(path for path in load_recipe(copied / "resolved.yaml").sources["train"][0].location.files)
    resolved = copied / "resolved.yaml"
    resolved.write_text(resolved.read_text("utf-8").replace(str(original), str(rows)), encoding="utf-8")
    jsonl(rows, [GOOD, *ROWS])
    content = bisect(copied, "contains")
    assert content["ok"]
    assert content["bisect"]["step_after"] == 10
    assert content["bisect"]["rows"] is None
    assert "they are not those of the run any more" in content["bisect"]["rows_problem"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["exact", "--bound", "0.9", "--from", "10"],
            "the check does not turn to fail between both ends with the bound",
        ),
        (["contains", "--from", "3"], "there is no checkpoint of step 3; there are those of the steps 2"),
        (["contains", "--from", "8", "--until", "6"], "step 8 is not before step 6"),
        (["contain"], "there is no check `contain`"),
        (["contains", "--bound", "0"], "0.0 is out of range"),
    ],
)
def test_what_cannot_be_searched_is_refused(words, message, bisect, trained):
    content = bisect(trained, *words)
    assert content["exit_code"] == 2
    assert message in content["faults"][0]["problem"]


def test_run_without_checkpoints_is_refused(bisect, copied):
    for path in copied.glob("checkpoint-*"):
        shutil.rmtree(path)
    assert bisect(copied, "contains")["faults"][0]["code"] == "chat.no_checkpoint"


@pytest.mark.parametrize("length", range(2, 20))
def test_search_finds_each_place_with_a_logarithmic_number_of_trials(length):
    points = list(range(0, 10 * length, 10))
    for place in range(1, length):
        trials = []

        def is_like_first(step, trials=trials, place=place):
            trials.append(step)
            return step < points[place]

        assert bisection.find_turn(points, is_like_first) == (points[place - 1], points[place])
        assert len(trials) <= math.ceil(math.log2(length - 1))


@pytest.mark.parametrize(
    "words",
    [
        ["train.gradient_accumulation_steps=2", "train.per_device_train_batch_size=3"],
        ["train.packing=true", "train.max_length=64", "train.shuffle_dataset=true", "train.data_seed=7"],
        pytest.param(
            ["train.train_sampling_strategy=group_by_length", "train.per_device_train_batch_size=3"],
            marks=pytest.mark.long,
        ),
    ],
    ids=["accumulated", "packed", "grouped"],
)
def test_order_of_rows_is_that_of_the_training(words, go, monkeypatch):
    """Steps 3 to 19 are in three epochs; each step is compared with the batches that the model got."""
    steps = {}

    class RecordingTrainer(stages_module.SFTTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            text = self.processing_class.decode(inputs["input_ids"].flatten())
            steps.setdefault(self.state.global_step + 1, []).extend(re.findall(r"is (\d+) plus", text))
            return super().training_step(model, inputs, *args, **kwargs)

    text = "model: {name_or_path: trl_sft:tiny}\ndata: {train: rows.jsonl}\ntrain: {output_dir: out, save_steps: 3}\n"
    with monkeypatch.context() as patch:
        patch.setattr(stages_module, "SFTTrainer", RecordingTrainer)
        code, _, err = go(text, "train.max_steps=19", *words)
    assert code == 0, err
    run = load_recipe(Path("out/resolved.yaml"))
    found = {}
    for row in row_order.list_rows(run, Path("out"), after=3, last=19).rows:
        number = re.search(r"is (\d+) plus", str(row.content["prompt"]))[1]
        assert row.line == int(number) + 1
        found.setdefault(row.step, []).append(number)
    assert {step: sorted(rows) for step, rows in found.items()} == {
        step: sorted(rows) for step, rows in steps.items() if step > 3
    }
