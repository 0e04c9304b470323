"""The verdict on a run: which word, with which numbers and which key to change."""

import dataclasses
import json
import re

import pytest
from conftest import RECIPE

from trl_sft.evaluation import answer_counts
from trl_sft.evaluation.answer_counts import AnswerCounts, BrokenAnswers
from trl_sft.reports.chinese import translate_verdict
from trl_sft.training import verdict
from trl_sft.training.verdict import Evidence, judge

HELD_OUT = RECIPE.replace("rows.jsonl}", "rows.jsonl, eval_fraction: 0.2}")
FALLING = ((10, 5.0), (20, 3.0), (30, 2.0), (40, 1.0), (50, 0.5))


def broken(empty=0, repeating=0, endless=0):
    return BrokenAnswers(empty, repeating, endless, max(empty, repeating, endless))


def answers(*, equal=0, right=(0, 0), lost=0, after=None):
    """Return counts of 40 prompts; all right answers after training are gained."""
    return AnswerCounts(40, equal, *right, right[1], lost, broken(), after or broken())


def evidence(*losses, counts=None, saved_step=None, final=None, train=FALLING):
    """Return the evidence of a run that was evaluated every 10 steps."""
    evals = tuple((10 * n, loss) for n, loss in enumerate(losses))
    last = evals[-1][0] if evals else 50
    final = losses[-1] if losses and final is None else final
    return Evidence(evals, train, final, saved_step if saved_step is not None else last, last, counts, 2e-5)


ONE_TEXT = dataclasses.replace(answers(), prompts=2, is_one_text=True)
CASES = {
    "better": (evidence(2.0, 1.5, 1.2, 1.19, counts=answers(right=(0, 30))), "better", ""),
    "better, still falling": (evidence(2.0, 1.5, 1.2, 1.0), "better", "train.num_train_epochs"),
    "better by its answers alone": (evidence(2.0, 1.99, counts=answers(right=(0, 9))), "better", ""),
    "equal answers": (evidence(7.0, 6.9, counts=answers(equal=40)), "little_changed", "train.learning_rate"),
    "equal loss": (evidence(2.0, 1.99, counts=answers(equal=3)), "little_changed", "train.learning_rate"),
    "a little worse": (evidence(2.0, 2.06), "little_changed", "train.learning_rate"),
    "overfitted": (evidence(7.0, 3.0, 4.0, 6.0), "overfitted", "run.early_stopping"),
    "overfitted from the start": (evidence(1.0, 1.2, 1.5, 2.0), "overfitted", "train.learning_rate"),
    "best step saved": (evidence(7.0, 3.0, 4.0, 6.0, saved_step=10, final=3.0), "better", ""),
    "empty": (evidence(7.0, 3.8, counts=answers(after=broken(empty=40))), "broken", "train.learning_rate"),
    "repeating": (evidence(3.0, 2.0, counts=answers(after=broken(repeating=21))), "broken", "train.learning_rate"),
    "endless": (evidence(3.0, 2.0, counts=answers(after=broken(endless=30))), "broken", "preview"),
    "worse": (evidence(2.0, 3.0, train=((10, 2.0), (20, 4.0), (30, 5.0))), "broken", "train.learning_rate"),
    "fewer right answers, same loss": (
        evidence(2.0, 1.99, counts=answers(right=(20, 0), lost=20)),
        "broken",
        "train.learning_rate",
    ),
    "fewer right answers": (evidence(2.0, 1.5, counts=answers(right=(20, 0), lost=20)), "unknown", "samples.jsonl"),
    "two held-out rows, one text": (
        dataclasses.replace(evidence(2.0, 1.5, 1.2, 1.19, counts=ONE_TEXT), eval_rows=2),
        "better",
        "",
    ),
    "nothing held out": (evidence(), "unknown", "data.eval_fraction"),
    "no value from before": (Evidence(((10, 2.0),), FALLING, 2.0, 10, 10), "unknown", "train.eval_on_start"),
    "no value from before, broken": (
        Evidence(((10, 2.0),), FALLING, 2.0, 10, 10, answers(after=broken(empty=40))),
        "broken",
        "train.learning_rate",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_verdict_has_the_word_and_the_key_to_change(name):
    facts, code, key = CASES[name]
    result = judge(facts)
    assert result.code == code
    assert key in result.advice
    assert bool(key) == bool(result.advice)
    assert json.loads(json.dumps(result.as_json())) == result.as_json()


KEYS = r"\b(?:train|data|run|model)\.[a-z_.]*[a-z]"


@pytest.mark.parametrize("name", CASES)
def test_verdict_in_chinese_has_the_numbers_and_the_keys_of_the_english_one(name):
    result = judge(CASES[name][0]).as_json()
    chinese = translate_verdict(json.loads(json.dumps(result)))
    for part in ("text", "advice"):
        assert bool(chinese[part]) == bool(result[part])
        assert not re.search(r"[a-z]{3,} [a-z]{3,}", chinese[part])
        english = re.sub(r" \([^)]* now\)|step 0", "", result[part])
        assert set(re.findall(KEYS, chinese[part])) == set(re.findall(KEYS, english))
        missing = set(re.findall(r"\d+(?:\.\d+)?", english)) - set(re.findall(r"\d+(?:\.\d+)?", chinese[part]))
        assert missing == set()


def test_run_that_another_metric_than_the_loss_stopped_gets_no_advice_on_the_threshold():
    falling = Evidence(((0, 4.0), (1, 3.0), (2, 2.0), (3, 1.0)), FALLING, 1.0, 3, 3, stopped_early=True)
    assert "run.early_stopping.threshold" in judge(falling).advice
    assert judge(dataclasses.replace(falling, stopping_metric="eval_exact")).advice == ""


def test_verdict_on_a_run_that_stopped_early_names_its_keys_in_chinese_too():
    for name in ("better, still falling", "equal loss"):
        result = judge(dataclasses.replace(CASES[name][0], stopped_early=True)).as_json()
        assert re.findall(r"run\.early_stopping\.\w+", translate_verdict(result)["advice"]) == re.findall(
            r"run\.early_stopping\.\w+", result["advice"]
        )
        assert "run.early_stopping" in result["advice"]


def test_verdict_of_another_form_has_no_chinese_text():
    for odd in ({}, {"code": "better"}, {"code": "new", "numbers": {}}, {"code": "better", "numbers": {"a": 1}}):
        assert translate_verdict(odd) is None
    assert translate_verdict({"code": "better", "numbers": 3, "text": "x"}) is None


def test_verdicts_read_as_sentences(matches):
    text = "\n\n".join("\n".join([f"[{name}]", *judge(facts).list_lines()]) for name, (facts, *_) in CASES.items())
    matches("verdicts", text + "\n")


def test_overfitting_begins_at_the_best_step():
    result = judge(evidence(7.0, 4.0, 3.0, 4.0, 6.0))
    assert result.numbers["best_step"] == 20
    assert result.headline == "Verdict: overfitted since step 20"
    assert result.text.startswith("Eval loss 7 -> 3 at step 20 -> 6 at the end")


@pytest.mark.parametrize(("best", "last", "code"), [(1.0, 1.04, "better"), (1.0, 1.06, "overfitted")])
def test_rise_of_the_eval_loss_by_five_percent_is_overfitting(best, last, code):
    assert judge(evidence(2.0, best, last, last)).code == code


def test_rise_at_one_evaluation_alone_is_not_overfitting_and_is_shown():
    result = judge(evidence(2.0, 1.0, 1.5))
    assert result.code == "better"
    assert "it was 1 at step 10" in result.text


def test_rise_near_zero_is_not_overfitting():
    assert judge(evidence(2.0, 0.010, 0.020, 0.020)).code == "better"


def test_risen_loss_is_not_overfitting_where_the_train_loss_rose_too():
    assert judge(evidence(2.0, 1.0, 1.5, 1.5, train=((10, 2.0), (20, 3.0), (30, 4.0)))).code == "better"


def test_saved_step_is_named_where_it_is_not_the_last():
    text = judge(evidence(7.0, 3.0, 4.0, 6.0, saved_step=10, final=3.0)).text
    assert "with the weights of step 10 of 30, which are saved (the last step: 6)" in text


@pytest.mark.parametrize(
    ("gained", "lost", "p"), [(0, 0, 1), (1, 0, 1), (5, 0, 0.0625), (6, 0, 0.03125), (9, 2, 67 / 1024), (3, 3, 1)]
)
def test_mcnemar_is_the_exact_binomial_test(gained, lost, p):
    """The values are those of R's `binom.test(gained, gained + lost)`."""
    assert verdict.compute_mcnemar(gained, lost) == verdict.compute_mcnemar(lost, gained) == pytest.approx(p)


def test_few_held_out_rows_are_said_and_enough_are_not():
    few = dataclasses.replace(evidence(2.0, 1.5), eval_rows=5)
    assert judge(few).headline == "Verdict: better on 5 held-out rows"
    assert "too few to tell a change of the answers from chance" in judge(few).text
    enough = dataclasses.replace(few, eval_rows=6)
    assert judge(enough) == judge(evidence(2.0, 1.5))
    assert verdict.compute_mcnemar(5, 0) > 0.05 > verdict.compute_mcnemar(6, 0)


def test_one_answer_to_different_questions_is_counted():
    samples = [{"reference": text, "before": text, "after": "b"} for text in ("a", "b")]
    samples = [sample | {"stopped": {"before": True, "after": True}} for sample in samples]
    assert answer_counts.count_answers(samples).is_one_text
    assert not answer_counts.count_answers(samples[1:]).is_one_text
    assert not answer_counts.count_answers([samples[0], samples[1] | {"after": "c"}]).is_one_text


def test_verdict_is_the_line_after_done_and_in_run_json_and_on_the_model_card(go, here):
    """The untrained toy ends no answer, so the samples say that too."""
    code, out, err = go(HELD_OUT, "train.learning_rate=1e-9")
    assert code == 0, err
    lines = out.splitlines()
    done = next(number for number, line in enumerate(lines) if line.startswith("Done: "))
    assert lines[done + 1] == "Verdict: little changed"
    assert lines[done + 2].startswith("  8 of 8 answers equal the base model's; eval loss ")
    assert "Raise train.learning_rate (1e-09 now)" in " ".join(lines[done + 3 : done + 5])
    written = json.loads((here / "out" / "run.json").read_text())["verdict"]
    assert written["code"] == "little_changed"
    assert written["numbers"]["equal_answers"] == 8
    card = (here / "out" / "README.md").read_text()
    assert f"Verdict: little changed. {written['text']}\n\n{written['advice']}\n" in card
    samples = [json.loads(line) for line in (here / "out" / "samples.jsonl").read_text().splitlines()]
    assert [sample["stopped"] for sample in samples] == [{"before": False, "after": False}] * 8


def test_answer_that_a_short_limit_cuts_is_not_called_endless(go, here):
    assert go(HELD_OUT, "train.max_steps=1", "evaluate.generation={max_new_tokens: 1}")[0] == 0
    samples = [json.loads(line) for line in (here / "out" / "samples.jsonl").read_text().splitlines()]
    assert [sample["stopped"]["after"] for sample in samples] == [None] * 8
