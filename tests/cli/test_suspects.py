"""`suspects` finds planted rows, accuses nothing on clean rows, continues, and refuses what it cannot rerun."""

import json
import re
import shutil
from pathlib import Path

import jsonschema
import pytest
from conftest import jsonl

from trl_sft import cli

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "json.md"
BLOCK = re.search(r"<!-- schema -->\n```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
SCHEMA = jsonschema.Draft202012Validator(json.loads(BLOCK))
NOUNS = ["cat", "house", "plate", "bear", "road", "cook"]
FORMS = ["The {n}?", "Tell me of the {n}.", "a {n} is", "Say it: {n}", "And the {n}?", "For the {n}:", "{n}, {n}!"]
RECIPE = """\
model: {{name_or_path: trl_sft:tiny}}
data: {{train: rows.jsonl, eval: held_out.jsonl}}
train:
  output_dir: {folder}
  max_steps: 32
  per_device_train_batch_size: 8
  learning_rate: 0.01
  lr_scheduler_type: cosine
  save_strategy: 'no'
evaluate: false
"""


def write_run(folder, *, wrong, train=48):
    """Train on rows of one answer, of which some are wrong; return the run folder and the numbers of the wrong rows."""
    rows = [{"question": form.format(n=noun), "answer": "white"} for form in FORMS for noun in NOUNS]
    rows += [{"question": f"Well, {row['question']}", "answer": "white"} for row in rows]
    held_out = rows[train:]
    planted = list(range(3, 3 + 4 * wrong, 4))
    for number in planted:
        rows[number] = rows[number] | {"answer": "slow"}
    folder.mkdir()
    jsonl(folder / "rows.jsonl", rows[:train])
    jsonl(folder / "held_out.jsonl", held_out)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder / "run"), encoding="utf-8")
    assert cli.main([str(folder / "recipe.yaml")]) == 0
    return folder / "run", planted


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("suspects") / "planted", wrong=8)


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


def test_signals_alone_are_suggestions_and_train_nothing(planted, capsys, tmp_path):
    run, _ = planted
    assert cli.main(["suspects", str(run), "--signals-only", "-o", str(tmp_path)]) == 0
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
    ],
)
def test_run_that_cannot_be_rerun_is_refused_by_name(change, message, planted, suspects, tmp_path):
    run = shutil.copytree(planted[0], tmp_path / "run")
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    resolved = (run / "resolved.yaml").read_text(encoding="utf-8")
    changed = change(record, resolved)
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    (run / "resolved.yaml").write_text(changed if isinstance(changed, str) else resolved, encoding="utf-8")
    content = suspects(run)
    assert content["exit_code"] == 2
    assert message in content["faults"][0]["problem"].replace("its rows are not", "they are not")
