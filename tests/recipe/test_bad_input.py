"""Mistakes of users: exit code 2, a message with the fix, nothing on disk changed."""

import json
import os
import re

import pytest
from conftest import QUESTIONS, RECIPE, jsonl

from trl_sft.recipe import paths

MODEL = "model: {name_or_path: trl_sft:tiny}\n"
DATA = "data: {train: rows.jsonl}\n"

# name -> the recipe, and overrides
RECIPES = {
    "empty_file": ("",),
    "only_comments": ("# nothing yet\n",),
    "not_yaml": ("model: {name_or_path: trl_sft:tiny\ndata: x\n",),
    "tabs": ("model:\n\tname_or_path: trl_sft:tiny\n",),
    "list_at_the_top": ("- model\n- data\n",),
    "text_at_the_top": ("train my model please\n",),
    "duplicate_key": (MODEL + DATA + "train:\n  max_steps: 2\n  seed: 1\n  max_steps: 3\n",),
    "duplicate_section": (MODEL + DATA + MODEL,),
    "merge_key": ("a: &a {max_steps: 1}\n" + MODEL + DATA + "train: {<<: *a}\n",),
    "tag": (MODEL + DATA + "train: {output_dir: !env HOME}\n",),
    "environment": (MODEL + "data: {train: '${DATA}/rows.jsonl'}\n",),
    "anchor_in_itself": (MODEL + DATA + "train: &t {lr_scheduler_kwargs: *t}\n",),
    "two_documents": (MODEL + "---\n" + DATA,),
    "unknown_section": (MODEL + DATA + "trian: {max_steps: 2}\n",),
    "section_is_text": (MODEL + DATA + "train: fast\n",),
    "misspelt_keys": (MODEL + DATA + "train:\n  pakking: true\n  learning_rte: 1e-4\n",),
    "key_in_the_wrong_section": ("model: {name_or_path: trl_sft:tiny, max_steps: 3}\n" + DATA + "train: {r: 8}\n",),
    "wrong_types": (
        MODEL + DATA + "train:\n  learning_rate: fast\n  max_length: 512.5\n  packing: 'yes'\n"
        "  per_device_train_batch_size: 1_000\n  gradient_checkpointing: no\n  max_steps:\nlora: {r: sixteen}\n",
    ),
    "bad_choices": (
        MODEL + DATA + "train:\n  lr_scheduler_type: cosin\n  packing_strategy: bogus\n  optim: adam\n"
        "  eval_strategy: sometimes\nlora: {bias: yes}\n",
    ),
    "owned_by_a_section": (
        MODEL + DATA + "train: {model_init_kwargs: {}, resume_from_checkpoint: x, deepspeed: ds.json}\n",
    ),
    "launch_that_no_machine_can": (
        MODEL
        + DATA
        + "launch:\n  engine: zero\n  nproc_per_node: all\n  nnodes: 0\n  module: true\n  nproc: 2\n"
        + "run: {global_batch_size: 0}\ntrain: {deepspeed: ds.json}\n",
    ),
    "launch_config_without_engine": (MODEL + DATA + "launch: {config: ds.json}\n",),
    "no_model": (DATA,),
    "no_rows_named": (MODEL,),
    "missing_model_folder": ("model: {name_or_path: ./models/qwen}\n" + DATA,),
    "model_is_a_data_folder": ("model: {name_or_path: trl_sft:phrases}\n" + DATA,),
    "unknown_embedded_name": ("model: {name_or_path: trl_sft:huge}\n" + DATA,),
    "hub_id_offline": ("model: {name_or_path: nobody/nothing}\n" + DATA,),
    "hub_data_offline": (MODEL + "data: {train: nobody/rows}\n",),
    "missing_data_file": (MODEL + "data: {train: row.jsonl}\n",),
    "no_file_matches": (MODEL + "data: {train: 'part-*.jsonl'}\n",),
    "data_of_no_known_kind": (MODEL + "data: {train: recipe.yaml}\n",),
    "source_without_path": (MODEL + "data: {train: [{format: alpaca}, 3]}\n",),
    "source_keyword_of_another_builder": (MODEL + "data: {train: {path: rows.jsonl, delimiter: ';'}}\n",),
    "eval_fraction_0": (MODEL + "data: {train: rows.jsonl, eval_fraction: 0}\n",),
    "eval_fraction_1": (MODEL + "data: {train: rows.jsonl, eval_fraction: 1}\n",),
    "eval_fraction_of_too_few": (MODEL + "data: {train: rows.jsonl, eval_fraction: 0.001}\n",),
    "eval_twice": (MODEL + "data: {train: rows.jsonl, eval: rows.jsonl, eval_fraction: 0.1}\n",),
    "eval_without_rows": (
        MODEL + DATA + "train: {eval_strategy: steps, eval_steps: 5, load_best_model_at_end: true}\n",
    ),
    "loss_on_contradicted": (MODEL + "data: {train: rows.jsonl, loss_on: all}\ntrain: {completion_only_loss: true}\n",),
    "loss_on_turns_of_no_chat": (
        MODEL + "data: {train: {path: rows.jsonl, wording: question_answer}, loss_on: assistant}\n",
    ),
    "old_and_new_name": (MODEL + DATA + "train: {warmup_ratio: 0.1, warmup_steps: 3}\n",),
    "old_name_out_of_range": (MODEL + DATA + "train: {warmup_ratio: 3}\n",),
    "keys_that_exclude_each_other": (
        MODEL + "data: {train: rows.jsonl, eval: rows.jsonl}\n"
        "train: {load_best_model_at_end: true, eval_strategy: epoch, save_strategy: steps}\n",
    ),
    "packing_without_length": (MODEL + DATA + "train: {packing: true, max_length: null}\n",),
    "lora_targets_nothing": (MODEL + DATA + "lora: {target_modules: [wq]}\n",),
    "not_an_override": (MODEL + DATA, "max_steps"),
    "sections_that_are_words": ("model: trl_sft:tiny\ndata: rows.jsonl\n",),
    "override_inside_what_was_taken_out": (MODEL + DATA, "lora=null", "lora.r=8"),
    "override_takes_back_another": (MODEL + DATA, "lora.r=8", "lora=null"),
    "override_given_twice": (MODEL + DATA, "train.max_steps=1", "train.max_steps=2"),
    "override_misspelt": (MODEL + DATA, "train.max_step=1"),
    "override_of_wrong_type": (MODEL + DATA, "train.max_steps=many"),
    "override_without_a_place": (MODEL + "data: {train: [rows.jsonl]}\n", "data.train.3.path=x.jsonl"),
    "unknown_wording_column": (
        MODEL + "data: {train: {path: rows.jsonl, wording: {prompt: 'Q: {qestion}', completion: '{answer}'}}}\n",
    ),
    "wording_without_completion": (MODEL + "data: {train: {path: rows.jsonl, wording: {prompt: '{question}'}}}\n",),
    "wording_with_a_broken_brace": (
        MODEL + "data: {train: {path: rows.jsonl, wording: {prompt: '{question', completion: '{answer}'}}}\n",
    ),
    "quantization_without_lora": (MODEL + DATA + "quantization: {load_in_8bit: true}\n",),
    "quantization_of_nothing": (MODEL + DATA + "lora: {r: 4}\nquantization: {llm_int8_threshold: 6.0}\n",),
    "quantization_of_two_kinds": (
        MODEL + DATA + "lora: {r: 4}\nquantization: {load_in_8bit: true, load_in_4bit: true}\n",
    ),
    "quantization_by_another_method": (MODEL + DATA + "lora: {r: 4}\nquantization: {quant_method: gptq, bits: 4}\n",),
    "quantization_keys_without_effect": (
        MODEL + DATA + "lora: {r: 4}\nquantization: {load_in_8bit: true, bnb_4bit_quant_type: nf5}\n",
    ),
    "quantization_under_model": ("model: {name_or_path: trl_sft:tiny, load_in_4bit: true}\n" + DATA,),
    "template_file_that_is_missing": (MODEL + DATA + "tokenizer: {chat_template: chat.jinja}\n",),
    "template_of_no_known_name": (MODEL + DATA + "tokenizer: {chat_template: chatlm}\n",),
    "template_from_a_file_of_rows": (MODEL + DATA + "tokenizer: {chat_template: rows.jsonl}\n",),
    "template_of_a_tokenizer_offline": (MODEL + DATA + "tokenizer: {chat_template: nobody/nothing}\n",),
    "template_keyword_that_it_does_not_read": (
        MODEL + DATA + "tokenizer: {chat_template_kwargs: {enable_thinking: false}}\n",
    ),
    "format_of_no_known_name": (MODEL + "data: {train: {path: rows.jsonl, format: sharegtp}}\n",),
    "format_function_without_file": (MODEL + "data: {train: {path: rows.jsonl, format: 'rows.py:chat'}}\n",),
    "format_function_without_module": (MODEL + "data: {train: {path: rows.jsonl, format: 'no.such:chat'}}\n",),
    "wording_of_no_known_name": (MODEL + "data: {train: {path: rows.jsonl, wording: alpacca}}\n",),
    "wording_task_without_task": (MODEL + "data: {train: {path: rows.jsonl, wording: task}}\n",),
    "rename_of_a_column_that_is_not_there": (MODEL + "data: {train: {path: rows.jsonl, rename: {answr: output}}}\n",),
    "rename_to_a_column_that_is_there": (MODEL + "data: {train: {path: rows.jsonl, rename: {answer: question}}}\n",),
    "resume_from_nothing": (MODEL + DATA + "run: {resume: checkpoint-9}\n",),
    "all_at_once": (
        "model: {name_or_path: ./nowhere, torch_dtype: float8}\ndata: {train: gone.jsonl, eval_fraction: 2}\n"
        "train: {pakking: true, max_steps: ten}\nlora: {rank: 8}\nrun: {resum: auto}\n",
    ),
}


def normalize(text, here):
    """Remove from a message what differs between machines and versions."""
    text = re.sub(r"note from .*\n", "", text)  # upstream's own warnings, which differ between its versions
    text = text.replace(str(here), "<here>").replace(str(paths.EMBEDDED), "<embedded>")
    return re.sub(r"one of adamw_torch, .*", "one of adamw_torch, ...", text)


@pytest.mark.parametrize("name", RECIPES)
def test_mistake_in_a_recipe_is_reported_with_its_fix(name, go, here, matches):
    text, *words = RECIPES[name]
    before = sorted(here.iterdir())
    code, _, err = go(text, *words)
    assert code == 2
    assert "Traceback" not in err
    matches(name, normalize(err, here))
    assert [p for p in sorted(here.iterdir()) if p.name != "recipe.yaml"] == before


def turns(*texts):
    """Return a row of messages from texts of the form `role content`."""
    pairs = [text.partition(" ")[::2] for text in texts]
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


def sharegpt_turn(speaker, text):
    """Return a turn of ShareGPT."""
    return {"from": speaker, "value": text}


# name -> (file name, bytes or rows, source keywords)
ROWS = {
    "rows_empty_file": ("r.jsonl", b"", ""),
    "rows_bad_json_line": ("r.jsonl", b'{"question": "a", "answer": "b"}\n{"question": "c", "answer": }\n', ""),
    "rows_bad_json_whole": ("r.json", b'[{"question": "a", "answer": "b"},\n {"question": "c" "answer": "d"}]', ""),
    "rows_not_utf8": ("r.jsonl", b'{"question": "a\xff\xfe", "answer": "b"}\n', ""),
    "rows_no_rows": ("r.json", b"[]", ""),
    "rows_of_no_known_format": ("r.jsonl", [{"frage": "a", "antwort": "b"}], ""),
    "rows_of_two_formats": ("r.jsonl", [{"question": "a", "answer": "b", "text": "c"}], ""),
    "rows_missing_column": ("r.jsonl", [{"instruction": "a", "outputs": "b"}], ", format: alpaca"),
    "rows_none": ("r.jsonl", [*QUESTIONS, {"question": "a", "answer": None}], ""),
    "rows_key_missing_in_one": ("r.jsonl", [*QUESTIONS, {"question": "a"}], ""),
    "rows_number_as_text": ("r.jsonl", [{"question": "a", "answer": 4}], ""),
    "rows_many_faulty": ("r.jsonl", [{"question": None, "answer": "b"}] * 9, ""),
    "rows_unknown_role": ("r.jsonl", [{"messages": [{"role": "robot", "content": "a"}]}], ""),
    "rows_user_last": ("r.jsonl", [{"messages": [{"role": "user", "content": "a"}]}], ""),
    "rows_no_turns": ("r.jsonl", [{"messages": []}, {"messages": [{"role": "assistant", "content": "a"}]}], ""),
    "rows_two_system_prompts": ("r.jsonl", [turns("system a", "system b", "user c", "assistant d")], ""),
    "rows_system_prompt_later": ("r.jsonl", [turns("user a", "system b", "assistant c")], ""),
    "rows_assistant_first": ("r.jsonl", [turns("assistant a", "user b", "assistant c")], ""),
    "rows_no_assistant": ("r.jsonl", [turns("system a", "user b", "user c")], ""),
    "rows_empty_turns": ("r.jsonl", [turns("user ", "assistant b"), turns("user a", "assistant \n\t")], ""),
    "rows_only_whitespace": ("r.jsonl", [{"question": "a", "answer": " \n"}, {"question": " ", "answer": "b"}], ""),
    "rows_tool_without_a_call": ("r.jsonl", [turns("user a", "tool b", "assistant c")], ""),
    "rows_calls_of_no_form": (
        "r.jsonl",
        [
            {
                "conversations": [
                    sharegpt_turn("human", "a"),
                    sharegpt_turn("function_call", "weather()"),
                    sharegpt_turn("gpt", "b"),
                ]
            },
            {
                "conversations": [
                    sharegpt_turn("human", "a"),
                    sharegpt_turn("function_call", '{"arguments": {}}'),
                    sharegpt_turn("gpt", "b"),
                ]
            },
            {
                "conversations": [
                    sharegpt_turn("human", "a"),
                    sharegpt_turn("function_call", '{"name": "f", "arguments": "x"}'),
                ]
            },
        ],
        "",
    ),
    "rows_part_that_is_a_picture": (
        "r.jsonl",
        [{"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "a"}]}],
        "",
    ),
    "rows_turn_with_a_weight": (
        "r.jsonl",
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0.5}]}],
        "",
    ),
    "rows_history_of_no_form": ("r.jsonl", [{"history": {"a": 1}, "human": "a", "assistant": "b"}], ""),
    "rows_history_as_text_in_a_chat": ("r.jsonl", [{"history": "A: hi", "human": "a", "assistant": "b"}], ""),
    "rows_without_reasoning": ("r.jsonl", [{"problem": "a", "reasoning": "", "answer": "b"}], ""),
    "rows_chat_of_several_turns_in_alpaca": (
        "r.jsonl",
        [turns("user a", "assistant b", "user c", "assistant d")],
        ", wording: alpaca",
    ),
    "rows_messages_as_text": ("r.jsonl", [{"messages": "hello"}], ""),
    "rows_with_pictures": ("r.jsonl", [{"question": "a", "answer": "b", "image": "cat.png"}], ""),
    "rows_csv_without_header": ("r.csv", b"what,is\nthis,file\n", ""),
    "rows_parquet_that_is_none": ("r.parquet", b"PAR0 no parquet", ""),
    "rows_unknown_split": ("r.jsonl", QUESTIONS, ", split: validation"),
}


@pytest.mark.parametrize("name", ROWS)
def test_row_fault_names_file_and_row(name, go, here, matches):
    file, content, keywords = ROWS[name]
    if isinstance(content, bytes):
        (here / file).write_bytes(content)
    else:
        jsonl(here / file, content)
    code, _, err = go(f"{MODEL}data: {{train: {{path: {file}{keywords}}}}}\n")
    assert code == 2
    assert "Traceback" not in err
    matches(name, normalize(err, here))
    assert not (here / "runs").exists()


def test_no_row_left_is_reported_before_training(go, here, matches):
    code, _, err = go(RECIPE, "train.max_length=3")
    assert code == 2
    matches("no_rows_left", normalize(err, here))
    assert not (here / "out").exists()


def test_sources_of_different_forms_are_refused(go, here, matches):
    jsonl(here / "text.jsonl", [{"text": "once"}])
    code, _, err = go(MODEL + "data: {train: [rows.jsonl, text.jsonl]}\n")
    assert code == 2
    matches("sources_of_different_forms", normalize(err, here))


def test_model_folder_without_tokenizer_is_reported(go, here, matches):
    (here / "m").mkdir()
    for name in ("config.json", "model.safetensors"):
        (here / "m" / name).write_bytes((paths.EMBEDDED / "tiny" / name).read_bytes())
    code, _, err = go("model: {name_or_path: ./m}\n" + DATA)
    assert code == 2
    assert "no tokenizer can be loaded" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("config", ['{"model_type": "new"}', "{", '{"model_type": "llama"}'])
def test_config_that_transformers_cannot_use_is_reported(config, go, here):
    (here / "m").mkdir()
    (here / "m" / "config.json").write_text(config)
    code, _, err = go("model: {name_or_path: ./m}\n" + DATA)
    assert code == 2
    assert "model.name_or_path" in err
    assert "Traceback" not in err


def test_output_folder_that_is_not_a_run_is_unchanged(go, here, matches):
    (here / "out").mkdir()
    (here / "out" / "thesis.txt").write_text("years of work")
    code, _, err = go(RECIPE, "run={overwrite: true}")
    assert code == 2
    matches("output_is_no_run", normalize(err, here))
    assert (here / "out" / "thesis.txt").read_text() == "years of work"


def test_output_folder_below_a_file_is_refused(go, here, matches):
    (here / "file").write_text("")
    code, _, err = go(RECIPE, "train.output_dir=file/out")
    assert code == 2
    matches("output_below_a_file", normalize(err, here))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_folder_not_writable_is_refused(go, here):
    (here / "closed").mkdir(mode=0o500)
    code, _, err = go(RECIPE, "train.output_dir=closed/out")
    assert code == 2
    assert "cannot be written to" in err


def test_read_only_filesystem_is_refused(go, monkeypatch):
    def refuse(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("trl_sft.recipe.folder_decision.tempfile.TemporaryFile", refuse)
    code, _, err = go(RECIPE)
    assert code == 2
    assert "to: the disk is read-only; " in err


def test_missing_recipe_names_the_recipes_of_the_folder(here, capsys, matches):
    from trl_sft import cli

    (here / "other.yaml").write_text("")
    assert cli.main(["gone.yaml"]) == 2
    matches("recipe_not_there", capsys.readouterr().err)


def test_recipe_that_is_not_text_is_reported(here, capsys):
    from trl_sft import cli

    (here / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    assert cli.main(["recipe.yaml"]) == 2
    assert "cannot be read" in capsys.readouterr().err
    assert cli.main(["."]) == 2


def test_number_of_processes_without_a_launcher_is_refused(go, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = go(RECIPE)
    assert code == 2
    assert "one of 2 processes, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set" in err


def test_adapter_without_its_base_model_is_reported(go, here):
    (here / "a").mkdir()
    (here / "a" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/gone/base"}))
    code, _, err = go("model: {name_or_path: ./a}\n" + DATA)
    assert code == 2
    assert "the base model of this adapter, /gone/base, does not exist" in err


def test_adapter_with_lora_is_refused(go, here, matches):
    (here / "a").mkdir()
    (here / "a" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "trl_sft"}))
    code, _, err = go("model: {name_or_path: ./a}\nlora: {r: 4}\n" + DATA)
    assert code == 2
    matches("adapter_with_lora", normalize(err, here))
