"""What each of the configurations becomes: its exit code, and what the recipe trains differently."""

import json
import shlex
from pathlib import Path

import pytest
import yaml
from conftest import jsonl

from trl_sft import cli
from trl_sft.recipe import yaml_reader

FOLDER = Path(__file__).parent / "configurations"
EXPECTED = yaml.safe_load((FOLDER / "expected.yaml").read_text(encoding="utf-8"))
TOOLS = ("axolotl", "llamafactory", "trl", "alignment-handbook", "openrlhf")


def read_commands(tool):
    """Return the settings of each configuration of a tool: mappings, or words of a command line."""
    if tool == "openrlhf":
        lines = (FOLDER / "openrlhf.txt").read_text(encoding="utf-8").splitlines()
        return [["--", *shlex.split(line)] for line in lines if line]
    text = (FOLDER / f"{tool}.yaml").read_text(encoding="utf-8")
    return list(yaml.load_all(text, Loader=yaml_reader._Loader))


@pytest.mark.parametrize("tool", TOOLS)
def test_configuration_becomes_a_checked_recipe_and_its_differences_are_told(tool, here, capsys):
    rows = {
        "chats.jsonl": {"turns": [{"who": "customer", "said": "a"}, {"who": "agent", "said": "b"}]},
        "books.jsonl": {"body": "a"},
        "mine.jsonl": {"ask": "a", "reply": "b"},
        "identity.json": {"instruction": "a", "input": "", "output": "b"},
        "calls.json": {"turns": [{"who": "customer", "said": "a"}, {"who": "agent", "said": "b"}]},
        "rows.json": {"ask": "a", "say": "b"},
        "rows.jsonl": {"question": "a", "response": "b", "body": "c"},
    }
    for name, row in rows.items():
        jsonl(here / name, [row])
    (here / "saves" / "earlier").mkdir(parents=True)
    outcomes = []
    for number, settings in enumerate(read_commands(tool)):
        words = settings if isinstance(settings, list) else ["config.json"]
        (here / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        capsys.readouterr()
        code = cli.main(["--json", "import", tool, "-o", f"recipe-{number}.yaml", *words])
        answer = json.loads(capsys.readouterr().out)
        differences = {item["setting"]: item["affects"] for item in answer.get("omitted", []) if item["affects"]}
        faults = [fault["where"]["text"] for fault in answer["faults"]]
        outcomes.append(
            {"code": code} | ({"differs": differences} if differences else {}) | ({"faults": faults} if faults else {})
        )
        assert faults or cli.main(["check", f"recipe-{number}.yaml", "--fast"]) == 0, capsys.readouterr().err
    (here / "outcomes.yaml").write_text(yaml.safe_dump(outcomes))
    assert outcomes == EXPECTED.get(tool)
