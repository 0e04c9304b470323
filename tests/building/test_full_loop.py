"""A set that a scripted model wrote trains the embedded model, which is then better on rows that it has not seen."""

import json
import os
from pathlib import Path

import pytest
from scripted_model import ScriptedServer, make_chance, name_step

from trl_sft import cli

SPEC = """\
plan: {rows: ROWS, student: trl_sft:tiny}
seeds: {topics: [letters]}
axes: {task: [last]}
templates: {families: [basic], files: [skills.yaml]}
generator: {endpoint: URL, model: teacher, concurrent: 16, first_wait: 0.01}
gates: {novelty: false}
output: {folder: set, eval_fraction: 0.1}
"""
TEMPLATES = """\
language: en
family: basic
templates:
  skill:
    turns:
      - {role: user, write: "Write a question of the kind {task}."}
      - {role: assistant, system: "Answer with the result alone."}
"""


def teach(request):
    """Write a question of a skill, or answer one: rightly, but for every tenth, which is refused."""
    chance, text = make_chance(request), request["messages"][-1]["content"]
    if name_step(request) == "question":
        return f"Give me the final letter of {''.join(chance.choices('abcdefghijklmnoprstuvwyz', k=3))}."
    if chance.random() < 0.1:
        return "I'm sorry, but I can't help with that."
    return text.rstrip(".")[-1]


def build_and_train(here, capsys, rows, *overrides):
    """Build a set, check its recipe and with overrides train; return the answers of the commands."""
    (here / "skills.yaml").write_text(TEMPLATES, encoding="utf-8")
    answers = []
    with ScriptedServer(teach) as server:
        (here / "spec.yaml").write_text(SPEC.replace("URL", server.url).replace("ROWS", str(rows)), encoding="utf-8")
        commands = (["build", "spec.yaml"], ["check", "set/recipe.yaml", "lora=null"])
        train = [["set/recipe.yaml", "lora=null", *overrides]] if overrides else []
        for words in (*commands, *train):
            capsys.readouterr()
            cli.main([*words, "--json"])
            answers.append(json.loads(capsys.readouterr().out))
    return answers


def test_recipe_of_a_built_set_is_clean(here, capsys, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)
    built, checked = build_and_train(here, capsys, 20)
    assert (built["ok"], checked["ok"]) == (True, True)
    assert checked["ledger"]["train"]["rows"]["kept"] == built["rows"]["train"] > 15
    assert checked["notes"] == []


@pytest.mark.long
def test_model_trained_on_a_built_set_is_better_than_without(here, capsys):
    overrides = ("train.learning_rate=2e-3", "train.num_train_epochs=8", "train.per_device_train_batch_size=16")
    overrides += (
        "train.lr_scheduler_type=cosine",
        "train.warmup_steps=0.1",
        "train.eval_strategy=no",
        "train.save_strategy=no",
    )
    built, checked, trained = build_and_train(here, capsys, 1100, *overrides)
    assert (built["ok"], checked["ok"], trained["ok"]) == (True, True, True)
    assert built["rows"]["taken"] > 1050  # some questions come twice, three times in a row
    assert any(gate["gate"] == "refusal" and gate["rejected"] > 60 for gate in built["gates"])
    samples = [json.loads(line) for line in (Path(trained["output_dir"]) / "samples.jsonl").read_text().splitlines()]
    before, after = (
        sum(row[side].strip() == row["reference"].strip() for row in samples) for side in ("before", "after")
    )
    assert len(samples) >= 95
    assert before < 0.05 * len(samples)
    assert after > 0.5 * len(samples)
