"""Verdicts on groups of rows: by construction, against scipy, and how often chance alone accuses one."""

import numpy as np
import pytest
from scipy import stats

from trl_sft.evaluation import paired_reruns
from trl_sft.evaluation.paired_reruns import HELPS, HURTS, NO_EFFECT, UNDECIDED, GroupLosses


def make(pairs=5, judges=40, *, without=0.0, others=0.0, noise=0.01, seed=0):
    """Return losses of about 1 with all rows, with differences of the two other reruns from them."""
    rng = np.random.default_rng(seed)
    rows = 1 + 0.2 * rng.standard_normal(judges)

    def draw(shift):
        return rows + shift + noise * rng.standard_normal((pairs, 1)) + noise * rng.standard_normal((pairs, judges))

    return GroupLosses(draw(0.0), draw(without), draw(others))


def judge(losses, prompts=None):
    prompts = range(losses.complete.shape[1]) if prompts is None else prompts
    return paired_reruns.judge({"group": losses}, list(prompts))["group"]


@pytest.mark.parametrize(
    ("without", "others", "verdict"),
    [
        (-0.1, 0.0, HURTS),
        (0.1, 0.0, HELPS),
        (0.0, 0.0, NO_EFFECT),
        (-0.1, -0.1, NO_EFFECT),  # fewer rows are better, whichever they are
        (0.0, 0.1, NO_EFFECT),  # random rows are more useful, and these do no harm
    ],
)
def test_group_gets_the_verdict_of_its_construction(without, others, verdict):
    assert judge(make(without=without, others=others, noise=0.001)).verdict == verdict


def test_noise_of_seeds_leaves_a_harm_undecided_and_says_how_many_pairs_decide_it():
    deviations = np.array([-1.0, 0.0, 1.0])[:, None] * np.ones((1, 20))
    complete = np.ones((3, 20))
    verdict = judge(GroupLosses(complete, complete - 0.04 + 0.06 * deviations, complete))
    assert (verdict.verdict, verdict.needs_rows) == (UNDECIDED, False)
    quantiles = stats.norm.ppf(0.975) + stats.norm.ppf(0.8)  # the usual formula of a paired comparison
    assert verdict.needed_pairs == int(np.ceil((0.06 * quantiles / 0.04) ** 2))


def test_few_held_out_rows_that_differ_need_more_of_them_and_not_more_pairs():
    losses = make(judges=15, noise=0.001)
    effect = np.random.default_rng(3).normal(-0.05, 0.2, 15)
    verdict = judge(losses._replace(without_suspects=losses.complete + effect))
    assert (verdict.verdict, verdict.needed_pairs, verdict.needs_rows) == (UNDECIDED, None, True)


def test_interval_of_one_source_of_chance_is_that_of_students_t():
    per_pair = np.array([0.1, 0.3, 0.2, 0.4])[:, None] * np.ones((1, 20))
    found = paired_reruns.compare(per_pair, np.zeros((4, 20)), range(20))
    expected = stats.ttest_1samp(per_pair[:, 0], 0)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert tuple(found.interval)[1:] == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_rows_of_one_prompt_are_one_observation():
    losses = make(judges=20, without=-0.02, noise=0.005)
    twice = GroupLosses(*(np.repeat(part, 3, axis=1) for part in losses))
    assert judge(twice, np.repeat(np.arange(20), 3)) == judge(losses)


def test_chance_alone_seldom_accuses_a_group():
    rng = np.random.default_rng(5)
    accused = 0
    for _ in range(300):  # both parts of the chance: seeds and held-out rows
        rows, seeds = rng.standard_normal((3, 1, 30)), rng.standard_normal((3, 4, 1))
        accused += judge(GroupLosses(*(1 + 0.05 * rows + 0.05 * seeds))).verdict == HURTS
    assert accused / 300 <= 0.05


def test_holm_corrects_over_groups():
    groups = {str(number): make(without=-0.03, noise=0.02, seed=number) for number in range(6)}
    alone = {name: judge(losses).p_value for name, losses in groups.items()}
    together = paired_reruns.judge(groups, range(40))
    smallest = min(alone, key=alone.get)
    assert together[smallest].p_value == pytest.approx(min(1, 6 * alone[smallest]))
