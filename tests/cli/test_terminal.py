"""What reaches a terminal is text, without control characters of rows, keys and names; and no output ends a run."""

import json
import os
import re
import signal
import subprocess
import sys

import forks
import pytest
from conftest import QUESTIONS, RECIPE, jsonl

from trl_sft.recipe import paths

# title, colour, clearing, reversed text, one character back, carriage return, link, and characters that are not seen
HOSTILE = "\x1b]0;evil\x07\x9b31m\x1b[2J\u202e\x08\r\x1b]8;;x\x1b\\L\u200b\u200f\u061c\u2028\u2066\ufeff\U000e0041"
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]"
)
FULL = RECIPE.replace("rows.jsonl}", "rows.jsonl, eval_fraction: 0.2}")


def is_clean(*texts):
    return not any(CONTROL.search(text) for text in texts)


def hostile_yaml(text):
    """Return a text as a double-quoted YAML string."""
    return json.dumps(text)


RECIPES = {
    "unknown key": RECIPE + f"{hostile_yaml(HOSTILE)}: 1\n",
    "unknown key of a section": RECIPE + f"lora: {{{hostile_yaml(HOSTILE)}: 1}}\n",
    "value": RECIPE.replace("max_steps: 2", f"max_steps: {hostile_yaml(HOSTILE)}"),
    "path of rows": RECIPE.replace("rows.jsonl", hostile_yaml(HOSTILE + ".jsonl")),
    "model": RECIPE.replace("trl_sft:tiny", hostile_yaml("./" + HOSTILE)),
    "output folder": RECIPE.replace("output_dir: out", "output_dir: " + hostile_yaml("rows.jsonl/" + HOSTILE)),
    "rename": RECIPE.replace(
        "{train: rows.jsonl}", f"{{train: {{path: rows.jsonl, rename: {{{hostile_yaml(HOSTILE)}: b}}}}}}"
    ),
    "raw in a comment": RECIPE + f"# {HOSTILE}\n",
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("command", [["check", "--fast"], ["check"], ["explain"], []])
def test_control_characters_of_a_recipe_do_not_reach_the_terminal(go, name, command):
    code, out, err = go(RECIPES[name], command=command)
    assert is_clean(out, err)
    assert code in (0, 2)


ROWS = {
    "answer": [row | {"answer": HOSTILE + row["answer"]} for row in QUESTIONS],
    "unused column": [row | {HOSTILE: "x"} for row in QUESTIONS],
    "column of no format": [{HOSTILE: "x"}],
    "wrong type": [{"question": HOSTILE, "answer": [HOSTILE]}],
    "task": [row | {"task": HOSTILE} for row in QUESTIONS],
    "role": [{"messages": [{"role": HOSTILE, "content": "a"}]}],
    "key of a turn": [
        {"messages": [{"role": "user", "content": "a", HOSTILE: 1}, {"role": "assistant", "content": "b"}]}
    ]
    * 40,
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("command", [["preview"], ["check"], ["prepare"], []])
def test_control_characters_of_rows_do_not_reach_the_terminal(go, here, name, command):
    jsonl(here / "rows.jsonl", ROWS[name])
    _, out, err = go(FULL if command != ["preview"] else RECIPE, command=command)
    assert is_clean(out, err)


def test_control_characters_of_broken_files_names_templates_and_functions_do_not_reach_the_terminal(go, here):
    (here / "rows.jsonl").write_text('{"question": "' + HOSTILE + "\n")
    assert is_clean(*go(RECIPE, command=["check"])[1:])
    jsonl(here / f"{HOSTILE}.jsonl".replace("/", ""), QUESTIONS)
    text = RECIPE.replace("rows.jsonl", hostile_yaml(HOSTILE + ".jsonl"))
    for command in (["preview"], ["check"], []):
        assert is_clean(*go(text, command=command)[1:])
    jsonl(here / "rows.jsonl", QUESTIONS)
    (here / "t.jinja").write_text("{{ raise_exception('" + HOSTILE + "') }}")
    assert is_clean(*go(RECIPE + "tokenizer: {chat_template: ./t.jinja}\n", command=["check"])[1:])
    (here / "f.py").write_text(f"def f(row):\n    raise ValueError({HOSTILE!r})\n")
    assert is_clean(*go(RECIPE.replace("rows.jsonl}", "{path: rows.jsonl, format: f.py:f}}"), command=["check"])[1:])


def test_terminal_that_prints_ascii_only_does_not_end_a_run(here):
    jsonl(here / "rows.jsonl", [{"question": f"你好 {n}?", "answer": "好"} for n in range(40)])
    (here / "recipe.yaml").write_text(FULL.replace("trl_sft:tiny", str(paths.EMBEDDED / "tiny")))
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "LC_ALL": "C"}
    done = subprocess.run(
        [sys.executable, "-m", "trl_sft", "recipe.yaml"],
        **{"cwd": here, "env": ascii_only, "capture_output": True, "text": True, "timeout": 300},
        check=False,
    )
    out = done.stdout
    assert done.returncode == 0, done.stderr
    assert "\\u4f60\\u597d" in out
    assert json.loads((here / "out/run.json").read_text())["outcome"] == "done"


def test_reader_that_goes_away_does_not_end_a_run_that_has_begun(here):
    (here / "recipe.yaml").write_text(FULL.replace("max_steps: 2", "max_steps: 5"))
    process = forks.start(here, "recipe.yaml", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in process.stdout:
        if line.lstrip().startswith("1/"):
            break
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=300) == 0
    assert json.loads((here / "out/run.json").read_text())["outcome"] == "done"


def test_run_that_nohup_started_goes_on_when_the_terminal_is_closed(here):
    (here / "recipe.yaml").write_text(FULL.replace("max_steps: 2", "max_steps: 20"))
    ignore = {"prepare": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    process = forks.start(here, "recipe.yaml", stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **ignore)
    for line in process.stdout:
        if line.lstrip().startswith("1/"):
            process.send_signal(signal.SIGHUP)
            break
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
