"""Every recipe of the repository is accepted, and resolves to its golden form."""

from pathlib import Path

import pytest

from trl_sft import load_recipe, paths
from trl_sft.record import resolved

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))


def test_recipes_are_found():
    assert len(RECIPES) >= 1


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_resolves_to_its_golden_form(path, matches):
    text = resolved(load_recipe(path), {}).replace(str(paths.EMBEDDED), "<embedded>")
    matches(f"resolved_{path.stem}", text)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_says_goal_command_and_result_in_forty_lines(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    head = [line for line in lines if line.startswith("#")]
    for word in ("Goal:", "Command:", "Hardware:", "Result:"):
        assert any(word in line for line in head), word
    assert len([line for line in lines if not line.startswith("#")]) <= 40
