"""Each rule on synthetic logs: what it finds, what it leaves alone, and which finding explains others."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
from curves import make_facts, make_log

from trl_sft.evaluation.completions import Completions
from trl_sft.reports.chinese import translate_finding
from trl_sft.training.diagnosis import find, findings, rates
from trl_sft.training.diagnosis.findings import InputTime

NOISE = np.random.default_rng(3).normal(0, 0.05, 100)
FALLING = 2 * np.exp(-np.arange(60) / 20) + 1 + NOISE[:60]
FLAT = 2 + NOISE[:60]


def codes(log, **keywords):
    facts = keywords.pop("facts", None) or make_facts()
    return [finding.code for finding in find.find_all(log, facts, **keywords)]


def test_healthy_curve_has_no_finding():
    assert codes(make_log(FALLING, evals=[(0, 3.0), (20, 1.9), (40, 1.3), (60, 1.15)])) == []
    assert codes([]) == []


@pytest.mark.parametrize("name", ["loss", "grad_norm", "entropy", "eval_loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_number_that_is_not_finite_stops_the_run_and_explains_all(name, value):
    log = make_log([2.0, 2.0, 2.0])
    log[1][name] = value
    (finding,) = find.find_all(log, make_facts(peak_rate=1.0))
    assert (finding.code, finding.steps, finding.stops) == ("not_finite", (2,), True)
    assert name in finding.observation


def test_infinite_norm_of_fp16_is_no_finding():
    log = make_log([2.0, 2.0, 2.0])
    log[1]["grad_norm"] = math.inf
    assert codes(log, facts=make_facts(has_loss_scale=True)) == []
    assert codes(log) == ["not_finite"]


def test_loss_of_zero_beside_a_norm_that_is_not_finite_is_said_to_be_no_loss():
    log = make_log([2.0, 0.0])
    log[1]["grad_norm"] = math.nan
    (finding,) = find.find_all(log, make_facts())
    assert "The logged loss of 0 is no loss" in finding.meaning


def test_loss_of_exactly_zero_is_found():
    assert codes(make_log([2.0, 0.0, 0.0])) == ["zero_loss"]
    assert codes(make_log([2.0, 1e-9])) == []


def test_eval_loss_that_rises_twice_while_the_train_loss_falls_is_overfitting():
    log = make_log(FALLING, evals=[(0, 3.0), (20, 1.9), (40, 2.1), (60, 2.2)])
    (finding,) = find.find_all(log, make_facts())
    assert finding.code == "overfitting"
    assert finding.steps == (20, 40, 60)
    assert finding.numbers["best_eval_loss"] == 1.9


@pytest.mark.parametrize(
    "evals",
    [
        [(0, 3.0), (20, 1.9), (40, 1.9), (60, 2.2)],  # one evaluation only
        [(0, 3.0), (20, 1.9), (40, 1.98), (60, 1.99)],  # less than 5%
        [(0, 3.0), (20, 0.010), (40, 0.015), (60, 0.018)],  # next to nothing
        [(0, 3.0), (20, 1.9), (40, 2.2), (60, 1.8)],  # it falls again
    ],
)
def test_small_or_short_rise_of_the_eval_loss_is_no_overfitting(evals):
    assert codes(make_log(FALLING, evals=evals)) == []


def test_train_loss_that_explodes_from_the_start_is_divergence_and_explains_the_rate():
    log = make_log([3.0, 3.1, 9.0, 12.0, 11.0, 10.0, 9.0, 8.0])
    (finding,) = find.find_all(log, make_facts(peak_rate=0.5))
    assert finding.code == "diverging"
    assert "reached 12 at step 4; it was 3 at step 1" in finding.observation
    assert "usual for all weights are" in finding.meaning


def test_train_loss_that_falls_from_an_explosion_before_the_first_entry_is_divergence():
    """Log entries of ten steps hide the explosion; the eval loss before step 1 shows it."""
    losses = [23.0, 21.0, 11.0, 9.0, 8.0, 7.5]
    log = make_log(losses, every=10, evals=[(0, 7.0), (40, 7.3)])
    assert codes(log) == ["diverging"]
    harder_rows = make_log([6.0, 5.0, 4.5, 4.2], every=10, evals=[(0, 3.0), (40, 2.1)])
    assert codes(harder_rows) == []


def test_train_loss_that_rises_again_is_divergence():
    risen = np.concatenate([FALLING, np.linspace(1.2, 4, 30) + NOISE[:30]])
    assert codes(make_log(risen, evals=[])) == ["diverging"]
    assert codes(make_log(np.concatenate([FALLING, np.full(30, 1.3)]))) == []


def test_eval_loss_above_the_base_models_is_divergence_where_the_train_loss_rises_too():
    assert codes(make_log([2.0, 2.1, 2.5, 2.8], evals=[(0, 2.0), (4, 2.6)])) == ["diverging"]


def test_flat_train_loss_is_no_improvement_only_after_half_of_the_run():
    assert codes(make_log(FLAT)) == ["no_improvement"]
    assert codes(make_log(FLAT[:30]), facts=make_facts(max_steps=1000)) == []
    assert codes(make_log(FLAT, evals=[(0, 3.0), (60, 2.5)])) == []


@pytest.mark.parametrize(
    ("facts", "evals", "words"),
    [
        ({"peak_rate": 1e-8}, (), "too low: usual for all weights"),
        ({"peak_rate": 0.1}, (), "too high: usual for all weights"),
        ({}, [(0, 3.0), (20, 2.99), (40, 2.98), (60, 2.97)], "too low: each evaluation is a little lower"),
        ({}, [(0, 3.0), (20, 3.01), (40, 2.98), (60, 2.97)], "too low or too high"),
        ({}, (), "too low or too high"),
    ],
)
def test_learning_rate_is_called_too_low_or_too_high_where_the_data_tell(facts, evals, words):
    (finding,) = find.find_all(make_log(FLAT, evals=evals), make_facts(**facts))
    assert finding.code == "no_improvement"
    assert words in finding.meaning


def test_two_jumps_to_twice_the_level_are_spikes_and_one_is_not():
    losses = FALLING.copy()
    losses[30] = 6.0
    assert codes(make_log(losses)) == []
    losses[50] = 5.0
    (finding,) = find.find_all(make_log(losses), make_facts())
    assert (finding.code, finding.steps) == ("spikes", (31, 51))


def test_noisy_losses_have_no_spikes():
    losses = np.exp(np.random.default_rng(5).normal(0.3, 0.5, 300))
    assert "spikes" not in codes(make_log(losses), facts=make_facts(max_steps=10_000))


def test_gradients_clipped_to_less_than_a_tenth_are_found():
    assert codes(make_log(FALLING, grad_norm=[30.0] * 60)) == ["clipped"]
    assert codes(make_log(FALLING, grad_norm=[3.0] * 60)) == []
    assert codes(make_log(FALLING, grad_norm=[30.0] * 60), facts=make_facts(max_grad_norm=0.0)) == []


@pytest.mark.parametrize(
    ("rate", "is_adapter", "parameters", "position"),
    [
        (2e-5, False, 7e9, 0),  # Alpaca
        (1e-5, False, 65e9, 0),  # LIMA
        (5e-6, False, 8e9, 0),  # Tulu 3
        (1e-3, False, 135e6, 0),  # SmolLM2
        (3e-4, False, 1.7e9, 0),  # SmolLM2
        (2e-4, True, 7e9, 0),  # QLoRA
        (1e-4, True, 65e9, 0),  # QLoRA
        (1e-3, True, 8e9, 0),  # Tinker's sweep
        (4e-3, True, 30e9, 1),  # diverged in Tinker's sweep
        (1e-3, False, 7e9, 1),
        (1e-2, False, 1e9, 1),
        (1e-8, False, 7e9, -1),
        (1e-6, True, 7e9, -1),
    ],
)
def test_published_learning_rates_are_usual_and_those_that_diverged_are_not(rate, is_adapter, parameters, position):
    facts = make_facts(peak_rate=rate, is_adapter=is_adapter, parameters=parameters)
    assert rates.locate_rate(facts) == position
    assert codes([], facts=facts) == (["unusual_rate"] if position else [])


def test_learning_rate_of_another_optimizer_is_not_judged():
    assert codes([], facts=make_facts(peak_rate=0.5, optimizer="sgd")) == []
    assert codes([], facts=make_facts(peak_rate=None)) == []


def test_token_accuracy_near_one_at_the_start_is_found_and_explains_no_improvement():
    log = make_log(FLAT / 100, mean_token_accuracy=[0.99] * 60)
    assert codes(log) == ["accurate_at_start"]
    before = [{"step": 0, "eval_loss": 0.02, "eval_mean_token_accuracy": 0.98}]
    assert codes(before) == ["accurate_at_start"]
    assert codes(make_log(FALLING, mean_token_accuracy=[0.5] * 50 + [0.99] * 10)) == []


def test_memorisation_needs_training_rows_that_are_completed_more_often_than_held_out_rows():
    log = make_log(FALLING, evals=[(0, 3.0), (20, 1.9), (40, 2.1), (60, 2.2)])
    assert codes(log, completions=Completions(24, 22, 24, 2)) == ["memorisation"]
    assert codes(log, completions=Completions(24, 22, 24, 20)) == ["overfitting"]
    assert codes(log, completions=Completions(24, 6, 24, 2)) == ["overfitting"]
    assert codes(log, completions=Completions(24, 24, 0, 0)) == ["overfitting"]


@pytest.mark.parametrize(
    ("times", "expected"),
    [(InputTime(50, 4.0, 10.0), ["slow_input"]), (InputTime(50, 1.0, 10.0), []), (InputTime(5, 4.0, 5.0), [])],
)
def test_loop_that_waits_for_batches_is_found(times, expected):
    assert codes(make_log(FALLING), input_time=times) == expected


KEYS = r"\b(?:train|data|run|model)\.[a-z_.]*[a-z]"


def test_finding_in_chinese_tells_what_is_known_of_the_learning_rate():
    """Too low, too high, unknown."""
    texts = []
    for rate in (1e-8, 0.5, 2e-5):
        (finding,) = find.find_all(make_log(FLAT, evals=[(0, 3.0), (60, 2.99)]), make_facts(peak_rate=rate))
        texts.append(translate_finding(dataclasses.asdict(finding))["meaning"])
    assert texts[0].startswith("学习率过低：通常为 5e-07")
    assert texts[1].startswith("学习率过高：通常为 5e-07")
    assert texts[2].startswith("学习率过低或过高")
    assert translate_finding({"code": "new", "numbers": {}}) is None


def test_every_finding_reads_as_sentences(matches):
    """One example of each code; the snapshot is what a user reads."""
    spiky = FALLING.copy()
    spiky[[30, 50]] = 6.0
    rising = make_log(FALLING, evals=[(0, 3.0), (20, 1.9), (40, 2.1), (60, 2.2)])
    accurate = [{"step": 0, "eval_loss": 0.02, "eval_mean_token_accuracy": 0.98}]
    results = [
        *find.find_all(make_log([2.0, math.nan]), make_facts()),
        *find.find_all(make_log([2.0, 0.0]), make_facts()),
        *find.find_all(make_log([3.0, 3.1, 9.0, 12.0]), make_facts()),
        *find.find_all(make_log(FLAT, evals=[(0, 3.0), (60, 2.99)]), make_facts()),
        *find.find_all(rising, make_facts()),
        *find.find_all(rising, make_facts(), completions=Completions(24, 22, 24, 2)),
        *find.find_all(make_log(spiky), make_facts()),
        *find.find_all(make_log(FALLING, grad_norm=[30.0] * 60), make_facts()),
        *find.find_all([], make_facts(peak_rate=0.1)),
        *find.find_all(accurate, make_facts()),
        *find.find_all([], make_facts(), input_time=InputTime(50, 4.0, 10.0)),
    ]
    names = {value for name, value in vars(findings).items() if name.isupper() and isinstance(value, str)}
    assert {finding.code for finding in results} == names
    for finding in results:
        chinese = translate_finding(json.loads(json.dumps(dataclasses.asdict(finding))))
        for part in ("observation", "meaning", "advice"):
            assert re.search(r"[\u4e00-\u9fff]", chinese[part])
            assert not re.search(r"[a-z]{3,} [a-z]{3,}", chinese[part])
            english = getattr(finding, part)
            assert set(re.findall(KEYS, chinese[part])) == set(re.findall(KEYS, english)), finding.code
    parts = [f"[{f.code}]\n{f.observation}\n{f.meaning}\n{f.advice}" for f in results]
    matches("findings", "\n\n".join(parts) + "\n")
