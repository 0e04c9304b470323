"""Rows that cannot be trained: every kind is named at once, or they are left out, counted and listed."""

import json

import numpy as np
import pytest
from conftest import jsonl

from trl_sft import load_recipe
from trl_sft.data import bad_rows
from trl_sft.errors import UserError
from trl_sft.training import stages

MODEL = "model: {name_or_path: trl_sft:tiny}\ntrain: {output_dir: out, max_steps: 2, logging_steps: 1}\n"
# refuses a chat whose question has the word "loud"
STRICT = (
    "{% for m in messages %}{% if 'loud' in m['content'] %}{{ raise_exception('no loud words') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATE = "tokenizer: {chat_template: strict.jinja}\n"


def questions(number, begin=0):
    return [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(begin, begin + number)]


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def prepare(here, data, *words, extra=""):
    (here / "recipe.yaml").write_text(f"{MODEL}{extra}data: {data}\n", encoding="utf-8")
    return stages.prepare(load_recipe("recipe.yaml", words))


def check_sums(ledger):
    """Rows in are rows kept and rows rejected by reason, in each source and together."""
    for part in (ledger, *ledger["sources"]):
        assert part["rows"]["input"] == part["rows"]["kept"] + sum(part["rows"]["rejected"].values()), part


def spoil(rows):
    """Make 3 of the rows bad, in two kinds: rows 6 and 12 have an empty answer, row 21 has a number."""
    rows[5] = {"question": "What?", "answer": " "}
    rows[11] = {"question": "What?", "answer": ""}
    rows[20] = {"question": None, "answer": "x"}
    return rows


def test_bad_rows_are_left_out_counted_by_reason_and_listed(here, go, capsys):
    jsonl(here / "r.jsonl", spoil(questions(100)))
    code, out, err = go(f"{MODEL}data: {{train: r.jsonl, on_bad_row: drop}}\n")
    assert code == 0, err
    ledger = json.loads((here / "out" / "ledger.json").read_text())["train"]
    empty = "answer is empty: there is nothing to learn"
    assert ledger["rows"]["rejected"] == {empty: 2, "question is empty (null)": 1}
    assert (ledger["rows"]["input"], ledger["rows"]["kept"]) == (100, 97)
    check_sums(ledger)
    rejects = [json.loads(line) for line in (here / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(row["row"], row["reason"], row["code"]) for row in rejects] == [
        (6, empty, "data.empty_value"),
        (12, empty, "data.empty_value"),
        (21, "question is empty (null)", "data.wrong_type"),
    ]
    assert f"2 rows are left out: {empty}; the first is r.jsonl row 6 (line 6)" in out
    assert "1 row is left out: question is empty (null); the first is r.jsonl row 21 (line 21)" in out
    assert "97 to train; rejected: 2 answer is empty" in out


def test_stop_is_the_default_and_names_each_kind_with_its_number_and_first_row(here, go):
    jsonl(here / "r.jsonl", spoil(questions(100)))
    code, _, err = go(f"{MODEL}data: {{train: r.jsonl}}\n", command=["check"])
    assert code == 2
    assert "2 problems to fix" in err
    assert "r.jsonl row 6 (line 6)" in err
    assert "answer is empty: there is nothing to learn (the first of 2 such rows)" in err
    assert "r.jsonl row 21 (line 21)" in err
    assert "Or set `data.on_bad_row: drop`, which leaves such rows out." in err
    assert "row 12" not in err


def test_faults_of_formatting_and_of_the_template_are_told_at_once_for_all_sources(here, go):
    (here / "strict.jinja").write_text(STRICT)
    rows = [chat(f"What is {n}?", f"It is {n}.") for n in range(30)]
    rows[3] = chat("loud one", "x")
    rows[7] = {"messages": [{"role": "user", "content": "x"}]}
    rows[9] = chat("loud two", "x")
    jsonl(here / "a.jsonl", rows)
    jsonl(here / "b.jsonl", [chat("q", " "), *rows[10:20]])
    jsonl(here / "e.jsonl", [chat("loud three", "x"), *rows[20:]])
    text = f"{MODEL}{TEMPLATE}data: {{train: [a.jsonl, b.jsonl], eval: e.jsonl}}\n"
    for command in (["check"], ["prepare"], []):
        code, _, err = go(text, command=command)
        assert code == 2
        assert "4 problems to fix" in err, err
        assert "a.jsonl row 8 (line 8)\n    messages has no assistant turn" in err
        assert "a.jsonl row 4 (line 4)\n    the chat template refuses this chat: no loud words" in err
        assert "(the first of 2 such rows)" in err
        assert "b.jsonl row 1 (line 1)\n    messages has an empty assistant turn (turn 2)" in err
        assert "e.jsonl row 1 (line 1)\n    the chat template refuses this chat: no loud words" in err


def test_rows_that_the_template_refuses_are_dropped_and_the_sums_hold(here):
    (here / "strict.jinja").write_text(STRICT)
    rows = [chat(f"What is {n}?", f"It is {n}.") for n in range(100)]
    rows[3], rows[60] = chat("loud one", "x"), chat("loud two", "x")
    rows[30] = chat("q", "")
    jsonl(here / "a.jsonl", rows)
    jsonl(here / "e.jsonl", [chat("loud three", "x"), *(chat(f"Why {n}?", "So.") for n in range(40))])
    ready = prepare(here, "{train: a.jsonl, eval: e.jsonl, on_bad_row: drop}", extra=TEMPLATE)
    refused = "the chat template refuses this chat: no loud words"
    train, evaluation = ready.datasets.ledger["train"], ready.datasets.ledger["eval"]["eval"]
    assert train["rows"]["rejected"] == {"messages has an empty assistant turn": 1, refused: 2}
    assert evaluation["rows"]["rejected"] == {refused: 1}
    for ledger in (train, evaluation):
        check_sums(ledger)
    assert [(row["part"], row["row"]) for row in ready.datasets.rejects] == [
        *(("train", 31), ("train", 4), ("train", 61)),
        ("eval", 1),
    ]
    assert {row["code"] for row in ready.datasets.rejects} == {"data.empty_value", "template.refuses_row"}
    again = prepare(here, "{train: a.jsonl, eval: e.jsonl, on_bad_row: drop}", extra=TEMPLATE)
    assert again.datasets.ledger == ready.datasets.ledger, "the cache has the same counts"
    assert again.datasets.rejects == ready.datasets.rejects


def test_more_bad_rows_than_the_share_stop_the_run_and_every_kind_is_named(here):
    jsonl(here / "r.jsonl", spoil(questions(40)))
    with pytest.raises(UserError) as error:
        prepare(here, "{train: r.jsonl, on_bad_row: drop}")
    first, *kinds = error.value.faults
    assert first.code == "data.too_many_bad_rows"
    assert first.problem == "3 of 40 rows of train cannot be trained (7.5%), more than data.max_untrained: 0.05"
    assert first.fix == "Correct the rows, or set data.max_untrained: 0.08."
    assert [fault.where for fault in kinds] == ["r.jsonl row 6 (line 6)", "r.jsonl row 21 (line 21)"]
    for words in ("data.max_untrained=0.08", "run.allow=[untrained_rows]"):
        ready = prepare(here, "{train: r.jsonl, on_bad_row: drop}", words)
        assert ready.datasets.ledger["train"]["rows"]["kept"] == 37


def test_rows_without_loss_and_bad_rows_count_together_against_the_share(here):
    long_question = {"question": "long " * 200, "answer": "x"}
    jsonl(here / "r.jsonl", [*questions(36), {"question": "a", "answer": ""}, *[long_question] * 3])
    data = "{train: r.jsonl, on_bad_row: drop, max_untrained: 0.09}"
    with pytest.raises(UserError, match="3 of 39 rows of train have no loss tokens") as error:
        prepare(here, data, "train.max_length=64")
    assert "1 more row cannot be trained" in str(error.value)
    ready = prepare(here, data.replace("0.09", "0.1"), "train.max_length=64")
    check_sums(ready.datasets.ledger["train"])


def test_held_out_rows_are_drawn_from_the_good_rows_alone(here):
    jsonl(here / "r.jsonl", spoil(questions(100)))
    ready = prepare(here, "{train: r.jsonl, eval_fraction: 0.2, on_bad_row: drop}")
    train, evaluation = ready.rows.train, ready.rows.eval["eval"]
    assert len(evaluation.order) == round(0.2 * 97)
    assert not {5, 11, 20} & {*train.order.tolist(), *evaluation.order.tolist()}
    ledgers = ready.datasets.ledger
    assert ledgers["train"]["rows"]["kept"] + ledgers["eval"]["eval"]["rows"]["kept"] == 97
    assert sum(ledgers["train"]["rows"]["rejected"].values()) == 3
    assert ledgers["eval"]["eval"]["rows"]["rejected"] == {}
    check_sums(ledgers["train"])


def test_weights_share_an_epoch_of_the_good_rows(here):
    jsonl(here / "a.jsonl", spoil(questions(100)))
    jsonl(here / "b.jsonl", questions(50, begin=1000))
    ready = prepare(
        here, "{train: [{path: a.jsonl, weight: 1}, {path: b.jsonl, weight: 1}], on_bad_row: drop, max_untrained: 0.03}"
    )
    ledger = ready.datasets.ledger["train"]
    assert [source["rows"]["kept"] for source in ledger["sources"]] == [74, 74]
    assert [source["rows"]["input"] for source in ledger["sources"]] == [77, 74]
    assert sum(ledger["sources"][0]["rows"]["rejected"].values()) == 3
    check_sums(ledger)


def test_a_bad_row_that_weights_repeat_is_one_row(here):
    (here / "strict.jinja").write_text(STRICT)
    jsonl(here / "a.jsonl", [chat("loud one", "x"), *(chat(f"What {n}?", "x") for n in range(9))])
    jsonl(here / "b.jsonl", [chat(f"Why {n}?", "x") for n in range(90)])
    data = "{train: [{path: a.jsonl, weight: 1}, {path: b.jsonl, weight: 1}]}"
    with pytest.raises(UserError) as error:
        prepare(here, data, extra=TEMPLATE)
    assert [fault.where for fault in error.value.faults] == ["a.jsonl row 1 (line 1)"]
    assert "such rows)" not in error.value.faults[0].problem
    ready = prepare(here, data.replace("]}", "], on_bad_row: drop, max_untrained: 0.02}"), extra=TEMPLATE)
    check_sums(ready.datasets.ledger["train"])


def test_max_rows_counts_the_rows_of_its_sample(here):
    jsonl(
        here / "r.jsonl",
        [{"question": "a", "answer": ""} if n % 50 == 0 else row for n, row in enumerate(questions(400))],
    )
    ready = prepare(here, "{train: {path: r.jsonl, max_rows: 200}, on_bad_row: drop}")
    ledger = ready.datasets.ledger["train"]
    assert ledger["rows"]["input"] == 200
    check_sums(ledger)
    numbers = [reject["row"] for reject in ready.datasets.rejects]
    assert numbers
    assert all((number - 1) % 50 == 0 for number in numbers), "rows have the numbers of the file"


def test_function_may_return_none_to_drop_a_row_whatever_the_share(here, go):
    (here / "f.py").write_text(
        "def odd(row):\n    if row['n'] % 2 == 0:\n        return None\n"
        "    return {'question': f\"What is {row['n']}?\", 'answer': str(row['n'])}\n"
    )
    jsonl(here / "r.jsonl", [{"n": n} for n in range(40)])
    code, out, err = go(f"{MODEL}data: {{train: {{path: r.jsonl, format: 'f.py:odd'}}}}\n")
    assert code == 0, err
    assert "20 rows are left out: dropped by odd; the first is r.jsonl row 1 (line 1)" in out
    ledger = json.loads((here / "out" / "ledger.json").read_text())["train"]
    assert ledger["rows"]["rejected"] == {"dropped by odd": 20}
    check_sums(ledger)
    rejects = [json.loads(line) for line in (here / "out" / "rejects.jsonl").read_text().splitlines()]
    place = {"part": "train", "source": "r.jsonl", "row": 1, "file": "r.jsonl", "line": 1}
    assert rejects[0] == place | {"reason": "dropped by odd"}


def test_function_that_fails_for_some_rows_is_told_by_kind_and_can_be_dropped(here):
    body = "if row['n'] == 3:\n        return None\n    return {'question': 'a', 'answer': 'b' * (8 // row['n'])}\n"
    (here / "f.py").write_text(f"def f(row):\n    {body}")
    jsonl(here / "r.jsonl", [{"n": n} for n in (0, 1, 2, 3, 9, 0, *[1] * 60)])
    data = "{train: {path: r.jsonl, format: 'f.py:f'}}"
    with pytest.raises(UserError) as error:
        prepare(here, data)
    assert [fault.where for fault in error.value.faults] == ["r.jsonl row 1 (line 1)", "r.jsonl row 5 (line 5)"]
    assert "f raised ZeroDivisionError" in error.value.faults[0].problem
    assert "(the first of 2 such rows)" in error.value.faults[0].problem
    ready = prepare(here, data.replace("}}", "}, on_bad_row: drop}"))
    ledger = ready.datasets.ledger["train"]
    assert ledger["rows"]["kept"] == 62
    assert sum(ledger["rows"]["rejected"].values()) == 4
    check_sums(ledger)


def test_function_that_drops_every_row_is_refused(here):
    (here / "f.py").write_text("def f(row):\n    return None\n")
    jsonl(here / "r.jsonl", [{"n": 1}] * 3)
    with pytest.raises(UserError, match=r"f\.py:f returns None for each of the 3 rows"):
        prepare(here, "{train: {path: r.jsonl, format: 'f.py:f'}}")


def test_rows_all_bad_are_refused_with_their_kind_and_without_advice_to_drop(here):
    jsonl(here / "r.jsonl", [{"question": "a", "answer": ""}] * 3)
    for mode in ("stop", "drop"):
        with pytest.raises(UserError) as error:
            prepare(here, f"{{train: r.jsonl, on_bad_row: {mode}}}")
        assert "on_bad_row: drop`" not in str(error.value)
        assert "(the first of 3 such rows)" in str(error.value)


def test_small_source_whose_rows_are_all_bad_is_named(here):
    jsonl(here / "a.jsonl", questions(100))
    jsonl(here / "b.jsonl", [{"question": "a", "answer": ""}] * 2)
    with pytest.raises(UserError, match=r"b\.jsonl has no row left: 2 answer is empty"):
        prepare(here, "{train: [a.jsonl, b.jsonl], on_bad_row: drop}")


def test_overlong_error_stops_also_where_bad_rows_are_dropped(here):
    jsonl(here / "r.jsonl", [*questions(60), {"question": "long " * 200, "answer": "x"}])
    with pytest.raises(UserError, match="longer than max_length 64") as error:
        prepare(here, "{train: r.jsonl, on_bad_row: drop, overlong: error}", "train.max_length=64")
    assert error.value.faults[0].where == "r.jsonl row 61 (line 61)"


def test_stream_leaves_bad_rows_out_counts_and_lists_them(here, go):
    (here / "strict.jinja").write_text(STRICT)
    rows = [chat(f"What is {n}?", f"It is {n}.") for n in range(600)]
    rows[5], rows[450] = chat("q", ""), chat("q", "")
    rows[400] = chat("loud", "x")
    jsonl(here / "r.jsonl", rows)
    text = (
        "model: {name_or_path: trl_sft:tiny}\n"
        "train: {output_dir: out, max_steps: 40, per_device_train_batch_size: 16, logging_steps: 10}\n"
        f"{TEMPLATE}data: {{train: {{path: r.jsonl, streaming: true}}, on_bad_row: drop}}\n"
    )
    code, out, err = go(text)
    assert code == 0, err
    assert "1 row is left out: messages has an empty assistant turn; the first is r.jsonl row 6 (line 6)" in out
    source = json.loads((here / "out" / "ledger.json").read_text())["train"]["sources"][0]
    rejected = source["rows"]["rejected"]
    assert rejected["messages has an empty assistant turn"] >= 2
    assert rejected["the chat template refuses this chat: no loud words"] >= 1
    assert source["rows"]["input"] == source["rows"]["kept"] + sum(rejected.values())
    rejects = [json.loads(line) for line in (here / "out" / "rejects.jsonl").read_text().splitlines()]
    assert sorted(row["row"] for row in rejects) == [6, 401, 451], "each once, although the stream is read twice"
    code, _, err = go(text.replace("on_bad_row: drop", "on_bad_row: stop").replace("output_dir: out", "output_dir: o2"))
    assert code == 2
    assert "r.jsonl row 6 (line 6)" in err


def test_preview_shows_what_is_left_out_and_refuses_under_stop(here, go):
    jsonl(here / "r.jsonl", spoil(questions(40)))
    code, out, err = go(f"{MODEL}data: {{train: r.jsonl, on_bad_row: drop}}\n", command=["preview"])
    assert code == 0, err
    assert "left out: r.jsonl row 6 (line 6): answer is empty: there is nothing to learn" in out
    code, _, err = go(f"{MODEL}data: {{train: r.jsonl}}\n", command=["preview"])
    assert code == 2
    assert "r.jsonl row 6 (line 6)" in err
    assert "r.jsonl row 21 (line 21)" in err


def test_bad_rows_are_told_where_another_source_cannot_be_read(here, go):
    jsonl(here / "a.jsonl", spoil(questions(100)))
    jsonl(here / "b.jsonl", [{"frage": "x"}])
    code, _, err = go(f"{MODEL}data: {{train: [a.jsonl, b.jsonl]}}\n", command=["check"])
    assert code == 2
    assert "b.jsonl has the columns frage" in err
    assert "a.jsonl row 6 (line 6)" in err


def test_bad_rows_are_told_without_a_tokenizer(here, go):
    jsonl(here / "a.jsonl", spoil(questions(100)))
    text = MODEL.replace("trl_sft:tiny", "nobody/nothing") + "data: {train: a.jsonl}\n"
    code, out, err = go(text, command=["check"])
    assert code == 2
    assert "a.jsonl row 6 (line 6)" in out + err


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("messages has the role 'robot' (turn 1)", 'messages has the role "it\'s" (turn 12)'),
        ("answer is 4 (whole number), not text", "answer is 55 (whole number), not text"),
        ("messages has a turn with weight: 0.5 (turn 2)", "messages has a turn with weight: -2 (turn 4)"),
        (
            "f raised ValueError: invalid literal for int() with base 10: 'x'",
            "f raised ValueError: invalid literal for int() with base 10: 'y z'",
        ),
    ],
)
def test_problems_that_differ_in_values_alone_are_of_one_kind(one, other):
    kinds = {bad_rows.describe_problem(problem, "", code="data.wrong_type").kind for problem in (one, other)}
    assert len(kinds) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("answer is empty (null)", "question is empty (null)"),
        ("messages ends with user", "messages ends with tool"),
        ("the template's markers and the row's text differ", "the template's markers and the row's spans differ"),
    ],
)
def test_problems_of_other_columns_or_roles_are_of_other_kinds(one, other):
    assert bad_rows.describe_problem(one, "", code="c").kind != bad_rows.describe_problem(other, "", code="c").kind


def test_kinds_are_bounded_whatever_a_function_raises():
    kinds = {}
    for number in range(2 * bad_rows.MAX_KINDS):
        word = "".join(chr(97 + int(digit)) for digit in str(number))
        bad_row = bad_rows.describe_problem(f"f raised ValueError: {word}", "Correct it.", code="data.function_failed")
        bad_rows.add(kinds, bad_row, number=number, place=f"row {number + 1}")
    assert len(kinds) == bad_rows.MAX_KINDS + 1
    assert bad_rows.count(kinds) == 2 * bad_rows.MAX_KINDS
    faults = list(bad_rows.list_kinds(kinds))
    assert len(faults) == 21
    assert faults[-1].problem.endswith("more kinds of problems, in 980 rows")


def test_order_of_a_split_without_bad_rows_is_that_of_the_file(here):
    jsonl(here / "r.jsonl", questions(30))
    assert np.array_equal(prepare(here, "{train: r.jsonl}").rows.train.order, np.arange(30))
