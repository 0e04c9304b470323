"""Files of TRL's and alignment-handbook's sft scripts become a recipe."""

import json
from pathlib import Path

import pytest
from conftest import jsonl
from importer_outcomes import join_comments

from trl_sft import cli

pytest_plugins = ["importer_fixtures"]


TRL = {
    **{"model_name_or_path": "trl_sft:tiny", "dtype": "bfloat16", "use_peft": True, "lora_r": 8, "load_in_4bit": True},
    **{"lora_target_modules": ["q_proj"], "dataset_name": "rows.jsonl", "dataset_test_split": "train"},
    **{"learning_rate": 1e-4, "packing": True, "eval_strategy": "steps", "eval_steps": 5, "output_dir": "out"},
    **{"gradient_checkpointing_use_reentrant": True, "resume_from_checkpoint": True, "assistant_only_loss": True},
}
HANDBOOK = """\
model_name_or_path: HuggingFaceTB/SmolLM2-135M
model_revision: main
torch_dtype: bfloat16
use_flash_attention_2: true
chat_template: "{% for message in messages %}{{ message }}{% endfor %}"
dataset_mixer:
  HuggingFaceH4/ultrachat_200k: 0.5
dataset_splits:
- train_sft
- test_sft
preprocessing_num_workers: 12
bf16: true
do_eval: true
evaluation_strategy: epoch
gradient_checkpointing: true
learning_rate: 2.0e-05
log_level: info
logging_steps: 5
lr_scheduler_type: cosine
max_seq_length: 2048
max_steps: -1
num_train_epochs: 1
output_dir: data/zephyr
overwrite_output_dir: true
per_device_train_batch_size: 16
remove_unused_columns: true
report_to:
- tensorboard
save_strategy: "no"
seed: 42
warmup_ratio: 0.1
not_a_name: 1
"""


def test_file_becomes_a_recipe(import_recipe):
    run, out = import_recipe("trl", TRL)
    assert run.train == {
        **{"learning_rate": 1e-4, "packing": True, "eval_strategy": "steps", "eval_steps": 5},
        **{"gradient_checkpointing_kwargs": {"use_reentrant": True}},
    }
    assert run.data == {"loss_on": "assistant"}
    assert run.lora == {
        **{"r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"},
    }
    assert run.quantization == {
        **{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False},
        **{"bnb_4bit_compute_dtype": "bfloat16"},
    }
    assert run.options == {"resume": "auto"}
    assert "TRL's default" in out


def test_mixture_becomes_sources_with_a_comment_on_the_loss(import_recipe):
    run, out = import_recipe(
        "trl",
        "model_name_or_path: m\ndatasets:\n- {path: a/b, split: train_sft, fraction: 0.25}\n"
        "- {path: c/d, fraction: 0.75}\n",
    )
    assert [source.load_kwargs for source in run.sources["train"]] == [{"split": "train_sft"}, {}]
    assert [source.weight for source in run.sources["train"]] == [0.25, 0.75]
    assert run.data["loss_on"] == "all"
    assert "TRL trains every token of chats and texts" in join_comments(out)


@pytest.mark.parametrize(("stage", "engine"), [(0, "ddp"), (1, "zero1"), (2, "zero2"), (3, "zero3")])
def test_deepspeed_file_sets_the_engine(import_recipe, here, stage, engine):
    (here / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    run, _ = import_recipe("trl", {"model_name_or_path": "m", "dataset_name": "X", "deepspeed": "ds.json"})
    assert run.launch["engine"] == engine
    assert ("config" in run.launch) is (stage > 0)


def test_alignment_handbook_mixture_becomes_sources(import_recipe):
    entry = "{id: a/b, config: all, split: train, columns: [messages, chat_template_kwargs], weight: 0.3}"
    mixture = f"{{datasets: [{entry}], test_split_size: 0.1, seed: 0}}"
    text = f"model_name_or_path: m\ndataset_mixture: {mixture}\nhub_token: SECRET\n"
    run, out = import_recipe("alignment-handbook", text)
    assert run.sources["train"][0].load_kwargs == {"name": "all", "split": "train[:30%]"}
    assert run.data["eval_fraction"] == 0.1
    assert "SECRET" not in out
    for words in ("datasets.0.columns", "`chat_template_kwargs` of a row", "dataset_mixture.seed: 0"):
        assert words in join_comments(out)


def test_alignment_handbook_file_becomes_a_recipe(import_recipe, import_settings):
    run, out = import_recipe("alignment-handbook", HANDBOOK, differs=True)
    assert run.model == {"revision": "main", "dtype": "bfloat16", "attn_implementation": "flash_attention_2"}
    assert [source.load_kwargs for part in ("train", "eval") for source in run.sources[part]] == [
        {"split": "train_sft[:50%]"},
        {"split": "test_sft"},
    ]
    assert {
        "max_length": 2048,
        "warmup_steps": 0.1,
        "eval_strategy": "epoch",
        "dataset_num_proc": 12,
    }.items() <= run.train.items()
    assert run.options == {"overwrite": True, "allow": ["leaking_packing"]}
    assert (run.train["packing"], run.train["packing_strategy"]) == (True, "wrapped")
    err = import_settings("alignment-handbook", HANDBOOK)[2]
    assert Path(run.chat_template.name).name == "imported.jinja"
    assert "unknown    config.yaml:32 not_a_name: 1" in err
    assert "an empty system prompt before a chat without one" in " ".join(err.split())
    assert "do_eval: true" in join_comments(out)


def test_null_and_zero_with_a_meaning_are_not_dropped(import_recipe, here, capsys):
    run, _ = import_recipe("trl", "model_name_or_path: m\ndataset_name: a/b\nmax_length: null\n")
    assert "max_length" in run.train
    assert run.train["max_length"] is None
    for line in ("use_peft: true\nlora_r: 0", "use_peft: maybe", "load_in_4bit: perhaps"):
        (here / "sft.yaml").write_text(f"model_name_or_path: m\ndataset_name: a/b\n{line}\n")
        assert cli.main(["import", "trl", "sft.yaml"]) == 2, line
        assert "Traceback" not in capsys.readouterr().err


def test_wrapped_packs_are_accepted_as_in_trl(import_recipe, here):
    jsonl("rows.jsonl", [{"text": f"The upper case of abc is ABC. {n}"} for n in range(40)])
    settings = {"model_name_or_path": "trl_sft:tiny", "dataset_name": "rows.jsonl", "bf16": False}
    run, _ = import_recipe("trl", settings | {"packing": True, "packing_strategy": "wrapped", "max_length": 64})
    assert run.options["allow"] == ["leaking_packing"]
    assert cli.main(["check", "imported.yaml"]) == 0
