"""Runs on a CUDA device (`pytest -m gpu`): ways to tune, equal losses, exact resume, memory beside its estimate.

`--junitxml FILE` keeps the figures of the memory.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import RECIPE, jsonl
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from trl_sft import cli
from trl_sft.recipe import paths

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
TRAINED = RECIPE.replace("max_steps: 2", "max_steps: 8") + "  learning_rate: 1e-2\n"
FLOAT32 = ("train.bf16=false", "train.tf32=false")
LORA = "lora={r: 4, target_modules: all-linear}"
EIGHT = "quantization={load_in_8bit: true}"
FOUR = "quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4}"
PACKED = ("train.packing=true", "train.max_length=128")


@pytest.fixture(autouse=True)
def device():
    """Skip without the device."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def read_record(folder):
    """Return run.json of a run folder."""
    return json.loads((Path(folder) / "run.json").read_text())


def read_losses(folder):
    """Return the train losses that a run logged, in order."""
    entries = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.mark.parametrize(
    ("overrides", "dtypes", "quantization"),
    [
        ((), ["float32"], []),
        (("model.dtype=bfloat16",), ["bfloat16"], []),
        ((LORA,), ["float32"], []),
        ((LORA, EIGHT), None, ["8-bit"]),
        ((LORA, FOUR), None, ["4-bit"]),
        ((LORA, FOUR, *PACKED), None, ["4-bit"]),
        (PACKED, ["float32"], []),
        ((*PACKED, "train.gradient_checkpointing=true"), ["float32"], []),
        (("train.optim=adamw_8bit",), ["float32"], []),
        (("train.torch_compile=true",), ["float32"], []),
    ],
    ids=[
        "full",
        "bfloat16",
        "lora",
        "8-bit",
        "4-bit",
        "4-bit packed",
        "packed",
        "checkpointing",
        "adam 8-bit",
        "compile",
    ],
)
def test_run_trains_on_the_card_as_the_recipe_says(overrides, dtypes, quantization, go, here):
    code, out, err = go(TRAINED, *overrides)
    assert code == 0, err + out
    record = read_record(here / "out")
    assert record["hardware"]["device"] == DEVICE
    assert record["hardware"]["gpus"]
    measured = record["measured"]
    if dtypes:
        assert measured["before_training"]["weight_dtypes"] == dtypes
    assert [
        re.sub("^.*?([48]).*$", r"\1-bit", name) for name in measured["before_training"]["quantization"]
    ] == quantization
    assert measured["after_training"]["changed_tensors"] > 0
    losses = read_losses(here / "out")
    assert len(losses) == 8
    assert sum(losses[4:]) < sum(losses[:4])
    assert record["throughput"]["peak_memory_bytes"] > 0


def test_losses_on_the_card_equal_those_of_the_processor(go, here):
    assert go(TRAINED, *FLOAT32, "train.output_dir=card")[0] == 0
    assert go(TRAINED, *FLOAT32, "train.output_dir=processor", "train.use_cpu=true")[0] == 0
    assert read_record("processor")["hardware"]["device"] == "cpu"
    assert read_losses("card") == pytest.approx(read_losses("processor"), rel=1e-4)


def test_packed_documents_do_not_see_each_other_on_the_card(go, here):
    """One pack of all rows has the loss of the padded rows in one batch, in float32 and in bfloat16."""
    rows = [{"question": f"What is {n} plus {n}?", "answer": str(n + n)} for n in range(8)]
    jsonl(here / "rows.jsonl", rows)
    one_batch = ("train.max_steps=1", "train.max_length=1024")
    for precision, tolerance in ((FLOAT32, 1e-5), ((), 1e-2)):
        padded = go(TRAINED, *precision, *one_batch, "train.per_device_train_batch_size=8", "run.overwrite=true")
        assert padded[0] == 0, padded[2]
        expected = read_losses(here / "out")
        packed = go(
            TRAINED,
            *precision,
            *one_batch,
            "train.packing=true",
            "train.per_device_train_batch_size=1",
            "run.overwrite=true",
        )
        assert packed[0] == 0, packed[2]
        assert read_losses(here / "out") == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("overrides", [(), (LORA,), (LORA, FOUR)], ids=["full", "lora", "4-bit"])
def test_resumed_run_equals_an_uninterrupted_run_on_the_card(overrides, go, here, stop_after):
    saving = (*overrides, "train.save_strategy=steps", "train.save_steps=2")
    assert go(TRAINED, *saving, "train.output_dir=whole")[0] == 0
    stop_after(3)
    assert go(TRAINED, *saving)[0] == 143
    stop_after(None)
    code, _, err = go(None, *saving)
    assert code == 0, err
    assert read_losses("out") == pytest.approx(read_losses("whole"), rel=1e-6)


@pytest.mark.parametrize(
    ("overrides", "lowest", "highest"),
    [
        ((), 0.8, 1.25),
        ((LORA,), 0.8, 1.25),
        ((LORA, FOUR), 0.7, 1.5),
        (("train.gradient_checkpointing=true",), 0.8, 1.25),
    ],
    ids=["full", "lora", "4-bit", "checkpointing"],
)
def test_memory_of_a_step_is_near_its_estimate_on_the_card(overrides, lowest, highest, go, here, record_property):
    """The model has 8 layers of 1,024 and the toy's vocabulary, so that weights and activations count."""
    shutil.copytree(paths.EMBEDDED / "tiny", here / "model")
    config = LlamaConfig.from_pretrained(here / "model")
    config.update({"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "head_dim": 64})
    config.update({"num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 4096})
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(here / "model")
    jsonl(here / "rows.jsonl", [{"question": "What is next? " * 60, "answer": "it " * 200} for _ in range(8)])
    batch = ("model.name_or_path=model", "train.per_device_train_batch_size=4", "train.max_length=2048")
    code, out, err = go(TRAINED, *batch, *overrides, "--probe", command=["check"])
    assert code == 0, err
    match = re.search(r"^probe +([\d.]+) (\w+) at most in 2 steps of .*estimated: ([\d.]+) (\w+)", out, re.M)
    units = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    measured, estimated = (float(match[i]) * units[match[i + 1]] for i in (1, 3))
    record_property("memory", f"estimated {estimated / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB")
    assert lowest < estimated / measured < highest


def test_memory_that_a_batch_exceeds_ends_with_4_and_what_to_change(go, here):
    jsonl(here / "rows.jsonl", [{"question": "What is next? " * 40, "answer": "it " * 100} for _ in range(40)])
    torch.cuda.set_per_process_memory_fraction(0.0005)
    try:
        code, out, err = go(TRAINED, "train.per_device_train_batch_size=32")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert code == 4, err + out
    assert "train.per_device_train_batch_size" in err


def test_trained_model_answers_and_evaluates_on_the_card(go, here):
    """The model is saved, loads, and `evaluate` answers with both sides on the card."""
    words = (
        "train.max_steps=150",
        "train.learning_rate=3e-3",
        "train.per_device_train_batch_size=8",
        "data.eval_fraction=0.2",
    )
    code, out, err = go(TRAINED, *words)
    assert code == 0, err + out
    assert cli.main(["evaluate", "out", "--check", "exact"]) == 0
    lines = [json.loads(line) for line in (here / "out" / "evaluation.jsonl").read_text().splitlines()]
    assert lines
    loaded = AutoModelForCausalLM.from_pretrained(here / "out")
    assert all(torch.isfinite(value).all() for value in loaded.state_dict().values())


def test_time_of_a_run_is_estimated_before_step_1_on_the_card(go, here):
    code, out, err = go(TRAINED, "train.max_steps=300", "train.logging_steps=50")
    assert code == 0, err + out
    assert re.search(r"^ *time +.*\d+ s", out, re.M), out
    throughput = read_record(here / "out")["throughput"]
    assert throughput["tokens_per_second"] > 0
    assert throughput["forward_seconds"] > 0
