"""The model card: front matter as the hub reads it, numbers as the run measured them, nothing secret."""

import json

import pytest
from huggingface_hub import ModelCard

from trl_sft.publishing import base_license, card_facts, model_card
from trl_sft.publishing.card_facts import CardFacts

LEDGER = {
    "train": {
        "rows": {
            "kept": 90,
            "truncated": 7,
            "tokenized_in_part": 0,
            "input": 100,
            "repeated": 0,
            "rejected": {"no loss tokens": 8, "also held out": 2},
        },
        "tokens": {"kept": 9000, "loss": 4000, "before_truncation": 9500, "loss_before_truncation": 4300},
        "missing_end_token": 5,
        "sources": [{"name": "a|b <i>.jsonl", "rows": {"input": 60, "kept": 55}, "tokens": {}}, {"name": "c.jsonl"}],
    },
    "eval": {"eval": {"rows": {"kept": 10, "input": 10, "rejected": {}}, "tokens": {"kept": 900, "loss": 400}}},
}
RUN = {
    "trl_sft": "0.1.0",
    "versions": {"trl": "1.16.0", "torch": "2.13.0"},
    "hardware": {"device": "cuda", "gpus": ["NVIDIA H100"], "cpu": "x86_64", "system": "Linux", "python": "3.11.7"},
    "seed": 42,
    "git_commit": "ab" * 20,
    "recipe": {"data.train": [{"path": "org/rows"}, {"path": "/data/me/own.jsonl"}], "model.dtype": "bfloat16"},
    "data": {"/data/me/own.jsonl": "cd" * 32},
    "inference": {"base": "org/base"},
    "overrides": ["train.max_steps=5", "train.hub_token=(left out)", "run.allow=[x, y]"],
    "summary": ["Verdict: better. Eval loss 2 -> 1 (50% lower).", "Best: step 3 of 5"],
    "steps": 5,
    "seconds": 61.2,
}
EVAL = {
    "prompts": 240,
    "before": {"loss": 2.0, "exact_match": 0.25, "losses": {"a": 1.0}},
    "after": {"loss": 1.0, "exact_match": 0.75, "rouge_l": float("nan")},
    "tasks": {
        "upper": {"prompts": 40, "before": {"exact_match": 0.5}, "after": {"exact_match": 1.0}},
        "lower": {"prompts": 200, "before": {}, "after": {"exact_match": 0.7}},
    },
}
FACTS = CardFacts("mine", RUN, LEDGER, EVAL, "model: {name_or_path: org/base}\n", is_adapter=True)


def test_front_matter_is_read_by_the_hubs_own_card_with_base_data_license_and_measured_results():
    license_of_base = {"license": "other", "license_name": "x", "license_link": "https://x/y"}
    card = ModelCard(model_card.write_model_card(FACTS, repo_id="me/mine", base_license=license_of_base))
    assert card.data.base_model == "org/base"
    assert card.data.base_model_relation == "adapter"
    assert card.data.datasets == ["org/rows"]  # not the user's own file
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    assert card.data.tags == ["trl", "sft", "trl_sft", "lora"]
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "x", "https://x/y")
    results = {(result.metric_type, result.metric_value) for result in card.data.eval_results}
    assert results == {("loss", 1.0), ("exact_match", 0.75)}
    assert card.data.model_name == "mine"
    assert not any(result.verified for result in card.data.eval_results)


def test_front_matter_of_a_local_base_names_no_base_model_no_license_and_without_evaluation_no_results():
    run = RUN | {"inference": {"base": "/data/me/base"}, "recipe": {"data.train": [{"path": "/data/me/own.jsonl"}]}}
    text = model_card.write_model_card(CardFacts("mine", run, LEDGER))
    values = card_facts.read_front_matter(text)
    assert values == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["trl", "sft", "trl_sft"],
    }
    assert "`base`, all weights fine-tuned" in text
    assert "No rows were held out." in text
    assert "/data/me" not in text


def test_results_stand_before_beside_after_and_what_was_not_measured_says_so():
    text = model_card.write_model_card(FACTS)
    assert "| eval loss | 2 | 1 |\n" in text
    assert "| exact match | 0.25 | 0.75 |\n" in text
    assert "| lower | 200 | exact match | not measured | 0.7 |\n" in text
    assert "nan" not in text.partition("## Use")[0]
    assert "Verdict: better. Eval loss 2 -> 1 (50% lower).\n\nBest: step 3 of 5\n" in text


def test_ledger_counts_every_row_that_was_read_with_the_reason_of_those_that_were_not_trained():
    text = model_card.write_model_card(FACTS)
    assert "| training | 100 | 90 | 10 | 7 | 9,000 | 4,000 |\n" in text
    assert "| held out | 10 | 10 | 0 |  | 900 | 400 |\n" in text
    assert "| - a\\|b &lt;i>.jsonl | 60 | 55 |" in text
    assert "- training: 8 left out: no loss tokens\n- training: 2 left out: also held out\n" in text
    assert "- training: 7 cut at `train.max_length`, which removed 500 tokens (300 of them with loss)\n" in text
    assert "- training: 5 without the end token of their last answer\n" in text


def test_recipe_is_reproduced_with_its_overrides_versions_machine_and_digests_but_without_secrets_and_paths():
    text = model_card.write_model_card(FACTS)
    assert "python -m trl_sft recipe.yaml train.max_steps=5 'run.allow=[x, y]'\n" in text
    assert "hub_token" not in text
    assert "Versions: trl 1.16.0, torch 2.13.0.\n" in text
    assert (
        f"Seed 42; commit {'ab' * 20} of the recipe's repository; machine NVIDIA H100, x86_64, Linux; Python 3.11.7."
        in text
    )
    assert f"| own.jsonl | `{'cd' * 32}` |" in text


def test_card_of_a_repository_downloads_and_loads_from_it_and_that_of_a_folder_from_the_folder():
    on_hub, local = model_card.write_model_card(FACTS, repo_id="me/new"), model_card.write_model_card(FACTS)
    assert "hf download me/new --local-dir new\npython -m trl_sft chat new  # talk to the model\n" in on_hub
    assert 'pipeline("text-generation", "me/new")' in on_hub
    assert 'from_pretrained(folder, dtype="bfloat16")' in on_hub
    assert "hf download" not in local
    assert 'pipeline("text-generation", "mine")' in local
    assert "# new\n" in on_hub
    assert "# mine\n" in local


def test_fences_of_the_card_hold_a_recipe_that_has_fences_itself():
    recipe = "# ```yaml\nmodel: {}\n# ```\n"
    text = model_card.write_model_card(CardFacts("mine", RUN, recipe=recipe))
    assert f"````yaml\n{recipe.rstrip()}\n````\n" in text


@pytest.mark.parametrize("broken", [{}, {"inference": "x", "recipe": [], "metrics": None, "verdict": None, "data": []}])
def test_card_of_a_run_of_an_older_version_leaves_out_what_is_not_recorded(broken):
    text = model_card.write_model_card(CardFacts("mine", broken, {"train": {}}, {"after": []}))
    assert "# mine" in text
    assert "None" not in text


def test_facts_come_from_the_files_of_the_run_and_a_token_in_the_recipe_is_left_out(tmp_path):
    token = "hf_" + "aB3" * 12
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    (tmp_path / "recipe.yaml").write_text(f"# {token}\nmodel: {{}}\n")
    (tmp_path / "adapter_config.json").write_text("{}")
    facts = card_facts.read_facts(tmp_path)
    assert facts.is_adapter
    assert facts.run == RUN
    assert token not in model_card.write_model_card(facts)


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("org/name", True),
        ("gpt2", True),
        ("/data/me/rows.jsonl", False),
        ("org/name/file", False),
        ("", False),
        ("C:\\rows", False),
        ("-x/y", False),
        ("trl_sft:tiny", False),
    ],
)
def test_recorded_name_is_an_id_of_the_hub_or_a_path(name, is_id):
    assert card_facts.is_hub_id(name) == is_id


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\n---\n# x\n", {"license": "apache-2.0"}),
        (
            "---\r\nlicense: other\r\nlicense_name: llama3\r\nlicense_link: LICENSE\r\n---\r\n",
            {"license": "other", "license_name": "llama3", "license_link": "LICENSE"},
        ),
        ("---\nlicense: [mit, gpl-3.0]\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("# no front matter\n", {}),
    ],
)
def test_license_of_a_local_base_is_that_of_its_own_card(tmp_path, card, expected):
    (tmp_path / "README.md").write_bytes(card.encode())
    assert base_license.find_license(str(tmp_path), is_online=False) == expected
