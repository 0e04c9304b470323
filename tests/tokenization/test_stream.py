"""Sources that are streamed give the tokens that the pass on disk gives."""

import itertools
import json

import pytest
from conftest import jsonl

from trl_sft import load_recipe
from trl_sft.training import stages

TEXT = (
    "model: {name_or_path: trl_sft:tiny}\ndata: {train: {path: r.jsonl, streaming: true}}\n"
    "train: {output_dir: out, max_steps: 3, save_strategy: 'no', logging_steps: 1}\n"
)


@pytest.fixture
def rows(here):
    made = [{"question": f"What is {n}?", "answer": "It is " * (n % 7) + f"{n}."} for n in range(1300)]
    jsonl(here / "r.jsonl", made)
    return made


def prepared(here, text, *words):
    (here / "recipe.yaml").write_text(text, encoding="utf-8")
    return stages.prepare(load_recipe("recipe.yaml", words))


@pytest.mark.parametrize("packing", ["false", "true"])
def test_stream_gives_the_same_tokens_as_the_pass_on_disk(packing, rows, here):
    words = [f"train.packing={packing}", "train.max_length=64"]
    streamed = prepared(here, TEXT, *words).datasets.train
    whole = prepared(here, TEXT, *words, "data.train=r.jsonl").datasets.train
    count = 0
    for one, other in zip(streamed, whole, strict=False):  # the stream begins again
        assert {name: list(one[name]) for name in other} == {name: list(other[name]) for name in other}
        count += 1
    assert count == len(whole) > 100


def test_streamed_run_trains_and_counts_what_came_by(rows, here, go):
    jsonl(here / "held.jsonl", [{"question": "a", "answer": "b"}] * 4)
    code, out, err = go(TEXT, "data.eval=held.jsonl")
    assert code == 0, err
    assert "its first 200 rows" in out
    assert "steps        3\n" in out
    of = json.loads((here / "out" / "ledger.json").read_text())
    assert of["train"]["streaming"]
    assert of["train"]["sources"][0]["name"] == "r.jsonl"
    assert of["train"]["sources"][0]["rows"]["kept"] >= 24
    assert of["eval"]["eval"]["rows"]["kept"] == 4


@pytest.mark.parametrize("number", [1300, 20])  # in the first pass over the rows, and in a later one
@pytest.mark.parametrize("packing", ["false", "true"])
def test_streamed_run_goes_on_bit_equal(packing, number, rows, here, go):
    jsonl(here / "r.jsonl", rows[:number])
    words = ["train.max_steps=8", "train.save_steps=6", "train.save_strategy=steps", f"train.packing={packing}"]
    assert go(TEXT, *words, "train.output_dir=whole")[0] == 0
    code, _, err = go(TEXT, *words, "train.output_dir=second", "run.resume=whole/checkpoint-6")
    assert code == 0, err
    one, other = ((here / name / "model.safetensors").read_bytes() for name in ("whole", "second"))
    assert one == other


def test_streams_are_mixed_by_weight_with_the_seed(rows, here):
    jsonl(here / "other.jsonl", [{"question": f"other {n}", "answer": "yes"} for n in range(1300)])
    data = "{train: [{path: r.jsonl, streaming: true, weight: 3}, {path: other.jsonl, streaming: true, weight: 1}]}"
    text = TEXT.replace("{train: {path: r.jsonl, streaming: true}}", data)
    drawn = []
    for _ in range(2):
        ready = prepared(here, text)
        decode = ready.chat.tokenizer.decode
        first = [decode(row["input_ids"]) for _, row in zip(range(400), ready.datasets.train, strict=False)]
        drawn.append(["other" in words for words in first])
    assert drawn[0] == drawn[1]
    assert 60 < sum(drawn[0]) < 140


def test_stream_takes_no_more_than_max_rows(rows, here):
    ready = prepared(here, TEXT.replace("streaming: true", "streaming: true, max_rows: 1100"))
    first = [row["input_ids"] for row in itertools.islice(ready.datasets.train, 1101)]
    assert first[1100] == first[0], "it begins again after 1,100 rows"
    assert first[1099] != first[0]


def test_bad_row_of_a_stream_stops_the_run_and_is_named(rows, here, go):
    rows[1250] = {"question": "q", "answer": ""}
    jsonl(here / "r.jsonl", rows)
    code, _, err = go(TEXT, "train.max_steps=400", "train.per_device_train_batch_size=4")
    assert code == 2
    assert "r.jsonl row 1251 (line 1251)" in err
    assert "answer is empty" in err
    assert "then run the same command. The run resumes" in err


def test_rows_of_a_stream_that_are_held_out_are_dropped_and_counted(rows, here):
    jsonl(here / "held.jsonl", rows[:30])
    ready = prepared(here, TEXT, "data.eval=held.jsonl")
    decode = ready.chat.tokenizer.decode
    first = decode(next(iter(ready.datasets.train))["input_ids"])
    assert "What is 30?" in first
    assert ready.datasets.stream_counts["r.jsonl"]["rejected: also in the evaluation set"] == 30
    again = prepared(here, TEXT, "data.eval=held.jsonl", "data.drop_leaked=false")
    assert "What is 0?" in decode(next(iter(again.datasets.train))["input_ids"])


def test_stream_of_which_too_much_trains_nothing_is_stopped(rows, here, go):
    rows = [row | ({"question": "q " * 400} if n > 300 and n % 3 else {}) for n, row in enumerate(rows)]
    jsonl(here / "r.jsonl", rows)
    code, _, err = go(TEXT, "train.max_steps=400", "train.per_device_train_batch_size=4", "train.max_length=128")
    assert code == 2
    assert "have no loss tokens" in err


def test_broken_line_of_a_stream_is_told_without_a_traceback(rows, here, go):
    with (here / "r.jsonl").open("a") as file:
        file.write('{"question": "q", "ans')
    code, _, err = go(TEXT, "train.max_steps=2000", "train.per_device_train_batch_size=8")
    assert code == 2
    assert "r.jsonl:1301" in err
    (here / "r.jsonl").write_text('{"question": "q", "answer": "a"}\n{"question"')
    code, _, err = go(TEXT, command=["check"])
    assert code == 2
    assert "r.jsonl:2" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train.max_steps=-1"], "streaming needs a number of steps"),
        (["data.eval_fraction=0.1"], "a stream has no known length"),
        (["data.eval={path: r.jsonl, streaming: true}"], "an evaluation set cannot be streamed"),
        (["data.train=[{path: r.jsonl, streaming: true}, r.jsonl]"], "some sources are streamed"),
        (["train.shuffle_dataset=true"], "a stream is read in its own order"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(words, said, rows, here, go):
    code, _, err = go(TEXT, *words, command=["check"])
    assert code == 2
    assert said in err
