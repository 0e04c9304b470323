"""`fix`: makes the edits that faults carry, checks again, and lists what is left."""

import json

import pytest
from conftest import RECIPE, jsonl

from trl_sft import cli, load_recipe

FAULTY = """\
# my recipe
base_model: trl_sft:tiny   # small
data:
  train: rows.jsonl
  format: question_answer
train:
  lr: "2e-5"    # usual
  epochs: 2
  packing: yes
  r: 8
"""
FIXED = """\
# my recipe
data:
  train: {path: rows.jsonl, format: question_answer}
train:
  learning_rate: 2e-5    # usual
  num_train_epochs: 2
  packing: true
model:
  name_or_path: trl_sft:tiny   # small
lora:
  r: 8
"""


@pytest.fixture
def recipe(here):
    jsonl("rows.jsonl", [{"question": f"q{n}", "answer": f"a{n}"} for n in range(4)])
    (here / "recipe.yaml").write_text(FAULTY)
    return here / "recipe.yaml"


def test_corrected_recipe_stands_beside_the_recipe_and_passes_the_check(recipe, capsys):
    assert cli.main(["fix", "recipe.yaml", "--fast"]) == 0
    output = capsys.readouterr().out
    assert recipe.read_text() == FAULTY
    assert recipe.with_name("recipe.fixed.yaml").read_text() == FIXED
    assert '-  lr: "2e-5"    # usual\n' in output
    assert "+  learning_rate: 2e-5    # usual\n" in output
    assert "--- recipe.yaml\n+++ recipe.fixed.yaml\n" in output
    run = load_recipe("recipe.fixed.yaml")
    assert (run.train["learning_rate"], run.lora["r"], run.train["num_train_epochs"]) == (2e-5, 8, 2)


def test_check_of_tokenizer_and_rows_follows_unless_fast(recipe, capsys):
    assert cli.main(["fix", "recipe.yaml", "-o", "b.yaml", "data.max_untrained=0"]) == 0
    assert "Tokenizer and rows were checked too." in capsys.readouterr().out
    jsonl("rows.jsonl", [{"question": "q", "answer": ""}])
    assert cli.main(["fix", "b.yaml"]) == 2
    captured = capsys.readouterr()
    assert "No change of the recipe is certain, so nothing was written." in captured.out
    assert "rows.jsonl row 1" in captured.err
    assert not recipe.with_name("b.fixed.yaml").exists()


def test_recipe_without_faults_is_left_alone(recipe, capsys):
    recipe.write_text(RECIPE)
    assert cli.main(["fix", "recipe.yaml", "--fast"]) == 0
    assert "No problems found in recipe.yaml." in capsys.readouterr().out
    assert not recipe.with_name("recipe.fixed.yaml").exists()


def test_what_somebody_has_to_decide_is_left_and_named_in_the_lines_of_the_new_file(recipe, capsys):
    recipe.write_text(FAULTY + "  bogus: 1\n  num_train_epochs: 3\n  max_steps: 5\n")
    assert cli.main(["fix", "recipe.yaml", "--fast"]) == 2
    err = capsys.readouterr().err
    assert "recipe.fixed.yaml:8 train.bogus" in err
    assert "Remove one of the two: the recipe sets `train.num_train_epochs` too." in err
    assert "bogus: 1" in recipe.with_name("recipe.fixed.yaml").read_text()


def test_nothing_is_overwritten_unless_asked(recipe, capsys):
    recipe.with_name("recipe.fixed.yaml").write_text("mine")
    assert cli.main(["fix", "recipe.yaml", "--fast"]) == 2
    assert cli.main(["fix", "recipe.yaml", "--fast", "-o", "rows.jsonl"]) == 2
    assert recipe.with_name("recipe.fixed.yaml").read_text() == "mine"
    recipe.with_name("sub").mkdir()
    assert cli.main(["fix", "recipe.yaml", "--fast", "-o", "sub/b.yaml"]) == 2
    assert "relative to its folder" in capsys.readouterr().err
    assert cli.main(["fix", "recipe.yaml", "--fast", "--write"]) == 0
    assert recipe.read_text() == FIXED


def test_values_of_the_command_line_are_checked_and_not_written(recipe, capsys):
    assert cli.main(["fix", "recipe.yaml", "--fast", "train.max_step=3"]) == 2
    assert "(train.max_step=3)" in capsys.readouterr().err
    assert "max_step" not in recipe.with_name("recipe.fixed.yaml").read_text()


def test_answer_as_json_has_edits_diff_and_what_is_left(recipe, capsys):
    recipe.write_text(FAULTY + "  bogus: 1\n")
    assert cli.main(["fix", "recipe.yaml", "--fast", "--json"]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert answer["output"] == "recipe.fixed.yaml"
    assert {"action": "rename", "key": ["train", "lr"], "new": ["train", "learning_rate"]} in answer["edits"]
    assert [fault["where"]["key"] for fault in answer["faults"]] == [["train", "bogus"]]
    assert "+  learning_rate: 2e-5    # usual" in answer["diff"]


def test_file_that_is_no_yaml_is_refused(recipe, capsys):
    recipe.write_text("model: {\n")
    assert cli.main(["fix", "recipe.yaml"]) == 2
    assert "not valid YAML" in capsys.readouterr().err
    assert cli.main(["fix", "gone.yaml"]) == 2
