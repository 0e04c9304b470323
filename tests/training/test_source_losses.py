"""Losses by source and task: they add up to the logged loss, equal a reference, and change nothing else."""

import json
import types

import numpy as np
import pytest
import torch
from conftest import jsonl
from datasets import Dataset
from resumed_runs import are_equal, read_log
from transformers import AutoModelForCausalLM

from trl_sft.model import patches
from trl_sft.recipe import paths
from trl_sft.tokenization import build, cache, row_groups
from trl_sft.tokenization.encode import EncodedRows
from trl_sft.tokenization.row_groups import Grouping, RowGroups
from trl_sft.training import source_losses, stages

RECIPE = """\
model: {name_or_path: trl_sft:tiny}
data:
  train: [{path: sums.jsonl, task: sums}, {path: words.jsonl, task: words}]
  eval_fraction: 0.3
train:
  output_dir: out
  max_steps: 4
  per_device_train_batch_size: 3
  per_device_eval_batch_size: 4
  eval_strategy: steps
  eval_steps: 4
  logging_steps: 2
  learning_rate: 1e-2
  max_length: 64
  shuffle_dataset: true
  save_strategy: 'no'
evaluate: {max_rows: 1}
"""

needs_token_losses = pytest.mark.skipif(not patches.has_fused_head(), reason="TRL returns no loss of each token")
STREAMS = "data.train=[{path: sums.jsonl, streaming: true, weight: 1}, {path: words.jsonl, streaming: true, weight: 1}]"


@pytest.fixture
def two_sources(here):
    jsonl(here / "sums.jsonl", [{"question": f"What is {n} and {n}?", "answer": str(n + n)} for n in range(18)])
    words = [{"question": f"Write {n} words.", "answer": "word " * (1 + n % 7)} for n in range(11)]
    jsonl(here / "words.jsonl", words)


def add_up(entry, prefix=""):
    """Return the sum of share times loss of an entry."""
    names = [key.removeprefix(f"{prefix}loss/") for key in entry if key.startswith(f"{prefix}loss/")]
    assert names
    return sum(entry[f"{prefix}loss/{name}"] * entry[f"{prefix}loss_token_share/{name}"] for name in names)


@needs_token_losses
@pytest.mark.parametrize(
    "overrides",
    [
        ("train.gradient_accumulation_steps=3",),
        (  # of so many steps the time is measured before the first one
            *("train.packing=true", "train.loss_type=dft", "lora={r: 4, target_modules: all-linear}"),
            *("train.max_steps=30", "train.logging_steps=10", "train.eval_steps=30"),
        ),
        pytest.param(
            (
                *("train.packing=true", "train.packing_strategy=wrapped", "run.allow=[leaking_packing]"),
                *("train.gradient_accumulation_steps=3", "train.logging_steps=1"),
            ),
            marks=pytest.mark.long,
        ),
        (
            STREAMS,
            *("data.eval=words.jsonl", "data.eval_fraction=null", "data.drop_leaked=false"),
            *("train.shuffle_dataset=null", "train.packing=true", "train.max_length=256"),
        ),
    ],
    ids=["accumulation", "packing dft lora", "wrapped accumulation", "stream"],
)
def test_shares_times_losses_add_up_to_the_logged_loss(overrides, two_sources, go):
    code, out, err = go(RECIPE, *overrides)
    assert code == 0, err
    assert "of sums, words" in out
    train = [entry for entry in read_log("out") if "loss" in entry]
    assert len(train) >= 2
    for entry in train:
        assert add_up(entry) == pytest.approx(entry["loss"], rel=1e-6)
    assert {"loss/sums", "loss/words"} <= {key for entry in train for key in entry}
    if "data.eval=words.jsonl" in overrides:
        return
    evaluations = [entry for entry in read_log("out") if "eval_loss" in entry]
    assert len(evaluations) == 2
    for entry in evaluations:
        assert add_up(entry, "eval_") == pytest.approx(entry["eval_loss"], rel=1e-6)


def measure_reference(rows):
    """Return sums of the losses of tokens, and their numbers, by a plain model of transformers on rows one by one."""
    model = AutoModelForCausalLM.from_pretrained(paths.EMBEDDED / "tiny")
    total, tokens = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
            number = int((labels[:, 1:] != -100).sum())
            total, tokens = total + float(model(input_ids=ids, labels=labels).loss) * number, tokens + number
    return total, tokens


@needs_token_losses
@pytest.mark.parametrize("packing", ["false", "true"])
def test_losses_by_source_equal_those_of_each_source_alone_and_change_no_weight(packing, two_sources, go, monkeypatch):
    # all rows in one batch of one step, so that the base model computes the loss
    words = ("train.per_device_train_batch_size=40", "train.per_device_eval_batch_size=40", "train.logging_steps=1")
    words = (*words, f"train.packing={packing}", "train.max_steps=1", "train.eval_steps=1")
    inputs = []
    tokenize = build.tokenize
    monkeypatch.setattr(stages.build, "tokenize", lambda *a, **k: inputs.append(tokenize(*a, **k)) or inputs[-1])
    assert go(RECIPE, *words)[0] == 0
    first_eval, train = read_log("out")[:2]
    for part, entry, prefix in (("train", train, ""), ("eval", first_eval, "eval_")):
        split, encoded = inputs[0].encoded[part]
        sources = split.source_indices[encoded.rows.data["row"].to_numpy()]
        measured = {}
        for number, name in enumerate(("sums", "words")):
            measured[name] = measure_reference([encoded.rows[int(n)] for n in np.flatnonzero(sources == number)])
        everything = sum(tokens for _, tokens in measured.values())
        for name, (total, tokens) in measured.items():
            assert entry[f"{prefix}loss/{name}"] == pytest.approx(total / tokens, rel=1e-5)
            assert entry[f"{prefix}loss_token_share/{name}"] == pytest.approx(tokens / everything, rel=1e-12)
    if packing == "true":
        return
    monkeypatch.setattr(build.row_groups, "find_groups", lambda rows: Grouping({}))
    code, out, _ = go(RECIPE, *words, "train.output_dir=plain")
    assert code == 0
    assert "logged as" not in out
    assert are_equal("out", "plain")
    log = [{key: value for key, value in entry.items() if "/" not in key} for entry in read_log("out")]
    assert log == read_log("plain")


@needs_token_losses
def test_losses_by_source_stand_in_metrics_eval_json_and_report(two_sources, go, here):
    code, out, _ = go(RECIPE.replace("eval_fraction: 0.3", "eval: [sums.jsonl, words.jsonl]\n  drop_leaked: false"))
    assert code == 0
    assert "logged as loss/NAME and eval_loss/NAME of sums, words" in out
    entries = [entry for entry in read_log("out") if any(key.startswith("eval_loss/") for key in entry)]
    for entry in entries:  # the Trainer logs each evaluation set in an entry of its own
        (name,) = [key.removeprefix("eval_loss/") for key in entry if key.startswith("eval_loss/")]
        assert entry[f"eval_loss/{name}"] == pytest.approx(entry[f"eval_{name}_loss"], rel=1e-6)
        assert entry[f"eval_loss_token_share/{name}"] == 1
    metrics = json.loads((here / "out" / "run.json").read_text())["metrics"]
    losses = json.loads((here / "out" / "eval.json").read_text())["after"]["losses"]
    assert losses == {name: pytest.approx(metrics[f"eval_loss/{name}"]) for name in ("sums", "words")}
    page = (here / "out" / "report.html").read_text()
    assert "Loss by source and task" in page
    assert all(f"<title>{key}/{name}</title>" in page for key in ("loss", "eval_loss") for name in ("sums", "words"))


def make_split(sources, tasks, order=None, task_of_source=""):
    """Return what `find_groups` reads of a split: rows with tasks, their sources, and the order of training."""
    columns = {"task": tasks} if tasks else {"text": ["t"] * len(sources)}
    described = [
        types.SimpleNamespace(short_name=name, source=types.SimpleNamespace(task=task))
        for name, task in zip("abc", task_of_source.split() or [""] * 3, strict=True)
    ]
    return types.SimpleNamespace(
        rows=Dataset.from_dict(columns),
        sources=described,
        source_indices=np.array(sources),
        order=np.arange(len(sources)) if order is None else np.array(order),
    )


@pytest.mark.parametrize(
    ("sources", "tasks", "names"),
    [
        ([0, 0, 1], None, {"loss": ["a", "a", "b"]}),
        ([0, 0, 0], ["add", "sub", "add"], {"loss": ["add", "sub", "add"]}),
        ([0, 0, 0], ["add", None, "add it"], {"loss": ["add", "no_task", "add_it"]}),
        ([0, 0, 1], ["add", "add", "sub"], {"loss": ["a", "a", "b"]}),  # a task is a source
        ([0, 1, 1], ["add", "add", "sub"], {"loss": ["a", "b", "b"], "task_loss": ["add", "add", "sub"]}),
        ([0, 0, 0], ["add", "add", "add"], None),
        ([0, 0, 0], None, None),
        ([0, 0, 0], ["q-a", "q a", "c"], {"loss": ["q_a_1", "q_a_2", "c"]}),
    ],
)
def test_groups_are_named_by_source_and_by_task(sources, tasks, names):
    rows = types.SimpleNamespace(train=make_split(sources, tasks), eval={}, streaming=False)
    grouping = row_groups.find_groups(rows)
    if names is None:
        assert grouping == Grouping({})
        return
    groups = grouping.parts["train"]
    assert {key: [values[n] for n in groups.numbers] for key, values in groups.names.items()} == names


@pytest.mark.parametrize(
    ("tasks", "names"), [("math chat code", ["math", "chat", "code"]), ("math math code", ["a", "b", "code"])]
)
def test_source_is_named_by_its_task_or_by_its_file_where_several_have_one_task(tasks, names):
    train = make_split([0, 1, 2], tasks.split(), task_of_source=tasks)
    groups = row_groups.find_groups(types.SimpleNamespace(train=train, eval={}, streaming=False)).parts["train"]
    assert list(groups.names["loss"]) == names
    assert groups.names.get("task_loss", ()) == (() if names[0] == "math" else ("math", "math", "code"))


def test_too_many_tasks_and_tasks_of_streams_are_named_as_not_logged():
    many = make_split([0] * 60, [f"task {n}" for n in range(60)])
    grouping = row_groups.find_groups(types.SimpleNamespace(train=many, eval={}, streaming=False))
    assert grouping == Grouping({}, ("not logged by task: 60 tasks are more than 50",))
    few = make_split([0] * 60, [f"task {n}" for n in range(60)], order=range(40))
    assert (
        row_groups.find_groups(types.SimpleNamespace(train=few, eval={}, streaming=False)).parts["train"].number == 40
    )
    stream = row_groups.find_groups(types.SimpleNamespace(train=few, eval={}, streaming=True))
    assert stream == Grouping({}, ("not logged by task: the tasks of a stream are not known before it is read",))


@needs_token_losses  # TRL 1.8 repeats the first rows of a file in wrapped packs
@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
@pytest.mark.parametrize("seed", [None, 1])
def test_packs_are_the_same_with_groups_and_each_token_has_the_group_of_its_row(strategy, seed):
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 3, 1500).astype(np.int16)
    ids = [[int(number)] * int(rng.integers(1, 14)) for number in numbers]  # the tokens say their group
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids, "row": list(range(1500))})
    encoded = EncodedRows(rows, [])
    groups = RowGroups(numbers, {"loss": ("a", "b", "c")})
    packs = cache.pack(encoded, 16, strategy, seed=seed, groups=groups)
    plain = cache.pack(encoded, 16, strategy, seed=seed)
    assert packs.select_columns(plain.column_names)[:] == plain[:]
    for pack in packs:
        assert source_losses.spread_groups(pack).tolist() == pack["input_ids"]
        assert len(pack["groups"]) <= len(pack["input_ids"])


@needs_token_losses
def test_loss_that_is_no_sum_of_tokens_is_named_and_the_run_goes_on(two_sources, go):
    code, out, _ = go(RECIPE, "train.label_smoothing_factor=0.1", "train.max_steps=1", "evaluate=false")
    assert code == 0
    assert "not logged by source or task: with train.label_smoothing_factor the loss is not the sum" in out
    assert not any("/" in key for entry in read_log("out") for key in entry)


@needs_token_losses
def test_losses_that_do_not_add_up_are_logged_no_more(monkeypatch):
    shown = []
    trainer = types.SimpleNamespace(
        args=types.SimpleNamespace(loss_type="nll", label_smoothing_factor=0, n_gpu=1),
        accelerator=types.SimpleNamespace(reduce=lambda tensor, kind: tensor),
        state=types.SimpleNamespace(global_step=1),
        eval_dataset=None,
        data_collator=None,
        compute_loss=None,
        log=shown.append,
    )
    monkeypatch.setattr(source_losses.patches, "keep_columns", lambda *_: None)
    groups = RowGroups(np.zeros(1, dtype=np.int16), {"loss": ("a", "b")})
    verification = types.SimpleNamespace(is_paused=False)
    losses = source_losses.SourceLosses(
        trainer, Grouping({"train": groups}), verification=verification, show=shown.append
    )
    window = {"names": {"loss": ["a", "b"]}, "sums": [[0.5, 0.25], [1.5, 0.75], [0.0, 0.0]]}
    trainer.args.device = torch.device("cpu")
    losses.restore_window(window, last_logged=0)
    trainer.log({"loss": 2.0})
    values = {"loss/a": 2.0, "loss/b": 2.0, "loss_token_share/a": 0.25, "loss_token_share/b": 0.75}
    assert shown.pop() == {"loss": 2.0} | values
    trainer.state.global_step = 2
    losses.restore_window(window, last_logged=1)
    trainer.log({"loss": 2.1})
    assert shown == [
        "note      losses by source are logged no more: they add up to 2, not to 2.1",
        {"loss": 2.1},
    ]
