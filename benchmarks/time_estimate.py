"""Compares the time that a run estimates before step 1 with the time that it took, for five recipes.

    python benchmarks/time_estimate.py [RUNS]

Each recipe is a real run, in a fresh process, and prints what run.json holds: the estimate with its interval, the
seconds of the same steps and evaluations, the ratio of both, and what the measurement before step 1 cost.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
SHORT = ("train.num_train_epochs=1", "evaluate.max_rows=8")
RECIPES = {
    "quickstart, one epoch": SHORT,
    "LoRA": (*SHORT, "lora={r: 8, target_modules: all-linear}"),
    "packing": (*SHORT, "train.num_train_epochs=3", "train.packing=true", "train.per_device_train_batch_size=1"),
    "grouped by length": (*SHORT, "train.train_sampling_strategy=group_by_length"),
    "accumulation and checkpointing": (
        *SHORT,
        "train.per_device_train_batch_size=4",
        "train.gradient_accumulation_steps=4",
        "train.gradient_checkpointing=true",
    ),
}


def measure(overrides):
    """Return `throughput` of run.json of one run."""
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
        words = [f"train.output_dir={folder}/out", *{word.partition("=")[0]: word for word in overrides}.values()]
        command = [sys.executable, "-m", "trl_sft", str(QUICKSTART), *words]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=env, cwd=folder)
        if done.returncode:
            raise SystemExit((done.stdout + done.stderr)[-3000:])
        return json.loads((Path(folder) / "out" / "run.json").read_text(encoding="utf-8"))["throughput"]


def main(runs):
    """Print a line for each run, and how many lay inside their interval."""
    inside = 0
    for name, overrides in RECIPES.items():
        for _ in range(runs):
            measured = measure(overrides)
            seconds, actual = measured["estimated_seconds"], measured["actual_seconds"]
            low, high = measured["estimated_seconds_low"], measured["estimated_seconds_high"]
            inside += low <= actual <= high
            text = f"estimated {seconds:.1f} s ({low:.1f} to {high:.1f}), took {actual:.1f} s"
            cost = measured["estimate_probe_seconds"]
            print(f"{name}: {text}, {seconds / actual:.2f} of it; measuring took {cost:.1f} s", flush=True)
    print(f"{inside} of {len(RECIPES) * runs} runs took a time inside their interval")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
