"""Fifty faults of recipe, template and data are reported at their place before weights load.

Each entry of FAULTS edits the recipe below, its rows or its template, and has the place and a word of the message.
"""

import json

import pytest
from conftest import jsonl

from trl_sft.model import load

RECIPE = """\
model:
  name_or_path: trl_sft:tiny
data:
  train:
    - {path: rows.jsonl, format: question_answer}
  eval_fraction: 0.2
train:
  output_dir: out
  max_steps: 2
  learning_rate: 1e-3
  max_length: 128
lora:
  r: 4
evaluate:
  max_rows: 4
run:
  resume: auto
"""
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
FAULTS = {  # name -> (text to replace or "rows" or "template", replacement, place in the message, word of the message)
    # the recipe
    "a missing letter": ("learning_rate", "learning_rat", "recipe.yaml:10", "learning_rate"),
    "two letters swapped": ("max_steps", "max_setps", "recipe.yaml:9", "max_steps"),
    "an unknown section": ("lora:", "loar:", "recipe.yaml:12", "lora"),
    "a key of another section": ("  max_rows: 4", "  seed: 4", "recipe.yaml:15", "train"),
    "text instead of a number": ("max_steps: 2", "max_steps: two", "recipe.yaml:9", "two"),
    "a number instead of text": ("output_dir: out", "output_dir: 3", "recipe.yaml:8", "3"),
    "a fraction instead of an integer": ("max_length: 128", "max_length: 12.8", "recipe.yaml:11", "12.8"),
    "a key written twice": ("  max_steps: 2", "  max_steps: 2\n  max_steps: 3", "recipe.yaml:10", "twice"),
    "a tab": ("  max_steps", "\tmax_steps", "recipe.yaml:9", "YAML"),
    "an unclosed bracket": ("{path: rows.jsonl,", "{path: [rows.jsonl,", "recipe.yaml:5", "YAML"),
    "a section without keys": ("lora:\n  r: 4", "lora: 4", "recipe.yaml:12", "section"),
    "a merge key": ("  r: 4", "  <<: 4", "recipe.yaml:13", "merge"),
    "a tag": ("r: 4", "r: !!python/object:os.system 4", "recipe.yaml:13", "tag"),
    "an environment variable": ("output_dir: out", "output_dir: ${HOME}", "recipe.yaml:8", "environment"),
    "no training data": (
        *("  train:\n    - {path: rows.jsonl, format: question_answer}\n", ""),
        *("recipe.yaml:3", "training data"),
    ),
    "no model": ("  name_or_path: trl_sft:tiny", "  dtype: float32", "recipe.yaml:1", "name_or_path"),
    "a missing model folder": ("trl_sft:tiny", "./nothing", "recipe.yaml:2", "nothing"),
    "an unknown embedded model": ("trl_sft:tiny", "trl_sft:tinny", "recipe.yaml:2", "tiny"),
    "a missing data file": ("path: rows.jsonl", "path: row.jsonl", "recipe.yaml:5", "rows.jsonl"),
    "an unknown format": ("question_answer", "question_anwser", "recipe.yaml:5", "question_answer"),
    "an unknown wording": ("format: question_answer", "wording: alpacca", "recipe.yaml:5", "alpaca"),
    "an eval_fraction above one": ("eval_fraction: 0.2", "eval_fraction: 2", "recipe.yaml:6", "between 0 and 1"),
    "zero steps": ("max_steps: 2", "max_steps: 0", "recipe.yaml:9", "at least 1"),
    # upstream names the argument differently from the recipe
    "a dropout above one": ("r: 4", "lora_dropout: 2", "recipe.yaml:13", "dropout"),
    "a beta above one": ("max_steps: 2", "adam_beta1: 2.0", "recipe.yaml:9", "beta"),
    "a negative number of workers": ("max_steps: 2", "dataloader_num_workers: -1", "recipe.yaml:9", "num_workers"),
    "a rank_pattern without a module": ("r: 4", "rank_pattern: {q_prj: 8}", "recipe.yaml:13", "q_prj changes nothing"),
    "exclude_modules without a module": ("r: 4", "exclude_modules: [q_prj]", "recipe.yaml:13", "q_prj changes nothing"),
    "a layer index out of range": (
        *("r: 4", "target_modules: [q_proj]\n  layers_to_transform: [0, 99]", "recipe.yaml:14", "layer 99"),
    ),
    "a scheduler with last_epoch": (
        *("max_steps: 2", "lr_scheduler_kwargs: {last_epoch: 3}", "recipe.yaml:9", "initial_lr"),
    ),
    "a scheduler without its arguments": (
        *("max_steps: 2", "lr_scheduler_type: cosine_with_min_lr"),
        *("recipe.yaml:7 train.lr_scheduler_kwargs", "min_lr"),
    ),
    "an infinite learning rate": ("1e-3", ".inf", "recipe.yaml:10", "finite"),
    "a rank below one": ("r: 4", "r: 0", "recipe.yaml:13", "at least 1"),
    "target_modules that match no module": ("r: 4", "target_modules: [q_projj]", "recipe.yaml:13", "q_projj"),
    "an adapter on lm_head": ("r: 4", "target_modules: [lm_head]", "recipe.yaml:13", "lm_head"),
    "an unknown scheduler": ("max_steps: 2", "lr_scheduler_type: cosin", "recipe.yaml:9", "cosine"),
    "an unknown optimizer": ("max_steps: 2", "optim: adam", "recipe.yaml:9", "adam"),
    "a key without effect": ("max_steps: 2", "num_train_epochs: 2\n  max_steps: 2", "recipe.yaml:9", "has no effect"),
    "8 bits without LoRA": ("lora:\n  r: 4", "quantization:\n  load_in_8bit: true", "recipe.yaml:13", "LoRA"),
    "8 and 4 bits": (
        *("evaluate:", "quantization: {load_in_8bit: true, load_in_4bit: true}\nevaluate:"),
        *("recipe.yaml:14", "both"),
    ),
    "best model without checkpoints": (
        *("max_steps: 2", "max_steps: 2\n  load_best_model_at_end: true\n  save_strategy: 'no'"),
        *("recipe.yaml:10", "needs checkpoints"),
    ),
    "save and eval strategies that differ": (
        *("max_steps: 2", "load_best_model_at_end: true\n  save_strategy: steps\n  eval_strategy: epoch"),
        *("recipe.yaml", "strategy"),
    ),
    "evaluation without an evaluation set": (
        *("eval_fraction: 0.2\ntrain:", "loss_on: all\ntrain:\n  eval_strategy: epoch"),
        *("recipe.yaml:8", "evaluation set"),
    ),
    "packing without max_length": ("max_length: 128", "packing: true\n  max_length: null", "recipe.yaml:12", "length"),
    "packing across row boundaries": (
        *("max_length: 128", "packing: true\n  packing_strategy: wrapped", "recipe.yaml:12", "leaking_packing"),
    ),
    "an unknown word of run.allow": ("resume: auto", "allow: [changed_recipes]", "recipe.yaml:17", "changed_recipe"),
    "a missing checkpoint": ("resume: auto", "resume: out/checkpoint-7", "recipe.yaml:17", "checkpoint"),
    "an unknown metric": ("max_rows: 4", "metrics: [exact]", "recipe.yaml:15", "exact_match"),
    "an unknown generation key": (
        *("max_rows: 4", "generation: {max_new_token: 4}", "recipe.yaml:15", "max_new_tokens"),
    ),
    # rows: they replace the forty rows of rows.jsonl
    "a row without an answer": ("rows", [{"question": "q", "answer": "a"}, {"question": "q"}], "rows.jsonl row 2", ""),
    "an answer that is a number": ("rows", [{"question": "q", "answer": 3}], "rows.jsonl row 1 (line 1)", "answer"),
    "an empty answer": ("rows", [{"question": "q", "answer": ""}] * 9, "rows.jsonl row 1 (line 1)", "answer"),
    "columns of another format": ("rows", [{"prompt": "q", "response": "a"}] * 9, "recipe.yaml:5", "question"),
    "a line with invalid JSON": ("rows", '{"question": "q", "answer": "a"}\n{"question": \n', "rows.jsonl:2", "middle"),
    "an empty data file": ("rows", "", "recipe.yaml:5", "0 bytes"),
    "invalid UTF-8": ("rows", b'{"question": "\xff", "answer": "a"}\n', "rows.jsonl", "UTF-8"),
    "a special token in the text": (
        *("rows", [{"question": "q", "answer": "a<|im_end|>b"}] * 9, "rows.jsonl row 1", "special_tokens_in_text"),
    ),
    "prompts longer than max_length": (
        *("rows", [{"question": "word " * 300 + str(n), "answer": "a"} for n in range(9)]),
        *("recipe.yaml:11", "max_length"),
    ),
    # the template
    "a template with a Jinja syntax error": ("template", TEMPLATE.replace("endfor", "endfr"), "recipe.yaml:4", "Jinja"),
    "a template without an end token": ("template", TEMPLATE.replace("+ eos_token", ""), "recipe.yaml:4", "end"),
    "a template that omits the content": (
        *("template", TEMPLATE.replace("m['content']", "m['content'][:0]"), "recipe.yaml:4", "drops the content"),
    ),
    "a template with generation markers around the prompt": (
        *("template", TEMPLATE.replace("{{ m['role']", "{% generation %}{{ m['role']").replace(
            "eos_token }}", "eos_token }}{% endgeneration %}"), "rows.jsonl row 1 (line 1)", "markers"),
    ),
    "a template without chat rows": (
        *("template", (TEMPLATE, "question_answer, wording: plain"), "recipe.yaml:4", "no row becomes a chat"),
    ),
    "a missing template file": ("template", None, "recipe.yaml:4", "own.jinja"),
}  # fmt: skip


def write_fault(here, target, replacement):
    """Write rows and template with one fault; return the text of the recipe."""
    text = RECIPE
    if target == "rows":
        if isinstance(replacement, list):
            jsonl(here / "rows.jsonl", replacement)
        else:
            (here / "rows.jsonl").write_bytes(replacement if isinstance(replacement, bytes) else replacement.encode())
    elif target == "template":
        text = text.replace("data:", "tokenizer:\n  chat_template: own.jinja\ndata:")
        if isinstance(replacement, tuple):
            replacement, row_format = replacement
            text = text.replace("question_answer", row_format)
        if replacement is not None:
            (here / "own.jinja").write_text(replacement)
    else:
        assert text.count(target) == 1
        text = text.replace(target, replacement)
    return text


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_reported_at_its_place_before_weights_load(name, here, go, monkeypatch):
    target, replacement, where, word = FAULTS[name]

    def fail_on_load(*_, **__):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(load, "build_trainer_arguments", fail_on_load)
    text = write_fault(here, target, replacement)
    for command in (["check"], []):
        code, _, err = go(text, command=command)
        assert code == 2, err
        assert "Traceback" not in err
        places = [line for line in err.splitlines() if line and not line.startswith((" ", "trl_sft:"))]
        assert any(place.startswith(where) and not place[len(where) :][:1].isdigit() for place in places), err
        assert word in err, err
        assert not (here / "out").exists()


def test_list_has_at_least_fifty_distinct_faults():
    assert len(FAULTS) >= 50
    assert len({json.dumps([str(part) for part in fault]) for fault in FAULTS.values()}) == len(FAULTS)


def test_recipe_without_a_fault_passes_check(here, go):
    code, _, err = go(RECIPE, command=["check"])
    assert (code, err) == (0, "")
    (here / "own.jinja").write_text(TEMPLATE)
    code, _, err = go(write_fault(here, "template", TEMPLATE), command=["check"])
    assert (code, err) == (0, "")
