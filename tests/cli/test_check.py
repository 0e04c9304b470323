"""`check`: every fault at once, in stages; those of the recipe apart from what this machine cannot run."""

import json
import re

import models
import pytest
from conftest import RECIPE, jsonl

from trl_sft import cli, load_recipe
from trl_sft.errors import UserError
from trl_sft.model import load, meta_model
from trl_sft.recipe import paths
from trl_sft.training import dry_run, stages
from trl_sft.training.stages import build_trainer


def faults(err):
    """Return the places of the faults on a screen."""
    return re.findall(r"^(\S.*)\n    \S.*\n    -> ", err, re.MULTILINE)


def test_check_shows_each_stage_with_its_time(go):
    code, out, err = go(command=["check"])
    assert (code, err) == (0, "")
    stages = "recipe machine folder settings model tokenizer rows tokens trainer memory".split()
    times = re.search(r"^checked +(.*)$", out, re.MULTILINE)[1]
    assert re.findall(r"(\w+) [\d.]+ m?s", times) == stages
    assert "No problems found in recipe.yaml.\nNext: " in out


def test_faults_of_several_stages_are_shown_at_once(here, go):
    """Rows, template and trainer: no stage hides another that does not need it."""
    jsonl(here / "bad.jsonl", [{"question": "q"}, {"question": 3}])
    jsonl(here / "worse.jsonl", [{"text": None}])
    text = (
        "model: {name_or_path: trl_sft:tiny}\ndata:\n  train:\n    - {path: bad.jsonl, format: question_answer}\n"
        "    - {path: worse.jsonl}\ntrain: {output_dir: out, dataloader_num_workers: -1}\n"
        "lora: {target_modules: [no]}\n"
    )
    code, _, err = go(text, command=["check"])
    assert code == 2
    assert {place.partition(" ")[0] for place in faults(err)} >= {"recipe.yaml:4", "worse.jsonl", "recipe.yaml:7"}, err
    assert "Target modules {'no'} not found" in err


def test_columns_are_checked_without_a_tokenizer(here, go):
    """A hub id out of reach is not clean, and no fault; the rows are a fault all the same."""
    text = RECIPE.replace("trl_sft:tiny", "org/model")
    code, out, err = go(text, command=["check"])
    assert code == 0, err
    assert "not checked: model: offline: org/model" in out
    assert "not checked: tokens: needs the tokenizer" in out
    assert "No problems found in the checked stages of recipe.yaml.\n" in out
    assert "40 rows to train; format question_answer" in out
    code, out, err = go(text, "data.train.format=alpaca", "data.train.path=rows.jsonl", command=["check"])
    assert code == 2, out
    jsonl(here / "rows.jsonl", [{"foo": 1}])
    code, out, err = go(text, command=["check"])
    assert code == 2
    assert "which fit no format" in err
    assert "not checked: model: offline" in out
    assert go(text)[0] == 2, "training needs it"


LACKS = {  # what this machine lacks -> override
    "bf16": "train.bf16=true",
    "tf32": "train.tf32=true",
    "a package of attention": "model.attn_implementation=flash_attention_2",
    "a package of an optimizer": "train.optim=galore_adamw",
    "a tracker": "train.report_to=clearml",
}


@pytest.mark.parametrize("name", LACKS)
def test_what_this_machine_lacks_is_a_fault_here_and_not_for_another_machine(name, go):
    code, out, err = go(RECIPE, LACKS[name], command=["check"])
    assert code == 2
    assert faults(err)
    for machine in ("any", "8x80GiB"):
        code, out, err = go(RECIPE, LACKS[name], "--on", machine, command=["check"])
        assert (code, err) == (0, "")
        assert "These are not problems of the recipe. This machine or this version of trl_sft cannot run it:" in out
        assert faults(out)
    assert go(RECIPE, LACKS[name])[0] == 2


def test_fault_of_the_recipe_is_one_for_every_machine(go):
    for machine in ("here", "any", "2x24GiB"):
        code, _, err = go(RECIPE, "lora={target_modules: [no]}", "--on", machine, command=["check"])
        assert code == 2
        assert "Target modules" in err


@pytest.mark.parametrize("words", ["8", "8x", "0x80GiB", "80GiB", "8x80GB", "there"])
def test_unreadable_machine_is_refused(words, go):
    code, _, err = go(RECIPE, "--on", words, command=["check"])
    assert code == 2
    assert "Write here, any, or the number and the memory of the GPUs: 8x80GiB." in err


def test_fast_reads_the_recipe_alone(here, go):
    """The model is not there, and nobody asks for it."""
    code, out, _ = go(RECIPE.replace("trl_sft:tiny", "org/model"), "--fast", command=["check"])
    assert code == 0
    assert "No problems found in recipe.yaml (" in out
    code, _, err = go(RECIPE, "train.pakking=true", "--fast", command=["check"])
    assert code == 2
    assert "packing" in err


LATE = {  # what upstream refuses after the weights are loaded, or when training begins -> part of the message
    "lora={target_modules: [no]}": "Target modules {'no'} not found",
    "lora={target_modules: [lm_head]}": "PEFT adapter",  # in the words of TRL 1.8 and of 1.16
    "train.dataloader_num_workers=-1": "non-negative",
    "train.optim=galore_adamw": "`pip install galore-torch`",
    "train.lr_scheduler_kwargs={nonsense: 1}": "nonsense",
    "train.dataloader_prefetch_factor=2": "prefetch",
    "model.attn_implementation=nonsense": "attn_implementation",
    "model.attn_implementation=flash_attention_2": "FlashAttention2",
}


@pytest.mark.parametrize("words", LATE)
def test_what_upstream_refuses_late_is_refused_before_weights(words, go, monkeypatch):
    def build_arguments(*_, **__):
        raise AssertionError("the trainer's arguments were built")

    monkeypatch.setattr(load, "build_trainer_arguments", build_arguments)
    for command in ([], ["check"]):
        code, _, err = go(RECIPE, words, command=command)
        assert code == 2
        assert LATE[words] in err


def test_dry_run_writes_nothing_and_changes_no_number(here, go, monkeypatch):
    """Weights, losses and folder are those of a run without it."""

    def outcome(name):
        assert go(RECIPE, f"train.output_dir={name}", "lora={r: 2, init_lora_weights: gaussian}")[0] == 0
        log = [json.loads(line) for line in (here / name / "log.jsonl").read_text().splitlines()]
        files = sorted(path.name for path in (here / name).iterdir())
        return [entry["loss"] for entry in log if "loss" in entry], files

    with_it = outcome("a")
    assert sorted(p.name for p in here.iterdir()) == ["a", "recipe.yaml", "rows.jsonl"]
    monkeypatch.setattr(dry_run, "check", lambda *_, **__: "")
    assert outcome("b") == with_it


def test_dry_run_with_new_tokens_and_lora_builds_what_the_run_builds(here):
    models.base(here / "base")
    jsonl(here / "r.jsonl", [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}])
    (here / "recipe.yaml").write_text(
        "model: {name_or_path: ./base}\ntokenizer: {chat_template: chatml}\ndata: {train: r.jsonl}\n"
        "train: {output_dir: out}\nlora: {r: 2}\n"
    )
    run = load_recipe("recipe.yaml")
    ready = stages.prepare(run)
    assert ready.chat.new_tokens
    assert dry_run.check(run, ready.model, ready.chat, args=ready.args, datasets=ready.datasets) == ""
    run = load_recipe("recipe.yaml", ["lora={r: 2, modules_to_save: [lm_head]}"])
    with pytest.raises(UserError, match="has lm_head only, but new tokens"):
        stages.prepare(run)


def test_check_advises_packing_and_grouping_with_shares_counted_on_the_rows(here, go):
    """The share of grouping is what upstream's sampler really leaves; packs are really that few."""
    rows = [{"question": "q", "answer": "yes " * (1 + n * n % 97)} for n in range(300)]
    jsonl(here / "rows.jsonl", rows)
    words = ("train.per_device_train_batch_size=8", "train.max_length=256", "train.shuffle_dataset=true")
    code, out, _ = go(RECIPE, *words, command=["check"])
    assert code == 0
    packs = re.search(r"train.packing: true trains the same tokens in (\d+)% of the positions", out)
    grouped = re.search(r"group_by_length reduces padding from (\d+)% to (\d+)%", out)
    run = load_recipe("recipe.yaml", [*words, "train.train_sampling_strategy=group_by_length"])
    ready = stages.prepare(run)
    trainer = build_trainer(run, ready)
    places = tokens = 0
    for batch in trainer.get_train_dataloader():
        places, tokens = places + batch["attention_mask"].numel(), tokens + int(batch["attention_mask"].sum())
    assert abs(1 - tokens / places - int(grouped[2]) / 100) < 0.03
    room = 256 * len(stages.prepare(load_recipe("recipe.yaml", [*words, "train.packing=true"])).datasets.train)
    assert abs(tokens / room - (1 - int(grouped[1]) / 100) / (int(packs[1]) / 100)) < 0.03
    assert "advice" not in go(RECIPE, *words, "train.packing=true", command=["check"])[1]
    assert "advice" not in go(RECIPE, *words, "train.per_device_train_batch_size=1", command=["check"])[1]


def test_global_batch_size_is_divided_among_the_cards_of_the_target_machine(go):
    for machine, steps in (("here", 16), ("8x80GiB", 2)):
        words = ("run.global_batch_size=32", "--on", machine)
        code, out, err = go(RECIPE, *words, command=["check"])
        assert code == 0, err
        assert f"gradient_accumulation_steps: {steps}, for" in out
    assert go(RECIPE, "run.global_batch_size=32", "--on", "7x80GiB", command=["check"])[0] == 2


def test_token_of_an_override_is_on_no_screen(go, here, capsys):
    secret = "hf_PLANTEDSECRET"
    for word in ("train.hub_token", "train.push_to_hub_token", "model.token"):
        for command in (["check"], ["check", "--fast"], ["prepare"], ["explain"]):
            go(RECIPE, f"{word}={secret}", command=command)
            code, out, err = go(RECIPE, f"{word}={secret}", command=command)
            assert code == 0, err
            assert secret not in out + err, (word, command)
    assert cli.main(["explain", "train.hub_token", "recipe.yaml", f"train.hub_token={secret}"]) == 0
    assert secret not in "".join(capsys.readouterr())


def test_quantization_fault_is_of_the_recipe_for_every_machine(go):
    words = ("quantization={load_in_8bit: true, llm_int8_threshold: true}", "lora={r: 2}")
    for machine in ("here", "8x80GiB"):
        assert go(RECIPE, *words, "--on", machine, command=["check"])[0] == 2
    whole = ("quantization={load_in_8bit: true, llm_int8_threshold: 6}", "lora={r: 2}")
    assert go(RECIPE, *whole, command=["check"])[0] == 0, "upstream takes 6.0 alone"


def test_rows_of_a_stream_are_not_counted_by_the_dry_run(here, go, monkeypatch):
    def counted(name):
        words = ("data.train={path: rows.jsonl, streaming: true}", f"train.output_dir={name}")
        assert go(RECIPE, *words)[0] == 0
        return json.loads((here / name / "ledger.json").read_text())["train"]

    with_it = counted("a")
    monkeypatch.setattr(dry_run, "check", lambda *_, **__: "")
    assert counted("b") == with_it


@pytest.mark.parametrize("words", ["train.include_num_input_tokens_seen=true", "lora={r: 2, init_lora_weights: pissa}"])
def test_settings_that_upstream_accepts_are_accepted(words, go):
    assert go(RECIPE, words)[0] == 0
    code, out, _ = go(RECIPE, words, "train.output_dir=b", command=["check"])
    assert code == 0
    assert "not checked" not in out


def test_attention_of_the_model_configuration_is_used(here, go):
    import shutil

    shutil.copytree(paths.EMBEDDED / "tiny", here / "m")
    config = json.loads((here / "m" / "config.json").read_text())
    (here / "m" / "config.json").write_text(json.dumps(config | {"_attn_implementation": "eager"}))
    code, out, err = go(RECIPE.replace("trl_sft:tiny", "./m"))
    assert code == 0, err
    assert re.search(r"attention +eager", out)


def test_dry_run_builds_the_class_that_the_configuration_names(here):
    """Models that read pictures have no causal class of their own, and train on text."""
    from transformers import Qwen2_5_VLConfig

    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 2, "vocab_size": 64}
    vision = {"hidden_size": 32, "depth": 1, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    (here / "recipe.yaml").write_text(RECIPE)
    run = load_recipe("recipe.yaml", ["lora={r: 2, target_modules: '.*language_model.*q_proj'}"])
    made = meta_model.build_trainer_arguments(run, load.ModelSource("m", "", config), new_tokens=(), vocab_size=64)[
        "model"
    ]
    assert type(made).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert any("language_model" in name for name, _ in made.named_modules())


MISTAKES = {  # override -> place and fix of the fault
    "lora={target_modules: [q_proj, v_prj]}": ("lora.target_modules", "Did you mean `v_proj`?"),
    "lora={modules_to_save: [lm_hed]}": ("lora.modules_to_save", "Did you mean `lm_head`?"),
    "evaluate={generation: {max_new_tokens: -1}}": ("evaluate.generation.max_new_tokens", "at least 1"),
    "evaluate={generation: {do_sample: true, temperature: -3}}": ("evaluate.generation.temperature", "at least"),
    "train.use_liger_kernel=true": ("train.use_liger_kernel", "pip install liger-kernel"),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_of_a_new_user_are_shown_at_their_place(words, go):
    where, write = MISTAKES[words]
    code, _, err = go(RECIPE, words, command=["check"])
    assert code == 2
    assert where in err
    assert write in err


def test_metric_that_no_evaluation_logs_is_refused_before_weights(go):
    words = ["data={train: rows.jsonl, eval_fraction: 0.2}", "train.load_best_model_at_end=true"]
    words += ["train.eval_strategy=epoch", "train.save_strategy=epoch"]
    for readers in (
        words[1:],
        [words[2], "train.save_strategy=best"],
        [words[2], "train.lr_scheduler_type=reduce_lr_on_plateau"],
    ):
        code, _, err = go(RECIPE, words[0], *readers, "train.metric_for_best_model=eval_los", command=["check"])
        assert code == 2
        assert "no evaluation logs eval_los\n    -> Set one of eval_loss, eval_mean_token_accuracy" in err
    for name in ("eval_loss", "mean_token_accuracy"):
        assert go(RECIPE, *words, f"train.metric_for_best_model={name}", "run.overwrite=true")[0] == 0


@pytest.mark.parametrize("words", ["H100", "8x80", "8x80GB"])
def test_unreadable_machine_is_refused_with_fast_too(words, go):
    assert go(RECIPE, "--fast", "--on", words, command=["check"])[0] == 2
