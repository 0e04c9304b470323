"""Findings and verdicts on real runs of the embedded model, and false alarms on curves resampled from healthy ones.

scripts/record_runs.py trained and recorded the runs; `make prove` trains the faulty ones again.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from curves import HEALTHY, RECORDS, read_record, resample

from trl_sft.evaluation.answer_counts import count_answers
from trl_sft.evaluation.before_after import list_eval_losses
from trl_sft.evaluation.completions import Completions
from trl_sft.training.diagnosis import find
from trl_sft.training.verdict import Evidence, judge

ROOT = Path(__file__).parents[3]
# run -> its finding, and the verdict; None = the run was stopped
FAULTY = {
    "overfitting": ("overfitting", "overfitted"),
    "memorisation": ("memorisation", "overfitted"),
    "rate-too-high": ("diverging", "broken"),
    "rate-too-low": ("no_improvement", "little_changed"),
    "nothing-to-learn": ("no_improvement", "little_changed"),
    "thirty-rows-thirty-epochs": ("memorisation", "overfitted"),
    "not-finite": ("not_finite", None),
}
CURVES, MOST_FALSE_ALARMS = 200, 0.05


def list_alarms(log, facts, ends=None):
    """Return the codes that the run would have said: the rules see the log after each of its entries, or of `ends`."""
    seen = set()
    for end in ends or range(1, len(log) + 1):
        seen |= {finding.code for finding in find.find_all(log[:end], facts)}
    return seen


def judge_record(record):
    """Return the verdict on a recorded run."""
    evals = list_eval_losses(record["log"], record["facts"].loss_tokens)
    train = tuple((entry["step"], entry["loss"]) for entry in record["log"] if "loss" in entry)
    last = evals[-1]
    counts = count_answers(record["samples"])
    return judge(Evidence(evals, train, last[1], last[0], last[0], counts, record["facts"].peak_rate))


def test_at_least_ten_healthy_runs_are_recorded():
    assert len(HEALTHY) >= 10
    assert {path.stem for path in RECORDS.glob("*.json")} == {*HEALTHY, *FAULTY}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_run_has_no_finding_and_is_better(name):
    record = read_record(name)
    assert record["findings"] == []
    assert list_alarms(record["log"], record["facts"]) == set()
    assert record["verdict"] == judge_record(record).code == "better"


@pytest.mark.parametrize("name", FAULTY)
def test_faulty_run_has_its_own_finding_and_no_other(name):
    record = read_record(name)
    code, verdict = FAULTY[name]
    assert record["findings"] == [code]
    shares = record["completions"]
    completions = (
        Completions(100, round(100 * shares["train_share"]), 100, round(100 * shares["eval_share"])) if shares else None
    )
    assert [finding.code for finding in find.find_all(record["log"], record["facts"], completions=completions)] == [
        code
    ]
    assert record["verdict"] == verdict
    if verdict:
        assert judge_record(record).code == verdict
    else:
        assert "not finite at step" in record["stopped"]


def count_false_alarms(curves, *, every_entry):
    """Return how many resampled curves have a finding, and which."""
    draw = np.random.default_rng(2026)
    alarms = []
    for number in range(curves):
        record = read_record(HEALTHY[number % len(HEALTHY)])
        log = resample(record["log"], draw)
        evaluations = [end for end, entry in enumerate(log, 1) if "eval_loss" in entry]
        codes = list_alarms(log, record["facts"], ends=None if every_entry else [*evaluations, len(log)])
        alarms += [sorted(codes)] if codes else []
    print(f"{len(alarms)} of {curves} curves of {len(HEALTHY)} healthy runs have a finding: {alarms}")
    return len(alarms)


def test_few_resampled_healthy_curves_have_a_finding_at_an_evaluation():
    assert count_false_alarms(48, every_entry=False) <= 48 * MOST_FALSE_ALARMS


@pytest.mark.long
def test_under_five_percent_of_200_resampled_healthy_curves_have_a_finding_at_any_entry():
    assert count_false_alarms(CURVES, every_entry=True) < CURVES * MOST_FALSE_ALARMS


@pytest.mark.long
@pytest.mark.parametrize("name", FAULTY)
def test_faulty_run_trained_again_has_its_own_finding_and_no_other(name, monkeypatch):
    from conftest import SHIPPED

    from trl_sft.recipe import paths

    monkeypatch.setattr(paths, "EMBEDDED", SHIPPED)
    spec = importlib.util.spec_from_file_location("record_runs", ROOT / "scripts" / "record_runs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = module.record(name)
    assert (result["findings"], result["verdict"]) == ([FAULTY[name][0]], FAULTY[name][1])
