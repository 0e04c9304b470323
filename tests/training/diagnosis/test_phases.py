"""The phases of a train loss, and what the first fifty steps allow to say."""

import numpy as np
import pytest
from curves import make_facts, make_log

from trl_sft.training.diagnosis import phases
from trl_sft.training.diagnosis.findings import Curves

DRAW = np.random.default_rng(11)


def recognise(losses):
    return phases.recognise_phases(Curves(make_log(losses), make_facts()))


def test_three_phases_of_a_healthy_curve_are_recognised_in_order():
    losses = 4 * np.exp(-np.arange(100) / 8) + 1 + DRAW.normal(0, 0.03, 100)
    result = recognise(losses)
    assert [phase.name for phase in result] == ["steep fall", "levelling off", "convergence"]
    assert [phase.first_step for phase in result[1:]] == [phase.last_step for phase in result[:-1]]
    assert result[0].last_step == pytest.approx(-8 * np.log(0.3), abs=4)  # where 70% of the fall is over
    assert result[-1].last_step == 100
    line = phases.describe_phases(result, 5.0)
    assert line.startswith("Train loss: 5, steep fall to step ")
    assert "still fell" not in line


def test_curve_that_still_falls_has_no_convergence():
    line = phases.describe_phases(recognise(np.linspace(5, 1, 60) + DRAW.normal(0, 0.03, 60)), 5.0)
    assert line.endswith("it still fell at the end")


@pytest.mark.parametrize("losses", [2 + DRAW.normal(0, 0.1, 60), np.linspace(1, 3, 60), [3.0, 2.0, 1.0], []])
def test_curve_without_a_fall_beyond_noise_has_no_phases(losses):
    assert recognise(losses) == []
    assert phases.describe_phases([], 1.0) == ""


def describe(losses, **keywords):
    return phases.describe_first_steps(Curves(make_log(losses, **keywords), make_facts()))


def test_first_verdict_uses_the_words_that_the_data_allow():
    assert describe([3, 2.8, 2.5, 2.4, 2.2], every=10).startswith("So far: better beyond noise (train loss 3 -> 2.2")
    assert describe([3, 3.1, 2.9, 3.05, 2.95], every=10).startswith("So far: not better yet beyond noise")
    assert describe([2, 2.2, 2.5, 2.6, 3], every=10).startswith("So far: worse (train loss 2 -> 3")
    assert describe([3.0], every=50) == "So far: cannot be told from 1 train loss (set train.logging_steps: 5)"
    assert describe([3, 2], every=25, evals=[(0, 4.0), (50, 2.0)]) == (
        "So far: better beyond noise (eval loss 4 -> 2 at step 50)"
    )
    assert "not better yet (" in describe([3, 2], every=25, evals=[(0, 4.0), (50, 3.95)])
    assert "worse (" in describe([3, 2], every=25, evals=[(0, 4.0), (50, 5.0)])


def test_first_verdict_is_wrong_on_at_most_one_flat_curve_in_fifty():
    """Two directions at p < 0.01 each."""
    words = [describe(2 + DRAW.normal(0, 0.3, 25), every=2) for _ in range(400)]
    assert sum("not better yet" not in word for word in words) <= 400 / 50 + 6
