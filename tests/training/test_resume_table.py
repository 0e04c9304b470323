"""Settings x a stop in the first and a later epoch: the resumed run equals one that was never stopped, or is refused.

`make prove` runs the whole table; test_resume.py has a few of its rows in the suite.
"""

import importlib.util
import json
import shutil

import pytest
from conftest import RECIPE, jsonl
from resumed_runs import combine, list_differences

from trl_sft.recipe import paths

WHOLE = RECIPE.replace("rows.jsonl}", "rows.jsonl, eval_fraction: 0.2}") + "evaluate: false\n"  # 32 rows to train
SETTINGS = (
    *("train.save_strategy=steps", "train.save_steps=4", "train.max_steps=-1", "train.num_train_epochs=2"),
    *("train.per_device_train_batch_size=4", "train.learning_rate=1e-2"),  # 8 steps in each epoch
)
STOPS, STOPS_AT_BOUNDARY = (3, 11), (3, 8, 11)
EVALUATED = ("train.eval_strategy=steps", "train.eval_steps=4")
LORA = "lora={r: 4, target_modules: all-linear, lora_dropout: 0.1%s}"
STREAM = ("data.train={path: rows.jsonl, streaming: true}", "data.eval_fraction=null", "data.eval=other.jsonl")


def use_schedule(name, keywords=""):
    schedule = (f"train.lr_scheduler_type={name}", "train.warmup_steps=3")
    return (*schedule, f"train.lr_scheduler_kwargs={{{keywords}}}") if keywords else schedule


SCHEDULES = {
    "linear": use_schedule("linear"),
    "cosine": use_schedule("cosine"),
    "cosine_with_restarts": use_schedule("cosine_with_restarts", "num_cycles: 3"),
    "cosine_with_min_lr": use_schedule("cosine_with_min_lr", "min_lr: 1.0e-3"),
    "cosine_warmup_with_min_lr": use_schedule("cosine_warmup_with_min_lr", "min_lr: 1.0e-3"),
    "polynomial": use_schedule("polynomial", "power: 2"),
    "constant": ("train.lr_scheduler_type=constant",),
    "constant_with_warmup": use_schedule("constant_with_warmup"),
    "inverse_sqrt": use_schedule("inverse_sqrt"),
    "warmup_stable_decay": use_schedule("warmup_stable_decay", "num_decay_steps: 5"),
    "greedy": ("train.lr_scheduler_type=greedy", "train.eval_strategy=steps", "train.eval_steps=2"),
    "reduce_lr_on_plateau": (
        *("train.lr_scheduler_type=reduce_lr_on_plateau", "train.eval_strategy=steps", "train.eval_steps=2"),
        "train.lr_scheduler_kwargs={patience: 0, factor: 0.5, threshold: 0.2}",
    ),
}
OPTIMIZERS = {
    name: (f"train.optim={name}",) for name in "adamw_torch adamw_torch_fused adafactor rmsprop adagrad".split()
} | {"sgd with momentum": ("train.optim=sgd", "train.optim_args=momentum=0.9")}
PACKAGED_OPTIMIZERS = {  # optimizer -> the package that has it
    **dict.fromkeys(
        "adamw_bnb_8bit paged_adamw_32bit paged_adamw_8bit lion_32bit lion_8bit ademamix ademamix_8bit".split(),
        "bitsandbytes",
    ),
    "rmsprop_bnb_8bit": "bitsandbytes",
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), "torchao"),
    **dict.fromkeys(("galore_adamw", "galore_adafactor", "galore_adamw_layerwise"), "galore_torch"),
    **dict.fromkeys(("lomo", "adalomo"), "lomo_optim"),
    "grokadamw": "grokadamw",
    **dict.fromkeys(("schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"), "schedulefree"),
    **dict.fromkeys(("apollo_adamw",), "apollo_torch"),
    "stable_adamw": "optimi",
}
ROWS = {
    "sequential": ("train.train_sampling_strategy=sequential",),
    "group_by_length": ("train.train_sampling_strategy=group_by_length",),
    "data_seed": ("train.data_seed=5", "train.seed=3"),
    "shuffled before training": ("train.shuffle_dataset=true",),
    "weighted mix": ("data.train=[{path: rows.jsonl, weight: 2}, {path: other.jsonl, weight: 1}]",),
    "streamed": (*STREAM, "train.max_steps=16"),
    "streamed weighted mix, packed": (
        "data.train=[{path: rows.jsonl, streaming: true, weight: 2}, {path: other.jsonl, streaming: true, weight: 1}]",
        *(*STREAM[1:], "train.max_steps=16", "train.packing=true", "train.max_length=64"),
        "train.per_device_train_batch_size=1",
    ),
    "packed, bfd": ("train.packing=true", "train.max_length=64", "train.per_device_train_batch_size=1"),
    "packed, wrapped": (
        *("train.packing=true", "train.packing_strategy=wrapped", "train.max_length=64"),
        *("train.per_device_train_batch_size=1", "run.allow=[leaking_packing]"),
    ),
    "padding_free": ("train.padding_free=true", "train.max_length=null"),
    "two workers": ("train.dataloader_num_workers=2",),
    "two persistent workers": ("train.dataloader_num_workers=2", "train.dataloader_persistent_workers=true"),
    "two persistent workers, evaluation": (
        *("train.dataloader_num_workers=2", "train.dataloader_persistent_workers=true", *EVALUATED),
        LORA % "",
    ),
    "streamed, two workers": (*STREAM, "train.max_steps=16", "train.dataloader_num_workers=2"),
    "last batch dropped": ("train.dataloader_drop_last=true", "train.per_device_train_batch_size=5"),
}
ADAPTERS = {
    "lora": (LORA % "",),
    "dora": (LORA % ", use_dora: true",),
    "rslora": (LORA % ", use_rslora: true",),
    "pissa": (LORA.replace("0.1", "0.0") % ", init_lora_weights: pissa",),
    "modules_to_save": (LORA % ", modules_to_save: [lm_head]",),
    "trainable_token_indices": (LORA % ", trainable_token_indices: {embed_tokens: [5, 6, 7]}",),
    "qlora": (LORA % "", "quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4}"),
    "int8 lora": (LORA % "", "quantization={load_in_8bit: true}"),
}
LOOP = {
    "gradient_accumulation_steps 3": ("train.gradient_accumulation_steps=3", "train.per_device_train_batch_size=1"),
    "gradient_checkpointing": ("train.gradient_checkpointing=true",),
    "neftune": ("train.neftune_noise_alpha=5",),
    "label smoothing": ("train.label_smoothing_factor=0.1",),
    "assistant_only_loss": ("train.assistant_only_loss=true", "data.train={path: chats.jsonl}"),
    "dft loss": ("train.loss_type=dft",),
    "max_grad_norm 0.1": ("train.max_grad_norm=0.1",),
    "bf16 autocast": ("train.bf16=true", "train.use_cpu=true"),
    "weights in bfloat16": ("model.dtype=bfloat16",),
    "attention dropout": ("model.name_or_path=dropout",),
    "full_determinism": ("train.full_determinism=true",),
    "include_num_input_tokens_seen": ("train.include_num_input_tokens_seen=all",),
    "torch_compile off": ("train.torch_compile=false",),
    "max_steps in the second epoch": ("train.max_steps=14",),
    "one and a half epochs": ("train.num_train_epochs=1.5",),
    "global_batch_size": ("train.per_device_train_batch_size=1", "run.global_batch_size=4"),
}
EVENTS = {
    "logging_steps 7": ("train.logging_steps=7",),
    "evaluation on steps and at the start": (*EVALUATED, "train.eval_on_start=true"),
    "evaluation each epoch": ("train.eval_strategy=epoch",),
    "answers of base and tuned model": (*EVALUATED, "evaluate={max_rows: 2}"),
    "load_best_model_at_end": (*EVALUATED, "train.load_best_model_at_end=true", "train.learning_rate=0.1"),
    "save_strategy best": (
        *EVALUATED,
        "train.save_strategy=best",
        "train.save_steps=null",
        "train.metric_for_best_model=eval_loss",
    ),
    "save_strategy epoch": ("train.save_strategy=epoch", "train.save_steps=null"),
    "save_total_limit": ("train.save_total_limit=2",),
    "save_only_model": ("train.save_only_model=true",),
}
# The second stop is at the end of the first epoch: the next process begins with another one.
BOUNDARIES = {
    "end of an epoch, group_by_length": ("train.train_sampling_strategy=group_by_length",),
    "end of an epoch, two persistent workers": ROWS["two persistent workers"],
    "end of an epoch, lora": (LORA % "", "train.logging_steps=5"),
    "end of an epoch, evaluation and log each epoch": (
        *("train.eval_strategy=epoch", "train.logging_strategy=epoch", "train.logging_steps=null", LORA % ""),
    ),
}
TABLE = SCHEDULES | OPTIMIZERS | dict.fromkeys(PACKAGED_OPTIMIZERS) | ROWS | ADAPTERS | LOOP | EVENTS | BOUNDARIES


def write_rows(folder):
    """Write rows of different lengths: questions with answers, and the same as chats."""
    rows = [{"question": f"What is {n} plus {n}?", "answer": "x " * (1 + n * 7 % 12)} for n in range(40)]
    jsonl(folder / "rows.jsonl", rows)
    jsonl(folder / "other.jsonl", [{"question": f"Who is {n}?", "answer": "me"} for n in range(12)])
    roles = ("user", "assistant")
    chats = [
        [{"role": role, "content": row[name]} for role, name in zip(roles, ("question", "answer"), strict=True)] * 2
        for row in rows
    ]
    shutil.copytree(paths.EMBEDDED / "tiny", folder / "dropout")
    config = json.loads((folder / "dropout" / "config.json").read_text()) | {"attention_dropout": 0.2}
    (folder / "dropout" / "config.json").write_text(json.dumps(config))
    jsonl(folder / "chats.jsonl", [{"messages": messages} for messages in chats])


@pytest.mark.long
@pytest.mark.parametrize("name", TABLE)
def test_run_stopped_in_two_epochs_equals_one_that_was_never_stopped(name, go, here, stop_after):
    write_rows(here)
    overrides = (f"train.optim={name}",) if name in PACKAGED_OPTIMIZERS else TABLE[name]
    settings = SETTINGS
    if any("train.max_steps" in override for override in overrides):
        settings = [override for override in SETTINGS if "epochs" not in override]
    words = combine(*settings, *overrides)
    code, _, err = go(WHOLE, *words, "train.output_dir=whole")
    package = PACKAGED_OPTIMIZERS.get(name)
    if package and importlib.util.find_spec(package) is None:
        assert code == 2, err
        assert "train.optim" in err
        assert not (here / "whole").exists()
        return
    assert code == 0, err
    stops = STOPS_AT_BOUNDARY if name in BOUNDARIES else STOPS
    for stop in stops:
        stop_after(stop)
        code, _, err = go(WHOLE, *words)
        assert code == 143, err
    stop_after(None)
    code, out, err = go(WHOLE, *words)
    assert code == 0, err
    assert f"checkpoint-{stops[-1]}" in out
    assert list_differences("out", "whole") == []
