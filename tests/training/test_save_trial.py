"""Saving is tried before step 1: what cannot be saved, or not be read back, stops the run there."""

import shutil

import pytest
import torch
from conftest import QUESTIONS, jsonl
from safetensors.torch import save_file

from trl_sft import disk, load_recipe, ranks
from trl_sft.errors import LaunchError
from trl_sft.recipe import paths
from trl_sft.training import live, save_trial, shared_folder, stages
from trl_sft.training.shared_folder import Sight

RECIPE = f"""\
model: {{name_or_path: {paths.EMBEDDED / "tiny"}}}
data: {{train: rows.jsonl}}
train: {{output_dir: out, use_cpu: true}}
"""


@pytest.fixture(scope="module", params=["null", "{r: 4, target_modules: all-linear, modules_to_save: [norm]}"])
def trial(request, tmp_path_factory):
    """Return a recipe and its trainer, whose optimizer exists: of a whole model, then of an adapter."""
    folder = tmp_path_factory.mktemp("trial")
    (folder / "recipe.yaml").write_text(RECIPE)
    jsonl(folder / "rows.jsonl", QUESTIONS)
    run = load_recipe(folder / "recipe.yaml", [f"train.output_dir={folder / 'out'}", f"lora={request.param}"])
    trainer = stages.build_trainer(run, stages.prepare(run))
    trainer.create_optimizer_and_scheduler(4)
    run.output_dir.mkdir(exist_ok=True)
    return run, trainer


def refuse(check, run, *arguments):
    with pytest.raises(LaunchError) as refusal:
        check(run, *arguments)
    assert not list(run.output_dir.iterdir())  # nothing is left
    return refusal.value.faults[0]


def test_trial_reads_back_what_it_saved_and_leaves_the_run_as_it_was(trial):
    run, trainer = trial
    before, random_state = save_trial.digest_weights(trainer), torch.get_rng_state()
    done = save_trial.try_save(run, trainer)
    assert (done.is_whole, done.has_optimizer) == (True, True)
    assert done.compared == done.sizes.model  # every weight, and none beside the adapter's own
    assert done.written > done.compared
    assert done.sizes.checkpoint == 3 * done.sizes.model  # with Adam's two numbers for each
    assert save_trial.digest_weights(trainer) == before
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not list(run.output_dir.iterdir())
    assert "read back and equal" in done.describe()


def test_part_of_the_weights_is_tried_where_a_checkpoint_is_large(trial, monkeypatch):
    monkeypatch.setattr(save_trial, "WHOLE_BYTES", 0)
    monkeypatch.setattr(save_trial, "PART_BYTES", 20_000)
    done = save_trial.try_save(*trial)
    assert not done.is_whole
    assert 0 < done.compared <= 20_000 < done.sizes.model
    assert "a part of the weights, no optimizer state" in done.describe()


def change_weights(trainer, save):
    def save_others(folder, **keywords):
        parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
        parameter.data += 1
        save(folder, **keywords)
        parameter.data -= 1

    return save_others


def empty_weights(trainer, save):
    def save_empty(folder, **keywords):
        save_file({name: torch.empty(0) for name in save_trial.digest_weights(trainer)}, f"{folder}/model.safetensors")

    return save_empty


def halve_weights(trainer, save):
    def save_half(folder, **keywords):
        names = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
        part = {name: trainer.model.get_parameter(name).detach().clone() for name in names[::2]}
        plain = {name.replace(".default", "").replace(".modules_to_save", ""): tensor for name, tensor in part.items()}
        save_file(plain, f"{folder}/model.safetensors")

    return save_half


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (change_weights, "saves other weights than it trains"),
        (empty_weights, "saves other weights than it trains"),  # as ZeRO-3 without gathering does
        (halve_weights, " weights"),
    ],
)
def test_engine_that_saves_other_weights_is_refused(trial, monkeypatch, fault, words):
    run, trainer = trial
    monkeypatch.setattr(trainer, "save_model", fault(trainer, trainer.save_model))
    refusal = refuse(save_trial.try_save, run, trainer)
    assert refusal.code == "run.unsavable"
    assert words in refusal.problem


@pytest.mark.parametrize(("engine", "key"), [("ZeRO-3", "stage3_gather_16bit"), ("FSDP", "state_dict_type")])
def test_engine_that_saves_no_weights_is_refused_with_its_key(trial, monkeypatch, engine, key):
    run, trainer = trial
    monkeypatch.setattr(live, "live_engine", lambda trainer: engine)
    monkeypatch.setattr(trainer, "save_model", lambda folder, **_: None)
    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", lambda folder: None)
    refusal = refuse(save_trial.try_save, run, trainer)
    assert refusal.code == "run.unsavable"
    assert "saves no weights that transformers can load" in refusal.problem
    assert key in refusal.fix


def test_disk_without_space_for_a_checkpoint_and_the_model_is_refused(trial, monkeypatch):
    run, trainer = trial
    sizes = save_trial.estimate_sizes(trainer)
    free = sizes.model + sizes.checkpoint - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(free, 0, free))
    refusal = refuse(save_trial.try_save, run, trainer)
    assert refusal.code == "machine.too_little_disk"
    assert refusal.where.endswith("train.output_dir")


def test_process_that_does_not_see_the_run_folder_is_named(trial, monkeypatch):
    run, _ = trial
    others = [Sight("process 8 on node-b", "/scratch/out", False), Sight("process 9 on node-b", "/scratch/out", True)]
    monkeypatch.setattr(ranks, "collect", lambda value: [value, *others])
    refusal = refuse(shared_folder.check, run)
    assert refusal.code == "launch.folder_not_shared"
    assert f"is {run.output_dir}, and process 8 on node-b cannot see it" in refusal.problem
    assert "a disk that all hosts share" in refusal.fix


def test_process_sees_what_the_first_one_wrote_and_not_a_folder_of_the_same_name(trial, monkeypatch):
    run, _ = trial
    monkeypatch.setattr(shared_folder, "_PATIENCE", 0.0)
    shared_folder.check(run)
    write = shared_folder._write_token
    monkeypatch.setattr(shared_folder, "_write_token", lambda folder: write(folder) and "of another host")
    assert refuse(shared_folder.check, run).code == "launch.folder_not_shared"


def test_folder_that_refuses_another_process_is_told_by_every_process(trial, monkeypatch):
    run, _ = trial
    fault = disk.explain(PermissionError(13, "Permission denied", str(run.output_dir)), [run.output_dir])
    monkeypatch.setattr(ranks, "collect", lambda value: [value, fault] if value is None else [value])
    assert refuse(shared_folder.check, run) == fault
