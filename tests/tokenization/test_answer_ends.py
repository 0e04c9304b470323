"""Answers that lose their end to truncation: a model that never sees one does not learn to stop."""

import pytest
from conftest import jsonl

WORDS = "word " * 40
BASE = "model: {name_or_path: trl_sft:tiny}\ntrain: {output_dir: out, max_steps: 2, max_length: 64, logging_steps: 1}\n"


def chat(answer, number):
    return {"messages": [{"role": "user", "content": f"Say {number}."}, {"role": "assistant", "content": answer}]}


def write(here, *, cut, whole):
    rows = [chat(WORDS, number) for number in range(cut)] + [chat("a", number) for number in range(whole)]
    return jsonl(here / "r.jsonl", rows)


def test_rows_that_all_lose_their_end_are_refused_and_accepted_by_name(here, go):
    write(here, cut=40, whole=0)
    text = f"{BASE}data: {{train: r.jsonl}}\n"
    for command in (["check"], ["prepare"], []):
        code, _, err = go(text, command=command)
        assert code == 2
        assert "recipe.yaml:2 train.max_length" in err
        assert "40 of 40 rows to train lose the end of each answer at max_length 64, so the model hardly learns" in err
        assert "Set a larger train.max_length (the longest row has " in err
        assert "run.allow: [truncated_answers]" in err
    assert go(text + "run: {allow: [truncated_answers]}\n")[0] == 0


@pytest.mark.parametrize(
    "words", ["train.max_length=512", "data.overlong=truncate_and_end", "train.truncation_mode=keep_end"]
)
def test_rows_that_keep_their_end_are_trained(words, here, go):
    write(here, cut=10, whole=0)
    code, _, err = go(f"{BASE}data: {{train: r.jsonl}}\n", words, command=["check"])
    assert code == 0, err


def test_half_of_the_answers_may_lose_their_end(here, go):
    text = f"{BASE}data: {{train: r.jsonl}}\n"
    write(here, cut=10, whole=10)
    code, out, err = go(text, command=["check"])
    assert code == 0, err
    assert "10 answers without their end token" in out
    write(here, cut=11, whole=10)
    assert go(text, command=["check"])[0] == 2


def test_long_chats_whose_earlier_answers_are_whole_are_trained(here, go):
    turns = [("user", "a"), ("assistant", "yes"), ("user", "b"), ("assistant", WORDS)]
    jsonl(here / "r.jsonl", [{"messages": [{"role": role, "content": text} for role, text in turns]}] * 5)
    for words in ((), ("data.loss_on=all",)):
        code, out, err = go(f"{BASE}data: {{train: r.jsonl}}\n", *words, command=["check"])
        assert code == 0, err
        assert "5 answers without their end token" in out
    code, _, err = go(f"{BASE}data: {{train: r.jsonl, loss_on: last_turn}}\n", command=["check"])
    assert code == 2
    assert "5 of 5 rows to train lose the end of each answer" in err


def test_default_of_trl_is_named_where_the_recipe_sets_no_length(here, go):
    jsonl(here / "r.jsonl", [chat("word " * 1200, number) for number in range(3)])
    code, _, err = go(f"{BASE.replace(' max_length: 64,', '')}data: {{train: r.jsonl}}\n", command=["check"])
    assert code == 2
    assert "at max_length 1024 (TRL's default)" in err


def test_evaluation_sets_and_plain_texts_may_be_cut(here, go):
    jsonl(here / "t.jsonl", [{"text": WORDS * 3}] * 4)
    assert go(f"{BASE}data: {{train: t.jsonl}}\n", command=["check"])[0] == 0
    write(here, cut=0, whole=5)
    jsonl(here / "e.jsonl", [chat(WORDS, 1)] * 4)
    assert go(f"{BASE}data: {{train: r.jsonl, eval: e.jsonl}}\n", command=["check"])[0] == 0


def test_stream_whose_later_answers_lose_their_end_is_stopped(here, go):
    rows = [chat("a", number) for number in range(250)] + [chat(WORDS, number) for number in range(1500)]
    jsonl(here / "r.jsonl", rows)
    text = BASE.replace("max_steps: 2", "max_steps: 300, per_device_train_batch_size: 8").replace(
        "logging_steps: 1", "logging_steps: 100"
    )
    code, _, err = go(f"{text}data: {{train: {{path: r.jsonl, streaming: true}}}}\n")
    assert code == 2
    assert "rows of r.jsonl lose the end of each answer at max_length" in err
