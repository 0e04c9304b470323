"""The proof of an export: right exports pass, and each planted fault is named with its step."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import QUESTIONS, jsonl
from safetensors.torch import load_file, save_file

from trl_sft import cli
from trl_sft.recipe import paths
from trl_sft.serving import model_folder, proof

RECIPE = """\
model: {{name_or_path: {folder}/base}}
data: {{train: {{path: {folder}/rows.jsonl}}, eval_fraction: 0.2}}
lora: {{r: 4, target_modules: all-linear}}
train:
  output_dir: {folder}/run
  max_steps: 4
  per_device_train_batch_size: 4
  learning_rate: 0.02
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Train an adapter on a base of its own, and merge it; return the folder with `base`, `run` and `merged`."""
    folder = tmp_path_factory.mktemp("proof")
    shutil.copytree(paths.EMBEDDED / "tiny", folder / "base")
    jsonl(folder / "rows.jsonl", QUESTIONS)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder), encoding="utf-8")
    assert cli.main([str(folder / "recipe.yaml")]) == 0
    assert cli.main(["merge", str(folder / "run"), "-o", str(folder / "merged"), "--dtype", "float32"]) == 0
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    """Return the trained model's answers, and how far its base is."""
    return proof.measure(model_folder.find_model(folder / "run"))


@pytest.fixture
def copy(folder, tmp_path):
    """Return a copy of the merged folder, to plant a fault in."""
    shutil.copytree(folder / "merged", tmp_path / "copy")
    return tmp_path / "copy"


def prove(path, reference, number_type="float32"):
    """Return the result of the proof of one folder, and its description after a round trip through JSON."""
    result = proof.prove([proof.ExportedModel(proof.MERGED, path, number_type)], reference)
    return result, json.loads(json.dumps(result.describe(), allow_nan=False))


def test_merged_folder_is_proved_on_held_out_prompts_and_training_rows(folder, reference):
    result, content = prove(folder / "merged", reference)
    assert result.passed, result.faults
    assert (content["prompts"], content["reference"]) == ({"held_out": 8, "training": 20, "own": 0}, "adapter")
    reader = content["exports"][0]["readers"][0]
    assert reader["equal_answers"] == reader["answers"] == reader["prompts"]["equal"] == 28
    assert content["base"]["mean_kl"] > 100 * reader["mean_kl"]
    assert "answers equal 28/28" in str(result.list_lines())


def change_text(path, old, new):
    """Replace a text in a file, where it stands."""
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


def change_json(path, **values):
    """Set values of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values), encoding="utf-8")


def put_base_weights(copy, folder):
    shutil.copy(folder / "base" / "model.safetensors", copy)


def shift_base_weights(copy, folder):
    tensors = {name: tensor.roll(1, 0) for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})


def lose_stop_token(copy, folder):
    change_json(copy / "generation_config.json", eos_token_id=3)
    change_json(copy / "config.json", eos_token_id=3)
    change_json(copy / "tokenizer_config.json", eos_token="<|endoftext|>")


FAULTS = {
    "wrong template": (
        "template",
        "are rendered otherwise",
        lambda copy, _: change_text(copy / "chat_template.jinja", "<|im_start|>", "### "),
    ),
    "adapter not merged": ("merge", "those of the base model", put_base_weights),
    "another base": ("merge", "are not the trained ones", shift_base_weights),
    "stop token lost": ("template", "does not end an answer", lose_stop_token),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_of_a_folder_is_named_with_its_step(fault, folder, copy, reference):
    step, words, plant = FAULTS[fault]
    plant(copy, Path(folder))
    result, content = prove(copy, reference)
    assert not result.passed
    assert content["exports"][0]["step_at_fault"] == step
    assert words in result.faults[0].problem
