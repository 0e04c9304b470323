"""Settings of other trainers as recipes: accepted, equal in what is trained, nothing dropped unsaid."""

import json
import shlex

import models
import pytest
import yaml
from conftest import QUESTIONS, jsonl
from transformers import AutoTokenizer

from trl_sft import cli, load_recipe, train
from trl_sft.errors import RecipeError
from trl_sft.importers import openrlhf, tables, writer
from trl_sft.importers.recipe_parts import get_current_name
from trl_sft.importers.settings import RecipeLine, Settings
from trl_sft.recipe import processes
from trl_sft.recipe import yaml_reader as reading
from trl_sft.training import stages

# what the makers of OpenRLHF's examples type
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


@pytest.fixture
def imports(here, capsys):
    """Import settings: `imports("openrlhf", words)`, or a mapping for a file -> exit code, recipe's text, errors."""

    def call(tool, settings, *words):
        if tool == "openrlhf":
            given = ["--", *(shlex.split(settings) if isinstance(settings, str) else settings)]
        else:
            text = settings if isinstance(settings, str) else json.dumps(settings)
            (here / "config.yaml").write_text(text)
            given = ["config.yaml"]
        capsys.readouterr()
        code = cli.main(["import", tool, *words, *given])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def recipe(imports, here):
    """Import settings that are right; return the checked recipe and its text."""

    def call(tool, settings, *words):
        code, out, err = imports(tool, settings)
        assert code == 0, err
        (here / "imported.yaml").write_text(out)
        return load_recipe("imported.yaml", words), out

    return call


def lines(out):
    """Return the settings of a recipe's text by `section.key`."""
    return {
        f"{part}.{key}": value
        for part, keys in yaml.load(out, Loader=reading._Loader).items()
        for key, value in keys.items()
    }


def test_openrlhf_command_becomes_a_recipe_that_trains_the_same(recipe, here):
    run, out = recipe("openrlhf", LLAMA)
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


def test_openrlhf_dotted_flags_mean_what_the_flat_ones_do(recipe):
    assert lines(recipe("openrlhf", DOTTED)[1]) == lines(recipe("openrlhf", LLAMA)[1])


def test_openrlhf_recipe_trains_here_with_its_global_batch(recipe, here, micro_batches):
    rows = [{"question": q["question"], "response": q["answer"]} for q in QUESTIONS * 7][:260]
    jsonl(here / "X.jsonl", rows)
    run, _ = recipe("openrlhf", LLAMA, *HERE, "data.train.path=X.jsonl", "train.per_device_train_batch_size=32")
    assert train(run).steps == 1  # 256 rows; the four that are left fill no micro batch
    assert sum(n for step, n in micro_batches if step == 0) == 256


def test_openrlhf_tokens_and_mask_are_those_of_its_data_set(recipe, here):
    begin = models.with_bos(here / "m")
    rows = [{"question": q["question"], "response": q["answer"] + "\n" * (n % 2)} for n, q in enumerate(QUESTIONS)]
    rows[3]["response"] = "7 and " * 60
    jsonl(here / "X.jsonl", rows)
    words = ["model.name_or_path=m", "train.max_length=48", *HERE[1:5], "data.train.path=X.jsonl"]
    run, _ = recipe("openrlhf", LLAMA, *words)
    made = list(stages.prepare(run).datasets.train)
    tokenizer = AutoTokenizer.from_pretrained(here / "m")
    assert tokenizer("a").input_ids[0] == begin
    assert len(made) == len(rows)
    for row, got in zip(rows, made, strict=True):
        prompt = f"User: {row['question']}\nAssistant: "
        if row["response"].endswith("\n"):
            continue  # it takes line breaks at the end away, we keep them
        text = f"{prompt}{row['response']} {tokenizer.eos_token}"
        ids = tokenizer(text, add_special_tokens=False, truncation=True, max_length=48).input_ids
        ids[-1] = tokenizer.eos_token_id
        assert got["input_ids"] == ids
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        assert [label for label in got["labels"] if label != -100][-1] == tokenizer.eos_token_id
        assert abs(next(n for n, label in enumerate(got["labels"]) if label != -100) - start) <= 1


@pytest.mark.parametrize(
    ("more", "expected"),
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
def test_openrlhf_flags_and_defaults_are_carried_over(recipe, more, expected):
    _, out = recipe("openrlhf", f"--pretrain m --dataset X --input_key prompt --output_key completion {more}")
    assert "SECRET" not in out
    found = lines(out)
    for key, value in expected.items():
        written = found.get(key)
        if key in ("data.train", "data.eval"):
            written = {k: v for k, v in written.items() if k in value}
        assert written == value, key


def test_openrlhf_command_may_begin_as_it_was_typed(recipe):
    typed = f"deepspeed --module openrlhf.cli.train_sft {LLAMA}"
    assert recipe("openrlhf", typed)[1] == recipe("openrlhf", LLAMA)[1]


def test_openrlhf_input_template_becomes_the_wording(recipe):
    def prompt(*template):
        words = ["--pretrain", "m", "--dataset", "X", "--input_key", "q", "--output_key", "a", *template]
        return recipe("openrlhf", words)[0].sources["train"][0].wording["prompt"]

    assert prompt() == "User: {q}\nAssistant: "
    assert prompt("--input_template", "Q {{x}}: {}\n") == "Q {{x}}: {q}\n"
    assert prompt("--input_template", "no place") == "{q}"


def test_openrlhf_pretraining_and_several_sources(recipe):
    run, out = recipe(
        "openrlhf", "--pretrain m --dataset X,Y@sub --dataset_probs 0.7,0.3 --pretrain_mode --input_key body"
    )
    first, second = run.sources["train"]
    assert (first.weight, second.weight, second.load_kwargs) == (0.7, 0.3, {"data_dir": "sub"})
    assert (first.format, first.rename) == ("text", {"body": "text"})
    assert "loss_on" not in run.data
    assert "no end-of-text token after a text" in " ".join(out.replace("#", "").split())


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--dataset X --output_key a", "--pretrain"),
        ("--pretrain m --output_key a", "--dataset"),
        ("--pretrain m --dataset X", "--output_key\n    the flag is missing"),
        ("--pretrain m --dataset X --output_key a --max_len many", "--max_len\n    invalid int value: 'many'"),
        ("--pretrain m --dataset X --output_key a --max_len", "--max_len\n    expected one argument"),
        ("--pretrain m --dataset X --output_key a --learning_rate -1 stray", '"stray" is not a flag'),
        ("--pretrain m --dataset X --output_key a --zero_stage 4", "--zero_stage launch.engine\n    4 (whole number)"),
        ("--pretrain m --dataset X --output_key a --lr_warmup_ratio 2", "--lr_warmup_ratio"),
        ("--pretrain m --dataset X --output_key a --train_batch_size 0", "--train_batch_size run.global_batch_size"),
        ("--pretrain m --dataset X --output_key a --input_template '{} {}'", "has 2 places for a prompt"),
        (
            "--pretrain m --dataset ./gone.jsonl --output_key a",
            "--dataset data.train.path\n    ./gone.jsonl: no such file",
        ),
    ],
)
def test_openrlhf_value_that_cannot_be_read_is_told_by_its_flag(imports, flags, told):
    code, _, err = imports("openrlhf", flags)
    assert code == 2
    assert told in err
    assert "Traceback" not in err


def test_unknown_setting_is_a_comment_and_a_note(imports):
    flags = "--pretrain m --dataset X --output_key a --max_samplez 3 --brand_new a b"
    code, out, err = imports("openrlhf", flags)
    assert code == 0
    assert '# - max_samplez: "3" (trl_sft does not know this setting. Did you mean `max_samples`?)' in out
    assert "trl_sft: --max_samplez: trl_sft does not know this setting. Did you mean `max_samples`?" in err
    assert "trl_sft: --brand_new" in err


def outcomes_of(name, tool, settings):
    """The outcomes that come from one setting."""
    outcomes = writer.convert_all(writer.TOOLS[tool], settings)
    return [
        outcome
        for outcome in outcomes
        if name in (outcome.names if isinstance(outcome, RecipeLine) else [outcome.name])
    ]


def test_every_openrlhf_flag_has_an_outcome(here):
    required = {"pretrain": "m", "dataset": "X", "output_key": "a"}
    for name, entry in tables.load_table("openrlhf").entries.items():
        if name == "dataset_probs":
            continue  # tried with several sources
        text = "fp16" if "dtype" in name else "x"
        value = {"switch": [], "int": ["1"], "float": ["0.5"], "str": [text]}[entry.type]
        count = entry.nargs if isinstance(entry.nargs, int) else 1
        words = [f"--{other}={value}" for other, value in required.items() if other != name]
        outcomes = outcomes_of(name, "openrlhf", openrlhf.read([*words, f"--{name}", *value * count]))
        assert outcomes, name
        assert not [outcome for outcome in outcomes if "does not know" in getattr(outcome, "reason", "")], name


def test_recipe_is_written_beside_nothing_that_stands_there(imports, here):
    flags = "--pretrain trl_sft:tiny --dataset rows.jsonl --input_key question --output_key answer"
    code, out, err = imports("openrlhf", flags, "-o", "sub.yaml")
    assert (code, "Next:" in out) == (0, True)
    assert load_recipe("sub.yaml").sources["train"][0].location.files == ((here / "rows.jsonl").resolve(),)
    code, _, err = imports("openrlhf", flags, "-o", "sub.yaml")
    assert code == 2
    assert "the file exists and is not overwritten" in err
    (here / "deep").mkdir()
    assert imports("openrlhf", flags, "-o", "deep/r.yaml")[0] == 0
    assert load_recipe("deep/r.yaml").sources["train"][0].location.files == ((here / "rows.jsonl").resolve(),)


def test_import_without_a_file_or_of_an_unknown_tool_is_told(capsys):
    assert cli.main(["import", "trlx", "a.yaml"]) == 2
    assert "one of openrlhf, trl" in capsys.readouterr().err
    assert cli.main(["import", "trl"]) == 2
    assert "import trl FILE" in capsys.readouterr().err
    assert cli.main(["import", "trl", "gone.yaml"]) == 2
    assert "no such file" in capsys.readouterr().err


TRL = {
    **{"model_name_or_path": "trl_sft:tiny", "dtype": "bfloat16", "use_peft": True, "lora_r": 8, "load_in_4bit": True},
    **{"lora_target_modules": ["q_proj"], "dataset_name": "rows.jsonl", "dataset_test_split": "train"},
    **{"learning_rate": 1e-4, "packing": True, "eval_strategy": "steps", "eval_steps": 5, "output_dir": "out"},
    **{"gradient_checkpointing_use_reentrant": True, "resume_from_checkpoint": True, "assistant_only_loss": True},
}


def test_trl_file_becomes_a_recipe(recipe):
    run, out = recipe("trl", TRL)
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


def test_trl_mixture_and_masks(recipe):
    run, out = recipe(
        "trl", "model_name_or_path: m\ndatasets:\n- {path: a/b, split: train_sft, fraction: 0.25}\n- {path: c/d}\n"
    )
    assert [source.load_kwargs for source in run.sources["train"]] == [{"split": "train_sft[:25%]"}, {}]
    assert "TRL trains every token of a chat" in out.replace("\n  #", "")


@pytest.mark.parametrize(("stage", "engine"), [(0, "ddp"), (1, "zero1"), (2, "zero2"), (3, "zero3")])
def test_trl_deepspeed_file_names_the_engine(recipe, here, stage, engine):
    (here / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    run, _ = recipe("trl", {"model_name_or_path": "m", "dataset_name": "X", "deepspeed": "ds.json"})
    assert run.launch["engine"] == engine
    assert ("config" in run.launch) is (stage > 0)


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


def test_alignment_handbook_mixture(recipe):
    entry = "{id: a/b, config: all, split: train, columns: [messages, chat_template_kwargs], weight: 0.3}"
    mixture = f"{{datasets: [{entry}], test_split_size: 0.1, seed: 0}}"
    text = f"model_name_or_path: m\ndataset_mixture: {mixture}\nhub_token: SECRET\n"
    run, out = recipe("alignment-handbook", text)
    assert run.sources["train"][0].load_kwargs == {"name": "all", "split": "train[:30%]"}
    assert run.data["eval_fraction"] == 0.1
    assert "SECRET" not in out
    for words in ("`columns` of a/b", "`chat_template_kwargs` of a row", "the mixture's own seed"):
        assert words in " ".join(out.replace("#", "").split())


def test_alignment_handbook_file_becomes_a_recipe(recipe, imports):
    run, out = recipe("alignment-handbook", HANDBOOK)
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
    assert run.options == {"overwrite": True}
    err = imports("alignment-handbook", HANDBOOK)[2]
    assert "config.yaml:5 chat_template: Write the template to a file" in err
    assert "not_a_name: trl_sft does not know this setting" in err
    for name in ("do_eval", "chat_template", "not_a_name"):
        assert f"# - {name}: " in out


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


def test_axolotl_file_becomes_a_recipe(recipe, imports):
    run, out = recipe("axolotl", AXOLOTL)
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
    assert (alpaca.format, alpaca.wording) == ("alpaca", "alpaca")
    assert (chat.format, chat.wording, chat.rename) == ("sharegpt", "chat", {})
    for name in (
        "model_type",
        "dataset_prepared_path",
        "train_on_inputs",
        "lisa_n_layers",
        "roles_to_train",
        "lora_rr",
    ):
        assert f"# - {name}" in out, name
    assert "breaks the line after `### Response:`" in out
    err = imports("axolotl", AXOLOTL)[2]
    assert "config.yaml:48 lora_rr: trl_sft does not know this setting. Did you mean `lora_r`?" in err
    assert "config.yaml:47 lisa_n_layers: trl_sft does not support this setting." in err


def axolotl(**more):
    return {
        "base_model": "trl_sft:tiny",
        "datasets": [{"path": "rows.jsonl", "type": "completion", "field": "answer"}],
    } | more


def test_axolotl_defaults_are_carried_over(recipe):
    run, out = recipe("axolotl", axolotl())
    assert run.train == {
        **{
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "num_train_epochs": 1.0,
            "packing": False,
        },
        **{"max_length": 512, "learning_rate": 5e-5, "weight_decay": 0.0, "lr_scheduler_type": "cosine"},
        **{"optim": "adamw_torch_fused", "warmup_steps": 0.03, "save_strategy": "epoch", "save_total_limit": 4},
        get_current_name("gradient_checkpointing"): False,
    }
    assert run.sources["train"][0].rename == {"answer": "text"}
    assert out.count("axolotl's default") >= 10


OWN = {"format": "[{instruction}]", "field_instruction": "question", "field_output": "answer"}


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"train_on_inputs": True}, {"data.loss_on": "all"}),
        ({"excess_length_strategy": "raise"}, {"data.overlong": "error"}),
        ({"chat_template": "chatml"}, {"tokenizer.chat_template": "chatml"}),
        ({"chat_template": "tokenizer_default_fallback_qwen_25"}, {"tokenizer.chat_template": "qwen2_5"}),
        (
            {"adapter": "lora", "lora_r": 8, "lora_target_linear": True},
            {"lora.target_modules": "all-linear", "lora.lora_dropout": 0.0},
        ),
        ({"adapter": "lora", "load_in_8bit": True, "lora_target_linear": True}, {"quantization.load_in_8bit": True}),
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
            {"data.train": {"path": "rows.jsonl", "wording": {"prompt": "[{question}]", "completion": "{answer}"}}},
        ),
    ],
)
def test_axolotl_settings_are_carried_over(recipe, more, expected):
    found = lines(recipe("axolotl", axolotl(**more))[1])
    assert {key: found.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"rl": "dpo"}, 'config.yaml:1 rl\n    "dpo"'),
        ({"adapter": "ia3"}, "`lora` or `qlora`"),
        ({"datasets": None}, "the settings name no training rows"),
        ({"base_model": None}, "the settings name no model"),
        ({"sequence_len": "long"}, 'sequence_len train.max_length\n    "long" (text)'),
        ({"datasets": [{"type": "alpaca"}]}, "a data set has no path"),
    ],
)
def test_axolotl_value_that_cannot_be_read_is_told_by_its_line(imports, more, told):
    code, _, err = imports("axolotl", axolotl(**more))
    assert code == 2
    assert told in err
    assert "Traceback" not in err


INFO = {
    "identity": {"file_name": "identity.json"},
    "renamed": {"file_name": "identity.json", "columns": {"prompt": "ask", "response": "say"}, "num_samples": 5},
    "chats": {"hf_hub_url": "org/chats", "formatting": "sharegpt", "split": "part", "columns": {"messages": "talk"}},
    "openai": {
        "hf_hub_url": "org/openai",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "pairs": {"hf_hub_url": "org/pairs", "ranking": True},
}
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


@pytest.fixture
def factory(here):
    (here / "data").mkdir()
    (here / "data" / "dataset_info.json").write_text(json.dumps(INFO))
    (here / "data" / "identity.json").write_text(json.dumps([{"instruction": "a", "input": "", "output": "b"}] * 8))


def test_llamafactory_file_becomes_a_recipe(recipe, factory):
    run, out = recipe("llamafactory", FACTORY)
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
    one, two = run.sources["train"]
    assert (one.format, one.wording, one.max_rows, one.location.files[0].name) == (
        "alpaca",
        "chat",
        1000,
        "identity.json",
    )
    assert (two.format, two.rename, two.load_kwargs) == ("sharegpt", {"talk": "conversations"}, {"split": "part"})
    for name in ("do_train", "overwrite_cache", "plot_loss"):
        assert f"# - {name}: true" in out


@pytest.mark.parametrize(
    ("more", "expected"),
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
        ({"dataset": "renamed"}, {"data.train": {"path": "data/identity.json", "format": "alpaca", "wording": "chat"}}),
        ({"dataset": "openai"}, {"data.train": {"path": "org/openai", "format": "messages", "wording": "chat"}}),
        ({"dataset": "identity,chats", "mix_strategy": "interleave_over", "interleave_probs": "0.3,0.7"}, {}),
        (
            {"enable_thinking": False, "template": "qwen3"},
            {"tokenizer.chat_template_kwargs": {"enable_thinking": False}},
        ),
        ({"stage": "pt", "dataset": "chats", "template": None}, {"train.packing": True, "data.loss_on": None}),
    ],
)
def test_llamafactory_settings_are_carried_over(recipe, factory, more, expected):
    run, out = recipe("llamafactory", {"model_name_or_path": "m", "dataset": "identity", "template": "llama3"} | more)
    found = lines(out)
    for key, value in expected.items():
        written = found.get(key)
        if key == "data.train":
            written = {k: v for k, v in written.items() if k in value}
        assert written == value, key
    if more.get("dataset") == "renamed":
        assert (run.sources["train"][0].rename, run.sources["train"][0].max_rows) == (
            {"ask": "instruction", "say": "output"},
            5,
        )
    if "interleave_probs" in more:
        assert [source.weight for source in run.sources["train"]] == [0.3, 0.7]


def test_settings_that_change_nothing_are_left_out_with_the_reason(recipe, factory):
    more = {"max_steps": 5, "num_train_epochs": 3.0, "per_device_eval_batch_size": 1, "lr_scheduler_type": "constant"}
    more |= {"warmup_ratio": 0.1, "save_strategy": "epoch", "save_steps": 50}
    run, out = recipe("llamafactory", {"model_name_or_path": "m", "dataset": "identity"} | more)
    left_out = {"num_train_epochs", "per_device_eval_batch_size", "save_steps", "warmup_steps"}
    assert not left_out & set(run.train)
    assert "# - num_train_epochs: 3.0 (It has no effect with `max_steps: 5`.)" in out
    assert "# - per_device_eval_batch_size: 1 (It has no effect without an evaluation set.)" in out


@pytest.mark.parametrize(
    ("more", "told"),
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
def test_llamafactory_value_that_cannot_be_read_is_told(imports, factory, more, told):
    code, _, err = imports("llamafactory", {"model_name_or_path": "m", "dataset": "identity"} | more)
    assert code == 2
    assert told in err
    assert "Traceback" not in err


def test_llamafactory_dataset_info_may_lie_elsewhere(imports, here, factory):
    (here / "data").rename(here / "elsewhere")
    code, out, _ = imports(
        "llamafactory",
        {"model_name_or_path": "m", "dataset": "identity"},
        "--dataset-info",
        "elsewhere/dataset_info.json",
    )
    assert code == 0
    assert lines(out)["data.train"]["path"] == "elsewhere/identity.json"


def test_llamafactory_dataset_info_beside_the_settings_is_found(here, factory, capsys):
    (here / "other").mkdir()
    (here / "data").rename(here / "other" / "data")
    (here / "other" / "config.yaml").write_text("model_name_or_path: m\ndataset: identity\n")
    assert cli.main(["import", "llamafactory", "other/config.yaml"]) == 0
    assert lines(capsys.readouterr().out)["data.train"]["path"] == "other/data/identity.json"


def test_dataset_info_of_another_tool_is_refused(imports, here):
    code, _, err = imports("trl", {"model_name_or_path": "m", "dataset_name": "X"}, "--dataset-info", "x.json")
    assert code == 2
    assert "--dataset-info\n    trl has no such file, only LLaMA-Factory has" in err


BASIC = {
    "trl": {"model_name_or_path": "m", "dataset_name": "X"},
    "axolotl": axolotl(),
    "llamafactory": {
        **{"model_name_or_path": "m", "dataset": "a", "dataset_info": {"a": {"file_name": "a.json"}}},
    },
}


@pytest.mark.parametrize("tool", BASIC)
def test_every_known_setting_has_an_outcome_for_values_of_every_type(tool):
    for name in writer.TOOLS[tool].list_names():
        for value in (True, 1, 0.5, "x", ["x"], {"x": "y"}, [{"path": 1, "type": ["a"]}]):
            try:
                outcomes = outcomes_of(name, tool, Settings(BASIC[tool] | {name: value}, str))
            except RecipeError as error:
                assert error.faults[0].where == name, (name, value)  # noqa: PT017 (it may also be carried over)
                continue
            assert outcomes, (name, value)
            assert not [outcome for outcome in outcomes if "does not know" in getattr(outcome, "reason", "")], name


def test_imported_recipes_bring_rows_to_tokens_here(recipe, factory, here):
    small = {"max_steps": 2, "output_dir": "out", "bf16": False}
    settings = {
        "trl": {"model_name_or_path": "trl_sft:tiny", "dataset_name": "rows.jsonl", "max_length": 64},
        "axolotl": {
            **{"base_model": "trl_sft:tiny", "datasets": [{"path": "data/identity.json", "type": "alpaca"}]},
            **{"sample_packing": True, "adapter": "lora", "lora_r": 4, "lora_target_linear": True},
        },
        "llamafactory": {"model_name_or_path": "trl_sft:tiny", "dataset": "identity", "neat_packing": True},
    }
    for tool, given in settings.items():
        ready = stages.prepare(recipe(tool, given | small)[0])
        trained = {label for row in ready.datasets.train for label in row["labels"]} - {-100}
        assert trained, tool
        assert ("seq_lengths" in ready.datasets.train.column_names) is (tool != "trl"), tool


def test_trl_values_that_mean_something_are_not_dropped(recipe, here, capsys):
    run, _ = recipe("trl", "model_name_or_path: m\ndataset_name: a/b\nmax_length: null\n")
    assert "max_length" in run.train
    assert run.train["max_length"] is None
    for line in ("use_peft: true\nlora_r: 0", "use_peft: maybe", "load_in_4bit: perhaps"):
        (here / "sft.yaml").write_text(f"model_name_or_path: m\ndataset_name: a/b\n{line}\n")
        assert cli.main(["import", "trl", "sft.yaml"]) == 2, line
        assert "Traceback" not in capsys.readouterr().err
