"""Keys without effect because of another key: a fault where the file sets both, a note where one is an override."""

import json

import pytest
import torch
from transformers import GenerationConfig, Trainer, TrainingArguments, get_scheduler

from trl_sft import load_recipe
from trl_sft.recipe import no_effect, resolved

RECIPE = """\
model: {{name_or_path: trl_sft:tiny}}
data: {{train: rows.jsonl{data}}}
train: {train}
evaluate: {{generation: {generation}}}
"""
HELD = ", eval_fraction: 0.2"
# what the section says -> the idle key
TRAIN = [
    ({"max_steps": 3, "num_train_epochs": 2}, "num_train_epochs"),
    ({"eval_strategy": "epoch", "eval_steps": 5}, "eval_steps"),
    ({"save_strategy": "epoch", "save_steps": 5}, "save_steps"),
    ({"save_strategy": "no", "save_total_limit": 5}, "save_total_limit"),
    ({"logging_strategy": "epoch", "logging_steps": 5}, "logging_steps"),
    ({"lr_scheduler_type": "constant", "warmup_steps": 5}, "warmup_steps"),
    ({"optim": "sgd", "adam_beta1": 0.8}, "adam_beta1"),
    ({"optim": "adafactor", "adam_epsilon": 1e-6}, "adam_epsilon"),
    ({"hub_model_id": "a/b"}, "hub_model_id"),
    ({"packing_strategy": "bfd_split"}, "packing_strategy"),
    ({"packing": True, "padding_free": False}, "padding_free"),
    ({"gradient_checkpointing": False, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
     "gradient_checkpointing_kwargs"),
]  # fmt: skip
GENERATION = [
    ({"temperature": 0.7}, "temperature"),
    ({"do_sample": False, "top_p": 0.9}, "top_p"),
    ({"length_penalty": 2.0}, "length_penalty"),
]


QUANTIZATION = [
    ({"load_in_8bit": True, "bnb_4bit_quant_type": "nf4"}, "bnb_4bit_quant_type"),
    ({"load_in_4bit": True, "llm_int8_threshold": 5.0}, "llm_int8_threshold"),
]


def text(train=None, generation=None, data=HELD):
    return RECIPE.format(train=json.dumps(train or {}), generation=json.dumps(generation or {}), data=data)


@pytest.mark.parametrize(("train", "name"), TRAIN, ids=lambda v: v if isinstance(v, str) else "")
def test_key_of_train_without_effect_is_a_fault_but_a_note_if_an_override_is_the_cause(train, name, go):
    code, _, err = go(text(train), "--fast", command=["check"])
    assert code == 2
    assert f"recipe.yaml:3 train.{name}\n" in err
    assert "has no effect" in err
    typed = f"train.{name}={json.dumps(train[name])}"
    assert go(text(train), typed, "--fast", command=["check"])[0] == 2  # it would be typed in vain
    others = [f"train.{k}={json.dumps(v)}" for k, v in train.items() if k != name]
    if others:
        code, out, err = go(text({name: train[name]}), *others, "--fast", command=["check"])
        assert code == 0, err
        assert f"train.{name}: `{name}` has no effect" in out
    assert go(text({k: v for k, v in train.items() if k != name}), "--fast", command=["check"])[0] == 0


@pytest.mark.parametrize(("generation", "name"), GENERATION, ids=lambda v: v if isinstance(v, str) else "")
def test_idle_key_of_generation_is_refused_as_upstreams_own_strict_check_does(generation, name, go):
    code, _, err = go(text(generation=generation), "--fast", command=["check"])
    assert code == 2
    assert f"evaluate.generation.{name}" in err
    with pytest.raises(ValueError, match=name):
        GenerationConfig(**generation).validate(strict=True)


@pytest.mark.parametrize(("section", "name"), QUANTIZATION, ids=lambda v: v if isinstance(v, str) else "")
def test_key_of_quantization_without_effect_is_a_fault_but_a_note_if_an_override_is_the_cause(section, name, go):
    lora = "lora: {r: 2}\nquantization: "
    code, _, err = go(text() + lora + json.dumps(section), "--fast", command=["check"])
    assert code == 2
    assert f"`{name}` has no effect" in err
    (bits,) = (k for k in section if k != name)
    recipe = text() + lora + json.dumps({name: section[name], "load_in_4bit": True, "load_in_8bit": False})
    words = [f"quantization.load_in_{n}bit={json.dumps(bits == f'load_in_{n}bit')}" for n in (4, 8)]
    code, out, err = go(recipe, *words, "--fast", command=["check"])
    assert code == 0, err
    assert f"`{name}` has no effect" in out


@pytest.mark.parametrize("name", no_effect.EVALUATION_KEYS)
def test_key_of_evaluation_is_refused_where_no_rows_are_held_out(name, go):
    keys = {name: True if name == "eval_packing" else 2}
    more = {"eval_strategy": "epoch"} if name == "eval_delay" else {}
    assert go(text(keys | more), "--fast", command=["check"])[0] == 0
    code, _, err = go(text(keys, data=""), "--fast", command=["check"])
    assert code == 2
    assert f"`{name}` has no effect without an evaluation set" in err
    if name != "eval_delay":  # which an eval_strategy goes with
        code, out, err = go(text(keys), "data.eval_fraction=null", "--fast", command=["check"])
        assert code == 0, err
        assert f"`{name}` has no effect without an evaluation set" in out


@pytest.mark.parametrize("name", no_effect._WITHOUT_ADAM)
def test_optimizers_without_adams_betas_are_upstreams(name):
    """Upstream hands them the same whatever the betas are."""
    optimizers = [
        Trainer.get_optimizer_cls_and_kwargs(
            TrainingArguments(output_dir="o", optim=name, use_cpu=True, adam_beta1=beta, adam_epsilon=beta)
        )[1]
        for beta in (0.9, 0.5)
    ]
    assert optimizers[0] == optimizers[1]


@pytest.mark.parametrize("name", no_effect._NO_WARMUP)
def test_schedules_without_warmup_are_upstreams(name):
    def rates(warmup):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
        schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=10)
        arguments = [(1.0,)] * 3 if name != "constant" else [()] * 3
        return [(optimizer.step(), schedule.step(*one), optimizer.param_groups[0]["lr"])[2] for one in arguments]

    if name == "greedy":
        pytest.importorskip("transformers.optimization").__dict__.get("get_greedy_schedule") or pytest.skip("none here")
    assert rates(0) == rates(5)
    assert rates(0)[0] == 1.0


@pytest.mark.parametrize(
    ("train", "generation", "override", "key"),
    [
        ({"num_train_epochs": 3}, {}, "train.max_steps=5", "num_train_epochs"),
        ({"save_steps": 2}, {}, "train.save_strategy='no'", "save_steps"),
        ({"adam_beta1": 0.8}, {}, "train.optim=sgd", "adam_beta1"),
        ({"eval_packing": False}, {}, "data.eval_fraction=null", "eval_packing"),
        ({}, {"do_sample": True, "temperature": 0.7}, "evaluate.generation.do_sample=false", "temperature"),
    ],
)
def test_resolved_recipe_of_a_run_with_an_override_is_a_recipe(train, generation, override, key, here):
    text = RECIPE.format(data=HELD, train=json.dumps(train), generation=json.dumps(generation))
    (here / "recipe.yaml").write_text(text)
    run = load_recipe("recipe.yaml", [override])
    (here / "resolved.yaml").write_text(resolved.format_recipe(run, {}))
    again = load_recipe("resolved.yaml", ["train.output_dir=again"])
    assert key in run.train | run.evaluate.get("generation", {})
    assert key not in again.train | again.evaluate.get("generation", {})
