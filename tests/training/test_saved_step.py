"""Which step is saved, and what the screen, run.json, the log and the model card say about it."""

import json
from types import SimpleNamespace

import torch
from conftest import RECIPE
from transformers import AutoModelForCausalLM

from trl_sft.publishing.model_card import write_best
from trl_sft.training import manifest

FULL = RECIPE.replace("rows.jsonl}", "rows.jsonl, eval_fraction: 0.2}")
# a learning rate at which the eval loss rises, so the best step is not the last one
BEST = (
    "train.save_strategy=steps",
    "train.save_steps=2",
    "train.eval_strategy=steps",
    "train.eval_steps=2",
    "train.load_best_model_at_end=true",
    "train.max_steps=6",
    "train.learning_rate=0.1",
    "train.lr_scheduler_type=constant",
)


def test_best_step_is_named_on_the_screen_in_run_json_and_on_the_model_card(go, here):
    code, out, err = go(FULL, *BEST)
    assert code == 0, err
    losses = {}
    again = []
    for line in (here / "out" / "log.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "weights_of_step" in entry:
            again.append(entry)
        elif "eval_loss" in entry and entry["step"] > 0:
            losses[entry["step"]] = entry["eval_loss"]
    step = min(losses, key=losses.get)
    assert step < 6
    assert [entry["weights_of_step"] for entry in again] == [step]
    assert again[0]["eval_loss"] == losses[step]
    best = json.loads((here / "out" / "run.json").read_text())["best"]
    assert best == {"step": step, "steps": 6, "metric": "eval_loss", "value": losses[step]}
    line = f"Best: step {step} of 6 (eval_loss {losses[step]:.4g}), whose weights are saved"
    assert line in out.splitlines()
    again_at = out.index(f"The weights of step {step}, the best, were loaded and evaluated again:")
    assert f"{losses[step]:.4g}" in out[again_at:].splitlines()[1]
    assert line in (here / "out" / "README.md").read_text()
    saved = AutoModelForCausalLM.from_pretrained(here / "out").state_dict()
    checkpoint = AutoModelForCausalLM.from_pretrained(here / "out" / f"checkpoint-{step}").state_dict()
    assert all(torch.equal(saved[name], checkpoint[name]) for name in saved)


def test_run_that_saves_its_last_step_names_no_best_step(go, here):
    code, out, _ = go(FULL, "train.eval_strategy=steps", "train.eval_steps=1")
    assert code == 0
    assert "Best:" not in out
    assert "best" not in json.loads((here / "out" / "run.json").read_text())
    assert "weights_of_step" not in (here / "out" / "log.jsonl").read_text()


def test_merge_lines_of_the_model_card_write_a_model_that_stops_as_the_adapter_does(go, here, monkeypatch):
    code, _, err = go(FULL, "lora={r: 4, target_modules: all-linear}")
    assert code == 0, err
    lines = (here / "out" / "README.md").read_text().partition("To merge the adapter")[2]
    code = lines.partition("```python\n")[2].partition("```")[0]
    exec(code, {})
    stops = json.loads((here / "out" / "generation_config.json").read_text())["eos_token_id"]
    merged = AutoModelForCausalLM.from_pretrained(here / "merged")
    assert merged.generation_config.eos_token_id == stops
    assert merged.dtype == torch.float32
    assert not any("lora" in name for name in merged.state_dict())
    assert (here / "merged" / "tokenizer.json").is_file()


def test_best_step_is_not_described_where_the_trainer_loaded_none():
    class Args:
        load_best_model_at_end = True
        metric_for_best_model = "loss"

    class State:
        best_model_checkpoint, best_metric, global_step = None, None, 4

    assert manifest.describe_best(Args, State) is None


def test_later_steps_with_the_value_of_the_best_one_are_named():
    """The last entry of the log is of the weights that were loaded, under the step at which the run ended."""
    values = [(1, 0.0), (2, 0.5), (3, 0.25), (4, 0.5), (5, 0.5), (6, 0.25), (6, 0.5)]
    args = SimpleNamespace(load_best_model_at_end=True, metric_for_best_model="eval_exact")
    state = SimpleNamespace(best_model_checkpoint="out/checkpoint-2", best_metric=0.5, global_step=6)
    state.log_history = [{"step": step, "eval_exact": value} for step, value in values]
    best = manifest.describe_best(args, state)
    assert best == {"step": 2, "steps": 6, "metric": "eval_exact", "value": 0.5, "equal": [4, 5]}
    line = "step 2 of 6 (eval_exact 0.5), whose weights are saved"
    assert write_best(best) == f"{line}; the value is the same at steps 4, 5, and the Trainer keeps the first"
    state.log_history[3:5] = []
    assert write_best(manifest.describe_best(args, state)) == line
