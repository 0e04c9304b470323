"""Pushes of a run, against a stand-in for the hub: strategies, visibility, faults before and after training."""

import json
import re
from pathlib import Path

import hub_server
import pytest
from huggingface_hub import ModelCard, constants

RECIPE = """\
model: {name_or_path: trl_sft:tiny}
data: {train: rows.jsonl, eval_fraction: 0.2}
train: {output_dir: out, push_to_hub: true, max_steps: 4, save_steps: 2, per_device_train_batch_size: 2}
evaluate: {max_rows: 2, generation: {max_new_tokens: 2}}
"""
LORA = "lora={r: 2}"


@pytest.fixture
def hub(monkeypatch):
    """Return the stand-in, which huggingface_hub of this process speaks to with the token of `me`."""
    with hub_server.connected(monkeypatch) as server:
        yield server


def read_run():
    """Return run.json of the run in `out`."""
    return json.loads(Path("out/run.json").read_text())


def test_default_strategy_pushes_the_model_at_each_save_and_the_finished_run_with_our_card(hub, go):
    code, out, err = go(RECIPE)
    assert code == 0, err
    there = hub.repositories["me/out"]
    titles = there.titles
    assert titles[-1] == "End of training"
    assert set(titles[:-1]) <= {"Training in progress, step 2", "Training in progress, step 4"}  # busy ones are skipped
    assert titles[0] == "Training in progress, step 2"
    first = there.branches["main"][1]["files"]
    assert "Training is in progress: step 2 of 4." in first["README.md"].decode()
    assert "model-index" not in first["README.md"].decode()
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(first)
    assert not {name for name in first if "optimizer" in name or name.endswith((".pt", ".bin", ".jsonl"))}
    assert there.files["model.safetensors"] == Path("out/model.safetensors").read_bytes()
    card = ModelCard(there.files["README.md"].decode())
    assert card.data.eval_results
    assert "Verdict: " in card.text
    assert 'pipeline("text-generation", "me/out")' in card.text
    assert not {"rows.jsonl", "samples.jsonl", "rejects.jsonl", "report.html", "training_args.bin"} & set(there.files)
    assert not Path("out/_push").exists()
    pushed = read_run()["pushed"]
    assert pushed["commit"] == there.find("main")["oid"]
    assert pushed["files"] == sorted(set(there.files) - {".gitattributes"})
    assert f"pushed    {hub.endpoint}/me/out (public), commit {pushed['commit'][:8]}: " in out
    plan = out.partition("push      ")[2].partition("\ntokens")[0]
    assert f"to {hub.endpoint}/me/out (new, public, unless its owner's default is private), after each" in plan
    assert "not: checkpoints, training_args.bin, and files with rows (rows.jsonl, samples.jsonl, " in plan
    assert out.index("push      ") < out.index("train loss")


@pytest.mark.parametrize(
    ("strategy", "folders"),
    [("end", set()), ("checkpoint", {"last-checkpoint"}), ("all_checkpoints", {"checkpoint-2", "checkpoint-4"})],
)
def test_strategy_pushes_the_checkpoints_that_transformers_pushes(hub, go, strategy, folders):
    words = (f"train.hub_strategy={strategy}", "train.hub_always_push=true", "train.hub_private_repo=true")
    code, _, err = go(RECIPE, LORA, "train.save_total_limit=1", *words[: 3 if folders else 1], "evaluate=false")
    assert code == 0, err
    there = hub.repositories["me/out"]
    assert there.private == bool(folders)
    assert len(there.titles) == (3 if folders else 1)
    assert {name.partition("/")[0] for name in there.files if "/" in name} == folders
    for folder in folders:
        assert {f"{folder}/optimizer.pt", f"{folder}/adapter_model.safetensors"} <= set(there.files)
    if strategy == "checkpoint":
        state = json.loads(there.files["last-checkpoint/trainer_state.json"])
        assert state["global_step"] == 4
    assert "adapter_model.safetensors" in there.files
    assert "model.safetensors" not in there.files


def test_named_branch_of_a_repository_that_exists_gets_the_push_and_main_stays(hub, go):
    hub.repositories["team/other"] = hub_server.Repository(private=True)
    words = ("train.hub_model_id=team/other", "train.hub_revision=trial", "train.hub_strategy=end")
    code, out, err = go(RECIPE, LORA, *words, "train.save_strategy='no'")
    assert code == 0, err
    there = hub.repositories["team/other"]
    assert set(there.files) == {".gitattributes"}
    assert "adapter_model.safetensors" in there.branches["trial"][-1]["files"]
    assert "team/other (exists, private), at the end, branch trial" in out


def test_push_that_fails_at_the_end_leaves_a_finished_run_and_says_how_to_push_it_later(hub, go):
    hub.fail("POST .*/commit/", 503)
    code, out, err = go(RECIPE, LORA, "train.hub_private_repo=true")
    assert code == 2
    assert "Traceback" not in err
    assert "the model is trained and saved in out, but its push failed: the hub refuses me/out: " in err
    assert re.search(r"To push it later: \S+ -m trl_sft export out --push me/out --private\n", err)
    assert "note      the push of step 2 failed; the run goes on: " in out
    assert read_run()["outcome"] == "done"
    assert Path("out/adapter_model.safetensors").is_file()
    assert Path("out/report.html").is_file()
    assert not Path("out/_push").exists()


def test_push_that_cannot_succeed_is_refused_before_the_rows_are_tokenized(hub, go):
    code, out, err = go(RECIPE, "train.hub_model_id=teem/x")
    assert code == 2
    assert "train.hub_model_id\n    the token belongs to me, who is no member of teem" in err
    assert "-> Write `team/x`, or run" in err
    assert "tokens" not in out
    assert not Path("out").exists()
    code, out, err = go(None, "train.hub_token=hf_Wrong1234567", command=["check"])
    assert code == 2
    assert f"{hub.endpoint} refuses the token: it is not valid" in err
    assert "hf_Wrong" not in out + err
    assert hub.count("POST") == 0


def test_private_repository_is_not_silently_public(hub, go):
    hub.repositories["me/out"] = hub_server.Repository(private=False)
    code, _, err = go(RECIPE, "train.hub_private_repo=true")
    assert code == 2
    assert "me/out exists and is public; a push does not make it private" in err


def test_repository_that_cannot_be_created_stops_the_run_before_step_1_and_writes_nothing(hub, go):
    hub.fail("POST /api/repos/create", 403)
    code, out, err = go(RECIPE, LORA)
    assert code == 2
    assert "the token may not write to me/out" in err
    assert not Path("out").exists()
    assert "train loss" not in out


def test_hub_that_is_down_is_said_before_training_with_the_way_without_it(hub, go, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    code, _, err = go(RECIPE)
    assert code == 2
    assert "http://127.0.0.1:1 cannot be reached" in err
    assert "Or train without `train.push_to_hub`, and push the run folder later." in err


def test_run_that_is_stopped_ends_its_push_in_the_background(hub, go, stop_after):
    stop_after(2)
    code, out, _ = go(RECIPE, LORA)
    assert code == 143
    assert hub.repositories["me/out"].titles == ["Training in progress, step 2"]
    assert not Path("out/_push").exists()
    stop_after(None)
    code, out, err = go(None, LORA)
    assert code == 0, err
    assert "resume    from" in out
    assert hub.repositories["me/out"].titles[-1] == "End of training"
