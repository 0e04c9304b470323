"""Items of a judging page: drawn, balanced, with checks of the rater, and blind."""

import json
import statistics

import pytest

from trl_sft.evaluation import answer_pairs, blind_items
from trl_sft.evaluation.answer_pairs import BASE, TUNED
from trl_sft.evaluation.blind_items import IDENTICAL, PAIR, REPEAT


def make_samples(count, tasks=("a",), equal=()):
    return [
        {
            "row": row,
            "task": tasks[row % len(tasks)],
            "prompt": [{"role": "user", "content": f"question {row}"}],
            "reference": f"reference {row}",
            "before": f"first {row}",
            "after": f"first {row}" if row in equal else f"second {row}",
            "stopped": {"before": True, "after": None},
        }
        for row in range(count)
    ]


def build(count, *, seed=0, max_pairs=100, **settings):
    pairs = answer_pairs.read_pairs(make_samples(count, **settings))
    return blind_items.build(pairs, seed=seed, max_pairs=max_pairs)


def test_pair_is_read_from_a_held_out_row_and_from_an_own_prompt():
    own = {"row": None, "number": 2, "prompt": "hello", "reference": None, "before": "x", "after": "y", "stopped": {}}
    unanswered = {"row": 5, "prompt": "p", "reference": "r", "before": None, "after": "y"}
    row, prompt = answer_pairs.read_pairs([*make_samples(1), unanswered, own])
    assert (row.name, row.task, row.turns, row.reference) == ("row 0", "a", (("user", "question 0"),), "reference 0")
    assert (row.base, row.tuned, row.base_ended, row.tuned_ended) == ("first 0", "second 0", True, None)
    assert (prompt.name, prompt.turns, prompt.reference) == ("prompt 2", (("", "hello"),), "")


def test_parts_and_calls_of_a_message_are_shown():
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "look_up"}]},
    ]
    (pair,) = answer_pairs.read_pairs([make_samples(1)[0] | {"prompt": turns}])
    assert pair.turns == (("user", "ab"), ("assistant", '[{"name": "look_up"}]'))


def test_same_seed_gives_the_same_items_and_another_seed_another_order():
    assert build(30) == build(30)
    assert build(30).items != build(30, seed=1).items
    assert build(30).key["page"] != build(30, seed=1).key["page"]


@pytest.mark.parametrize("count", [1, 2, 7, 40, 101])
def test_tuned_answers_are_on_the_left_in_half_of_the_pairs(count):
    key = build(count, max_pairs=count).key
    lefts = [item["left"] for item in key["items"] if item["kind"] == PAIR]
    assert len(lefts) == count
    assert abs(lefts.count(TUNED) - lefts.count(BASE)) <= 1


def test_sides_do_not_follow_the_order_of_the_page():
    """The place of an item says nothing about its sides: over seeds each place has both about as often."""
    seeds = [build(20, seed=seed).key["items"] for seed in range(100)]
    shares = [statistics.mean(items[place]["left"] == TUNED for items in seeds) for place in (0, 5, 10, 19)]
    assert all(0.3 < share < 0.7 for share in shares)


def test_repeated_pairs_exchange_their_sides_and_come_later():
    for seed in range(20):
        key = build(60, seed=seed).key
        first = {item["pair"]: item for item in key["items"] if item["kind"] == PAIR}
        repeats = [item for item in key["items"] if item["kind"] == REPEAT]
        assert len(repeats) == 6
        for item in repeats:
            assert (item["left"], item["right"]) == (first[item["pair"]]["right"], first[item["pair"]]["left"])
            assert item["item"] - first[item["pair"]]["item"] >= 10


def test_identical_items_use_pairs_with_equal_answers_first():
    blind = build(40, equal=(3, 4, 5))
    identical = [item for item in blind.key["items"] if item["kind"] == IDENTICAL]
    assert {item["pair"] for item in identical} <= {"row 3", "row 4", "row 5"}
    assert len(identical) == 2
    for item in identical:
        shown = blind.items[item["item"] - 1]
        assert shown["left"] == shown["right"] != ""
    assert blind.key["equal_answers"] == ["row 3", "row 4", "row 5"]
    assert blind.key["pairs"] == 37


def test_page_shows_what_the_key_says():
    blind = build(25)
    answers = {f"row {row}": {BASE: f"first {row}", TUNED: f"second {row}"} for row in range(25)}
    for shown, known in zip(blind.items, blind.key["items"], strict=True):
        assert shown["item"] == known["item"]
        assert shown["left"] == answers[known["pair"]][known["left"]]
        assert shown["right"] == answers[known["pair"]][known["right"]]
        assert shown["turns"] == [["user", known["prompt"]]]
        assert shown["reference"] == ""


def test_items_of_the_page_name_no_model_and_no_row():
    text = json.dumps(build(25).items)
    assert not any(word in text for word in ("base", "tuned", "before", "after", "row ", PAIR, REPEAT, IDENTICAL))


def test_fewer_pairs_keep_the_share_of_each_task():
    """Of 40 rows 30 have the task a: of 8 pairs 6."""
    blind = build(40, tasks=("a", "a", "a", "b"), max_pairs=8)
    tasks = [item["task"] for item in blind.key["items"] if item["kind"] == PAIR]
    assert (tasks.count("a"), tasks.count("b")) == (6, 2)
    assert len(blind.key["not_drawn"]) == 32


def test_pairs_whose_answers_are_all_equal_give_no_pair():
    assert build(5, equal=range(5)).key["pairs"] == 0
