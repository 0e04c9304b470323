"""Held-out prompts are answered at each evaluation, which changes nothing in training."""

import json
import re
from pathlib import Path

from conftest import RECIPE

from trl_sft.errors import Interrupted
from trl_sft.evaluation import before_after
from trl_sft.training import progress

FULL = RECIPE.replace("rows.jsonl}", "rows.jsonl, eval_fraction: 0.2}").replace("save_strategy: 'no'", "save_steps: 2")
EVALUATED = ("train.max_steps=6", "train.eval_strategy=steps", "train.eval_steps=2")
SAVED = ("train.save_steps=3",)
SAMPLED = "evaluate.generation={max_new_tokens: 4, do_sample: true}"


def read_answers(folder="out"):
    lines = Path(folder, "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [sample["steps"] for sample in map(json.loads, lines) if "steps" in sample]


def read_losses(folder):
    entries = map(json.loads, Path(folder, "log.jsonl").read_text(encoding="utf-8").splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


def test_answers_by_step_stand_in_the_file_on_the_screen_and_in_the_report(go, here):
    code, out, err = go(FULL, *EVALUATED, SAMPLED)
    assert code == 0, err
    answers = read_answers()
    assert [list(steps) for steps in answers] == [["2", "4"]] * 3
    assert re.findall(r"^answers at step (\d) \(.* s\)$", out, re.MULTILINE) == ["2", "4"]
    assert out.count("prompt") >= 2
    page = (here / "out" / "report.html").read_text(encoding="utf-8")
    assert "Answers during training" in page
    # sampled answers do not change what is trained
    code, out, err = go(FULL, *EVALUATED, "evaluate=false", "train.output_dir=alone")
    assert code == 0, err
    assert "answers at step" not in out
    assert read_losses("out") == read_losses("alone")
    assert (here / "out/model.safetensors").read_bytes() == (here / "alone/model.safetensors").read_bytes()


def test_resumed_run_has_the_answers_of_a_run_that_was_never_stopped(go, monkeypatch):
    assert go(FULL, *EVALUATED, *SAVED, "train.output_dir=whole")[0] == 0
    real = progress.Progress.on_step_end

    def kill(self, args, state, control, **live):
        real(self, args, state, control, **live)
        if state.global_step == 5:  # after the evaluation of step 4; the checkpoint is of step 3
            raise Interrupted(9)

    with monkeypatch.context() as patch:
        patch.setattr(progress.Progress, "on_step_end", kill)
        assert go(FULL, *EVALUATED, *SAVED)[0] != 0
    assert [list(steps) for steps in read_answers()] == [["2", "4"]] * 3
    removed = []
    real_write = before_after.write_samples
    monkeypatch.setattr(
        before_after, "write_samples", lambda path, rows: (removed.append(rows), real_write(path, rows))[1]
    )
    code, _, err = go(FULL, *EVALUATED, *SAVED)
    assert code == 0, err
    assert [list(sample["steps"]) for sample in removed[0] if "steps" in sample] == [["2"]] * 3
    assert read_answers() == read_answers("whole")
