"""Suggestions are right: by meaning before letters, across sections, on the command line too."""

import re

import pytest
from conftest import QUESTIONS, jsonl

from trl_sft import cli, errors, load_recipe
from trl_sft.errors import Edit
from trl_sft.recipe import misplaced_keys, sections, suggested_keys, synonyms
from trl_sft.recipe.upstream import keys

MODEL = "model: {name_or_path: trl_sft:tiny}\n"
DATA = "data: {train: rows.jsonl}\n"
# what a user writes at the top of a recipe or in `train:` -> what a person of the field means by it
MEANT = {
    "batch_size": "train.per_device_train_batch_size",
    "micro_batch_size": "train.per_device_train_batch_size",
    "lr": "train.learning_rate",
    "epochs": "train.num_train_epochs",
    "max_seq_len": "train.max_length",
    "cutoff_len": "train.max_length",
    "sequence_len": "train.max_length",
    "grad_accum": "train.gradient_accumulation_steps",
    "warmup": "train.warmup_steps",
    "output": "train.output_dir",
    "dataset": "data.train",
    "base_model": "model.name_or_path",
    "template": "tokenizer.chat_template",
    "load_in_4bit": "quantization.load_in_4bit",
    "lora_rank": "lora.r",
    "lora_r": "lora.r",
    "lora_alpha": "lora.lora_alpha",
    "target_modules": "lora.target_modules",
    "val_set_size": "data.eval_fraction",
    "train_on_inputs": "data.loss_on",
    "neftune_alpha": "train.neftune_noise_alpha",
    "batchSize": "train.per_device_train_batch_size",
    "learning-rate": "train.learning_rate",
    "temperature": "evaluate.generation.temperature",
    "flash_attn": "model.attn_implementation",
    "scheduler": "train.lr_scheduler_type",
    "optimizer": "train.optim",
    "sample_packing": "train.packing",
    "num_workers": "train.dataloader_num_workers",
    "global_batch": None,
    "frobnicate": None,
}


@pytest.fixture
def faults_of(here):
    jsonl("rows.jsonl", QUESTIONS)

    def collect(text, *overrides):
        (here / "recipe.yaml").write_text(text)
        try:
            load_recipe("recipe.yaml", overrides)
        except errors.UserError as error:
            return error.faults
        return []

    return collect


@pytest.mark.parametrize("word", MEANT)
def test_word_of_the_field_is_understood_at_the_top_in_train_and_on_the_command_line(word, faults_of):
    meant = MEANT[word]
    for text, overrides in (
        (f"{MODEL}{DATA}{word}: x\n", ()),
        (f"{MODEL}{DATA}train: {{{word}: x}}\n", ()),
        (MODEL + DATA, (f"{word}=x",)),
    ):
        (fault, *_) = faults_of(text, *overrides)
        if meant is None:
            assert "Did you mean" not in fault.fix
            continue
        names = (meant, meant.removeprefix("train.")) if "train: {" in text else (meant,)
        is_named = any(f"`{name}`" in fault.fix for name in names)
        is_moved = f"Move it to the section `{meant.partition('.')[0]}:`" in fault.fix and meant.endswith(word)
        assert is_named or is_moved, (text, fault)


def test_every_word_of_the_tables_names_a_key_of_today():
    known = {*sections.OWNERS, "data.train.max_rows", "data.train.rename", "data.train.format", "data.train.wording"}
    for section in sections.OWNERS:
        known |= {f"{section}.{name}" for name in keys.get_fields(section)}
    known |= {f"evaluate.generation.{name}" for name in keys.get_fields(keys.GENERATION)}
    for section, table in synonyms.SECTION_SYNONYMS.items():
        assert {f"{section}.{name}" for name in table.values()} <= known
    assert set(synonyms.SECTIONS.values()) <= set(sections.OWNERS)
    for table in (synonyms.SYNONYMS, synonyms.RELATED):
        assert set(table.values()) <= known
        assert all(word == word.lower() and "_" not in word for word in table)
    assert set(synonyms.SYNONYMS) & set(synonyms.RELATED) == set()
    source = keys.get_fields(keys.SOURCE)
    assert {*synonyms.SOURCE_SYNONYMS.values(), *synonyms.SOURCE_RELATED.values()} <= set(source)


def test_no_word_of_the_tables_is_a_key_of_the_section_that_it_names():
    """Such a word would never be looked up, or would turn one key into another."""
    for word, meant in synonyms.SYNONYMS.items():
        section, _, name = meant.partition(".")
        fields = {field.replace("_", "") for field in keys.get_fields(section)}
        assert word == name.replace("_", "") or word not in fields or word in ("activationcheckpointing",), word


@pytest.mark.parametrize(
    ("text", "edit"),
    [
        ('train: {learning_rate: "2e-5"}', Edit("set", ("train", "learning_rate"), 2e-5)),
        ("train: {packing: 'True'}", Edit("set", ("train", "packing"), True)),
        ("train: {packing: on}", Edit("set", ("train", "packing"), True)),
        ("train: {max_steps: 3.0}", Edit("set", ("train", "max_steps"), 3)),
        ("train: {max_length: None}", Edit("set", ("train", "max_length"), None)),
        ("train: {save_strategy: false}", Edit("set", ("train", "save_strategy"), "no")),
        ("train: {lr_scheduler_type: Cosine}", Edit("set", ("train", "lr_scheduler_type"), "cosine")),
        ("train: {run_name: 2024}", Edit("set", ("train", "run_name"), "2024")),
        ("run: {allow: changed_data}", Edit("set", ("run", "allow"), ["changed_data"])),
        ("trian: {max_steps: 3}", Edit("rename", ("trian",), new=("train",))),
        ("train: {learnign_rate: 1e-4}", Edit("rename", ("train", "learnign_rate"), new=("train", "learning_rate"))),
        ("lr: 1e-4", Edit("rename", ("lr",), new=("train", "learning_rate"))),
        ("training: {max_steps: 3}", Edit("rename", ("training",), new=("train",))),
        ("lora_config: {r: 8}", Edit("rename", ("lora_config",), new=("lora",))),
        ("lora: {alpha: 8}", Edit("rename", ("lora", "alpha"), new=("lora", "lora_alpha"))),
        ("lora: true", Edit("set", ("lora",), {})),
        ("lora: {r: 4}\nquantization: 4bit", Edit("set", ("quantization",), {"load_in_4bit": True})),
        ("evaluate: no", Edit("set", ("evaluate",), False)),
        ("train:\n  max_steps = 3", Edit("set", ("train",), {"max_steps": 3})),
        ("lora: 8", None),
        ("training: fast", None),
        ("tokenizer: {name_or_path: a/b}", None),
        ("wandb_project: x", None),
        ("train: {resume_from_checkpoint: out/checkpoint-2}", None),
        ("train: {max_steps: many}", None),
        ("train: {max_steps: 3.5}", None),
        ("train: {learning_rate: '1,5'}", None),
        ("train: {optim: adam}", None),
        ("train: {eval_step: 3, eval_steps: 4}", None),
        ("train: {template: qwen}", None),
        ("train: {beta: 0.9}", None),
        ("val_set_size: 200", None),
        ("train: {save_steps: 5}\ntrian: {save_steps: 6}", None),
    ],
)
def test_edit_is_there_only_where_the_meaning_is_certain(text, edit, faults_of):
    faults = faults_of(MODEL + DATA + text + "\n")
    assert faults
    edits = [found for fault in faults for found in fault.edits]
    if edit is None:
        assert edits == [] or edits[0].new == ("run", "resume")
    else:
        assert edit in edits


def test_number_in_quotes_is_told_to_be_written_without():
    field = suggested_keys.get_field(("train", "learning_rate"))
    from trl_sft.recipe import corrections

    assert corrections.correct(field, "2e-5").fix == "Write 2e-05 without quotes."


def test_wrong_values_and_keys_hide_no_other_fault(faults_of):
    faults = faults_of(
        "base_model: trl_sft:tiny\n" + DATA + "train:\n  packing: 'true'\n  max_length: null\n  seed: 1\n  seed: 2\n"
        "  lrr: 3\n  eval_strategy: steps\n  learning_rate: '${LR}'\n"
    )
    codes = {fault.code for fault in faults}
    assert codes == {
        *("recipe.unknown_key", "recipe.wrong_type", "recipe.duplicate_key", "recipe.environment_variable"),
        *("recipe.needs_key", "recipe.needs_evaluation_set"),
    }
    of_the_rate = [fault.code for fault in faults if "learning_rate" in str(fault.where)]
    assert of_the_rate == ["recipe.environment_variable"]  # that it is no number follows from the variable


@pytest.mark.parametrize(
    ("text", "place", "fix"),
    [
        ("train:\n\tseed: 1\n", "recipe.yaml:4", "Indent with spaces"),
        (
            "train:\n  report_to: [wandb\n  seed: 1\n",
            "recipe.yaml:5",
            "Close the bracket that opens in line 4, or write a comma here.",
        ),
        ("train:\n  report_to: [wandb\n", "recipe.yaml:4", "Close the bracket or the quotation mark."),
        ("train:\n  run_name: 'a\n\n# end\n", "recipe.yaml:4", "Close the bracket or the quotation mark."),
        ("wandb_project: x\n", "recipe.yaml:3", "Set the environment variable WANDB_PROJECT"),
        ("train: {device: cuda}\n", "recipe.yaml:3", "Remove it: a GPU is used where there is one."),
    ],
)
def test_fault_names_the_line_where_to_write_and_what(text, place, fix, faults_of):
    (fault,) = faults_of(MODEL + DATA + text)
    assert str(fault.where).startswith(place)
    assert fix in fault.fix


def test_keys_of_a_source_that_stand_in_data_are_moved_into_it(faults_of):
    (fault,) = faults_of(MODEL + "data: {train: rows.jsonl, format: question_answer}\n")
    assert fault.fix == "Write it in the source: `data.train: {path: FILE, format: VALUE}`."
    source = {"path": "rows.jsonl", "format": "question_answer"}
    assert fault.edits == (Edit("set", ("data", "train"), source), Edit("remove", ("data", "format")))


@pytest.mark.parametrize(
    ("text", "tool"),
    [
        ("base_model: a/b\ndatasets: [{path: x}]\nmicro_batch_size: 2\n", "axolotl"),
        ("model_name_or_path: a/b\nstage: sft\ntemplate: qwen\ndataset: x\n", "llamafactory"),
        ("model_name_or_path: a/b\ndataset_mixer: {x: 1}\n", "alignment-handbook"),
        ("model_name_or_path: a/b\ndataset_name: x\nuse_peft: true\n", "trl"),
        ("model_name_or_path: a/b\nfoo: 1\n", ""),
        ("base_model: a/b\ndata: {train: x}\ndatasets: []\n", ""),
    ],
)
def test_file_of_another_trainer_is_recognised(text, tool, faults_of):
    faults = faults_of(text)
    if tool:
        assert [fault.code for fault in faults] == ["recipe.other_tool"]
        assert f"trl_sft import {tool} recipe.yaml -o NEW.yaml" in faults[0].fix
    else:
        assert "recipe.other_tool" not in {fault.code for fault in faults}


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["train", "x.yaml", "train.max_steps=3"], "Write `python -m trl_sft x.yaml train.max_steps=3`"),
        (["finetune", "x.yaml"], "Write `python -m trl_sft x.yaml`"),
        (["validate", "x.yaml"], "Did you mean `check`?"),
        (["tokenize", "x.yaml"], "Did you mean `prepare`?"),
        (["chekc", "x.yaml"], "Did you mean `check`?"),
        (["help"], "Did you mean `--help`?"),
        (["rows.jsonl"], "python -m trl_sft init MODEL rows.jsonl"),
        (["check", "r.toml"], "`max_steps = 3` becomes `max_steps: 3`"),
        (["explain", "epochs"], "Did you mean `train.num_train_epochs`?"),
        (["explain", "train.lr"], "Did you mean `train.learning_rate`?"),
        (["recipe.yaml", "lr=2e-5"], "Did you mean `train.learning_rate`?"),
    ],
    ids=" ".join,
)
def test_wrong_command_line_names_the_right_one(words, fix, here, capsys):
    (here / "r.toml").write_text("[train]\nmax_steps = 3\n")
    (here / "recipe.yaml").write_text(MODEL + DATA)
    assert cli.main(words) == 2
    assert fix in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("--learning_rate", "Did you mean `train.learning_rate=2e-5`?"),
        ("--batch-size", "Did you mean `train.per_device_train_batch_size=2e-5`?"),
        ("--fsat", "Did you mean `--fast`?"),
        ("--frobnicate", "Values of a recipe are written as section.key=value"),
    ],
)
def test_option_that_does_not_exist_names_the_override(word, hint, here, capsys):
    (here / "recipe.yaml").write_text(MODEL + DATA)
    with pytest.raises(SystemExit):
        cli.main(["check", "recipe.yaml", f"{word}=2e-5"])
    assert hint in capsys.readouterr().err


def test_suggested_keys_of_one_word_are_the_same_wherever_it_stands():
    for word in ("lr", "epochs", "base_model"):
        at_top = misplaced_keys.suggest((word,)).keys
        assert at_top == misplaced_keys.suggest(("lora", word)).keys
        assert re.fullmatch(r"[a-z_.]+", ".".join(map(str, at_top[0])))
