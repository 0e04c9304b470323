"""Times training steps with everything that watches a run, against the same trainer with all of it off.

    python benchmarks/monitoring.py [PAIRS]

"on" is a run as a user has it: screen, log.jsonl, warning signs, throughput with the parts of a step, verification,
tests of losses, signals. "off" is the same trainer, of the same recipe and rows, with none of these. Evaluation and its
sample answers are left out on both sides; so is everything before step 20. The losses of both sides are compared
first. Wall time and processor time of steps 20 to 220 are printed; a step is short (16 rows, a tiny model), so the
share is larger than on a model of usual size.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIRST, STEPS = 20, 220
RECIPE = f"""\
model: {{name_or_path: trl_sft:tiny}}
data: {{train: {{path: "trl_sft:skills", split: train}}}}
train:
  output_dir: out
  max_steps: {STEPS}
  per_device_train_batch_size: 16
  learning_rate: 1e-3
  logging_steps: 5
  save_strategy: 'no'
evaluate: false
"""
CHILD = f"""
import contextlib, json, os, sys, time
from transformers import TrainerCallback
from trl_sft.training import callbacks, run, stages

class Timer(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == {FIRST}:
            self.began = time.perf_counter(), time.process_time()
        if state.global_step == {STEPS}:
            seconds = time.perf_counter() - self.began[0], time.process_time() - self.began[1]
            losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
            with open("result.json", "w") as file:
                json.dump([*seconds, losses], file)
            os._exit(0)

def replace(trainer, ours):
    stages.replace_callbacks(trainer, [*(ours if sys.argv.pop() == "on" else ()), Timer()])

run.replace_callbacks = replace
if sys.argv[-1] == "off":
    run.callbacks.watch = lambda *_: contextlib.nullcontext()
from trl_sft.cli import main
sys.exit(main(["recipe.yaml"]) or 1)
"""


def measure(side):
    """Return wall seconds, processor seconds and the losses of one run, in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
        env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", CHILD, side]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=env, cwd=folder)
        result = Path(folder) / "result.json"
        if not result.is_file():
            raise SystemExit(f"{side}: {(done.stdout + done.stderr)[-3000:]}")
        return json.loads(result.read_text(encoding="utf-8"))


def main(pairs):
    """Print the overhead of watching a run: median of the pairs, lowest and highest."""
    results = {"on": [], "off": []}
    for number in range(pairs):
        for side in ("on", "off")[:: 1 if number % 2 == 0 else -1]:
            results[side].append(measure(side))
    if any(on[2] != off[2] for on, off in zip(results["on"], results["off"], strict=True)):
        raise SystemExit("the losses of both sides are not equal")
    steps = STEPS - FIRST
    for index, name in enumerate(("wall time", "processor time")):
        ratios = sorted(on[index] / off[index] for on, off in zip(results["on"], results["off"], strict=True))
        middle = {side: statistics.median(result[index] for result in results[side]) / steps for side in results}
        spread = f"{statistics.median(ratios) - 1:+.1%} ({ratios[0] - 1:+.1%} to {ratios[-1] - 1:+.1%}, {pairs} pairs)"
        print(f"{name} of a step: {middle['on'] * 1000:.1f} ms on, {middle['off'] * 1000:.1f} ms off, {spread}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
