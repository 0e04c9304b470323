"""Screens that the documents show are those that the commands print; `pytest --update` writes them into the documents.

Numbers may differ (seconds, memory of the machine), words may not.
"""

import re

import documents
import pytest
import torch
from conftest import QUESTIONS, RECIPE, SHIPPED, jsonl
from documents import GUIDES, ROOT

from trl_sft import cli, load_recipe
from trl_sft.errors import UserError
from trl_sft.model import cpu_loss
from trl_sft.recipe import paths


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the rows of the tutorial and the models of the package."""
    monkeypatch.setattr(paths, "EMBEDDED", SHIPPED)
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "my-rows.jsonl", QUESTIONS)
    return tmp_path


@pytest.fixture
def compare(request):
    """Compare a screen with every block that follows a mark `<!-- example: NAME -->`; numbers are ignored."""

    def call(name, screen, at_least=1):
        examples = {path: match for path in GUIDES if (match := example(path, name))}
        assert len(examples) >= at_least
        for path, match in examples.items():
            if request.config.getoption("--update"):
                path.write_text(match.string[: match.start()] + screen + match.string[match.end() :], encoding="utf-8")
            else:
                assert without_numbers(match[0]) == without_numbers(screen), documents.name_of(path)

    return call


def example(path, name):
    """Return the match of the block that follows a mark in a document, None without one."""
    return re.search(
        rf"(?<=<!-- example: {name} -->\n```\n)(.*?)(?=```\n)", path.read_text(encoding="utf-8"), re.DOTALL
    )


def without_numbers(screen):
    """Return a screen with a sign for each number and its unit: 1 min 3 s, 4.9 MiB."""
    return re.sub(r"(?:\d[\d.,]*\d(?:e-?\d+)?|\d)(?: (?:h|min|s|[KMG]iB)\b)?(?: \d+ s\b)?", "#", screen)


def run(capsys, *words):
    """Return what a command prints, as it looks on any machine."""
    capsys.readouterr()
    assert cli.main(list(words)) == 0
    screen = capsys.readouterr().out
    screen = re.sub(r"\S*python\S* -m trl_sft", "python -m trl_sft", screen)
    return screen.replace(f"{SHIPPED}/tiny", "trl_sft:tiny")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the screens are those of a CPU")
def test_the_tutorials_screens_are_those_of_its_commands(folder, capsys, compare):
    compare("init", run(capsys, "init", "trl_sft:tiny", "my-rows.jsonl"))
    compare("check", run(capsys, "check", "recipe.yaml"))
    compare("preview", run(capsys, "preview", "recipe.yaml", "--rows", "1"))


def test_the_screen_of_explain_is_the_one_of_the_command(folder, capsys, compare):
    compare("explain", run(capsys, "explain", "train.packing"))


def test_the_example_of_a_fault_is_what_a_misspelt_key_prints(folder, compare):
    recipe = documents.blocks("yaml", [ROOT / "README.md"])[0].text
    (folder / "recipe.yaml").write_text(recipe.replace("learning_rate", "learning_rte"), encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_recipe("recipe.yaml")
    compare("fault", f"{error.value}\n", at_least=4)


def test_the_documents_give_the_quickstarts_result_as_its_recipe_does():
    recipe = (ROOT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8")
    result = re.search(r"# Result: exact match (\d+% -> \d+%) of (\d+)", recipe)
    examples = {documents.name_of(path): match[0] for path in GUIDES if (match := example(path, "quickstart"))}
    assert len(examples) >= 4
    assert [name for name, text in examples.items() if f"{result[1]} of {result[2]}" not in text] == []


def test_the_screens_of_the_quickstart_have_the_words_that_a_run_prints(go):
    text = RECIPE.replace("data: {train: rows.jsonl}", "data: {train: rows.jsonl, eval_fraction: 0.2}")
    code, out, err = go(text)
    assert code == 0, err
    printed = {" ".join(without_numbers(line).split()) for line in out.splitlines()}
    for path in GUIDES:
        lines = example(path, "quickstart")[0].splitlines() if example(path, "quickstart") else []
        # the other lines name tasks and prompts
        labels = [line for line in lines if line.startswith(("Held-out", "  prompt"))]
        assert {" ".join(without_numbers(line).split()) for line in labels} <= printed, documents.name_of(path)
    start = example(ROOT / "docs" / "tutorials" / "quickstart.md", "start")[0]
    documented = {line.split()[0] for line in start.splitlines() if line}
    if not cpu_loss.AVAILABLE:  # a TRL with another head keeps its own loss, and no line says so
        documented -= {"loss"}
    assert documented <= {line.split()[0] for line in out.splitlines() if line}
