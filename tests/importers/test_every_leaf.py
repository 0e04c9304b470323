"""Every value of a configuration matters: changed or removed, it changes the recipe, what is said, or the fault."""

import copy
import json
import shlex
from pathlib import Path

import pytest
import yaml
from importer_outcomes import find_place

from trl_sft.errors import RecipeError
from trl_sft.importers import llamafactory, openrlhf, recipe_text, tables, writer
from trl_sft.importers.conversion import convert_all
from trl_sft.importers.settings import Settings
from trl_sft.recipe import yaml_reader

FOLDER = Path(__file__).parent / "configurations"
TOOLS = ("axolotl", "llamafactory", "trl", "alignment-handbook")
# Values that are the tool's default: without them its training is the same, and so is the recipe.
DEFAULTS = {
    *(("split", "train"), ("bf16", "auto"), ("lr_scheduler", "cosine"), ("chat_template", "jinja"), ("role", "role")),
    *(("packing", True), ("finetuning_type", "lora"), ("quantization_method", "bnb"), ("messages", "conversations")),
    *(("streaming", False), ("assistant_only_loss", False)),
}
# a secret is not shown, so that another one looks the same
SECRETS = {"use_wandb", "hub_token"}
CASES = FOLDER / "cases"


def read_configurations(tool):
    """Return the settings of each document in the files of a tool."""
    texts = [(FOLDER / f"{tool}.yaml").read_text(encoding="utf-8")]
    texts += [file.read_text(encoding="utf-8") for file in sorted((CASES / tool).glob("*.yaml"))]
    return [
        document
        for text in texts
        for document in yaml.load_all(text, Loader=yaml_reader._Loader)
        if document is not None
    ]


def observe(tool, values):
    """Return everything that a user sees of an import: the recipe with its comments and files, or the faults."""
    try:
        if isinstance(values, str):
            settings = openrlhf.read(shlex.split(values))
        else:
            settings = Settings(values, find_place)
            if tool == "llamafactory":
                settings = llamafactory.add_dataset_info(settings, None, Path())
        conversion = convert_all(writer.TOOLS[tool], settings)
    except RecipeError as error:
        return str(error)
    text = recipe_text.render("", settings, conversion.lines, omitted=conversion.omitted)
    files = recipe_text.render_files(conversion.files, "recipe")
    return f"{text}{files}{[str(fault) for fault in conversion.faults]}"


def is_refused(observation):
    """Tell whether a file cannot be imported because of one of its settings, whatever the others are."""
    return observation.endswith((tables.REFUSED_FIX, "`model_name_or_path` and `stage`.", "TRL's sft script."))


def list_leaves(value, path=()):
    """Return the path of each value that holds no other one, and of each empty list and mapping."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    leaves = [leaf for key, inner in items for leaf in list_leaves(inner, (*path, key))]
    return leaves or [path]


def change_value(value):
    """Return another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value / 2 if isinstance(value, float) and value else value + 1
    return {str: lambda: f"{value}x", type(None): lambda: "x", list: lambda: ["x"], dict: lambda: {"x": 1}}[
        type(value)
    ]()


def replace(values, path, value=None, *, remove=False):
    """Return a copy of settings with another value at a path, or without it."""
    values = copy.deepcopy(values)
    inner = values
    for part in path[:-1]:
        inner = inner[part]
    if remove:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return values


def get_value(values, path):
    """Return the value at a path."""
    for part in path:
        values = values[part]
    return values


@pytest.mark.parametrize("tool", TOOLS)
def test_every_value_of_a_file_matters(tool, here):
    info = {"docs": {"file_name": "long.jsonl", "columns": {"prompt": "text"}}}
    (here / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    configurations = read_configurations(tool)
    assert len(configurations) >= 10
    leaves, unseen = 0, []
    for number, values in enumerate(configurations, 1):
        before = observe(tool, values)
        for path in () if is_refused(before) else list_leaves(values):
            leaves += 1
            value = get_value(values, path)
            is_text = isinstance(value, str)
            changes = {
                "another value": replace(values, path, change_value(value)),
                "another type": replace(values, path, 7 if is_text else "word"),
                "no value": replace(values, path, remove=True),
            }
            if not isinstance(value, list | dict) and (path[-1], value) in DEFAULTS:
                del changes["no value"]
            if path[-1] in SECRETS:
                del changes["another value"], changes["another type"]
            unseen += [(number, path, kind) for kind, changed in changes.items() if observe(tool, changed) == before]
    print(f"{tool}: {leaves} values of {len(configurations)} configurations, each changed in 3 ways")
    assert unseen == []
    assert leaves >= {"axolotl": 300, "llamafactory": 240, "trl": 120, "alignment-handbook": 120}[tool]


def test_every_flag_of_a_command_matters():
    commands = [line for line in (FOLDER / "openrlhf.txt").read_text(encoding="utf-8").splitlines() if line]
    assert len(commands) >= 10
    leaves, unseen = 0, []
    for command in commands:
        before = observe("openrlhf", command)
        words = shlex.split(command)
        flags = [number for number, word in enumerate(words) if word.startswith("--")]
        for number, word in enumerate(words):
            if word.startswith("--"):
                end = next((other for other in flags if other > number), len(words))
                changed = words[:number] + words[end:]
            elif words[number - 1].removeprefix("--") in SECRETS:
                continue
            else:
                replaced = str(change_value(float(word))) if word.replace(".", "").isdecimal() else f"{word}x"
                changed = [*words[:number], replaced.removesuffix(".0"), *words[number + 1 :]]
            leaves += 1
            if observe("openrlhf", shlex.join(changed)) == before:
                unseen.append((command, number, word))
    print(f"openrlhf: {leaves} words of {len(commands)} commands")
    assert unseen == []
    assert leaves >= 150
