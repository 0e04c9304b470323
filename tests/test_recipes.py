"""Every recipe of the repository is accepted, resolves to its golden form, and runs with a toy model in its place."""

import json
import re
from pathlib import Path

import models
import pytest
from conftest import SHIPPED, jsonl

from trl_sft import load_recipe, train
from trl_sft.recipe import paths, resolved
from trl_sft.recipe.yaml_reader import format_value

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
ON_THE_HUB = [path for path in RECIPES if path.stem != "quickstart"]
CHAT = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "<think>\nso\n</think>\n\ntwo"}]
# recipe -> rows in the place of the hub's, in the columns that those have
ROWS = {
    "smollm2-135m-smoltalk": [{"messages": CHAT, "source": "x"}],
    "r1-distill-qwen-1.5b-lora": [{"messages": CHAT, "num_tokens": 7, "source": "x"}],
    "qwen2.5-0.5b-full": [{"question": "one", "answer": "two"}],
    "qwen2.5-3b-lora": [{"messages": CHAT, "source": "x"}],
    "llama-3.1-8b-8bit-lora": [{"instruction": "add", "input": "", "output": "b"}],
    "llama-3.1-8b-qlora": [{"instruction": "add", "input": "1 2", "output": "b"}],
    "qwen2.5-1.5b-multitask-lora": [
        {"question": "one", "answer": "two"},
        {"instruction": "add", "input": "", "output": "b"},
        {"messages": CHAT},
    ],
    "qwen2.5-1.5b-chinese-lora": [
        {"instruction": "加", "input": "", "output": "三", "domain": ["x"], "human_verified": True}
    ],
}


def _numbered(row, number):
    """Return a row that stands in no other place: held-out rows are dropped from those to train."""
    last = {"one": f"one {number}", "add": f"add {number}", "加": f"加 {number}"}
    return json.loads(
        "".join(last.get(part, part) for part in re.split(r"(one|add|加)", json.dumps(row, ensure_ascii=False)))
    )


def _kept(file, source, rows, begin):
    """Write rows as one source's stand-in; return the source as the recipe would write it."""
    row = rows[{"math": 0, "instructions": 1, "chat": 2}.get(source.task, 0)]
    jsonl(file, [_numbered(row, begin + n) for n in range(40)])
    kept = {"weight": source.weight, "task": source.task, "format": source.format, "wording": source.wording}
    return {"path": str(file)} | {name: value for name, value in kept.items() if value}


def test_recipes_are_found():
    assert len(RECIPES) >= 8
    assert {path.stem for path in ON_THE_HUB} == set(ROWS)


@pytest.fixture(autouse=True)
def _template_there(request):
    """A recipe may name a chat template that only newer versions of TRL bring."""
    path = request.node.callspec.params.get("path") if hasattr(request.node, "callspec") else None
    named = re.search(r"chat_template: (\w+)\b(?!\.)", path.read_text(encoding="utf-8")) if path else None
    if named and named[1] not in paths.list_templates():
        pytest.skip(f"the installed TRL has no template {named[1]}")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_resolves_to_its_golden_form(path, matches, monkeypatch):
    monkeypatch.setattr(paths, "EMBEDDED", SHIPPED)
    text = resolved.format_recipe(load_recipe(path), {}).replace(str(paths.EMBEDDED), "<embedded>")
    matches(f"resolved_{path.stem}", text)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_says_goal_command_and_result_in_forty_lines(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    head = [line for line in lines if line.startswith("#")]
    for word in ("Goal:", "Command:", "Hardware:", "Result:"):
        assert any(word in line for line in head), word
    assert f"recipes/{path.name}" in "".join(head)
    assert len([line for line in lines if not line.startswith("#")]) <= 40


@pytest.mark.parametrize("path", ON_THE_HUB, ids=lambda p: p.stem)
def test_recipe_that_needs_the_hub_trains_a_toy_model_on_rows_like_its_own(path, here):
    """All of it but model, rows, length of the run and precision stays."""
    needs_template = "chat_template" in path.read_text(encoding="utf-8")
    model = models.base(here / "base") if needs_template else paths.EMBEDDED / "tiny"
    run = load_recipe(path)
    data = {}
    for part, number in (("train", 0), ("eval", 100)):
        data[part] = [
            _kept(here / f"{part}-{n}.jsonl", source, ROWS[path.stem], number)
            for n, source in enumerate(run.sources[part])
        ]
    words = [f"model={{name_or_path: {model}}}", "train.max_steps=2", "train.output_dir=out", "train.max_length=512"]
    words += [f"data.{part}={format_value(data[part])}" for part in ("train", "eval") if run.sources[part]]
    words += ["data.eval_fraction=0.1"] if "eval_fraction" in run.data else []
    words += ["evaluate={max_rows: 2, generation: {max_new_tokens: 4}}"]
    result = train(load_recipe(path, words))
    assert result.steps == 2
    assert json.loads((here / "out" / "eval.json").read_text())["prompts"] == 2
    assert (here / "out" / "adapter_config.json").exists() == (run.lora is not None)
