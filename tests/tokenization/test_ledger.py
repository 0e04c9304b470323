"""Nothing is lost without standing in the ledger: rows in, kept, left out, cut; shares, repeats, refusals."""

import json

import pytest
from conftest import QUESTIONS, RECIPE, jsonl

from trl_sft import cli, load_recipe
from trl_sft.data import mix
from trl_sft.errors import UserError
from trl_sft.training import stages

BASE = "model: {name_or_path: trl_sft:tiny}\ntrain: {output_dir: out}\n"


def prepare(here, data, *words):
    (here / "recipe.yaml").write_text(f"{BASE}data: {data}\n", encoding="utf-8")
    return stages.prepare(load_recipe("recipe.yaml", words))


def numbered(here, name, count, begin=0, **more):
    rows = [{"question": f"What is {n}?", "answer": f"It is {n}."} | more for n in range(begin, begin + count)]
    return jsonl(here / name, rows)


def balanced(of):
    """Rows in are rows kept and rows left out, in each source and together."""
    for part in (of, *of["sources"]):
        assert part["rows"]["input"] == part["rows"]["kept"] + sum(part["rows"]["rejected"].values()), part
        assert part["tokens"]["loss"] <= part["tokens"]["kept"] <= part["tokens"]["before_truncation"]


def test_ledger_counts_what_the_trainer_gets(here):
    ready = prepare(here, "{train: rows.jsonl}")
    of = ready.datasets.ledger["train"]
    rows = list(ready.datasets.train)
    assert of["rows"] == {
        "kept": 40, "truncated": 0, "tokenized_in_part": 0, "input": 40, "repeated": 0, "rejected": {}
    }  # fmt: skip
    assert of["tokens"]["kept"] == sum(len(row["input_ids"]) for row in rows)
    assert of["tokens"]["loss"] == sum(label != -100 for row in rows for label in row["labels"])
    lengths = sorted(len(row["input_ids"]) for row in rows)
    assert (of["tokens_per_row"]["min"], of["tokens_per_row"]["max"]) == (lengths[0], lengths[-1])
    assert of["missing_end_token"] == 0
    balanced(of)


def test_run_leaves_its_ledger_and_what_was_left_out(here, go):
    jsonl(here / "held.jsonl", [{"question": "what is 3 PLUS 3", "answer": "6!"}, {"question": "x", "answer": "y"}])
    code, out, _ = go(RECIPE.replace("rows.jsonl", "rows.jsonl, eval: held.jsonl"))
    assert code == 0
    assert "rows      39 to train; rejected: 1 also in the evaluation set" in out
    of = json.loads((here / "out" / "ledger.json").read_text())
    assert of["train"]["rows"]["rejected"] == {"also in the evaluation set": 1}
    assert of["eval"]["eval"]["rows"]["kept"] == 2
    left = [json.loads(line) for line in (here / "out" / "rejects.jsonl").read_text().splitlines()]
    place = {"part": "train", "source": "rows.jsonl", "row": 4, "file": "rows.jsonl", "line": 4}
    assert left == [place | {"reason": "also in the evaluation set"}]
    assert "1 row to train is also in the evaluation set and is removed; the first is rows.jsonl row 4 (line 4)" in out


def test_rows_removed_from_training_are_not_counted_in_the_evaluation_set(here):
    jsonl(here / "r.jsonl", [*QUESTIONS, *QUESTIONS[:20]])
    ready = prepare(here, "{train: r.jsonl, eval_fraction: 0.2}")
    assert ready.datasets.ledger["train"]["rows"]["rejected"]["also in the evaluation set"] > 0
    assert ready.datasets.ledger["eval"]["eval"]["rows"]["rejected"] == {}
    assert {row["part"] for row in ready.datasets.rejects} == {"train"}
    balanced(ready.datasets.ledger["train"])


def key(*texts):
    columns = ["text"] if len(texts) == 1 else ["prompt", "completion"]
    return mix.batch_keys({column: [text] for column, text in zip(columns, texts, strict=True)})[0]


def test_equal_rows_are_recognised_whatever_their_case_spacing_and_punctuation(here):
    for one, other in (("A b.", "a  B"), ("你好，世界", "你好世界！"), ("x\ny", "x y")):
        assert key(one) == key(other)
    for one, other in (("2+2", "22"), ("a", "b"), ("!", "?"), ("4*1", "4/1"), ("1.5", "15"), ("x = -1", "x = 1")):
        assert key(one) != key(other)
    assert key("1 + 1", "2") != key("1 + ", "12"), "prompt and completion stay apart"
    calls = [
        [{"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": {"x": c}}}]}] for c in "ab"
    ]
    assert (
        mix.batch_keys({"prompt": ["p", "p"], "completion": calls})[0]
        != mix.batch_keys({"prompt": ["p"], "completion": calls[1:]})[0]
    )
    numbered(here, "a.jsonl", 10)
    numbered(here, "b.jsonl", 4, begin=8)
    assert len(prepare(here, "{train: a.jsonl, eval: b.jsonl}").rows.train.order) == 8
    assert len(prepare(here, "{train: a.jsonl, eval: b.jsonl, drop_leaked: false}").rows.train.order) == 10
    with pytest.raises(UserError, match="all are also in the evaluation set"):
        prepare(here, "{train: b.jsonl, eval: b.jsonl}")


OVERLONG = {
    # how -> rows kept, cut, answers without their end
    "truncate": (2, 1, 1),
    "truncate_and_end": (2, 1, 0),
    "drop": (1, 0, 0),
}


@pytest.mark.parametrize("how", OVERLONG)
def test_overlong_rows_are_cut_ended_or_dropped_and_counted(how, here):
    jsonl(here / "r.jsonl", [{"question": "q", "answer": "yes " * n} for n in (2, 60)])
    ready = prepare(here, f"{{train: r.jsonl, overlong: {how}}}", "train.max_length=40")
    of = ready.datasets.ledger["train"]
    assert (of["rows"]["kept"], of["rows"]["truncated"], of["missing_end_token"]) == OVERLONG[how]
    balanced(of)
    end = ready.chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    last = ready.datasets.train[-1]
    assert (last["labels"][-1] == end) == (how == "truncate_and_end") or how == "drop"
    assert len(last["input_ids"]) <= 40
    if how == "drop":
        assert of["rows"]["rejected"] == {"longer than max_length 40": 1}


def test_row_cut_in_a_users_turn_gets_no_end_token(here):
    turns = [("user", "a"), ("assistant", "yes"), ("user", "long words " * 20), ("assistant", "no")]
    jsonl(here / "r.jsonl", [{"messages": [{"role": role, "content": words} for role, words in turns]}] * 2)
    ready = prepare(here, "{train: r.jsonl, overlong: truncate_and_end}", "train.max_length=60")
    row = ready.datasets.train[0]
    assert row["labels"][-1] == -100
    assert ready.datasets.ledger["train"]["missing_end_token"] == 2


def test_end_of_a_row_with_escaped_strings_is_counted_where_it_is(here):
    jsonl(here / "r.jsonl", [{"question": "q", "answer": "<|im_end|>" * 8 + " ok"}] * 3)
    data = "{train: r.jsonl, special_tokens_in_text: text, overlong: %s}"
    words = ("train.max_length=40", "run.allow=[truncated_answers]")
    assert prepare(here, data % "truncate", *words).datasets.ledger["train"]["missing_end_token"] == 3
    ready = prepare(here, data % "truncate_and_end", "train.max_length=40")
    assert ready.datasets.train[0]["labels"][-1] == ready.chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ready.datasets.ledger["train"]["missing_end_token"] == 0


def test_weight_that_gives_a_source_no_row_is_refused(here):
    numbered(here, "a.jsonl", 20)
    numbered(here, "b.jsonl", 20, begin=100)
    with pytest.raises(UserError, match=r"gives b\.jsonl no row of an epoch of 40"):
        prepare(here, "{train: [{path: a.jsonl, weight: 1}, {path: b.jsonl, weight: 0.001}]}")


def test_overlong_error_names_the_row(here):
    jsonl(here / "r.jsonl", [{"question": "q", "answer": "yes " * n} for n in (2, 60)])
    with pytest.raises(UserError) as refused:
        prepare(here, "{train: r.jsonl, overlong: error}", "train.max_length=40")
    assert refused.value.faults[0].where == "r.jsonl row 2 (line 2)"


def test_cut_at_a_length_that_nobody_wrote_is_said(here, capsys):
    jsonl(here / "r.jsonl", [{"question": "q", "answer": "yes " * n} for n in (2, 2000)])
    prepare(here, "{train: r.jsonl}")
    assert "1 row at max_length 1024 (TRL's default: the recipe does not set it): " in capsys.readouterr().out


def test_too_many_rows_without_a_trained_token_stop_the_run_and_the_first_is_named(here):
    rows = [{"question": "q " * (100 if n % 10 == 3 else 1), "answer": f"{n}"} for n in range(40)]
    jsonl(here / "r.jsonl", rows)
    with pytest.raises(UserError) as refused:
        prepare(here, "{train: r.jsonl}", "train.max_length=60")
    assert "4 of 40 rows of train have no loss tokens within max_length 60" in refused.value.faults[0].problem
    assert "r.jsonl row 4 (line 4)" in refused.value.faults[0].problem
    for words in (["data.max_untrained=0.1"], ["run.allow=[untrained_rows]"]):
        of = prepare(here, "{train: r.jsonl}", "train.max_length=60", *words).datasets.ledger["train"]
        assert of["rows"]["kept"] == 36
        balanced(of)
    with pytest.raises(UserError, match="no row of train has loss tokens"):
        prepare(here, "{train: r.jsonl}", "train.max_length=3", "run.allow=[untrained_rows]")


@pytest.mark.parametrize(("weights", "counts"), [((1, 1), (30, 30)), ((3, 1), (45, 15)), ((0.1, 0.5), (10, 50))])
def test_weights_are_exact_shares_of_rows_in_whole_passes(weights, counts, here):
    numbered(here, "a.jsonl", 20)
    numbered(here, "b.jsonl", 40, begin=100)
    data = f"{{train: [{{path: a.jsonl, weight: {weights[0]}}}, {{path: b.jsonl, weight: {weights[1]}}}]}}"
    ready = prepare(here, data)
    of = ready.datasets.ledger["train"]
    assert tuple(source["rows"]["kept"] for source in of["sources"]) == counts
    assert len(ready.datasets.train) == 60, "an epoch has as many rows as all sources"
    order = ready.rows.train.order
    for part, (size, begin) in enumerate(((20, 0), (40, 20))):
        times = [int((order == begin + n).sum()) for n in range(size)]
        assert max(times) - min(times) <= 1, "no row comes twice before every row came once"
        assert of["sources"][part]["rows"]["repeated"] == max(0, counts[part] - size)
        assert of["sources"][part]["share"]["rows"] == pytest.approx(counts[part] / 60, abs=1e-6)
    assert sorted(order[:20].tolist()) != list(range(20)), "mixed, not one after the other"
    balanced(of)
    again = prepare(
        here, f"{{train: [{{path: a.jsonl, weight: {weights[0]}}}, {{path: b.jsonl, weight: {weights[1]}}}]}}"
    )
    assert again.rows.train.order.tolist() == order.tolist()


def test_held_out_rows_are_never_repeated_into_training(here):
    numbered(here, "a.jsonl", 20)
    numbered(here, "b.jsonl", 80, begin=100)
    ready = prepare(here, "{train: [{path: a.jsonl, weight: 5}, {path: b.jsonl, weight: 1}], eval_fraction: 0.2}")
    assert not set(ready.rows.train.order.tolist()) & set(ready.rows.eval["eval"].order.tolist())


def test_held_out_rows_are_the_same_everywhere_for_a_seed(here):
    """Numbers, not a draw: another machine, process or version has to give these."""
    held = mix.sample_numbers(20, 5, 42)
    assert held.tolist() == [7, 9, 12, 14, 15]
    ready = prepare(here, "{train: rows.jsonl, eval_fraction: 0.25}", "train.seed=7")
    assert (
        ready.rows.eval["eval"].order.tolist()
        != prepare(here, "{train: rows.jsonl, eval_fraction: 0.25}").rows.eval["eval"].order.tolist()
    )


def test_max_rows_draws_with_the_seed_and_keeps_the_files_row_numbers(here, capsys):
    numbered(here, "a.jsonl", 100)
    ready = prepare(here, "{train: {path: a.jsonl, max_rows: 7}}")
    assert "7 of its 100 rows, sampled with the seed" in capsys.readouterr().out
    questions = [row["content"] for form in ready.rows.train.rows for row in form["prompt"]]
    assert len(questions) == 7
    for number, question in enumerate(questions):
        line = int(ready.rows.train.row_name(number).rpartition(" ")[2].rstrip(")"))
        assert question == f"What is {line - 1}?"
    assert (
        prepare(here, "{train: {path: a.jsonl, max_rows: 7}}").rows.train.rows["prompt"]
        == ready.rows.train.rows["prompt"]
    )


def test_several_held_out_sources_are_evaluated_under_their_names(here, go):
    numbered(here, "math.jsonl", 6, begin=500)
    numbered(here, "other.jsonl", 4, begin=600)
    text = RECIPE.replace("rows.jsonl", "rows.jsonl, eval: [math.jsonl, {path: other.jsonl, task: facts}]")
    code, out, _ = go(text)
    assert code == 0, out
    assert "eval      math: 6 rows" in out
    logged = [json.loads(line) for line in (here / "out" / "log.jsonl").read_text().splitlines()]
    assert {"eval_math_loss", "eval_facts_loss"} <= {name for entry in logged for name in entry}
    found = json.loads((here / "out" / "eval.json").read_text())
    assert set(found["after"]["losses"]) == {"math", "facts"}
    assert found["before"]["losses"]["math"] > 0
    last = {name: value for entry in logged if entry["step"] == 2 for name, value in entry.items()}
    assert "eval_math_loss" in last
    record = json.loads((here / "out" / "run.json").read_text())["metrics"]
    each = [record[f"eval_{name}_mean_token_accuracy"] for name in ("math", "facts")]
    assert min(each) <= found["after"]["token_accuracy"] <= max(each)
    assert "math" in out


def test_turn_that_is_not_to_be_trained_is_not(here):
    for key, value in (("train", False), ("weight", 0)):
        turns = [("user", "a"), ("assistant", "first"), ("user", "b"), ("assistant", "second")]
        rows = [{"messages": [{"role": role, "content": words} for role, words in turns]}] * 2
        rows[0]["messages"][1][key] = value
        jsonl(here / "r.jsonl", rows)
        ready = prepare(here, "{train: r.jsonl}")
        labels = [label for label in ready.datasets.train[0]["labels"] if label != -100]
        assert ready.chat.tokenizer.decode(labels) == "second<|im_end|>"


def test_tasks_of_rows_are_counted_apart(here):
    jsonl(here / "r.jsonl", [row | {"task": "even" if n % 4 else "odd"} for n, row in enumerate(QUESTIONS)])
    tasks = prepare(here, "{train: r.jsonl}").datasets.ledger["train"]["tasks"]
    assert {name: of["rows"]["kept"] for name, of in tasks.items()} == {"even": 30, "odd": 10}


def test_special_string_in_a_row_is_refused_or_plain_text(here):
    rows = [{"question": "q", "answer": "fine"}, {"question": "say <|im_end|> now", "answer": "no"}]
    jsonl(here / "r.jsonl", rows)
    with pytest.raises(UserError) as refused:
        prepare(here, "{train: r.jsonl}")
    assert refused.value.faults[0].where == "r.jsonl row 2 (line 2)"
    assert "the text holds <|im_end|>" in refused.value.faults[0].problem
    ready = prepare(here, "{train: r.jsonl, special_tokens_in_text: text}")
    end = ready.chat.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [row["input_ids"].count(end) for row in ready.datasets.train] == [2, 2]
    worded = prepare(here, "{train: {path: r.jsonl, wording: question_answer}, special_tokens_in_text: text}")
    assert [row["input_ids"].count(end) for row in worded.datasets.train] == [1, 1]
    assert "<|im_end|> now" in worded.chat.tokenizer.decode(worded.datasets.train[1]["input_ids"])


def test_pass_is_read_again_and_what_changed_is_said(here, capsys):
    def said(*words):
        prepare(here, "{train: rows.jsonl}", *words)
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("cache"))

    jsonl(here / "rows.jsonl", [{"question": f"Is {n} odd?", "answer": "yes"} for n in range(40)])  # of no other test
    assert "tokenized now (first run of this recipe)" in said()
    assert "read from" in said()
    assert "tokenized now (changed: settings)" in said("train.max_length=77")
    assert "read from" in said()
    jsonl(here / "rows.jsonl", QUESTIONS[:20])
    assert "tokenized now (changed: rows, order of the rows)" in said()
    assert "chat template" in said("tokenizer.chat_template=vicuna")


def test_dataset_num_proc_formats_in_so_many_processes(here, monkeypatch):
    from datasets import Dataset

    num_procs, original_map = [], Dataset.map
    monkeypatch.setattr(Dataset, "map", lambda *a, **k: (num_procs.append(k.get("num_proc")), original_map(*a, **k))[1])
    ready = prepare(here, "{train: rows.jsonl}", "train.dataset_num_proc=2")
    assert num_procs[0] == 2
    assert len(ready.datasets.train) == 40


def test_mixed_sources_say_their_shares(here, capsys):
    numbered(here, "a.jsonl", 20)
    numbered(here, "b.jsonl", 40, begin=100)
    prepare(here, "{train: [{path: a.jsonl, weight: 3}, {path: b.jsonl, weight: 1}]}")
    out = capsys.readouterr().out
    assert "a.jsonl: 45 rows, 25 of them repeated: 75.0% of the rows (requested: 75.0%)" in out


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("{train: [{path: rows.jsonl, weight: 1}, rows.jsonl]}", "has no `weight`, but another source has one"),
        ("{train: {path: rows.jsonl, weight: 0}}", "Write a number above 0."),
        ("{train: {path: rows.jsonl, max_rows: 0}}", "at least 1"),
        ("{train: rows.jsonl, eval: {path: rows.jsonl, weight: 1}}", "`weight` has no meaning in an evaluation set"),
        ("{train: rows.jsonl, max_untrained: 5}", "from 0 to 1"),
        ("{train: rows.jsonl, overlong: cut}", "truncate_and_end"),
    ],
)
def test_what_mixes_wrongly_is_refused(data, said, here, go):
    code, _, err = go(f"{BASE}data: {data}\n", command=["check"])
    assert code == 2
    assert said in err


def test_settings_without_an_effect_are_refused(here, go):
    text = f"{BASE}data: {{train: rows.jsonl, overlong: drop}}\n"
    for words in (["train.max_length=null"], ["train.packing=true", "train.packing_strategy=bfd_split"]):
        code, _, err = go(text, *words, command=["check"])
        assert code == 2
        assert "no row is truncated" in err


def test_packing_that_leaks_is_refused_until_it_is_allowed(here, go):
    words = ["train.packing=true", "train.packing_strategy=wrapped", "train.max_length=64"]
    text = f"{BASE}data: {{train: rows.jsonl}}\n"
    code, _, err = go(text, *words, command=["check"])
    assert code == 2
    assert "run.allow: [leaking_packing]" in err
    code, _, err = go(text, *words, "run.allow=[leaking_packing]", "train.max_steps=1", "train.save_strategy='no'")
    assert code == 0, err
    assert '  allow: ["leaking_packing"]' in (here / "out" / "resolved.yaml").read_text()
    assert cli.main(["check", str(here / "out" / "resolved.yaml")]) == 0, "what was allowed is in it"
