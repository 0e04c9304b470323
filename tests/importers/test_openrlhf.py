"""OpenRLHF's flags become a recipe that trains the same."""

import re

import models
import pytest
from conftest import QUESTIONS, jsonl
from importer_outcomes import join_comments, outcomes_of, read_lines
from transformers import AutoTokenizer

from trl_sft import train
from trl_sft.errors import RecipeError
from trl_sft.importers import openrlhf, tables
from trl_sft.importers.recipe_parts import get_current_name
from trl_sft.recipe import processes
from trl_sft.training import stages

pytest_plugins = ["importer_fixtures"]


# the example of OpenRLHF's documentation
LLAMA = (
    "--max_len 2048 --dataset X --input_key question --output_key response --train_batch_size 256 "
    "--micro_train_batch_size 2 --max_samples 500000 --pretrain meta-llama/Meta-Llama-3-8B "
    "--save_path ./checkpoint/llama3-8b-sft --save_steps -1 --logging_steps 1 --eval_steps -1 --zero_stage 2 "
    "--max_epochs 1 --bf16 --flash_attn --learning_rate 5e-6 --load_checkpoint --gradient_checkpointing"
)
DOTTED = (
    "--data.max_len 2048 --data.dataset X --data.input_key question --data.output_key response "
    "--train.batch_size 256 --train.micro_batch_size 2 --data.max_samples 500000 "
    "--model.model_name_or_path meta-llama/Meta-Llama-3-8B --ckpt.output_dir ./checkpoint/llama3-8b-sft "
    "--ckpt.save_steps -1 --logger.logging_steps 1 --eval.steps -1 --ds.zero_stage 2 --train.max_epochs 1 "
    "--ds.param_dtype bf16 --ds.attn_implementation flash_attention_2 --adam.lr 5e-6 --ckpt.load_enable "
    "--model.gradient_checkpointing_enable"
)
# one process of this machine instead of eight GPUs
HERE = [
    *("model.name_or_path=trl_sft:tiny", "model.attn_implementation=sdpa", "train.bf16=false", "train.use_cpu=true"),
    *("launch.engine=ddp", "train.max_length=128"),
]


def test_command_becomes_a_recipe_that_trains_the_same(import_recipe, here):
    run, out = import_recipe("openrlhf", LLAMA)
    assert (run.model_location.name, run.sources["train"][0].location.name) == ("meta-llama/Meta-Llama-3-8B", "X")
    assert run.options == {"global_batch_size": 256, "resume": "auto"}
    assert run.data == {"loss_on": "completion", "overlong": "truncate_and_end"}
    assert run.launch == {"engine": "zero2"}
    assert run.train == {
        **{"max_length": 2048, "learning_rate": 5e-6, "num_train_epochs": 1, "per_device_train_batch_size": 2},
        **{"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        **{"warmup_steps": 0.03, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.95, "max_grad_norm": 1.0},
        **{"dataloader_drop_last": True, "seed": 42, "bf16": True, "save_strategy": "no", "logging_steps": 1},
        **{
            get_current_name("gradient_checkpointing"): True,
            get_current_name("gradient_checkpointing_kwargs"): {"use_reentrant": False},
        },
    }
    assert run.output_dir == here / "checkpoint/llama3-8b-sft"
    assert "eval_steps: -1 (OpenRLHF evaluates nothing without `--eval_dataset`.)" in out
    assert [fault.where.split()[-1] for fault in processes.check(run)] == ["launch.engine"]


def test_dotted_flags_give_the_same_recipe_as_flat_ones(import_recipe):
    assert read_lines(import_recipe("openrlhf", DOTTED)[1]) == read_lines(import_recipe("openrlhf", LLAMA)[1])


def test_recipe_trains_with_the_global_batch_of_the_command(import_recipe, here, micro_batches):
    rows = [{"question": q["question"], "response": q["answer"]} for q in QUESTIONS * 7][:260]
    jsonl(here / "X.jsonl", rows)
    run, _ = import_recipe("openrlhf", LLAMA, *HERE, "data.train.path=X.jsonl", "train.per_device_train_batch_size=32")
    assert train(run).steps == 1  # 256 rows; the other four fill no micro batch
    assert sum(n for step, n in micro_batches if step == 0) == 256


def test_tokens_and_loss_mask_equal_those_of_openrlhf(import_recipe, here):
    begin = models.with_bos(here / "m")
    rows = [{"question": q["question"], "response": q["answer"] + "\n" * (n % 2)} for n, q in enumerate(QUESTIONS)]
    rows[3]["response"] = "7 and " * 60
    jsonl(here / "X.jsonl", rows)
    words = ["model.name_or_path=m", "train.max_length=48", *HERE[1:5], "data.train.path=X.jsonl"]
    run, _ = import_recipe("openrlhf", LLAMA, *words)
    trained = list(stages.prepare(run).datasets.train)
    tokenizer = AutoTokenizer.from_pretrained(here / "m")
    assert tokenizer("a").input_ids[0] == begin
    assert len(trained) == len(rows)
    for row, tokens in zip(rows, trained, strict=True):
        prompt = f"User: {row['question']}\nAssistant: "
        if row["response"].endswith("\n"):
            continue  # OpenRLHF removes line breaks at the end, trl_sft does not
        text = f"{prompt}{row['response']} {tokenizer.eos_token}"
        ids = tokenizer(text, add_special_tokens=False, truncation=True, max_length=48).input_ids
        ids[-1] = tokenizer.eos_token_id
        assert tokens["input_ids"] == ids
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        assert [label for label in tokens["labels"] if label != -100][-1] == tokenizer.eos_token_id
        assert abs(next(n for n, label in enumerate(tokens["labels"]) if label != -100) - start) <= 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            "--apply_chat_template",
            {
                "data.train": {"path": "X", "format": "prompt_completion", "wording": "chat"},
                "data.loss_on": "last_turn",
            },
        ),
        ("--packing_samples --ring_attn_size 1", {"train.padding_free": True}),
        (
            "--lora_rank 8 --target_modules q_proj v_proj",
            {"lora.target_modules": ["q_proj", "v_proj"], "lora.lora_alpha": 16},
        ),
        (
            "--lora_rank 8 --load_in_4bit",
            {"quantization.bnb_4bit_quant_type": "nf4", "lora.target_modules": "all-linear"},
        ),
        ("--save_steps 50", {"train.save_strategy": "steps", "train.save_steps": 50, "train.save_total_limit": 3}),
        ("--eval_dataset Y --eval_steps 20", {"data.eval": {"path": "Y"}, "train.eval_steps": 20}),
        ("--eval_dataset Y", {"train.eval_strategy": "epoch", "train.per_device_eval_batch_size": 8}),
        ("--lr_scheduler constant", {"train.lr_scheduler_type": "constant", "train.lr_scheduler_kwargs": None}),
        ("--zero_stage 3 --zpg 8", {"launch.engine": "zero3"}),
        (
            "--l2 0.1 --adam_betas 0.8 0.9",
            {"train.weight_decay": 0.1, "train.adam_beta1": 0.8, "train.adam_beta2": 0.9},
        ),
        ("--ds.param_dtype fp16", {"train.fp16": True, "train.bf16": False}),
        (
            "--param_dtype bf16 --attn_implementation sdpa",
            {"train.bf16": True, "model.dtype": None, "model.attn_implementation": "sdpa"},
        ),
        ("--use_wandb SECRET --wandb_run_name a", {"train.report_to": ["wandb"], "train.run_name": "a"}),
        ("", {"train.num_train_epochs": 2, "run.global_batch_size": 128, "train.bf16": False, "model.dtype": "auto"}),
        (
            "",
            {
                f"train.{get_current_name('gradient_checkpointing')}": False,
                "train.learning_rate": 5e-6,
                "train.max_length": 2048,
            },
        ),
    ],
)
def test_flags_and_defaults_become_lines(import_recipe, flags, expected):
    _, out = import_recipe("openrlhf", f"--pretrain m --dataset X --input_key prompt --output_key completion {flags}")
    assert "SECRET" not in out
    values = read_lines(out)
    for key, value in expected.items():
        value_of_recipe = values.get(key)
        if key in ("data.train", "data.eval"):
            value_of_recipe = {name: part for name, part in value_of_recipe.items() if name in value}
        assert value_of_recipe == value, key


def test_share_of_a_single_data_set_changes_nothing(import_recipe):
    flags = "--pretrain m --dataset X --output_key a --dataset_probs 1.0 --train_batch_size 8"
    run, _ = import_recipe("openrlhf", flags, differs=False)
    assert run.sources["train"][0].weight is None


def test_missing_settings_are_told_without_the_lines_that_are_missing_with_them(import_settings):
    code, _, err = import_settings("openrlhf", "--dataset X --max_len 5")
    assert code == 2
    assert err.startswith("trl_sft: 2 problems to fix\n\n--pretrain\n")
    assert "a default" not in err


def test_words_before_the_flags_are_ignored(import_recipe):
    command = f"deepspeed --module openrlhf.cli.train_sft {LLAMA}"
    assert import_recipe("openrlhf", command)[1] == import_recipe("openrlhf", LLAMA)[1]


def test_input_template_becomes_the_wording(import_recipe):
    def prompt(*template):
        words = ["--pretrain", "m", "--dataset", "X", "--input_key", "q", "--output_key", "a", *template]
        return import_recipe("openrlhf", words)[0].sources["train"][0].wording["prompt"]

    assert prompt() == "User: {q}\nAssistant: "
    assert prompt("--input_template", "Q {{x}}: {}\n") == "Q {{x}}: {q}\n"
    assert prompt("--input_template", "no place") == "{q}"


def test_pretraining_on_several_sources_keeps_their_weights(import_recipe):
    run, out = import_recipe(
        "openrlhf", "--pretrain m --dataset X,Y@sub --dataset_probs 0.7,0.3 --pretrain_mode --input_key body"
    )
    first, second = run.sources["train"]
    assert (first.weight, second.weight, second.load_kwargs) == (0.7, 0.3, {"data_dir": "sub"})
    assert (first.format, first.rename) == ("text", {"body": "text"})
    assert "loss_on" not in run.data
    assert "no end-of-text token after a text" in join_comments(out)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dataset X --output_key a", "--pretrain"),
        ("--pretrain m --output_key a", "--dataset"),
        ("--pretrain m --dataset X", "--output_key\n    the flag is missing"),
        ("--pretrain m --dataset X --output_key a --max_len many", "--max_len\n    invalid int value: 'many'"),
        ("--pretrain m --dataset X --output_key a --max_len", "--max_len\n    expected one argument"),
        ("--pretrain m --dataset X --output_key a --learning_rate -1 stray", '"stray" is not a flag'),
        (
            "--pretrain m --dataset X --output_key a --zero_stage 4",
            "--zero_stage launch.engine\n    the value is 4 (whole number)",
        ),
        ("--pretrain m --dataset X --output_key a --lr_warmup_ratio 2", "--lr_warmup_ratio"),
        ("--pretrain m --dataset X --output_key a --train_batch_size 0", "--train_batch_size run.global_batch_size"),
        ("--pretrain m --dataset X --output_key a --input_template '{} {}'", "has 2 places for a prompt"),
        (
            "--pretrain m --dataset ./gone.jsonl --output_key a",
            "--dataset data.train.path\n    ./gone.jsonl: there is no such file",
        ),
    ],
)
def test_value_that_cannot_be_converted_is_a_fault_at_its_flag(import_settings, flags, message):
    code, _, err = import_settings("openrlhf", flags)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_every_flag_has_an_outcome(here):
    required = {"pretrain": "m", "dataset": "X", "output_key": "a"}
    for name, entry in tables.load_table("openrlhf").entries.items():
        if name == "dataset_probs":
            continue  # tried with several sources
        text = "fp16" if "dtype" in name else "x"
        value = {"switch": [], "int": ["1"], "float": ["0.5"], "str": [text], "": [text]}[entry.type]
        count = entry.nargs if isinstance(entry.nargs, int) else 1
        words = [f"--{other}={value}" for other, value in required.items() if other != name]
        settings = openrlhf.read([*words, f"--{name}", *value * count])
        if entry.refused:
            with pytest.raises(RecipeError, match=f"--{re.escape(name)}"):
                outcomes_of(name, "openrlhf", settings)
            continue
        outcomes = outcomes_of(name, "openrlhf", settings)
        assert outcomes, name
        assert not [outcome for outcome in outcomes if "does not know" in getattr(outcome, "reason", "")], name
