"""Names of repositories: what the hub refuses is refused at its key, with the nearest name that it takes."""

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from trl_sft.errors import Edit
from trl_sft.recipe import hub_names

PUSH = "model: {name_or_path: trl_sft:tiny}\ndata: {train: rows.jsonl}\ntrain: {output_dir: out, push_to_hub: true}\n"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("https://huggingface.co/me/model", "me/model"),
        ("huggingface.co/me/model/tree/main", "me/model"),
        ("git@hf.co:me/model.git", "me/model"),
        ("datasets/me/model", "me/model"),
        ("me/my model (2)", "me/my-model-2"),
        ("./runs/x", "x"),
        ("runs\\x", "runs/x"),
        ("me--you/x", "me-you/x"),
        ("qwen2.5:0.5b", "qwen2.5-0.5b"),
        (" me/x ", "me/x"),
        ("me/" + "a" * 120, "me/" + "a" * 93),
    ],
)
def test_name_that_is_none_of_the_hub_is_refused_with_the_nearest_one(name, nearest):
    assert hub_names.check("--push", name).fix == f"Write `{nearest}`."
    assert hub_names.check("--push", nearest) is None


@pytest.mark.parametrize("name", ["模型", "", "/", "me/模型", "..."])
def test_name_without_a_letter_that_the_hub_takes_is_refused_with_an_example(name):
    assert hub_names.check("--push", name).fix == "Write OWNER/NAME, for example `me/my-model`."


@pytest.mark.parametrize("name", ["me/qwen2.5-0.5b", "mine", "Team_1/x.y"])
def test_name_that_the_hub_takes_is_no_fault(name):
    assert hub_names.check("--push", name) is None


def test_address_in_the_recipe_is_refused_by_the_quick_check_at_its_line_with_an_edit(go):
    code, _, err = go(PUSH, "train.hub_model_id=https://huggingface.co/me/x", command=["check", "--fast"])
    assert code == 2
    assert "(train.hub_model_id=https://huggingface.co/me/x) train.hub_model_id\n" in err
    assert "-> Write `me/x`." in err


def test_folder_whose_name_the_hub_does_not_take_is_refused_with_the_key_that_names_a_repository(go):
    code, _, err = go(PUSH, "train.output_dir=runs/my run", command=["check", "--fast"])
    assert code == 2
    assert "the repository has the name of the run folder, and 'my run' is none that the hub takes" in err
    assert "-> Set `train.hub_model_id: my-run`." in err
    fault = hub_names.check_folder("x", "runs/my run", key=("train", "hub_model_id"))
    assert fault.edits == (Edit("set", ("train", "hub_model_id"), "my-run"),)


LONG = "a" * 96
NAMES = f"a a/b a.b/c-d_e _a/_b -a a- a/.b a/b. a--b a..b a.git a/b/c ä/b /a a/ datasets/a/b {LONG} {LONG}a b/{LONG}"


@pytest.mark.parametrize("name", [*NAMES.split(), "a b", "a\n", ""])
def test_rule_for_names_is_that_of_huggingface_hub(name):
    try:
        validate_repo_id(name)
        is_valid = True
    except HFValidationError:
        is_valid = False
    assert (hub_names.check("--push", name) is None) == is_valid
