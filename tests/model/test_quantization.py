"""8-bit and 4-bit weights under LoRA: trained for real on the CPU, counted, refused where they cannot be."""

import json

import pytest
import torch
from safetensors.torch import load_file

from trl_sft.model import device, needed_packages, patches
from trl_sft.training import stages

EIGHT = "quantization: {load_in_8bit: true}\n"
FOUR = "quantization: {load_in_4bit: true, bnb_4bit_quant_type: nf4}\n"
RECIPE = """\
model: {name_or_path: trl_sft:tiny}
lora: {r: 8, target_modules: all-linear}
data: {train: rows.jsonl, eval_fraction: 0.2}
train:
  output_dir: out
  max_steps: 4
  learning_rate: 1e-2
  per_device_train_batch_size: 8
  save_steps: 2
  logging_steps: 1
"""


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def equal(one, other):
    assert set(one) == set(other)
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("section", "bits"), [(EIGHT, 8), (FOUR, 4)], ids=["8-bit", "4-bit"])
def test_quantized_lora_trains_counted_and_resumes_bit_equal(section, bits, go, here):
    code, out, err = go(section + RECIPE, "train.max_steps=30", "train.save_steps=15")
    assert code == 0, err
    assert f"14 linear layers in {bits} bits; 1 not" in out
    assert "of 160,064 parameters" in out  # 4-bit weights lie two in a byte; parameters are counted all the same
    losses = [json.loads(line).get("loss") for line in (here / "out" / "log.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < losses[0] - 0.5
    code, _, err = go(
        None, "train.max_steps=30", "train.save_steps=15", "train.output_dir=b", "run.resume=out/checkpoint-15"
    )
    assert code == 0, err
    assert equal(adapter(here / "out"), adapter(here / "b"))


def test_four_bit_gradients_are_the_same_after_an_evaluation(go, here, monkeypatch):
    """bitsandbytes packs 4-bit weights for its CPU kernel at the first evaluation, which has no backward."""
    for folder, evaluates in (("a", "true"), ("b", "false")):
        assert go(FOUR + RECIPE, f"train.eval_on_start={evaluates}", f"train.output_dir={folder}")[0] == 0
    assert equal(adapter(here / "a"), adapter(here / "b"))
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("without AVX512-BF16 bitsandbytes packs nothing, so the repair has nothing to do")
    monkeypatch.setattr(patches, "keep_backward_of_4bit_weights", lambda _: None)
    assert go(FOUR + RECIPE, "train.eval_on_start=true", "train.output_dir=c")[0] == 0
    assert not equal(adapter(here / "a"), adapter(here / "c")), (
        "bitsandbytes is repaired: remove patches.keep_backward_of_4bit_weights"
    )


def test_four_bit_computes_in_bfloat16_where_the_machine_trains_in_it():
    four = {"load_in_4bit": True}
    key = ("quantization", "bnb_4bit_compute_dtype")
    assert device.choose_machine_settings({"bf16": True, "use_cpu": True}, four)[key].value == "bfloat16"
    assert key not in device.choose_machine_settings({"use_cpu": True}, four)  # the CPU trains in float32
    assert key not in device.choose_machine_settings({"bf16": True}, four | {"bnb_4bit_compute_dtype": "float16"})
    assert key not in device.choose_machine_settings({"bf16": True}, {"load_in_8bit": True})


def test_compute_dtype_reaches_the_layers_and_the_record(go, here, monkeypatch):
    seen = {}
    repair = patches.repair
    monkeypatch.setattr(patches, "repair", lambda live: (seen.update(live=live), repair(live)))
    assert go(FOUR + RECIPE, "train.bf16=true", "train.use_cpu=true", "train.max_steps=1")[0] == 0
    layers = [m for m in seen["live"].modules() if type(m).__module__.startswith("bitsandbytes.")]
    assert {layer.compute_dtype for layer in layers} == {torch.bfloat16}
    assert {layer.weight.quant_type for layer in layers} == {"nf4"}
    resolved = (here / "out" / "resolved.yaml").read_text()
    assert 'bnb_4bit_compute_dtype: "bfloat16"  # trl_sft:' in resolved


def test_missing_bitsandbytes_is_reported_before_anything_loads(go, monkeypatch):
    monkeypatch.setattr(needed_packages, "is_installed", lambda modules: False)
    monkeypatch.setattr(stages, "find_model", None)
    code, _, err = go(EIGHT + RECIPE)
    assert code == 2
    assert "pip install 'trl-sft[quantization]'" in err


def test_missing_packages_are_told_all_at_once_with_one_line_for_pip(go, monkeypatch):
    monkeypatch.setattr(needed_packages, "is_installed", lambda modules: False)
    train = ("train.report_to=[wandb, mlflow]", "train.use_liger_kernel=true", "train.optim=adamw_bnb_8bit")
    code, _, err = go(EIGHT + RECIPE, *train)
    assert code == 2
    assert err.count("pip install") == 1
    assert "`pip install liger-kernel mlflow 'trl-sft[quantization]' wandb` in this Python environment" in err
    assert "wandb (for `train.report_to`)" in err


@pytest.mark.parametrize("section", ["", EIGHT])
def test_model_that_was_saved_quantized_otherwise_is_refused(section, go, here):
    import shutil

    from trl_sft.recipe import paths

    shutil.copytree(paths.EMBEDDED / "tiny", here / "m")
    config = json.loads((here / "m" / "config.json").read_text())
    (here / "m" / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    recipe = RECIPE.replace("trl_sft:tiny", "./m")
    code, _, err = go(
        section + (recipe if section else recipe.replace("lora: {r: 8, target_modules: all-linear}\n", ""))
    )
    assert code == 2
    assert "was saved quantized by gptq" in err


def test_training_continues_an_adapter_on_quantized_weights(go, here):
    assert go(EIGHT + RECIPE)[0] == 0
    text = (
        "model: {name_or_path: ./out}\n" + EIGHT + "data: {train: rows.jsonl}\ntrain: {output_dir: b, max_steps: 2}\n"
    )
    code, out, err = go(text)
    assert code == 0, err
    assert "14 linear layers in 8 bits" in out
    assert not equal(adapter(here / "out"), adapter(here / "b"))


def test_output_is_not_written_over_the_adapter_that_training_starts_from(go, here):
    assert go(RECIPE, "train.max_steps=1")[0] == 0
    before = adapter(here / "out")
    code, _, err = go(
        "model: {name_or_path: ./out}\ndata: {train: rows.jsonl}\ntrain: {output_dir: out}\nrun: {overwrite: true}\n"
    )
    assert code == 2
    assert "holds the model that training starts from" in err
    assert equal(before, adapter(here / "out"))
