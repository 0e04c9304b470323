"""Keys of SFTConfig change what a run does, not only the arguments that it stores."""

import json

import pytest
import torch
from conftest import RECIPE
from safetensors.torch import load_file
from trl import SFTTrainer

from trl_sft import load_recipe, train
from trl_sft.errors import MissingPackage
from trl_sft.training import stages as stages_module

EVAL = ("data.eval_fraction=0.25",)


@pytest.fixture
def train_with(here, monkeypatch):
    """Train RECIPE with overrides; return the trainer, entries with a loss, entries with an eval loss, the result."""

    class RecordingTrainer(SFTTrainer):
        last = None

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            RecordingTrainer.last = self
            self.gradient_checkpointing_per_step = []
            self.initial_weights = [p.detach().clone() for p in self.model.parameters()]

        def training_step(self, model, *args, **kwargs):
            self.gradient_checkpointing_per_step.append(model.is_gradient_checkpointing)
            return super().training_step(model, *args, **kwargs)

    monkeypatch.setattr(stages_module, "SFTTrainer", RecordingTrainer)
    (here / "recipe.yaml").write_text(RECIPE)
    folder_numbers = iter(range(99))

    def call(*overrides):
        run = load_recipe("recipe.yaml", [f"train.output_dir=out{next(folder_numbers)}", *overrides])
        result = train(run)
        log = [json.loads(line) for line in (result.output_dir / "log.jsonl").read_text().splitlines()]
        return RecordingTrainer.last, [e for e in log if "loss" in e], [e for e in log if "eval_loss" in e], result

    return call


def get_weights(trainer):
    """Return the parameters of the trained model, without their graph."""
    return [p.detach() for p in trainer.model.parameters()]


def test_packing_applies_to_train_and_eval_unless_eval_packing_is_set(train_with):
    def are_packed(*overrides):
        trainer = train_with(*EVAL, *overrides)[0]
        return "seq_lengths" in trainer.train_dataset.features, "seq_lengths" in trainer.eval_dataset.features

    assert are_packed() == (False, False)
    assert are_packed("train.packing=true") == (True, True)
    assert are_packed("train.packing=true", "train.eval_packing=true") == (True, True)
    assert are_packed("train.packing=true", "train.eval_packing=false") == (True, False)
    assert are_packed("train.eval_packing=true") == (False, True)


def test_max_steps_and_num_train_epochs_set_the_number_of_steps(train_with):
    assert train_with("train.max_steps=3")[3].steps == 3
    assert train_with("train.max_steps=null", "train.num_train_epochs=1")[3].steps == 20  # 40 rows, 2 a step
    assert train_with("train.max_steps=-1", "train.num_train_epochs=0.5")[3].steps == 10


def test_warmup_ratio_equals_warmup_steps_below_one(train_with):
    def get_learning_rates(*overrides):
        return [e["learning_rate"] for e in train_with("train.max_steps=4", "train.learning_rate=1e-3", *overrides)[1]]

    without_warmup = get_learning_rates()
    assert without_warmup[0] == pytest.approx(1e-3)
    with_warmup = get_learning_rates("train.warmup_ratio=0.5")
    assert with_warmup == get_learning_rates("train.warmup_steps=2") == get_learning_rates("train.warmup_steps=0.5")
    assert with_warmup[:3] == pytest.approx([0, 5e-4, 1e-3])


def test_gradient_accumulation_gives_the_same_step_as_a_larger_batch(train_with):
    overrides = ["train.learning_rate=1e-2", "train.optim=sgd"]  # Adam would divide by gradients near zero
    large_batch = train_with("train.per_device_train_batch_size=4", *overrides)
    accumulated = train_with("train.gradient_accumulation_steps=2", *overrides)
    assert [e["loss"] for e in large_batch[1]] == pytest.approx([e["loss"] for e in accumulated[1]], rel=1e-5)
    assert [e["num_tokens"] for e in large_batch[1]] == [e["num_tokens"] for e in accumulated[1]]
    for first, second in zip(get_weights(large_batch[0]), get_weights(accumulated[0]), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    small_batch = train_with(*overrides)
    assert small_batch[1][0]["num_tokens"] < large_batch[1][0]["num_tokens"]


def test_weights_change_only_with_a_learning_rate_above_zero(train_with):
    unchanged = train_with("train.learning_rate=0")[0]
    assert all(torch.equal(a, b) for a, b in zip(unchanged.initial_weights, get_weights(unchanged), strict=True))
    changed = train_with("train.learning_rate=1e-2")[0]
    assert any(not torch.equal(a, b) for a, b in zip(changed.initial_weights, get_weights(changed), strict=True))


def test_lr_scheduler_type_determines_the_learning_rate(train_with):
    def get_last_entry(scheduler):
        overrides = ("train.max_steps=4", "train.learning_rate=1e-3", f"train.lr_scheduler_type={scheduler}")
        return train_with(*overrides)[1][-1]

    assert get_last_entry("constant")["learning_rate"] == pytest.approx(1e-3)
    assert get_last_entry("linear")["learning_rate"] == pytest.approx(2.5e-4)
    assert get_last_entry("cosine")["learning_rate"] == pytest.approx(1e-3 * 0.5 * (1 + 2**-0.5 * -1), rel=1e-3)


def test_logging_steps_and_eval_steps_determine_the_logged_steps(train_with):
    _, logs, evals, _ = train_with(
        *EVAL, "train.max_steps=4", "train.logging_steps=2", "train.eval_strategy=steps", "train.eval_steps=1"
    )
    assert [e["step"] for e in logs] == [2, 4]
    assert [e["step"] for e in evals] == [0, 1, 2, 3, 4]  # step 0: the base model, for the comparison
    _, _, evals, result = train_with(*EVAL, "train.eval_on_start=false")
    assert [e["step"] for e in evals] == [2]  # the evaluation after the last step
    _, _, evals, _ = train_with(*EVAL, "evaluate=false")
    assert [e["step"] for e in evals] == [2]
    assert result.metrics["eval_loss"] == evals[-1]["eval_loss"]


def test_save_steps_and_save_total_limit_determine_the_checkpoints(train_with):
    folder = train_with("train.max_steps=4", "train.save_strategy=steps", "train.save_steps=1")[3].output_dir
    assert {p.name for p in folder.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (1, 2, 3, 4)}
    overrides = ("train.max_steps=4", "train.save_strategy=steps", "train.save_steps=1", "train.save_total_limit=2")
    folder = train_with(*overrides)[3].output_dir
    assert {p.name for p in folder.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}


def test_load_best_model_at_end_saves_the_checkpoint_of_the_lowest_eval_loss(train_with):
    overrides = (
        *(*EVAL, "train.max_steps=4", "train.save_strategy=steps", "train.save_steps=1"),
        *("train.eval_strategy=steps", "train.eval_steps=1", "train.load_best_model_at_end=true"),
        *("train.learning_rate=0.5", "train.lr_scheduler_type=constant"),  # too large: the eval loss rises
    )
    _, _, evals, result = train_with(*overrides)
    losses = [e["eval_loss"] for e in evals if e["step"] > 0][:4]
    assert min(losses) < losses[3]
    assert result.metrics["eval_loss"] == pytest.approx(min(losses), rel=1e-5)
    saved = load_file(result.output_dir / "model.safetensors")
    best = load_file(result.output_dir / f"checkpoint-{losses.index(min(losses)) + 1}" / "model.safetensors")
    assert all(torch.equal(saved[name], best[name]) for name in best)


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_gradient_checkpointing_is_active_in_the_model_and_leaves_the_loss_unchanged(train_with, name):
    on, off = (train_with(f"train.{name}={value}") for value in ("true", "false"))
    assert on[0].gradient_checkpointing_per_step == [True, True]
    assert off[0].gradient_checkpointing_per_step == [False, False]
    assert [e["loss"] for e in on[1]] == pytest.approx([e["loss"] for e in off[1]], rel=1e-6)


def test_neftune_changes_the_train_loss_and_not_the_eval_loss(train_with):
    without_noise = train_with(*EVAL, "train.eval_on_start=true")
    with_noise = train_with(*EVAL, "train.eval_on_start=true", "train.neftune_noise_alpha=50")
    assert with_noise[2][0]["eval_loss"] == without_noise[2][0]["eval_loss"]
    assert with_noise[1][0]["loss"] != without_noise[1][0]["loss"]


def test_same_seed_gives_the_same_split_and_loss(train_with):
    def train_with_seed(seed):
        trainer, logs, _, _ = train_with(*EVAL, f"train.seed={seed}", "lora={r: 2, target_modules: all-linear}")
        return [e["loss"] for e in logs], trainer.eval_dataset["input_ids"][:]

    assert train_with_seed(1) == train_with_seed(1)
    assert train_with_seed(1)[0] != train_with_seed(2)[0]
    assert train_with_seed(1)[1] != train_with_seed(2)[1]


def test_max_length_truncates_rows_and_the_summary_reports_it(train_with, capsys):
    trainer = train_with("train.max_length=35", "run.allow=[truncated_answers]")[0]
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    assert max(lengths) == 35
    out = capsys.readouterr().out
    assert "rows at max_length 35: " in out
    untruncated = train_with("train.max_length=null")[0]
    assert max(len(ids) for ids in untruncated.train_dataset["input_ids"]) > 35


def test_report_to_sends_the_log_to_the_tracker(train_with, monkeypatch):
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    from trl_sft.model import needed_packages

    tracked_logs = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            tracked_logs.append(logs)

    monkeypatch.setitem(needed_packages._TRACKERS, "tensorboard", ("json", "tensorboard"))  # json is installed
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    train_with()
    assert tracked_logs == []
    train_with("train.report_to=tensorboard")
    assert any("loss" in logs for logs in tracked_logs)


def test_report_to_a_tracker_that_is_not_installed_is_refused(train_with):
    with pytest.raises(MissingPackage, match=r"train\.report_to"):
        train_with("train.report_to=comet_ml")
