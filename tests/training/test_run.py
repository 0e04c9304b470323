"""Complete runs on the toy model: files of the run folder, exit codes, checkpoints, resume, and refusals."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import pytest
import torch
from conftest import QUESTIONS, RECIPE, jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_sft import console, load_recipe, run_folder, train
from trl_sft.errors import RunStopped
from trl_sft.recipe import paths
from trl_sft.recipe.folder_decision import FolderDecision
from trl_sft.reports.chinese import translate_outcome

ROOT = Path(__file__).parents[2]
FULL = RECIPE.replace("rows.jsonl}", "rows.jsonl, eval_fraction: 0.2}")
SAVING = ("train.save_strategy=steps", "train.save_steps=2", "train.max_steps=4", "train.learning_rate=1e-2")


def read_log(folder):
    """Return the entries of the run's log.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def load_weights(folder):
    """Return the parameters of the model in a folder, by name."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {name: value.detach() for name, value in model.state_dict().items()}


def have_equal_weights(first, second):
    """Tell whether two mappings of parameters are bit-equal."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("overrides", [(), ("lora={r: 4, target_modules: all-linear}",)], ids=["full", "lora"])
def test_run_folder_contains_model_tokenizer_and_run_record(overrides, go, here):
    code, out, _ = go(FULL, *overrides, "train.eval_on_start=true")
    assert code == 0
    folder = here / "out"
    weights = "adapter_model.safetensors" if overrides else "model.safetensors"
    expected_files = {"recipe.yaml", "resolved.yaml", "run.json", "log.jsonl", "README.md", "tokenizer.json", weights}
    assert expected_files <= {p.name for p in folder.iterdir()}
    record = json.loads((folder / "run.json").read_text())
    assert record["outcome"] == "done"
    assert record["steps"] == 2
    assert record["versions"]["trl"]
    assert record["defaults"]["weight_decay"] == 0.0
    assert "max_steps" not in record["defaults"]
    assert record["metrics"]["eval_loss"] == read_log(folder)[-1]["eval_loss"]
    assert record["data"] == {str(here / "rows.jsonl"): hashlib.sha256((here / "rows.jsonl").read_bytes()).hexdigest()}
    for line in (
        "rows      32 to train",
        "eval      8 rows",
        "steps        2, which is 0.125 epochs",
        "Held-out rows: eval loss",
        "Next: talk to the model",
    ):
        assert line in out
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], return_tensors="pt", return_dict=True)
    assert model.generate(**ids, max_new_tokens=2, do_sample=False).shape[0] == 1


def test_summary_shows_the_trainable_parameters_of_lora(go):
    _, out, _ = go(RECIPE, "lora={r: 4, target_modules: all-linear}")
    assert "trainable    10,240 of 149,824 parameters (6.8%)" in out


def test_resolved_recipe_reproduces_the_run_in_a_second_folder(go, here):
    go(FULL, "train.learning_rate=1e-2", "lora=null")
    assert train(load_recipe(here / "out" / "resolved.yaml")).output_dir == here / "out-again"
    assert have_equal_weights(load_weights(here / "out"), load_weights(here / "out-again"))
    text = (here / "out" / "resolved.yaml").read_text()
    assert "learning_rate: 0.01  # (train.learning_rate=1e-2)" in text
    assert "max_steps: 2  # recipe.yaml:5" in text
    assert "# trl_sft: " in text
    assert "output_dir" not in text.partition("model:")[2]


@pytest.mark.parametrize("lora_or_packing", [(), ("lora={r: 4, lora_dropout: 0.1}",), ("train.packing=true",)])
def test_resumed_run_ends_bit_equal_to_an_uninterrupted_run(lora_or_packing, go, here, monkeypatch):
    overrides = (*SAVING, *lora_or_packing)
    assert go(FULL, *overrides, "train.output_dir=whole")[0] == 0

    from trl_sft.training import callbacks

    real = callbacks.Guard.on_step_end

    def interrupt(self, args, state, control, **live):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        real(self, args, state, control, **live)

    monkeypatch.setattr(callbacks.Guard, "on_step_end", interrupt)
    code, _, err = go(FULL, *overrides)
    assert code == 130
    assert "stopped by SIGINT after step 3 of 4" in err
    assert " -m trl_sft recipe.yaml" in err
    outcome = json.loads((here / "out" / "run.json").read_text())["outcome"]
    assert outcome.startswith("stopped by SIGINT")
    assert all(re.search("[\u4e00-\u9fff]", line) for line in translate_outcome(outcome).splitlines())
    monkeypatch.setattr(callbacks.Guard, "on_step_end", real)
    code, out, _ = go(FULL, *overrides)
    assert code == 0
    assert "resume    from" in out
    assert "checkpoint-3" in out
    names = ("adapter_model.safetensors",) if "lora" in str(lora_or_packing) else ("model.safetensors",)
    for name in names:
        assert (here / "out" / name).read_bytes() == (here / "whole" / name).read_bytes()
    steps = [e["step"] for e in read_log(here / "out") if "loss" in e]
    assert steps == [1, 2, 3, 4]
    losses = [[e["loss"] for e in read_log(here / name) if "loss" in e] for name in ("out", "whole")]
    assert losses[0] == losses[1]


def test_stopped_run_retains_its_resume_checkpoint_despite_save_total_limit(go, here, monkeypatch):
    """With save_total_limit 1 the Trainer removes all but the best checkpoint when training ends."""
    from trl_sft.training import callbacks

    def interrupt(self, args, state, control, **live):
        if state.global_step == 3:
            control.should_save = self._saving = True

    monkeypatch.setattr(callbacks.Guard, "on_step_end", interrupt)
    overrides = ("train.eval_strategy=steps", "train.eval_steps=2", "train.load_best_model_at_end=true")
    code, _, err = go(FULL, *SAVING, *overrides, "train.save_total_limit=1")
    assert code == 75
    assert "checkpoint-3" in err
    assert (here / "out" / "checkpoint-3") in run_folder.list_checkpoints(here / "out")


def test_time_limit_saves_a_checkpoint_and_exits_with_75(go, here):
    code, _, err = go(FULL, *SAVING, "run.max_hours=1e-9")
    assert code == 75
    assert "at the time limit (run.max_hours) after step 1 of 4" in err
    assert run_folder.list_checkpoints(here / "out") == [here / "out" / "checkpoint-1"]


def test_non_finite_loss_ends_the_run_with_exit_code_3(go, here):
    code, _, err = go(FULL, "train.learning_rate=1e30", "train.max_steps=9", "train.max_grad_norm=0")
    assert code == 3
    assert "not finite at step" in err
    assert "Traceback" not in err
    assert not (here / "out" / "model.safetensors").exists()


def test_loss_that_upstream_hides_ends_the_run_at_its_step_and_names_the_last_checkpoint(go, here, monkeypatch):
    """With the filter of upstream the log would show the mean of the losses before, and 0 after some entries."""
    from trl_sft.training import stages as stages_module

    class NotFinite(stages_module.SFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            result = super().compute_loss(model, inputs, *args, **kwargs)
            if not model.training or self.state.global_step != 2:
                return result
            return (result[0] * float("nan"), *result[1:]) if isinstance(result, tuple) else result * float("nan")

    monkeypatch.setattr(stages_module, "SFTTrainer", NotFinite)
    code, _, err = go(
        FULL, "train.logging_steps=50", "train.max_steps=6", "train.save_strategy=steps", "train.save_steps=1"
    )
    assert code == 3
    assert f"loss not finite at step 3; the last checkpoint is {here / 'out' / 'checkpoint-2'}" in err
    record = json.loads((here / "out" / "run.json").read_text())
    assert [(finding["code"], finding["steps"]) for finding in record["findings"]] == [("not_finite", [3])]
    assert "verdict" not in record


def test_out_of_memory_exits_with_4_and_suggests_a_smaller_batch(go, monkeypatch):
    from trl_sft.training import stages as stages_module

    class OutOfMemory(stages_module.SFTTrainer):
        def training_step(self, *args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(stages_module, "SFTTrainer", OutOfMemory)
    code, _, err = go(RECIPE)
    assert code == 4
    assert "train.per_device_train_batch_size: 1 (now 2), train.gradient_accumulation_steps: 2 (now 1)" in err


def test_internal_error_raises_and_is_recorded_in_run_json(go, here, monkeypatch):
    from trl_sft.training import stages as stages_module

    class Broken(stages_module.SFTTrainer):
        def training_step(self, *args, **kwargs):
            raise ZeroDivisionError("internal")

    monkeypatch.setattr(stages_module, "SFTTrainer", Broken)
    with pytest.raises(ZeroDivisionError):
        go(RECIPE)
    assert json.loads((here / "out" / "run.json").read_text())["outcome"] == "ZeroDivisionError: internal"


def test_run_into_a_finished_folder_is_refused_without_overwrite(go, here, matches):
    assert go(RECIPE)[0] == 0
    (here / "out" / "notes.txt").write_text("mine")
    before = {p.name: p.read_bytes() for p in (here / "out").iterdir()}
    code, _, err = go(RECIPE)
    assert code == 2
    matches("output_of_a_finished_run", err.replace(str(here), "<here>"))
    assert {p.name: p.read_bytes() for p in (here / "out").iterdir()} == before
    assert go(RECIPE, "run.overwrite=true", "lora={r: 2}")[0] == 0
    assert (here / "out" / "notes.txt").read_text() == "mine"
    assert not (here / "out" / "model.safetensors").exists()  # removed: it was the first run's
    assert (here / "out" / "adapter_model.safetensors").exists()


def test_invalid_recipe_with_overwrite_deletes_nothing(go, here):
    assert go(RECIPE)[0] == 0
    before = {p.name for p in (here / "out").iterdir()}
    assert go(RECIPE, "run.overwrite=true", "train.max_length=3")[0] == 2
    assert go(RECIPE, "run.overwrite=true", "train.max_steps=x")[0] == 2
    assert {p.name for p in (here / "out").iterdir()} == before


def test_unfinished_run_resumes_only_with_the_same_recipe_unless_allowed(go, here, matches):
    assert go(FULL, *SAVING, "run.max_hours=1e-9")[0] == 75
    code, _, err = go(FULL, *SAVING[:-1], "train.learning_rate=2e-2")
    assert code == 2
    matches("output_of_another_recipe", err.replace(str(here), "<here>"))
    code, _, err = go(FULL, *SAVING, "run.resume=never")
    assert code == 2
    matches("output_of_an_unfinished_run", err.replace(str(here), "<here>"))
    code, out, _ = go(FULL, *SAVING, "train.max_grad_norm=2.0", "run.allow=[changed_recipe]")
    assert code == 0
    assert "resume    from" in out


def test_resume_uses_the_named_checkpoint_and_skips_an_incomplete_one(go, here):
    assert go(FULL, *SAVING)[0] == 0
    incomplete = here / "out" / "checkpoint-9"
    incomplete.mkdir()
    (incomplete / "model.safetensors").write_bytes(b"")
    assert run_folder.list_checkpoints(here / "out")[-1].name == "checkpoint-4"
    code, out, _ = go(FULL, *SAVING, "run.resume=out/checkpoint-2", "train.output_dir=other")
    assert code == 0
    assert "checkpoint-2" in out
    assert have_equal_weights(load_weights(here / "out"), load_weights(here / "other"))
    assert go(FULL, *SAVING, "run.resume=out/checkpoint-9", "train.output_dir=third")[0] == 2


def test_adapter_folder_as_model_continues_training_of_that_adapter(go, here):
    assert go(RECIPE, "lora={r: 4, target_modules: all-linear}", "train.output_dir=first")[0] == 0
    code, out, _ = go(RECIPE, "model.name_or_path=first", "train.learning_rate=1e-2")
    assert code == 0
    assert "trainable    10,240" in out
    from safetensors.torch import load_file

    first, second = (load_file(here / name / "adapter_model.safetensors") for name in ("first", "out"))
    assert first.keys() == second.keys()
    assert any(not torch.equal(first[name], second[name]) for name in first)
    unchanged_run = go(RECIPE, "model.name_or_path=first", "train.learning_rate=0", "train.output_dir=still")
    assert unchanged_run[0] == 0
    third = load_file(here / "still" / "adapter_model.safetensors")
    assert all(torch.equal(first[name], third[name]) for name in first)


def test_folder_of_a_finished_run_is_a_valid_model(go):
    assert go(RECIPE, "train.output_dir=first")[0] == 0
    assert go(RECIPE, "model.name_or_path=./first")[0] == 0


def test_last_screen_without_evaluation_set_recommends_eval_fraction(go):
    _, out, _ = go(RECIPE)
    assert "Verdict: cannot be told\n  No rows were held out" in out
    assert "data.eval_fraction: 0.05" in out


def test_list_of_sources_and_globs_is_concatenated(go, here):
    for n in range(3):
        jsonl(here / f"part-{n}.jsonl", [{"instruction": "a", "output": str(n)}] * 4)
    code, out, _ = go(RECIPE.replace("rows.jsonl", "[rows.jsonl, 'part-*.jsonl']"))
    assert code == 0
    assert "rows      52 to train" in out
    assert "part-0.jsonl and 2 more: 12 rows to train; format alpaca" in out


@pytest.mark.parametrize("extension", ["csv", "tsv", "json", "parquet", "txt"])
def test_data_file_is_read_by_the_builder_of_its_extension(extension, go, here):
    import pandas as pd

    frame = pd.DataFrame({"question": ["a", "b"], "answer": ["c", "d"]})
    match extension:
        case "csv":
            frame.to_csv(here / "r.csv", index=False)
        case "tsv":
            frame.to_csv(here / "r.tsv", index=False, sep="\t")
        case "json":
            (here / "r.json").write_text(frame.to_json(orient="records"))
        case "parquet":
            frame.to_parquet(here / "r.parquet")
        case "txt":
            (here / "r.txt").write_text("once\nupon\n")
    code, out, err = go(RECIPE.replace("rows.jsonl", f"r.{extension}"), command=["check"])
    assert code == 0, err
    assert f"r.{extension}: 2 rows to train" in out


def write_rows_as(layout, here):
    """Write two training rows and one held-out row in a storage layout; return both sources."""
    import gzip

    from datasets import Dataset, DatasetDict

    rows = [{"question": "a", "answer": "c"}, {"question": "b", "answer": "d"}]
    held_out = [{"question": "x", "answer": "y"}]
    match layout:
        case "compressed":
            with gzip.open(here / "r.jsonl.gz", "wt") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            return "r.jsonl.gz", None
        case "glob":
            for n, row in enumerate(rows):
                jsonl(here / f"part-{n}.jsonl", [row])
            return "part-*.jsonl", None
        case "saved":
            Dataset.from_list(rows).save_to_disk(here / "saved")
            return "./saved", None
        case "arrow":
            Dataset.from_list(rows).save_to_disk(here / "saved")
            return "saved/data-00000-of-00001.arrow", None
        case "saved_with_splits":
            DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(held_out)}).save_to_disk(
                here / "saved"
            )
        case "folder_with_splits":
            (here / "saved").mkdir()
            jsonl(here / "saved" / "train.jsonl", rows)
            jsonl(here / "saved" / "test.jsonl", held_out)
    return "./saved", "./saved"


@pytest.mark.parametrize("streaming", ["false", "true"])
@pytest.mark.parametrize("layout", ["compressed", "glob", "saved", "arrow", "saved_with_splits", "folder_with_splits"])
def test_rows_are_read_from_every_storage_layout(layout, streaming, go, here):
    train_source, eval_source = write_rows_as(layout, here)
    data = f"{{path: '{train_source}', streaming: {streaming}}}" + (f", eval: '{eval_source}'" if eval_source else "")
    code, out, err = go(RECIPE.replace("rows.jsonl", data), command=["check"])
    assert code == 0, err
    assert "rows      2 to train" in out
    assert ("eval      1 row" in out) == (eval_source is not None)


def test_check_lists_files_of_a_folder_that_belong_to_no_split(go, here):
    (here / "rows").mkdir()
    for name in ("train.jsonl", "test.jsonl", "more.jsonl", "some.csv"):
        jsonl(here / "rows" / name, QUESTIONS)
    (here / "rows" / "notes.pdf").write_bytes(b"%PDF")
    code, out, err = go(RECIPE.replace("rows.jsonl", "rows"), command=["check"])
    assert code == 0, err
    assert "NOT READ: more.jsonl, notes.pdf, some.csv" in out
    pattern = next(word for word in out.split() if word.endswith("/*.jsonl"))
    code, out, err = go(RECIPE.replace("rows.jsonl", pattern), command=["check"])
    assert code == 0, err
    assert "120 rows to train" in out
    assert "NOT READ" not in out


def test_check_reports_max_rows_above_the_number_of_rows(go):
    code, out, err = go(RECIPE.replace("rows.jsonl", "{path: rows.jsonl, max_rows: 41}"), command=["check"])
    assert code == 0, err
    assert "rows.jsonl: has 40 rows, fewer than max_rows: 41" in out


def test_prepare_accepts_the_recipe_of_a_finished_run(go, here):
    assert go()[0] == 0
    code, _, err = go()
    assert code == 2
    assert "holds a finished run" in err
    assert go(command=["prepare"])[0] == 0


def test_unknown_split_of_a_saved_dataset_is_refused(go, here):
    from datasets import Dataset

    write_rows_as("saved_with_splits", here)
    code, _, err = go(RECIPE.replace("rows.jsonl", "{path: ./saved, split: validation}"), command=["check"])
    assert code == 2
    assert "no split validation; it has train, test" in err
    Dataset.from_list([{"question": "a", "answer": "b"}]).save_to_disk(here / "one")
    code, _, err = go(RECIPE.replace("rows.jsonl", "{path: ./one, split: test}"), command=["check"])
    assert code == 2
    assert "without splits" in err


def test_builder_keywords_are_passed_to_the_builder(go, here):
    (here / "r.csv").write_text("question;answer\na;b\n")
    code, _, err = go(RECIPE.replace("rows.jsonl", "{path: r.csv, delimiter: ';'}"), command=["check"])
    assert code == 0, err


@pytest.mark.parametrize(("name", "code"), [("SIGHUP", 129), ("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 138)])
def test_signal_saves_a_checkpoint_and_sets_the_exit_code(name, code, here):
    (here / "recipe.yaml").write_text(FULL)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = forks.start(here, "recipe.yaml", "train.max_steps=100000", "train.logging_steps=1", **streams)
    for line in process.stdout:
        if line.lstrip().startswith("5/"):
            process.send_signal(getattr(signal, name))
            break
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == code, rest
    assert f"stopped by {name}" in rest
    assert " -m trl_sft recipe.yaml" in rest
    assert "Traceback" not in rest
    assert run_folder.list_checkpoints(here / "out")


def test_signal_while_a_line_is_printed_saves_a_checkpoint_and_is_told_after_the_step(go, monkeypatch):
    """The handler runs inside the call that prints, and Python's streams refuse a second call."""
    real, printing = console._print, []

    def print_line(text, *args, **kwargs):
        if printing:
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name=1>")
        if text.lstrip().startswith("2/"):
            printing.append(text)
            os.kill(os.getpid(), signal.SIGTERM)
            printing.clear()
        real(text, *args, **kwargs)

    monkeypatch.setattr(console, "_print", print_line)
    code, out, err = go(FULL, "train.max_steps=5")
    assert code == 143, err
    assert out.count("SIGTERM: saving at the end of this step") == 1
    assert "stopped by SIGTERM after step 3 of 5" in err


def test_interrupt_while_loading_exits_with_130_and_writes_no_run_record(here):
    (here / "recipe.yaml").write_text(FULL)
    process = subprocess.Popen(
        [sys.executable, "-m", "trl_sft", "recipe.yaml"],
        **{"cwd": here, "env": os.environ | {"PYTHONUNBUFFERED": "1"}, "text": True},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
    )
    process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert not (here / "out" / "run.json").exists()


def test_log_of_a_resumed_run_contains_each_step_once(go, here):
    assert go(FULL, *SAVING, "run.max_hours=1e-9")[0] == 75
    run_folder.append_json(
        here / "out" / "log.jsonl", {"step": 2, "loss": 9.0}
    )  # written after the checkpoint, then lost
    assert go(FULL, *SAVING)[0] == 0
    steps = [e["step"] for e in read_log(here / "out") if "loss" in e]
    assert steps == [1, 2, 3, 4]


def test_train_function_raises_run_stopped_with_the_exit_code(here):
    (here / "recipe.yaml").write_text(FULL)
    with pytest.raises(RunStopped, match="time limit") as caught:
        train(load_recipe("recipe.yaml", ["run.max_hours=1e-9"]))
    assert caught.value.exit_code == 75


def test_overwrite_preserves_files_of_the_user(go, here):
    assert go(RECIPE)[0] == 0
    (here / "out" / "notes.txt").write_text("mine")
    (here / "out" / "checkpoint-2-keep").mkdir()
    for _ in range(2):
        assert go(RECIPE, "run.overwrite=true")[0] == 0
    assert (here / "out" / "notes.txt").read_text() == "mine"
    assert (here / "out" / "checkpoint-2-keep").is_dir()


def test_resume_from_a_path_is_refused_for_a_finished_folder_or_another_recipe(go, here):
    assert go(FULL, *SAVING)[0] == 0
    before = {p.name: p.read_bytes() for p in (here / "out").iterdir() if p.is_file()}
    assert go(FULL, *SAVING, "run.resume=out/checkpoint-2")[0] == 2
    code, _, err = go(FULL, *SAVING, "run.resume=out/checkpoint-2", "train.output_dir=b", "train.weight_decay=0.1")
    assert code == 2
    assert "is of another recipe (train.weight_decay: not set -> 0.1)\n    -> Remove `train.weight_decay` to" in err
    assert {p.name: p.read_bytes() for p in (here / "out").iterdir() if p.is_file()} == before


def test_run_killed_after_its_last_step_is_completed_without_another_step(go, here, monkeypatch):
    """There is a checkpoint of the last step but no model; the Trainer alone would train one more step."""
    from trl_sft.training import finish, run

    (here / "recipe.yaml").write_text(FULL)
    with monkeypatch.context() as patch:
        patch.setattr(finish, "_evaluate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.run(load_recipe("recipe.yaml", SAVING), FolderDecision())
    assert not (here / "out" / "model.safetensors").exists()
    code, out, _ = go(FULL, *SAVING)
    assert code == 0
    assert "Done: 4 steps" in out
    assert go(FULL, *SAVING, "train.output_dir=whole")[0] == 0
    assert have_equal_weights(load_weights(here / "out"), load_weights(here / "whole"))


def test_resume_refuses_a_checkpoint_without_optimizer_state(go, here):
    overrides = (*SAVING, "train.save_only_model=true")
    with pytest.MonkeyPatch.context() as patch:
        from trl_sft.training import finish

        patch.setattr(finish, "_evaluate", lambda *_: (_ for _ in ()).throw(ZeroDivisionError))
        with pytest.raises(ZeroDivisionError):
            go(FULL, *overrides)
    code, _, err = go(FULL, *overrides)
    assert code == 2
    assert "holds weights only (save_only_model)" in err
    assert go(FULL, *overrides, "train.output_dir=b", "run.max_hours=1e-9")[0] == 75
    assert go(FULL, *overrides, "train.output_dir=b")[0] == 0  # the time limit saves the optimizer too


def test_resume_refuses_changed_rows_unless_allowed(go, here):
    assert go(FULL, *SAVING, "run.max_hours=1e-9")[0] == 75
    rows = (here / "rows.jsonl").read_text()
    (here / "rows.jsonl").write_text(rows.replace("plus", "and"))
    code, _, err = go(FULL, *SAVING)
    assert code == 2
    assert "was trained on other tokens than the recipe prepares now: the training rows and the evaluation set" in err
    assert f"changed: the file {here / 'rows.jsonl'}" in err
    assert go(FULL, *SAVING, "run.allow=[changed_data]")[0] == 0


def test_suggested_resume_command_sets_resume_auto(go, here):
    overrides = (*SAVING, "run={overwrite: true, resume: never, max_hours: 1e-9}")
    code, _, err = go(FULL, *overrides)
    assert code == 75
    assert err.rstrip().endswith("run.resume=auto")


def test_second_process_in_the_same_run_folder_is_refused(go, here):
    with run_folder.lock(here / "out") as acquired:
        assert acquired
        code, _, err = go(RECIPE)
    assert code == 2
    assert "another process trains there now" in err


def test_model_card_of_a_continued_adapter_names_peft_and_lora(go, here):
    assert go(RECIPE, "lora={r: 4}", "train.output_dir=first")[0] == 0
    assert go(RECIPE, "model.name_or_path=first")[0] == 0
    card = (here / "out" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "with LoRA fine-tuned" in card


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("train.learning_rate=-1",), "Invalid learning rate: -1"),
        (("train.lr_scheduler_type=cosine_with_min_lr",), "One of min_lr or min_lr_rate"),
        (("model.use_safetensors=false",), "model.name_or_path"),
        (("model.device_map=cuda",), "Torch not compiled with CUDA"),
        (("train.max_steps=0",), "at least 1, or -1"),
        (("train.num_train_epochs=-1",), "a number above 0"),
        (("train.per_device_train_batch_size=0",), "at least 1"),
        (("train.seed=-1",), "at least 0"),
        (("lora={r: 0}",), "at least 1"),
        (("model.name_or_path=~nobody/x",), "no such file or folder"),
        (("data.train=" + "x" * 300 + ".jsonl",), "a name in the path has 306 bytes"),
        (("train.²=1",), "has no key"),
        (("train.max_steps=",), "the value is empty"),
        (("train.weight_decay=.nan",), "a finite number"),
        (("train.fp16=true",), "fp16 has no effect on a CPU"),
        (("train.activation_offloading=true",), "recipe.yaml:3 train"),
        (("train.report_to=comet_ml",), "not installed: comet-ml"),
        (
            ("data={train: rows.jsonl, eval_fraction: 0.5}", "train.eval_steps=1"),
            "`eval_steps` has no effect without `eval_strategy`",
        ),
    ],
)
def test_invalid_value_with_overwrite_is_refused_before_the_old_run_is_deleted(overrides, message, go, here):
    assert go(RECIPE)[0] == 0
    before = {p.name: p.read_bytes() for p in (here / "out").iterdir()}
    code, _, err = go(RECIPE, *overrides, "run.overwrite=true")
    assert code == 2, err
    assert message in err
    assert "Traceback" not in err
    assert {p.name: p.read_bytes() for p in (here / "out").iterdir()} == before


def test_corrupt_weights_and_a_template_that_rejects_rows_are_reported(go, here):
    import shutil

    shutil.copytree(paths.EMBEDDED / "tiny", here / "m")
    (here / "m" / "model.safetensors").write_bytes(b"corrupt")
    code, _, err = go(RECIPE, "model.name_or_path=./m")
    assert code == 2
    assert "model.name_or_path\n    " in err
    template = (
        "{{ raise_exception('System role not supported') if messages[0].role == 'system' }}"
        "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    )
    (here / "m" / "chat_template.jinja").write_text(template)
    turns = [{"role": role, "content": "a"} for role in ("system", "user", "assistant")]
    jsonl(here / "rows.jsonl", [{"messages": turns}] * 9)
    code, _, err = go(RECIPE, "model.name_or_path=./m", command=["check"])
    assert code == 2
    assert "System role not supported" in err


@pytest.mark.parametrize(
    ("row", "keywords", "message"),
    [
        (
            {"messages": [{"role": "user", "content": "a"}] * 2},
            ", wording: alpaca",
            "messages has no assistant turn",
        ),
        ({"text": "a"}, ", wording: alpaca", "rows of format text have no wording"),
        ({"a": "b"}, ", format: text, wording: {text: '{a}'}", "one of the two"),
    ],
)
def test_wording_or_key_that_would_be_ignored_is_refused(row, keywords, message, go, here):
    jsonl(here / "r.jsonl", [row])
    code, _, err = go(RECIPE.replace("rows.jsonl", f"{{path: r.jsonl{keywords}}}"), command=["check"])
    assert code == 2
    assert message in err


def test_check_lists_unused_columns(go, here):
    turns = [{"from": "human", "value": "a", "id": 1}, {"from": "gpt", "value": "b", "id": 2}]
    jsonl(here / "r.jsonl", [{"conversations": turns, "source": "x"}] * 4)
    _, out, _ = go(RECIPE.replace("rows.jsonl", "r.jsonl"), command=["check"])
    assert "not used: conversations.id, source" in out


def test_non_finite_weights_are_not_saved(go, here, monkeypatch):
    from trl_sft.training import stages as stages_module

    class Broken(stages_module.SFTTrainer):
        def train(self, *args, **kwargs):
            super().train(*args, **kwargs)
            next(self.model.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(stages_module, "SFTTrainer", Broken)
    code, _, err = go(RECIPE)
    assert code == 3
    assert "weights not finite" in err
    assert not (here / "out" / "model.safetensors").exists()


def test_corrupt_checkpoint_is_reported_and_not_deleted(go, here):
    assert go(FULL, *SAVING, "run.max_hours=1e-9")[0] == 75
    (here / "out" / "checkpoint-1" / "model.safetensors").write_bytes(b"corrupt")
    code, _, err = go(FULL, *SAVING)
    assert code == 2
    assert "the newest is checkpoint-1: model.safetensors has 7 of " in err
    assert (here / "out" / "checkpoint-1").exists()


def test_invalid_value_on_resume_is_reported_at_its_key_and_not_at_the_checkpoint(go):
    assert go(FULL, *SAVING, "run.max_hours=1e-9")[0] == 75
    code, _, err = go(
        FULL, *SAVING[:-1], "train.max_grad_norm=1", "train.warmup_steps=-1", "run.allow=[changed_recipe]"
    )
    assert code == 2
    assert "train.warmup_steps" in err
    assert "the run cannot resume from this checkpoint" not in err


def test_row_with_an_empty_response_is_refused(go, here):
    jsonl(here / "rows.jsonl", [{"question": "a", "answer": " "}])
    code, _, err = go(RECIPE)
    assert code == 2
    assert "rows.jsonl row 1 (line 1)\n    answer is empty: there is nothing to learn" in err


def test_file_name_with_brackets_is_not_a_glob(go, here):
    (here / "a[1].JSONL").write_text((here / "rows.jsonl").read_text())
    assert go(RECIPE.replace("rows.jsonl", "'a[1].JSONL'"), command=["check"])[0] == 0


def test_glob_matches_files_in_subfolders(go, here):
    for name in ("a/b", "a/c"):
        (here / name).mkdir(parents=True)
        jsonl(here / name / "r.jsonl", [{"text": "x"}])
    for pattern in ("a/*/r.jsonl", "**/r.jsonl"):
        code, out, err = go(RECIPE.replace("rows.jsonl", f"'{pattern}'"), command=["check"])
        assert code == 0, err
        assert "2 rows" in out
