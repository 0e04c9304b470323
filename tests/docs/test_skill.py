"""SKILL.md: every command in it runs, in the order of the page, and answers as the page says."""

import json
import re
import shlex

import pytest
from conftest import QUESTIONS, jsonl
from documents import ROOT

from trl_sft import cli

PAGE = (ROOT / "SKILL.md").read_text(encoding="utf-8")
FAULTY = "model: trl_sft:tiny\ndata: {train: rows.jsonl}\ntrain:\n  lr: '1e-4'\n  max_step: 2\n  output_dir: out2\n"
AXOLOTL = "base_model: Qwen/Qwen2.5-0.5B\ndatasets: [{path: rows.jsonl, type: chat_template}]\nmicro_batch_size: 2\n"


def list_commands(mark):
    """Return the commands of the blocks below a mark, without `python -m trl_sft`."""
    blocks = re.findall(rf"<!-- {mark} -->\n```sh\n(.*?)```", PAGE, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert all(line.startswith("python -m trl_sft ") and line.endswith(" --json") for line in lines)
    return [shlex.split(line)[3:] for line in lines]


@pytest.fixture
def answer(here, capsys):
    def call(words):
        capsys.readouterr()
        code = cli.main(words)
        content = json.loads(capsys.readouterr().out)
        assert content["exit_code"] == code
        return content

    jsonl("rows.jsonl", QUESTIONS)
    (here / "faulty.yaml").write_text(FAULTY)
    (here / "axolotl.yaml").write_text(AXOLOTL)
    return call


def test_every_block_of_commands_is_run_by_a_test():
    assert PAGE.count("```sh") == len(re.findall(r"<!-- commands(?: of a faulty recipe)? -->\n```sh", PAGE)) == 3


def test_commands_of_the_page_succeed(answer):
    for words in list_commands("commands"):
        content = answer(words)
        assert content["exit_code"] in ((0,) if words[0] != "import" else (0, 5)), (words, content["faults"])
        if words[0] == "preview":
            assert {segment["has_loss"] for row in content["rows"] for segment in row["segments"]} == {True, False}
        if words[0] == "recipe.yaml":
            assert {"output_dir", "steps", "metrics"} <= set(content)


def test_commands_of_a_faulty_recipe_correct_it(answer):
    answers = [answer(words) for words in list_commands("commands of a faulty recipe")]
    assert [content["exit_code"] for content in answers] == [2, 0, 0, 0, 0]
    assert answers[1]["output"] == "faulty.fixed.yaml"
    assert {edit["action"] for edit in answers[1]["edits"]} == {"set", "rename"}
    assert ["train", "learning_rate"] in [value["key"] for value in answers[4]["values"]]


def test_files_and_codes_that_the_page_names_exist():
    for path in re.findall(r"`(docs/[\w/.-]+)`", PAGE):
        assert (ROOT / path).exists(), path
    codes = {int(code) for code in re.findall(r"\b(\d+)\b", PAGE.partition("## Exit codes")[2].partition("More:")[0])}
    listed = re.findall(r"^\| (\d+) \|", (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert codes - {5} <= set(map(int, listed))
