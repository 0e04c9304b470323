"""What the tests of chat and serve share: three trained runs, their models, and the schema of answers for programs."""

import json
import re
import shutil
from pathlib import Path

import jsonschema
from conftest import QUESTIONS, SHIPPED, jsonl

from trl_sft import cli
from trl_sft.serving import answers, model_folder

_TRAINED = {}  # "folder": of this process

RECIPE = """\
model: {{name_or_path: base}}
data: {{train: {{path: rows.jsonl{source}}}, eval_fraction: 0.2}}
{lora}
evaluate: {{generation: {{max_new_tokens: 6}}}}
train:
  output_dir: {name}
  max_steps: 4
  per_device_train_batch_size: 4
  learning_rate: {rate}
  save_steps: 2
"""
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "json.md"
BLOCK = re.search(r"<!-- schema -->\n```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1]
SCHEMA = jsonschema.Draft202012Validator(json.loads(BLOCK))


def train_runs(tmp_path_factory):
    """Train all weights, LoRA on a base of its own, and prompts with Alpaca's wording; return the folder."""
    if "folder" in _TRAINED:
        return _TRAINED["folder"]
    folder = tmp_path_factory.mktemp("chat")
    shutil.copytree(SHIPPED / "tiny", folder / "base")
    jsonl(folder / "rows.jsonl", QUESTIONS)
    for name, lora, source, rate in (  # the answers of each run differ from those of its base
        ("full", "", "", 0.004),
        ("lora", "lora: {r: 4, target_modules: all-linear}", "", 0.02),
        ("alpaca", "", ", wording: alpaca", 0.004),
    ):
        text = RECIPE.format(lora=lora, name=folder / name, source=source, rate=rate)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
        assert cli.main([str(folder / f"{name}.yaml")]) == 0
    _TRAINED["folder"] = folder
    return folder


def load_chats(folder):
    """Return the three models, loaded as the commands load them, with their base models."""

    def load(name):
        source = model_folder.find_model(folder / name)
        return answers.open_model(source, compares_base=True, options={}, seed=None, trusts_code=False)

    return {name: load(name) for name in ("full", "lora", "alpaca")}
