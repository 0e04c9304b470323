"""Strict reading: YAML 1.2 values, places, overrides, paths."""

import contextlib
import math
import random

import pytest
from conftest import RECIPE

from trl_sft import load_recipe
from trl_sft.errors import RecipeError
from trl_sft.recipe import paths, yaml_reader
from trl_sft.recipe.yaml_reader import format_value


def read(here, text, *words):
    (here / "r.yaml").write_text(text, encoding="utf-8")
    return yaml_reader.read_recipe(here / "r.yaml", words)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("1E3", 1000.0),
        ("-.5", -0.5),
        ("1.", 1.0),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("017", 17),
        ("0o17", 15),
        ("0x1F", 31),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("True", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("null", None),
        ("1_000", "1_000"),
        ("2026-01-01", "2026-01-01"),
        ("1:30", "1:30"),
        ("'2e-5'", "2e-5"),
        ("=", "="),
        ("中文", "中文"),
        ("[1, a]", [1, "a"]),
        ("{0: 1, b: c}", {0: 1, "b": "c"}),
    ],
)
def test_scalars_are_those_of_yaml_1_2(here, text, value):
    parsed = read(here, f"a: {text}\n").values["a"]
    assert parsed == value
    assert type(parsed) is type(value)


def test_nan_is_a_number(here):
    assert math.isnan(read(here, "a: .nan\n").values["a"])


def test_anchor_and_alias_have_the_same_value(here):
    recipe = read(here, "a: &x {b: 1}\nc: *x\nd: [*x, *x]\n").values
    assert recipe == {"a": {"b": 1}, "c": {"b": 1}, "d": [{"b": 1}, {"b": 1}]}


def test_characters_that_json_writes_as_two_halves_are_whole_and_half_a_one_is_refused(here):
    recipe = read(here, 'a: "\\ud83d\\ude00 b"\n"\\ud83d\\ude00": "\\U0001f600"\n')
    assert recipe.values == {"a": "😀 b", "😀": "😀"}
    for text in ('a: "\\ud83d"\n', '"\\ude00": 1\n', 'a: ["\\ude00\\ud83d"]\n'):
        with pytest.raises(RecipeError, match="half a character") as error:
            read(here, text)
        assert str(error.value.faults[0].where).startswith("r.yaml:1")


def test_place_of_a_key_is_its_line_or_its_override(here):
    recipe = read(here, "a:\n  b: 1\n  c: [1,\n    2]\n", "a.b=2", "d.e=3")
    assert recipe.values == {"a": {"b": 2, "c": [1, 2]}, "d": {"e": 3}}
    assert recipe.where(("a", "c")) == "r.yaml:3 a.c"
    assert recipe.where(("a", "c", 1)) == "r.yaml:4 a.c.1"
    assert recipe.where(("a", "b")) == "(a.b=2) a.b"
    assert recipe.where(("d", "e")) == "(d.e=3) d.e"
    assert recipe.where(("a", "gone")) == "r.yaml:1 a.gone"
    assert recipe.where(("gone",)) == "r.yaml gone"


def test_overrides_act_as_if_typed_in_the_file(here):
    text = "data:\n  train:\n    - {path: a}\n    - {path: b}\nlora: {r: 8}\n"
    recipe = read(here, text, "data.train.1.path=c", "lora={r: 16, bias: none}", "train.learning_rate=2e-5")
    assert recipe.values["data"]["train"] == [{"path": "a"}, {"path": "c"}]
    assert recipe.values["lora"] == {"r": 16, "bias": "none"}
    assert recipe.values["train"] == {"learning_rate": 2e-5}
    assert read(here, text, "lora=null").values["lora"] is None


def test_override_null_removes_a_key_unless_null_is_a_value_of_it(here):
    (here / "recipe.yaml").write_text(RECIPE)
    run = load_recipe("recipe.yaml", ["train.max_steps=null", "train.max_length=null"])
    assert "max_steps" not in run.train
    assert run.train["max_length"] is None
    assert load_recipe("recipe.yaml", ["lora={}", "train.seed=3"]).lora == {}
    assert load_recipe("recipe.yaml").lora is None


def test_path_is_relative_to_the_recipe_and_in_an_override_to_the_current_folder(here):
    (here / "sub").mkdir()
    (here / "sub" / "recipe.yaml").write_text(RECIPE)
    (here / "sub" / "rows.jsonl").write_text((here / "rows.jsonl").read_text())
    run = load_recipe("sub/recipe.yaml")
    assert run.sources["train"][0].location.files == (here / "sub" / "rows.jsonl",)
    assert run.output_dir == here / "out"
    run = load_recipe("sub/recipe.yaml", ["data.train=rows.jsonl"])
    assert run.sources["train"][0].location.files == (here / "rows.jsonl",)


def test_run_folder_without_output_dir_is_runs_and_the_name_of_the_recipe(here):
    (here / "mine.yaml").write_text("model: {name_or_path: trl_sft:tiny}\ndata: {train: rows.jsonl}\n")
    assert load_recipe("mine.yaml").output_dir == here / "runs" / "mine"


def test_value_is_a_path_if_it_exists_else_a_hub_id(here, monkeypatch):
    (here / "org").mkdir()
    (here / "org" / "model").mkdir()
    monkeypatch.setenv("HOME", str(here))
    name = lambda value, *more: paths.resolve_location(value, here, *more)  # noqa: E731
    assert name("org/model") == paths.Location((here / "org" / "model",), str(here / "org" / "model"))
    assert name("org/other") == paths.Location((), "org/other")
    assert name("gpt2") == paths.Location((), "gpt2")
    assert name("~/org/model").files == (here / "org" / "model",)
    assert isinstance(name("./org/other"), paths.LocationProblem)
    assert isinstance(name("a/b/c"), paths.LocationProblem)
    assert isinstance(name("org/rows.jsonl", (".jsonl",)), paths.LocationProblem)
    assert name("*.jsonl").files == (here / "rows.jsonl",)
    assert name("trl_sft:tiny").files == (paths.EMBEDDED / "tiny",)
    assert isinstance(name(""), paths.LocationProblem)


def test_format_value_writes_what_the_reader_reads_back(here):
    values = [
        1e-5,
        3,
        True,
        None,
        "no",
        "1e5",
        "a: b",
        "#x",
        "'\"\n中",
        math.inf,
        [],
        {},
        {"a": [1, {"b": None}]},
        {0: 1},
    ]
    for value in values:
        assert read(here, f"a: {format_value(value)}\n").values["a"] == value


def test_mutated_recipe_raises_nothing_but_a_recipe_error(here):
    """A thousand mutations of a recipe give a recipe or a RecipeError, never another exception."""
    rng = random.Random(0)
    text = "model: {name_or_path: x}\ndata:\n  train: [{path: a.jsonl, split: 'train[:10]'}]\ntrain: {a: &b 1, c: *b}\n"
    for _ in range(1000):
        letters = list(text)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(letters))
            letters[at] = rng.choice("{}[]:,&*!|>'\"%@`#-?\t\n x0~\\" + chr(rng.randrange(1, 0x2FFF)))
        (here / "r.yaml").write_text("".join(letters), encoding="utf-8")
        words = ["".join(rng.choice("a.=[]{}01:") for _ in range(6))]
        with contextlib.suppress(RecipeError):
            load_recipe(here / "r.yaml", words)
