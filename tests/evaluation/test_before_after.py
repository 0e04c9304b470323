"""Before and after: the same held-out prompts answered by base and tuned, stored once, shown at the end."""

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
def held(here):
    rows = [row | {"task": "double" if n % 2 else "same"} for n, row in enumerate(QUESTIONS[:10])]
    jsonl(here / "held.jsonl", rows)
    return here


def samples(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("how", ["", "lora: {r: 4, target_modules: all-linear}\n"], ids=["full", "lora"])
def test_base_and_tuned_answer_the_same_prompts(how, held, go):
    code, out, err = go(RECIPE + how, "train.max_steps=60")
    assert code == 0, err
    found = json.loads((held / "out" / "eval.json").read_text())
    kept = samples(held / "out")
    assert found["prompts"] == len(kept) == 10
    assert {row["task"] for row in kept} == set(found["tasks"]) == {"double", "same"}
    for side in ("before", "after"):
        right = sum(row[side].strip() == row["reference"] for row in kept) / 10
        assert found[side]["exact_match"] == right
        assert found[side]["perplexity"] == pytest.approx(math.exp(found[side]["loss"]))
        of = [row for row in kept if row["task"] == "same"]
        assert found["tasks"]["same"][side]["exact_match"] == sum(r[side].strip() == r["reference"] for r in of) / 5
    assert found["after"]["loss"] < found["before"]["loss"]
    assert any(row["before"] != row["after"] for row in kept)
    assert "Held-out prompts, exact match:" in out
    assert "of 10" in out
    assert "expected" in out


def test_answers_are_those_of_the_base_and_of_the_saved_model(held, go):
    """Asked again in the test, with transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_sft.recipe import paths

    assert go(RECIPE, "train.max_steps=60")[0] == 0
    tokenizer = AutoTokenizer.from_pretrained(held / "out")
    for side, folder in (("before", paths.EMBEDDED / "tiny"), ("after", held / "out")):
        model = AutoModelForCausalLM.from_pretrained(folder)
        for row in samples(held / "out")[:3]:
            given = tokenizer.apply_chat_template(
                row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            length = len(tokenizer(max((s["reference"] for s in samples(held / "out")), key=len))["input_ids"])
            made = model.generate(**given, do_sample=False, max_new_tokens=length + 8)
            said = tokenizer.decode(made[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
            assert said == row[side]


def test_resumed_run_keeps_the_bases_answers_and_does_not_ask_again(held, go, monkeypatch):
    assert go(RECIPE, "run.max_hours=1e-9")[0] == 75
    first = samples(held / "out")
    assert all("after" not in row for row in first)
    asked = []
    real = before_after.answer_prompts
    monkeypatch.setattr(
        before_after, "answer_prompts", lambda *args, label: (asked.append(label), real(*args, label=label))[1]
    )
    assert go(RECIPE)[0] == 0
    assert asked == ["after"]
    assert [row["before"] for row in samples(held / "out")] == [row["before"] for row in first]


@pytest.mark.parametrize("how", ["", "lora: {r: 4, target_modules: all-linear}\n"], ids=["full", "lora"])
def test_base_answers_that_are_gone_are_asked_again_only_where_the_base_is_still_there(how, held, go):
    assert go(RECIPE + how, "run.max_hours=1e-9")[0] == 75
    first = samples(held / "out")
    (held / "out" / "samples.jsonl").unlink()
    code, out, _ = go(RECIPE + how)
    assert code == 0
    found = json.loads((held / "out" / "eval.json").read_text())
    if how:
        assert [row["before"] for row in samples(held / "out")] == [row["before"] for row in first]
    else:
        assert "the base model's answers are gone and cannot be asked again" in out
        assert "exact_match" not in found["before"]


def test_training_is_bit_equal_with_and_without_it(held, go):
    assert go(RECIPE)[0] == 0
    assert go(RECIPE, "evaluate=false", "train.output_dir=b")[0] == 0
    assert (held / "out" / "model.safetensors").read_bytes() == (held / "b" / "model.safetensors").read_bytes()
    assert not (held / "b" / "eval.json").exists()
    assert not (held / "b" / "samples.jsonl").exists()


def test_rows_of_text_give_losses_and_no_answers(held, go):
    jsonl(held / "held.jsonl", [{"text": f"{n} and {n}"} for n in range(9)])
    jsonl(held / "rows.jsonl", [{"text": f"{n} or {n}"} for n in range(9)])
    code, out, _ = go(RECIPE)
    assert code == 0
    found = json.loads((held / "out" / "eval.json").read_text())
    assert found["prompts"] == 0
    assert {"loss", "perplexity"} <= set(found["after"])
    assert "exact match" not in out


def test_chats_of_several_turns_are_asked_for_the_last(held, go):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    rows = [{"messages": [{"role": role, "content": words} for role, words in turns]}] * 9
    for name in ("rows.jsonl", "held.jsonl"):
        jsonl(held / name, rows)
    assert go(RECIPE, "data.drop_leaked=false")[0] == 0
    assert [turn["content"] for turn in samples(held / "out")[0]["prompt"]] == ["a", "b", "c"]
    assert samples(held / "out")[0]["reference"] == "d"


def test_how_answers_are_made_is_the_recipes(held):
    text = RECIPE + "evaluate: {max_rows: 3, generation: {max_new_tokens: 2}}\n"
    (held / "recipe.yaml").write_text(text)
    train(load_recipe("recipe.yaml"))
    kept = samples(held / "out")
    assert len(kept) == 3
    assert all(len(row["before"]) < 12 for row in kept)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("{generation: {max_new_tokns: 3}}", "max_new_tokens"),
        ("{max_rows: 0}", "evaluate: false"),
        ("{metrics: [bleu]}", "exact_match"),
        ("true", "Write the keys of `evaluate:` below it"),
        ("{prompts: [a]}", "not supported by this version"),
    ],
)
def test_wrong_evaluate_section_is_told(section, said, held, go):
    code, _, err = go(RECIPE + f"evaluate: {section}\n")
    assert code == 2
    assert said in err


def test_generation_keys_are_those_of_the_live_class():
    from transformers import GenerationConfig

    live = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    popped = set(fields.read_popped_keywords(sections.GENERATION[1]))
    assert popped - live <= {
        "generation_kwargs",
        "return_legacy_cache",
    }
    assert len(live & popped) > 50


def test_exact_match_ignores_only_spaces_around():
    assert metrics.exact_match(" ABC\n", "ABC") == 1
    assert metrics.exact_match("abc", "ABC") == 0
    assert metrics.exact_match("A BC", "ABC") == 0
