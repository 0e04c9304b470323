"""Times the quickstart from Enter to its first optimizer step, against the imports and the model that it needs.

    python benchmarks/first_step.py [PAIRS]

"imports" imports torch and trl's SFTTrainer, loads the quickstart's model and tokenizer, and ends. The other sides run
the recipe and end when the first optimizer step is done: rows are read, formatted, masked, checked and packed, and the
model is loaded. "cached tokens" finds the tokens in the cache, as a second run does; "empty cache" does not, as a first
run. With `evaluate:` the base model first answers the prompts of the evaluation set, for the comparison with the
trained model; the last two sides include this work, the others leave it out.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TINY = ROOT / "trl_sft" / "embedded" / "tiny"
IMPORTS = f"""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
AutoModelForCausalLM.from_pretrained({str(TINY)!r})
AutoTokenizer.from_pretrained({str(TINY)!r})
"""
# a thread waits for torch and ends the process after the first optimizer step
RUN_RECIPE = """
import os, sys, threading, time
def end_after_first_step():
    while not getattr(sys.modules.get("torch.optim.optimizer"), "register_optimizer_step_post_hook", None):
        time.sleep(0.02)
    sys.modules["torch.optim.optimizer"].register_optimizer_step_post_hook(lambda *_: os._exit(0))
threading.Thread(target=end_after_first_step, daemon=True).start()
from trl_sft.cli import main
sys.exit(main(sys.argv[1:]) or 1)
"""
SIDES = ("imports", "cached tokens", "empty cache", "cached tokens, with evaluation", "empty cache, with evaluation")


def run(side, filled_cache):
    """Return the seconds of one run; `filled_cache` holds the tokens of an earlier run."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = [str(ROOT / "recipes" / "quickstart.yaml"), f"train.output_dir={folder}/out"]
        evaluates = side.endswith("with evaluation")
        overrides = [] if evaluates else ["evaluate=false", "train.eval_on_start=false"]
        command = ["-c", IMPORTS] if side == "imports" else ["-c", RUN_RECIPE, *recipe, *overrides]
        cache = folder if side.startswith("empty cache") else filled_cache
        env = os.environ | {"HF_HOME": cache, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        began = time.perf_counter()
        process = subprocess.run([sys.executable, *command], check=False, capture_output=True, text=True, env=env)
        seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"{side}: {(process.stdout + process.stderr)[-3000:]}")
    return seconds


def main(pairs):
    """Print the time of each side, and its ratio to the imports alone."""
    with tempfile.TemporaryDirectory() as filled_cache:
        for side in SIDES:  # fills the caches of the disk and of the tokens
            run(side, filled_cache)
        times = {side: [] for side in SIDES}
        for n in range(pairs):
            for side in SIDES[:: 1 if n % 2 == 0 else -1]:
                times[side].append(run(side, filled_cache))
    for side in SIDES:
        ratios = sorted(a / b for a, b in zip(times[side], times["imports"], strict=True))
        spread = f"{statistics.median(ratios):.2f} times the imports ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"{side}: {statistics.median(times[side]):.2f} s, {spread}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
