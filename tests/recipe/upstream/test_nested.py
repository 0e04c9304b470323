"""The keys of nested mappings are those that the live classes and functions take."""

import ast
import dataclasses
import inspect
import warnings

import peft
import pytest
import torch
import transformers
from accelerate.utils import GradientAccumulationPlugin
from peft import LoraConfig
from torch.utils.checkpoint import checkpoint
from transformers import optimization
from transformers.trainer_pt_utils import AcceleratorConfig
from trl import SFTConfig

from trl_sft.recipe.upstream import keys, nested, types


def parameters(function):
    return {p.name: p for p in inspect.signature(function).parameters.values() if p.kind not in (2, 4)}


@pytest.mark.parametrize("kind", list(transformers.SchedulerType), ids=lambda k: k.value)
def test_keys_of_lr_scheduler_kwargs_are_the_arguments_of_the_live_scheduler(kind):
    fields = nested.get_nested_fields("train", "lr_scheduler_kwargs", {"lr_scheduler_type": kind.value}).fields
    function = optimization.TYPE_TO_SCHEDULER_FUNCTION[kind]
    if kind.value in ("reduce_lr_on_plateau", "greedy"):
        name = {"greedy": "GreedyLR"}.get(kind.value, "ReduceLROnPlateau")
        function = getattr(optimization, name)
    passed_by_trainer = {"optimizer", "num_warmup_steps", "num_training_steps"}
    live = {} if kind.value in ("constant", "constant_with_warmup") else parameters(function)
    assert set(fields) == set(live) - passed_by_trainer
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    numbers = {"num_decay_steps": 2, "num_stable_steps": None, "min_lr": 0.1, "timescale": 3, "mode": "min"}
    usable = {
        name: numbers.get(name, live[name].default) for name in fields if name not in ("last_epoch", "min_lr_rate")
    }
    assert [name for name, value in usable.items() if not types.accepts(fields[name], value)] == []
    transformers.get_scheduler(kind, optimizer, 1, 9, usable)


def test_keys_of_checkpointing_are_those_of_torch_trl_and_the_trainer():
    fields = nested.get_nested_fields("train", "gradient_checkpointing_kwargs", {}).fields
    live = set(parameters(checkpoint)) - {"function", "context_fn"}
    assert live | {"preserve_rng_state", "every_n_layers", "offload"} == set(fields) - {"selective"}
    assert types.list_choices(fields["determinism_check"]) == ("default", "none")


@pytest.mark.parametrize(
    ("where", "name", "live"),
    [
        ("train", "accelerator_config", AcceleratorConfig),
        ("train.accelerator_config", "gradient_accumulation_kwargs", GradientAccumulationPlugin),
        ("lora", "loftq_config", peft.LoftQConfig),
        ("lora", "eva_config", peft.EvaConfig),
        ("lora", "corda_config", peft.tuners.lora.config.CordaConfig),
    ],
)
def test_keys_of_a_nested_mapping_are_the_fields_of_the_live_class(where, name, live):
    fields = nested.get_nested_fields(where, name, {}).fields
    assert list(fields) == [field.name for field in dataclasses.fields(live)]
    for field in dataclasses.fields(live):
        if field.default is not dataclasses.MISSING and field.default is not None:
            assert ast.literal_eval(fields[field.name].default) == field.default
            assert types.accepts(fields[field.name], field.default), field.name


def test_mapping_of_lora_is_accepted_where_peft_makes_a_class_from_it():
    for name, field in keys.get_fields("lora").items():
        if keys.find_dataclasses(field) and name not in ("runtime_config", "loftq_config"):
            with warnings.catch_warnings(action="ignore"):  # peft warns of what it ignores
                live = LoraConfig(**{name: {}}) if types.accepts(field, {}) else None
            assert live is None or not isinstance(getattr(live, name), dict), name
    assert not types.accepts(keys.get_fields("lora")["runtime_config"], {})


def test_arguments_of_an_optimizer_are_those_that_its_handler_reads():
    def read(optim):
        return set(nested.get_nested_fields("train", "optim_args", {"optim": optim}).fields)

    assert read("sgd") == {"momentum", "dampening", "weight_decay", "nesterov"}
    assert {"rank", "update_proj_gap", "scale", "proj_type"} == read("galore_adamw")
    assert read("adamw_torch") == set()
    assert nested.get_nested_fields("train", "optim_args", {"optim": "rmsprop_bnb"}) is None  # it passes everything on


def test_optimizer_of_a_recipe_without_one_is_the_default_of_the_live_config():
    fields = nested.get_nested_fields("train", "optim_args", {})
    assert fields.owner_name == f"optim: {SFTConfig(output_dir='x', bf16=False, use_cpu=True).optim.value}"
