"""axolotl's files become a recipe."""

import pytest
from importer_outcomes import join_comments, read_lines
from trl import SFTConfig

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
        **{"load_best_model_at_end": True, "average_tokens_across_devices": False},
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
        **{get_current_name("gradient_checkpointing"): False, "average_tokens_across_devices": False},
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
        ({"bf16": "full"}, {"train.bf16": False, "model.dtype": "bfloat16"}),
        (
            {"bf16": False, "fp16": False, "float16": True},
            {"train.bf16": False, "train.fp16": None, "model.dtype": "float16"},
        ),
        ({"bf16": True, "float16": True}, {"train.bf16": True, "model.dtype": "bfloat16"}),
        (
            {"sample_packing": True, "eval_sample_packing": False, "datasets": [{"path": "org/a", "type": "alpaca"}]},
            {"train.dataloader_drop_last": True},
        ),
        (
            {"datasets": [{"path": "org/chats", "name": ["one", "two"], "type": "chat_template"}]},
            {
                "data.train": [
                    {"path": "org/chats", "name": name, "format": "messages", "wording": "chat"}
                    for name in ("one", "two")
                ]
            },
        ),
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


CHAT = {"path": "org/chats", "type": "chat_template"}


@pytest.mark.parametrize(
    ("settings", "affects", "words"),
    [
        ({"train_on_inputs": True, "datasets": [CHAT]}, "mask", "the template's own words between them"),
        ({"chat_template": "alpaca", "datasets": [CHAT]}, "wording", "has no introduction of its own"),
        ({"datasets": [CHAT | {"chat_template": "phi_3"}]}, "wording", "ends with the end-of-text token"),
        ({"datasets": [{"path": "org/chats", "type": "sharegpt"}]}, "wording", "vicuna_v1.1"),
        (
            {"adapter": "lora", "lora_r": 4, "lora_target_linear": True, "lora_target_modules": ["q_proj", "lm_head"]},
            "weights",
            "axolotl trains lm_head too",
        ),
        (
            {"datasets": [CHAT | {"data_files": ["a.jsonl"]}]},
            "rows",
            "Download these files, and write each as a path of its own.",
        ),
    ],
)
def test_difference_is_told_with_exit_code_5(import_settings, settings, affects, words):
    code, out, err = import_settings("axolotl", axolotl(**settings))
    assert code == 5
    assert words in " ".join(err.split())
    assert f"# - {affects}: " in out


@pytest.mark.parametrize(
    "settings", [{"num_epochs": 3, "evals_per_epoch": 4, "saves_per_epoch": 1}, {"save_steps": 50, "eval_steps": 25}]
)
def test_best_checkpoint_is_loaded_where_axolotl_does_it_and_transformers_takes_the_steps(import_recipe, settings):
    datasets = [{"path": "org/chats", "type": "chat_template"}]
    run, _ = import_recipe("axolotl", axolotl(datasets=datasets, val_set_size=0.1, **settings), differs=False)
    assert run.train["load_best_model_at_end"] is True
    names = ("load_best_model_at_end", "eval_strategy", "eval_steps", "save_strategy", "save_steps")
    SFTConfig(bf16=False, **{name: run.train[name] for name in names})
    off = axolotl(datasets=datasets, val_set_size=0.1, load_best_model_at_end=False, **settings)
    assert "load_best_model_at_end" not in import_recipe("axolotl", off)[0].train


def test_best_checkpoint_is_not_loaded_where_axolotl_ignores_it(import_recipe):
    settings = {"val_set_size": 0.1, "eval_steps": 30, "save_steps": 50, "load_best_model_at_end": True}
    run, out = import_recipe("axolotl", axolotl(**settings))
    assert "load_best_model_at_end" not in run.train
    assert "axolotl does this only where it evaluates at each checkpoint." in join_comments(out)


@pytest.mark.parametrize(("drop", "roles"), [(False, ["system", "user"]), (True, ["user"])])
def test_system_prompt_of_a_column_is_read_or_dropped_with_that_of_the_chat(drop, roles, import_recipe, here):
    data = CHAT | {"field_messages": "turns", "message_field_content": "said", "drop_system_message": drop}
    import_recipe("axolotl", axolotl(datasets=[data]))
    space = {}
    exec((here / "imported_rows.py").read_text(), space)  # the file that the import wrote
    row = {"system": "Be brief.", "turns": [{"role": "user", "said": "hi"}]}
    assert [message["role"] for message in space["rows_1"](row)["messages"]] == roles
