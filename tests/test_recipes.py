"""Every recipe of the repository is valid, resolves to its snapshot, and trains a toy model on toy rows."""

import json
import re
from pathlib import Path

import models
import pytest
from conftest import SHIPPED, jsonl

from trl_sft import load_recipe, train
from trl_sft.recipe import paths, processes, resolved
from trl_sft.recipe.yaml_reader import format_value

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
CLUSTERS = [path for path in RECIPES if path.parent.name == "clusters"]  # planned, for cards that no test has
ON_THE_HUB = [path for path in RECIPES if path.stem != "quickstart" and path not in CLUSTERS]
CHAT = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "<think>\nso\n</think>\n\ntwo"}]
# recipe -> rows that replace those of the hub, with the same columns
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


def _make_unique(row, number):
    """Return the row with a number in its prompt, so that no held-out row is removed from the training rows."""
    replacements = {"one": f"one {number}", "add": f"add {number}", "加": f"加 {number}"}
    return json.loads(
        "".join(replacements.get(part, part) for part in re.split(r"(one|add|加)", json.dumps(row, ensure_ascii=False)))
    )


def _write_source(file, source, rows, first_number):
    """Write forty rows that replace those of a source; return the source as a recipe has it."""
    row = rows[{"math": 0, "instructions": 1, "chat": 2}.get(source.task, 0)]
    jsonl(file, [_make_unique(row, first_number + n) for n in range(40)])
    settings = {"weight": source.weight, "task": source.task, "format": source.format, "wording": source.wording}
    return {"path": str(file)} | {name: value for name, value in settings.items() if value}


def test_every_recipe_of_the_hub_has_toy_rows():
    assert len(RECIPES) >= 8
    assert {path.stem for path in ON_THE_HUB} == set(ROWS)


@pytest.fixture(autouse=True)
def _skip_without_template(request):
    """Skip a recipe whose chat template the installed TRL does not have."""
    path = request.node.callspec.params.get("path") if hasattr(request.node, "callspec") else None
    template = re.search(r"chat_template: (\w+)\b(?!\.)", path.read_text(encoding="utf-8")) if path else None
    if template and template[1] not in paths.list_templates():
        pytest.skip(f"the installed TRL has no template {template[1]}")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_resolves_to_its_snapshot(path, matches, monkeypatch):
    monkeypatch.setattr(paths, "EMBEDDED", SHIPPED)
    text = resolved.format_recipe(load_recipe(path), {}).replace(str(paths.EMBEDDED), "<embedded>")
    matches(f"resolved_{path.stem}", text)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe_has_goal_command_hardware_result_and_at_most_forty_lines(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line for line in lines if line.startswith("#")]
    for word in ("Goal:", "Command:", "Hardware:", "Result:"):
        assert any(word in line for line in comments), word
    assert f"recipes/{path.relative_to(FOLDER)}" in "".join(comments)
    assert len([line for line in lines if not line.startswith("#")]) <= 40


@pytest.mark.parametrize("path", ON_THE_HUB, ids=lambda p: p.stem)
def test_recipe_of_the_hub_trains_a_toy_model_on_toy_rows(path, here):
    """Only model, rows, number of steps and precision are replaced."""
    needs_template = "chat_template" in path.read_text(encoding="utf-8")
    model = models.base(here / "base") if needs_template else paths.EMBEDDED / "tiny"
    run = load_recipe(path)
    data = {}
    for part, number in (("train", 0), ("eval", 100)):
        data[part] = [
            _write_source(here / f"{part}-{n}.jsonl", source, ROWS[path.stem], number)
            for n, source in enumerate(run.sources[part])
        ]
    overrides = [
        f"model={{name_or_path: {model}}}",
        "train.max_steps=2",
        "train.output_dir=out",
        "train.max_length=512",
    ]
    overrides += [f"data.{part}={format_value(data[part])}" for part in ("train", "eval") if run.sources[part]]
    overrides += ["data.eval_fraction=0.1"] if "eval_fraction" in run.data else []
    overrides += ["evaluate={max_rows: 2, generation: {max_new_tokens: 4}}"]
    result = train(load_recipe(path, overrides))
    assert result.steps == 2
    assert json.loads((here / "out" / "eval.json").read_text())["prompts"] == 2
    assert (here / "out" / "adapter_config.json").exists() == (run.lora is not None)


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda p: p.stem)
def test_recipe_for_a_cluster_says_that_it_was_not_run(path):
    text = path.read_text(encoding="utf-8")
    assert "planned, not run" in text
    run = load_recipe(path)
    number = int(run.launch.get("nproc_per_node", 1)) * int(run.launch.get("nnodes", 1))
    assert processes.compute_settings(run, number)["train", "gradient_accumulation_steps"].value >= 1
