"""Losses are those of training, agreements are products of gradients, thresholds come from held-out rows."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_sft.recipe import paths
from trl_sft.suspects import gradient_agreement, plan, short_run, signals, token_rows
from trl_sft.suspects.token_rows import TokenRow
from trl_sft.tokenization.encode import IGNORED

GIB = 0.01


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(paths.EMBEDDED / "tiny").eval()


def make_rows(number, seed=0):
    """Return rows of different lengths, the first half of each without loss."""
    rng = np.random.default_rng(seed)
    rows = []
    for place in range(number):
        ids = rng.integers(5, 200, int(rng.integers(6, 20))).astype(np.int32)
        rows.append(TokenRow(place, ids, np.where(np.arange(len(ids)) < len(ids) // 2, IGNORED, ids)))
    return rows


def compute_loss(model, row):
    """Return the loss of a row alone, as transformers computes it."""
    ids, labels = (torch.tensor([part.tolist()]) for part in (row.input_ids, row.labels))
    return model(input_ids=ids, labels=labels).loss


def test_losses_in_batches_are_those_of_transformers_of_each_row_alone(model):
    rows, counted = make_rows(70), []
    losses = token_rows.measure_losses(model, rows, logits_gib=GIB, count=counted.append)
    with torch.no_grad():
        expected = [float(compute_loss(model, row)) for row in rows]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert sum(counted) == 70


@pytest.mark.parametrize("is_adapter", [False, True])
def test_agreements_are_products_of_gradients(is_adapter, model):
    from peft import LoraConfig, get_peft_model

    tuned = model
    if is_adapter:
        own = AutoModelForCausalLM.from_pretrained(paths.EMBEDDED / "tiny")
        tuned = get_peft_model(own, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    rows, held_out = make_rows(12), make_rows(9, seed=1)
    before = {name: weight.clone() for name, weight in tuned.state_dict().items()}
    flags = [parameter.requires_grad for parameter in tuned.parameters()]
    found, own = gradient_agreement.measure_agreement(tuned, rows, held_out, logits_gib=GIB, count=lambda _: None)
    assert all(torch.equal(weight, before[name]) for name, weight in tuned.state_dict().items())
    assert [parameter.requires_grad for parameter in tuned.parameters()] == flags
    weights = gradient_agreement.find_trained_weights(tuned)
    assert len(weights) == len([name for name, _ in tuned.named_parameters() if "lora_" in name or not is_adapter])

    def read_gradient(row):
        for weight in weights:
            weight.requires_grad_()
        parts = torch.autograd.grad(compute_loss(tuned, row), weights, allow_unused=True)
        return torch.cat([part.flatten() for part in parts if part is not None])

    gradients = torch.stack([read_gradient(row) for row in held_out])
    expected = np.array([float(read_gradient(row) @ gradients.mean(0)) for row in rows])
    means = [gradients[4:].mean(0)] * 4 + [gradients[:4].mean(0)] * 5  # no held-out row agrees with itself
    expected_own = np.array([float(gradient @ mean) for gradient, mean in zip(gradients, means, strict=True)])
    for values, products in ((found, expected), (own, expected_own)):
        assert np.corrcoef(values, products)[0, 1] > 0.999
        assert values == pytest.approx(products, abs=0.02 * np.abs(products).max())


def test_suspects_lie_beyond_held_out_rows_of_their_own_kind():
    values = np.array([1.0, 5.0, 30.0, 11.0])
    held_out = np.concatenate([np.linspace(0, 4, 21), np.linspace(10, 20, 21)])
    kinds = ["easy"] * 21 + ["hard"] * 21
    found = signals.choose_suspects(values, ["easy", "easy", "hard", "hard"], held_out, held_out_kinds=kinds)
    assert found == []  # a fifth of four rows is none
    many = np.concatenate([values, np.zeros(16)])
    found = signals.choose_suspects(
        many, ["easy", "easy", "hard", "hard", *["easy"] * 16], held_out, held_out_kinds=kinds
    )
    assert [suspect.place for suspect in found] == [2, 1]
    assert [suspect.bound for suspect in found] == pytest.approx([21.75, 4.7])
    found = signals.choose_suspects(
        many, ["easy", "easy", "hard", "hard", *["easy"] * 16], held_out, held_out_kinds=kinds, least_bound=6
    )
    assert [(suspect.place, suspect.bound) for suspect in found] == [(2, pytest.approx(21.75))]


def test_held_out_rows_of_one_prompt_stay_in_one_half_for_every_order():
    rows = make_rows(40)
    rows += [row._replace(number=row.number + 40) for row in rows]
    one = short_run.split_held_out([(row, "kind") for row in rows])
    other = short_run.split_held_out([(row, "kind") for row in reversed(rows)])
    numbers = [{row.number for row in half.rows} for half in one[:2]]
    assert [{row.number for row in half.rows} for half in other[:2]] == numbers
    assert [len(half) for half in numbers] == [40, 40]
    assert all({number % 40 + 40, number % 40} <= half for half in numbers for number in half)
    assert len(one[2]) == 40
    assert len(set(one[2])) == 20


def test_reruns_of_a_pair_differ_by_the_rows_that_are_left_out_alone():
    kinds = ["a", "b"] * 50
    lengths = np.arange(100) // 10
    groups = {"first": list(range(0, 12)), "second": [7, 40, 41, 42, 43]}
    pool = plan.make_pool(groups, kinds, lengths, size=1000, seed=0)
    arms = plan.list_arms(pool, seeds=[1, 2], steps=50)
    assert len(arms) == 2 * (1 + 2 * 2)
    suspects = {place for places in groups.values() for place in places}
    drawn = []
    for seed in (1, 2):
        complete = next(arm for arm in arms if (arm.group, arm.seed) == (plan.ALL_ROWS, seed))
        assert sorted(complete.places) == list(range(100))
        for name, members in groups.items():
            without, others = (
                next(arm for arm in arms if (arm.group, arm.leaves_out_suspects, arm.seed) == (name, flag, seed))
                for flag in (True, False)
            )
            assert set(without.places) == set(range(100)) - set(members)
            left_out = set(range(100)) - set(others.places)
            assert len(left_out) == len(members)
            assert not left_out & suspects
            assert sorted(kinds[place] for place in left_out) == sorted(kinds[place] for place in members)
            assert without.steps == others.steps == complete.steps == 50
            same = without.places == others.places
            assert same.sum() == 100 - 2 * len(members)
            assert list(without.places) == [place for place in complete.places if place not in members]
            drawn.append(left_out)
    assert drawn[0] != drawn[2]


def test_pool_of_a_short_rerun_has_suspects_and_a_sample_of_the_others():
    groups = {"few": [1, 2, 3, 4, 5], "many": list(range(100, 400))}
    pool = plan.make_pool(groups, ["a"] * 1000, np.ones(1000), size=200, seed=0)
    assert len(pool.places) == 200
    assert len(np.intersect1d(pool.places, [1, 2, 3, 4, 5, *range(100, 400)])) == 80
    assert {"many"} <= set(pool.groups) <= {"few", "many"}
    assert all(np.isin(members, pool.places).all() for members in pool.groups.values())
