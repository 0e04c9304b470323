"""The win rate at equal length: it finds a known effect behind a known bias, and says when it cannot."""

import numpy as np
import pytest

from trl_sft.evaluation.judging.length_control import FAR, FEW, ONE_SIDED, SEPARATED, control_length


def expit(value):
    return 1 / (1 + np.exp(-value))


def simulate(seed, *, effect, bias, n=200, mean_difference=40):
    """Return preferences of a judge that asks in both orders, and by how many characters tuned answers are longer."""
    rng = np.random.default_rng(seed)
    differences = rng.normal(mean_difference, 100, n).round()
    chance = expit(effect + bias * np.tanh(differences / differences.std()))
    return (rng.random((2, n)) < chance).mean(0), differences


@pytest.mark.parametrize(("effect", "bias"), [(-0.5, 1.5), (0.0, 2.0), (0.6, -1.0)])
def test_interval_covers_the_true_rate_at_equal_length_in_at_least_93_of_100_seeds(effect, bias):
    covered = raw_errors = 0
    for seed in range(100):
        preferences, differences = simulate(seed, effect=effect, bias=bias)
        rate = control_length(preferences, differences).rate
        covered += rate.low <= expit(effect) <= rate.high
        raw_errors += abs(preferences.mean() - expit(effect)) > 0.05
    assert covered >= 93
    assert raw_errors > 50  # the raw rate is off, so there is something to correct


def test_bias_that_moves_the_raw_rate_by_more_than_ten_points_is_warned_about():
    preferences, differences = simulate(1, effect=-0.5, bias=2.5, mean_difference=80)
    found = control_length(preferences, differences)
    assert preferences.mean() > 0.6
    assert found.rate.value < 0.5
    assert found.slope > 0
    assert found.warnings == (FAR,)


def test_answers_that_are_always_longer_are_an_extrapolation():
    preferences, differences = simulate(2, effect=0.3, bias=0.0)
    assert control_length(preferences, abs(differences) + 1).warnings == (ONE_SIDED,)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_side_that_always_wins_determines_no_rate(value):
    found = control_length(np.full(60, value), np.arange(-30.0, 30.0))
    assert (found.rate, found.warnings) == (None, (SEPARATED,))


def test_length_that_decides_every_pair_determines_no_rate():
    differences = np.arange(-30.0, 30.0) + 0.5
    assert control_length((differences > 0).astype(float), differences).rate is None


def test_answers_of_equal_length_need_no_control():
    preferences = np.array([1.0, 0.0, 1.0, 0.5] * 5)
    found = control_length(preferences, np.zeros(20))
    assert found.rate.value == pytest.approx(preferences.mean())
    assert found.warnings == (FEW,)


def test_pairs_that_are_all_tied_have_a_rate_of_one_half():
    found = control_length(np.full(60, 0.5), np.arange(60.0) - 30)
    assert tuple(found.rate) == (0.5, 0.5, 0.5)
