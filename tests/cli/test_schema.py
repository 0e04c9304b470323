"""The JSON Schema gives the verdict of `load_recipe` on keys and types; what it cannot tell is listed here."""

import copy
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import QUESTIONS, jsonl
from jsonschema import Draft202012Validator
from test_bad_input import RECIPES
from test_renamed_keys import LIST, with_old
from test_types import BEGINNING, RIGHT, WRONG

from trl_sft import cli, load_recipe
from trl_sft.cli.schema import json_schema
from trl_sft.errors import RecipeError
from trl_sft.recipe import sections, yaml_reader
from trl_sft.recipe.upstream import keys
from trl_sft.recipe.yaml_reader import format_value

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "recipes").rglob("*.yaml"))
SCHEMA = json_schema.build()
VALIDATOR = Draft202012Validator(SCHEMA)

# Refused recipes of test_bad_input that a schema accepts, by what is needed to refuse them.
BEYOND = {
    "the file's text": ["duplicate_key", "duplicate_section", "environment", "tag"],
    "the disk or the hub": [
        *("missing_model_folder", "model_is_a_data_folder", "unknown_embedded_name", "hub_id_offline"),
        *("hub_data_offline", "missing_data_file", "no_file_matches", "data_of_no_known_kind", "resume_from_nothing"),
        *("template_file_that_is_missing", "template_of_no_known_name", "template_from_a_file_of_rows"),
        *("template_of_a_tokenizer_offline", "template_keyword_that_it_does_not_read", "format_of_no_known_name"),
        *("format_function_without_file", "format_function_without_module", "lora_targets_nothing"),
    ],
    "the rows": [
        *("unknown_wording_column", "wording_without_completion", "wording_with_a_broken_brace"),
        *("wording_task_without_task", "rename_of_a_column_that_is_not_there", "rename_to_a_column_that_is_there"),
        *("loss_on_turns_of_no_chat", "eval_fraction_of_too_few", "source_keyword_of_another_builder"),
    ],
    "two keys, or a range": [
        *("eval_fraction_0", "eval_fraction_1", "eval_twice", "eval_without_rows", "loss_on_contradicted"),
        *("keys_that_exclude_each_other", "packing_without_length", "quantization_without_lora"),
        "launch_config_without_engine",
        *("quantization_of_nothing", "quantization_of_two_kinds", "quantization_keys_without_effect"),
    ],
}


def accepted(values):
    return not list(VALIDATOR.iter_errors(values))


def loaded(values, here):
    (here / "r.yaml").write_text(format_value(values))
    try:
        load_recipe("r.yaml")
    except RecipeError as error:
        return str(error)
    return ""


def test_schema_is_valid_and_names_the_versions():
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"].endswith("2020-12/schema")
    assert "trl " in SCHEMA["description"]
    assert set(SCHEMA["properties"]) >= set(sections.OWNERS)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_recipe_of_the_repository_passes_and_names_the_schema(path):
    assert [error.message for error in VALIDATOR.iter_errors(yaml_reader.read_recipe(path).values)] == []
    schema = f"{'../' * len(path.relative_to(ROOT).parents[1:])}trl_sft.schema.json"
    assert path.read_text(encoding="utf-8").startswith(f"# yaml-language-server: $schema={schema}\n")


def test_every_key_is_in_the_schema_with_its_help():
    for section in sections.OWNERS:
        part = SCHEMA["properties"][section]
        properties = part["anyOf"][0]["properties"] if section == "evaluate" else part["properties"]
        assert set(keys.get_fields(section)) <= set(properties), section
        for name in set(keys.get_fields(section)) - set(sections.REFUSED.get(section, ())):
            assert properties[name].get("description", "") == keys.get_help(section, name), name


@pytest.mark.parametrize("name", RECIPES)
def test_refused_recipe_fails_or_is_listed_as_beyond_a_schema(name, here):
    text, *words = RECIPES[name]
    if words:
        pytest.skip("an override is no text of the file")
    try:
        values = yaml.safe_load(text.replace("!env ", ""))
    except yaml.YAMLError:
        pytest.skip("no YAML")
    assert accepted(values) == (name in {name for names in BEYOND.values() for name in names})


def test_list_of_what_is_beyond_a_schema_names_recipes():
    listed = [name for names in BEYOND.values() for name in names]
    assert len(listed) == len(set(listed))
    assert set(listed) <= set(RECIPES)


@pytest.mark.parametrize("text", [*WRONG, *RIGHT])
def test_schema_agrees_on_types_in_depth(text):
    beginning = BEGINNING.split("\n", 1)[1] if text.startswith("model") else BEGINNING
    beyond = ("optim_args", '\'{"num_cycle"')  # keys inside a text
    wrong = text in WRONG and not any(word in text for word in beyond)
    assert accepted(yaml.safe_load(beginning + text)) == (not wrong)


@pytest.mark.parametrize("entry", LIST, ids=lambda e: f"{e['section']}.{e['old']}={e['value']}")
def test_old_name_is_deprecated_or_refused_like_in_a_recipe(entry):
    assert accepted(yaml.safe_load(with_old(entry))) == ("becomes" in entry)


def test_old_names_are_marked_as_deprecated():
    properties = SCHEMA["properties"]["train"]["properties"]
    assert properties["evaluation_strategy"]["deprecated"]
    assert properties["evaluation_strategy"]["enum"] == properties["eval_strategy"]["enum"]
    assert "learning_rate" in properties
    assert "deprecated" not in properties["learning_rate"]


BASE = {
    "model": {"name_or_path": "trl_sft:tiny", "dtype": "bfloat16", "attn_implementation": "sdpa"},
    "tokenizer": {"padding_side": "left", "model_max_length": 512},
    "lora": {"r": 8, "target_modules": ["q_proj"], "bias": "none", "eva_config": None, "rank_pattern": {"q": 4}},
    "data": {
        "train": [{"path": "rows.jsonl", "split": "train", "rename": {"a": "b"}, "max_rows": 9, "streaming": False}],
        "eval_fraction": 0.1,
        "loss_on": "completion",
        "drop_leaked": True,
    },
    "train": {
        "max_steps": 3,
        "learning_rate": 0.001,
        "optim": "sgd",
        "packing": False,
        "report_to": ["wandb"],
        "max_length": None,
        "lr_scheduler_type": "cosine",
        "lr_scheduler_kwargs": {"num_cycles": 0.5},
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "accelerator_config": {"even_batches": True},
        "warmup_ratio": 0.1,
        "logging_strategy": "steps",
    },
    "evaluate": {"max_rows": 5, "generation": {"do_sample": False, "max_new_tokens": 4, "stop_strings": ["a"]}},
    "run": {"resume": "never", "allow": ["changed_data"], "max_hours": 1.5},
}
POOL = [None, True, 3, 0.25, "many", "none", [1], ["x"], [], {}, {"a": 1}, [[1.5]]]
# A value that `rules` or `paths` refuses, not its type; `{path: ...}` may stand for any of these.
NOT_OF_TYPE = ("eval_fraction", "max_rows", "max_hours", "resume", "name_or_path", "path", "dtype", "split", "train")


def places(values, key=()):
    """Yield every place of a recipe that holds a value."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for name, value in pairs:
        yield (*key, name)
        yield from places(value, (*key, name))


def broken(rng):
    """Return a recipe with one thing changed: a value, a name, or a key in the wrong place."""
    values = copy.deepcopy(BASE)
    *above, last = rng.choice(list(places(values)))
    target = values
    for part in above:
        target = target[part]
    how = rng.choice(("value", "name", "move"))
    if how == "value" or not isinstance(target, dict):
        target[last] = rng.choice(POOL)
        return values, (*above, last)
    if how == "move":
        section = rng.choice([name for name in values if name not in (last, *above)])
        values[section][last] = target.pop(last)
        return values, (section, last)
    at = rng.randrange(len(last))
    target[last[:at] + rng.choice(("", last[at] * 2, "x")) + last[at + 1 :]] = target.pop(last)
    return values, (*above, "(misspelt)")


def test_schema_and_recipe_agree_on_a_hundred_broken_recipes(here):
    jsonl(here / "rows.jsonl", QUESTIONS)
    assert loaded(BASE, here) == ""
    assert accepted(BASE)
    rng, refused, beyond = random.Random(0), 0, []
    while refused < 100:
        values, place = broken(rng)
        message = loaded(values, here)
        refused += bool(message)
        if bool(message) == accepted(values):
            beyond.append((place, message))
    assert [case for case in beyond if case[0][-1] not in NOT_OF_TYPE] == []
    assert len(beyond) <= 10


def test_whole_number_written_as_a_fraction_is_beyond_a_schema(here):
    """1.0 is an integer of JSON Schema; upstream's `int` is none."""
    values = copy.deepcopy(BASE)
    values["train"]["max_steps"] = 3.0
    assert accepted(values)
    assert "a whole number" in loaded(values, here)


def test_command_writes_the_schema_and_the_line_for_editors(here, capsys):
    assert cli.main(["schema", "-o", "s.json"]) == 0
    assert "# yaml-language-server: $schema=s.json" in capsys.readouterr().out
    assert json.loads((here / "s.json").read_text()) == SCHEMA
    assert cli.main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == SCHEMA
    assert cli.main(["schema", "-o", "s.json/below.json"]) == 2
    assert "a file that can be written" in capsys.readouterr().err


def test_schema_command_imports_nothing_heavy(here):
    code = (
        "import sys; from trl_sft.cli.schema import json_schema; json_schema.build();"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'peft', 'accelerate'} & set(sys.modules);"
        "sys.exit(' '.join(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.stderr.strip()


def test_init_names_the_schema_in_the_folder_of_the_recipe(here):
    jsonl(here / "rows.jsonl", QUESTIONS)
    line = "# yaml-language-server: $schema=trl_sft.schema.json"
    assert cli.main(["init", "trl_sft:tiny", "rows.jsonl", "-o", "a.yaml"]) == 0
    assert line not in (here / "a.yaml").read_text()
    assert cli.main(["schema", "-o", "trl_sft.schema.json"]) == 0
    assert cli.main(["init", "trl_sft:tiny", "rows.jsonl", "-o", "b.yaml"]) == 0
    assert (here / "b.yaml").read_text().startswith(line + "\n")
    assert accepted(yaml_reader.read_recipe("b.yaml").values)
