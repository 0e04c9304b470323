"""Base and tuned model answer the same held-out prompts; the answers are stored once and shown at the end."""

import json
import math

import pytest
from conftest import QUESTIONS, jsonl

from trl_sft import load_recipe, train
from trl_sft.evaluation import before_after, metrics
from trl_sft.recipe import sections
from trl_sft.recipe.upstream import fields

RECIPE = """\
model: {name_or_path: trl_sft:tiny}
data: {train: rows.jsonl, eval: held.jsonl}
train:
  output_dir: out
  max_steps: 4
  learning_rate: 1e-2
  save_steps: 2
  logging_steps: 1
"""


@pytest.fixture
def folder(here):
    """The current folder with rows.jsonl and ten held-out rows of two tasks in held.jsonl."""
    rows = [row | {"task": "double" if n % 2 else "same"} for n, row in enumerate(QUESTIONS[:10])]
    jsonl(here / "held.jsonl", rows)
    return here


def read_samples(run_folder):
    """Return the entries of the run's samples.jsonl."""
    return [json.loads(line) for line in (run_folder / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("lora", ["", "lora: {r: 4, target_modules: all-linear}\n"], ids=["full", "lora"])
def test_base_and_tuned_answer_the_same_prompts(lora, folder, go):
    code, out, err = go(RECIPE + lora, "train.max_steps=60")
    assert code == 0, err
    evaluation = json.loads((folder / "out" / "eval.json").read_text())
    answers = read_samples(folder / "out")
    assert evaluation["prompts"] == len(answers) == 10
    assert {row["task"] for row in answers} == set(evaluation["tasks"]) == {"double", "same"}
    for side in ("before", "after"):
        exact_match = sum(row[side].strip() == row["reference"] for row in answers) / 10
        assert evaluation[side]["exact_match"] == exact_match
        assert evaluation[side]["perplexity"] == pytest.approx(math.exp(evaluation[side]["loss"]))
        same_rows = [row for row in answers if row["task"] == "same"]
        exact_match = sum(row[side].strip() == row["reference"] for row in same_rows) / 5
        assert evaluation["tasks"]["same"][side]["exact_match"] == exact_match
    assert evaluation["after"]["loss"] < evaluation["before"]["loss"]
    assert any(row["before"] != row["after"] for row in answers)
    assert "Held-out prompts, exact match:" in out
    assert "of 10" in out
    assert "expected" in out


def test_answers_equal_those_of_transformers_with_the_base_and_the_saved_model(folder, go):
    """The test generates the answers, and computes the losses of rows, again with transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_sft.recipe import paths

    assert go(RECIPE, "train.max_steps=60")[0] == 0
    tokenizer = AutoTokenizer.from_pretrained(folder / "out")
    for side, model_folder in (("before", paths.EMBEDDED / "tiny"), ("after", folder / "out")):
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        for row in read_samples(folder / "out")[:3]:
            inputs = tokenizer.apply_chat_template(
                row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            length = len(tokenizer(max((s["reference"] for s in read_samples(folder / "out")), key=len))["input_ids"])
            output_ids = model.generate(**inputs, do_sample=False, max_new_tokens=length + 8)
            prompt_length = inputs["input_ids"].shape[1]
            answer = tokenizer.decode(output_ids[0, prompt_length:], skip_special_tokens=True)
            assert answer == row[side]
            if side == "after":
                answer_ids = tokenizer(row["reference"] + tokenizer.eos_token, return_tensors="pt")["input_ids"]
                input_ids = torch.cat([inputs["input_ids"], answer_ids], 1)
                labels = torch.cat([torch.full_like(inputs["input_ids"], -100), answer_ids], 1)
                expected = model(input_ids=input_ids, labels=labels).loss.item()
                assert row["loss_after"] == pytest.approx(expected, rel=1e-5)


def test_resumed_run_reuses_the_base_answers(folder, go, monkeypatch):
    assert go(RECIPE, "run.max_hours=1e-9")[0] == 75
    samples = read_samples(folder / "out")
    assert all("after" not in row for row in samples)
    labels = []
    answer_prompts = before_after.answer_prompts

    def record_label(*args, label):
        labels.append(label)
        return answer_prompts(*args, label=label)

    monkeypatch.setattr(before_after, "answer_prompts", record_label)
    assert go(RECIPE)[0] == 0
    assert labels == ["after"]
    assert [row["before"] for row in read_samples(folder / "out")] == [row["before"] for row in samples]


@pytest.mark.parametrize("lora", ["", "lora: {r: 4, target_modules: all-linear}\n"], ids=["full", "lora"])
def test_deleted_base_answers_are_generated_again_only_where_the_base_weights_remain(lora, folder, go):
    assert go(RECIPE + lora, "run.max_hours=1e-9")[0] == 75
    samples = read_samples(folder / "out")
    (folder / "out" / "samples.jsonl").unlink()
    code, out, _ = go(RECIPE + lora)
    assert code == 0
    evaluation = json.loads((folder / "out" / "eval.json").read_text())
    if lora:
        assert [row["before"] for row in read_samples(folder / "out")] == [row["before"] for row in samples]
    else:
        assert "samples.jsonl has lost the base model's answers" in out
        assert "exact_match" not in evaluation["before"]


def test_weights_are_bit_equal_with_and_without_evaluation(folder, go):
    assert go(RECIPE)[0] == 0
    assert go(RECIPE, "evaluate=false", "train.output_dir=b")[0] == 0
    assert (folder / "out" / "model.safetensors").read_bytes() == (folder / "b" / "model.safetensors").read_bytes()
    assert not (folder / "b" / "eval.json").exists()
    assert not (folder / "b" / "samples.jsonl").exists()


def test_text_rows_are_evaluated_by_loss_without_answers(folder, go):
    jsonl(folder / "held.jsonl", [{"text": f"{n} and {n}"} for n in range(9)])
    jsonl(folder / "rows.jsonl", [{"text": f"{n} or {n}"} for n in range(9)])
    code, out, _ = go(RECIPE)
    assert code == 0
    evaluation = json.loads((folder / "out" / "eval.json").read_text())
    assert evaluation["prompts"] == 0
    assert {"loss", "perplexity"} <= set(evaluation["after"])
    assert "exact match" not in out


def test_multi_turn_chat_is_evaluated_on_its_last_answer(folder, go):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    rows = [{"messages": [{"role": role, "content": words} for role, words in turns]}] * 9
    for name in ("rows.jsonl", "held.jsonl"):
        jsonl(folder / name, rows)
    assert go(RECIPE, "data.drop_leaked=false")[0] == 0
    assert [turn["content"] for turn in read_samples(folder / "out")[0]["prompt"]] == ["a", "b", "c"]
    assert read_samples(folder / "out")[0]["reference"] == "d"


def test_generation_follows_the_recipe(folder):
    text = RECIPE + "evaluate: {max_rows: 3, generation: {max_new_tokens: 2, guidance_scale: 1.5}}\n"
    (folder / "recipe.yaml").write_text(text)
    train(load_recipe("recipe.yaml"))
    answers = read_samples(folder / "out")
    assert len(answers) == 3
    assert all(len(row["before"]) < 12 for row in answers)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("{generation: {max_new_tokns: 3}}", "max_new_tokens"),
        ("{max_rows: 0}", "evaluate: false"),
        ("{metrics: [bleu]}", "exact_match"),
        ("true", "Write the keys of `evaluate:` below it"),
        ("{prompts: [3]}", "Write a text, {prompt: TEXT} or {messages: [...]}"),
    ],
)
def test_invalid_evaluate_section_is_refused(section, message, folder, go):
    code, _, err = go(RECIPE + f"evaluate: {section}\n")
    assert code == 2
    assert message in err


def test_generation_keys_exist_in_the_installed_class():
    from transformers import GenerationConfig

    attributes = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    keywords = set(fields.read_popped_keywords(sections.GENERATION[1]))
    assert keywords - attributes <= {"generation_kwargs", "return_legacy_cache"}
    assert len(attributes & keywords) > 50


def test_exact_match_ignores_only_surrounding_whitespace():
    assert metrics.exact_match(" ABC\n", "ABC") == 1
    assert metrics.exact_match("abc", "ABC") == 0
    assert metrics.exact_match("A BC", "ABC") == 0
