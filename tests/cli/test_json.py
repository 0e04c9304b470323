"""`--json`: one object on standard output, whatever a command does; it is what the documentation says."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import forks
import jsonschema
import pytest
from conftest import RECIPE, jsonl

from trl_sft import cli, errors, fault_codes, json_output
from trl_sft.errors import Edit, Fault, Place

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "json.md"
SCHEMA = json.loads(re.search(r"<!-- schema -->\n```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1])
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
AXOLOTL = "base_model: Qwen/Qwen2.5-0.5B\ndatasets: [{path: rows.jsonl, type: chat_template}]\nmicro_batch_size: 2\n"


@pytest.fixture
def answer(here, capsys):
    """Return a function that runs a command under `--json` and returns its object, valid by the documented schema."""

    def call(*words):
        capsys.readouterr()
        code = cli.main([*words, "--json"])
        content = json.loads(capsys.readouterr().out)
        VALIDATOR.validate(content)
        assert content["exit_code"] == code
        assert content["ok"] == (code == 0)
        return content

    (here / "recipe.yaml").write_text(RECIPE)
    (here / "axolotl.yaml").write_text(AXOLOTL)
    (here / "done").mkdir()
    (here / "done" / "run.json").write_text('{"outcome": "done"}')
    return call


def test_schema_of_the_page_is_valid_and_has_every_command():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    named = {reference["$ref"].rpartition("/")[2] for reference in SCHEMA["oneOf"]}
    assert named == {*cli.COMMANDS, "train"}


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["recipe.yaml"], {"output_dir", "steps", "metrics"}),
        (["check", "recipe.yaml"], {"ledger", "memory", "seconds", "unchecked", "machine_faults", "notes", "next"}),
        (["check", "recipe.yaml", "--fast"], {"notes", "seconds", "next"}),
        (["preview", "recipe.yaml"], {"rows", "rejected", "batch", "batch_width", "html", "notes"}),
        (["prepare", "recipe.yaml"], {"ledger", "notes", "next"}),
        (["explain", "train.packing"], {"keys", "text"}),
        (["explain", "recipe.yaml"], {"values", "notes", "text"}),
        (["schema"], {"schema", "output"}),
        (["schema", "--build"], {"schema", "output"}),
        (["build", "--example", "zh", "-o", "spec.yaml"], {"output"}),
        (["audit", "rows.jsonl"], {"rows", "clean", "removed", "gates", "statistics", "set_findings"}),
        (["runs", "."], {"runs"}),
        (["report", "done"], {"output"}),
        (["fix", "recipe.yaml", "--fast"], {"output", "edits", "diff", "next"}),
        (["init", "trl_sft:tiny", "rows.jsonl", "-o", "new.yaml"], {"output", "recipe", "format", "columns", "rows"}),
        (["import", "axolotl", "axolotl.yaml"], {"output", "recipe", "omitted"}),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_command_answers_with_its_values(words, values, answer):
    content = answer(*words)
    assert values <= set(content)
    if words[0] != "import":  # what an importer calls a success is its own test
        assert content["ok"]
        assert content["faults"] == []


def test_values_are_those_of_the_run(answer):
    content = answer("recipe.yaml")
    assert content["steps"] == 2
    assert Path(content["output_dir"]).name == "out"
    ledger = json.loads(Path("out/ledger.json").read_text(encoding="utf-8"))
    assert answer("check", "recipe.yaml", "train.output_dir=b")["ledger"]["train"]["rows"] == ledger["train"]["rows"]


def test_judging_page_and_the_votes_on_it_answer_with_their_values(answer, here):
    jsonl("done/samples.jsonl", [{"row": n, "task": "a", "prompt": "p", "before": "b", "after": "t"} for n in range(4)])
    content = answer("judge", "done", "-o", "page.html")
    assert (content["pairs"], content["items"], content["equal_answers"]) == (4, 9, 0)
    vote = {"item": 1, "choice": "left", "seconds": 1.5}
    (here / "ana.json").write_text(
        json.dumps({"format": 1, "page": content["page"], "rater": "ana", "votes": [vote]}), encoding="utf-8"
    )
    jsonl("verdicts.jsonl", [{"pair": f"row {n}", "verdict": "tuned"} for n in range(4)])
    content = answer("votes", content["key"], "ana.json", "--judge", "verdicts.jsonl")
    assert content["counted_raters"] == ["ana"]
    assert content["result"]["winner"] == "not_resolved"


@pytest.mark.parametrize("command", [[], ["check"], ["preview"], ["prepare"], ["explain"]])
def test_fault_of_a_recipe_has_file_line_and_key(command, answer, here):
    (here / "recipe.yaml").write_text(RECIPE + "  pakking: true\n")
    content = answer(*command, "recipe.yaml")
    (fault,) = content["faults"]
    assert content["exit_code"] == 2
    assert fault["code"] == "recipe.unknown_key"
    expected = {"text": "recipe.yaml:9 train.pakking", "file": "recipe.yaml", "line": 9, "row": None}
    assert fault["where"] == expected | {"key": ["train", "pakking"]}


def test_fault_of_a_row_has_its_row(answer, here):
    jsonl("rows.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}])
    (fault,) = answer("check", "recipe.yaml")["faults"]
    assert fault["code"] == "data.empty_value"
    assert (Path(fault["where"]["file"]).name, fault["where"]["row"]) == ("rows.jsonl", 2)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["fix", "gone.yaml"], "recipe.not_found"),
        (["check", "gone.yaml"], "recipe.not_found"),
        (["chekc", "recipe.yaml"], "run.unknown_command"),
        (["check"], "run.bad_arguments"),
        (["recipe.yaml", "--max_steps", "3"], "run.bad_arguments"),
        (["preview", "recipe.yaml", "--rows", "many"], "run.bad_arguments"),
        (["preview", "recipe.yaml", "--rows", "0"], "run.bad_option"),
        (["init", "trl_sft:tiny", "rows.jsonl", "-o", "recipe.yaml"], "run.file_exists"),
        (["import", "trlx", "a.yaml"], "import.unknown_tool"),
        (["explain", "train.pakking"], "recipe.unknown_key"),
        (["recipe.yaml", "train.max_steps"], "recipe.invalid_override"),
        (["judge", "done", "-o", "page.html"], "votes.no_pairs"),
        (["judge", "done", "-o", "page.html", "--rows", "0"], "run.bad_option"),
        (["votes", "gone.json", "ana.json"], "votes.bad_file"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else words,
)
def test_what_a_user_can_fix_is_an_answer_with_exit_code_2(words, code, answer):
    content = answer(*words)
    assert content["exit_code"] == 2
    assert [fault["code"] for fault in content["faults"]] == [code]


def test_json_after_two_dashes_belongs_to_the_other_tool(here, capsys):
    assert cli.main(["import", "openrlhf", "--", "--json"]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("error", "exit_code", "code"),
    [
        (errors.RunStopped("no memory\nWhat to try: less", 4, code="run.out_of_memory"), 4, "run.out_of_memory"),
        (errors.RunStopped("the limit", 75, code="run.time_limit"), 75, "run.time_limit"),
        (errors.RunStopped("not finite", 3, code="run.not_finite"), 3, "run.not_finite"),
        (errors.Interrupted(), 130, "run.interrupted"),
        (ZeroDivisionError("of ours"), 1, "run.internal_error"),
        (errors.NotAsAsked([Fault("r.yaml:3 train.bf16", "differs", "Report it.", "run.not_as_asked")]), 1, None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_every_early_end_is_an_answer(error, exit_code, code, answer, monkeypatch):
    def end(_):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "prepare", end)
    content = answer("prepare", "recipe.yaml")
    assert content["exit_code"] == exit_code
    (fault,) = content["faults"]
    assert fault["code"] == (code or "run.not_as_asked")
    assert fault_codes.read_codes()[fault["code"]].exit_code == exit_code


def test_help_and_version_answer_without_values(answer):
    for words in (["--help"], ["check", "--help"], ["--version"]):
        assert set(answer(*words)) == {"ok", "command", "exit_code", "faults"}


def test_standard_output_has_nothing_else_also_from_subprocesses_and_libraries(here):
    """What is written to the file descriptor itself goes to standard error too."""
    (here / "recipe.yaml").write_text(RECIPE.replace("rows.jsonl", "{path: rows.jsonl, format: f.py:make}"))
    (here / "f.py").write_text(
        "import os, subprocess\n"
        "def make(row):\n"
        "    os.write(1, b'from the descriptor\\n'); subprocess.run(['echo', 'from a subprocess']); print('printed')\n"
        "    return {'prompt': 'a', 'completion': 'b'}\n"
    )
    process = forks.start(here, "preview", "recipe.yaml", "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    content = json.loads(out)
    VALIDATOR.validate(content)
    assert content["ok"], err
    assert "from a subprocess" in err


def test_ctrl_c_is_an_answer(here):
    (here / "recipe.yaml").write_text(RECIPE.replace("rows.jsonl", "{path: rows.jsonl, format: f.py:make}"))
    (here / "f.py").write_text("import time\nopen('begun', 'w').close()\ndef make(row):\n    time.sleep(60)\n")
    process = forks.start(here, "check", "recipe.yaml", "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not Path("begun").exists() and process.poll() is None:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    content = json.loads(output)
    VALIDATOR.validate(content)
    assert (process.returncode, content["exit_code"]) == (130, 130)
    assert content["faults"][0]["code"] == "run.interrupted"


def test_answer_hides_passwords_and_writes_what_json_has():
    answer = json_output.Answer("train", {"loss": float("nan"), "path": Path("a/b"), "url": "https://me:secret@host/x"})
    edits = (Edit("set", ("train", "bf16"), value=True), Edit("rename", ("a",), new=("b",)), Edit("remove", ("c",)))
    answer.faults.append(Fault(Place("r.yaml:2 a", file="r.yaml", line=2, key=("a",)), "p", "f", "recipe.tag", edits))
    content = json.loads(json_output.format_answer(answer))
    assert content["loss"] is None
    assert content["path"] == "a/b"
    assert "secret" not in content["url"]
    assert content["faults"][0]["edits"] == [
        {"action": "set", "key": ["train", "bf16"], "value": True},
        {"action": "rename", "key": ["a"], "new": ["b"]},
        {"action": "remove", "key": ["c"]},
    ]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("rows.jsonl:3", ("rows.jsonl", 3, None)),
        ("rows.jsonl row 8", ("rows.jsonl", None, 8)),
        ("rows.jsonl row 8 (line 9)", ("rows.jsonl", 9, 8)),
        ("r.yaml:12 train.pakking", ("r.yaml", 12, None)),
        ("(train.max_steps=a:3)", ("", None, None)),
        ("--rows", ("", None, None)),
    ],
)
def test_parts_of_a_place_are_read_from_its_text(text, parts):
    place = Place.parse(text)
    assert (place.file, place.line, place.row) == parts
    assert place == text
