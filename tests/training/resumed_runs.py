"""What the tests of resumed runs share: the comparison of two runs, file by file and value by value."""

import contextlib
import json
from pathlib import Path

import torch

from trl_sft import checkpoints, run_folder
from trl_sft.errors import Interrupted
from trl_sft.training import progress

COUNTS = ("optimizer_steps", "rows", "tokens", "loss_tokens", "finished_steps")  # of run.json
MIRRORED = """\
model: {name_or_path: trl_sft:tiny}
data: {train: rows.jsonl, eval_fraction: 0.2}
train:
  output_dir: out
  max_steps: 6
  save_steps: 2
  save_total_limit: 1
  per_device_train_batch_size: 2
  logging_steps: 1
evaluate: false
run: {mirror: "URL"}
"""  # a run whose checkpoints are copied to a place
_STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


@contextlib.contextmanager
def killed_after_the_last_step(monkeypatch):
    """End runs of the block after their last checkpoint, before the Trainer logs the train loss."""

    def kill(*args, **kwargs):
        raise Interrupted(9)

    with monkeypatch.context() as patch:
        patch.setattr(progress.Progress, "on_train_end", kill)
        yield


def combine(*overrides):
    """Return overrides of which the last one for each key counts."""
    return tuple({override.partition("=")[0]: override for override in overrides}.values())


def is_time(name):
    """Tell whether a logged value differs between equal runs."""
    return any(part in name for part in ("runtime", "per_second"))


def remove_times(entry):
    return {name: value for name, value in entry.items() if not is_time(name)}


def read_log(folder):
    """Return the entries of log.jsonl without times."""
    return [remove_times(json.loads(line)) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def read_run(folder):
    return json.loads((Path(folder) / "run.json").read_text())


def are_equal(folder, other):
    """Tell whether two folders hold the same weights, bit by bit."""
    names = [path.name for path in Path(folder).glob("*.safetensors")]
    assert names
    return all((Path(folder) / name).read_bytes() == (Path(other) / name).read_bytes() for name in names)


def list_differences(run, other):
    """Return what differs between two finished runs: weights, checkpoints of both, log, metrics, counts."""
    run, other = Path(run), Path(other)
    differences = [] if are_equal(other, run) else ["weights"]
    names = {path.name for path in run_folder.list_checkpoints(run)}
    shared = [path for path in run_folder.list_checkpoints(other) if path.name in names]
    for checkpoint in shared:
        differences += [
            f"{checkpoint.name}: {name}" for name in _compare_checkpoints(run / checkpoint.name, checkpoint)
        ]
    log, other_log = read_log(run), read_log(other)
    if log != other_log:
        pairs = zip(log, other_log, strict=False)
        first = next((pair for pair in pairs if pair[0] != pair[1]), (len(log), len(other_log)))
        differences.append(f"log: {first[0]} != {first[1]}")
    samples = [_read_text(folder / run_folder.SAMPLES) for folder in (run, other)]
    differences += [run_folder.SAMPLES] if samples[0] != samples[1] else []
    records = [read_run(run), read_run(other)]
    metrics = [remove_times(record["metrics"]) for record in records]
    if metrics[0] != metrics[1]:
        differences.append(f"metrics: {metrics[0]} != {metrics[1]}")
    counts = [record["measured"]["after_training"] for record in records]
    differences += [
        f"{name}: {counts[0][name]} != {counts[1][name]}" for name in COUNTS if counts[0][name] != counts[1][name]
    ]
    return differences


def _read_text(path):
    return path.read_text() if path.exists() else ""


def _compare_checkpoints(checkpoint, other):
    """Return the files whose contents differ: weights, states, what the Trainer and this package write down."""
    differing = [] if are_equal(other, checkpoint) else ["weights"]
    for name in _STATES:
        paths = [checkpoint / name, other / name]
        if any(path.exists() for path in paths):
            states = [torch.load(path, weights_only=False) if path.exists() else None for path in paths]
            differing += [name] if not _are_same(*states) else []
    states = [json.loads((path / "trainer_state.json").read_text()) for path in (checkpoint, other)]
    for state in states:
        state["log_history"] = [remove_times(entry) for entry in state["log_history"]]
        state["best_model_checkpoint"] = Path(state["best_model_checkpoint"] or "").name
        del state["stateful_callbacks"]
    differing += [f"trainer_state.json {key}" for key in states[1] if states[0].get(key) != states[1][key]]
    progress = [checkpoints.read_record(path)["progress"] for path in (checkpoint, other)]
    # `measured` compares weights with those at the beginning of the process, not of the run
    keys = [key for key in progress[1] if key != "measured"]
    differing += [f"{checkpoints.RECORD} {key}" for key in keys if progress[0].get(key) != progress[1][key]]
    return differing


def _are_same(value, other):
    """Tell whether two values are the same, tensors bit by bit."""
    if isinstance(value, torch.Tensor):
        if not isinstance(other, torch.Tensor) or value.dtype != other.dtype or value.shape != other.shape:
            return False
        return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (value, other)))
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(_are_same(value[key], other[key]) for key in value)
    if isinstance(value, list | tuple):
        return len(value) == len(other) and all(_are_same(*pair) for pair in zip(value, other, strict=True))
    if hasattr(value, "tobytes"):
        return value.tobytes() == other.tobytes()
    return value == other
