"""The fields read from the installed sources equal those of the live classes; every default passes its own type."""

import ast
import dataclasses
import inspect
import math

import pytest
from datasets import BuilderConfig, load_dataset
from datasets.packaged_modules.csv.csv import CsvConfig
from datasets.packaged_modules.json.json import JsonConfig
from peft import LoraConfig
from trl import SFTConfig

from trl_sft.errors import MissingPackage
from trl_sft.recipe import sections
from trl_sft.recipe.upstream import fields as upstream_fields
from trl_sft.recipe.upstream import keys, packages, types

CLASSES = [
    (sections.OWNERS["train"][1], SFTConfig),
    (sections.OWNERS["lora"][1], LoraConfig),
    ("datasets.packaged_modules.json.json:JsonConfig", JsonConfig),
    ("datasets.packaged_modules.csv.csv:CsvConfig", CsvConfig),
]


@pytest.mark.parametrize(("name", "live"), CLASSES)
def test_names_and_defaults_are_those_of_the_live_class(name, live):
    fields = upstream_fields.read_fields(name)
    shared = {field.name for field in dataclasses.fields(BuilderConfig)} if issubclass(live, BuilderConfig) else set()
    expected = {field.name: field for field in dataclasses.fields(live)}
    expected = {n: f for n, f in expected.items() if n not in shared or n in fields}
    assert fields.keys() == expected.keys()
    for field in fields.values():
        try:
            default = ast.literal_eval(field.default)
        except (ValueError, SyntaxError):
            continue  # an expression: an enum's member, a factory
        live_default = expected[field.name].default
        assert default == live_default or default is live_default is None or math.isinf(default), field.name


def test_arguments_are_those_of_the_live_function():
    arguments = upstream_fields.read_arguments(sections.LOAD_DATASET[1])
    live = [p.name for p in inspect.signature(load_dataset).parameters.values() if p.kind is not p.VAR_KEYWORD]
    assert list(arguments) == live


def test_options_are_those_of_the_live_parser():
    from torch.distributed.run import get_args_parser

    live = {action.dest: action for action in get_args_parser()._actions if action.option_strings}
    del live["help"]
    options = upstream_fields.read_fields(sections.OWNERS["launch"][1])
    assert set(options) == set(live)
    for name, action in live.items():
        switch = action.nargs == 0
        assert types.accepts(options[name], True) is switch, name
        if action.default is not None and not switch:
            assert types.accepts(options[name], action.default), name
        word = action.choices[0] if action.choices else "spawn"
        assert types.accepts(options[name], word) is (action.type is str), name
        assert types.list_choices(options[name]) == tuple(action.choices or ()), name
        assert not (action.choices and types.accepts(options[name], 3)), name
        assert not types.accepts(options[name], {"a": 1}), name


@pytest.mark.parametrize(("name", "live"), CLASSES[:2])
def test_every_default_that_yaml_can_write_is_accepted(name, live):
    fields = upstream_fields.read_fields(name)
    checked = 0
    for field in dataclasses.fields(live):
        value = getattr(field.default, "value", field.default)  # enums are written as their values
        if isinstance(value, str | int | float | bool | None):
            # upstream declares `lora_bias: bool = None` and the like in places: its own slips
            assert types.accepts(fields[field.name], value) or value is None, field.name
            checked += 1
    assert checked > 30


@pytest.mark.parametrize(
    ("key", "right", "wrong"),
    [
        ("learning_rate", [1, 1e-5], ["1e-5", True, None, [1]]),
        ("max_steps", [1, -1], [1.0, "1", True, None]),
        ("max_length", [None, 5], [5.5, "5"]),
        ("packing", [True, False], ["no", 0, None]),
        ("lr_scheduler_type", ["cosine"], ["cosin", 1, None]),
        ("optim", ["sgd"], ["adam"]),
        ("report_to", ["none", ["wandb", "tensorboard"], None], [[1], 3]),
        ("lr_scheduler_kwargs", [{"num_cycles": 2}, None], [[1]]),
        ("packing_strategy", ["bfd"], ["bogus", 3]),
        ("trackio_static_space_id", [False, None, "a"], [True, 3]),
        ("eval_strategy", ["no", "steps"], [False]),
        ("pad_to_multiple_of", [8, None], [1.5]),
    ],
)
def test_types_of_sft_config_are_checked_as_declared(key, right, wrong):
    field = upstream_fields.read_fields(sections.OWNERS["train"][1])[key]
    assert [value for value in right if not types.accepts(field, value)] == []
    assert [value for value in wrong if types.accepts(field, value)] == []


@pytest.mark.parametrize(
    ("key", "right", "wrong"),
    [
        ("target_modules", ["all-linear", ["q_proj"], None], [3, [3]]),
        ("bias", ["none"], ["some", True]),
        ("init_lora_weights", [True, "gaussian", "pissa_niter_4"], ["kaiming", 3]),
        ("rank_pattern", [{"q": 4}], [[4]]),
        ("layer_replication", [[[0, 4], [2, 5]], None], [[0, 4], [[0, 1, 2]]]),
        ("eva_config", [None], [{"rho": 2.0}]),
    ],
)
def test_types_of_lora_config_are_checked_as_declared(key, right, wrong):
    field = upstream_fields.read_fields(sections.OWNERS["lora"][1])[key]
    assert [value for value in right if not types.accepts(field, value)] == []
    assert [value for value in wrong if types.accepts(field, value)] == []


def test_package_that_is_not_installed_is_named():
    with pytest.raises(MissingPackage, match="no_such_package"):
        packages.get_version("no_such_package")


def test_help_of_a_builder_of_data_sets_is_read():
    assert keys.get_help(keys.SOURCE, "keep_linebreaks") == "Whether to keep line breaks."
