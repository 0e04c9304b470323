"""Secrets of settings are in no recipe, on no screen and in no JSON answer; the variable to set is named."""

import json

import pytest

from trl_sft import cli

pytest_plugins = ["importer_fixtures"]
TRL = {"model_name_or_path": "org/a", "dataset_name": "org/rows"}
AXOLOTL = {"base_model": "org/a", "datasets": [{"path": "org/chats", "type": "chat_template"}]}
FACTORY = {"model_name_or_path": "org/a", "dataset": "rows", "dataset_dir": {"rows": {"hf_hub_url": "org/rows"}}}
URL = "https://me:passw0rdXyz@host.example/data.jsonl"


@pytest.mark.parametrize(
    ("tool", "settings", "secret", "words"),
    [
        ("trl", TRL | {"hub_token": "hf_abcDEF123456789"}, "abcDEF123456789", "Set HF_TOKEN before the command."),
        ("trl", TRL | {"hub_tokens": "plain-word-7781"}, "plain-word-7781", "Did you mean `hub_token`?"),
        ("trl", TRL | {"model_init_kwargs": {"token": "inner-word-7781"}}, "inner-word-7781", "Set HF_TOKEN before"),
        ("trl", TRL | {"wandb_api_key": "key-word-7781"}, "key-word-7781", "Set WANDB_API_KEY before the command."),
        ("trl", TRL | {"run_name": "0123456789abcdef" * 2 + "01234567"}, "0123456789abcdef", "is a secret"),
        ("trl", TRL | {"dataset_name": URL}, "passw0rdXyz", "A part of the value is a secret"),
        ("axolotl", AXOLOTL | {"wandb_key": "axo-word-7781"}, "axo-word-7781", "Set WANDB_API_KEY before the command."),
        ("axolotl", AXOLOTL | {"comet_api_key": "comet-7781-x"}, "comet-7781-x", "Set COMET_API_KEY before"),
        (
            "axolotl",
            AXOLOTL | {"datasets": [{"path": "https://a.b/c.jsonl?token=q7781w", "type": "alpaca"}]},
            "q7781w",
            "A part of the value is a secret",
        ),
        (
            "llamafactory",
            FACTORY | {"hf_hub_token": "lf-word-7781"},
            "lf-word-7781",
            "Set HF_TOKEN before the command.",
        ),
        (
            "llamafactory",
            FACTORY | {"swanlab_lark_webhook_url": "https://a.b/hook/7781abc"},
            "7781abc",
            "A recipe holds no secret.",
        ),
        (
            "openrlhf",
            "--pretrain m --dataset X --input_key q --output_key a --use_wandb w-word-7781",
            "w-word-7781",
            "Set WANDB_API_KEY to the key before the command.",
        ),
        (
            "openrlhf",
            "--model.model_name_or_path m --data.dataset X --data.output_key a --logger.wandb.key w-word-9981",
            "w-word-9981",
            "Set WANDB_API_KEY to the key before the command.",
        ),
    ],
)
def test_secret_is_left_out_and_its_variable_is_named(tool, settings, secret, words, import_settings, here):
    code, out, err = import_settings(tool, settings, "-o", "recipe.yaml")
    text = (here / "recipe.yaml").read_text()
    printed = import_settings(tool, settings)[1]
    answer = import_settings(tool, settings, "--json")
    assert code in (0, 2, 5)
    for shown in (out, err, text, printed, *answer[1:]):
        assert secret not in shown
    assert words in " ".join(text.replace("#", "").split())
    assert "(left out)" not in "".join(line for line in text.splitlines() if "token: " in line and "#" not in line)


def test_secret_of_dataset_info_is_left_out(here, capsys):
    info = {"rows": {"hf_hub_url": "org/rows", "token": "info-word-7781"}}
    (here / "dataset_info.json").write_text(json.dumps(info))
    (here / "config.json").write_text(json.dumps(FACTORY | {"dataset_dir": "."}))
    assert cli.main(["import", "llamafactory", "config.json", "-o", "recipe.yaml"]) == 5
    screen = "".join(capsys.readouterr())
    assert "dataset_info.rows.token: (left out)" in screen
    assert "info-word-7781" not in screen + (here / "recipe.yaml").read_text()


def test_words_of_the_vocabulary_are_no_secrets(import_settings, here):
    settings = AXOLOTL | {"tokens": ["<a>", "<b>"], "special_tokens": {"pad_token": "<pad>", "eos_token": "</s>"}}
    assert import_settings("axolotl", settings, "-o", "recipe.yaml")[0] == 0
    text = (here / "recipe.yaml").read_text()
    assert '["<a>", "<b>"]' in text
    assert 'pad_token: "<pad>"' in text
    assert "left out" not in text
