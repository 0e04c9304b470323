"""The estimate of time before step 1: its numbers, and that the run is the same with and without it."""

import json
import re
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RECIPE
from datasets import Dataset, IterableDataset

from trl_sft.training import live, time_probe

FULL = RECIPE.replace("rows.jsonl}", "rows.jsonl, eval_fraction: 0.2}")
WEIGHTS = ("model.safetensors", "adapter_model.safetensors")
STREAM = IterableDataset.from_generator(lambda: iter(()))
LENGTHS = (1, 9, 2, 8, 3, 7, 4, 6)


def make_arguments(**changes):
    values = {
        "seed": 0,
        "padding_free": False,
        "packing": False,
        "packing_strategy": "bfd",
        "pad_to_multiple_of": None,
        "train_sampling_strategy": "random",
    }
    return types.SimpleNamespace(**values | changes)


def draw(*, size=2, processes=1, **changes):
    rows = Dataset.from_dict({"input_ids": [[0] * length for length in LENGTHS]})
    return time_probe.draw_batches(rows, make_arguments(**changes), size=size, processes=processes)


def test_drawn_batches_hold_each_row_once_with_the_positions_that_the_collator_makes():
    drawn = draw()
    assert sorted(row for batch in drawn.rows for row in batch) == list(range(8))
    assert drawn.positions.tolist() == [2 * max(LENGTHS[row] for row in batch) for batch in drawn.rows]
    flat = draw(padding_free=True)
    assert flat.positions.tolist() == [sum(LENGTHS[row] for row in batch) for batch in flat.rows]
    assert set(draw(pad_to_multiple_of=8).positions) <= {16, 32}
    grouped = draw(train_sampling_strategy="group_by_length")
    assert sorted(grouped.positions.tolist()) == [4, 8, 14, 18]
    # of the batches of two processes the larger one takes the time of both
    assert draw(processes=2).positions.tolist() == [max(drawn.positions[i : i + 2]) for i in (0, 2)]
    assert [sorted(batch) for batch in draw(size=99).rows] == [list(range(8))]


def test_time_of_a_pass_is_a_line_over_its_positions():
    positions, drawn = np.array([100, 200, 300]), np.array([100, 100, 300, 500])
    seconds, spread = time_probe.fit_pass_time(positions, 0.5 + 0.01 * positions, drawn)
    assert seconds == pytest.approx(0.5 + 0.01 * 250)
    assert spread == pytest.approx(0, abs=1e-9)
    noisy, spread = time_probe.fit_pass_time(positions, np.array([1.4, 2.6, 3.5]), drawn)
    assert noisy == pytest.approx(3.025, abs=0.1)
    assert 0 < spread < 0.3


def test_time_of_a_pass_is_the_mean_where_lengths_tell_nothing():
    seconds, spread = time_probe.fit_pass_time(np.array([512, 512, 510]), np.array([1.0, 1.2, 1.1]), np.array([512]))
    assert seconds == pytest.approx(1.1)
    # standard deviation 0.1 of 1.1, of the mean of three
    assert spread == pytest.approx(1.96 * 0.1 / 1.1 / 3**0.5)
    # longer batches that took less time are noise
    assert time_probe.fit_pass_time(np.array([100, 300]), np.array([3.0, 1.0]), np.array([300]))[0] == 2.0


def test_time_of_a_pass_below_zero_is_never_estimated():
    seconds, _ = time_probe.fit_pass_time(np.array([100, 200, 400]), np.array([1.0, 3.0, 9.0]), np.array([20]))
    assert seconds > 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"max_steps": 12}, "the run has only 12 steps"),
        ({"global_step": 99}, "the run has only 1 step"),
        ({"train_dataset": STREAM, "packing": True}, "the packs of a stream"),
        ({"train_dataset": STREAM}, ""),
        ({"device": "mps"}, "random state of mps"),
        ({"torch_compile": True}, "compiled"),
        ({"optim": "adalomo"}, "adalomo moves the weights"),
        ({"optim": "galore_adamw_layerwise"}, "backward pass"),
        ({"engine": "ZeRO-2"}, "not made for ZeRO-2"),
        ({"engine": live.FSDP}, "not made for FSDP"),
        ({"engine": live.DDP}, ""),
    ],
    ids=str,
)
def test_probe_is_left_out_with_its_reason(changes, reason, monkeypatch):
    values = {
        "packing": False,
        "max_steps": 100,
        "global_step": 0,
        "device": "cpu",
        "torch_compile": False,
        "optim": "adamw_torch",
    }
    values |= {"train_dataset": Dataset.from_dict({"input_ids": [[1]]}), "engine": live.ONE_PROCESS} | changes
    monkeypatch.setattr(live, "live_engine", lambda _: values["engine"])
    device = types.SimpleNamespace(type=values["device"])
    trainer = types.SimpleNamespace(
        train_dataset=values["train_dataset"],
        state=types.SimpleNamespace(max_steps=values["max_steps"], global_step=values["global_step"]),
        args=types.SimpleNamespace(
            device=device, torch_compile=values["torch_compile"], optim=values["optim"], packing=values["packing"]
        ),
    )
    obstacle = time_probe.find_obstacle(trainer)
    assert reason in obstacle
    assert bool(obstacle) == bool(reason)


def read_results(folder):
    """Return the bytes of the weights, the log without times, and what the loop consumed."""
    path = next(Path(folder) / name for name in WEIGHTS if (Path(folder) / name).exists())
    log = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k} for entry in log]
    record = json.loads((Path(folder) / "run.json").read_text())
    return path.read_bytes(), kept, record["measured"]["after_training"], record["measured"]["first_step"]


def compare_with_and_without(go, monkeypatch, *words):
    """Train with the probe and without it; return the screen with it."""
    monkeypatch.setattr(time_probe, "_MIN_STEPS", 1)
    code, out, err = go(FULL, *words, "train.output_dir=probed")
    assert code == 0, err
    monkeypatch.setattr(time_probe, "_MIN_STEPS", 30)
    code, _, err = go(FULL, *words, "train.output_dir=plain")
    assert code == 0, err
    assert read_results("probed") == read_results("plain")
    throughput = [json.loads((Path(name) / "run.json").read_text())["throughput"] for name in ("probed", "plain")]
    assert [("estimated_seconds" in values) for values in throughput] == [True, False]
    return out


def test_run_is_bit_equal_with_and_without_the_probe_and_compares_it_with_the_truth(go, here, monkeypatch):
    words = ("lora={r: 4, target_modules: all-linear, lora_dropout: 0.2}", "train.max_steps=4", "evaluate=false")
    words += ("train.eval_strategy=steps", "train.eval_steps=2", "run.price_per_hour=3600")
    out = compare_with_and_without(go, monkeypatch, *words)
    number = r"([\d.]+)"
    line = rf"^  time +about {number} s \({number} s to {number} s\), about {number} \({number} to {number}\) at 3600"
    seconds, low, high, money, least, most = map(float, re.search(line, out, re.MULTILINE).groups())
    assert low <= seconds <= high
    assert [money, least, most] == pytest.approx([seconds, low, high], abs=0.06)  # one a second
    assert re.search(
        r"^Time: steps and evaluations \S+ s, .* at 3600 an hour; estimated before step 1: about", out, re.M
    )
    measured = json.loads((here / "probed/run.json").read_text())["throughput"]
    assert measured["estimated_seconds_low"] < measured["estimated_seconds"] < measured["estimated_seconds_high"]
    assert measured["actual_cost"] == pytest.approx(measured["actual_seconds"], abs=1e-3)
    steps = measured["training_seconds"]
    assert steps < measured["actual_seconds"]


def test_time_measured_beside_other_programs_says_so_and_may_be_shorter():
    values = {"seconds": 100.0, "low": 40.0, "high": 120.0, "passes": 2, "covers_all_rows": True, "probe_seconds": 1.0}
    free = time_probe.TimeEstimate(**values, waiting=0.05)
    busy = time_probe.TimeEstimate(**values, waiting=0.42)
    assert free.write() == "about 1 min 40 s (40 s to 2 min 0 s)"
    assert busy.write() == (
        "about 1 min 40 s (40 s to 2 min 0 s); other programs used the processors for 42% of this measurement: "
        "the run is faster once they end"
    )
    assert time_probe.bound_time(115, 0, 0.05) == pytest.approx((100, 132.25))
    assert time_probe.bound_time(115, 0, 0.42) == pytest.approx((58, 132.25))


def test_time_of_waiting_for_a_processor_is_read_as_linux_writes_it(monkeypatch, tmp_path):
    monkeypatch.setattr(time_probe, "_WAITS", tmp_path / "schedstat")
    processor, card = torch.device("cpu"), torch.device("meta")
    assert time_probe._read_waiting_time(processor) == 0
    (tmp_path / "schedstat").write_text("2000000000 1500000000 12\n")
    assert time_probe._read_waiting_time(processor) == 1.5
    assert time_probe._read_waiting_time(card) == 0


@pytest.mark.long
@pytest.mark.parametrize(
    "words",
    [
        ("train.packing=true", "train.max_length=64"),
        ("train.gradient_accumulation_steps=3", "train.train_sampling_strategy=group_by_length"),
        ("train.neftune_noise_alpha=5", "train.eval_on_start=true"),
        ("train.gradient_checkpointing=true", "train.optim=adafactor"),
        ("data.train={path: rows.jsonl, streaming: true}", "data.eval_fraction=null"),
        ("model.dtype=bfloat16", "train.dataloader_num_workers=1"),
    ],
    ids=lambda words: " ".join(words).replace("train.", ""),
)
def test_run_is_bit_equal_with_and_without_the_probe_under_other_settings(words, go, monkeypatch):
    compare_with_and_without(go, monkeypatch, *words, "train.max_steps=6", "evaluate=false")


def test_short_run_says_that_its_time_is_not_estimated(go):
    code, out, err = go(RECIPE)
    assert code == 0, err
    assert re.search(r"^  time +not estimated: the run has only 2 steps$", out, re.MULTILINE)
