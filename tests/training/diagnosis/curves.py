"""Logs for the tests of findings: recorded runs, curves resampled from them, and synthetic ones."""

import json
import math
from pathlib import Path

import numpy as np

from trl_sft.training.diagnosis.findings import RunFacts

RECORDS = Path(__file__).parents[1] / "recorded_runs"
HEALTHY = sorted(path.stem for path in RECORDS.glob("healthy-*.json"))
_TREND, _BLOCK = 7, 5  # log entries of a running median, and of a block of residuals


def read_record(name):
    """Return a run that scripts/record_runs.py recorded, with its facts as the rules take them."""
    record = json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))
    return record | {"facts": RunFacts(**record["facts"])}


def make_facts(**values):
    """Return the facts of an ordinary run of 100 steps."""
    defaults = {
        "is_adapter": False,
        "peak_rate": 2e-5,
        "parameters": 500_000_000,
        "optimizer": "adamw_torch_fused",
        "max_steps": 100,
        "warmup_steps": 0,
        "max_grad_norm": 1.0,
        "has_loss_scale": False,
        "loss_tokens": {"eval": 1000},
    }
    return RunFacts(**defaults | values)


def make_log(losses, *, evals=(), every=1, **columns):
    """Return log entries: a train loss every `every` steps, and (step, eval loss) in between."""
    entries = [{"step": step, "eval_loss": loss, "epoch": step / 50} for step, loss in evals]
    for index, loss in enumerate(losses):
        extra = {name: values[index] for name, values in columns.items()}
        entries.append({"step": (index + 1) * every, "loss": loss, "grad_norm": 0.5, "epoch": index / 50} | extra)
    return sorted(entries, key=lambda entry: (entry["step"], "eval_loss" in entry))


def resample(log, draw):
    """Return a log whose noise is resampled: the trend of each column stays, residuals are drawn in blocks.

    The trend is a running median of the logarithms. Blocks of residuals keep what neighbouring entries have in common;
    loss and gradient norm take the same blocks (moving block bootstrap, Kuensch 1989).
    """
    entries = [dict(entry) for entry in log]
    train = [index for index, entry in enumerate(entries) if "loss" in entry]
    count = len(train)
    starts = draw.integers(0, max(1, count - _BLOCK), size=math.ceil(count / _BLOCK))
    order = np.concatenate([np.arange(start, start + _BLOCK) for start in starts])[:count] % count
    for name in ("loss", "grad_norm"):
        values = np.log([max(entries[index][name], 1e-6) for index in train])
        trend = _find_trend(values, _TREND)
        for index, value in zip(train, trend + (values - trend)[order], strict=True):
            entries[index][name] = float(np.exp(value))
    evals = [index for index, entry in enumerate(entries) if "eval_loss" in entry and entry["step"] > 0]
    values = np.log([entries[index]["eval_loss"] for index in evals])
    trend = _find_trend(values, 3)
    for index, value in zip(evals, trend + draw.choice(values - trend, size=len(evals)), strict=True):
        entries[index]["eval_loss"] = float(np.exp(value))
    return entries


def _find_trend(values, width):
    """Return running medians; windows shrink at the ends and stay symmetric, else a steep start looks like noise."""
    last = len(values) - 1
    halves = [min(width // 2, i, last - i) for i in range(len(values))]
    return np.array([np.median(values[i - half : i + half + 1]) for i, half in enumerate(halves)])
