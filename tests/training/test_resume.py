"""Runs that resume: equal to an uninterrupted run in every file, or refused by name; what differs is told."""

import datetime
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import QUESTIONS, RECIPE, jsonl
from resumed_runs import are_equal, combine, killed_after_the_last_step, list_differences, read_log, read_run

from trl_sft import checkpoints, run_folder
from trl_sft.data import user_function
from trl_sft.model import device, patches
from trl_sft.training import manifest, progress, stages
from trl_sft.training import run as training_run

FULL = RECIPE.replace("rows.jsonl}", "rows.jsonl, eval_fraction: 0.2}")
SAVING = ("train.save_strategy=steps", "train.save_steps=2", "train.max_steps=6", "train.learning_rate=1e-2")
ALLOW = "run.allow=[changed_recipe]"


TWO_SOURCES = "data.train=[{path: rows.jsonl}, {path: other.jsonl}]"  # whose losses are logged apart
EPOCHS = ("train.max_steps=-1", "train.num_train_epochs=2")  # of 32 rows: 16 steps each


@pytest.mark.parametrize(
    ("step", "overrides"),
    [
        (3, ("train.logging_steps=2", "train.eval_strategy=steps", "train.eval_steps=2", "train.eval_on_start=true")),
        (5, ("train.logging_steps=4", "lora={r: 4, target_modules: all-linear, lora_dropout: 0.1}")),
        (22, (*EPOCHS, "train.train_sampling_strategy=group_by_length", "train.logging_steps=7")),
        (11, ("train.packing=true", "train.max_length=64", "train.max_steps=14", "train.logging_steps=3", TWO_SOURCES)),
        (3, ("data.train={path: rows.jsonl, streaming: true}", "data.eval_fraction=null", "data.eval=other.jsonl")),
    ],
    ids=lambda value: value if isinstance(value, int) else " ".join(value).replace("train.", "")[:60],
)
def test_resumed_run_equals_an_uninterrupted_run_in_weights_log_and_counts(step, overrides, go, here, stop_after):
    """Other settings are in test_resume_table.py, which `make prove` runs."""
    rows = [{"question": f"What is {n} plus {n}?", "answer": "x " * (1 + n * 7 % 12)} for n in range(40)]
    jsonl(here / "rows.jsonl", rows)
    jsonl(here / "other.jsonl", [{"question": f"Who is {n}?", "answer": "me"} for n in range(5)])
    words = combine(*SAVING, *overrides)
    code, _, err = go(FULL, *words, "train.output_dir=whole")
    assert code == 0, err
    stop_after(step)
    code, _, err = go(FULL, *words)
    assert code == 143, err
    stop_after(None)
    code, out, err = go(FULL, *words)
    assert code == 0, err
    assert f"checkpoint-{step}" in out
    assert list_differences("out", "whole") == []
    if TWO_SOURCES in overrides and patches.has_fused_head():
        assert all("loss/rows" in entry for entry in read_log("out") if "loss" in entry)


def test_run_killed_after_its_last_checkpoint_logs_the_train_loss_and_saves_the_best_step(go, here, monkeypatch):
    best = ("train.eval_strategy=steps", "train.eval_steps=2", "train.load_best_model_at_end=true")
    # the loss falls, so the highest one is that of the first evaluation
    words = combine(*SAVING, *best, "train.metric_for_best_model=eval_loss", "train.greater_is_better=true")
    assert go(FULL, *words, "train.output_dir=whole")[0] == 0
    assert read_run("whole")["best"]["step"] == 2

    with killed_after_the_last_step(monkeypatch):
        assert go(FULL, *words)[0] != 0
    code, out, err = go(FULL, *words)
    assert code == 0, err
    assert read_log("out") == read_log("whole")
    assert read_run("out")["best"] == read_run("whole")["best"]
    assert are_equal("out", "whole")
    assert "Trained: 6 steps, 12 rows" in out


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("train.optim=sgd", "train.optim"),
        ("lora={r: 4, target_modules: all-linear}", "lora.r"),
        ("train.learning_rate=1e-3", "train.learning_rate"),
        ("train.weight_decay=0.1", "train.weight_decay"),
        ("train.seed=7", "train.seed"),
        ("train.bf16=true", "train.bf16"),
        ("model.dtype=bfloat16", "model.dtype"),
        ("train.label_smoothing_factor=0.1", "train.label_smoothing_factor"),
    ],
)
def test_key_that_cannot_change_is_refused_before_the_weights_load(key, name, go, here, monkeypatch):
    assert go(FULL, *SAVING, "run.max_hours=1e-9")[0] == 75
    before = {path: path.read_bytes() for path in (here / "out").rglob("*") if path.is_file()}

    def load(*args):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr(training_run, "build_trainer", load)
    code, _, err = go(FULL, *combine(*SAVING, key, ALLOW))
    assert code == 2
    assert f"{name}: " in err
    assert "checkpoint-1" in err
    assert {path: path.read_bytes() for path in (here / "out").rglob("*") if path.is_file()} == before
    code, _, err = go(FULL, *combine(*SAVING, key))
    assert code == 2
    assert "allow" not in err.partition("->")[2]  # allowing would not help


def test_learning_rate_other_than_the_schedule_asks_for_is_told(go):
    words = ("train.save_strategy=steps", "train.max_steps=4", "train.learning_rate=2e-5")
    assert go(FULL, *words, "run.max_hours=1e-9")[0] == 75
    code, out, err = go(FULL, *words, "train.lr_scheduler_type=cosine", ALLOW)
    assert code == 0, err
    expected = "step 2 has the learning rate of the checkpoint, 1.5e-05; the recipe asks for 1.707e-05"
    assert expected in out
    rates = [entry["learning_rate"] for entry in read_log("out") if "learning_rate" in entry]
    assert rates == pytest.approx([2e-5, 1.5e-5, 1e-5, 2.9289e-6], rel=1e-4)


def test_learning_rate_is_not_mentioned_where_it_is_the_one_asked_for(go):
    constant = "train.lr_scheduler_type=constant"
    assert go(FULL, *SAVING, constant, "run.max_hours=1e-9")[0] == 75
    code, out, _ = go(FULL, *combine(*SAVING, constant, "train.max_steps=3", ALLOW))
    assert code == 0
    assert "changed      train.max_steps: 6 -> 3" in out
    assert "learning rate of the checkpoint" not in out


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("train.per_device_train_batch_size=4",), "2 rows a step before the checkpoint, 4 now: 4 rows are skipped"),
        (
            ("train.per_device_train_batch_size=1",),
            "2 rows a step before the checkpoint, 1 now: 2 rows are trained again",
        ),
        (("train.gradient_accumulation_steps=4",), "2 rows a step before the checkpoint, 8 now: 12 rows are skipped"),
        (("train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=2"), None),
        (("train.ignore_data_skip=true",), "2 now: 4 rows are trained again"),
    ],
)
def test_rows_skipped_or_repeated_by_another_batch_size_are_counted(overrides, expected, go, stop_after, micro_batches):
    stop_after(2)
    assert go(FULL, *SAVING)[0] == 143
    stop_after(None)
    code, out, err = go(FULL, *SAVING, *overrides, ALLOW)
    assert code == 0, err
    if expected is None:
        assert "rows are" not in out
    else:
        assert expected in out


def test_tokens_of_another_day_are_refused_and_the_pinned_day_is_used_again(go, here, monkeypatch):
    template = "{{ 'Today is ' + strftime_now('%d %b %Y') + '\\n' }}"
    template += "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    (here / "t.jinja").write_text(template)
    recipe = FULL + "tokenizer: {chat_template: ./t.jinja}\n"

    class Calendar:
        day = datetime.date(2026, 3, 1)

    class Today(datetime.date):
        @classmethod
        def today(cls):
            return Calendar.day

    monkeypatch.setattr(stages.datetime, "date", Today)
    assert go(recipe, *SAVING, "train.output_dir=whole")[0] == 0
    code, out, _ = go(recipe, *SAVING, "run.max_hours=1e-9")
    assert code == 75
    assert "the chat template writes a date: 2026-03-01, today" in out
    assert read_run("out")["template_date"] == "2026-03-01"
    Calendar.day = datetime.date(2026, 3, 2)
    code, out, _ = go(recipe, *SAVING, command=["check"])
    assert "2026-03-01, the day on which this run began" in out
    kept = (here / "kept").joinpath("out")
    shutil.copytree("out", kept)
    code, out, err = go(recipe, *SAVING)
    assert code == 0, err
    assert "2026-03-01, the day on which this run began" in out
    assert are_equal("out", "whole")
    shutil.rmtree("out")  # a run that knows no date renders that of today, and its tokens are refused
    shutil.copytree(kept, "out")
    record = checkpoints.read_record(Path("out/checkpoint-1"))
    checkpoints.write_record(Path("out/checkpoint-1"), record | {"template_date": None})
    Path("out/run.json").write_text(json.dumps(read_run("out") | {"template_date": None}))
    code, _, err = go(recipe, *SAVING)
    assert code == 2
    assert "was trained on other tokens than the recipe prepares now: the training rows and the evaluation set" in err
    assert "changed: the chat template or what it renders" in err


def change_rows(here):
    text = (here / "rows.jsonl").read_text()
    (here / "rows.jsonl").write_text(text.replace("plus", "and"))


def change_order(here):
    lines = (here / "rows.jsonl").read_text().splitlines(keepends=True)
    (here / "rows.jsonl").write_text("".join(reversed(lines)))


def change_function(here):
    text = (here / "f.py").read_text()
    (here / "f.py").write_text(text.replace("row['question']", "row['question'] + '?'"))
    user_function.import_function.cache_clear()  # a new process would have none


@pytest.mark.parametrize(
    ("change", "expected"),
    [(change_rows, "rows.jsonl"), (change_order, "rows.jsonl"), (change_function, "f.py")],
    ids=["rows", "order", "function"],
)
def test_changed_tokens_are_refused_and_the_message_says_what_changed(change, expected, go, here):
    (here / "f.py").write_text("def f(row):\n    return {'prompt': row['question'], 'completion': row['answer']}\n")
    recipe = FULL.replace("train: rows.jsonl", "train: {path: rows.jsonl, format: f.py:f}")
    assert go(recipe, *SAVING, "run.max_hours=1e-9")[0] == 75
    change(here)
    code, _, err = go(recipe, *SAVING)
    assert code == 2
    assert f"changed: the file {here / expected}" in err
    code, out, err = go(recipe, *SAVING, "run.allow=[changed_data]")
    assert code == 0, err
    assert "changed   other tokens than before the checkpoint" in out


def test_file_written_again_with_the_same_rows_is_no_change(go, here):
    assert go(FULL, *SAVING, "run.max_hours=1e-9")[0] == 75
    lines = [json.dumps(row, indent=None, separators=(",", ":")) for row in QUESTIONS]
    (here / "rows.jsonl").write_text("\n".join(lines))
    code, _, err = go(FULL, *SAVING)
    assert code == 0, err


def test_other_tokens_by_a_changed_key_need_both_words(go):
    assert go(FULL, *SAVING, "run.max_hours=1e-9")[0] == 75
    code, _, err = go(FULL, *SAVING, "train.shuffle_dataset=true", ALLOW)
    assert code == 2
    assert "changed: how the rows are read or packed" in err
    code, _, err = go(FULL, *SAVING, "train.shuffle_dataset=true", "run.allow=[changed_recipe, changed_data]")
    assert code == 0, err


def test_overwrite_starts_again_where_the_tokens_changed(go, here):
    assert go(FULL, *SAVING, "run.max_hours=1e-9")[0] == 75
    change_rows(here)
    code, out, err = go(FULL, *SAVING, "run.overwrite=true")
    assert code == 0, err
    assert "resume    from" not in out
    assert [entry["step"] for entry in read_log("out") if "loss" in entry] == [1, 2, 3, 4, 5, 6]


def test_data_file_that_changes_while_it_is_read_is_refused(go, here, monkeypatch):
    real = stages.prepare

    def prepare(run):
        inputs = real(run)
        change_rows(here)
        return inputs

    monkeypatch.setattr(stages, "prepare", prepare)
    code, _, err = go(FULL)
    assert code == 2
    assert "rows.jsonl changed while the rows were read" in err
    assert not (here / "out" / "run.json").exists()


@pytest.mark.parametrize(
    ("name", "damage"), [("optimizer.pt", "cut"), ("scheduler.pt", "missing"), ("rng_state.pth", "cut")]
)
def test_damaged_newest_checkpoint_is_named_and_the_one_before_it_is_taken(name, damage, go, here, stop_after):
    assert go(FULL, *SAVING, "train.output_dir=whole")[0] == 0
    stop_after(5)
    assert go(FULL, *SAVING)[0] == 143
    stop_after(None)
    path = here / "out" / "checkpoint-5" / name
    if damage == "missing":
        path.unlink()
    else:
        os.truncate(path, 100)
    code, out, err = go(FULL, *SAVING)
    assert code == 0, err
    assert f"resume    checkpoint-5 is passed over: {name} " in out
    assert "checkpoint-4" in out
    assert are_equal("out", "whole")
    assert (here / "out" / "damaged-checkpoint-5").is_dir()
    assert checkpoints.find_damage(here / "out" / "checkpoint-6") == ""


@pytest.mark.parametrize(
    ("outcome", "line"),
    [
        ("running", "checkpoint-3 was not written to its end and is removed"),  # killed before the record followed
        (
            None,
            "checkpoint-3 is passed over: trl_sft.json is missing; it is now damaged-checkpoint-3",
        ),  # the run says that it saved it: the record was lost later
    ],
)
def test_checkpoint_without_its_record_is_passed_over_and_the_one_before_it_is_taken(
    go, here, stop_after, outcome, line
):
    assert go(FULL, *SAVING, "train.output_dir=whole")[0] == 0
    stop_after(3)
    assert go(FULL, *SAVING)[0] == 143
    stop_after(None)
    (here / "out" / "checkpoint-3" / checkpoints.RECORD).unlink()
    if outcome:
        record = json.loads((here / "out" / "run.json").read_text())
        (here / "out" / "run.json").write_text(json.dumps(record | {"outcome": outcome}))
    code, out, err = go(FULL, *SAVING)
    assert code == 0, err
    assert f"resume    {line}" in out
    assert f"resume    from {here / 'out' / 'checkpoint-2'}" in out
    assert not (here / "out" / "checkpoint-3").exists()
    assert are_equal("out", "whole")
    assert read_log("out") == read_log("whole")


def test_old_checkpoint_is_removed_only_after_the_record_of_the_new_one(go, here, monkeypatch):
    write = checkpoints.write_record
    before = []

    def write_record(checkpoint, entries):
        before.append(sorted(path.name for path in (here / "out").glob("checkpoint-*")))
        write(checkpoint, entries)
        os.utime(checkpoint, (0, 0))  # steps count, not times

    monkeypatch.setattr(checkpoints, "write_record", write_record)
    assert go(FULL, *SAVING, "train.save_total_limit=1")[0] == 0
    assert before == [["checkpoint-2"], ["checkpoint-2", "checkpoint-4"], ["checkpoint-4", "checkpoint-6"]]
    assert [path.name for path in (here / "out").glob("checkpoint-*")] == ["checkpoint-6"]


def fill_weights(live):
    next(live["model"].parameters()).data.fill_(float("nan"))


def fill_optimizer_state(live):
    optimizer = live["optimizer"]
    optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg_sq"].fill_(float("inf"))


@pytest.mark.parametrize(
    ("damage", "name"), [(fill_weights, "weights"), (fill_optimizer_state, "optimizer state")], ids=lambda value: value
)
def test_numbers_that_are_not_finite_are_not_saved_as_a_checkpoint(damage, name, go, here, monkeypatch):
    real = progress.Progress.on_step_end

    def break_numbers(self, args, state, control, **live):
        real(self, args, state, control, **live)
        if state.global_step == 4:
            damage(live)

    monkeypatch.setattr(progress.Progress, "on_step_end", break_numbers)
    code, _, err = go(FULL, *SAVING, "train.save_total_limit=1", "train.logging_steps=50")
    assert code == 3
    assert f"{name} not finite after step 4; the last checkpoint is" in err
    assert [path.name for path in run_folder.list_checkpoints(here / "out")] == ["checkpoint-2"]
    monkeypatch.setattr(progress.Progress, "on_step_end", real)
    assert go(FULL, *SAVING, "train.save_total_limit=1", "train.logging_steps=50")[0] == 0


def save_weights(path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    name = next(iter(tensors))
    tensors |= {name: torch.full_like(tensors[name], float("nan"))}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def save_optimizer_state(path):
    state = torch.load(path / "optimizer.pt")
    state["state"][0]["exp_avg"].fill_(float("inf"))
    torch.save(state, path / "optimizer.pt")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (save_weights, "the weights of {} hold numbers that are not finite"),
        (save_optimizer_state, "the optimizer state of {} holds numbers that are not finite"),
    ],
    ids=["weights", "optimizer state"],
)
def test_checkpoint_with_numbers_that_are_not_finite_is_refused(damage, problem, go, here):
    """Versions before those that write a record did not look at the numbers."""
    assert go(FULL, *SAVING, "run.max_hours=1e-9")[0] == 75
    path = here / "out" / "checkpoint-1"
    damage(path)
    remove_record(path)
    code, _, err = go(FULL, *SAVING)
    assert code == 2
    assert problem.format(path) in err


def remove_record(checkpoint):
    """Make a checkpoint one of a version that wrote no record."""
    (checkpoint / checkpoints.RECORD).unlink()
    path = checkpoint.parent / "run.json"
    run = json.loads(path.read_text())
    del run["rows_per_step"]
    path.write_text(json.dumps(run))


def test_checkpoint_of_another_program_is_refused_and_the_message_says_how_to_use_its_weights(go, here):
    assert go(FULL, *SAVING, "run.max_hours=1e-9", "train.output_dir=other")[0] == 75
    path = here / "other" / "checkpoint-1"
    (path / checkpoints.RECORD).unlink()
    (here / "other" / "run.json").unlink()
    code, _, err = go(FULL, *SAVING, f"run.resume={path}")
    assert code == 2
    assert f"{path} has no trl_sft.json, so its recipe and its tokens are not known" in err
    assert f"set `model.name_or_path` to {path}" in err


def test_other_versions_and_another_machine_are_told_and_the_same_ones_are_not(go, here, monkeypatch):
    assert go(FULL, *SAVING, "run.max_hours=1e-9")[0] == 75
    shutil.copytree("out", "kept")
    code, out, err = go(FULL, *SAVING)
    assert code == 0, err
    assert "the numbers may differ" not in out
    shutil.rmtree("out")
    shutil.copytree("kept", "out")
    real = manifest.describe_environment

    def describe(run):
        environment = real(run)
        environment["versions"]["torch"] = "9.0.0"
        environment["hardware"]["device"] = "cuda"
        return environment

    monkeypatch.setattr(manifest, "describe_environment", describe)
    code, out, err = go(FULL, *SAVING)
    assert code == 0, err
    versions = f"torch {torch.__version__} -> 9.0.0, device cpu -> cuda"
    assert f"{versions}: the numbers may differ from those of a run that was never stopped" in out


def test_rows_that_ignore_data_skip_repeats_are_counted(go, stop_after):
    stop_after(3)
    assert go(FULL, *SAVING, "train.ignore_data_skip=true")[0] == 143
    stop_after(None)
    code, out, err = go(FULL, *SAVING, "train.ignore_data_skip=true")
    assert code == 0, err
    assert "2 rows a step before the checkpoint, 2 now: 6 rows are trained again" in out


def test_positions_of_two_batch_sizes_are_those_of_the_trainer():
    from trl_sft.training.resume import _find_position

    assert _find_position(3, 4, None) == 12
    assert _find_position(3, 4, 10) == 10  # three steps of 4 rows are one epoch of 10
    assert _find_position(4, 4, 10) == 14


def test_record_names_the_device_that_computes(monkeypatch):
    """On a machine with a GPU that is the GPU, and with train.use_cpu the CPU."""
    monkeypatch.setattr(device, "get_device_type", lambda: "cuda")
    run = SimpleNamespace(quantization=None, train={})
    assert manifest.describe_environment(run)["hardware"]["device"] == "cuda"
    run.train["use_cpu"] = True
    assert manifest.describe_environment(run)["hardware"]["device"] == "cpu"
