"""Benchmarks give other trainers the values of the recipe and count FLOPs correctly."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from conftest import SHIPPED, jsonl
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainingArguments
from trl import ModelConfig, ScriptArguments, SFTConfig

from trl_sft.recipe import paths

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RECIPE = """\
model: {name_or_path: trl_sft:tiny, attn_implementation: sdpa}
quantization: {load_in_4bit: true, bnb_4bit_quant_type: nf4}
lora: {r: 8, lora_alpha: 24, target_modules: all-linear, init_lora_weights: gaussian}
data:
  train: {path: rows.jsonl, max_rows: 30}
  eval_fraction: 0.2
  overlong: truncate_and_end
train:
  output_dir: out
  max_steps: 7
  per_device_train_batch_size: 3
  gradient_accumulation_steps: 5
  learning_rate: 3e-4
  lr_scheduler_type: cosine
  warmup_ratio: 0.25
  max_length: 96
  packing: true
  seed: 11
  label_smoothing_factor: 0.1
  logging_steps: 2
  save_strategy: 'no'
evaluate: {max_rows: 4}
run: {max_hours: 2}
"""


@pytest.fixture
def other_trainers(monkeypatch):
    """The benchmark's module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(paths, "EMBEDDED", SHIPPED)
    import other_trainers

    return other_trainers


@pytest.fixture
def write(other_trainers, here):
    """Write a recipe for all trainers; return the prepared run, the translations, and the configurations."""
    if SFTConfig(output_dir=str(here), use_cpu=True).loss_type == "chunked_nll":
        pytest.skip("this TRL cannot smooth labels with its default loss")

    def call(text=RECIPE):
        (here / "recipe.yaml").write_text(text, encoding="utf-8")
        prepared = other_trainers.prepare(here / "recipe.yaml", here / "others")
        translations = other_trainers.write(prepared)
        configs = {name: yaml.safe_load((here / f"others/{name}.yaml").read_text()) for name in translations}
        return prepared, translations, configs

    return call


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_trainer_receives_the_values_of_the_recipe(write):
    _, _, configs = write()
    axolotl, llamafactory, trl = configs.values()
    settings = {
        "model": ("base_model", "model_name_or_path", "model_name_or_path", str(SHIPPED / "tiny")),
        "steps": ("max_steps", "max_steps", "max_steps", 7),
        "rows": ("micro_batch_size", "per_device_train_batch_size", "per_device_train_batch_size", 3),
        "accumulation": (*["gradient_accumulation_steps"] * 3, 5),
        "learning rate": ("learning_rate", "learning_rate", "learning_rate", 3e-4),
        "schedule": ("lr_scheduler", "lr_scheduler_type", "lr_scheduler_type", "cosine"),
        "warm-up": ("warmup_ratio", "warmup_steps", "warmup_steps", 0.25),
        "length": ("sequence_len", "cutoff_len", "max_length", 96),
        "packing": ("sample_packing", "neat_packing", "packing", True),
        "seed": ("seed", "seed", "seed", 11),
        "precision": ("bf16", "bf16", "bf16", False),  # a default that follows from the machine
        "clipping": ("max_grad_norm", "max_grad_norm", "max_grad_norm", 1.0),  # SFTConfig's default
        "rank": ("lora_r", "lora_rank", "lora_r", 8),
        "alpha": ("lora_alpha", "lora_alpha", "lora_alpha", 24),
        "dropout": ("lora_dropout", "lora_dropout", "lora_dropout", 0.0),  # peft's default
    }
    for title, (*names, value) in settings.items():
        assert [config[name] for config, name in zip(configs.values(), names, strict=True)] == [value] * 3, title
    assert (axolotl["adapter"], axolotl["lora_target_linear"]) == ("qlora", True)
    assert axolotl["bnb_config_kwargs"]["bnb_4bit_quant_type"] == "nf4"
    assert axolotl["bnb_config_kwargs"]["bnb_4bit_use_double_quant"] is False  # axolotl's own default is true
    assert (llamafactory["lora_target"], llamafactory["finetuning_type"]) == ("all", "lora")
    assert [llamafactory[name] for name in ("quantization_bit", "quantization_type")] == [4, "nf4"]
    assert (trl["use_peft"], trl["lora_target_modules"]) == (True, ["all-linear"])
    assert [trl[name] for name in ("load_in_4bit", "bnb_4bit_quant_type")] == [True, "nf4"]


def test_every_key_is_either_translated_or_listed_as_missing(other_trainers, write, here, capsys):
    _, translations, _ = write()
    recipe = yaml.safe_load(RECIPE)
    keys = {f"{section}.{name}" for section, values in recipe.items() for name in values}
    keys |= {f"data.train.{name}" for name in recipe["data"]["train"]} | {"train.warmup_steps"}
    keys -= {"train.warmup_ratio"}  # its old name
    for trainer, translation in translations.items():
        assert keys <= set(translation.carried) | set(translation.missing), trainer
        assert not set(translation.carried) & set(translation.missing), trainer
    missing = {trainer: set(translation.missing) & keys for trainer, translation in translations.items()}
    everywhere = {"evaluate.max_rows", "run.max_hours", "data.overlong"}
    assert missing["axolotl"] == everywhere | {"train.label_smoothing_factor"}
    assert missing["llamafactory"] == everywhere | {"lora.init_lora_weights"}
    assert missing["trl"] == everywhere | {"lora.init_lora_weights"}
    other_trainers.main(here / "recipe.yaml", here / "others")
    out = capsys.readouterr().out
    assert "no equivalent: train.label_smoothing_factor (0.1)" in out
    assert out.count("no equivalent: run.max_hours (2)") == 3


def test_key_without_an_equivalent_is_listed_as_missing(write):
    _, translations, _ = write(RECIPE + "tokenizer: {padding_side: left}\nlaunch: {nproc_per_node: 1}\n")
    for trainer, translation in translations.items():
        assert {"tokenizer.padding_side", "launch.nproc_per_node"} <= set(translation.missing), trainer


def test_global_batch_size_is_written_as_gradient_accumulation_steps(write):
    text = RECIPE.replace("  gradient_accumulation_steps: 5\n", "").replace("max_hours: 2", "global_batch_size: 12")
    _, translations, configs = write(text)
    assert [config["gradient_accumulation_steps"] for config in configs.values()] == [4, 4, 4]
    assert all("run.global_batch_size" in translation.carried for translation in translations.values())


def test_keys_written_for_trl_and_llamafactory_exist_there(write):
    _, _, configs = write()
    trl = {field.name for owner in (SFTConfig, ModelConfig, ScriptArguments) for field in fields(owner)}
    assert set(configs["trl"]) <= trl
    llamafactory = {  # of its ModelArguments, DataArguments and FinetuningArguments in 0.9.5
        *("stage", "dataset", "finetuning_type", "dataset_dir", "quantization_method", "model_name_or_path"),
        *("flash_attn", "lora_rank", "lora_alpha", "lora_dropout", "lora_target", "quantization_bit"),
        *("quantization_type", "double_quantization", "packing", "neat_packing", "cutoff_len"),
        *("disable_gradient_checkpointing",),
    }
    assert set(configs["llamafactory"]) <= llamafactory | {field.name for field in fields(TrainingArguments)}


def test_rows_of_other_trainers_equal_those_of_a_run(write, here):
    prepared, _, configs = write()
    train_rows = read_rows(here / "others" / "rows.jsonl")
    eval_rows = read_rows(here / "others" / "held_out.jsonl")
    trl_rows = read_rows(here / "others" / "trl" / "train.jsonl")
    assert (len(train_rows), len(eval_rows)) == (24, 6)
    questions = [row["messages"][0]["content"] for row in train_rows]
    split = prepared.rows.train
    assert questions == [split.rows[int(number)]["prompt"][0]["content"] for number in split.order]
    assert not set(questions) & {row["messages"][0]["content"] for row in eval_rows}
    assert all([turn["train"] for turn in row["messages"]] == [False, True] for row in train_rows)
    assert [row["prompt"][0]["content"] for row in trl_rows] == questions
    assert configs["axolotl"]["datasets"][0]["message_field_training"] == "train"
    info = json.loads((here / "others" / "dataset_info.json").read_text())
    assert set(info) == {"rows", "held_out"}


def test_rows_with_tool_calls_are_refused(write, here):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    turns += [{"role": "tool", "content": "2"}, {"role": "assistant", "content": "2"}]
    jsonl(here / "rows.jsonl", [{"messages": turns, "tools": json.dumps([{"name": "add"}])}] * 4)
    with pytest.raises(SystemExit, match="cannot be written"):
        write("model: {name_or_path: trl_sft:tiny}\ndata: {train: rows.jsonl}\ntokenizer: {chat_template: qwen3}\n")


@pytest.fixture
def options(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    options = gpu.parse_options(["--device", "cpu", "--tiny", "--peak", "1"])
    options.until = 0
    return options


def test_flops_of_a_step_equal_those_that_pytorch_counts(options):
    """PyTorch counts attention without causality: twice of what is needed."""
    import mfu

    shape = options.shape
    model = Qwen2ForCausalLM(Qwen2Config(**shape, attn_implementation="eager"))  # others are not counted on a CPU
    _, documents = mfu.build_rows(options)
    with FlopCounterMode(display=False) as counter:
        for ids in documents["input_ids"]:
            model(torch.tensor([ids]), labels=torch.tensor([ids]), use_cache=False).loss.backward()
    token_pairs = sum(len(ids) ** 2 for ids in documents["input_ids"])
    unmasked = 6 * shape["num_hidden_layers"] * shape["hidden_size"] * token_pairs
    assert mfu.count_flops(options, frozen=False) * options.steps + unmasked == pytest.approx(
        counter.get_total_flops(), rel=0.001
    )


def test_measurement_with_different_losses_has_no_ratio(options):
    import gpu

    one = {"side": ["sdpa", "trl"], "seconds": 4.0, "losses": [6.0, 5.0], "gib": None}
    two = one | {"side": ["documents", "trl_sft"], "seconds": 1.0}
    off = one | {"side": ["sdpa", "trl_sft"], "seconds": 1.0, "losses": [6.0, 5.1]}
    cells = {(cell["attention"], cell["loss"]): cell for cell in gpu.make_cells(0, [one, two, off, two], options)}
    assert cells["documents", "trl_sft"]["ratio"] == 4.0
    assert cells["documents", "trl_sft"]["runs"] == 2
    assert cells["documents", "trl_sft"]["tokens_per_second"] == options.packs * options.length
    assert cells["sdpa", "trl_sft"]["ratio"] is None
    assert cells["documents", "trl"]["skipped"] == "not reached"


def test_gpu_benchmark_is_skipped_without_a_cuda_device():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = subprocess.run([sys.executable, BENCHMARKS / "gpu.py"], capture_output=True, text=True, check=True)
    assert done.stdout == "skipped: no CUDA device\n"


def test_documentation_lists_every_benchmark():
    text = (BENCHMARKS.parent / "docs" / "development" / "benchmarks.md").read_text(encoding="utf-8")
    listed = {path.name for path in BENCHMARKS.glob("*.py")}
    assert {name for name in listed if f"`benchmarks/{name}" not in text} == set()
