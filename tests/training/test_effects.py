"""Keys of SFTConfig by their effect on a run, not by what was stored."""

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
def carry_out(here, monkeypatch):
    """Run RECIPE with overrides; give back the trainer as it stood, and what it logged."""

    class Seen(SFTTrainer):
        last = None

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            Seen.last = self
            self.checkpointed = []
            self.before = [p.detach().clone() for p in self.model.parameters()]

        def training_step(self, model, *args, **kwargs):
            self.checkpointed.append(model.is_gradient_checkpointing)
            return super().training_step(model, *args, **kwargs)

    monkeypatch.setattr(stages_module, "SFTTrainer", Seen)
    (here / "recipe.yaml").write_text(RECIPE)
    number = iter(range(99))

    def call(*words):
        run = load_recipe("recipe.yaml", [f"train.output_dir=out{next(number)}", *words])
        result = train(run)
        log = [json.loads(line) for line in (result.output_dir / "log.jsonl").read_text().splitlines()]
        return Seen.last, [e for e in log if "loss" in e], [e for e in log if "eval_loss" in e], result

    return call


def weights(trainer):
    return [p.detach() for p in trainer.model.parameters()]


def test_packing_packs_train_and_eval_unless_eval_packing_says_otherwise(carry_out):
    def packed(*words):
        trainer = carry_out(*EVAL, *words)[0]
        return "seq_lengths" in trainer.train_dataset.features, "seq_lengths" in trainer.eval_dataset.features

    assert packed() == (False, False)
    assert packed("train.packing=true") == (True, True)
    assert packed("train.packing=true", "train.eval_packing=true") == (True, True)
    assert packed("train.packing=true", "train.eval_packing=false") == (True, False)
    assert packed("train.eval_packing=true") == (False, True)


def test_max_steps_and_num_train_epochs_set_the_number_of_steps(carry_out):
    assert carry_out("train.max_steps=3")[3].steps == 3
    assert carry_out("train.max_steps=null", "train.num_train_epochs=1")[3].steps == 20  # 40 rows, 2 a step
    assert carry_out("train.max_steps=-1", "train.num_train_epochs=0.5")[3].steps == 10


def test_warmup_ratio_is_warmup_steps_below_one(carry_out):
    def rates(*words):
        return [e["learning_rate"] for e in carry_out("train.max_steps=4", "train.learning_rate=1e-3", *words)[1]]

    plain = rates()
    assert plain[0] == pytest.approx(1e-3)
    warm = rates("train.warmup_ratio=0.5")
    assert warm == rates("train.warmup_steps=2") == rates("train.warmup_steps=0.5")
    assert warm[:3] == pytest.approx([0, 5e-4, 1e-3])


def test_accumulation_and_batch_size_give_the_same_step(carry_out):
    words = ["train.learning_rate=1e-2", "train.optim=sgd"]  # Adam would divide by gradients that are next to nothing
    once = carry_out("train.per_device_train_batch_size=4", *words)
    twice = carry_out("train.gradient_accumulation_steps=2", *words)
    assert [e["loss"] for e in once[1]] == pytest.approx([e["loss"] for e in twice[1]], rel=1e-5)
    assert [e["num_tokens"] for e in once[1]] == [e["num_tokens"] for e in twice[1]]
    for a, b in zip(weights(once[0]), weights(twice[0]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    half = carry_out(*words)
    assert half[1][0]["num_tokens"] < once[1][0]["num_tokens"]


def test_learning_rate_moves_the_weights(carry_out):
    still = carry_out("train.learning_rate=0")[0]
    assert all(torch.equal(a, b) for a, b in zip(still.before, weights(still), strict=True))
    moved = carry_out("train.learning_rate=1e-2")[0]
    assert any(not torch.equal(a, b) for a, b in zip(moved.before, weights(moved), strict=True))


def test_lr_scheduler_type_shapes_the_rate(carry_out):
    def last(kind):
        return carry_out("train.max_steps=4", "train.learning_rate=1e-3", f"train.lr_scheduler_type={kind}")[1][-1]

    assert last("constant")["learning_rate"] == pytest.approx(1e-3)
    assert last("linear")["learning_rate"] == pytest.approx(2.5e-4)
    assert last("cosine")["learning_rate"] == pytest.approx(1e-3 * 0.5 * (1 + 2**-0.5 * -1), rel=1e-3)


def test_logging_steps_and_eval_steps_set_when_things_are_logged(carry_out):
    _, logs, evals, _ = carry_out(
        *EVAL, "train.max_steps=4", "train.logging_steps=2", "train.eval_strategy=steps", "train.eval_steps=1"
    )
    assert [e["step"] for e in logs] == [2, 4]
    assert [e["step"] for e in evals] == [0, 1, 2, 3, 4]  # ours at the start, for the before and after
    _, _, evals, result = carry_out(*EVAL, "train.eval_on_start=false")
    assert [e["step"] for e in evals] == [2]  # ours at the end
    _, _, evals, _ = carry_out(*EVAL, "evaluate=false")
    assert [e["step"] for e in evals] == [2]
    assert result.metrics["eval_loss"] == evals[-1]["eval_loss"]


def test_save_steps_and_save_total_limit_set_what_is_kept(carry_out):
    folder = carry_out("train.max_steps=4", "train.save_strategy=steps", "train.save_steps=1")[3].output_dir
    assert {p.name for p in folder.glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (1, 2, 3, 4)}
    words = ("train.max_steps=4", "train.save_strategy=steps", "train.save_steps=1", "train.save_total_limit=2")
    folder = carry_out(*words)[3].output_dir
    assert {p.name for p in folder.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}


def test_load_best_model_at_end_saves_the_best(carry_out):
    words = (
        *(*EVAL, "train.max_steps=4", "train.save_strategy=steps", "train.save_steps=1"),
        *("train.eval_strategy=steps", "train.eval_steps=1", "train.load_best_model_at_end=true"),
        *("train.learning_rate=0.5", "train.lr_scheduler_type=constant"),  # too large: it gets worse
    )
    _, _, evals, result = carry_out(*words)
    losses = [e["eval_loss"] for e in evals if e["step"] > 0][:4]
    assert min(losses) < losses[3]
    assert result.metrics["eval_loss"] == pytest.approx(min(losses), rel=1e-5)
    saved = load_file(result.output_dir / "model.safetensors")
    best = load_file(result.output_dir / f"checkpoint-{losses.index(min(losses)) + 1}" / "model.safetensors")
    assert all(torch.equal(saved[name], best[name]) for name in best)


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_gradient_checkpointing_is_on_in_the_model_and_changes_no_loss(carry_out, name):
    on, off = (carry_out(f"train.{name}={value}") for value in ("true", "false"))
    assert on[0].checkpointed == [True, True]
    assert off[0].checkpointed == [False, False]
    assert [e["loss"] for e in on[1]] == pytest.approx([e["loss"] for e in off[1]], rel=1e-6)


def test_neftune_changes_training_and_not_evaluation(carry_out):
    plain = carry_out(*EVAL, "train.eval_on_start=true")
    noisy = carry_out(*EVAL, "train.eval_on_start=true", "train.neftune_noise_alpha=50")
    assert noisy[2][0]["eval_loss"] == plain[2][0]["eval_loss"]
    assert noisy[1][0]["loss"] != plain[1][0]["loss"]


def test_seed_repeats_split_order_and_loss(carry_out):
    def run(seed):
        trainer, logs, _, _ = carry_out(*EVAL, f"train.seed={seed}", "lora={r: 2, target_modules: all-linear}")
        return [e["loss"] for e in logs], trainer.eval_dataset["input_ids"][:]

    assert run(1) == run(1)
    assert run(1)[0] != run(2)[0]
    assert run(1)[1] != run(2)[1]


def test_max_length_cuts_and_the_table_says_so(carry_out, capsys):
    trainer = carry_out("train.max_length=35")[0]
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    assert max(lengths) == 35
    out = capsys.readouterr().out
    assert "rows at max_length 35: " in out
    whole = carry_out("train.max_length=null")[0]
    assert max(len(ids) for ids in whole.train_dataset["input_ids"]) > 35


def test_report_to_reaches_the_tracker(carry_out, monkeypatch):
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(logs)

    monkeypatch.setattr("trl_sft.model.device.get_available_reporting_integrations", lambda: ["tensorboard"])
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    carry_out()
    assert seen == []
    carry_out("train.report_to=tensorboard")
    assert any("loss" in logs for logs in seen)


def test_report_to_a_tracker_that_is_not_installed_is_told(carry_out):
    with pytest.raises(MissingPackage, match=r"train\.report_to"):
        carry_out("train.report_to=comet_ml")
