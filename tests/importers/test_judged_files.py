"""Kinds of settings on which real configurations were imported wrongly: what each of them becomes."""

import json

import pytest
from conftest import jsonl
from importer_outcomes import join_comments, read_lines

from trl_sft import cli

pytest_plugins = ["importer_fixtures"]

AXOLOTL = {"base_model": "org/m", "datasets": [{"path": "org/chats", "type": "chat_template"}]}
FACTORY = {"model_name_or_path": "org/m", "dataset": "identity", "template": "qwen"}
HANDBOOK = {"model_name_or_path": "org/m", "dataset_mixer": {"org/chats": 1.0}}
QLORA = {"adapter": "qlora", "load_in_4bit": True, "lora_r": 8, "lora_target_linear": True}
STOPPING = {"val_set_size": 0.1, "eval_steps": 20, "save_steps": 20, "early_stopping_patience": 3}


def read_differences(err):
    """Return what each line of the block says that the recipe trains differently: `rows datasets.0.shards`."""
    lines = [line.split() for line in err.splitlines() if line.startswith("  ") and not line.startswith("   ")]
    return {f"{words[0]} {next(word for word in words[1:] if '.yaml' not in word).rstrip(':')}" for words in lines}


CASES = [
    # without an attention that keeps them apart, the rows of a pack attend to each other in axolotl
    ("axolotl", AXOLOTL | {"sample_packing": True}, {"train.packing": True}, {"rows sample_packing"}),
    ("axolotl", AXOLOTL | {"sample_packing": True, "attn_implementation": "sdpa"}, {"train.packing": True}, set()),
    ("axolotl", AXOLOTL | {"sample_packing": True, "flash_attention": True}, {"train.packing": True}, set()),
    (
        "axolotl",
        AXOLOTL | {"sample_packing": True, "attn_implementation": "kernels-community/flash-attn3@v1"},
        {"train.packing": True, "train.dataloader_drop_last": None},
        set(),
    ),
    # axolotl ignores it, and so does the recipe
    (
        "axolotl",
        AXOLOTL | {"adapter": "lora", "load_in_4bit": True, "lora_target_linear": True},
        {"quantization.load_in_4bit": None},
        set(),
    ),
    ("axolotl", AXOLOTL | {"freeze_mm_modules": True}, {}, set()),
    ("axolotl", AXOLOTL | {"shrink_embeddings": True}, {}, {"weights shrink_embeddings"}),
    ("axolotl", AXOLOTL | {"nvfp4_merge_aware": True}, {}, {"weights nvfp4_merge_aware"}),
    (
        "axolotl",
        AXOLOTL | QLORA | {"base_model": "tiiuae/Falcon-H1-1.5B"},
        {"quantization.llm_int8_skip_modules": ["out_proj"]},
        set(),
    ),
    (
        "axolotl",
        AXOLOTL | {"fsdp_config": {"fsdp_offload_params": True, "state_dict_type": "FULL_STATE_DICT"}},
        {"launch.config": {"offload_params": True, "state_dict_type": "FULL_STATE_DICT"}},
        set(),
    ),
    ("axolotl", AXOLOTL | STOPPING, {"run.early_stopping": {"patience": 3}, "train.save_steps": None}, set()),
    ("axolotl", AXOLOTL | STOPPING | {"save_steps": 40}, {"train.eval_steps": 20}, {"weights save_steps"}),
    ("axolotl", AXOLOTL | {"early_stopping_patience": 3}, {}, {"weights early_stopping_patience"}),
    # its sampler counts packs where the attention takes no concatenated rows
    (
        "axolotl",
        AXOLOTL | {"sample_packing": True, "sdp_attention": True, "dataloader_drop_last": False},
        {"train.dataloader_drop_last": True},
        set(),
    ),
    (
        "axolotl",
        AXOLOTL | {"sample_packing": True, "flash_attention": True, "multipack_real_batches": True},
        {"train.dataloader_drop_last": True},
        set(),
    ),
    (
        "axolotl",
        AXOLOTL | {"sample_packing": True, "sdp_attention": True, "multipack_real_batches": False},
        {"train.dataloader_drop_last": None},
        set(),
    ),
    # a number of held-out rows is no share, and the recipe passes its check without an evaluation set
    (
        "llamafactory",
        FACTORY | {"val_size": 200, "eval_strategy": "steps", "eval_steps": 500},
        {"train.eval_steps": None, "train.eval_strategy": None},
        {"rows val_size"},
    ),
    ("llamafactory", FACTORY | {"pure_bf16": True}, {"train.bf16": False, "model.dtype": "bfloat16"}, set()),
    ("llamafactory", FACTORY | {"pure_bf16": True, "bf16": True}, {"train.bf16": True}, set()),
    ("llamafactory", FACTORY | {"enable_thinking": False}, {"tokenizer.chat_template_kwargs": None}, set()),
    (
        "llamafactory",
        FACTORY | {"template": "qwen3", "enable_thinking": False},
        {"tokenizer.chat_template_kwargs": {"enable_thinking": False}},
        {"wording enable_thinking"},
    ),
    ("llamafactory", FACTORY | {"freeze_vision_tower": False, "freeze_multi_modal_projector": True}, {}, set()),
    # a variable in a setting that the recipe lacks
    ("llamafactory", FACTORY | {"hub_token": "${HF_TOKEN}"}, {}, set()),
    (
        "llamafactory",
        FACTORY | {"val_size": 0.1, "eval_steps": 5, "eval_strategy": "steps", "early_stopping_steps": 4},
        {"run.early_stopping": {"patience": 4}},
        {"weights early_stopping_steps"},
    ),
    # the scripts that read `dataset_mixer` always pack
    (
        "alignment-handbook",
        HANDBOOK,
        {"train.packing": True, "train.packing_strategy": "wrapped", "run.allow": ["leaking_packing"]},
        {"wording dataset_mixer"},
    ),
    (
        "alignment-handbook",
        {"model_name_or_path": "org/m", "dataset_name": "org/chats", "dataset_configs": ["all"]},
        {"train.packing": None},
        {"rows dataset_configs"},
    ),
    (
        "trl",
        {"model_name_or_path": "org/m", "dataset_name": "org/chats", "model_init_kwargs": {"use_cache": False}},
        {"train.use_cache": False, "model.use_cache": None},
        set(),
    ),
    (
        "trl",
        {"model_name_or_path": "m", "dataset_name": "X", "dataset_kwargs": {"add_special_tokens": False}},
        {},
        set(),
    ),
    # accumulated micro batches count equally in early releases
    (
        "openrlhf",
        "--pretrain m --dataset X --output_key a --train_batch_size 64 --micro_train_batch_size 2",
        {"run.global_batch_size": 64},
        {"objective train_batch_size"},
    ),
    (
        "openrlhf",
        "--pretrain m --dataset X --output_key a --train_batch_size 2 --micro_train_batch_size 2",
        {"run.global_batch_size": 2},
        set(),
    ),
]


@pytest.mark.parametrize("case", CASES)
def test_setting_becomes_a_line_or_a_difference(case, import_settings, dataset_info, here):
    tool, settings, expected, differences = case
    code, _, err = import_settings(tool, settings, "-o", "recipe.yaml")
    values = read_lines((here / "recipe.yaml").read_text())
    assert {key: values.get(key) for key in expected} == expected
    assert read_differences(err) == differences
    assert code == (5 if differences else 0), err  # not 2: the recipe passes its own check


def test_environment_variable_that_becomes_a_line_is_a_fault_at_its_setting(import_settings, dataset_info):
    code, _, err = import_settings("llamafactory", FACTORY | {"output_dir": "${OUT}/run"})
    assert code == 2
    assert "output_dir train.output_dir\n    ${OUT}: a recipe does not read environment variables" in err
    assert "-> Write the value itself." in err


def call_rows_function(here, row):
    """Return what the function beside the recipe makes of a row."""
    space = {}
    exec((here / "recipe_rows.py").read_text(), space)  # the file that the import wrote
    return space["rows_1"](row)


def test_sharegpt_with_chatml_has_the_system_prompt_of_its_releases(import_settings, here):
    data = [{"path": "org/chats", "type": "sharegpt", "conversation": "chatml"}]
    code, _, _ = import_settings("axolotl", AXOLOTL | {"datasets": data}, "-o", "recipe.yaml")
    assert code == 0
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    first = call_rows_function(here, {"conversations": turns})["messages"][0]
    assert first == {"role": "system", "content": "You are a helpful assistant."}
    own = [{"from": "system", "value": "Be brief."}, *turns]
    assert call_rows_function(here, {"conversations": own})["messages"][0]["content"] == "Be brief."


@pytest.mark.parametrize("key", ["train", "weight"])
def test_mark_of_the_loss_that_axolotl_ignores_is_left_out_of_the_rows(key, import_settings, here):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo", key: 0}]
    jsonl("rows.jsonl", [{"messages": turns}])
    data = [{"path": "rows.jsonl", "type": "chat_template"}]
    code, _, _ = import_settings("axolotl", AXOLOTL | {"datasets": data}, "-o", "recipe.yaml")
    assert code == 0
    assert f"The turns have `{key}`, which axolotl reads only with" in join_comments((here / "recipe.yaml").read_text())
    answer = call_rows_function(here, {"messages": turns})["messages"][1]
    assert answer == {"role": "assistant", "content": "yo"}


def test_mark_of_the_loss_that_axolotl_reads_stays_in_the_rows(import_settings, here):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo", "train": False}]
    jsonl("rows.jsonl", [{"messages": turns}])
    data = [{"path": "rows.jsonl", "type": "chat_template", "message_field_training": "train"}]
    import_settings("axolotl", AXOLOTL | {"datasets": data}, "-o", "recipe.yaml")
    assert read_lines((here / "recipe.yaml").read_text())["data.train"]["format"] == "messages"


@pytest.mark.parametrize(("number", "differs"), [(8, False), (9, True)])
def test_number_of_samples_above_the_size_of_the_file_is_a_difference(
    number, differs, import_settings, dataset_info, here
):
    info = {"identity": {"file_name": "identity.json", "num_samples": number}}
    (here / "data" / "dataset_info.json").write_text(json.dumps(info))
    code, out, err = import_settings("llamafactory", FACTORY)
    assert read_lines(out)["data.train"]["max_rows"] == number
    assert code == (5 if differs else 0)
    assert ("The data set has 8 rows. LLaMA-Factory repeats rows" in " ".join(err.split())) is differs


@pytest.mark.parametrize("role", ["user", "tool"])
def test_rows_with_a_role_that_tags_do_not_name_are_left_out_as_in_llamafactory(
    role, import_settings, dataset_info, here
):
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    info = {"identity": {"file_name": "identity.json", "formatting": "sharegpt", "tags": tags}}
    (here / "data" / "dataset_info.json").write_text(json.dumps(info))
    row = {"conversations": [{"role": role, "content": "a"}, {"role": "assistant", "content": "b"}]}
    (here / "data" / "identity.json").write_text(json.dumps([row]))
    code, _, _ = import_settings("llamafactory", FACTORY, "-o", "recipe.yaml")
    assert code == 0
    source = read_lines((here / "recipe.yaml").read_text())["data.train"]
    if role == "user":
        assert source["format"] == "messages"
    else:
        assert source["format"] == "recipe_rows.py:rows_1"
        assert call_rows_function(here, row) is None


@pytest.mark.parametrize("setting", [{"do_predict": True}, {"export_dir": "merged"}, {"infer_backend": "vllm"}])
def test_file_that_does_not_train_is_refused_as_one(setting, import_settings, dataset_info):
    code, _, err = import_settings("llamafactory", {"model_name_or_path": "m", "template": "qwen"} | setting)
    assert code == 2
    assert "the settings are not for training, and name no training rows" in err


def test_template_that_trims_messages_is_told_at_its_line(import_settings, dataset_info):
    _, out, _ = import_settings("llamafactory", FACTORY | {"template": "llama3"})
    assert "It removes spaces and line breaks around a message, which LLaMA-Factory keeps." in join_comments(out)


def test_columns_of_a_mixture_tell_that_its_rows_are_chats(import_settings):
    entry = {"id": "org/chats", "columns": ["messages"], "weight": 1.0}
    settings = {"model_name_or_path": "m", "dataset_mixture": {"datasets": [entry]}}
    code, out, _ = import_settings("alignment-handbook", settings)
    assert code == 0
    assert "loss_on: all  # TRL's default for chats and texts." in out


def test_first_rows_of_a_split_are_previewed(import_settings, dataset_info, here, capsys):
    settings = FACTORY | {"model_name_or_path": "trl_sft:tiny", "template": "chatml", "max_samples": 2}
    import_settings("llamafactory", settings, "-o", "recipe.yaml")
    assert read_lines((here / "recipe.yaml").read_text())["data.train"]["split"] == "train[:2]"
    assert cli.main(["preview", "recipe.yaml"]) == 0
