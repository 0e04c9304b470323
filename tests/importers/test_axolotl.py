"""axolotl's files become a recipe."""

import pytest
from importer_outcomes import join_comments, read_lines

from trl_sft.importers.recipe_parts import get_current_name

pytest_plugins = ["importer_fixtures"]


AXOLOTL = """\
base_model: NousResearch/Llama-3.2-1B
model_type: LlamaForCausalLM
tokenizer_type: AutoTokenizer
load_in_4bit: true
strict: false
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
  - path: fozziethebeat/alpaca_messages_2k_test
    type: chat_template
    field_messages: conversations
    message_property_mappings: {role: from, content: value}
    roles_to_train: [assistant, user]
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: ./outputs/qlora-out
adapter: qlora
lora_model_dir:
sequence_len: 2048
sample_packing: yes
eval_sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [gate_proj, down_proj]
wandb_project: mine
wandb_entity:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 2
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 2e-4
train_on_inputs: false
bf16: auto
tf32: false
gradient_checkpointing: true
resume_from_checkpoint:
logging_steps: 1
flash_attention: true
warmup_ratio: 0.1
evals_per_epoch: 4
saves_per_epoch: 1
weight_decay: 0.0
special_tokens:
  pad_token: "<|end_of_text|>"
lisa_n_layers: 4
lora_rr: 1
"""
OWN = {"format": "[{instruction}]", "field_instruction": "question", "field_output": "answer"}


def axolotl(**settings):
    return {
        "base_model": "trl_sft:tiny",
        "datasets": [{"path": "rows.jsonl", "type": "completion", "field": "answer"}],
    } | settings


def test_file_becomes_a_recipe(import_recipe, import_settings):
    run, out = import_recipe("axolotl", AXOLOTL)
    assert run.train == {
        **{"tf32": False, "logging_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        **{"num_train_epochs": 2, "max_length": 2048, "packing": True, "eval_packing": True, "learning_rate": 2e-4},
        **{"weight_decay": 0.0, "lr_scheduler_type": "cosine", "optim": "adamw_bnb_8bit", "warmup_steps": 0.1},
        **{"eval_strategy": "steps", "eval_steps": 0.125, "save_strategy": "steps", "save_steps": 0.5},
        **{"save_total_limit": 4, "report_to": ["wandb"], get_current_name("gradient_checkpointing"): True},
    }
    assert run.model == {"attn_implementation": "flash_attention_2", "dtype": "bfloat16"}
    assert run.lora == {"r": 32, "lora_alpha": 16, "lora_dropout": 0.05, "target_modules": ["gate_proj", "down_proj"]}
    assert run.quantization == {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    assert run.data == {"eval_fraction": 0.1, "overlong": "drop"}
    assert run.tokenizer == {"pad_token": "<|end_of_text|>"}
    alpaca, chat = run.sources["train"]
    assert alpaca.format == "imported_rows.py:rows_1"
    assert (chat.format, chat.wording, chat.rename) == ("sharegpt", "chat", {})
    for name in (
        "model_type: ",
        "dataset_prepared_path: ",
        "train_on_inputs: ",
        "weights: lisa_n_layers: ",
        "lora_rr: ",
    ):
        assert name in join_comments(out), name
    code, _, err = import_settings("axolotl", AXOLOTL)
    assert code == 5
    assert (
        "unknown    config.yaml:48 lora_rr: 1\n             -> trl_sft does not know this setting. Did you mean" in err
    )
    assert "weights    config.yaml:47 lisa_n_layers: 4\n             -> trl_sft does not support this setting." in err
    assert 'mask       config.yaml:13 datasets.1.roles_to_train: ["assistant", "user"]' in err


def test_defaults_become_lines(import_recipe):
    run, out = import_recipe("axolotl", axolotl())
    assert run.train == {
        **{
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "num_train_epochs": 1.0,
            "packing": True,
            "packing_strategy": "bfd_split",
        },
        **{"max_length": 512, "learning_rate": 5e-5, "weight_decay": 0.0, "lr_scheduler_type": "cosine"},
        **{"optim": "adamw_torch_fused", "warmup_steps": 0.03, "save_strategy": "epoch", "save_total_limit": 4},
        get_current_name("gradient_checkpointing"): False,
    }
    assert run.sources["train"][0].rename == {"answer": "text"}
    assert out.count("axolotl's default") >= 10


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"train_on_inputs": True}, {"data.loss_on": "all"}),
        ({"excess_length_strategy": "raise"}, {"data.overlong": None}),
        (
            {"excess_length_strategy": "raise", "datasets": [{"path": "rows.jsonl", "type": "alpaca"}]},
            {"data.overlong": "error", "train.packing": False},
        ),
        ({"chat_template": "chatml"}, {"tokenizer.chat_template": "chatml"}),
        ({"chat_template": "tokenizer_default_fallback_qwen_25"}, {"tokenizer.chat_template": None}),
        ({"chat_template": "qwen_25"}, {"tokenizer.chat_template": "qwen2_5"}),
        (
            {"adapter": "lora", "lora_r": 8, "lora_target_linear": True},
            {"lora.target_modules": "all-linear", "lora.lora_dropout": 0.0},
        ),
        ({"adapter": "lora", "load_in_8bit": True, "lora_target_linear": True}, {"quantization.load_in_8bit": True}),
        ({"tokens": {"bos_token": "<s>"}}, {"tokenizer.bos_token": "<s>"}),
        (
            {"tokens": ["<a>"], "special_tokens": {"additional_special_tokens": ["<b>"]}},
            {"tokenizer.extra_special_tokens": ["<b>", "<a>"]},
        ),
        ({"batch_size": 8, "micro_batch_size": 2}, {"train.gradient_accumulation_steps": 4}),
        ({"bf16": True}, {"train.bf16": True, "model.dtype": "bfloat16"}),
        ({"bf16": False}, {"train.bf16": False, "model.dtype": None}),
        ({"lr_scheduler": "rex"}, {"train.lr_scheduler_type": "cosine"}),
        ({"optimizer": "muon"}, {"train.optim": None}),
        ({"test_datasets": [{"path": "rows.jsonl", "type": "completion"}], "eval_steps": 5}, {"train.eval_steps": 5}),
        ({"gradient_checkpointing": "offload"}, {f"train.{get_current_name('gradient_checkpointing')}": True}),
        ({"auto_resume_from_checkpoints": True}, {"run.resume": "auto"}),
        ({"fsdp_config": {"offload_params": True}}, {"launch.engine": "fsdp"}),
        (
            {
                "pretraining_dataset": [{"path": "rows.jsonl", "text_column": "answer"}],
                "datasets": None,
                "max_steps": 3,
            },
            {"train.max_steps": 3},
        ),
        (
            {
                "datasets": [
                    {
                        "path": "rows.jsonl",
                        "type": {
                            "format": "[{instruction}]",
                            "field_instruction": "question",
                            "field_output": "answer",
                        },
                    }
                ]
            },
            {"data.train": {"path": "rows.jsonl", "format": "imported_rows.py:rows_1", "wording": "plain"}},
        ),
    ],
)
def test_settings_become_lines(import_recipe, settings, expected):
    values = read_lines(import_recipe("axolotl", axolotl(**settings))[1])
    assert {key: values.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rl": "dpo"}, 'config.yaml:1 rl\n    the value is "dpo"'),
        ({"adapter": "ia3"}, "`lora` or `qlora`"),
        ({"datasets": None}, "the settings name no training rows"),
        ({"base_model": None}, "the settings name no model"),
        ({"sequence_len": "long"}, 'sequence_len train.max_length\n    the value is "long" (text)'),
        ({"datasets": [{"type": "alpaca"}]}, "a data set has no path"),
    ],
)
def test_value_that_cannot_be_converted_is_a_fault_at_its_line(import_settings, settings, message):
    code, _, err = import_settings("axolotl", axolotl(**settings))
    assert code == 2
    assert message in err
    assert "Traceback" not in err
