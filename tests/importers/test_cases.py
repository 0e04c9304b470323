"""Configurations from public reports: what each of them becomes."""

import shutil
from pathlib import Path

import pytest
import transformers
import yaml
from conftest import jsonl
from packaging.version import Version
from transformers import AutoTokenizer
from trl import SFTConfig

from trl_sft import cli, load_recipe
from trl_sft.recipe import paths, yaml_reader
from trl_sft.training import stages

CASES = Path(__file__).parent / "configurations" / "cases"
# transformers 5.17 has the older name
CHECKPOINTING = "activation_checkpointing"
if Version(transformers.__version__) < Version("5.23") and CHECKPOINTING not in SFTConfig.__dataclass_fields__:
    CHECKPOINTING = "gradient_checkpointing"
REASONS = "THE RECIPE DOES NOT TRAIN THE SAME AS THE SETTINGS"


@pytest.fixture
def import_case(here, capsys):
    """Import a case: exit code, the recipe as values, what is said on standard error, and the faults of `check`."""

    def call(tool, name, *files):
        for file in files:
            shutil.copy(CASES / tool / file, here)
        shutil.copy(CASES / tool / f"{name}.yaml", here / "config.yaml")
        capsys.readouterr()
        code = cli.main(["import", tool, "config.yaml", "-o", "recipe.yaml"])
        err = capsys.readouterr().err
        if not (here / "recipe.yaml").exists():
            return code, None, err
        values = yaml.load((here / "recipe.yaml").read_text(), Loader=yaml_reader._Loader)
        assert cli.main(["check", "recipe.yaml", "--fast"]) == 0, capsys.readouterr().err
        return code, values, err

    return call


CARRIED = [
    ("axolotl", "ax-conversation-lost", {"tokenizer.chat_template": "chatml"}),
    (
        "axolotl",
        "ax-cosine-min",
        {"train.lr_scheduler_type": "cosine_with_min_lr", "train.lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
    ),
    ("axolotl", "ax-eval-split-lost", {"data.eval.split": "train", "data.eval.path": "org/held-out"}),
    ("llamafactory", "ax-eval-split-lost", {"data.eval.split": "train", "data.eval.path": "org/held"}),
    (
        "axolotl",
        "ax-hub-push-lost",
        {"train.push_to_hub": True, "train.hub_private_repo": True, "train.hub_always_push": True},
    ),
    ("axolotl", "ax-liger", {"train.use_liger_kernel": True}),
    ("axolotl", "ax-optim-args-mapping", {"train.optim_args": "eps=1e-08"}),
    (
        "axolotl",
        "ax-values-refused",
        {"train.max_length": 500000, "train.activation_offloading": True, "model.attn_implementation": None},
    ),
    ("axolotl", "group-by-length-dropped", {"train.train_sampling_strategy": "group_by_length"}),
    ("llamafactory", "group-by-length-dropped", {"train.train_sampling_strategy": "group_by_length"}),
    ("trl", "group-by-length-dropped", {"train.train_sampling_strategy": "group_by_length"}),
    ("alignment-handbook", "handbook-ffd", {"train.packing_strategy": "bfd"}),
    ("alignment-handbook", "handbook-template-lost", {"tokenizer.chat_template": "recipe.jinja"}),
    ("llamafactory", "lf-max-length", {"train.max_length": 2048}),
    ("llamafactory", "lf-qwen-template", {"tokenizer.chat_template": "qwen2_5"}),
    (
        "alignment-handbook",
        "old-names-written",
        {
            "train.max_length": 1024,
            "train.warmup_steps": 0.1,
            f"train.{CHECKPOINTING}": True,
            "train.max_seq_length": None,
            "train.warmup_ratio": None,
        },
    ),
    ("trl", "trl-loss-default", {"data.loss_on": "all"}),
    ("axolotl", "15-axolotl-training-field", {"tokenizer.extra_special_tokens": ["<call>"]}),
]


def find(values, key):
    """Return the value at `section.key.key`; None if there is none."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


@pytest.mark.parametrize(
    ("tool", "name", "expected"), CARRIED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_setting_is_carried_over(tool, name, expected, import_case, here):
    jsonl(here / "rows.jsonl", [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}])
    code, values, err = import_case(tool, name)
    assert code == 0, err
    assert {key: find(values, key) for key in expected} == expected


TOLD = [
    ("axolotl", "ax-shards-quiet", ["rows       config.yaml:8 datasets.0.shards: 20"]),
    ("axolotl", "held-out-count", ["rows       config.yaml:7 val_set_size: 500", "`data.eval_fraction` is a share"]),
    (
        "alignment-handbook",
        "held-out-count",
        ["dataset_mixture.test_split_size: 1000", "dataset_mixture.datasets.0.weight"],
    ),
    ("axolotl", "ax-pretraining", ["rows       config.yaml sample_packing"]),
]


@pytest.mark.parametrize(("tool", "name", "words"), TOLD, ids=lambda value: value if isinstance(value, str) else "")
def test_setting_that_is_not_carried_over_is_told_with_exit_code_5(tool, name, words, import_case):
    code, _, err = import_case(tool, name)
    assert code == 5
    assert REASONS in err
    for word in words:
        assert word in err


REFUSED = [
    (
        "axolotl",
        "ax-other-objective",
        ["plugins.0", "config.yaml:8 diffusion", "config.yaml:9 unfrozen_parameters"][1:],
    ),
    ("axolotl", "ax-vision-as-text", ["config.yaml:7 processor_type", "config.yaml:8 image_size"]),
    ("llamafactory", "lf-multimodal", ["image_max_pixels", "trl_sft trains on text only"]),
    ("llamafactory", "lf-v1", ["a file for LLaMA-Factory v1", "1 problem to fix"]),
    ("trl", "rl-config-as-sft-dpo", ["config.yaml:3 beta", "config.yaml:5 max_prompt_length"]),
    ("trl", "rl-config-as-sft-grpo", ["reward_funcs", "num_generations", "max_completion_length"]),
]


@pytest.mark.parametrize(("tool", "name", "words"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_file_for_another_objective_or_for_images_is_refused_by_name(tool, name, words, import_case):
    code, values, err = import_case(tool, name)
    assert (code, values) == (2, None)
    for word in words:
        assert word in err


def test_template_in_the_settings_is_written_beside_the_recipe(import_case, here):
    import_case("alignment-handbook", "handbook-template-lost")
    settings = yaml.load((here / "config.yaml").read_text(), Loader=yaml_reader._Loader)
    assert (here / "recipe.jinja").read_text() == settings["chat_template"]


def test_each_comment_on_a_mixture_stands_once(import_case, here):
    code, _, err = import_case("alignment-handbook", "repeated-notes")
    assert code == 5
    assert err.count("chat_template_kwargs` of a row") == 1
    text = (here / "recipe.yaml").read_text()
    assert text.count("chat_template_kwargs` of a row") == 1
    assert sum(line.lstrip().startswith("#") for line in text.splitlines()) < 16


def read_first_row(values, here, row):
    """Return the columns that the function of the first source makes of a row."""
    source = values["data"]["train"]
    source = source[0] if isinstance(source, list) else source
    file, _, name = source["format"].partition(":")
    space = {}
    exec((here / file).read_text(), space)  # the file that the import wrote
    return space[name](row)


def read_tokenizer():
    """Return the tokenizer of the embedded model."""
    return AutoTokenizer.from_pretrained(paths.EMBEDDED / "tiny")


def test_alpaca_styles_have_their_own_wording(import_case, here):
    code, values, _ = import_case("axolotl", "ax-alpaca-style-lost")
    assert code == 0
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    prompts = [
        read_first_row({"data": {"train": source}}, here, row)["prompt"].partition("request.")[2]
        for source in values["data"]["train"]
    ]
    assert prompts == [
        "\nUSER: Add.\n1 2\nASSISTANT:",
        "<|end|>\n<|user|>\nAdd.<|end|>1 2<|assistant|>",
        "<|im_end|>\n<|im_start|>user\nAdd.\n1 2<|im_end|>\n<|im_start|>assistant\n",
    ]


def decode_first_row(*overrides):
    """Return the text of the first training row of the recipe, and the text of its tokens with loss."""
    row = stages.prepare(load_recipe("recipe.yaml", ["train.bf16=false", *overrides])).datasets.train[0]
    tokenizer = read_tokenizer()
    trained = [label for label in row["labels"] if label != -100]
    return tokenizer.decode(row["input_ids"]), tokenizer.decode(trained)


def test_text_of_an_alpaca_row_has_no_chat_template_around_it(here, capsys):
    jsonl("rows.jsonl", [{"instruction": f"Add {n}.", "input": "", "output": "3"} for n in range(40)])
    (here / "config.yaml").write_text("base_model: trl_sft:tiny\ndatasets: [{path: rows.jsonl, type: 'alpaca:chat'}]\n")
    assert cli.main(["import", "axolotl", "config.yaml", "-o", "recipe.yaml"]) == 0
    text, trained = decode_first_row()
    assert text.startswith("SYSTEM: Below is an instruction that describes a task. Write")
    assert text.partition("request.")[2].startswith("\nUSER: Add 0.\nASSISTANT:3")
    assert trained.startswith("3")


def test_prompts_and_completions_of_trl_are_texts_without_a_chat_template(here, capsys):
    jsonl("rows.jsonl", [{"prompt": f"Add {n}: ", "completion": "3"} for n in range(40)])
    (here / "config.yaml").write_text("model_name_or_path: trl_sft:tiny\ndataset_name: rows.jsonl\n")
    assert cli.main(["import", "trl", "config.yaml", "-o", "recipe.yaml"]) == 0
    text, trained = decode_first_row()
    assert text.startswith("Add 0: 3")
    assert trained.startswith("3")


def test_keys_of_a_message_are_mapped(import_case, here):
    code, values, _ = import_case("axolotl", "ax-content-mapping-lost")
    assert code == 0
    row = {"turns": [{"role": "user", "text": "hi"}, {"role": "assistant", "text": "yo"}]}
    messages = read_first_row(values, here, row)["messages"]
    assert messages == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def test_roles_of_the_settings_reach_the_tokens(import_case, here):
    jsonl(
        "rows.jsonl",
        [{"turns": [{"who": "customer", "said": "hi"}, {"who": "agent", "said": f"yo {n}"}]} for n in range(40)],
    )
    assert import_case("axolotl", "17-import-names-of-roles")[0] == 0
    rows = stages.prepare(load_recipe("recipe.yaml")).datasets.train
    assert all(any(label != -100 for label in row["labels"]) for row in rows)


def test_turns_that_carry_no_loss_in_axolotl_carry_none_here(import_case, here):
    turns = [
        {"from": "human", "value": "Say it."},
        {"from": "gpt", "value": "aaaa", "learn": False},
        {"from": "human", "value": "Twice."},
        {"from": "gpt", "value": "bbbb", "learn": True},
    ]
    jsonl(
        "rows.jsonl",
        [{"conversations": [turn | {"value": f"{turn['value']} {n}"} for turn in turns]} for n in range(40)],
    )
    assert import_case("axolotl", "15-axolotl-training-field")[0] == 0
    ready = stages.prepare(load_recipe("recipe.yaml", ["train.bf16=false"]))
    row = ready.datasets.train[0]
    trained = read_tokenizer().decode([label for label in row["labels"] if label != -100])
    assert "bbbb" in trained
    assert "aaaa" not in trained


@pytest.mark.parametrize("tool", ["axolotl", "llamafactory"])
def test_long_texts_are_trained_to_their_end(tool, import_case, here):
    jsonl("long.jsonl", [{"text": f"The upper case of abc is ABC. {n} " * 60} for n in range(4)])
    (here / "dataset_info.json").write_text('{"docs": {"file_name": "long.jsonl", "columns": {"prompt": "text"}}}')
    code, values, err = import_case(tool, "long-text-lost")
    assert code == 0, err
    assert values["train"]["packing_strategy"] == {"axolotl": "bfd_split", "llamafactory": "wrapped"}[tool]
    ready = stages.prepare(load_recipe("recipe.yaml", ["train.bf16=false"]))
    text = "".join(read_tokenizer().decode(row["input_ids"]) for row in ready.datasets.train)
    assert text.count("ABC") > 200


def test_pretraining_column_is_renamed(import_case):
    _, values, err = import_case("axolotl", "ax-pretraining")
    source = values["data"]["train"]
    assert (source["rename"], source["streaming"], source["name"]) == ({"content": "text"}, True, "en")
    assert "text_column" not in err


def test_tool_is_recognised_by_the_settings(here, capsys):
    for tool, name in [("axolotl", "ax-liger"), ("llamafactory", "lf-max-length"), ("trl", "trl-loss-default")]:
        shutil.copy(CASES / tool / f"{name}.yaml", here / "config.yaml")
        assert cli.main(["import", "config.yaml"]) == 0
        assert f"read as those of {tool}" in capsys.readouterr().err
    (here / "other.yaml").write_text("a: 1\n")
    assert cli.main(["import", "other.yaml"]) == 2
    assert "the settings are for none of the tools" in capsys.readouterr().err
    (here / "both.yaml").write_text("base_model: a\ncutoff_len: 1\n")
    assert cli.main(["import", "both.yaml"]) == 2
    assert "may be for axolotl or llamafactory" in capsys.readouterr().err
