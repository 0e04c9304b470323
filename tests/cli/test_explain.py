"""`explain`: owner, type, default and help of a key; who set each value of a recipe; no heavy import."""

import contextlib
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import RECIPE
from trl import SFTConfig

import trl_sft
from trl_sft import cli, load_recipe
from trl_sft.cli.explain.key import explain_key
from trl_sft.cli.explain.recipe import explain_recipe
from trl_sft.errors import RecipeError
from trl_sft.recipe import renamed_keys, sections
from trl_sft.recipe.upstream import keys, packages
from trl_sft.recipe.yaml_reader import format_value

SECTIONS = (*sections.OWNERS, keys.GENERATION, keys.SOURCE)


def explain(*words):
    return "\n".join(explain_key(*words))


def test_key_is_shown_with_owner_type_default_and_help():
    text = explain("train.packing_strategy")
    live = SFTConfig.__dataclass_fields__["packing_strategy"]
    assert text.startswith(f"train.packing_strategy   (trl.SFTConfig {packages.get_version('trl')})")
    assert all(word in text for word in live.metadata["choices"])
    assert f"default  {format_value(live.default)}" in text
    assert " ".join(live.metadata["help"].split())[:60] in " ".join(text.split())


def test_help_is_the_live_metadata_for_every_field_of_sft_config():
    for name, field in SFTConfig.__dataclass_fields__.items():
        if field.metadata.get("help"):
            assert keys.get_help("train", name) == field.metadata["help"].replace("%%", "%"), name


def test_every_key_can_be_explained():
    for section in SECTIONS:
        for name in (*keys.get_fields(section), *renamed_keys.renamed_in(section)):
            lines = explain_key(f"{section}.{name}")
            assert lines, (section, name)
            assert max(len(line) for line in lines) <= 250, name


def test_own_keys_and_no_others_have_a_help_of_trl_sft():
    own = {section: set(names) for section, names in sections.OWN_KEYS.items() if names}
    own |= {".".join(key): set(names) for key, names in sections.OWN_NESTED_KEYS.items()}
    assert {section: set(names) for section, names in sections.OWN_HELP.items()} == own


def test_nearly_every_key_of_an_owner_has_help():
    silent = [(s, n) for s in SECTIONS for n in keys.get_fields(s) if not keys.get_help(s, n)]
    assert len(silent) < 25
    assert not [name for section, name in silent if section in ("train", "lora", "quantization")]


def test_word_without_section_is_its_key_or_a_list_of_keys():
    assert explain("packing") == explain("train.packing")
    assert [line.split()[0] for line in explain("token").splitlines()[1:]] == [
        *("model.token", "tokenizer.token", "data.train.token")
    ]
    assert "for files of csv" in explain("delimiter")


def test_section_lists_its_keys():
    assert "learning_rate" in explain("train")
    assert "model_init_kwargs" not in explain("train")
    assert "name_or_path" in explain("model")


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("train.no_cuda", "read as  train.use_cpu"),
        ("train.adafactor", 'true as "adafactor"'),
        ("train.overwrite_output_dir", "else     Set `run.overwrite"),
        ("train.use_mps_device", "this means the same as leaving the key out"),
        ("group_by_length", "train_sampling_strategy"),
        ("train.deepspeed", "refused in a recipe: "),
        ("lora.peft_type", "refused in a recipe: "),
        ("run.early_stopping", "Its keys (trl_sft): patience, threshold"),
        ("run.early_stopping.patience", "default  3"),
        ("train.bf16", "sets this key if the recipe does not"),
        ("data.train.0.weight", "share of this source in the rows"),
        ("data.eval.path", "A file, a glob"),
        ("lora.loftq_config.loftq_bits", "default  4"),
        ("train.lr_scheduler_kwargs.num_cycles", "lr_scheduler_type: cosine"),
        ("train.gradient_checkpointing_kwargs.use_reentrant", "reentrant autograd"),
        ("evaluate.generation.cache_implementation", "one of static"),
        ("lora.runtime_config", "ephemeral_gpu_offload"),
    ],
)
def test_explanation_contains_what_matters(word, text):
    assert text in explain(word)


@pytest.mark.parametrize(
    ("word", "fix"),
    [
        ("pakking", "Did you mean `train.packing`?"),
        ("train.learning_rat", "Did you mean `train.learning_rate`?"),
        ("evaluate.generation.temprature", "Did you mean `evaluate.generation.temperature`?"),
        ("trian", "Did you mean `train`?"),
        ("xyzzy", "Run `explain SECTION` to list"),
        ("train.packing.deep", "Run `explain SECTION` to list"),
        ("..", "Run `explain SECTION` to list"),
    ],
)
def test_unknown_key_gets_a_suggestion_and_exit_code_2(word, fix, capsys):
    assert cli.main(["explain", word]) == 2
    assert f"-> {fix}" in capsys.readouterr().err


def test_random_words_never_crash_explain():
    rng = random.Random(0)
    parts = ["", *"train data * 0 evaluate generation lora eva_config path é no_cuda run".split()]
    for _ in range(300):
        word = ".".join(rng.choice(parts) for _ in range(rng.randint(1, 4)))
        with contextlib.suppress(RecipeError):
            assert explain_key(word)


def test_value_of_a_recipe_is_shown_with_who_set_it(here):
    more = "  learning_rate: 1e-3\n  lr_scheduler_type: cosine\n  lr_scheduler_kwargs: {num_cycles: 0.7}\n"
    (here / "r.yaml").write_text(RECIPE + more + "run: {max_hours: 2}\n")
    for words, text in (
        (("learning_rate", ["r.yaml"]), "value    0.001   r.yaml:9"),
        (("learning_rate", ["r.yaml", "train.learning_rate=3"]), "value    3   (train.learning_rate=3)"),
        (("train.lr_scheduler_kwargs.num_cycles", ["r.yaml"]), "value    0.7   r.yaml:11"),
        (("run.max_hours", ["r.yaml"]), "value    2   r.yaml:12"),
        (("train.output_dir", ["r.yaml"]), f'value    "{here / "out"}"   r.yaml:4'),
        (("lora.r", ["r.yaml"]), "not set in the recipe"),
        (("data.train.path", ["r.yaml"]), "A file"),
    ):
        assert text in explain(*words), words


def test_whole_run_marks_values_that_differ_from_the_owners_defaults(here):
    (here / "r.yaml").write_text(RECIPE + "  max_length: 1024\n  no_cuda: true\n  hub_token: hf_secret\n")
    lines = explain_recipe(load_recipe("r.yaml", ["train.seed=7", "lora={r: 4}"]))
    text = "\n".join(lines)
    assert "* max_steps: 2  # r.yaml:5" in lines
    assert "* seed: 7  # (train.seed=7)" in lines
    assert "  max_length: 1024  # r.yaml:9" in lines
    assert "* use_cpu: true  # r.yaml:10" in lines
    assert "  weight_decay: 0.0" in lines
    assert "* r: 4  # (lora={r: 4})" in lines
    assert any(line.startswith("? bf16:") for line in lines)
    assert "hf_secret" not in text
    assert "read as `use_cpu: true`" in text
    assert "  resume: unset  # auto (unset) continues" in text
    own = {name for section in ("data", "evaluate", "run") for name in sections.OWN_KEYS[section]} - {"train", "eval"}
    assert [name for name in own if not re.search(rf"^[ *?] {name}:", text, re.MULTILINE)] == []
    off = explain_recipe(load_recipe("r.yaml", ["evaluate=false"]))
    assert "run:  # trl_sft" in off
    assert not any(line.startswith("evaluate:") for line in off)
    fields = [name for name in keys.get_fields("train") if name not in sections.REFUSED["train"]]
    assert [name for name in fields if not re.search(rf"^[ *?] {name}:", text, re.MULTILINE)] == []


def test_faulty_recipe_is_refused_as_by_any_command(here, capsys):
    (here / "r.yaml").write_text(RECIPE + "  pakking: true\n")
    assert cli.main(["explain", "r.yaml"]) == 2
    assert "-> Did you mean `packing`?" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="no such file"):
        explain_key("train.packing", ["gone.yaml"])


def test_list_of_values_that_trl_sft_sets_is_that_of_the_code():
    written = "".join(
        path.read_text() for path in Path(trl_sft.__file__).parent.rglob("*.py") if path.stem != "sections"
    )
    settings = set(re.findall(r'\("(\w+)", "(\w+)"\): Setting\(', written))
    settings |= set(re.findall(r'\["(\w+)", "(\w+)"\] = Setting\(', written))
    settings |= set(re.findall(r'\("(\w+)", "(\w+)"\): Setting\(', re.sub(r"\s+", " ", written)))
    assert settings == set(sections.OWN_DEFAULTS)


@pytest.mark.parametrize("words", [["packing"], ["model.dtype"], ["train.lr_scheduler_kwargs"], ["r.yaml"]])
def test_explain_imports_nothing_heavy(words, here):
    (here / "r.yaml").write_text(RECIPE)
    code = (
        "import sys; from trl_sft import cli; assert cli.main(['explain', *sys.argv[1:]]) == 0;"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'peft', 'accelerate'} & set(sys.modules);"
        "sys.exit(' '.join(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert not done.stderr.strip()
