"""Settings that old versions of TRL and bitsandbytes take and cannot train are refused before the weights load."""

import importlib.metadata
import types

import pytest
import trl
from conftest import RECIPE
from packaging.version import Version

from trl_sft import load_recipe
from trl_sft.errors import Edit, MissingPackage, RecipeError
from trl_sft.training import version_limits


def make_args(loss_type="nll", smoothing=0.0, optimizer="adamw_torch_fused", device="cpu"):
    return types.SimpleNamespace(
        loss_type=loss_type,
        label_smoothing_factor=smoothing,
        optim=optimizer,
        device=types.SimpleNamespace(type=device),
    )


@pytest.fixture
def load(here):
    """Return a function that loads the recipe with overrides."""
    (here / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    return lambda *overrides: load_recipe("recipe.yaml", overrides)


def test_label_smoothing_with_the_loss_in_chunks_is_refused_with_the_loss_to_set(load):
    run = load("train.label_smoothing_factor=0.1")
    with pytest.raises(RecipeError) as error:
        version_limits.check(run, make_args("chunked_nll", 0.1))
    (fault,) = error.value.faults
    assert "train.label_smoothing_factor" in fault.where
    assert f"TRL {trl.__version__} cannot smooth labels with loss_type chunked_nll" in fault.problem
    assert fault.edits == (Edit("set", ("train", "loss_type"), "nll"),)
    version_limits.check(run, make_args("nll", 0.1))
    version_limits.check(run, make_args("chunked_nll", 0.0))


@pytest.mark.skipif(Version(trl.__version__) >= Version("1.15"), reason="TRL 1.15 has no loss in chunks of its own")
def test_run_with_label_smoothing_ends_with_2_before_the_weights_load(go):
    code, _, err = go(RECIPE, "train.label_smoothing_factor=0.1")
    assert code == 2
    assert "Set train.loss_type: nll" in err


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_32bit", "lion_32bit", "ademamix_8bit", "rmsprop_bnb"])
def test_optimizer_of_bitsandbytes_on_a_cpu_is_refused_below_version_0_50(optimizer, load, monkeypatch):
    run = load(f"train.optim={optimizer}")
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.49.2")
    with pytest.raises(MissingPackage, match=r"bitsandbytes 0\.49\.2 has no optimizers for a CPU"):
        version_limits.check(run, make_args(optimizer=optimizer))
    version_limits.check(run, make_args(optimizer=optimizer, device="cuda"))
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.50.0")
    version_limits.check(run, make_args(optimizer=optimizer))


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_8bit", "adafactor", "sgd"])
def test_other_optimizers_are_trained_with_every_version(optimizer, load, monkeypatch):
    run = load(f"train.optim={optimizer}")
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.49.2")
    version_limits.check(run, make_args(optimizer=optimizer))
