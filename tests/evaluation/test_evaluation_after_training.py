"""`evaluate.checks`: the comparison of the command `evaluate` runs after training, and is checked before it."""

import json
import shutil
import signal

import pytest
from conftest import QUESTIONS, jsonl

from trl_sft import cli, console, errors, load_recipe
from trl_sft.cli.evaluate import after_training, evaluation
from trl_sft.recipe import paths

RECIPE = """\
model: {{name_or_path: base}}
data: {{train: rows.jsonl, eval_fraction: 0.2}}
evaluate: {{checks: {checks}, generation: {{max_new_tokens: 3}}}}
train: {{output_dir: run, max_steps: 1, per_device_train_batch_size: 4}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return the current folder, with a base model and rows of two tasks."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(paths.EMBEDDED / "tiny", "base")
    jsonl("rows.jsonl", [row | {"task": "low" if n % 2 else "high"} for n, row in enumerate(QUESTIONS)])
    (tmp_path / "own.py").write_text("def ends(row):\n    return row['answer'].endswith(row['reference'])\n")
    return tmp_path


def write_recipe(folder, checks):
    (folder / "recipe.yaml").write_text(RECIPE.format(checks=checks), encoding="utf-8")
    return str(folder / "recipe.yaml")


def run_json(capsys, *words):
    capsys.readouterr()
    cli.main([*words, "--json"])
    return json.loads(capsys.readouterr().out)


def test_evaluation_after_training_is_that_of_the_command_and_repeats_without_a_word_on_checks(folder, capsys):
    recipe = write_recipe(folder, '[numeric, "high=own.py:ends", exact]')
    content = run_json(capsys, recipe)
    assert content["ok"], content["faults"]
    assert content["steps"] == 1
    checks = {"low": ["numeric", "exact"], "high": ["own.py:ends"]}
    records = [json.loads(line) for line in (folder / "run" / "evaluation.jsonl").read_text().splitlines()]
    assert all(list(record["scores"]["tuned"]) == checks[record["task"]] for record in records)
    assert content["evaluation"] == json.loads((folder / "run" / "eval.json").read_text())["evaluation"]
    assert "Base against tuned" in (folder / "run" / "report.html").read_text(encoding="utf-8")
    for words in (["evaluate", "run"], ["evaluate", recipe]):  # the checks of the run, and of the recipe
        again = run_json(capsys, *words)
        assert again["evaluation"] == content["evaluation"]
        assert all(counts["generated"] == 0 for counts in again["calls"].values())
    other = run_json(capsys, "evaluate", "run", "--check", "chrf")
    assert set(other["evaluation"]["checks"]) == {"chrf"}


@pytest.mark.parametrize(
    ("checks", "code", "words"),
    [
        ("numerik", "evaluation.bad_check", "Did you mean `numeric`?"),
        ("[]", "evaluation.bad_check", "the list is empty"),
        ("[auto, exact]", "evaluation.bad_check", "`auto` stands beside other checks"),
        ("'json_schema:none.json'", "recipe.missing_file", "none.json: there is no such file"),
        ("'none.py:f'", "recipe.missing_file", "none.py:f: there is no such file"),
        ("'own.py:f'", "evaluation.bad_check", "own.py"),
        ("'hihg=exact'", "evaluation.bad_check", "Did you mean `high`?"),
        ("code", "evaluation.code_not_permitted", "--run-code"),
        ("3", "recipe.wrong_type", "with quotes"),
    ],
)
def test_check_that_cannot_be_made_is_a_fault_at_its_line_before_training(checks, code, words, folder, capsys):
    recipe = write_recipe(folder, checks)
    for command in ([recipe], ["check", recipe])[: 1 + (checks == "code")]:
        content = run_json(capsys, *command)
        (fault,) = content["faults"]
        assert (fault["code"], content["exit_code"]) == (code, 2)
        assert (fault["where"]["file"], fault["where"]["line"]) == ("recipe.yaml", 3)
        assert words in fault["problem"] + fault["fix"]
    assert not (folder / "run").exists()


def test_run_that_holds_no_rows_out_is_refused(folder, capsys):
    content = run_json(capsys, write_recipe(folder, "auto"), "data={train: rows.jsonl}")
    assert [fault["code"] for fault in content["faults"]] == ["evaluation.no_prompts"]


def test_misspelt_check_is_corrected_by_fix(folder):
    recipe = write_recipe(folder, "[exact, high=numerc]")
    assert cli.main(["fix", recipe, "--write", "--fast"]) == 0
    assert load_recipe(recipe).evaluate["checks"] == ["exact", "high=numeric"]


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (KeyboardInterrupt(), errors.EXIT_SIGNAL + signal.SIGINT),
        (OSError(28, "No space left on device"), errors.EXIT_USER_ERROR),
        (errors.RunStopped("out of memory", errors.EXIT_OUT_OF_MEMORY, code="run.out_of_memory"), 4),
        (errors.DataError(errors.Fault("prompt 1", "no check", "Add one.", code="evaluation.no_check")), 2),
    ],
)
def test_failure_names_the_saved_model_and_the_command_that_repeats_it(error, exit_code, folder, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(evaluation, "run", fail)
    run = load_recipe(write_recipe(folder, "exact"))
    push = errors.RunStopped("the push failed", 2, code="hub.push_failed")
    with pytest.raises(errors.RunStopped) as raised:
        after_training.evaluate(run, push)
    assert raised.value.exit_code == exit_code
    assert raised.value.code == "evaluation.failed_after_training"
    lines = str(raised.value).splitlines()
    assert lines[0].startswith("the model is trained and saved in run, but the evaluation ")
    assert lines[1] == f"To repeat the evaluation: {console.get_python_command()} -m trl_sft evaluate run"
    assert lines[2] == "the push failed"
