"""The rank tests equal enumeration and published values."""

import itertools
import math
import random

import numpy as np
import pytest

from trl_sft.training.diagnosis.statistics import compare_ranks, compare_shares, estimate_deviation, find_trend


def test_mann_whitney_of_separate_samples_is_one_of_all_choices():
    assert compare_ranks([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) == pytest.approx(1 / math.comb(10, 5))
    assert compare_ranks([6, 7, 8, 9, 10], [1, 2, 3, 4, 5]) == 1


def test_mann_whitney_equals_enumeration_with_ties():
    low, high = [1, 2, 2, 5], [2, 3, 5, 6]
    values = low + high

    def below(indices):
        chosen = [values[i] for i in indices]
        others = [values[i] for i in range(len(values)) if i not in indices]
        return sum((a > b) + 0.5 * (a == b) for a in chosen for b in others)

    observed = below(range(4))
    choices = list(itertools.combinations(range(8), 4))
    assert compare_ranks(low, high) == pytest.approx(sum(below(c) <= observed for c in choices) / len(choices))


def test_normal_approximation_of_mann_whitney_agrees_with_a_simulation():
    draw = np.random.default_rng(0)
    low, high = draw.normal(0, 1, 30), draw.normal(0.4, 1, 30)
    observed = sum(a > b for a in low for b in high)
    pooled = np.concatenate([low, high])
    hits = 0
    for _ in range(2000):
        draw.shuffle(pooled)
        hits += (pooled[:30, None] > pooled[None, 30:]).sum() <= observed
    assert compare_ranks(low, high) == pytest.approx(hits / 2000, abs=0.02)
    assert compare_ranks([1.0] * 40, [1.0] * 40) == 1


@pytest.mark.parametrize("n", [5, 6])
def test_mann_kendall_equals_enumeration_of_all_orders(n):
    values = random.Random(n).sample(range(100), n)

    def trend(order):
        return sum((b > a) - (b < a) for a, b in itertools.combinations(order, 2))

    s, p = find_trend(values)
    assert s == trend(values)
    orders = [trend(order) for order in itertools.permutations(values)]
    assert p == pytest.approx(sum(other >= abs(s) for other in orders) / len(orders))


def test_mann_kendall_of_five_falling_values_is_one_of_all_orders():
    assert find_trend([5, 4, 3, 2, 1]) == (-10, pytest.approx(1 / 120))
    s, p = find_trend([1.0] * 20)
    assert (s, p) == (0, 0.5)
    assert find_trend(np.arange(30))[1] < 1e-6


def test_fisher_is_that_of_the_lady_tasting_tea():
    """R. A. Fisher, The Design of Experiments (1935): 3 of 4 cups right has p = 17/70."""
    assert compare_shares(3, 4, other_hits=1, other_size=4) == pytest.approx(17 / 70)
    assert compare_shares(4, 4, other_hits=0, other_size=4) == pytest.approx(1 / 70)
    assert compare_shares(0, 4, other_hits=4, other_size=4) == 1


def test_deviation_ignores_outliers():
    values = np.random.default_rng(1).normal(3, 2, 4001)
    values[:100] = 1e9
    assert estimate_deviation(values) == pytest.approx(2, rel=0.1)
