"""Answers are counted as equal, right, empty, repeating or endless, each by a definition that the tests state."""

import random
import time

import pytest

from trl_sft.evaluation import answer_counts
from trl_sft.evaluation.answer_counts import BrokenAnswers, count_answers
from trl_sft.evaluation.repetition import is_repeating


def sample(before, after, reference="ABC", stopped=(True, True)):
    """Return an entry of samples.jsonl."""
    sides = dict(zip(("before", "after"), stopped, strict=True))
    return {"reference": reference, "before": before, "after": after, "stopped": sides}


@pytest.mark.parametrize(
    "text",
    [
        "The answer is is is is is is is",
        "哈哈哈哈哈哈哈哈哈哈哈哈哈哈",
        "\n\n- a\n- a\n- a\n- a\n- a\n- a",
        "A long sentence that a broken model writes again and again, without an end. " * 5,
        "first some sense, then " + "na" * 40,
    ],
)
def test_text_of_which_half_is_one_loop_is_repeating(text):
    assert is_repeating(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no, no, no",
        "aaaa",
        "1000000",
        "gooegooe",
        "Mississippi has four s, four i and two p.",
        "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n| 5 | 6 |",
        "The quick brown fox jumps over the lazy dog. ........ Then it sleeps for a long time in the sun.",
        "def f(x):\n    if x:\n        return 1\n    return 2\n",
    ],
)
def test_text_with_few_or_short_repetitions_is_not_repeating(text):
    assert not is_repeating(text)


def test_search_for_loops_in_a_long_answer_takes_less_than_a_second():
    text = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz ", k=100_000))
    began = time.monotonic()
    assert not is_repeating(text)
    assert time.monotonic() - began < 1


def test_answers_are_counted_by_what_they_are():
    counts = count_answers(
        [
            sample("x", "x "),  # equal apart from the space at its end
            sample("x", "ABC"),  # gained
            sample("ABC", "x"),  # lost
            sample("ABC", "ABC"),  # equal, right twice
            sample("x", ""),
            sample("", "y", stopped=(False, True)),
        ]
    )
    assert (counts.prompts, counts.equal) == (6, 2)
    assert (counts.right_before, counts.right_after, counts.gained, counts.lost) == (2, 2, 1, 1)
    assert counts.before == BrokenAnswers(empty=1, repeating=0, endless=1, broken=1)
    assert counts.after == BrokenAnswers(empty=1, repeating=0, endless=0, broken=1)


def test_answer_that_is_as_empty_or_repeating_as_its_reference_is_not_broken():
    counts = count_answers([sample("x", "", reference=""), sample("x", "ha" * 20, reference="ha" * 30)])
    assert counts.after.broken == 0


def test_answer_whose_end_cannot_be_told_is_not_endless():
    old = {"reference": "a", "before": "b", "after": "c"}  # of a run of an earlier version
    assert count_answers([sample("x", "y", stopped=(None, None)), old]).after.endless == 0


def test_samples_without_both_answers_have_no_counts():
    assert count_answers([]) is None
    assert count_answers([{"reference": "a", "before": None, "after": "c"}]) is None
    assert answer_counts.count_answers([{"reference": "a", "before": "b"}]) is None
