"""LLaMA-Factory's files become a recipe."""

import json

import pytest
from importer_outcomes import read_lines
from transformers import AutoTokenizer

from trl_sft import cli
from trl_sft.importers.recipe_parts import get_current_name
from trl_sft.recipe import paths
from trl_sft.training import stages

pytest_plugins = ["importer_fixtures"]


FACTORY = """\
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity,chats
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
val_size: 0.1
per_device_eval_batch_size: 1
eval_strategy: steps
eval_steps: 500
"""


def test_file_becomes_a_recipe(import_recipe, dataset_info):
    run, out = import_recipe("llamafactory", FACTORY)
    assert run.train == {
        **{
            "max_length": 2048,
            "dataset_num_proc": 16,
            "logging_steps": 10,
            "save_steps": 500,
            "save_only_model": False,
        },
        **{"report_to": "none", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "bf16": True},
        **{"learning_rate": 1e-4, "num_train_epochs": 3.0, "lr_scheduler_type": "cosine", "warmup_steps": 0.1},
        **{"ddp_timeout": 180000000, "per_device_eval_batch_size": 1, "eval_strategy": "steps", "eval_steps": 500},
        **{
            get_current_name("gradient_checkpointing"): True,
            get_current_name("gradient_checkpointing_kwargs"): {"use_reentrant": True},
        },
    }
    assert run.lora == {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"}
    assert run.data == {"eval_fraction": 0.1, "loss_on": "assistant"}
    assert run.model == {"trust_remote_code": True, "dtype": "bfloat16"}
    assert run.chat_template.name == "llama3"
    first, second = run.sources["train"]
    assert (first.format, first.wording, first.load_kwargs, first.location.files[0].name) == (
        "imported_rows.py:rows_1",
        "chat",
        {"split": "train[:1000]"},
        "identity.json",
    )
    assert (second.format, second.rename, second.load_kwargs) == (
        "sharegpt",
        {"talk": "conversations"},
        {"split": "part[:1000]"},
    )
    for name in ("do_train", "overwrite_cache", "plot_loss"):
        assert f"# - {name}: true" in out


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"finetuning_type": "full"}, {"lora.r": None, "train.bf16": False, "train.learning_rate": 5e-5}),
        ({"lora_target": "q_proj, v_proj"}, {"lora.target_modules": ["q_proj", "v_proj"]}),
        ({"additional_target": "embed_tokens"}, {"lora.modules_to_save": ["embed_tokens"]}),
        ({"pissa_init": True}, {"lora.init_lora_weights": "pissa_niter_16"}),
        ({"quantization_bit": 4}, {"quantization.load_in_4bit": True, "quantization.bnb_4bit_use_double_quant": True}),
        ({"quantization_bit": 8}, {"quantization.load_in_8bit": True}),
        ({"train_on_prompt": True}, {"data.loss_on": "all"}),
        ({"mask_history": True}, {"data.loss_on": "last_turn"}),
        ({"neat_packing": True}, {"train.packing": True}),
        ({"flash_attn": "fa2"}, {"model.attn_implementation": "flash_attention_2"}),
        ({"disable_gradient_checkpointing": True}, {f"train.{get_current_name('gradient_checkpointing')}": False}),
        ({"dataset": "renamed"}, {"data.train": {"path": "data/identity.json", "format": "imported_rows.py:rows_1"}}),
        ({"dataset": "openai"}, {"data.train": {"path": "org/openai", "format": "imported_rows.py:rows_1"}}),
        ({"dataset": "identity,chats", "mix_strategy": "interleave_over", "interleave_probs": "0.3,0.7"}, {}),
        (
            {"enable_thinking": False, "template": "qwen3"},
            {"tokenizer.chat_template_kwargs": {"enable_thinking": False}},
        ),
        ({"stage": "pt", "dataset": "chats", "template": None}, {"train.packing": True, "data.loss_on": None}),
    ],
)
def test_settings_become_lines(import_recipe, dataset_info, settings, expected):
    run, out = import_recipe(
        "llamafactory", {"model_name_or_path": "m", "dataset": "identity", "template": "llama3"} | settings
    )
    values = read_lines(out)
    for key, value in expected.items():
        value_of_recipe = values.get(key)
        if key == "data.train":
            value_of_recipe = {name: part for name, part in value_of_recipe.items() if name in value}
        assert value_of_recipe == value, key
    if settings.get("dataset") == "renamed":
        assert run.sources["train"][0].max_rows == 5
    if "interleave_probs" in settings:
        assert [source.weight for source in run.sources["train"]] == [0.3, 0.7]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stage": "dpo"}, "config.yaml:1 stage"),
        ({"finetuning_type": "freeze"}, "`lora` or `full`"),
        ({"dataset": "identityy"}, "dataset_info.json has no data set identityy"),
        ({"dataset": "pairs"}, "pairs of answers to rank"),
        ({"dataset_dir": "gone"}, "gone/dataset_info.json: No such file"),
        ({"quantization_bit": 3}, "4 or 8 bits by `bnb`"),
        ({"dataset": None}, "the settings name no training rows"),
    ],
)
def test_value_that_cannot_be_converted_is_a_fault_at_its_line(import_settings, dataset_info, settings, message):
    code, _, err = import_settings("llamafactory", {"model_name_or_path": "m", "dataset": "identity"} | settings)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_dataset_info_is_read_from_the_file_of_the_option(import_settings, here, dataset_info):
    (here / "data").rename(here / "elsewhere")
    code, out, _ = import_settings(
        "llamafactory",
        {"model_name_or_path": "m", "dataset": "identity"},
        "--dataset-info",
        "elsewhere/dataset_info.json",
    )
    assert code == 0
    assert read_lines(out)["data.train"]["path"] == "elsewhere/identity.json"


def test_dataset_info_is_read_beside_the_settings(here, dataset_info, capsys):
    (here / "other").mkdir()
    (here / "data").rename(here / "other" / "data")
    (here / "other" / "config.yaml").write_text("model_name_or_path: m\ndataset: identity\n")
    assert cli.main(["import", "llamafactory", "other/config.yaml"]) == 0
    assert read_lines(capsys.readouterr().out)["data.train"]["path"] == "other/data/identity.json"


def test_settings_without_effect_are_omitted_with_the_reason(import_recipe, dataset_info):
    settings = {
        "max_steps": 5,
        "num_train_epochs": 3.0,
        "per_device_eval_batch_size": 1,
        "lr_scheduler_type": "constant",
    }
    settings |= {"warmup_ratio": 0.1, "save_strategy": "epoch", "save_steps": 50}
    run, out = import_recipe("llamafactory", {"model_name_or_path": "m", "dataset": "identity"} | settings)
    omitted = {"num_train_epochs", "per_device_eval_batch_size", "save_steps", "warmup_steps"}
    assert not omitted & set(run.train)
    assert "# - num_train_epochs: 3.0 (It has no effect with `max_steps: 5`.)" in out
    assert "# - per_device_eval_batch_size: 1 (It has no effect without an evaluation set.)" in out


def test_first_rows_of_each_data_set_are_trained_and_evaluated(import_recipe, dataset_info, here):
    rows = [{"instruction": f"Say {n}.", "input": "", "output": str(n)} for n in range(40)]
    (here / "data" / "identity.json").write_text(json.dumps(rows))
    settings = {"model_name_or_path": "trl_sft:tiny", "dataset": "identity", "eval_dataset": "identity"}
    settings |= {"max_samples": 3, "eval_strategy": "epoch", "bf16": False}
    run, _ = import_recipe("llamafactory", settings, "data.drop_leaked=false", differs=False)
    datasets = stages.prepare(run).datasets
    tokenizer = AutoTokenizer.from_pretrained(paths.EMBEDDED / "tiny")
    for part in (datasets.train, datasets.eval):
        texts = [tokenizer.decode(row["input_ids"]) for row in part]
        assert len(texts) == 3
        assert all(f"Say {n}." in "".join(texts) for n in range(3))


def test_random_rows_of_a_data_set_stay_random(import_recipe, dataset_info):
    settings = {"model_name_or_path": "m", "dataset": "renamed", "max_samples": 3}
    source = import_recipe("llamafactory", settings)[0].sources["train"][0]
    assert (source.max_rows, source.load_kwargs.get("split")) == (3, None)


@pytest.mark.parametrize(
    ("template", "words"), [("phi", "the end-of-text token after the last turn"), ("glm4_moe", "<think>")]
)
def test_template_that_differs_is_told_with_exit_code_5(import_settings, dataset_info, template, words):
    settings = {"model_name_or_path": "m", "dataset": "identity", "template": template}
    code, _, err = import_settings("llamafactory", settings)
    assert (code, words in err) == (5, True)
