"""Statistics of two models on the same prompts, against scipy, statsmodels and known cases."""

import numpy as np
import pytest
from scipy import stats

from trl_sft.evaluation import statistics


def compare(base, tuned, **options):
    return statistics.compare_scores(np.array(base, dtype=float), np.array(tuned, dtype=float), **options)


def test_model_that_is_better_by_construction_is_improved():
    result = compare([0] * 60 + [1] * 40, [1] * 50 + [0] * 10 + [1] * 40)
    assert (result.better, result.tied, result.worse) == (50, 50, 0)
    assert result.resolution == statistics.BETTER
    assert result.difference.value == pytest.approx(0.5)
    assert result.difference.low > 0.35
    assert result.p_value == pytest.approx(2 * 0.5**50)


def test_sides_changed_over_give_the_mirrored_result():
    rng = np.random.default_rng(1)
    base, tuned = rng.integers(0, 2, 80), rng.integers(0, 2, 80)
    one, other = compare(base, tuned), compare(tuned, base)
    assert (one.better, one.worse) == (other.worse, other.better)
    assert one.p_value == pytest.approx(other.p_value)
    assert one.difference.value == pytest.approx(-other.difference.value)


def test_same_answers_are_no_difference():
    result = compare([0, 1] * 50, [0, 1] * 50)
    assert result.resolution == statistics.NO_DIFFERENCE
    assert (result.difference.low, result.difference.high, result.p_value) == (0, 0, 1)
    assert result.needed_prompts is None


@pytest.mark.parametrize("count", [1, 2, 20, 29])
def test_few_prompts_are_never_resolved(count):
    assert compare([0] * count, [1] * count).resolution == statistics.NOT_RESOLVED


def test_small_difference_is_not_resolved_and_says_how_many_prompts_it_needs():
    result = compare([0] * 11 + [1] * 9 + [0] * 80, [1] * 11 + [0] * 9 + [0] * 80)
    assert result.resolution == statistics.NOT_RESOLVED
    # a rate of .55 needs about 786 decisive pairs, and one prompt of five is decisive
    assert result.needed_prompts == pytest.approx(786 * 5, rel=0.02)


def test_equal_models_are_seldom_called_different():
    rng = np.random.default_rng(0)
    resolved = 0
    for _ in range(200):
        base, tuned = rng.random(60) < 0.5, rng.random(60) < 0.5
        better, worse = int((tuned & ~base).sum()), int((base & ~tuned).sum())
        resolved += statistics.compute_sign_test(better, worse) < statistics.ALPHA
    assert resolved / 200 < 0.06


def test_interval_is_bca_of_scipy():
    values = np.array([0, 0, 1, 1, 1, 0, -1, 1, 0, 0.5] * 5)
    interval = statistics.bootstrap_mean(values)
    reference = stats.bootstrap((values,), np.mean, method="BCa", rng=np.random.default_rng(0)).confidence_interval
    assert interval.low == pytest.approx(reference.low, abs=1e-12)
    assert interval.high == pytest.approx(reference.high, abs=1e-12)


def test_rows_of_one_prompt_are_one_observation():
    averaged = statistics.average_by_prompt([1, 0, 1, 1], ["a", "a", "b", "b"])
    assert averaged.tolist() == [0.5, 1]


def test_tie_margin_makes_small_differences_ties():
    result = compare([0.5] * 40, [0.505] * 40, tie_margin=0.01)
    assert (result.better, result.tied) == (0, 40)


def test_mcnemar_is_the_sign_test_on_changed_prompts():
    table, p_value = statistics.compute_mcnemar([True, True, False, False, False], [True, False, True, True, True])
    assert table == [[1, 1], [3, 0]]
    assert p_value == pytest.approx(statistics.compute_sign_test(3, 1))
    assert statistics.compute_mcnemar([True], [True])[1] == 1


def test_holm_corrects_in_the_order_of_the_tasks():
    assert statistics.correct_p_values([0.04, 0.01]) == pytest.approx([0.04, 0.02])
    assert statistics.correct_p_values([]) == []


def test_rate_has_its_wilson_interval():
    rate = statistics.compute_rate(8, 10)
    assert (rate.value, rate.low, rate.high) == pytest.approx((0.8, 0.4901625, 0.9433178), abs=1e-6)


def test_needed_prompts_are_those_of_a_sign_test_with_80_percent_power():
    assert statistics.compute_needed_prompts(60, 40, 100) == pytest.approx(199, rel=0.05)
    assert statistics.compute_needed_prompts(70, 30, 100) == pytest.approx(49, rel=0.05)
