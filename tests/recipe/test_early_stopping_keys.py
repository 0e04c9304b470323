"""Keys that `run.early_stopping` sets, and keys of a recipe that contradict it."""

import pytest

from trl_sft.errors import RecipeError
from trl_sft.recipe import build, sections

TEXT = "model: {name_or_path: trl_sft:tiny}\ndata: {train: rows.jsonl, eval_fraction: 0.2}\n"


def load(here, text, *overrides):
    (here / "recipe.yaml").write_text(TEXT + text)
    return build.load_run("recipe.yaml", overrides)


def list_implied(run):
    return {key[-1]: setting.value for key, setting in run.implied.items()}


BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("", {"eval_strategy": "steps", "eval_steps": 0.05, "save_steps": 0.05, "save_total_limit": 2}),
        ("eval_steps: 10", {"eval_strategy": "steps", "save_steps": 10, "save_total_limit": 2}),
        ("save_steps: 10", {"eval_strategy": "steps", "eval_steps": 10}),
        ("eval_strategy: steps", {"eval_steps": 0.05, "save_steps": 0.05, "save_total_limit": 2}),
        ("eval_strategy: epoch", {"save_strategy": "epoch", "save_total_limit": 2}),
        ("save_strategy: epoch", {"eval_strategy": "epoch"}),
        ("save_strategy: best, eval_steps: 5", {"eval_strategy": "steps"}),
        ("save_total_limit: 5", {"eval_strategy": "steps", "eval_steps": 0.05, "save_steps": 0.05}),
    ],
)
def test_keys_that_the_recipe_leaves_open_are_set_to_fit_those_that_it_sets(train, expected, here):
    run = load(here, f"run: {{early_stopping: {{}}}}\ntrain: {{{train}}}\n")
    implied = list_implied(run)
    if "save_strategy" not in train:
        expected = {"save_strategy": expected.get("eval_strategy", "steps")} | expected
    assert implied == expected | BEST
    assert all("run.early_stopping" in setting.reason for setting in run.implied.values())


def test_metric_other_than_a_loss_keeps_its_own_direction(here):
    run = load(here, "run: {early_stopping: true}\ntrain: {metric_for_best_model: eval_mean_token_accuracy}\n")
    assert not {"metric_for_best_model", "greater_is_better"} & set(list_implied(run))


@pytest.mark.parametrize("value", ["false", "null"])
def test_early_stopping_that_is_off_sets_nothing(value, here):
    assert load(here, "", f"run.early_stopping={value}").implied == {}


CONTRADICTIONS = """\
run: {early_stopping: {patience: 0, threshold: -1}}
train:
  eval_strategy: no
  save_strategy: no
  load_best_model_at_end: false
  greater_is_better: true
"""
FAULTY = {
    "early_stopping_contradictions": CONTRADICTIONS,
    "early_stopping_steps": "run: {early_stopping: true}\ntrain: {eval_steps: 10, save_steps: 25}\n",
    "early_stopping_strategies": "run: {early_stopping: true}\ntrain: {eval_steps: 10, save_strategy: epoch}\n",
    "early_stopping_save_steps": "run: {early_stopping: true}\ntrain: {eval_strategy: epoch, save_steps: 25}\n",
    "early_stopping_keys": "run: {early_stopping: {patiense: 3, treshold: 0.1, patience: soon}}\n",
    "early_stopping_number": "run: {early_stopping: 3}\n",
}


@pytest.mark.parametrize("name", FAULTY)
def test_key_that_contradicts_early_stopping_is_refused_with_both_names(name, here, matches):
    with pytest.raises(RecipeError) as error:
        load(here, FAULTY[name])
    matches(name, f"{error.value}\n")


def test_early_stopping_without_an_evaluation_set_is_refused(here, matches):
    (here / "recipe.yaml").write_text(TEXT.replace(", eval_fraction: 0.2", "") + "run: {early_stopping: true}\n")
    with pytest.raises(RecipeError) as error:
        build.load_run("recipe.yaml")
    matches("early_stopping_without_evaluation", f"{error.value}\n")


@pytest.mark.parametrize("name", ["early_stopping_steps", "early_stopping_strategies", "early_stopping_save_steps"])
def test_edit_of_the_message_solves_it(name, here):
    with pytest.raises(RecipeError) as error:
        load(here, FAULTY[name])
    (edit,) = error.value.faults[0].edits
    value = "null" if edit.action == "remove" else edit.value
    assert load(here, FAULTY[name], f"{'.'.join(edit.key)}={value}").implied


def test_keys_of_the_mapping_have_help_and_a_default():
    for (section, name), declared in sections.OWN_NESTED_KEYS.items():
        assert set(declared) == set(sections.OWN_HELP[f"{section}.{name}"])
