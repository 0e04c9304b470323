"""`check` holds the evaluation set against the training set: tasks, shares, and prompts in both."""

import json
import random

import pytest
from conftest import jsonl
from scipy import stats

from trl_sft import cli
from trl_sft.evaluation import set_comparison

RECIPE = """\
model: {name_or_path: trl_sft:tiny}
data: {train: train.jsonl, eval: eval.jsonl}
train: {output_dir: out, max_steps: 2}
"""
WORDS = [
    f"{first}{second}" for first in ("ba", "do", "ki", "lu", "me", "na") for second in ("ral", "tin", "vos", "mek")
]


def write_rows(number, task, seed, words=14):
    draw = random.Random(seed)
    return [
        {"question": " ".join(draw.choices(WORDS, k=words)) + f" {seed}{n}?", "answer": f"a{n}", "task": task}
        for n in range(number)
    ]


@pytest.fixture
def check(here, capsys):
    """Return a function that checks a recipe on rows, and returns the screen and the object of --json."""
    (here / "recipe.yaml").write_text(RECIPE, encoding="utf-8")

    def call(train, evaluation):
        jsonl(here / "train.jsonl", train)
        jsonl(here / "eval.jsonl", evaluation)
        capsys.readouterr()
        code = cli.main(["check", "recipe.yaml", "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        return err, json.loads(out)["evaluation_set"]

    return call


def test_planted_leaks_are_named_with_both_rows_and_nothing_else_is(check):
    train, evaluation = write_rows(60, "a", 1), write_rows(40, "a", 2)
    questions = [row["question"] for row in evaluation]
    eight = " ".join(questions[3].split()[2:10])
    words = questions[2].split()
    words[1], words[6], words[11] = "other", "words", "here"
    leaks = [questions[0], "  ".join(questions[1].upper().split()), " ".join(words), f"Now {eight} and much more of it"]
    train[10:14] = [{"question": text, "answer": f"other {n}", "task": "a"} for n, text in enumerate(leaks)]
    screen, found = check(train, evaluation)
    assert found["leaks"] == {"exact": 2, "overlap": 0, "near": 1, "numbers": 0, "phrase": 1}
    assert [(match["evaluation"].split(" (")[0], match["training"].split(" (")[0]) for match in found["matches"]] == [
        (f"eval.jsonl row {n}", f"train.jsonl row {10 + n}") for n in (1, 2, 3, 4)
    ]
    assert "3 evaluation prompts are in training rows (2 equal, 1 nearly equal); eval.jsonl row 1" in screen
    assert "1 evaluation prompt have" not in screen
    assert "eval.jsonl row 4 (line 4) with train.jsonl row 14" in screen


def test_sets_that_fit_add_no_line(check):
    screen, found = check(write_rows(60, "a", 1), write_rows(40, "a", 2))
    assert set(found["leaks"].values()) == {0}
    assert found["matches"] == []
    assert not any(line.startswith(("leaks", "tasks")) for line in screen.splitlines())


def test_tasks_that_are_missing_or_small_and_shares_that_differ_are_named(check):
    train = write_rows(60, "a", 1) + write_rows(60, "b", 2) + write_rows(20, "c", 3)
    evaluation = write_rows(70, "a", 4) + write_rows(10, "b", 5)
    screen, found = check(train, evaluation)
    assert found["missing_tasks"] == ["c"]
    assert found["small_tasks"] == ["b"]
    assert found["tasks"]["a"] == {
        "training": 60,
        "evaluation": 70,
        "training_share": 60 / 140,
        "evaluation_share": 70 / 80,
    }
    expected = stats.chi2_contingency([[60, 60, 20], [70, 10, 0]], correction=False)
    assert found["chi_square"]["p"] == pytest.approx(expected.pvalue, rel=1e-9)
    assert "no evaluation row has the task c, which is trained" in screen
    assert "too few to resolve anything: b (10)" in screen
    assert "a 43% of training rows, 88% of evaluation rows" in screen


def test_rows_without_tasks_are_not_compared_by_task(check):
    _, found = check(write_rows(30, "", 1), write_rows(40, "", 2))
    assert found["tasks"] == {}
    assert found["chi_square"] is None
    assert found["missing_tasks"] == []


def test_a_turn_of_a_longer_chat_is_a_leak_and_a_short_answer_to_it_is_not():
    turns = [{"role": "user", "content": "First question?"}, {"role": "assistant", "content": "Yes."}]
    prompt = [{"role": "system", "content": "Be kind."}, *turns, {"role": "user", "content": "Why?"}]
    texts = set_comparison._list_texts(prompt)
    assert texts == ["Why?", "First question?", "First question?\nWhy?"]
    assert set_comparison._list_texts("text") == ["text"]
